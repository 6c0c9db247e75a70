"""A storage policy for Avalanche over a memory of condensed exemplars."""

from __future__ import annotations

import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.storage_policy import ExemplarsBuffer
from avalanche.training.supervised.er_aml import ER_AML
from torch import Tensor

from dc_replay._checks import integer, path_of, whole
from dc_replay.budgets import Budget, Smallest, TotalImages
from dc_replay.checkpoints import fingerprint
from dc_replay.condense import Condensed, Condenser
from dc_replay.decoded_view import ClassGroup, DecodedView
from dc_replay.errors import ArgumentError, DivergedError
from dc_replay.exemplar_augment import check_transform, training_changes, warn_of
from dc_replay.exemplars import Exemplars
from dc_replay.experiences import (
    ExperienceImages,
    Items,
    check_range,
    classes_of,
    gather,
    glance,
    several_tasks,
)
from dc_replay.identity import identity
from dc_replay.memory import ExemplarMemory
from dc_replay.pixels import Normalization, quantise
from dc_replay.placement import Resident, check_resident, home
from dc_replay.random_changes import RandomChanges, torchvision_transform
from dc_replay.randomness import Purpose, check_seed, stream
from dc_replay.traces import TraceNoise


class CondensedBuffer(ExemplarsBuffer):
    """Keeps condensed exemplars of every experience, for any strategy that takes a storage policy.

    Pass it as ``storage_policy=``, with ``mem_size=policy.max_size``, or assign it to
    ``.storage_policy`` where a plugin takes none (GDumb, MIR). Strategies that can should use
    :class:`~dc_replay.plugin.CondensedReplayPlugin` instead, which replays without a data loader.

    A class that returns is condensed anew from its new images and its decoded old exemplars, within
    its quota. Task labels are not part of a memory file: classes of a memory that was loaded count
    as task 0.

    Under torch.distributed all processes condense an experience together, each some of its classes,
    and have the same memory afterwards; each needs the whole experience and the same seed.

    Args:
        condenser: What condenses an experience, for example ``dream_plus()``.
        budget: How many *stored* images each class may have.
        normalization: What the network's input is normalised with; None finds it, see
            :func:`~dc_replay.experiences.gather`. It is kept in the memory.
        seed: At least 0. The same seed and experiences give the same exemplars, on a GPU up to
            rounding.
        progress: Whether to show progress bars.
        max_size: The most *decoded* images, which is what Avalanche counts: stored images times
            ``formation.images_per_stored``. It then holds in addition to ``budget``. None leaves it
            to ``budget``: the attribute is then what a budget of a total number of images allows,
            with any other ``sys.maxsize``.
        with_task_labels: Whether an item of :attr:`buffer` has a task label; None does as the items
            of the last experience do. Strategies that mix both need that; those that read the
            memory by itself (MIR, ER_ACE, NCM, FeCAM) want a task label, and so True where the
            experience's items have none. Their classes then count as task 0.
        checkpoint_dir: A folder for the state of each experience's condensation; see
            :meth:`~dc_replay.condense.Condenser.condense`. A run that died and is started again
            with the same seed goes on from there, and has the same exemplars in the end (on a GPU
            up to rounding). The files stay until you delete them. None keeps nothing.
        augment: What images of :attr:`buffer` are changed by while it is set to the transforms of
            training, as Avalanche's strategies set it to train on them. ``"training"`` does the
            random flips and padded crops of the last experience's training transforms, and a
            warning names others; or a transform of single normalised images, or None for none. If
            only new images had padded borders, a network would tell them from exemplars by these,
            and take test images, which have none, for images of old classes.
        resident: Whether images stay on the device that computes. False keeps an experience's
            images, while it is condensed, and the memory in the host's memory, and brings over what
            a step needs; ``"auto"`` does that with either where it would take more than a quarter
            of a GPU's free memory.

    Attributes:
        max_size: As above.
        history: What condensing each experience recorded. Of the distances no more than 256 are
            kept, each the mean of as many iterations as the next, because checkpoints of a long
            stream would grow by them more than by the memory.
        seconds: How long gathering and condensing each experience took, with what processes spent
            on it that were interrupted.
        seconds_before: How much of that was spent by those, of each experience.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    def __init__(
        self,
        *,
        condenser: Condenser,
        budget: Budget,
        normalization: Normalization | None = None,
        seed: int = 0,
        progress: bool = False,
        max_size: int | None = None,
        with_task_labels: bool | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        augment: Callable[[Tensor], Tensor] | Literal["training"] | None = "training",
        resident: Resident = "auto",
    ) -> None:
        check_transform(augment)
        if not hasattr(condenser, "condense") or isinstance(condenser, type):
            raise ArgumentError(
                f"`condenser` is {condenser!r}, which cannot condense; call a recipe to get one, "
                f"for example dream_plus()"
            )
        check_seed(seed)
        check_resident(resident)
        each = condenser.formation.images_per_stored
        if max_size is not None:
            budget = Smallest((budget, TotalImages(_stored("max_size", max_size, each))))
        memory = ExemplarMemory(
            budget=budget,
            formation=condenser.formation,
            normalization=normalization,
            recipe=condenser.name,
        )
        super().__init__(_decoded_bound(budget, each) if max_size is None else max_size)
        self.condenser = condenser
        self.seed = seed
        self.progress = progress
        self.with_task_labels = with_task_labels
        self.augment = augment
        self.resident: Resident = resident
        self.checkpoint_dir = (
            None if checkpoint_dir is None else path_of("checkpoint_dir", checkpoint_dir)
        )
        self._experiences = 0
        self.history: list[dict[str, list[Any]]] = []
        self.seconds: list[float] = []
        self.seconds_before: list[float] = []
        self._memory = memory
        self._given_normalization = normalization
        # As it is before its parts have done anything that they may note.
        self._recipe = identity(condenser)
        self._tasks: dict[int, int] = {}
        # Those of the last experience that was remembered, or looked at before any was.
        self._items: Items | None = None
        # Those by the training transforms of the last experience that was remembered.
        self._training: RandomChanges | None = None
        self._view: DecodedView | None = None
        # The last experience of a strategy, and how many it had been trained on before.
        self._remembered: tuple[weakref.ref[Any], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The view can be made again; a checkpoint costs what the memory stores.
        return {**self.__dict__, "_view": None, "_remembered": None}

    @property
    def memory(self) -> ExemplarMemory:
        """The exemplars. Assign one that was loaded to go on from it, under its own budget.

        Raises:
            ArgumentError: If it is no memory, its images are formed in another way than the
                condenser's, or it was normalised by something else than this was told.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: ExemplarMemory) -> None:
        if not isinstance(memory, ExemplarMemory):
            raise ArgumentError(
                f"`memory` is a {type(memory).__name__}; pass an ExemplarMemory, for example "
                f"ExemplarMemory.load(path)"
            )
        if memory.formation != self.condenser.formation:
            raise ArgumentError(
                f"`memory` forms images by {memory.formation}, but the condenser by "
                f"{self.condenser.formation}; use a condenser with formation={memory.formation}"
            )
        given, found = self._given_normalization, _normalization_of(memory)
        if given is not None and found is not None and found != given:
            raise ArgumentError(
                f"`memory` holds images for {found}, but `normalization` is {given}; leave "
                f"`normalization` out to go on with that of the memory"
            )
        self._memory = memory
        if found is None:
            memory.normalization = given

    @property
    def experiences(self) -> int:
        """How many experiences have been remembered; what is drawn for the next follows from it.

        Set it to go on from a memory file as the process would have that wrote the file.

        Raises:
            ArgumentError: If it is set to anything but a whole number of at least 0.
        """
        return self._experiences

    @experiences.setter
    def experiences(self, experiences: int) -> None:
        self._experiences = integer(experiences)
        if self._experiences < 0:
            raise ArgumentError(
                f"`experiences` is {experiences!r}; pass a whole number of at least 0"
            )

    @property
    def carries_tasks(self) -> bool:
        """Whether the items of :attr:`buffer` carry a task label."""
        if self.with_task_labels is not None:
            return self.with_task_labels
        return self._items is not None and self._items.with_tasks

    @property
    def image_dtype(self) -> torch.dtype:
        """The type of the experiences' images, and so of the items of :attr:`buffer`."""
        return (self._items or Items()).dtype

    @property
    def augments(self) -> bool:
        """Whether images of :attr:`buffer` are augmented when they are trained on."""
        if self.augment == "training":
            return self._training is not None and bool(self._training.changes)
        return self.augment is not None

    def trace_noise(self, strength: float | None) -> TraceNoise | None:
        """Noise for new images of an experience, where exemplars are condensed.

        Args:
            strength: At least 0; see :class:`~dc_replay.traces.TraceNoise`. None takes what was
                measured to be best: 0.5 beside compressed exemplars, 0 beside others, and 0 beside
                those of a condenser of the user's own, which may be real.

        Returns:
            None where there is none to add: without strength, without exemplars, or beside real
            ones. With a strength, those of a condenser of the user's own count as condensed.
        """
        objective = getattr(self.condenser, "objective", ...)
        if strength is None:
            known = objective is not ... and self.condenser.formation.compression > 1
            strength = 0.5 if known else 0.0
        if objective is None or not strength or not len(self.memory):
            return None
        return TraceNoise(strength, self.memory.normalization)

    def changes_of(
        self, dataset: Any, image_shape: tuple[int, ...], *, device: torch.device
    ) -> RandomChanges:
        """What exemplars get of the random changes that a dataset makes when training.

        Args:
            dataset: Set to the transforms that are used for training.
            image_shape: ``(channels, height, width)`` of the exemplars.
            device: Whose global generators are seeded while the dataset is looked into.
        """
        generator = stream(self.seed, Purpose.CHECKING, device=device)
        return training_changes(dataset, image_shape, device=device, generator=generator)

    def task_labels(self, labels: Tensor) -> Tensor:
        """The task label with which each class arrived.

        Args:
            labels: Class labels, int64 ``[count]``.

        Returns:
            int64 ``[count]`` on the same device.
        """
        tasks = {label: self._tasks.get(label, 0) for label in self._memory.classes}
        if len(set(tasks.values())) <= 1:
            return torch.full_like(labels, next(iter(tasks.values()), 0))
        table = torch.zeros(max(tasks) + 1, dtype=labels.dtype)
        table[list(tasks)] = torch.tensor(list(tasks.values()), dtype=labels.dtype)
        return table.to(labels.device)[labels]

    def check(self, experience: Any, *, device: torch.device | str) -> tuple[int, ...]:
        """Refuse what :meth:`remember` would, as far as labels and one image tell.

        For those who remember an experience only after hours of training on it. Where nothing has
        been remembered, as with a memory from a file, :attr:`buffer` takes the form of its items
        and the training transforms from this experience.

        Args:
            experience: An experience of a benchmark's train stream.
            device: Where it is to be condensed.

        Returns:
            The shape of its images, ``(channels, height, width)``.

        Raises:
            ArgumentError: As by :meth:`remember`, or if ``checkpoint_dir`` cannot be made.
        """
        device = _numbered(device)
        generator = stream(self.seed, Purpose.CHECKING, device=device)
        image, tasks, items = glance(experience, device=device, generator=generator)
        self._check_tasks(tasks)
        unknown = [label for label in self._memory.classes if label not in self._tasks]
        if unknown and any(tasks.values()):
            warnings.warn(
                f"the memory's classes {unknown} come from a file, which holds no task labels, and "
                f"count as task 0, but the experience has others; a model with a head for each "
                f"task would learn them in that of task 0",
                stacklevel=2,
            )
        channels, height, width = shape = tuple(image.shape)
        normalization = _normalization_of(self._memory)
        if normalization is not None:  # of as many channels
            check_range(image, normalization)
        if not self.history:  # by this object
            training = self._training_of(experience, shape, device) if len(self._memory) else None
            self._take_form(items, training)
        if self.checkpoint_dir is not None:
            self._make(self.checkpoint_dir)
        try:
            classes = classes_of(experience)
        except ArgumentError:  # they come to light when the images are read
            return shape
        self._memory.quotas_with(sorted(classes), shape)
        check = getattr(self.condenser, "check", None)  # another's condenser may have none
        if check is not None:
            check((channels, height, width), len(classes), device=device)
        return shape

    def remember(self, experience: Any, *, device: torch.device | str) -> Condensed:
        """Condense an experience's images and store the exemplars.

        Global random states are left as they were. On an error the memory is as it was. Where
        condensing diverges, a warning says so, the last good exemplars are stored, and the history
        has the message under ``diverged``.

        Args:
            experience: An experience of a benchmark's train stream.
            device: Where to condense, and where the memory is from then on, unless it has no room.

        Returns:
            What was stored, and the history of condensing.

        Raises:
            ArgumentError: If the experience cannot be used (see
                :func:`~dc_replay.experiences.gather`), its images are of another shape than those
                stored, or the budget is below one image per class.
        """
        began = time.perf_counter()
        device = _numbered(device)
        generator = stream(self.seed, Purpose.CONDENSING, self.experiences, device=device)
        memory = self._memory
        gathered = gather(
            experience,
            device=device,
            generator=generator,
            normalization=_normalization_of(memory),
            resident=self.resident,
        )
        training = self._training_of(experience, gathered.pixels.shape[1:], device)
        tasks = gathered.tasks or {}
        self._check_tasks(tasks)
        classes = gathered.labels.unique().tolist()
        quotas = memory.quotas_with(classes, gathered.pixels.shape[1:])
        own = {label: quotas[label] for label in classes}
        images, labels = self._with_returning(gathered, classes)
        try:
            condensed = self.condenser.condense(
                images,
                labels,
                quotas=own,
                normalization=gathered.normalization,
                generator=generator,
                progress=self.progress,
                **self._options(gathered, own, device),
            )
        except DivergedError as error:
            if error.condensed is None:
                raise
            condensed = _last_good(error)
        self._add(condensed.exemplars, gathered.normalization)
        self._tasks = tasks | self._tasks
        self._take_form(gathered.items, training)
        self.history.append(_thinned(condensed.history))
        self.seconds.append(condensed.seconds_before + time.perf_counter() - began)
        self.seconds_before.append(condensed.seconds_before)
        self._experiences += 1
        return condensed

    def remember_once(self, strategy: Any) -> None:
        """Store exemplars of the strategy's current experience, as it is now.

        Several plugins of a strategy may share this memory. Each of them asks for this, and the
        first that does has the experience condensed.
        """
        clock = getattr(strategy, "clock", None)
        now = getattr(clock, "train_exp_counter", None)
        last = self._remembered
        if last is None or now is None or last[0]() is not strategy.experience or last[1] != now:
            self.post_adapt(strategy, strategy.experience)
            self._remembered = (weakref.ref(strategy.experience), now)

    def update(self, strategy: Any, **kwargs: Any) -> None:
        """Store exemplars of the strategy's current experience; what Avalanche's plugins call."""
        self.remember_once(strategy)
        if isinstance(strategy, ER_AML):
            each = self._memory.formation.images_per_stored
            least = min(self._memory.counts.values()) * each
            if least < strategy.train_mb_size:
                raise ArgumentError(
                    f"`train_mb_size` of ER_AML is {strategy.train_mb_size}, but a class has only "
                    f"{least} decoded images in the memory, and ER_AML would search for ever for a "
                    f"full batch of one class; lower train_mb_size or raise the budget"
                )

    def post_adapt(self, agent_state: Any, exp: Any) -> None:
        """Store exemplars of an experience, on the device of the strategy or agent."""
        device = getattr(agent_state, "device", None) or self._memory.device or "cpu"
        self.remember(exp, device=device)

    def resize(self, strategy: Any, new_size: int) -> None:
        """Change the most decoded images, cutting every class to its first images as needed.

        Args:
            strategy: Not used.
            new_size: In decoded images: stored images times those in each.

        Raises:
            ArgumentError: If it is below one stored image per class, or above ``max_size``, since a
                memory cannot grow.
        """
        memory = self._memory
        stored = _stored("new_size", new_size, memory.formation.images_per_stored)
        if new_size > self.max_size:
            raise ArgumentError(
                f"`new_size` is {new_size}, but `max_size` is {self.max_size} and a memory cannot "
                f"grow; start a new one with a larger budget"
            )
        if stored < len(memory):
            memory.shrink(total_images=stored)
        elif new_size < self.max_size:
            memory.limit(TotalImages(stored))
        self.max_size = new_size

    @property
    def buffer(self) -> AvalancheDataset[Any]:
        """The decoded images as a dataset on the CPU, normalised, in :attr:`image_dtype`.

        Set to the transforms of training, as it comes, images are augmented; ``buffer.eval()``
        gives them as they are stored. Items have the form of the last experience's: ``(image,
        label)``, or with the task label as a third value. Nothing is decoded before it is asked
        for, so its length is cheap.
        """
        return self._current().dataset

    @buffer.setter
    def buffer(self, new_buffer: AvalancheDataset[Any]) -> None:
        raise ArgumentError(
            "`buffer` is a view of the memory and cannot be assigned; assign `memory`"
        )

    @property
    def buffer_groups(self) -> dict[int, ClassGroup]:
        """The buffer of each class."""
        return self._current().groups

    @property
    def buffer_datasets(self) -> list[AvalancheDataset[Any]]:
        """The buffer of each class, in order of arrival."""
        return [group.buffer for group in self.buffer_groups.values()]

    def _check_tasks(self, tasks: dict[int, int]) -> None:
        for label, task in tasks.items():
            known = self._tasks.get(label, task)
            if known != task:
                raise ArgumentError(several_tasks(label, known, task))

    def _options(
        self, gathered: ExperienceImages, quotas: dict[int, int], device: torch.device
    ) -> dict[str, Any]:
        """What a condenser is asked for only where it is needed; another's may not know it."""
        options: dict[str, Any] = {}
        if gathered.pixels.device.type != device.type or self.resident is False:
            options["device"] = device
        if self.checkpoint_dir is not None:
            options["checkpoint"] = self._checkpoint(self.checkpoint_dir, gathered, quotas)
        return options

    def _checkpoint(self, folder: Path, gathered: ExperienceImages, quotas: dict[int, int]) -> Path:
        """A file for this recipe, these images and quotas, so that others do not meet its state.

        It would be refused, and that after training on the experience.
        """
        self._make(folder)
        images = (gathered.pixels, gathered.labels, gathered.normalization)
        own = fingerprint([self._recipe, *images, sorted(quotas.items())])[:8]
        name = f"{self.condenser.name}-{self.seed}-{self.experiences}-{own}.safetensors"
        return folder / name.replace(os.sep, "_")

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"`checkpoint_dir` is {folder}, which cannot be made: {error}; name another folder"
            ) from error

    def _with_returning(
        self, gathered: ExperienceImages, classes: list[int]
    ) -> tuple[Tensor, Tensor]:
        images, labels = [gathered.pixels], [gathered.labels]
        for label in self._memory.classes:
            if label not in classes:
                continue
            formation = self._memory.formation
            stored = self._memory.of_class(label).to(gathered.pixels.device)
            decoded = quantise(formation.decode(formation.open(stored)))
            images.append(decoded)
            labels.append(gathered.labels.new_full((len(decoded),), label))
        return torch.cat(images), torch.cat(labels)

    def _add(self, exemplars: Exemplars, normalization: Normalization) -> None:
        memory, before = self._memory, self._memory.normalization
        if not len(memory):
            memory.normalization = normalization
        device = exemplars.pixels.device
        held = memory.nbytes if memory.device == device else 0
        more = memory.nbytes + exemplars.pixels.nbytes
        where = home(self.resident, more, device=device, held=held + exemplars.pixels.nbytes)
        try:
            memory.add(exemplars.to(where))
        except ArgumentError:
            memory.normalization = before
            raise

    def _current(self) -> DecodedView:
        exemplars = self._memory.exemplars
        if self._view is None or self._view.exemplars is not exemplars:
            self._view = DecodedView()
            if exemplars is not None:
                self._view = DecodedView.of(
                    exemplars,
                    self._memory.formation,
                    self._memory.normalization,
                    items=self._items or Items(),
                    tasks=self.task_labels if self.carries_tasks else None,
                    transform=self._transform(exemplars.pixels.shape[1:]),
                )
        return self._view

    def _take_form(self, items: Items, training: RandomChanges | None) -> None:
        """Give items of the buffer the form of an experience's, and its random changes."""
        self._items, self._training, self._view = items, training, None

    def _training_of(
        self, experience: Any, shape: tuple[int, ...], device: torch.device
    ) -> RandomChanges | None:
        if self.augment != "training":
            return None
        dataset = experience.dataset
        training = dataset.train() if hasattr(dataset, "train") else dataset
        return self.changes_of(training, shape, device=device)

    def _transform(self, image_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
        """What an image is changed by when it is trained on."""
        if self.augment is None or callable(self.augment):
            return self.augment
        if self._training is None:
            warnings.warn(
                "the memory comes from a file, which knows no training transforms, so its images "
                "are not augmented until an experience has been remembered; pass `augment`, a "
                "transform of an image that is normalised, or None for none",
                stacklevel=2,
            )
            return None
        changes, left_out = self._training
        warn_of(left_out, "a transform of an image that is normalised")
        _, height, width = image_shape
        return torchvision_transform(changes, (height, width)) if changes else None


_DISTANCES = 256


def _numbered(device: torch.device | str) -> torch.device:
    """The device with its number, as what lies there has it."""
    return torch.empty(0, device=device).device


def _normalization_of(memory: ExemplarMemory) -> Normalization | None:
    """What a memory's images are normalised with; None where that is yet to be found."""
    shape = memory.image_shape
    if shape is None or memory.normalization is not None:
        return memory.normalization
    return Normalization.identity(shape[0])


def _thinned(history: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Keep so much of the distances as can be seen in a plot."""
    distances = history.get("distance", [])
    each = -(-len(distances) // _DISTANCES)
    if each <= 1:
        return history
    parts = (distances[start : start + each] for start in range(0, len(distances), each))
    means = [sum(part) / len(part) for part in parts]
    return {**history, "distance": means}


def _last_good(error: DivergedError) -> Condensed:
    """What is left of a condensation that diverged, for a run that should not end by it."""
    warnings.warn(
        f"{error}. The exemplars that it had reached before are stored",
        RuntimeWarning,
        stacklevel=3,
    )
    condensed: Condensed = error.condensed
    return replace(condensed, history={**condensed.history, "diverged": [str(error)]})


def _stored(name: str, decoded: int, each: int) -> int:
    stored = whole(name, decoded) // each
    if not stored:
        raise ArgumentError(
            f"`{name}` is {decoded}, but counts decoded images and one stored image is {each} of "
            f"them; pass at least {each}"
        )
    return stored


def _decoded_bound(budget: Budget, each: int) -> int:
    parts = budget.budgets if isinstance(budget, Smallest) else (budget,)
    totals = [part.images for part in parts if isinstance(part, TotalImages)]
    return min(totals) * each if totals else sys.maxsize
