"""What it means for synthetic images to match real ones.

An objective takes statistics of sets of images, as a matching network sees them, and measures the
distance between those of a synthetic and of a real set. Statistics are pure functions written with
:mod:`torch.func`, so that a distance between gradients can be differentiated in the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dc_replay._checks import check_number
from dc_replay.errors import ArgumentError
from dc_replay.networks import MatchingNetwork, Parameters
from dc_replay.terms import Sides, Statistics, Terms

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance between two tensors of one shape, as a scalar."""


class Objective(Protocol):
    """How far one set of images is from another, for a network and its weights.

    Objectives are values, best written as frozen dataclasses: equal ones share compiled functions.
    """

    def __hash__(self) -> int: ...

    def statistics(
        self,
        network: MatchingNetwork,
        parameters: Parameters,
        images: Tensor,
        labels: Tensor,
        shares: Tensor,
    ) -> tuple[Statistics, Tensor]:
        """Describe sets of images.

        Args:
            network: The network as a function.
            parameters: Its weights.
            images: Normalised images ``[batch, channels, height, width]``.
            labels: Their classes, int64 ``[batch]``.
            shares: What each image contributes to each set, ``[sets, batch]``; rows add up to 1.

        Returns:
            The statistics, each ``[sets, ...]`` and linear in ``shares``, and the features
            ``[batch, features]`` from the same forward pass.
        """
        ...

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Compare the statistics of two sets, without the first dimension; a scalar."""
        ...


def squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Sum of squared differences."""
    error: Tensor = (first - second).square().sum()
    return error


def absolute_error(first: Tensor, second: Tensor) -> Tensor:
    """Sum of absolute differences, for images like MNIST's and for ImageNet (IDC)."""
    error: Tensor = (first - second).abs().sum()
    return error


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Sum over output channels of one minus the cosine (DC, equation 10 and appendix A).

    Args:
        first: Gradient of a weight ``[outputs, ...]``.
        second: Gradient of the same weight.
    """
    first, second = first.flatten(1), second.flatten(1)
    product = (first * second).sum(dim=1)
    lengths = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    # The published constant keeps the distance finite where a channel has no gradient.
    distance: Tensor = (1 - product / (lengths + 1e-6)).sum()
    return distance


@dataclass(frozen=True)
class GradientMatching:
    """Distance between the gradients of the mean cross entropy in the network's weights.

    Sources: Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021
    (``cosine_distance`` over weights of at least two dimensions); Kim et al., ICML 2022
    (``squared_error`` over convolution weights).

    Attributes:
        error: Distance between two gradients of one weight; the distances are summed.
        convolutions_only: Whether the gradients of linear weights are left out. Those of biases
            and normalisation layers always are.

    Raises:
        ArgumentError: If ``error`` cannot be called.
    """

    error: Distance = squared_error
    convolutions_only: bool = True

    def __post_init__(self) -> None:
        if not callable(self.error):
            raise ArgumentError(
                f"`error` is {self.error!r}; pass a distance such as squared_error, "
                f"absolute_error or cosine_distance"
            )

    def statistics(
        self,
        network: MatchingNetwork,
        parameters: Parameters,
        images: Tensor,
        labels: Tensor,
        shares: Tensor,
    ) -> tuple[Statistics, Tensor]:
        """Gradients of the matched weights; see :meth:`Objective.statistics`."""
        names = network.names((3, 4, 5) if self.convolutions_only else (2, 3, 4, 5))
        if not names:
            raise ArgumentError(
                "`network` has no convolution weights to match; match all weights with "
                "GradientMatching(convolutions_only=False), or features with FeatureMatching()"
            )

        def losses(matched: Parameters) -> tuple[Tensor, Tensor]:
            logits, features = network({**parameters, **matched}, images)
            each = F.cross_entropy(logits, labels, reduction="none")
            return shares.to(each.dtype) @ each, features

        matched = {name: parameters[name] for name in names}
        pulled: Any = torch.func.vjp(losses, matched, has_aux=True)
        found, pull, features = pulled
        each = [
            pull(chosen)[0]
            for chosen in torch.eye(len(found), dtype=found.dtype, device=found.device)
        ]
        return tuple(torch.stack([one[name] for one in each]) for name in names), features

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Sum of the distances of the gradients, weight by weight."""
        return torch.stack(
            [self.error(first, second) for first, second in zip(synthetic, real, strict=True)]
        ).sum()


@dataclass(frozen=True)
class FeatureMatching:
    """Squared distance between mean features.

    Source: Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023.
    """

    def statistics(
        self,
        network: MatchingNetwork,
        parameters: Parameters,
        images: Tensor,
        labels: Tensor,
        shares: Tensor,
    ) -> tuple[Statistics, Tensor]:
        """The mean features; see :meth:`Objective.statistics`."""
        _, features = network(parameters, images)
        return (shares.to(features.dtype) @ features,), features

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Squared error of the mean features."""
        return squared_error(synthetic[0], real[0])


@dataclass(frozen=True)
class BidirectionalMatching:
    """Gradients and mean features together, from one forward pass.

    Source: Liu et al., "DREAM+: Efficient Dataset Distillation by Bidirectional Representative
    Matching", 2023, section "Bidirectional Matching".

    Attributes:
        gradient: How gradients are matched.
        weight: Factor on the squared error of the mean features.

    Raises:
        ArgumentError: If ``gradient`` matches none, or the weight is out of range.
    """

    gradient: GradientMatching = GradientMatching()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.gradient, GradientMatching):
            raise ArgumentError(f"`gradient` is {self.gradient!r}; pass GradientMatching(...)")
        check_number("weight", self.weight)

    def statistics(
        self,
        network: MatchingNetwork,
        parameters: Parameters,
        images: Tensor,
        labels: Tensor,
        shares: Tensor,
    ) -> tuple[Statistics, Tensor]:
        """Gradients of the matched weights, then the mean features."""
        gradients, features = self.gradient.statistics(network, parameters, images, labels, shares)
        return (*gradients, shares.to(features.dtype) @ features), features

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Distance of the gradients plus the weighted distance of the mean features."""
        features = squared_error(synthetic[-1], real[-1])
        return self.gradient.distance(synthetic[:-1], real[:-1]) + self.weight * features


class Matched(NamedTuple):
    """What a matching step yields, detached.

    Attributes:
        slope: Gradient of the distance in the synthetic images, shaped like them.
        distance: The weighted sum of all terms, a scalar.
        prefixes: Squared distance of mean features, as that of :class:`FeatureMatching`, between
            each of the terms' ``prefixes`` and all real images, ``[prefixes]``.
    """

    slope: Tensor
    distance: Tensor
    prefixes: Tensor


def matching_step(
    objective: Objective,
    network: MatchingNetwork,
    parameters: Parameters,
    real: Tensor,
    synthetic: Tensor,
    label: Tensor,
    terms: Terms | None = None,
) -> Matched:
    """Distance between sets of images of one class, and its gradient in the synthetic ones.

    Args:
        objective: What to match.
        network: The network as a function.
        parameters: Its weights.
        real: Normalised real images ``[batch, channels, height, width]``.
        synthetic: Normalised synthetic images ``[count, channels, height, width]``.
        label: The class, an int64 scalar.
        terms: The sets to compare; None compares all images of each side.
    """
    if terms is None:
        terms = Sides.even(len(synthetic), len(real), real).whole()
    target, seen = objective.statistics(
        network, parameters, real, label.expand(len(real)), terms.real
    )

    def loss(images: Tensor) -> tuple[Tensor, Tensor]:
        found, features = objective.statistics(
            network, parameters, images, label.expand(len(images)), terms.synthetic
        )
        sides = terms.sides(found, target)
        distances = torch.stack([objective.distance(*side) for side in sides])
        return terms.weights @ distances, features

    slope, (distance, features) = torch.func.grad_and_value(loss, has_aux=True)(synthetic)
    gap = terms.prefixes @ features.detach() - (terms.real_mix[0] @ terms.real) @ seen
    return Matched(slope, distance, gap.square().sum(dim=1))
