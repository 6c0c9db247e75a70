"""The pixel step as one pure function: from bytes and stored images to the stored images' gradient.

Everything between the two is inside: decoding, normalising, augmenting both sides alike, the
network, both gradients and the distance. So a compiler can take it whole, and one call can serve
many classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dc_replay.augment import Augmentation
from dc_replay.errors import DCReplayError
from dc_replay.formation import Formation
from dc_replay.networks import MatchingNetwork, Parameters
from dc_replay.objectives import Matched, Objective, matching_step
from dc_replay.pixels import Scale
from dc_replay.placement import SHARE, free_bytes
from dc_replay.terms import Terms


class ClassBatch(NamedTuple):
    """What one class's pixel step is given; for several classes, each has one more dimension.

    Attributes:
        real: Real images, uint8 ``[batch, channels, height, width]``.
        stored: Open images in ``[0, 1]``, ``[count, compression * channels, height, width]``.
        used: Decoded images that are used, int64 ``[images]``; None uses all.
        changes: The numbers of the augmentation that both sides share, ``[1, uniforms]``.
        label: The class, an int64 scalar.
        terms: The sets to compare.
    """

    real: Tensor
    stored: Tensor
    used: Tensor | None
    changes: Tensor
    label: Tensor
    terms: Terms


MatchFunction = Callable[[Parameters, Scale, ClassBatch], Matched]
"""Distance between the sets of a class, and its gradient in the *stored* images."""


def match_function(
    network: MatchingNetwork, objective: Objective, formation: Formation, augment: Augmentation
) -> MatchFunction:
    """The pixel step of one class.

    Args:
        network: The network as a function.
        objective: What to match.
        formation: How stored images become those that the network sees.
        augment: One change for all images of the class, real and synthetic.
    """

    def match(parameters: Parameters, scale: Scale, batch: ClassBatch) -> Matched:
        def form(stored: Tensor) -> Tensor:
            decoded = formation.decode(stored)
            if batch.used is not None:
                decoded = decoded[batch.used]
            return augment.apply(scale.normalise(decoded), batch.changes)

        real = augment.apply(scale.normalise(batch.real), batch.changes)
        formed: Any = torch.func.vjp(form, batch.stored)
        synthetic, pull = formed
        found = matching_step(
            objective, network, parameters, real, synthetic, batch.label, batch.terms
        )
        # Anew, because the compiler of PyTorch 2.11 cannot return what `_replace` makes.
        return Matched(pull(found.slope)[0], found.distance, found.prefixes)

    return match


def for_several(match: MatchFunction) -> MatchFunction:
    """The pixel step of several classes with equal shapes, in one call.

    Every tensor of the batch, and of what comes back, has one more dimension, that of the classes.
    """

    def several(parameters: Parameters, scale: Scale, batch: ClassBatch) -> Matched:
        dims = ClassBatch(0, 0, None if batch.used is None else 0, 0, 0, 0)  # type: ignore[arg-type]
        mapped: Any = torch.func.vmap(match, in_dims=(None, None, dims), randomness="different")
        found: Matched = mapped(parameters, scale, batch)
        return found

    return several


class Launches:
    """Runs the pixel steps of all classes, several in one call where that is faster.

    A GPU waits for launches, so it should get many classes in one. A CPU is
    faster with one at a time, whose images stay in its cache.

    Args:
        alone: The pixel step of one class.
        several: That of several.
        most: Classes in one call; None takes what fits a quarter of a GPU's free
            memory, and 1 elsewhere.

    Attributes:
        most: Classes in one call; None before the first of all.
    """

    def __init__(
        self, alone: MatchFunction, several: MatchFunction, *, most: int | None = None
    ) -> None:
        self.most = most
        self._alone = alone
        self._several = several

    def __call__(
        self, parameters: Parameters, scale: Scale, batches: Sequence[ClassBatch]
    ) -> list[Matched]:
        """Take the step of each class.

        Raises:
            DCReplayError: If not even one class at a time fits the memory.
        """
        if self.most is None:
            self.most = self._fitting(parameters, scale, batches)
        found: dict[int, Matched] = {}
        left = _alike(batches)
        while left:
            group = left[0]
            # Parts of nearly equal size, of which a compiler meets no more than two.
            size = -(-len(group) // -(-len(group) // self.most))
            try:
                results = self._launch(parameters, scale, [batches[n] for n in group[:size]])
            except torch.OutOfMemoryError as error:
                self._halve(size, error)
                continue
            found.update(zip(group[:size], results, strict=True))
            left[0] = group[size:]
            left = [group for group in left if group]
        return [found[number] for number in range(len(batches))]

    def _launch(
        self, parameters: Parameters, scale: Scale, batches: list[ClassBatch]
    ) -> list[Matched]:
        if len(batches) == 1:
            return [self._alone(parameters, scale, batches[0])]
        return _apart(self._several(parameters, scale, _together(batches)), len(batches))

    def _halve(self, size: int, error: Exception) -> None:
        if size == 1:
            raise DCReplayError(
                "a pixel step does not fit the device's memory even for one class at a time; give "
                "the condenser a smaller `sampler` batch, `most_decoded` or `network`, by "
                "dataclasses.replace"
            ) from error
        self.most = size // 2
        warnings.warn(
            f"a pixel step of {size} classes at a time does not fit the device's memory; going on "
            f"with {self.most}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _fitting(self, parameters: Parameters, scale: Scale, batches: Sequence[ClassBatch]) -> int:
        device = batches[0].stored.device
        if device.type != "cuda":
            return 1
        largest = max(batches, key=lambda batch: len(batch.stored))
        self._alone(parameters, scale, largest)  # compiles, which takes memory of its own
        free, before = free_bytes(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._alone(parameters, scale, largest)
        each = torch.cuda.max_memory_allocated(device) - before
        return max(1, int(SHARE * free / max(each, 1)))


def _alike(batches: Sequence[ClassBatch]) -> list[list[int]]:
    """Positions of the batches, grouped by the shapes of all their tensors."""
    groups: dict[Any, list[int]] = {}
    for number, batch in enumerate(batches):
        leaves = pytree.tree_leaves(batch)
        groups.setdefault(
            tuple(None if leaf is None else leaf.shape for leaf in leaves), []
        ).append(number)
    return list(groups.values())


def _together(batches: list[ClassBatch]) -> ClassBatch:
    first = batches[0]
    stacked: ClassBatch = pytree.tree_map(
        lambda *parts: None if parts[0] is None else torch.stack(parts), first, *batches[1:]
    )
    return stacked


def _apart(found: Matched, count: int) -> list[Matched]:
    return [Matched(*(part[number] for part in found)) for number in range(count)]
