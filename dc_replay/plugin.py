"""Replay of a condensed memory without a data loader."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.distributed import DistributedHelper
from torch import Generator, Tensor

from dc_replay._checks import check_number, whole
from dc_replay.batch_changes import Crop, Flip, some_changed
from dc_replay.budgets import Budget
from dc_replay.buffer import CondensedBuffer
from dc_replay.condense import Condenser
from dc_replay.errors import ArgumentError
from dc_replay.exemplar_augment import (
    ExemplarAugment,
    ImageAugment,
    augment_for,
    check_exemplar_augment,
)
from dc_replay.match_storage import check_labels, on_numbers
from dc_replay.memory import ExemplarMemory
from dc_replay.pixels import Normalization, in_type
from dc_replay.placement import Resident
from dc_replay.random_changes import RandomChanges
from dc_replay.randomness import Purpose, stream
from dc_replay.traces import TraceNoise


class CondensedReplayPlugin(SupervisedPlugin[Any], supports_distributed=True):
    """Condenses every experience after training on it, and replays all earlier ones.

    The memory stays on the strategy's device. Before each iteration exemplars are drawn from it,
    each decoded image equally likely, and appended to the mini-batch, so training metrics include
    them. Condensing leaves the model, its mode, the optimizer and all global random states alone.

    Avalanche's checkpoints replace a strategy's objects when they are loaded: afterwards, find the
    plugin in ``strategy.plugins``.

    In distributed training all processes condense together and have the same memory. Each draws
    exemplars of its own for its own mini-batch; as with Avalanche's batch sizes, ``batch_size_mem``
    is that of one process.

    Args:
        condenser: What condenses an experience, for example ``dream_plus()``.
        budget: How many stored images each class may have.
        batch_size_mem: Exemplars in a mini-batch; None takes the strategy's ``train_mb_size``.
        normalization: What the network's input is normalised with; None finds it.
        augment: Applied to exemplars, with a generator of this plugin: a function of
            normalised images and a generator, or None for none. ``"training"`` does what the
            experience's training transforms do to new images: torchvision's random flips, and
            random crops out of padded images. A warning names other transforms, which exemplars do
            not get.
        augment_new: Whether new images are augmented by this plugin, too, after they were shown as
            storing would leave them. That takes a function as ``augment``, and training transforms
            that only convert and normalise. Packed exemplars need it where images are cropped out
            of padded ones: the border of such a crop loses more by storing than anything else, and
            tells new images from exemplars if they are cropped before.
        match_storage: The share of new images that are shown as storing would leave them, from 0 to
            1; each is drawn by itself. An exemplar of a factor above 1 is less sharp than a new
            image, and one that is stored compressed bears the traces of that. A network that learns
            to tell old classes from new ones by such a trait takes test images of old classes,
            which do not have it, for new ones. Nothing happens where images are stored as they are.
        match_condensing: How strong a noise new images get beside condensed exemplars, for the same
            reason. At each frequency its standard deviation is this number, at least 0, times the
            square root of the power that exemplars have more than they (see
            :mod:`dc_replay.traces`), measured in the first 100 mini-batches of an experience. None
            takes 0.5 for a recipe whose ``compression`` is above 1, beside which that was measured
            to help, and 0 for others and for condensers of the user's own. 0 leaves new images as
            they are, and so do recipes that choose real ones.
        seed: At least 0. Condensing and replay follow from it.
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
        batch_size_mem: int | None = None,
        normalization: Normalization | None = None,
        augment: ExemplarAugment = "training",
        augment_new: bool = False,
        match_storage: float = 1.0,
        match_condensing: float | None = None,
        seed: int = 0,
        progress: bool = True,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resident: Resident = "auto",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if batch_size_mem is not None:
            batch_size_mem = whole("batch_size_mem", batch_size_mem)
        check_exemplar_augment(augment)
        if augment_new and not callable(augment):
            raise ArgumentError(
                f"`augment_new` is {augment_new}, but `augment` is {augment!r}; pass a function "
                f"such as augmentation('crop', 'flip'), for images that come without augmentation"
            )
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
        check_number("match_storage", match_storage, 0, 1)
        self.match_storage = match_storage
        if match_condensing is not None:
            check_number("match_condensing", match_condensing, 0)
        self.match_condensing = match_condensing
        self.batch_size_mem = batch_size_mem
        self.augment = augment
        self.augment_new = augment_new
        self._generator: Generator | None = None
        self._shape: tuple[int, ...] = ()
        self._augment: ImageAugment | None = None
        self._noise: TraceNoise | None = None

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
        """Start the draws of this experience; each process of a distributed run has its own.

        Raises:
            ArgumentError: If the experience could not be condensed after training on it; see
                :meth:`~dc_replay.buffer.CondensedBuffer.check`.
        """
        self._shape = self.buffer.check(strategy.experience, device=strategy.device)
        self._noise = self.buffer.trace_noise(self.match_condensing)
        device = strategy.device
        packed = self.buffer.condenser.formation.factor > 1
        matters = self.augment_new or (packed and self.match_storage)
        training = RandomChanges()
        if self.augment == "training" or matters:  # else no image need be read and tried
            training = self.buffer.changes_of(strategy.adapted_dataset, self._shape, device=device)
        self._augment = augment_for(self.augment, training, channels=self._shape[0], device=device)
        if matters:
            self._warn_of(training.changes)
        self._generator = stream(
            self.buffer.seed,
            Purpose.REPLAYING,
            self.buffer.experiences,
            DistributedHelper.rank,
            device=device,
        )

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Append exemplars to the mini-batch, which is on the device by now.

        Raises:
            ArgumentError: If the mini-batch holds images of another shape, or values that an
                exemplar does not have.
        """
        if self._generator is None:
            return
        batch = strategy.mbatch
        _check_batch(batch, self._shape)  # with an empty memory, too, for the sake of what follows
        if len(self.memory):
            self._append_exemplars(strategy, self._generator)
        elif self.augment_new:
            batch[0] = self._augmented(batch[0], self._generator)

    def _append_exemplars(self, strategy: Any, generator: Generator) -> None:
        batch = strategy.mbatch
        new = batch[0]
        count = self.batch_size_mem or strategy.train_mb_size
        images, labels = self.memory.sample(count, generator=generator)
        images, labels = images.to(new.device), labels.to(new.device)
        if self._augment is not None:
            images = self._augment(images, generator)
            if not self.augment_new and self.memory.formation.factor == 1:
                # New images come augmented, and what storing leaves of the border of a padded crop,
                # for example, would tell the two apart. Packed exemplars would lose sharpness by it
                # that new images keep.
                images = self._share_as_stored(images, generator=generator)
        if self._noise is not None:
            if self._noise.measures:
                self._noise.measure(images, self._as_shown(new, generator))
            new = on_numbers(new, partial(self._noise.added_to, generator=generator))
        new = self._as_shown(new, generator)
        batch[0] = torch.cat([new, in_type(images, new.dtype)])
        batch[1] = torch.cat([batch[1], labels.to(batch[1].dtype)])
        if len(batch) == 3:
            tasks = self.buffer.task_labels(labels).to(batch[2].dtype)
            batch[2] = torch.cat([batch[2], tasks])

    def _as_shown(self, images: Tensor, generator: Generator) -> Tensor:
        """New images of a mini-batch as the network sees them, all but the noise."""
        shown = on_numbers(images, partial(self._share_as_stored, generator=generator))
        return self._augmented(shown, generator) if self.augment_new else shown

    def _augmented(self, images: Tensor, generator: Generator) -> Tensor:
        """New images of a mini-batch, augmented as exemplars are."""
        augment = self._augment
        return images if augment is None else on_numbers(images, lambda x: augment(x, generator))

    def _warn_of(self, changes: Sequence[Flip | Crop]) -> None:
        """Tell of training transforms that do not go together with how this plugin augments."""
        if self.augment_new and changes:
            names = sorted({type(change).__name__.lower() for change in changes})
            warnings.warn(
                f"the experience's training transforms {' and '.join(names)} images, which "
                f"`augment_new` augments again; let them only convert and normalise",
                stacklevel=2,
            )
        elif not self.augment_new and any(isinstance(change, Crop) for change in changes):
            warnings.warn(
                "the experience crops images out of padded ones when training, beside which packed "
                "exemplars can be told from new images by their borders; let the training "
                "transforms only convert and normalise, and pass augment=augmentation('crop', "
                "'flip') and augment_new=True",
                stacklevel=2,
            )

    def _share_as_stored(self, images: Tensor, *, generator: Generator) -> Tensor:
        """A share of images as storing would leave them."""
        if self.memory.formation.images_per_stored == 1:
            return images
        return some_changed(
            images, self.memory.as_stored, share=self.match_storage, generator=generator
        )

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Condense the experience into the memory."""
        # A checkpoint takes neither a generator in flight nor a function of this experience.
        self._generator = self._augment = self._noise = None
        self.buffer.remember_once(strategy)


def _check_batch(batch: list[Tensor], image_shape: tuple[int, ...]) -> None:
    if len(batch) not in (2, 3):
        raise ArgumentError(
            f"`mbatch` holds {len(batch)} values, but an exemplar has an image, a label and "
            f"perhaps a task label; replay cannot make up the others"
        )
    shape = tuple(batch[0].shape[1:])
    if shape != image_shape:
        raise ArgumentError(
            f"`mbatch` holds images of shape {shape}, but exemplars are {image_shape}, the shape "
            f"that the evaluation transforms give; make training and evaluation transforms "
            f"agree on it"
        )
    check_labels(batch[1])
