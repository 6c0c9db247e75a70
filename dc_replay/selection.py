"""Which real images to start from, or to store: random, herding, k-center, forgetting, k-means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from dc_replay._checks import integer
from dc_replay.errors import ArgumentError
from dc_replay.sampling import RealImages, fill, nearest_in_each


class Learner(Protocol):
    """A network that can be trained on the real images and asked about them."""

    def train(self, epochs: int) -> None:
        """Train for some epochs on the real images."""
        ...

    def features(self) -> Sequence[Tensor]:
        """Features ``[count, features]`` of each class's images."""
        ...

    def forgotten(self, epochs: int) -> Tensor:
        """Train for some epochs; for each image count how often it turned from right to wrong.

        An image that was never right counts as forgotten more often than any other.
        """
        ...


class Selection(Protocol):
    """Chooses real images of each class, in an order whose prefixes are smaller choices."""

    def choose(
        self, real: RealImages, counts: Sequence[int], learner: Learner, generator: Generator
    ) -> list[Tensor]:
        """For each class, positions of exactly ``counts`` of its images, int64."""
        ...


def _complete(chosen: Tensor, rows: Tensor, count: int, generator: Generator) -> Tensor:
    """Extend or cut a choice to ``count``, with images not chosen yet where there are any."""
    missing = count - len(chosen)
    if missing <= 0:
        return chosen[:count]
    rest = rows[~torch.isin(rows, chosen)]
    more = fill(rest, min(missing, len(rest)), generator) if len(rest) else rest
    chosen = torch.cat([chosen, more])
    if len(chosen) < count:
        chosen = torch.cat([chosen, fill(rows, count - len(chosen), generator)])
    return chosen


@dataclass(frozen=True)
class RandomImages:
    """Any images, each equally likely."""

    def choose(
        self, real: RealImages, counts: Sequence[int], learner: Learner, generator: Generator
    ) -> list[Tensor]:
        """Choose positions; see :class:`Selection`."""
        return [fill(rows, count, generator) for rows, count in zip(real.rows, counts, strict=True)]


def _check_epochs(epochs: int) -> None:
    if integer(epochs) < 0:
        raise ArgumentError(f"`epochs` is {epochs}, but must be at least 0 epochs of training")


@dataclass(frozen=True)
class Herding:
    """Images whose running mean of features stays nearest to the class's mean, one by one.

    Source: Rebuffi et al., "iCaRL", CVPR 2017, algorithm 4.

    Attributes:
        epochs: Epochs that the network which yields the features trains on the experience.
    """

    epochs: int = 10

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def choose(
        self, real: RealImages, counts: Sequence[int], learner: Learner, generator: Generator
    ) -> list[Tensor]:
        """Choose positions; see :class:`Selection`."""
        learner.train(self.epochs)
        return _greedily(_herd, real, counts, learner, generator)


def _greedily(
    order: Callable[[Tensor, int], Tensor],
    real: RealImages,
    counts: Sequence[int],
    learner: Learner,
    generator: Generator,
) -> list[Tensor]:
    """Choose each class's images in the order that a function of their features finds."""
    chosen = []
    for rows, count, features in zip(real.rows, counts, learner.features(), strict=True):
        first = rows[order(features, min(count, len(rows)))]
        chosen.append(_complete(first, rows, count, generator))
    return chosen


def _herd(features: Tensor, count: int) -> Tensor:
    features = torch.nn.functional.normalize(features, dim=1)
    mean = features.mean(dim=0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    order = []
    for step in range(1, count + 1):
        distance = ((total + features) / step - mean).square().sum(dim=1)
        best = torch.where(free, distance, torch.inf).argmin()
        free[best] = False
        total = total + features[best]
        order.append(best)
    return torch.stack(order)


@dataclass(frozen=True)
class KCenter:
    """Images that leave no image of the class far from a chosen one, greedily.

    Source: Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set
    Approach", ICLR 2018. The first is the one nearest to the class's mean.

    Attributes:
        epochs: Epochs that the network which yields the features trains on the experience.
    """

    epochs: int = 10

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def choose(
        self, real: RealImages, counts: Sequence[int], learner: Learner, generator: Generator
    ) -> list[Tensor]:
        """Choose positions; see :class:`Selection`."""
        learner.train(self.epochs)
        return _greedily(_spread, real, counts, learner, generator)


def _spread(features: Tensor, count: int) -> Tensor:
    order = [(features - features.mean(dim=0)).square().sum(dim=1).argmin()]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    for _ in range(count - 1):
        to_last = (features - features[order[-1]]).square().sum(dim=1)
        nearest = torch.minimum(nearest, to_last)
        nearest[order[-1]] = -1  # never again, even among duplicates
        order.append(nearest.argmax())
    return torch.stack(order)


@dataclass(frozen=True)
class Forgetting:
    """Images that a network forgets most often while it trains.

    Source: Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network
    Learning", ICLR 2019.

    Attributes:
        epochs: Epochs of training during which forgetting is counted.
    """

    epochs: int = 10

    def __post_init__(self) -> None:
        if integer(self.epochs) < 2:
            raise ArgumentError(
                f"`epochs` is {self.epochs}, but an image can be forgotten only between epochs; "
                f"use at least 2"
            )

    def choose(
        self, real: RealImages, counts: Sequence[int], learner: Learner, generator: Generator
    ) -> list[Tensor]:
        """Choose positions; see :class:`Selection`."""
        forgotten = learner.forgotten(self.epochs)
        chosen = []
        for rows, count in zip(real.rows, counts, strict=True):
            # Many images tie, so the order among them is left to chance.
            rows = fill(rows, len(rows), generator)
            order = forgotten[rows].argsort(descending=True, stable=True)
            chosen.append(_complete(rows[order], rows, count, generator))
        return chosen


@dataclass(frozen=True)
class ClusterCentres:
    """Images nearest to the centres of as many k-means clusters as images are wanted.

    Source: Liu et al., DREAM+, section on initialisation.

    Attributes:
        epochs: Epochs that the network which yields the features trains on the experience.
    """

    epochs: int = 1

    def __post_init__(self) -> None:
        _check_epochs(self.epochs)

    def choose(
        self, real: RealImages, counts: Sequence[int], learner: Learner, generator: Generator
    ) -> list[Tensor]:
        """Choose positions; see :class:`Selection`."""
        learner.train(self.epochs)
        nearest = nearest_in_each(learner.features(), counts, generator)
        return [
            _complete(rows[index], rows, count, generator)
            for rows, count, index in zip(real.rows, counts, nearest, strict=True)
        ]
