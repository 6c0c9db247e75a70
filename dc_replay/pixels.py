"""Pixel ranges: bytes in memory, ``[0, 1]`` images, and the normalised values that networks see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dc_replay._checks import checked_scale, reals, whole
from dc_replay.errors import ArgumentError


@dataclass(frozen=True)
class Normalization:
    """The per-channel affine map between ``[0, 1]`` image space and what a network sees.

    Attributes:
        mean: One value per channel, in units of ``[0, 1]`` image space.
        std: One positive value per channel, likewise.

    Raises:
        ArgumentError: If the two differ in length, or a deviation is not positive and finite.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        mean, std = checked_scale(self.mean, self.std)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @classmethod
    def identity(cls, channels: int) -> Normalization:
        """The map for data that a network sees as ``[0, 1]`` images."""
        channels = whole("channels", channels)
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def from_range(cls, low: Sequence[float], high: Sequence[float]) -> Normalization:
        """The map whose inverse sends ``[low, high]`` of each channel onto ``[0, 1]``.

        A channel whose two ends coincide gets a range of length 1 above ``low``.
        """
        lows, highs = reals(low), reals(high)
        if not lows or len(lows) != len(highs):
            raise ArgumentError(
                f"`low` and `high` must hold one number per channel each, but they hold "
                f"{len(lows)} and {len(highs)}; pass two sequences of equal length"
            )
        ends = zip(lows, highs, strict=True)
        spans = [1.0 if top <= bottom else top - bottom for bottom, top in ends]
        return cls(
            tuple(-bottom / span for bottom, span in zip(lows, spans, strict=True)),
            tuple(1.0 / span for span in spans),
        )

    @property
    def channels(self) -> int:
        """How many channels the map is for."""
        return len(self.mean)

    def scale(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Scale:
        """The map as tensors on a device."""
        mean, std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return Scale(mean, std)

    def apply(self, images: Tensor) -> Tensor:
        """Normalise ``[0, 1]`` images of shape ``[batch, channels, height, width]``."""
        scale = self._scale(images)
        return (images - scale.mean) / scale.std

    def invert(self, images: Tensor) -> Tensor:
        """Bring normalised images ``[batch, channels, height, width]`` back to ``[0, 1]``."""
        return self._scale(images).invert(images)

    def _scale(self, images: Tensor) -> Scale:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ArgumentError(
                f"`images` has shape {list(images.shape)}, but this normalization is for "
                f"[batch, {self.channels}, height, width]; pass one mean and std per channel"
            )
        return self.scale(images.device, images.dtype)


def check_normalization(normalization: object) -> None:
    """Raise an ArgumentError unless it is one, or None."""
    if normalization is not None and not isinstance(normalization, Normalization):
        raise ArgumentError(
            f"`normalization` is {normalization!r}; pass Normalization(mean, std) or None"
        )


class Scale(NamedTuple):
    """A :class:`Normalization` as tensors on a device, to hand to a compiled function.

    Attributes:
        mean: ``[1, channels, 1, 1]``.
        std: Likewise.
    """

    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """What a network sees of images ``[batch, channels, height, width]``.

        Args:
            images: uint8, or floating point in ``[0, 1]``.
        """
        if images.dtype == torch.uint8:
            images = dequantise(images, self.mean.dtype)
        return (images - self.mean) / self.std

    def invert(self, images: Tensor) -> Tensor:
        """Bring normalised images ``[batch, channels, height, width]`` back to ``[0, 1]``."""
        return images * self.std + self.mean


def quantise(images: Tensor) -> Tensor:
    """Round ``[0, 1]`` images to uint8, clamping what lies outside."""
    return images.detach().clamp(0, 1).mul(255).round().to(torch.uint8)


def dequantise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn uint8 pixels into ``[0, 1]`` images of a floating-point ``dtype``."""
    return pixels.to(dtype) / 255


def in_type(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as a dataset yields them.

    Args:
        images: In values that the network sees, or, for uint8, from 0 to 255.
        dtype: The type of the dataset's images; uint8 is for networks that begin by normalising.

    Returns:
        Images of that type; of no floating-point type but uint8, as they are.
    """
    if dtype == torch.uint8:
        return images.round().clamp(0, 255).to(torch.uint8)
    return images.to(dtype) if dtype.is_floating_point else images
