"""Multisize condensation: one set of exemplars, every prefix of which is good by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_replay._checks import whole
from dc_replay.checkpoints import Snapshot
from dc_replay.distributed import SINGLE, Share


@dataclass(frozen=True)
class Multisize:
    """Condenses for every smaller size at once, so that a memory can be cut later on.

    Next to all stored images of a class, a prefix of them matches the real images: the most
    learnable one, whose distance from the real images in feature space changes fastest. Choosing a
    larger prefix than before freezes the images of the one before.

    Works with every objective (with networks that normalise over the batch, a prefix is one among
    the images of the whole) and with
    :class:`~dc_replay.subsets.SubsetMatching`, which then divides the whole only. Source: He et
    al., "Multisize Dataset Condensation", ICLR 2024.

    Attributes:
        period: Outer iterations between two choices; published are 100, and 50 for ImageNet-10.
        per_class: Choose for each class by itself instead of for all together.
        proportional: Weigh the prefix's distance by its share of the images, which moves them at
            the rate that :class:`~dc_replay.optimisation.PixelStep` gives to a set of that size.
            False is the published weight of 1, for small rates: a prefix of one in ten images
            moves ten times as fast as they do together.

    Raises:
        ArgumentError: If the period is no whole number of at least 1.
    """

    period: int = 100
    per_class: bool = False
    proportional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", whole("period", self.period))


class PrefixChoice:
    """Which prefix is matched besides the whole, as it changes over a condensation.

    The first period uses prefixes of one image. Distances are means over a period, and a change
    takes two, so the second keeps that choice, and from the third on the fastest is taken.

    Args:
        multisize: How to choose.
        counts: Stored images of each class, at least 1.
        device: Where distances are computed.
        share: Which process computes those of which class; None is this one alone.

    Attributes:
        sizes: Stored images in the matched prefix of each class; 0 for a class with one image,
            which has no smaller prefix.
        frozen: Stored images of each class that are not to move in this period.
        history: ``sizes`` of each period so far.
    """

    def __init__(
        self,
        multisize: Multisize,
        counts: Sequence[int],
        device: torch.device | str = "cpu",
        share: Share | None = None,
    ) -> None:
        self.multisize = multisize
        self._share = SINGLE.share(len(counts)) if share is None else share
        self.counts = tuple(counts)
        self.sizes = [min(1, count - 1) for count in counts]
        self.frozen = [0 for _ in counts]
        self.history: list[list[int]] = []
        self._totals = torch.zeros(len(self.counts), max(self.counts) - 1, device=device)
        self._steps = [0] * len(self.counts)
        self._outer = 0
        self._before: Tensor | None = None

    def weight(self, index: int) -> float:
        """Factor on the distance of one class's prefix."""
        return self.sizes[index] / self.counts[index] if self.multisize.proportional else 1.0

    def state(self) -> Snapshot:
        """All that changes."""
        self._share.complete(self._totals.unbind())
        tensors = {"totals": self._totals}
        if self._before is not None:
            tensors["before"] = self._before
        return Snapshot(
            tensors,
            {
                "sizes": self.sizes,
                "frozen": self.frozen,
                "history": self.history,
                "steps": self._steps,
                "outer": self._outer,
            },
        )

    def restore(self, state: Snapshot) -> None:
        """Go back to where :meth:`state` was taken."""
        self.sizes, self.frozen = list(state.values["sizes"]), list(state.values["frozen"])
        self.history = [list(sizes) for sizes in state.values["history"]]
        self._steps, self._outer = list(state.values["steps"]), state.values["outer"]
        self._totals = state.tensors["totals"].to(self._totals)
        before = state.tensors.get("before")
        self._before = None if before is None else before.to(self._totals)

    def record(self, index: int, distances: Tensor) -> None:
        """Take note of one class's distances in a pixel step.

        Args:
            index: The class's position in ``counts``.
            distances: Feature distance of each prefix from the real images, ``[count - 1]``;
                without entries where another process computes them.
        """
        if not any(self._steps):
            self.history.append(list(self.sizes))
        self._totals[index, : len(distances)] += distances
        self._steps[index] += 1

    def end_outer_iteration(self) -> bool:
        """Choose anew where a period ends.

        Returns:
            Whether it did: ``sizes`` and ``frozen`` are then those of the next period.
        """
        self._outer += 1
        if self._outer % self.multisize.period:
            return False
        self._share.complete(self._totals.unbind())
        steps = torch.tensor(self._steps, device=self._totals.device).clamp(min=1)
        mean = self._totals / steps[:, None]
        self._totals, self._steps = torch.zeros_like(mean), [0] * len(self.counts)
        previous, self._before = self._before, mean
        former = self.sizes
        if previous is not None:
            self.sizes = self._most_learnable((mean - previous).abs() / self.multisize.period)
        self.frozen = [old if new > old else 0 for old, new in zip(former, self.sizes, strict=True)]
        return True

    def _most_learnable(self, rates: Tensor) -> list[int]:
        """The prefix whose distance changes fastest: of each class, or of their mean."""
        if not rates.shape[1]:
            return list(self.sizes)
        size = torch.arange(1, rates.shape[1] + 1, device=rates.device)
        counts = torch.tensor(self.counts, device=rates.device)
        there = size < counts[:, None]
        if not self.multisize.per_class:
            together = (rates * there).sum(dim=0) / there.sum(dim=0).clamp(min=1)
            rates = together.expand_as(rates)
        best = rates.masked_fill(~there, -1).argmax(dim=1) + 1
        return [min(n, count - 1) for n, count in zip(best.tolist(), self.counts, strict=True)]
