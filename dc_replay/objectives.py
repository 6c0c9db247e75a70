"""What it means for synthetic images to match real ones.

An objective takes statistics of a set of images, as a matching network sees them, and measures the
distance between those of the synthetic and of the real set. Statistics are pure functions written
with :mod:`torch.func`, so that a distance between gradients can be differentiated in the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dc_replay.errors import ArgumentError
from dc_replay.networks import MatchingNetwork, Parameters

Statistics = tuple[Tensor, ...]
"""What an objective takes from a set of images: tensors of fixed shapes."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance between two tensors of one shape, as a scalar."""


class Objective(Protocol):
    """How far one set of images is from another, for a network and its weights.

    Objectives are values, best written as frozen dataclasses: equal ones share compiled functions.
    """

    def __hash__(self) -> int: ...

    def statistics(
        self, network: MatchingNetwork, parameters: Parameters, images: Tensor, labels: Tensor
    ) -> Statistics:
        """Describe normalised images ``[batch, ...]`` of classes ``labels`` (int64 ``[batch]``)."""
        ...

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Compare two descriptions; a scalar."""
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
    """

    error: Distance = squared_error
    convolutions_only: bool = True

    def statistics(
        self, network: MatchingNetwork, parameters: Parameters, images: Tensor, labels: Tensor
    ) -> Statistics:
        """Gradients of the matched weights."""
        gradients, _ = self.gradients_and_features(network, parameters, images, labels)
        return gradients

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Sum of the distances of the gradients, weight by weight."""
        return torch.stack(
            [self.error(first, second) for first, second in zip(synthetic, real, strict=True)]
        ).sum()

    def gradients_and_features(
        self, network: MatchingNetwork, parameters: Parameters, images: Tensor, labels: Tensor
    ) -> tuple[Statistics, Tensor]:
        """The statistics and, from the same forward pass, the features ``[batch, features]``."""
        names = network.names((3, 4, 5) if self.convolutions_only else (2, 3, 4, 5))
        if not names:
            raise ArgumentError(
                "`network` has no convolution weights to match; match all weights with "
                "GradientMatching(convolutions_only=False), or features with FeatureMatching()"
            )

        def loss(matched: Parameters) -> tuple[Tensor, Tensor]:
            logits, features = network({**parameters, **matched}, images)
            return F.cross_entropy(logits, labels), features

        matched = {name: parameters[name] for name in names}
        gradients, features = torch.func.grad(loss, has_aux=True)(matched)
        return tuple(gradients[name] for name in names), features


@dataclass(frozen=True)
class FeatureMatching:
    """Squared distance between mean features.

    Source: Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023.
    """

    def statistics(
        self, network: MatchingNetwork, parameters: Parameters, images: Tensor, labels: Tensor
    ) -> Statistics:
        """The mean features, ``[features]``."""
        _, features = network(parameters, images)
        return (features.mean(dim=0),)

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
    """

    gradient: GradientMatching = GradientMatching()
    weight: float = 1.0

    def statistics(
        self, network: MatchingNetwork, parameters: Parameters, images: Tensor, labels: Tensor
    ) -> Statistics:
        """Gradients of the matched weights, then the mean features."""
        gradients, features = self.gradient.gradients_and_features(
            network, parameters, images, labels
        )
        return (*gradients, features.mean(dim=0))

    def distance(self, synthetic: Statistics, real: Statistics) -> Tensor:
        """Distance of the gradients plus the weighted distance of the mean features."""
        features = squared_error(synthetic[-1], real[-1])
        return self.gradient.distance(synthetic[:-1], real[:-1]) + self.weight * features


def matching_gradient(
    objective: Objective,
    network: MatchingNetwork,
    parameters: Parameters,
    real: Tensor,
    synthetic: Tensor,
    label: Tensor,
) -> tuple[Tensor, Tensor]:
    """Distance between two sets of images of one class, and its gradient in the synthetic ones.

    Args:
        objective: What to match.
        network: The network as a function.
        parameters: Its weights.
        real: Normalised real images ``[batch, channels, height, width]``.
        synthetic: Normalised synthetic images ``[count, channels, height, width]``.
        label: The class, an int64 scalar.

    Returns:
        The gradient, shaped like ``synthetic``, and the distance, a scalar; both detached.
    """
    target = objective.statistics(network, parameters, real, label.expand(len(real)))

    def loss(images: Tensor) -> Tensor:
        labels = label.expand(len(images))
        return objective.distance(objective.statistics(network, parameters, images, labels), target)

    gradient, value = torch.func.grad_and_value(loss)(synthetic)
    return gradient, value
