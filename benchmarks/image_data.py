"""Labelled images for a benchmark, and the order in which their classes arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.class_orders import IDC_CIFAR100
from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization

CLASS_ORDERS = ("shuffled", "idc")
HELD_OUT = "held-out training images"
"""How names of data end whose test images are training images that are held out."""


class DataError(ArgumentError):
    """A benchmark's data cannot be used; the message says which part and what to do about it."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image set, split into training and test images.

    Attributes:
        name: What a reader of the results calls it, such as ``cifar100``.
        x_train: uint8 ``[images, channels, height, width]``.
        y_train: int64 ``[images]``, in ``0..classes-1``; every class has training images.
        x_test: As ``x_train``, with images of the same shape.
        y_test: As ``y_train``; every class has test images.
        classes: How many classes there are.
        class_names: One name per class.

    Raises:
        DataError: If any of the above does not hold.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.class_names) != self.classes:
            raise DataError(
                f"`class_names` of {self.name} holds {len(self.class_names)} names for "
                f"{self.classes} classes; give one name per class"
            )
        for part, images, labels in (
            ("train", self.x_train, self.y_train),
            ("test", self.x_test, self.y_test),
        ):
            self._check_images(part, images)
            self._check_labels(part, images, labels)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"`x_test` of {self.name} has images of shape {list(self.x_test.shape[1:])}, but "
                f"`x_train` has {list(self.x_train.shape[1:])} (channels, height, width); "
                "bring both to one shape"
            )

    def _check_images(self, part: str, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
            raise DataError(
                f"`x_{part}` of {self.name} is {images.dtype} of shape {list(images.shape)}; "
                "expected uint8 [images, channels, height, width] with at least one image"
            )

    def _check_labels(self, part: str, images: Tensor, labels: Tensor) -> None:
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"`y_{part}` of {self.name} is {labels.dtype} of shape {list(labels.shape)}; "
                f"expected int64 [{len(images)}], one label per image of `x_{part}`"
            )
        outside = sorted(set(labels[(labels < 0) | (labels >= self.classes)].tolist()))
        if outside:
            raise DataError(
                f"`y_{part}` of {self.name} has labels outside the benchmark: {listed(outside)}; "
                f"the training labels make it {self.classes} classes, 0..{self.classes - 1}, so "
                "remove these images or add training images of their classes"
            )
        empty = (torch.bincount(labels, minlength=self.classes) == 0).nonzero().flatten().tolist()
        if empty:
            raise DataError(
                f"`y_{part}` of {self.name} has no image of {listed(empty)} among its classes "
                f"0..{self.classes - 1}; every class needs training and test images, so add some "
                "or renumber the labels without gaps"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def normalization(self) -> Normalization:
        """Mean and standard deviation of each channel over all training pixels.

        A channel that never varies takes a deviation of 1.
        """
        levels = torch.arange(256, dtype=torch.float64) / 255
        means, deviations = [], []
        for channel in self.x_train.unbind(1):
            # A histogram of the 256 levels is exact and needs no float copy of the images.
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = (share * levels).sum()
            deviation = (share * (levels - mean).square()).sum().sqrt().item()
            means.append(mean.item())
            deviations.append(deviation if deviation > 1e-9 else 1.0)
        return Normalization(mean=tuple(means), std=tuple(deviations))


def class_order(
    data: ImageData, order: str, *, seed: int = 0, classes: int | None = None
) -> list[int]:
    """List the classes of ``data`` in the order in which a benchmark presents them.

    Args:
        data: The images whose classes are ordered.
        order: ``shuffled``, a permutation drawn from ``seed``; or ``idc``, the published order of
            CIFAR-100's official labels, which ignores ``seed``.
        seed: Seed of the permutation.
        classes: How many classes to keep, the first of the order; all by default.

    Raises:
        DataError: If the order is unknown or not for this data, or ``classes`` is out of range.
    """
    if order not in CLASS_ORDERS:
        raise DataError(f"`order` is {order!r}; choose one of {', '.join(CLASS_ORDERS)}")
    if order == "idc" and data.classes != len(IDC_CIFAR100):
        raise DataError(
            f"`order` 'idc' is the published order of CIFAR-100's 100 classes, but {data.name} has "
            f"{data.classes}; use 'shuffled' or data with those 100 classes"
        )
    if classes is not None and not 1 <= classes <= data.classes:
        raise DataError(
            f"`classes` is {classes}, but {data.name} has {data.classes} classes; "
            f"ask for 1 to {data.classes}"
        )
    if order == "idc":
        labels = list(IDC_CIFAR100)
    else:
        labels = torch.randperm(
            data.classes, generator=torch.Generator().manual_seed(seed)
        ).tolist()
    return labels[:classes]


def keep_classes(data: ImageData, order: Sequence[int]) -> ImageData:
    """Restrict ``data`` to the classes in ``order`` and relabel each with its position there.

    With ``k`` classes per experience, experience ``s`` then holds labels ``s*k..(s+1)*k-1``.

    Raises:
        DataError: If ``order`` is empty, repeats a class, or names one that ``data`` lacks.
    """
    foreign = sorted(set(order) - set(range(data.classes)))
    if not order or len(set(order)) != len(order) or foreign:
        raise DataError(
            f"`order` is {listed(order)}; expected different classes of {data.name}, "
            f"each in 0..{data.classes - 1}"
        )
    position = torch.full((data.classes,), -1)
    position[list(order)] = torch.arange(len(order))

    def restrict(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = position[labels]
        kept = labels >= 0
        return images[kept], labels[kept]

    x_train, y_train = restrict(data.x_train, data.y_train)
    x_test, y_test = restrict(data.x_test, data.y_test)
    return ImageData(
        name=data.name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        classes=len(order),
        class_names=tuple(data.class_names[label] for label in order),
    )


def hold_out(data: ImageData, count: int) -> ImageData:
    """Test on the last ``count`` training images of each class, which are then not trained on.

    For choosing settings, which the test images must not take part in; the name says so.

    Raises:
        DataError: If a class would have no training images left, or ``count`` is below 1.
    """
    fewest = int(torch.bincount(data.y_train, minlength=data.classes).min())
    if not 1 <= count < fewest:
        raise DataError(
            f"`holdout` is {count}, but {data.name} has a class of {fewest} training images; hold "
            f"out from 1 to {fewest - 1} of each"
        )
    held = torch.zeros_like(data.y_train, dtype=torch.bool)
    for label in range(data.classes):
        held[torch.nonzero(data.y_train == label).flatten()[-count:]] = True
    return replace(
        data,
        name=f"{data.name}, {HELD_OUT}",
        x_train=data.x_train[~held],
        y_train=data.y_train[~held],
        x_test=data.x_train[held],
        y_test=data.y_train[held],
    )


def listed(values: Sequence[object], limit: int = 10) -> str:
    """Join ``values`` for a message, leaving off what goes past ``limit``."""
    shown = ", ".join(str(value) for value in values[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown or "nothing"


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images and labels as a dataset, with the labels where Avalanche looks for them.

    Args:
        images: ``[images, channels, height, width]`` of any type.
        targets: The class of each.
    """

    def __init__(self, images: Tensor, targets: list[int]) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]
