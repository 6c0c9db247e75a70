"""Which real images to match in each step: uniform, or representative by k-means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from dc_replay._checks import whole
from dc_replay.distributed import SINGLE, Ranks, Share
from dc_replay.pixels import Normalization, Scale
from dc_replay.placement import HostImages

Embed = Callable[[Tensor], Tensor]
"""Maps normalised images ``[batch, ...]`` to features ``[batch, features]``."""


@dataclass(frozen=True, eq=False)
class RealImages:
    """The images of one experience, on the device, with classes numbered from 0.

    Attributes:
        images: uint8 ``[count, channels, height, width]``, indexed by positions. They may be in
            the host's memory; ``images[positions]`` and ``images.device`` are where is computed.
        targets: int64 ``[count]``, positions in ``labels``.
        labels: The class that each position stands for.
        normalization: What makes them the network's input.
        ranks: The processes that condense them together. Each has all of them.
    """

    images: Tensor | HostImages
    targets: Tensor
    labels: tuple[int, ...]
    normalization: Normalization
    ranks: Ranks = SINGLE

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

    @property
    def pixels(self) -> Tensor:
        """All of them, wherever they are."""
        return self.images.pixels if isinstance(self.images, HostImages) else self.images

    @property
    def share(self) -> Share:
        """Which process works on which class."""
        return self.ranks.share(len(self.labels))

    def normalised(self, index: Tensor) -> Tensor:
        """The chosen images as the network sees them."""
        return self.scale.normalise(self.images[index])

    def outputs(self, function: Embed, *, batch: int = 100, classes: range | None = None) -> Tensor:
        """Apply a function to all images, class by class in the order of ``rows``.

        Args:
            function: Applied to batches of one size, so that a compiler meets no other; the last
                one is filled up with images whose results are dropped.
            batch: That size.
            classes: Only the results for these, at least one; the batches are the same ones. None
                is all.
        """
        order = torch.cat(self.rows)
        count = len(order)
        batch = min(batch, count)
        order = torch.cat([order, order[: -count % batch]])
        first, last = 0, count
        if classes is not None:
            first = sum(len(rows) for rows in self.rows[: classes.start])
            last = sum(len(rows) for rows in self.rows[: classes.stop])
        start = first // batch * batch
        with torch.no_grad():
            needed = order[start : -(-last // batch) * batch]
            parts = [function(self.normalised(part)) for part in needed.split(batch)]
            return torch.cat(parts)[first - start : last - start]

    def features_by_class(self, embed: Embed, classes: range | None = None) -> tuple[Tensor, ...]:
        """Features ``[count, features]`` of each class's images, without gradients.

        Args:
            embed: What yields them.
            classes: The classes that are asked for; None is all.
        """
        counts = [len(rows) for rows in self.rows]
        if classes is not None:
            counts = counts[classes.start : classes.stop]
        if not counts:
            return ()
        features: tuple[Tensor, ...] = self.outputs(embed, classes=classes).split(counts)
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

        ``previous`` is what the iteration before used, or None for a fresh network. Only those of
        the classes in ``real.share.own`` are used. The draws from ``generator`` must not depend on
        which these are, because all processes go on with it.
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

    Raises:
        ArgumentError: If that is no whole number of at least 1.
    """

    batch: int = 64

    def __post_init__(self) -> None:
        whole("batch", self.batch)

    def draw(
        self,
        real: RealImages,
        previous: Sequence[Tensor] | None,
        inner: int,
        embed: Embed,
        generator: Generator,
    ) -> list[Tensor]:
        """Choose positions; see :class:`Sampler`."""
        places, first = [], 0
        for rows in real.rows:
            own = torch.arange(first, first + len(rows), device=generator.device)
            places.append(fill(own, self.batch, generator))
            first += len(rows)
        # One transfer for all classes.
        chosen = torch.stack(places).to(real.images.device)
        return list(torch.cat(real.rows)[chosen].unbind())


@dataclass(frozen=True)
class Representative:
    """Draw the real images nearest to the centres of k-means clusters of the features.

    Source: Liu et al., DREAM, ICCV 2023, and DREAM+, section "Representative Matching".

    Attributes:
        batch: Clusters, and so images, of each class.
        every: Inner iterations after which the images are clustered anew, with the features of
            the network as it is then; 1 clusters before each.

    Raises:
        ArgumentError: If a number is no whole one of at least 1.
    """

    batch: int = 128
    every: int = 10

    def __post_init__(self) -> None:
        whole("batch", self.batch)
        whole("every", self.every)

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
        share = real.share
        # Of another process's classes only the number of images is known.
        features = [real.scale.mean.new_empty((len(rows), 0)) for rows in real.rows]
        features[share.own.start : share.own.stop] = real.features_by_class(embed, share.own)
        nearest = nearest_in_each(features, [self.batch] * len(features), generator, share=share)
        found = share.numbers([len(index) for index in nearest])
        chosen = []
        for rows, index, there in zip(real.rows, nearest, found, strict=True):
            missing = self.batch - there
            parts = [rows[index], fill(rows, missing, generator)] if missing else [rows[index]]
            chosen.append(torch.cat(parts))
        return chosen


def nearest_to_centres(features: Tensor, clusters: int, generator: Generator) -> Tensor:
    """Cluster one set of features; see :func:`nearest_in_each`."""
    return nearest_in_each([features], [clusters], generator)[0]


def nearest_in_each(
    features: Sequence[Tensor],
    clusters: Sequence[int],
    generator: Generator,
    *,
    iterations: int = 20,
    share: Share | None = None,
) -> list[Tensor]:
    """Cluster each set of features by k-means, and find the members nearest to the centres.

    Sets of one size that take as many clusters are clustered together, in one call, and end
    together, when all of them together have come to rest.

    Args:
        features: Of each class, ``[count, features]``.
        clusters: How many clusters each class takes.
        generator: Source of the images that the centres start from.
        iterations: At most so many of Lloyd's iterations.
        share: Which process clusters which class. Of the other classes' features only the number
            counts. None is this process alone.

    Returns:
        For each class distinct int64 positions, those of large clusters first: as many as its
        clusters, or fewer where there are fewer images, or where clusters stay empty (duplicates).
        For a class of another process any.
    """
    found: list[Tensor] = []
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (own, wanted) in enumerate(zip(features, clusters, strict=True)):
        found.append(torch.arange(len(own), device=own.device))
        if len(own) > wanted:
            alike.setdefault((len(own), wanted), []).append(number)
    groups = [
        {
            number: torch.randperm(count, generator=generator, device=generator.device)[:wanted]
            for number in numbers
        }
        for (count, wanted), numbers in alike.items()
    ]
    if share is None or share.ranks.size == 1:
        members: dict[int, Tensor] = {}
        for starts in groups:
            together = _together(features, starts)
            members.update(zip(starts, _members(*together, iterations), strict=True))
    else:
        members = _shared_members(features, groups, iterations, share)
    for number, member in members.items():
        found[number] = _nearest(features[number], member, clusters[number])
    return found


_AT_REST = 1e-4
"""Clusters stay as they are where their centres move by less: the squared distance of a set."""


def _together(features: Sequence[Tensor], starts: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Sets of one size, ``[sets, count, features]``, and the centres that each starts from."""
    together = torch.stack([features[number] for number in starts])
    index = torch.stack(list(starts.values())).to(together.device)
    centres = [own[start] for own, start in zip(together, index, strict=True)]
    return together, torch.stack(centres)


def _kmeans(centres: Tensor, **options: Any) -> Any:
    """The library's k-means of several sets, from centres ``[sets, clusters, features]`` on."""
    from fast_pytorch_kmeans import MultiKMeans

    kmeans = MultiKMeans(n_clusters=centres.shape[1], **options)
    # Where there are centres already it draws none from the global generator.
    kmeans.centroids = centres

    similarity = kmeans.sim_func
    # Its own first tries by an allocation, in each iteration, whether the GPU has room for as many
    # bytes as there are images times clusters times features: ten gigabytes for 20 classes of
    # CIFAR-100. What it then needs is images times clusters.
    kmeans.max_sim = lambda a, b: similarity(a, b).max(dim=-1)
    return kmeans


def _members(features: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """The cluster of each image, ``[sets, count]``, of features ``[sets, count, features]``."""
    kmeans = _kmeans(centres, max_iter=iterations, tol=_AT_REST)
    # It makes tensors on the current GPU, whichever that is.
    with torch.cuda.device(features.device if features.is_cuda else -1):
        member: Tensor = kmeans.fit_predict(features)
    return member


def _shared_members(
    features: Sequence[Tensor],
    groups: Sequence[Mapping[int, Tensor]],
    iterations: int,
    share: Share,
) -> dict[int, Tensor]:
    """The same for the classes of this process, given the starts of all, group by group.

    The sets of a group end together, wherever they are clustered. So each process goes on until
    nothing moves in its own ones, and what counts is where all of them have come to rest.
    """
    moves = torch.zeros(len(groups), iterations, dtype=torch.float64)
    courses: list[list[Tensor]] = []
    for group, moved in zip(groups, moves, strict=True):
        own = {number: start for number, start in group.items() if number in share.own}
        courses.append(_course(*_together(features, own), moved) if own else [])
    moves = torch.stack(share.ranks.gather(moves)).sum(dim=0) if groups else moves
    found: dict[int, Tensor] = {}
    for group, course, moved in zip(groups, courses, moves, strict=True):
        resting = (moved <= _AT_REST * len(group)).nonzero().flatten().tolist()
        last = resting[0] if resting else iterations - 1
        if course:
            numbers = [number for number in group if number in share.own]
            found.update(zip(numbers, course[min(last, len(course) - 1)], strict=True))
    return found


def _course(features: Tensor, centres: Tensor, moved: Tensor) -> list[Tensor]:
    """The cluster of each image after each iteration, until no centre moves.

    Args:
        features: Of the sets, ``[sets, count, features]``.
        centres: Where they start, ``[sets, clusters, features]``.
        moved: For each iteration, to be filled with how far the centres moved: the sum of squares.
    """
    kmeans = _kmeans(centres, max_iter=1)
    course: list[Tensor] = []
    for iteration in range(len(moved)):
        before = kmeans.centroids
        with torch.cuda.device(features.device if features.is_cuda else -1):
            course.append(kmeans.fit_predict(features))
        moved[iteration] = (kmeans.centroids - before).pow(2).sum()
        if not moved[iteration]:
            break
    return course


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
