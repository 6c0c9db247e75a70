"""The one optimisation loop: pixels move, and the network that they are matched in learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dc_replay._checks import check_number, integer, real, whole
from dc_replay.apprentice import Apprentice
from dc_replay.augment import Augmentation
from dc_replay.checkpoints import Checkpoint, Snapshot, joined
from dc_replay.comparison import Comparison
from dc_replay.errors import ArgumentError, DivergedError
from dc_replay.matching import ClassBatch, Launches
from dc_replay.objectives import Matched
from dc_replay.pace import Pace
from dc_replay.randomness import isolated
from dc_replay.sampling import Sampler


@dataclass(frozen=True)
class PixelStep:
    """How pixels move: SGD on images in ``[0, 1]``.

    Attributes:
        lr: Learning rate.
        momentum: Momentum.
        reference: The number of images per class that ``lr`` is for, counting each of those that
            share the bytes of one; a class with more gets a rate in proportion, because each image
            then has a smaller share in the mean. None uses ``lr`` as it is.
        final: The share of the rate that is left at the end of the condensation, to which it falls
            linearly. The published methods keep the rate, 1; where steps are few, large ones that
            die away reach further than equal ones.
        normalised: Whether ``lr`` is for normalised images, for which DC, DSA and DM have
            published theirs. An image in ``[0, 1]`` changes by ``std`` times as much, and its
            gradient is ``1 / std`` times as large, so that the rate of a channel is
            ``lr * std**2`` here: for CIFAR-100 a fourteenth of ``lr``.

    Raises:
        ArgumentError: If a number is out of its range.
    """

    lr: float = 5e-3
    momentum: float = 0.5
    reference: int | None = 10
    final: float = 1.0
    normalised: bool = False

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=True)
        check_number("momentum", self.momentum)
        if self.reference is not None and not real(self.reference) >= 1:
            raise ArgumentError(
                f"`reference` is {self.reference}, but must be at least 1 image per class, or None "
                f"to use `lr` as it is"
            )
        check_number("final", self.final, 0, 1)

    def optimizer(self, pixels: list[Tensor], compression: int = 1) -> torch.optim.SGD:
        """An optimiser over the open images of each class, which have so many layers."""
        shares = [compression * len(p) / self.reference if self.reference else 1 for p in pixels]
        rates = [self.lr * share for share in shares]
        groups = [
            {"params": [p], "lr": rate, "initial_lr": rate}
            for p, rate in zip(pixels, rates, strict=True)
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)

    def gradient(self, slope: Tensor, std: Tensor) -> Tensor:
        """What the optimiser is given for a class.

        Args:
            slope: The gradient of its open images in ``[0, 1]``, ``[count, compression * channels,
                height, width]``.
            std: What they are divided by for the network, ``[1, channels, 1, 1]``.
        """
        if not self.normalised:
            return slope
        return slope * std.square().repeat(1, slope.shape[1] // std.shape[1], 1, 1)

    def set_rate(self, optimizer: torch.optim.Optimizer, share: float) -> None:
        """Let the rate fall to where it is when this share of the condensation is done."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 + (self.final - 1) * share)


class NetworkUpdate(Protocol):
    """What the matching network learns between two pixel steps.

    Several processes hand their pixels round before each call, unless an attribute ``uses_pixels``
    is False.
    """

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Train the apprentice, given the stored images of each class in ``[0, 1]``."""
        ...


@dataclass(frozen=True)
class OnReal:
    """Train on real images, as IDC does: gradients then do not vanish.

    Attributes:
        images: Images in an inner iteration, of which whole batches are used. Published are batches
            of 64 until 2,000 images are reached, which are 32 batches.

    Raises:
        ArgumentError: If that is no whole number of at least 1.
    """

    images: int = 2048
    uses_pixels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole("images", self.images)

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Train the apprentice."""
        apprentice.train_on_real(limit=self.images)


@dataclass(frozen=True)
class OnSynthetic:
    """Train on the synthetic images, as DC and DSA do.

    Attributes:
        epochs: Epochs in an inner iteration.

    Raises:
        ArgumentError: If that is no whole number of at least 0.
    """

    epochs: int = 50

    def __post_init__(self) -> None:
        if integer(self.epochs) < 0:
            raise ArgumentError(f"`epochs` is {self.epochs!r}; pass a whole number of at least 0")

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Train the apprentice."""
        for _ in range(self.epochs):
            apprentice.train_on_synthetic(pixels)


class Optimisation:
    """Moves the pixels of all classes so that they match the real images.

    For one matching network after the other: in every inner iteration one pixel step for each
    class, then what the network learns. After each network the pixels are clamped to ``[0, 1]``.
    With compression they are held to the frequencies that can be stored, from step to step.

    Several processes do this together: each moves the pixels of its own classes, while everything
    that is drawn is drawn for all classes, and the network learns the same everywhere. What all
    need to know is handed round after each network.

    Args:
        pixels: Stored images of each class in ``[0, 1]``, which are changed in place.
        match: The pixel steps of all classes.
        apprentice: The matching network of the moment, with the real images.
        comparison: What each step compares.
        sampler: Real images to match in each step.
        augment: Augmentation of matched images, one draw for each class.
        step: How pixels move.
        update: What the network learns after each pixel step; None leaves it as it is.
        warm_up: Epochs on the real images for each new network before it is used.
        inner: Pixel steps with each network.
        pace: Says when to stop.

    Attributes:
        distances: The mean distance over classes of each inner iteration so far.
    """

    def __init__(
        self,
        pixels: list[Tensor],
        *,
        match: Launches,
        apprentice: Apprentice,
        comparison: Comparison,
        sampler: Sampler,
        augment: Augmentation,
        step: PixelStep,
        update: NetworkUpdate | None,
        warm_up: int,
        inner: int,
        pace: Pace,
    ) -> None:
        self.pixels = pixels
        self.match = match
        self.apprentice = apprentice
        self.comparison = comparison
        self.sampler = sampler
        self.augment = augment
        self.step = step
        self.update = update
        self.warm_up = warm_up
        self.inner = inner
        self.pace = pace
        self.distances: list[Tensor] = []
        self._optimizer = step.optimizer(pixels, apprentice.formation.compression)
        self._outer = 0
        # The bytes of each class once they are final: to open and to store them again would, with
        # compression, change them.
        self._finished: list[Tensor] = []
        # The distance, and a number that is finite if all was, of each of this process's classes in
        # each inner iteration with the network of the moment. They are looked at once per network,
        # because a GPU would have to wait for each look.
        self._measured: list[list[tuple[Tensor, Tensor]]] = []

    def run(self, checkpoint: Checkpoint | None = None) -> Iterator[None]:
        """Go on to the end; yield after each inner iteration.

        Args:
            checkpoint: Where to write the state after each network.

        Raises:
            DivergedError: If a distance, a gradient or the pixels become NaN or infinite. The
                pixels and distances are then those from before the network of that moment.
        """
        device = self.apprentice.real.images.device
        while not self.pace.over:
            last = [stored.clone() for stored in self.pixels]
            # So that no state of the global generators is carried from network to network.
            with isolated(self.apprentice.generator, device):
                self.apprentice.restart()
                self.apprentice.train(self.warm_up)
                self.apprentice.agree()
                yield from self._with_one_network()
            self._take_note(last)
            for stored in self.pixels:
                stored.copy_(self.apprentice.formation.keep(stored.clamp_(0, 1)))
            self.comparison.end_outer_iteration(self.pixels, self._optimizer)
            self._outer += 1
            if checkpoint is not None and not self.pace.over:
                checkpoint.save_if_due(self.state)

    @property
    def history(self) -> dict[str, list[Any]]:
        """What is worth knowing afterwards; see :class:`~dc_replay.condense.Condensed`."""
        history: dict[str, list[Any]] = {
            "distance": torch.stack(self.distances).tolist() if self.distances else []
        }
        if self.comparison.choice is not None:
            history["prefix_sizes"] = self.comparison.choice.history
        return history

    def state(self) -> Snapshot:
        """All that changes from network to network; in the end, what is stored."""
        tensors = {"generator": self.apprentice.generator.get_state()}
        if self.distances:
            tensors["distances"] = torch.stack(self.distances)
        tensors |= self._stored() if self.pace.over else self._moving()
        own = Snapshot(tensors, {"outer": self._outer})
        return joined(
            {"own": own, "comparison": self.comparison.state(), "pace": self.pace.state()}
        )

    def stored(self) -> list[Tensor]:
        """The bytes of each class."""
        if not self._finished:
            self.apprentice.real.share.complete(self.pixels)
            store = self.apprentice.formation.store
            stored = [store(images) for images in self.pixels]
            if not self.pace.over:
                return stored
            self._finished = stored
        return self._finished

    def _stored(self) -> dict[str, Tensor]:
        """The same for a file: an eighth, or less, of what pixels and their momentum take."""
        return {f"stored.{number}": images for number, images in enumerate(self.stored())}

    def _moving(self) -> dict[str, Tensor]:
        """The pixels of each class and their momentum."""
        tensors = {}
        momenta = [self._optimizer.state[stored].get("momentum_buffer") for stored in self.pixels]
        share = self.apprentice.real.share
        if share.ranks.size > 1 and self.step.momentum:  # then every class has one by now
            momenta = [
                torch.zeros_like(stored) if momentum is None else momentum
                for stored, momentum in zip(self.pixels, momenta, strict=True)
            ]
            share.complete(self.pixels, momenta)
        else:
            share.complete(self.pixels)
        for number, (stored, momentum) in enumerate(zip(self.pixels, momenta, strict=True)):
            tensors[f"pixels.{number}"] = stored
            if momentum is not None:
                tensors[f"momentum.{number}"] = momentum
        return tensors

    def restore(self, state: Snapshot) -> None:
        """Go back to where :meth:`state` was taken."""
        own = state.part("own")
        self.apprentice.generator.set_state(own.tensors["generator"])
        self.distances = list(own.tensors["distances"].unbind())
        for number, stored in enumerate(self.pixels):
            finished = own.tensors.get(f"stored.{number}")
            if finished is not None:
                stored.copy_(self.apprentice.formation.open(finished))
                self._finished.append(finished)
                continue
            stored.copy_(own.tensors[f"pixels.{number}"])
            momentum = own.tensors.get(f"momentum.{number}")
            if momentum is not None:
                self._optimizer.state[stored]["momentum_buffer"] = momentum.clone()
        self._outer = own.values["outer"]
        self.comparison.restore(state.part("comparison"))
        self.pace.restore(state.part("pace"))

    def _with_one_network(self) -> Iterator[None]:
        apprentice = self.apprentice
        drawn: list[Tensor] | None = None
        for inner in range(self.inner):
            drawn = self.sampler.draw(
                apprentice.real, drawn, inner, apprentice.embed, apprentice.generator
            )
            self._move(drawn)
            if self.update is not None:
                if getattr(self.update, "uses_pixels", True):
                    apprentice.real.share.complete(self.pixels)
                self.update(apprentice, self.pixels)
            self.pace.advance()
            yield
            if self.pace.over:
                break

    def _move(self, drawn: list[Tensor]) -> None:
        """Take one pixel step, given the real images of each class."""
        real = self.apprentice.real
        self.step.set_rate(self._optimizer, self.pace.share)
        batches = self._batches(drawn)
        matches: list[Matched] = []
        if batches:
            matches = self.match(self.apprentice.parameters, real.scale, batches)
        self._measured.append([(matched.distance, _value(matched)) for matched in matches])
        found = dict(zip(real.share.own, matches, strict=True))
        nothing = real.scale.mean.new_empty(0)
        for position, stored in enumerate(self.pixels):
            matched = found.get(position)
            if matched is not None:
                slope = self.step.gradient(matched.slope, real.scale.std)
                stored.grad = self.apprentice.formation.keep(slope)
            self.comparison.record(position, nothing if matched is None else matched.prefixes)
        self.comparison.hold(self.pixels)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _batches(self, drawn: list[Tensor]) -> list[ClassBatch]:
        """What is compared for each of this process's classes."""
        real = self.apprentice.real
        device, own = real.images.device, real.share.own
        labels = torch.arange(len(self.pixels), device=device)
        changes = self.augment.draw(self.apprentice.generator, len(self.pixels)).to(device)
        batches = []
        for position, (stored, index) in enumerate(zip(self.pixels, drawn, strict=True)):
            decoded = self.comparison.draw(position)
            if position not in own:
                continue
            batches.append(
                ClassBatch(
                    real=real.images[index],
                    stored=stored,
                    used=decoded.index,
                    changes=changes[position : position + 1],
                    label=labels[position],
                    terms=self.comparison.terms(position, decoded, index, self.pace.share),
                )
            )
        return batches

    def _take_note(self, pixels: list[Tensor]) -> None:
        """Add the distances with one network to the history.

        Unless all numbers were finite: then raise an error, and go back to these pixels.
        """
        share = self.apprentice.real.share
        own = slice(share.own.start, share.own.stop)
        steps = len(self._measured)
        numbers = self.apprentice.real.scale.mean.new_zeros((2 * steps + 1, len(self.pixels)))
        if share.own:
            rows = [[pair[part] for pair in step] for part in (0, 1) for step in self._measured]
            rows.append([stored.sum() for stored in self.pixels[own]])
            numbers[:, own] = torch.stack([torch.stack(row) for row in rows])
        self._measured = []
        share.complete(numbers.unbind(1))
        finite = numbers[steps:].isfinite()
        if finite.all():
            self.distances.extend(row.mean() for row in numbers[:steps])
            return
        inner, position = (~finite).nonzero()[0].tolist()
        for stored, good in zip(self.pixels, pixels, strict=True):
            stored.copy_(good)
        raise DivergedError(
            f"the condensation diverged: the distance of class "
            f"{self.apprentice.real.labels[position]}, its gradient or its pixels became NaN or "
            f"infinite in outer iteration {self._outer}, inner iteration "
            f"{min(inner, len(finite) - 2)}; lower the pixels' learning rate, now {self.step.lr}, "
            f"with dataclasses.replace(condenser, pixels=replace(condenser.pixels, lr=...)), or "
            f"that of the matching network, now {self.apprentice.training.lr}, with "
            f"training=replace(condenser.training, lr=...)"
        )


def _value(matched: Matched) -> Tensor:
    """A number that is NaN or infinite if anything of a class's step is."""
    return matched.distance + matched.slope.sum()
