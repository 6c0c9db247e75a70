"""Random transforms that change each image of a batch in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from dc_replay.pixels import Normalization


@dataclass(frozen=True)
class Flip:
    """Mirror each image with a chance of its own.

    Attributes:
        axis: -1 mirrors left and right, -2 top and bottom.
        probability: From 0 to 1.
    """

    axis: int
    probability: float


@dataclass(frozen=True)
class Crop:
    """Pad each image, and cut the original size out of it at a place of its own.

    Attributes:
        padding: Pixels at the left, top, right and bottom.
        fill: What is padded with, in values that the network sees: one, or one per channel.
    """

    padding: tuple[int, int, int, int]
    fill: tuple[float, ...]


@dataclass(frozen=True)
class TrainingTransforms:
    """What a dataset does to images when training and not when evaluating.

    Attributes:
        changes: The random changes, in order.
        dtype: The floating-point type in which images reach the network.
    """

    changes: tuple[Flip | Crop, ...]
    dtype: torch.dtype


def value_changes(
    changes: Iterable[Flip | Crop], *, channels: int, device: torch.device
) -> Callable[[Tensor, Generator], Tensor]:
    """Random changes as one function of normalised images, each by draws of its own.

    Args:
        changes: In order.
        channels: Of the images.
        device: Where they are.

    Returns:
        A function of ``[batch, channels, height, width]`` and a generator; without changes, it
        draws nothing and returns what it is given.
    """
    done: list[Callable[[Tensor, Generator], Tensor]] = []
    for change in changes:
        if isinstance(change, Flip):
            done.append(_flipping(change))
        else:
            fill = torch.tensor(change.fill).expand(channels).view(1, -1, 1, 1)
            done.append(_cropping(change, fill.to(device)))

    def changed(images: Tensor, generator: Generator) -> Tensor:
        for change in done:
            images = change(images, generator)
        return images

    return changed


class BatchTransforms:
    """Turns stored bytes into what a dataset's training transforms make of them.

    Bytes are moved about before they become numbers wherever padding is a byte too. That is a
    quarter of the work, and gives the same values, as normalising looks at each pixel alone.

    Args:
        transforms: What to do.
        normalization: The map from the bytes' ``[0, 1]`` to what the network sees.
        device: The device of the bytes.
    """

    def __init__(
        self,
        transforms: TrainingTransforms,
        normalization: Normalization,
        device: torch.device,
    ) -> None:
        self._scale = normalization.scale(device, transforms.dtype)
        self._on_bytes: list[Callable[[Tensor, Generator], Tensor]] = []
        self._on_values: list[Callable[[Tensor, Generator], Tensor]] = []
        for change in transforms.changes:
            done = self._on_values or self._on_bytes
            if isinstance(change, Flip):
                done.append(_flipping(change))
                continue
            values = torch.tensor(change.fill, dtype=torch.float64)
            values = values.expand(normalization.channels).view(1, -1, 1, 1)
            fill = _as_bytes(values, normalization)
            if fill is None or done is self._on_values:
                done, fill = self._on_values, values.to(transforms.dtype)
            done.append(_cropping(change, fill.to(device)))

    def __call__(self, pixels: Tensor, generator: Generator) -> Tensor:
        """Change and normalise a batch, each image by draws of its own.

        Args:
            pixels: uint8 ``[batch, channels, height, width]``.
            generator: Source of the draws; one on the images' device avoids a transfer.

        Returns:
            Normalised images of the same shape.
        """
        for change in self._on_bytes:
            pixels = change(pixels, generator)
        images = self._scale.normalise(pixels)
        for change in self._on_values:
            images = change(images, generator)
        return images


def _flipping(change: Flip) -> Callable[[Tensor, Generator], Tensor]:
    return partial(flipped, axis=change.axis, probability=change.probability)


def _cropping(change: Crop, fill: Tensor) -> Callable[[Tensor, Generator], Tensor]:
    return partial(cropped, padding=change.padding, fill=fill)


def flipped(images: Tensor, generator: Generator, *, axis: int, probability: float) -> Tensor:
    """Mirror each of the images along an axis with some probability.

    Args:
        images: ``[batch, channels, height, width]`` of any type.
        generator: Source of one number for each image.
        axis: As of :class:`Flip`.
        probability: Likewise.
    """
    count, device = len(images), images.device
    drawn = torch.rand(count, generator=generator, device=generator.device).to(device)
    place = torch.arange(count, device=device) + count * (drawn < probability)
    # Choosing among whole images is several times faster than choosing among their pixels.
    return torch.cat([images, images.flip(axis)]).index_select(0, place)


def some_changed(
    images: Tensor, change: Callable[[Tensor], Tensor], *, share: float, generator: Generator
) -> Tensor:
    """Change some of the images.

    Args:
        images: ``[batch, channels, height, width]``.
        change: What to do to all of them.
        share: The chance of each image, from 0 to 1.
        generator: Source of one number for each image, unless none or all change.
    """
    if not share:
        return images
    if share == 1:
        return change(images)
    drawn = torch.rand(len(images), generator=generator, device=generator.device)
    chosen = (drawn < share).to(images.device)[:, None, None, None]
    return torch.where(chosen, change(images), images)


def cropped(
    images: Tensor, generator: Generator, *, padding: tuple[int, int, int, int], fill: Tensor
) -> Tensor:
    """Pad each of the images, and cut their size out of it at a random place.

    Args:
        images: ``[batch, channels, height, width]`` of any type.
        generator: Source of two numbers for each image: first all rows, then all columns.
        padding: As of :class:`Crop`.
        fill: What is padded with, ``[1, channels, 1, 1]`` of the images' type and device.
    """
    left, top, right, bottom = padding
    count, channels, height, width = images.shape
    rows, columns = height + top + bottom, width + left + right
    padded = fill.repeat(count, 1, rows, columns)
    padded[:, :, top : top + height, left : left + width] = images
    row, column = (
        torch.randint(room + 1, (count,), generator=generator, device=generator.device)
        for room in (top + bottom, left + right)
    )
    # All windows of an image's size, by the place of their first value. Choosing among these is
    # several times faster than indexing by image, row and column.
    last = (channels - 1) * rows * columns + (height - 1) * columns + width - 1
    windows = padded.as_strided(
        (padded.numel() - last, channels, height, width), (1, rows * columns, columns, 1)
    )
    each = torch.arange(count, device=images.device) * (channels * rows * columns)
    return windows.index_select(0, each + (row * columns + column).to(images.device))


def _as_bytes(fill: Tensor, normalization: Normalization) -> Tensor | None:
    """The bytes that stand for values that the network sees, or None where there are none."""
    scale = normalization.scale(fill.device, fill.dtype)
    levels = (fill * scale.std + scale.mean) * 255
    near = levels.round().clamp(0, 255)
    return near.to(torch.uint8) if (levels - near).abs().max() < 1e-6 else None
