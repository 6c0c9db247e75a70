"""What each pixel step compares, class by class: the whole, its parts, and a prefix of it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dc_replay.checkpoints import Snapshot
from dc_replay.errors import ArgumentError
from dc_replay.multisize import Multisize, PrefixChoice
from dc_replay.sampling import RealImages
from dc_replay.subsets import SubsetMatching
from dc_replay.terms import Sides, Terms, with_parts, with_prefix


@dataclass(frozen=True, eq=False)
class Drawn:
    """The decoded images of a class that a step uses.

    Attributes:
        index: Their positions, int64 ``[images]``; None for all of them in order.
        shares: What each contributes to the whole, ``[images]``.
        prefixes: What each contributes to the prefixes of 1, 2, ... stored images, without the
            whole, ``[stored - 1, images]``; without rows unless prefixes are matched.
    """

    index: Tensor | None
    shares: Tensor
    prefixes: Tensor


class Comparison:
    """Builds the terms of every step, and keeps which prefixes are matched.

    Args:
        real: The images of the experience.
        counts: Stored images of each class.
        each: Decoded images in a stored one.
        most_decoded: Decoded images of a class in one step; above that, a random subset.
        subsets: How parts are matched; None matches none.
        multisize: How prefixes are matched; None matches none.
        generator: Source of parts and random subsets.

    Raises:
        ArgumentError: If a class stores too few images for its parts although it has more, or more
            than a step may use decoded ones while prefixes are matched.
    """

    def __init__(
        self,
        real: RealImages,
        counts: Sequence[int],
        *,
        each: int,
        most_decoded: int,
        subsets: SubsetMatching | None,
        multisize: Multisize | None,
        generator: Generator,
    ) -> None:
        self._device = real.images.device
        self._each = each
        self._most = most_decoded
        self._generator = generator
        self._subsets = subsets
        self._counts = tuple(counts)
        self._synthetic_parts: list[Tensor] = []
        self._real_parts = torch.zeros_like(real.targets)
        if subsets is not None:
            self._divide(real, subsets)
        self.choice: PrefixChoice | None = None
        if multisize is not None and self._prefixes_differ(real):
            self.choice = PrefixChoice(multisize, counts, self._device, real.share)
        self._all = [
            self._describe(count, None) if count * each <= most_decoded else None
            for count in counts
        ]

    def draw(self, position: int) -> Drawn:
        """Choose the decoded images of a class for one step."""
        found = self._all[position]
        if found is not None:
            return found
        count, generator = self._counts[position], self._generator
        if self.choice is None:
            order = torch.randperm(count * self._each, generator=generator, device=generator.device)
            return self._describe(count, order[: self._most].to(self._device))
        return self._describe(count, self._even(count).to(self._device))

    def terms(self, position: int, drawn: Drawn, real: Tensor, share: float) -> Terms:
        """The terms of one step for one class.

        Args:
            position: The class's position.
            drawn: Its decoded images, from :meth:`draw`.
            real: Its real images, positions among those of all classes.
            share: What is done of the condensation, from 0 to 1.
        """
        even = torch.full((len(real),), 1 / len(real), device=self._device)
        sides = Sides(drawn.shares, even)
        if self._subsets is None:
            terms = sides.whole()
        else:
            parts = self._synthetic_parts[position]
            terms = with_parts(
                sides,
                parts if drawn.index is None else parts[drawn.index],
                self._real_parts[real],
                self._subsets.parts,
                self._subsets.weight_at(share),
            )
        choice = self.choice
        if choice is not None and choice.sizes[position]:
            size, weight = choice.sizes[position], choice.weight(position)
            terms = with_prefix(terms, drawn.prefixes, size, weight)
        return terms

    def record(self, position: int, distances: Tensor) -> None:
        """Take note of the feature distances of a class's prefixes in a step.

        Args:
            position: The class's position.
            distances: Of each prefix; without entries where another process computes them.
        """
        if self.choice is not None and self.choice.sizes[position]:
            self.choice.record(position, distances)

    def state(self) -> Snapshot:
        """All that changes; parts are drawn at the start and stay."""
        return Snapshot() if self.choice is None else self.choice.state()

    def restore(self, state: Snapshot) -> None:
        """Go back to where :meth:`state` was taken."""
        if self.choice is not None:
            self.choice.restore(state)

    def end_outer_iteration(
        self, pixels: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Choose prefixes anew where a period ends, and stop those that are frozen."""
        if self.choice is not None and self.choice.end_outer_iteration():
            for stored, frozen in zip(pixels, self.choice.frozen, strict=True):
                momentum = optimizer.state[stored].get("momentum_buffer")
                if momentum is not None:
                    momentum[:frozen] = 0

    def hold(self, pixels: Sequence[Tensor]) -> None:
        """Take the gradient from images that are frozen, so that they stay as they are."""
        if self.choice is not None:
            for stored, frozen in zip(pixels, self.choice.frozen, strict=True):
                if frozen and stored.grad is not None:
                    stored.grad[:frozen] = 0

    def _divide(self, real: RealImages, subsets: SubsetMatching) -> None:
        for name, rows, count in zip(real.labels, real.rows, self._counts, strict=True):
            decoded = count * self._each
            # A class that has no more images than these is divided into as many parts as it has.
            if decoded < subsets.parts and count < len(rows):
                raise ArgumentError(
                    f"`parts` is {subsets.parts}, but class {name} has only {decoded} decoded "
                    f"images; use at most {decoded} parts, or leave subset matching out"
                )
            self._synthetic_parts.append(
                subsets.divide(count * self._each, self._generator, self._device)
            )
            self._real_parts[rows] = subsets.divide(len(rows), self._generator, self._device)

    def _prefixes_differ(self, real: RealImages) -> bool:
        if max(self._counts) == 1:
            _say_that_nothing_is_smaller()
            return False
        for name, count in zip(real.labels, self._counts, strict=True):
            if count > self._most:
                raise ArgumentError(
                    f"`most_decoded` is {self._most}, but class {name} stores {count} images, and "
                    f"multisize condensation needs one decoded image of each in every step; make "
                    f"it at least {count}"
                )
        return True

    def _describe(self, count: int, index: Tensor | None) -> Drawn:
        if index is None:
            image = torch.arange(count, device=self._device).repeat_interleave(self._each)
        else:
            image = index // self._each
        # Without prefixes every decoded image counts the same; with them, every stored one does.
        if self.choice is None:
            shares = torch.full((len(image),), 1 / len(image), device=self._device)
            return Drawn(index, shares, shares.new_empty((0, len(image))))
        # Counted by comparison, because bincount would make a GPU wait.
        used = (image[:, None] == image).sum(dim=1)
        shares = 1 / (count * used.float())
        sizes = torch.arange(1, count, device=self._device)[:, None]
        return Drawn(index, shares, shares * (count / sizes) * (image < sizes))

    def _even(self, count: int) -> Tensor:
        """Draw decoded images so that each stored one is there, as evenly as can be."""
        generator = self._generator
        least, more = divmod(self._most, count)
        wanted = torch.full((count, 1), least, device=generator.device)
        order = torch.randperm(count, generator=generator, device=generator.device)
        wanted[order[:more]] += 1
        draws = torch.rand((count, self._each), generator=generator, device=generator.device)
        left_out = draws.argsort(dim=1).argsort(dim=1) >= wanted
        # As many as wanted come first; nonzero would make a GPU wait to count them.
        first = left_out.flatten().to(torch.uint8).argsort(stable=True)[: self._most]
        return first.sort().values


@functools.cache
def _say_that_nothing_is_smaller() -> None:
    """Warn once in a process, however many experiences there are."""
    warnings.warn(
        "multisize condensation does nothing with one stored image per class, which has no "
        "smaller prefix",
        UserWarning,
        stacklevel=2,
    )
