"""Training a matching network: one optimiser over plain weights, one step function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dc_replay.augment import Augmentation, augmentation, cutmix
from dc_replay.networks import MatchingNetwork, Parameters
from dc_replay.pixels import Normalization, dequantise

StepFunction = Callable[[Parameters, Tensor, Tensor, Tensor, Tensor], Parameters]
"""Gradients of the weights for normalised images, labels, partners' labels and the share kept."""


def step_function(network: MatchingNetwork) -> StepFunction:
    """The function that yields the weights' gradients of the (mixed) cross entropy."""

    def gradients(
        parameters: Parameters, images: Tensor, labels: Tensor, partners: Tensor, share: Tensor
    ) -> Parameters:
        def loss(parameters: Parameters) -> Tensor:
            logits, _ = network(parameters, images)
            own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, partners)
            return share * own + (1 - share) * other

        result: Parameters = torch.func.grad(loss)(parameters)
        return result

    return gradients


@dataclass(frozen=True, kw_only=True)
class NetworkTraining:
    """How a matching network is trained, on real or on synthetic images.

    Attributes:
        lr: Learning rate of SGD.
        momentum: Its momentum.
        weight_decay: Its weight decay.
        batch: Images in a step.
        augment: Augmentation with a draw for each image.
        cutmix: Chance that a batch is mixed by CutMix.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 64
    augment: Augmentation = augmentation("color", "crop")
    cutmix: float = 0.5

    def optimizer(self, parameters: Parameters) -> torch.optim.SGD:
        """A fresh optimiser over the weights, which it changes in place."""
        return torch.optim.SGD(
            list(parameters.values()),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def train(
        self,
        step: StepFunction,
        parameters: Parameters,
        optimizer: torch.optim.SGD,
        images: Tensor,
        labels: Tensor,
        *,
        normalization: Normalization,
        generator: Generator,
        limit: int | None = None,
    ) -> None:
        """Train on one shuffled pass, in whole batches where there is at least one.

        Args:
            step: From :func:`step_function`, perhaps compiled.
            parameters: Weights, changed in place.
            optimizer: From :meth:`optimizer`, over these weights.
            images: ``[count, channels, height, width]``, uint8 or floating point in ``[0, 1]``.
            labels: int64 ``[count]``.
            normalization: Applied before augmentation.
            generator: Source of the order and all augmentation.
            limit: At most so many images.
        """
        order = torch.randperm(len(images), generator=generator, device=generator.device)
        order = order[:limit].to(images.device)
        whole = max(len(order) // self.batch, 1) * self.batch
        for index in order[:whole].split(self.batch):
            batch = images[index]
            if batch.dtype == torch.uint8:
                batch = dequantise(batch)
            batch = self.augment(normalization.apply(batch), generator)
            batch, partners, share = cutmix(batch, generator, probability=self.cutmix)
            own = labels[index]
            gradients = step(parameters, batch, own, own[partners], share)
            for name, value in parameters.items():
                value.grad = gradients[name].detach()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
