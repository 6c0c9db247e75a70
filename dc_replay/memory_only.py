"""Training on a condensed memory alone."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.distributed import DistributedHelper
from torch import Generator, Tensor

from dc_replay._checks import whole
from dc_replay.budgets import Budget
from dc_replay.buffer import CondensedBuffer
from dc_replay.condense import Condenser
from dc_replay.exemplar_augment import (
    ExemplarAugment,
    ImageAugment,
    augment_for,
    check_exemplar_augment,
)
from dc_replay.exemplars import Exemplars
from dc_replay.memory import ExemplarMemory, shown_at
from dc_replay.pixels import Normalization, in_type
from dc_replay.placement import Resident
from dc_replay.random_changes import RandomChanges
from dc_replay.randomness import Purpose, stream


class MemoryOnlyPlugin(SupervisedPlugin[Any], supports_distributed=True):
    """Condenses every experience before training on it, and then trains on the memory alone.

    An epoch goes through the decoded images of all classes so far in random order. This is the
    protocol of IDC's continual-learning experiment; see
    :class:`~dc_replay.distillation.DistillationPlugin` for its second loss.

    In distributed training all processes condense together, and each goes through a part of the
    epoch of its own, as with Avalanche's loaders.

    Args:
        condenser: What condenses an experience, for example ``dream_plus()``.
        budget: How many stored images each class may have.
        batch_size: None takes the strategy's ``train_mb_size``.
        presentations_per_stored: Images shown in an epoch for each stored image that the budget
            allows, by as many passes as that takes; None shows every decoded image once. Give
            memories of one budget the same number to train on them equally long, whatever they make
            of it.
        augment: Applied to each batch, with a generator of this plugin; see
            :class:`~dc_replay.plugin.CondensedReplayPlugin`.
        normalization: What the network's input is normalised with; None finds it.
        seed: At least 0. Condensing and the order of images follow from it.
        progress: Whether to show progress bars.
        checkpoint_dir: A folder for the state of each experience's condensation, from which a run
            that died goes on; see :class:`~dc_replay.buffer.CondensedBuffer`. None keeps nothing.
        resident: Whether an experience's images and the memory stay on the device, or in the host's
            memory; see :class:`~dc_replay.buffer.CondensedBuffer`.

    Attributes:
        buffer: The storage policy, with the history and seconds of condensing.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    def __init__(
        self,
        *,
        condenser: Condenser,
        budget: Budget,
        batch_size: int | None = None,
        presentations_per_stored: int | None = None,
        augment: ExemplarAugment = "training",
        normalization: Normalization | None = None,
        seed: int = 0,
        progress: bool = True,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resident: Resident = "auto",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch_size = None if batch_size is None else whole("batch_size", batch_size)
        if presentations_per_stored is not None:
            presentations_per_stored = whole("presentations_per_stored", presentations_per_stored)
        self.presentations_per_stored = presentations_per_stored
        check_exemplar_augment(augment)
        self.augment = augment
        self.buffer = CondensedBuffer(
            condenser=condenser,
            budget=budget,
            normalization=normalization,
            seed=seed,
            progress=progress,
            checkpoint_dir=checkpoint_dir,
            augment="training" if augment == "training" else None,
            resident=resident,
        )

    @property
    def memory(self) -> ExemplarMemory:
        """The exemplars. Assign one that was loaded to go on from it, under its own budget."""
        return self.buffer.memory

    @memory.setter
    def memory(self, memory: ExemplarMemory) -> None:
        self.buffer.memory = memory

    @property
    def history(self) -> list[dict[str, list[Any]]]:
        """What condensing each experience recorded; see :class:`~dc_replay.condense.Condensed`."""
        return self.buffer.history

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Condense the experience, and put the memory in the place of the experience's loader.

        By now the strategy has made that loader, and adapted the model to the new classes.
        """
        self.buffer.remember_once(strategy)
        buffer, device, processes = self.buffer, strategy.device, DistributedHelper.world_size
        own = (Purpose.REPLAYING, buffer.experiences, DistributedHelper.rank)
        ordering = None
        if processes > 1:
            ordering = stream(buffer.seed, Purpose.ORDERING, buffer.experiences, device=device)
        shape: tuple[int, ...] = self.memory.image_shape or ()  # which has been filled by now
        training = RandomChanges()
        if self.augment == "training":
            training = buffer.changes_of(strategy.adapted_dataset, shape, device=device)
        augment = augment_for(self.augment, training, channels=shape[0], device=device)
        strategy.dataloader = MemoryLoader(
            self.buffer,
            batch_size=self.batch_size or strategy.train_mb_size,
            presentations_per_stored=self.presentations_per_stored,
            augment=augment,
            generator=stream(buffer.seed, *own, device=device),
            ordering=ordering,
            part=(DistributedHelper.rank, processes),
            drop_last=bool(kwargs.get("drop_last", False)),  # as Avalanche's loaders are told
        )


class MemoryLoader:
    """Shuffled passes over a memory's decoded images, batch by batch, on the memory's device.

    Each iteration over it is an epoch in an order of its own. Batches are lists of images, labels
    and, where the experience's items carry them, task labels.

    Args:
        buffer: The buffer over the memory.
        batch_size: Images in a batch; the last of an epoch may be smaller.
        presentations_per_stored: Images shown in an epoch for each stored image that the budget
            allows; None is every decoded image once.
        augment: Applied to each batch of images.
        generator: Source of all randomness.
        ordering: Source of the order in its place, which is the same for all parts; None is
            ``generator``.
        part: The number of this part of each epoch, and how many there are. They are equally long,
            for which a few images are shown twice.
        drop_last: Whether to leave a smaller last batch out.
    """

    def __init__(
        self,
        buffer: CondensedBuffer,
        *,
        batch_size: int,
        presentations_per_stored: int | None,
        augment: ImageAugment | None,
        generator: Generator,
        ordering: Generator | None = None,
        part: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> None:
        self.buffer = buffer
        self.batch_size = batch_size
        self.presentations_per_stored = presentations_per_stored
        self.augment = augment
        self.generator = generator
        self.ordering = generator if ordering is None else ordering
        self.part = part
        self.drop_last = drop_last

    @property
    def images(self) -> int:
        """Images in this part of an epoch."""
        memory = self.buffer.memory
        images = memory.decoded_len
        if self.presentations_per_stored is not None and images:
            images = sum(memory.quotas_with([]).values()) * self.presentations_per_stored
        return -(-images // self.part[1])

    def __len__(self) -> int:
        full = self.images // self.batch_size
        return full if self.drop_last else -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        left, order = min(self.images, len(self) * self.batch_size), torch.empty(0)
        known: weakref.ref[Exemplars] | None = None
        while left:
            memory = self.buffer.memory
            exemplars = memory.exemplars
            if exemplars is None:
                return
            if known is None or known() is not exemplars:
                # Where the memory is cut in mid-epoch, too: what it dropped is shown no more, and
                # nothing here holds on to its bytes.
                known = weakref.ref(exemplars)
                order = self._order(memory.decoded_len, left)
            index, order = order[: self.batch_size], order[self.batch_size :]
            left -= len(index)
            images, labels = shown_at(exemplars, memory.formation, index)
            if memory.normalization is not None:
                images = memory.normalization.apply(images)
            if self.augment is not None:
                images = self.augment(images, self.generator)
            del exemplars
            batch = [in_type(images, self.buffer.image_dtype), labels]
            if self.buffer.carries_tasks:
                batch.append(self.buffer.task_labels(labels))
            yield batch

    def _order(self, decoded: int, count: int) -> Tensor:
        """Passes over the decoded images in random order, cut to ``count``."""
        number, parts = self.part
        orders = [
            torch.randperm(decoded, generator=self.ordering, device=self.ordering.device)
            for _ in range(-(-count * parts // decoded))
        ]
        return torch.cat(orders)[: count * parts][number::parts]
