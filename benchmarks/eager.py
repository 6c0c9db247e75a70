"""Condensation the plain way: a module, autograd, float32, one class after the other.

What the fast path is compared with, in its results and in its time. It is given the same images,
weights and draws, and does with them what a formula says and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dc_replay import Condenser
from dc_replay.augment import CutMix
from dc_replay.errors import ArgumentError
from dc_replay.matching import ClassBatch
from dc_replay.networks import FeatureNetwork, Parameters
from dc_replay.objectives import BidirectionalMatching, GradientMatching, squared_error
from dc_replay.pixels import Scale
from dc_replay.training import TrainingBatch


class EagerMatching:
    """The pixel step and the training step of a recipe on a module of its own.

    For recipes that match gradients of convolution weights by their squared error, with or without
    features: IDC, DREAM and DREAM+.

    Args:
        condenser: The recipe.
        network: A network like the one that condenses.

    Raises:
        ArgumentError: If the recipe matches something else.
    """

    def __init__(self, condenser: Condenser, network: FeatureNetwork) -> None:
        objective = condenser.objective
        gradient = objective.gradient if isinstance(objective, BidirectionalMatching) else objective
        if gradient != GradientMatching():
            raise ArgumentError(
                f"`recipes` names {condenser.name!r}, which the plain loop does not know; compare "
                f"idc, dream or dream_plus"
            )
        both = isinstance(objective, BidirectionalMatching)
        self.condenser = condenser
        self.feature_weight = objective.weight if both else 0.0  # type: ignore[union-attr]
        self.network = network
        self.optimizer = condenser.training.optimizer(dict(network.named_parameters()))

    def load(self, parameters: Parameters) -> None:
        """Take over the weights of another network."""
        self.network.load_state_dict(parameters)

    def match(self, scale: Scale, batch: ClassBatch) -> tuple[Tensor, Tensor]:
        """The distance of a class, and its gradient in the stored images."""
        stored = batch.stored.detach().clone().requires_grad_()
        decoded = self.condenser.formation.decode(stored)
        if batch.used is not None:
            decoded = decoded[batch.used]
        both = torch.cat([batch.real.to(stored.dtype) / 255, decoded])
        both = self.condenser.augment.apply((both - scale.mean) / scale.std, batch.changes)
        real, synthetic = both.split([len(batch.real), len(decoded)])
        wanted, mean = self._statistics(real.detach(), batch.label)
        found, near = self._statistics(synthetic, batch.label)
        distance = sum(
            (squared_error(a, b.detach()) for a, b in zip(found, wanted, strict=True)),
            start=torch.zeros((), dtype=stored.dtype, device=stored.device),
        )
        if self.feature_weight:
            distance = distance + self.feature_weight * squared_error(near, mean.detach())
        (slope,) = torch.autograd.grad(distance, stored)
        return distance.detach(), slope

    def _statistics(self, images: Tensor, label: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        features = self.network.embed(images)
        loss = F.cross_entropy(self.network.head(features), label.expand(len(images)))
        weights = [p for p in self.network.parameters() if p.ndim == 4]
        return torch.autograd.grad(loss, weights, create_graph=True), features.mean(dim=0)

    def train(self, scale: Scale, batch: TrainingBatch) -> None:
        """One step of the network on a batch."""
        training = self.condenser.training
        images = (batch.images.to(scale.mean.dtype) / 255 - scale.mean) / scale.std
        images = training.augment.apply(images, batch.changes)
        images, share = CutMix(training.cutmix).apply(images, batch.partners, batch.mix)
        logits = self.network(images)
        loss = share * F.cross_entropy(logits, batch.labels)
        loss = loss + (1 - share) * F.cross_entropy(logits, batch.labels[batch.partners])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def embed(self, images: Tensor) -> Tensor:
        """Features of normalised images."""
        with torch.no_grad():
            features: Tensor = self.network.embed(images)
        return features
