"""Training a matching network: one optimiser over plain weights, one step function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dc_replay._checks import check_number, whole
from dc_replay.augment import Augmentation, CutMix, augmentation
from dc_replay.networks import MatchingNetwork, Parameters
from dc_replay.pixels import Scale
from dc_replay.placement import HostImages


class TrainingBatch(NamedTuple):
    """What a training step is given, all of it on the network's device.

    Attributes:
        images: ``[batch, channels, height, width]``, uint8 or floating point in ``[0, 1]``.
        labels: int64 ``[batch]``.
        partners: Whose rectangle CutMix pastes into each image, int64 ``[batch]``.
        changes: The numbers of each image's augmentation, ``[batch, uniforms]``.
        mix: The numbers of CutMix, ``[4]``.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor
    changes: Tensor
    mix: Tensor


StepFunction = Callable[[Parameters, Scale, TrainingBatch], Parameters]
"""Gradients of the weights for a batch that is yet to be normalised, augmented and mixed."""


def step_function(
    network: MatchingNetwork, augment: Augmentation, cutmix: CutMix | None
) -> StepFunction:
    """The function that yields the weights' gradients of the (mixed) cross entropy.

    Args:
        network: The network as a function.
        augment: Changes each image.
        cutmix: Mixes the batch afterwards; None does not.
    """

    def gradients(parameters: Parameters, scale: Scale, batch: TrainingBatch) -> Parameters:
        images = augment.apply(scale.normalise(batch.images), batch.changes)
        share: Tensor | None = None
        if cutmix is not None:
            images, share = cutmix.apply(images, batch.partners, batch.mix)

        def loss(parameters: Parameters) -> Tensor:
            logits, _ = network(parameters, images)
            own = F.cross_entropy(logits, batch.labels)
            if share is None:
                return own
            other = F.cross_entropy(logits, batch.labels[batch.partners])
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

    Raises:
        ArgumentError: If a number is out of its range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 64
    augment: Augmentation = augmentation("color", "crop")
    cutmix: float = 0.5

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=True)
        check_number("momentum", self.momentum)
        check_number("weight_decay", self.weight_decay)
        whole("batch", self.batch)
        check_number("cutmix", self.cutmix, 0, 1)

    def optimizer(self, parameters: Parameters) -> torch.optim.SGD:
        """A fresh optimiser over the weights, which it changes in place."""
        return torch.optim.SGD(
            list(parameters.values()),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def step_function(self, network: MatchingNetwork) -> StepFunction:
        """See :func:`step_function`."""
        return step_function(network, self.augment, CutMix(self.cutmix) if self.cutmix else None)

    def train(
        self,
        step: StepFunction,
        parameters: Parameters,
        optimizer: torch.optim.SGD,
        images: Tensor | HostImages,
        labels: Tensor,
        *,
        scale: Scale,
        generator: Generator,
        limit: int | None = None,
        drop_last: bool = True,
    ) -> None:
        """Train on one shuffled pass, in batches of one size; all in one where there are fewer.

        Args:
            step: From :meth:`step_function`, perhaps compiled.
            parameters: Weights, changed in place.
            optimizer: From :meth:`optimizer`, over these weights.
            images: ``[count, channels, height, width]``, uint8 or floating point in ``[0, 1]``.
            labels: int64 ``[count]``.
            scale: What makes them the network's input.
            generator: Source of the order and all augmentation.
            limit: At most so many images.
            drop_last: Whether images beyond the last whole batch are left out. Otherwise all are
                trained on, in as many batches as it takes; the last is filled up with images of
                the first, so that all are of one size.
        """
        order = torch.randperm(len(images), generator=generator, device=generator.device)[:limit]
        if drop_last:
            batches = max(len(order) // self.batch, 1)
            order = order[: batches * self.batch]
        else:
            batches = max(-(-len(order) // self.batch), 1)
            order = torch.cat([order, order[: -len(order) % batches]])
        order = order.to(images.device)
        size = len(order) // batches
        # All numbers of the pass at once, so that a GPU is not made to wait for each.
        draws = self._draw(generator, batches, size, images.device)
        for index, partners, changes, mix in zip(order.split(size), *draws, strict=True):
            batch = TrainingBatch(images[index], labels[index], partners, changes, mix)
            gradients = step(parameters, scale, batch)
            for name, value in parameters.items():
                value.grad = gradients[name].detach()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _draw(
        self, generator: Generator, batches: int, size: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each batch the partners, and the numbers of augmentation and CutMix."""
        chances = torch.rand((batches, size), generator=generator, device=generator.device)
        changes = self.augment.draw(generator, batches * size).view(batches, size, -1)
        mix = torch.rand((batches, CutMix.uniforms), generator=generator, device=generator.device)
        return chances.argsort(dim=1).to(device), changes.to(device), mix.to(device)
