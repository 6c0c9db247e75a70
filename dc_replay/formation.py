"""How stored images become the images that a network sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dc_replay._checks import check_bits, check_crops, check_factor
from dc_replay.errors import ArgumentError
from dc_replay.pixels import dequantise, quantise


@dataclass(frozen=True)
class Formation:
    """Multi-formation: each stored image holds ``factor * factor`` smaller ones, side by side.

    A stored image is cut into a grid of crops with sides ``ceil(height / factor)`` and
    ``ceil(width / factor)``, and each crop is enlarged bilinearly to the full size. Where the
    factor does not divide a side, the stored image is extended with mid-grey first. ``factor=1``
    stores images as they are.

    With ``bits=4`` a stored image holds twice as many, in two *layers*: one in the upper and one in
    the lower half of each byte, each value rounded to one of 16. It takes no more bytes.

    There are three forms. *Stored*: bytes ``[count, channels, height, width]``, what a memory
    keeps. *Open*: numbers in ``[0, 1]``, ``[count, layers * channels, height, width]``, what is
    optimised. *Decoded*: what a network sees.

    Decoded images come *image-major*: those of stored image 0, layer by layer and row by row, then
    those of image 1. So the first ``n * images_per_stored`` decoded images depend on the first
    ``n`` stored ones alone, which is what lets a memory be cut to a prefix.

    Source of multi-formation: Kim et al., "Dataset Condensation via Efficient Synthetic-Data
    Parameterization", ICML 2022, section 4.

    Attributes:
        factor: Crops along each side of a stored image, at least 1.
        bits: Bits of each stored value, 8 or 4.

    Raises:
        ArgumentError: If one of them is something else.
    """

    factor: int = 2
    bits: int = 8

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_bits(self.bits)

    @property
    def layers(self) -> int:
        """Images that share the bytes of one: 2 with 4 bits, else 1."""
        return 8 // self.bits

    @property
    def images_per_stored(self) -> int:
        """How many decoded images one stored image holds."""
        return self.layers * self.factor**2

    def open_shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """The shape of one open image, given that of a decoded one."""
        return self.layers * channels, height, width

    def store(self, images: Tensor) -> Tensor:
        """Turn open images into bytes; values outside of ``[0, 1]`` are clamped.

        Args:
            images: Floating-point images ``[count, layers * channels, height, width]``.

        Returns:
            uint8 ``[count, channels, height, width]``.
        """
        if self.layers == 1:
            return quantise(images)
        upper, lower = (images.clamp(0, 1) * 15).round().to(torch.uint8).chunk(2, dim=1)
        return (upper << 4) | lower

    def open(self, stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn bytes into open images of a floating-point type, the inverse of :meth:`store`.

        Args:
            stored: uint8 ``[count, channels, height, width]``.
            dtype: The type of the result.

        Returns:
            ``[count, layers * channels, height, width]`` in ``[0, 1]``.
        """
        if self.layers == 1:
            return dequantise(stored, dtype)
        return torch.cat([stored >> 4, stored & 15], dim=1).to(dtype) / 15

    def check(self, height: int, width: int) -> None:
        """Raise an ArgumentError if the factor would put whole crops outside of such images."""
        check_crops(self.factor, height, width)

    def decode(self, images: Tensor) -> Tensor:
        """Form the images that a network sees, differentiably.

        Args:
            images: Open images ``[count, layers * channels, height, width]`` in ``[0, 1]``.

        Returns:
            ``[count * images_per_stored, channels, height, width]``, image-major.
        """
        if self.layers > 1:
            images = images.unflatten(1, (self.layers, -1)).flatten(0, 1)
        if self.factor == 1:
            return images
        crops = self._crops(images).flatten(0, 2)
        return self._enlarge(crops, images.shape[-2:])

    def decode_at(self, stored: Tensor, index: Tensor) -> Tensor:
        """Form chosen images only: ``decode(open(stored))[index]`` without decoding the rest.

        Args:
            stored: Stored images, uint8 ``[count, channels, height, width]``; with 8 bits, open
                ones too.
            index: int64 positions ``[batch]`` among the decoded images.

        Returns:
            Floating-point images ``[batch, channels, height, width]`` in ``[0, 1]``.
        """
        if self.layers > 1:
            # Cheap to open, and what is left is the same thing with more stored images.
            each = self.factor**2
            image = torch.div(index, self.images_per_stored, rounding_mode="floor")
            layer = torch.div(index % self.images_per_stored, each, rounding_mode="floor")
            bytes_of = stored.index_select(0, image)
            shift = (4 * (1 - layer)).to(torch.uint8)[:, None, None, None]
            opened = ((bytes_of >> shift) & 15).to(torch.float32) / 15
            places = torch.arange(len(index), device=index.device) * each + index % each
            return Formation(self.factor)._decode_at(opened, places)
        return self._decode_at(stored, index)

    def _decode_at(self, stored: Tensor, index: Tensor) -> Tensor:
        """The same for one layer, of bytes or of numbers in ``[0, 1]``."""
        # Choosing whole images copies them, where indexing by brackets goes value by value.
        if self.factor == 1:
            return _as_numbers(stored.index_select(0, index))
        image = torch.div(index, self.images_per_stored, rounding_mode="floor")
        crop = index % self.images_per_stored
        row = torch.div(crop, self.factor, rounding_mode="floor")
        height, width = stored.shape[-2:]
        if height % self.factor or width % self.factor:
            # Grey, with which they are extended, lies between two bytes.
            stored = _as_numbers(stored.index_select(0, image))
            image = torch.arange(len(index), device=index.device)
        crops = self._crops(stored)[image, row, crop % self.factor]
        return self._enlarge(_as_numbers(crops), stored.shape[-2:])

    def coarse(self, images: Tensor) -> Tensor:
        """Images at the resolution that being stored would leave them.

        Args:
            images: Floating-point images ``[batch, channels, height, width]``, normalised or not.

        Returns:
            Images of the same shape; the same ones where the factor is 1.
        """
        if self.factor == 1:
            return images
        size = images.shape[-2:]
        small = F.interpolate(images, size=self._crop_size(size[0], size[1]), mode="area")
        return self._enlarge(small, size)

    def pack(self, images: Tensor) -> Tensor:
        """Put images side by side: each group of ``images_per_stored`` becomes one open image.

        Args:
            images: Floating-point images ``[count * images_per_stored, channels, height, width]``.

        Returns:
            ``[count, layers * channels, height, width]``. Decoding it gives the images back at the
            resolution of a crop, in the same order.

        Raises:
            ArgumentError: If the number of images is not a multiple of ``images_per_stored``.
        """
        if len(images) % self.images_per_stored:
            raise ArgumentError(
                f"`images` holds {len(images)} images, which is not a multiple of the "
                f"{self.images_per_stored} that a stored image takes at factor {self.factor} and "
                f"{self.bits} bits; pass images_per_stored images for each stored image"
            )
        packed = self._side_by_side(images)
        return packed.unflatten(0, (-1, self.layers)).flatten(1, 2) if self.layers > 1 else packed

    def _side_by_side(self, images: Tensor) -> Tensor:
        if self.factor == 1:
            return images
        channels, height, width = images.shape[1:]
        crop_height, crop_width = self._crop_size(height, width)
        small = F.interpolate(images, size=(crop_height, crop_width), mode="area")
        grid = small.view(-1, self.factor, self.factor, channels, crop_height, crop_width)
        rows = grid.permute(0, 3, 1, 4, 2, 5)
        whole = rows.reshape(-1, channels, self.factor * crop_height, self.factor * crop_width)
        return whole[..., :height, :width].contiguous()

    def _crop_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.factor), -(-width // self.factor)

    def _crops(self, stored: Tensor) -> Tensor:
        """View as ``[count, factor, factor, channels, crop_height, crop_width]``."""
        count, channels, height, width = stored.shape
        self.check(height, width)
        crop_height, crop_width = self._crop_size(height, width)
        bottom, right = self.factor * crop_height - height, self.factor * crop_width - width
        if bottom or right:
            stored = F.pad(stored, (0, right, 0, bottom), value=0.5)
        grid = stored.reshape(count, channels, self.factor, crop_height, self.factor, crop_width)
        return grid.permute(0, 2, 4, 1, 3, 5)

    @staticmethod
    def _enlarge(crops: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(crops, size=tuple(size), mode="bilinear", align_corners=False)


def check_formation(formation: object) -> None:
    """Raise an ArgumentError unless it is one."""
    if not isinstance(formation, Formation):
        raise ArgumentError(f"`formation` is {formation!r}; pass Formation(factor)")


def _as_numbers(images: Tensor) -> Tensor:
    return dequantise(images) if images.dtype == torch.uint8 else images
