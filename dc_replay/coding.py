"""Images in transform code: a few hundred bytes each, decoded on the device.

What the bytes mean is said in :mod:`dc_replay._layout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dc_replay._layout import cosine_transform, layout, levels, planes_of


@dataclass(frozen=True, eq=False)
class CosineTransform:
    """The cosine transform of images of one shape on one device; see :func:`cosine_transform_for`.

    Attributes:
        planes: Maps channels to brightness and colour differences, ``[channels, channels]``.
        channels_of: The inverse.
        rows: The transform along the height, ``[height, height]``.
        columns: The transform along the width, ``[width, width]``.
    """

    planes: Tensor
    channels_of: Tensor
    rows: Tensor
    columns: Tensor

    def coefficients(self, images: Tensor) -> Tensor:
        """Of images ``[count, channels, height, width]``, likewise ``[count, plane, ...]``."""
        rows, columns = self.rows.to(images.dtype), self.columns.to(images.dtype)
        planes = (self.planes.to(images.dtype) @ images.flatten(2)).view_as(images)
        return rows @ planes @ columns.T

    def images(self, coefficients: Tensor) -> Tensor:
        """The inverse of :meth:`coefficients`."""
        dtype = coefficients.dtype
        planes = self.rows.to(dtype).T @ coefficients @ self.columns.to(dtype)
        return (self.channels_of.to(dtype) @ planes.flatten(2)).view_as(planes)


@dataclass(frozen=True, eq=False)
class TransformCode:
    """Encodes and decodes images of one shape on one device; see :func:`transform_code`.

    Attributes, besides those of :class:`~dc_replay._layout.Layout` as tensors:
        transform: The cosine transform of the images.
        member: 1 where a stored coefficient is of a channel, else 0, ``[stored, channels]``.
        of_bits: The stored coefficients with 1, 2, ..., 8 bits, as positions among them.
        source: For each coefficient of an image where it comes from, among the stored ones, the
            means and a 0, ``[channels * height * width]``.
        levels: What numbers of 1 to 8 bits stand for, ``[510]``.
    """

    channels: int
    height: int
    width: int
    length: int
    transform: CosineTransform
    middle: Tensor
    place: Tensor
    plane: Tensor
    deviation: Tensor
    bits: Tensor
    byte: Tensor
    following: Tensor
    shift: Tensor
    member: Tensor
    of_bits: tuple[Tensor, ...]
    source: Tensor
    levels: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Turn images into bytes; values outside of ``[0, 1]`` are clamped.

        Args:
            images: Floating-point images ``[count, channels, height, width]``.

        Returns:
            uint8 ``[count, length]``.
        """
        with _exactly(images):
            return self._encode(images)

    def _encode(self, images: Tensor) -> Tensor:
        coefficients = self.transform.coefficients(
            images.detach().clamp(0, 1).to(self.levels.dtype) - 0.5
        )
        mean = coefficients[:, :, 0, 0] / math.sqrt(self.height * self.width)
        stored = coefficients.new_zeros((len(images), self.length), dtype=torch.int64)
        steps = (mean * 255 + self.middle).round().clamp(0, 255)
        stored[:, : self.channels] = steps.to(torch.int64)
        values = coefficients.flatten(1).index_select(1, self.place) / self.deviation
        # Not by index_add_, which on a GPU adds in another order each time.
        power = values.square() @ self.member / self.member.sum(dim=0).clamp(min=1)
        steps = (4 * power.log2() + 128).round().clamp(0, 255)
        stored[:, self.channels : 2 * self.channels] = steps.to(torch.int64)
        values = values / torch.exp2((steps - 128) / 8)[:, self.plane]
        for bits, chosen in enumerate(self.of_bits, start=1):
            level = self.levels[2**bits - 2 : 2 ** (bits + 1) - 2]
            halves = (level[1:] + level[:-1]) / 2
            windows = torch.bucketize(values[:, chosen], halves) << self.shift[chosen]
            stored.index_add_(1, self.byte[chosen], windows >> 8)
            stored.index_add_(1, self.following[chosen], windows & 255)
        return stored.to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        """Turn bytes into images, the inverse of :meth:`encode` but for what that loses.

        Args:
            stored: uint8 ``[count, length]``.

        Returns:
            float32 ``[count, channels, height, width]`` in ``[0, 1]``.
        """
        with _exactly(stored):
            return self._decode(stored)

    def _decode(self, stored: Tensor) -> Tensor:
        header = stored[:, : 2 * self.channels].to(self.levels.dtype)
        mean = (header[:, : self.channels] - self.middle) / 255
        mean = mean * math.sqrt(self.height * self.width)
        scale = torch.exp2((header[:, self.channels :] - 128) / 8)
        wide = stored.to(torch.int32)
        windows = wide.index_select(1, self.byte) << 8 | wide.index_select(1, self.following)
        mask = (1 << self.bits) - 1
        numbers = ((windows >> self.shift) & mask) + (mask - 1)
        values = self.levels[numbers] * self.deviation * scale.index_select(1, self.plane)
        nothing = values.new_zeros((len(stored), 1))
        # Each place takes a stored coefficient, a mean, or nothing.
        whole = torch.cat([values, mean, nothing], dim=1).index_select(1, self.source)
        coefficients = whole.unflatten(1, (self.channels, self.height, self.width))
        return (self.transform.images(coefficients) + 0.5).clamp(0, 1)

    def keep(self, images: Tensor) -> Tensor:
        """The part of images, or of changes to images, that is stored at all; linear.

        Args:
            images: Floating-point numbers ``[count, channels, height, width]``.

        Returns:
            The same without the frequencies that take no bits.
        """
        with _exactly(images):
            coefficients = self.transform.coefficients(images)
            return self.transform.images(coefficients * self._kept.to(images.dtype))

    @property
    def _kept(self) -> Tensor:
        stored = self.source != len(self.place) + self.channels
        return stored.view(self.channels, self.height, self.width)


def _exactly(images: Tensor) -> torch.autocast:
    """In the types that tensors have, also where a network's steps are autocast around it."""
    return torch.autocast(images.device.type, enabled=False)


@lru_cache(maxsize=64)
def cosine_transform_for(
    channels: int, height: int, width: int, device: torch.device
) -> CosineTransform:
    """The transform for images of one shape on one device."""
    planes = planes_of(channels)
    parts = (planes, np.linalg.inv(planes), cosine_transform(height), cosine_transform(width))
    with torch.inference_mode(False):  # else what the first caller's mode makes would stay
        return CosineTransform(
            *(torch.as_tensor(part, dtype=torch.float32, device=device) for part in parts)
        )


@lru_cache(maxsize=64)
def transform_code(
    channels: int, height: int, width: int, length: int, device: torch.device
) -> TransformCode:
    """The code for images of one shape, in so many bytes each.

    Raises:
        ArgumentError: If so few bytes cannot hold such an image.
    """
    found = layout(channels, height, width, length)
    stored = len(found.place)
    source = np.full(channels * height * width, stored + channels)
    source[found.place] = np.arange(stored)
    source[np.arange(channels) * height * width] = stored + np.arange(channels)

    def numbers(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    def whole(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=device)

    with torch.inference_mode(False):  # else what the first caller's mode makes would stay
        return TransformCode(
            channels=channels,
            height=height,
            width=width,
            length=length,
            transform=cosine_transform_for(channels, height, width, device),
            middle=numbers(found.middle),
            place=whole(found.place),
            plane=whole(found.plane),
            deviation=numbers(found.deviation),
            bits=whole(found.bits),
            byte=whole(found.byte),
            following=whole(found.following),
            shift=whole(found.shift),
            member=numbers(found.plane[:, None] == np.arange(channels)),
            of_bits=tuple(whole(np.flatnonzero(found.bits == bits)) for bits in range(1, 9)),
            source=whole(source),
            levels=numbers(levels()),
        )
