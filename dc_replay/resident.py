"""Training from a copy of the experience on the device, without a data loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader, TaskBalancedDataLoader
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from torch import Generator, Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from dc_replay.batch_changes import BatchTransforms
from dc_replay.errors import ArgumentError
from dc_replay.exemplar_augment import ExemplarAugment, ImageAugment, check_exemplar_augment
from dc_replay.experiences import ExperienceImages, gather
from dc_replay.pixels import Normalization, Scale, check_normalization
from dc_replay.randomness import Purpose, check_seed, isolated, stream
from dc_replay.resident_transforms import training_transforms


class DeviceResident(SupervisedPlugin[Any]):
    """Holds the current experience on the strategy's device, and trains from there.

    Before training on an experience its images are read once, one after the other, and kept as
    uint8: one byte per value, until the experience ends. Batches are then drawn, augmented and
    normalised on the device, in an order and with augmentation that follow from ``seed`` alone. It
    pays where reading images takes longer than a training step, or there are several epochs.

    The training transforms of the dataset are done on batches: conversions, one ``Normalize``,
    ``RandomHorizontalFlip``, ``RandomVerticalFlip`` and ``RandomCrop`` to the images' own size with
    constant padding, of both versions of torchvision. All others are refused, because leaving them
    out would train another model. The evaluation transforms may convert and normalise. Images that
    are not bytes to begin with are rounded to 256 levels, as by :func:`~.experiences.gather`.

    Use :class:`~dc_replay.plugin.CondensedReplayPlugin` for replay beside it; plugins that replay
    by a data loader of their own are refused. In distributed training every process would train on
    the whole experience, so Avalanche warns of it.

    Args:
        augment: ``"training"`` does the training transforms. A function of normalised float32
            batches and a generator of this plugin takes their place, and None is nothing but
            converting and normalising. Evaluation transforms may then be any that give tensors.
        normalization: What the network's input is normalised with; None finds it.
        seed: At least 0.

    Attributes:
        seconds: How long bringing each experience to the device took.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    def __init__(
        self,
        *,
        augment: ExemplarAugment = "training",
        normalization: Normalization | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_exemplar_augment(augment)
        check_normalization(normalization)
        check_seed(seed)
        self.augment = augment
        self.normalization = normalization
        self.seed = seed
        self.seconds: list[float] = []
        self._replaced: Any = None
        self._loader: ResidentLoader | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Bring the images to the device, and put a loader of them in the place of the strategy's.

        Raises:
            ArgumentError: If another plugin has replaced the strategy's loader, the experience has
                several task labels, its transforms cannot be done on batches, or its images cannot
                be gathered (see :func:`~dc_replay.experiences.gather`).
        """
        began = time.perf_counter()
        own, data, device = strategy.dataloader, strategy.adapted_dataset, strategy.device
        # Which replaces the loader once it has something to replay, after hours of training.
        if any(isinstance(plugin, ReplayPlugin) for plugin in strategy.plugins):
            raise _loader_of_another(ReplayDataLoader)
        options = _options(own)
        _check_tasks(data)
        generator = stream(self.seed, Purpose.TRAINING, len(self.seconds), device=device)
        transforms = None
        if self.augment == "training":
            with isolated(generator, device):
                transforms = training_transforms(data)
        # What is trained on, which strategies such as Cumulative make of several experiences.
        images = gather(
            SimpleNamespace(dataset=data),
            device=device,
            generator=generator,
            normalization=self.normalization,
        )
        apply: Callable[[Tensor, Generator], Tensor]
        if transforms is not None:
            apply = BatchTransforms(transforms, images.normalization, device)
        else:
            augment = self.augment if callable(self.augment) else None
            scale = images.normalization.scale(device)
            apply = partial(_augmented, scale=scale, augment=augment)
        self._loader = ResidentLoader(images, apply=apply, generator=generator, **options)
        self._replaced, strategy.dataloader = own, self._loader
        self.seconds.append(time.perf_counter() - began)

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Make sure that the strategy trains from the device.

        Raises:
            ArgumentError: If a plugin that comes later has replaced the loader.
        """
        if strategy.dataloader is not self._loader:
            raise _loader_of_another(type(strategy.dataloader))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Free the images, and give the strategy its own loader back."""
        if strategy.dataloader is self._loader:
            strategy.dataloader = self._replaced
        self._loader = self._replaced = None


class ResidentLoader:
    """Passes over images in memory, batch by batch, on the device where they are.

    Each iteration over it is an epoch in an order of its own. Batches are lists of images, int64
    labels and, where the experience's items carry them, int64 task labels.

    Args:
        images: The images, of one task at most.
        batch_size: The last batch of an epoch may be smaller.
        apply: Turns uint8 batches ``[batch, channels, height, width]`` into what the network sees.
        generator: Source of all randomness.
        shuffle: Whether epochs have random orders.
        drop_last: Whether to leave a smaller last batch out.
    """

    def __init__(
        self,
        images: ExperienceImages,
        *,
        batch_size: int,
        apply: Callable[[Tensor, Generator], Tensor],
        generator: Generator,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.apply = apply
        self.generator = generator
        self.shuffle = shuffle
        self.drop_last = drop_last

    def __len__(self) -> int:
        count = len(self.images.labels)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        pixels, labels = self.images.pixels, self.images.labels
        task = None if self.images.tasks is None else next(iter(self.images.tasks.values()))
        order = self._order(len(labels)).to(labels.device)
        for index in order.split(self.batch_size)[: len(self)]:
            chosen = labels.index_select(0, index)
            # On a CPU this copies whole images, which indexing by brackets does byte by byte.
            batch = [self.apply(pixels.index_select(0, index), self.generator), chosen]
            if task is not None:
                batch.append(torch.full_like(chosen, task))
            yield batch

    def _order(self, count: int) -> Tensor:
        device = self.generator.device
        if not self.shuffle:
            return torch.arange(count, device=device)
        return torch.randperm(count, generator=self.generator, device=device)


def _augmented(
    pixels: Tensor, generator: Generator, *, scale: Scale, augment: ImageAugment | None
) -> Tensor:
    images = scale.normalise(pixels)
    return images if augment is None else augment(images, generator)


def _options(loader: Any) -> dict[str, Any]:
    """How a loader of Avalanche or torch goes through images: batch size, shuffling, last batch."""
    if type(loader) is TaskBalancedDataLoader:
        return {
            "batch_size": sum(loader.batch_sizes),
            "shuffle": loader.loader_kwargs.get("shuffle", False),
            "drop_last": loader.loader_kwargs.get("drop_last", False),
        }
    if type(loader) is DataLoader and loader.batch_size is not None:
        sampler: Any = loader.sampler
        shuffle = type(sampler) is RandomSampler and not sampler.replacement
        if shuffle or type(sampler) is SequentialSampler:
            return {
                "batch_size": loader.batch_size,
                "shuffle": shuffle,
                "drop_last": loader.drop_last,
            }
    raise _loader_of_another(type(loader))


def _loader_of_another(loader: type) -> ArgumentError:
    return ArgumentError(
        f"`strategy` trains from a {loader.__name__} of another plugin or of its own, which "
        f"DeviceResident would undo; replay by CondensedReplayPlugin, which goes well with it, or "
        f"leave one of the two out"
    )


def _check_tasks(dataset: Any) -> None:
    tasks = sorted(getattr(getattr(dataset, "targets_task_labels", None), "uniques", ()))
    if len(tasks) > 1:
        raise ArgumentError(
            f"`experience` holds images of tasks {', '.join(map(str, tasks))}, of which Avalanche "
            f"puts equal numbers into every batch, but DeviceResident does not; train on one task "
            f"at a time, or leave DeviceResident out"
        )
