"""Which real images to match in each step: uniform, or representative by k-means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization, Scale

Embed = Callable[[Tensor], Tensor]
"""Maps normalised images ``[batch, ...]`` to features ``[batch, features]``."""


@dataclass(frozen=True, eq=False)
class RealImages:
    """The images of one experience, on the device, with classes numbered from 0.

    Attributes:
        images: uint8 ``[count, channels, height, width]``.
        targets: int64 ``[count]``, positions in ``labels``.
        labels: The class that each position stands for.
        normalization: What makes them the network's input.
    """

    images: Tensor
    targets: Tensor
    labels: tuple[int, ...]
    normalization: Normalization

    def __post_init__(self) -> None:
        rows = [torch.nonzero(self.targets == c).flatten() for c in range(len(self.labels))]
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_scale", self.normalization.scale(self.images.device))

    @property
    def rows(self) -> list[Tensor]:
        """For each class, the positions of its images, int64 ``[count]``."""
        found: list[Tensor] = self._rows  # type: ignore[attr-defined]
        return found

    @property
    def scale(self) -> Scale:
        """The normalization on the images' device."""
        found: Scale = self._scale  # type: ignore[attr-defined]
        return found

    def normalised(self, index: Tensor) -> Tensor:
        """The chosen images as the network sees them."""
        return self.scale.normalise(self.images[index])

    def outputs(self, function: Embed, *, batch: int = 100) -> Tensor:
        """Apply a function to all images, class by class in the order of ``rows``.

        Args:
            function: Applied to batches of one size, so that a compiler meets no other; the last
                one is filled up with images whose results are dropped.
            batch: That size.
        """
        order = torch.cat(self.rows)
        count = len(order)
        batch = min(batch, count)
        order = torch.cat([order, order[: -count % batch]])
        with torch.no_grad():
            parts = [function(self.normalised(part)) for part in order.split(batch)]
            return torch.cat(parts)[:count]

    def features_by_class(self, embed: Embed) -> tuple[Tensor, ...]:
        """Features ``[count, features]`` of each class's images, without gradients."""
        features: tuple[Tensor, ...] = self.outputs(embed).split([len(r) for r in self.rows])
        return features


class Sampler(Protocol):
    """Chooses the real images to match, for all classes at once."""

    def draw(
        self,
        real: RealImages,
        previous: Sequence[Tensor] | None,
        inner: int,
        embed: Embed,
        generator: Generator,
    ) -> list[Tensor]:
        """Choose the positions to match in inner iteration ``inner`` of a network.

        ``previous`` is what the iteration before used, or None for a fresh network.
        """
        ...


def _shuffled(rows: Tensor, generator: Generator) -> Tensor:
    order = torch.randperm(len(rows), generator=generator, device=generator.device)
    return rows[order.to(rows.device)]


def fill(rows: Tensor, count: int, generator: Generator) -> Tensor:
    """Choose exactly ``count`` of ``rows``: each at most once more often than any other."""
    passes = [_shuffled(rows, generator) for _ in range(-(-count // len(rows)))]
    return torch.cat(passes)[:count]


@dataclass(frozen=True)
class Uniform:
    """Draw real images at random, anew in every inner iteration.

    Attributes:
        batch: Images of each class. A class with fewer gives some of them twice, so that
            every step has the same shape.
    """

    batch: int = 64

    def __post_init__(self) -> None:
        _check_batch(self.batch)

    def draw(
        self,
        real: RealImages,
        previous: Sequence[Tensor] | None,
        inner: int,
        embed: Embed,
        generator: Generator,
    ) -> list[Tensor]:
        """Choose positions; see :class:`Sampler`."""
        counts = [len(rows) for rows in real.rows]
        first = torch.tensor([0, *counts[:-1]], device=generator.device).cumsum(0)
        numbers = [torch.arange(count, device=generator.device) for count in counts]
        places = torch.stack([fill(own, self.batch, generator) for own in numbers])
        # One transfer for all classes.
        places = (places + first[:, None]).to(real.images.device)
        return list(torch.cat(real.rows)[places].unbind())


@dataclass(frozen=True)
class Representative:
    """Draw the real images nearest to the centres of k-means clusters of the features.

    Source: Liu et al., DREAM, ICCV 2023, and DREAM+, section "Representative Matching".

    Attributes:
        batch: Clusters, and so images, of each class.
        every: Inner iterations after which the images are clustered anew, with the features of
            the network as it is then.
    """

    batch: int = 128
    every: int = 10

    def __post_init__(self) -> None:
        _check_batch(self.batch)
        if self.every < 1:
            raise ArgumentError(
                f"`every` is {self.every}, but must be at least 1 inner iteration; "
                f"1 clusters before each"
            )

    def draw(
        self,
        real: RealImages,
        previous: Sequence[Tensor] | None,
        inner: int,
        embed: Embed,
        generator: Generator,
    ) -> list[Tensor]:
        """Choose positions; see :class:`Sampler`."""
        if previous is not None and inner % self.every:
            return list(previous)
        features = real.features_by_class(embed)
        nearest = nearest_in_each(features, [self.batch] * len(features), generator)
        chosen = []
        for rows, index in zip(real.rows, nearest, strict=True):
            missing = self.batch - len(index)
            parts = [rows[index], fill(rows, missing, generator)] if missing else [rows[index]]
            chosen.append(torch.cat(parts))
        return chosen


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ArgumentError(f"`batch` is {batch}, but must be at least 1 real image of each class")


def nearest_to_centres(features: Tensor, clusters: int, generator: Generator) -> Tensor:
    """Cluster one set of features; see :func:`nearest_in_each`."""
    return nearest_in_each([features], [clusters], generator)[0]


def nearest_in_each(
    features: Sequence[Tensor],
    clusters: Sequence[int],
    generator: Generator,
    *,
    iterations: int = 20,
) -> list[Tensor]:
    """Cluster each set of features by k-means, and find the members nearest to the centres.

    Sets of one size that take as many clusters are clustered together, in one call.

    Args:
        features: Of each class, ``[count, features]``.
        clusters: How many clusters each class takes.
        generator: Source of the images that the centres start from.
        iterations: At most so many of Lloyd's iterations.

    Returns:
        For each class distinct int64 positions, those of large clusters first: as many as its
        clusters, or fewer where there are fewer images, or where clusters stay empty (duplicates).
    """
    found: list[Tensor] = []
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (own, wanted) in enumerate(zip(features, clusters, strict=True)):
        found.append(torch.arange(len(own), device=own.device))
        if len(own) > wanted:
            alike.setdefault((len(own), wanted), []).append(number)
    for (count, wanted), numbers in alike.items():
        starts = [
            torch.randperm(count, generator=generator, device=generator.device)[:wanted]
            for _ in numbers
        ]
        together = torch.stack([features[number] for number in numbers])
        members = _members(together, torch.stack(starts).to(together.device), iterations)
        for number, member in zip(numbers, members, strict=True):
            found[number] = _nearest(features[number], member, wanted)
    return found


def _members(features: Tensor, starts: Tensor, iterations: int) -> Tensor:
    """The cluster of each image, ``[sets, count]``, of features ``[sets, count, features]``."""
    from fast_pytorch_kmeans import MultiKMeans

    kmeans = MultiKMeans(n_clusters=starts.shape[1], max_iter=iterations)
    # Where there are centres already the library draws none from the global generator.
    kmeans.centroids = torch.stack(
        [own[start] for own, start in zip(features, starts, strict=True)]
    )
    # It makes tensors on the current GPU, whichever that is.
    with torch.cuda.device(features.device if features.is_cuda else -1):
        member: Tensor = kmeans.fit_predict(features)
    return member


def _nearest(features: Tensor, member: Tensor, clusters: int) -> Tensor:
    """The member of each cluster that is nearest to its centre, that of a large cluster first."""
    count = len(features)
    sizes = torch.bincount(member, minlength=clusters)
    totals = torch.zeros(clusters, features.shape[1], dtype=features.dtype, device=features.device)
    centres = totals.index_add_(0, member, features) / sizes.clamp(min=1)[:, None]
    order = (features - centres[member]).square().sum(dim=1).argsort(stable=True)
    position = torch.arange(count, device=features.device)
    first = torch.full_like(sizes, count).scatter_reduce_(0, member[order], position, "amin")
    by_size = sizes.argsort(descending=True, stable=True)
    first = first[by_size]
    return order[first[first < count]]
