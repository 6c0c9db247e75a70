"""Which real images to match in each step: uniform, or representative by k-means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization, dequantise

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

    @property
    def rows(self) -> list[Tensor]:
        """For each class, the positions of its images, int64 ``[count]``."""
        found: list[Tensor] = self._rows  # type: ignore[attr-defined]
        return found

    def normalised(self, index: Tensor) -> Tensor:
        """The chosen images as the network sees them."""
        return self.normalization.apply(dequantise(self.images[index]))

    def outputs(self, function: Embed, *, batch: int = 500) -> Tensor:
        """Apply a function to all images, class by class in the order of ``rows``."""
        with torch.no_grad():
            parts = torch.cat(self.rows).split(batch)
            return torch.cat([function(self.normalised(part)) for part in parts])

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
        return [fill(rows, self.batch, generator) for rows in real.rows]


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
        chosen = []
        for rows, features in zip(real.rows, real.features_by_class(embed), strict=True):
            centres = rows[nearest_to_centres(features, self.batch, generator)]
            missing = self.batch - len(centres)
            if missing:
                centres = torch.cat([centres, fill(rows, missing, generator)])
            chosen.append(centres)
        return chosen


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ArgumentError(f"`batch` is {batch}, but must be at least 1 real image of each class")


def nearest_to_centres(
    features: Tensor, clusters: int, generator: Generator, *, iterations: int = 20
) -> Tensor:
    """Cluster by k-means and find the member of each cluster that is nearest to its centre.

    Args:
        features: ``[count, features]``.
        clusters: How many clusters.
        generator: Source of the images that the centres start from.
        iterations: At most so many of Lloyd's iterations.

    Returns:
        Distinct int64 positions, those of large clusters first: ``clusters`` of them, or fewer
        where there are fewer images, or where clusters stay empty (duplicates).
    """
    from fast_pytorch_kmeans import KMeans

    count = len(features)
    if count <= clusters:
        return torch.arange(count, device=features.device)
    start = torch.randperm(count, generator=generator, device=generator.device)[:clusters]
    kmeans = KMeans(n_clusters=clusters, max_iter=iterations)
    # Passing the centres keeps the library off the global generator.
    member = kmeans.fit_predict(features, centroids=features[start.to(features.device)])
    sizes = torch.bincount(member, minlength=clusters)
    totals = torch.zeros(clusters, features.shape[1], dtype=features.dtype, device=features.device)
    centres = totals.index_add_(0, member, features) / sizes.clamp(min=1)[:, None]
    order = (features - centres[member]).square().sum(dim=1).argsort(stable=True)
    position = torch.arange(count, device=features.device)
    first = torch.full_like(sizes, count).scatter_reduce_(0, member[order], position, "amin")
    by_size = sizes.argsort(descending=True, stable=True)
    first = first[by_size]
    return order[first[first < count]]
