"""The matching network of the moment, which learns while pixels move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor

from dc_replay._progress import progress as progress_bar
from dc_replay.formation import Formation
from dc_replay.placement import HostImages
from dc_replay.programs import Programs
from dc_replay.sampling import RealImages
from dc_replay.training import NetworkTraining


class Apprentice:
    """The matching network of the moment: its weights, how it learns, and what it learns from.

    Args:
        functions: The network, and what is called over and over.
        training: How it is trained.
        formation: How stored images become those that it sees.
        real: The images of the experience.
        generator: Source of the order and augmentation in training.
        progress: What a progress bar over several epochs is called; None shows none.
    """

    def __init__(
        self,
        functions: Programs,
        *,
        training: NetworkTraining,
        formation: Formation,
        real: RealImages,
        generator: Generator,
        progress: str | None = None,
    ) -> None:
        self.functions = functions
        self.training = training
        self.formation = formation
        self.real = real
        self.generator = generator
        self.progress = progress
        self.restart()

    def restart(self) -> None:
        """Forget everything: fresh weights, fresh momentum."""
        self.parameters = self.functions.network.fresh()
        self._optimizer = self.training.optimizer(self.parameters)

    def agree(self) -> None:
        """Go on as the same network, and with the same draws, on all processes.

        They train it alike. But where their hardware differs so does rounding, which would grow
        from step to step.
        """
        ranks = self.real.share.ranks
        if ranks.size > 1:
            state = self.generator.get_state()
            momenta = [
                self._optimizer.state[value].get("momentum_buffer")
                for value in self.parameters.values()
            ]
            moving = [momentum for momentum in momenta if momentum is not None]
            ranks.take_from_first([*self.parameters.values(), *moving, state])
            self.generator.set_state(state)

    def embed(self, images: Tensor) -> Tensor:
        """Features ``[batch, features]`` of normalised images."""
        features: Tensor = self.functions.forward(self.parameters, images)[1]
        return features

    def features(self) -> tuple[Tensor, ...]:
        """Features ``[count, features]`` of each class's real images."""
        return self.real.features_by_class(self.embed)

    def train(self, epochs: int) -> None:
        """Train for some epochs on the real images."""
        for _ in self._counted(epochs):
            self.train_on_real()

    def forgotten(self, epochs: int) -> Tensor:
        """Train, and count for each real image how often it turned from right to wrong."""
        rows = torch.cat(self.real.rows)
        before = torch.zeros_like(self.real.targets, dtype=torch.bool)
        ever, count = before.clone(), torch.zeros_like(self.real.targets)
        for _ in self._counted(epochs):
            self.train_on_real()
            logits = self.real.outputs(
                lambda images: self.functions.forward(self.parameters, images)[0]
            )
            right = torch.zeros_like(before)
            right[rows] = logits.argmax(dim=1) == self.real.targets[rows]
            count += before & ~right
            ever |= right
            before = right
        return torch.where(ever, count, epochs)

    def train_on_real(self, limit: int | None = None) -> None:
        """Train on one shuffled pass over the real images, or on ``limit`` of them."""
        self._train(self.real.images, self.real.targets, limit=limit)

    def train_on_synthetic(self, pixels: list[Tensor]) -> None:
        """Train on one shuffled pass over all decoded images of each class."""
        with torch.no_grad():
            decoded = [self.formation.decode(stored) for stored in pixels]
        targets = [
            torch.full((len(images),), position, device=images.device)
            for position, images in enumerate(decoded)
        ]
        self._train(torch.cat(decoded), torch.cat(targets), drop_last=False)

    def _counted(self, epochs: int) -> Iterable[int]:
        """Epochs, with a bar where there is something to wait for."""
        hidden = self.progress is None or epochs < 2
        return progress_bar(
            range(epochs), desc=self.progress, unit="epoch", disable=hidden, leave=False
        )

    def _train(self, images: Tensor | HostImages, targets: Tensor, **options: Any) -> None:
        self.training.train(
            self.functions.step,
            self.parameters,
            self._optimizer,
            images,
            targets,
            scale=self.real.scale,
            generator=self.generator,
            **options,
        )
