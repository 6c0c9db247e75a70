"""How stored images become the images that a network sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dc_replay._checks import check_compression, check_crops, check_factor
from dc_replay._layout import layout_of
from dc_replay.coding import TransformCode, transform_code
from dc_replay.errors import ArgumentError
from dc_replay.pixels import dequantise, quantise


@dataclass(frozen=True)
class Formation:
    """Multi-formation: each stored image holds ``factor * factor`` smaller ones, side by side.

    A stored image is cut into a grid of crops with sides ``ceil(height / factor)`` and
    ``ceil(width / factor)``, and each crop is enlarged bilinearly to the full size. Where the
    factor does not divide a side, the stored image is extended with mid-grey first. ``factor=1``
    stores images as they are.

    With a ``compression`` of ``n`` the bytes of a stored image hold ``n`` *layers*, each of which
    is such an image in transform code (see :mod:`dc_replay.coding`). It takes no more bytes.

    There are three forms. *Stored*: bytes ``[count, channels, height, width]``, what a memory
    keeps. *Open*: numbers in ``[0, 1]``, ``[count, compression * channels, height, width]``,
    what is optimised. *Decoded*: what a network sees.

    Decoded images come *image-major*: those of stored image 0, layer by layer and row by row, then
    those of image 1. So the first ``n * images_per_stored`` decoded images depend on the first
    ``n`` stored ones alone, which is what lets a memory be cut to a prefix.

    Source of multi-formation: Kim et al., "Dataset Condensation via Efficient Synthetic-Data
    Parameterization", ICML 2022, section 4.

    Attributes:
        factor: Crops along each side of a stored image, at least 1.
        compression: How many images share the bytes of one, at least 1. An image of 3x32x32 bytes
            loses what the eye hardly sees up to about 10.

    Raises:
        ArgumentError: If one of them is something else.
    """

    factor: int = 2
    compression: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", check_factor(self.factor))
        object.__setattr__(self, "compression", check_compression(self.compression))

    @property
    def images_per_stored(self) -> int:
        """How many decoded images one stored image holds."""
        return self.compression * self.factor**2

    def open_shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """The shape of one open image, given that of a decoded one."""
        return self.compression * channels, height, width

    def store(self, images: Tensor) -> Tensor:
        """Turn open images into bytes; values outside of ``[0, 1]`` are clamped.

        Args:
            images: Floating-point images ``[count, compression * channels, height, width]``.

        Returns:
            uint8 ``[count, channels, height, width]``.
        """
        if self.compression == 1:
            return quantise(images)
        count, _, height, width = images.shape
        layers = self.layers(images)
        coded = self._code_of(layers).encode(layers)
        coded = coded.view(count, self.compression * coded.shape[1])
        channels = layers.shape[1]
        # What the layers leave over, less than a byte for each of them, stays 0.
        rest = channels * height * width - coded.shape[1]
        return F.pad(coded, (0, rest)).view(count, channels, height, width)

    def open(self, stored: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn bytes into open images of a floating-point type.

        The inverse of :meth:`store`, but for what compression loses.

        Args:
            stored: uint8 ``[count, channels, height, width]``.
            dtype: The type of the result.

        Returns:
            ``[count, compression * channels, height, width]`` in ``[0, 1]``.
        """
        if self.compression == 1:
            return dequantise(stored, dtype)
        coded = self._coded(stored)
        images = self._code_of(stored).decode(coded.flatten(0, 1))
        shape = self.open_shape(stored.shape[1], stored.shape[2], stored.shape[3])
        return images.view(len(stored), *shape).to(dtype)

    def layers(self, images: Tensor) -> Tensor:
        """Each layer of open images as an image, those of stored image 0 first.

        Args:
            images: ``[count, compression * channels, height, width]``.

        Returns:
            ``[count * compression, channels, height, width]``.
        """
        count, channels, height, width = images.shape
        return images.reshape(count * self.compression, channels // self.compression, height, width)

    def keep(self, changes: Tensor) -> Tensor:
        """What of changes to open images can be stored: with compression, not every frequency.

        Args:
            changes: Floating-point numbers ``[count, compression * channels, height, width]``.

        Returns:
            Numbers of the same shape.
        """
        if self.compression == 1:
            return changes
        layers = self.layers(changes)
        return self._code_of(layers).keep(layers).view_as(changes)

    def check(self, channels: int, height: int, width: int) -> None:
        """Raise an ArgumentError unless such images can be stored so.

        That is if the factor would put whole crops outside of them, or compression would leave
        fewer bytes than an image takes.
        """
        check_crops(self.factor, height, width)
        if self.compression > 1:
            layout_of((channels, height, width), self.compression)

    def decode(self, images: Tensor) -> Tensor:
        """Form the images that a network sees, differentiably.

        Args:
            images: Open images ``[count, compression * channels, height, width]`` in ``[0, 1]``.

        Returns:
            ``[count * images_per_stored, channels, height, width]``, image-major.
        """
        images = self.layers(images)
        if self.factor == 1:
            return images
        crops = self._crops(images).flatten(0, 2)
        return self._enlarge(crops, images.shape[-2:])

    def decode_at(self, stored: Tensor, index: Tensor) -> Tensor:
        """Form chosen images only: ``decode(open(stored))[index]`` without decoding the rest.

        Args:
            stored: Stored images, uint8 ``[count, channels, height, width]``; without compression,
                open ones too.
            index: int64 positions ``[batch]`` among the decoded images.

        Returns:
            Floating-point images ``[batch, channels, height, width]`` in ``[0, 1]``.
        """
        if self.compression > 1:
            # Only the layers that are asked for, and what is left is the same without compression.
            each = self.factor**2
            layer = torch.div(index, each, rounding_mode="floor")
            opened = self._code_of(stored).decode(
                self._coded(stored)[layer // self.compression, layer % self.compression]
            )
            places = torch.arange(len(index), device=index.device) * each + index % each
            return Formation(self.factor)._decode_at(opened, places)
        return self._decode_at(stored, index)

    def _decode_at(self, stored: Tensor, index: Tensor) -> Tensor:
        """The same for one layer, of bytes or of numbers in ``[0, 1]``."""
        # Choosing whole images copies them, where indexing by brackets goes value by value.
        if self.factor == 1:
            return _as_numbers(stored.index_select(0, index))
        image = torch.div(index, self.factor**2, rounding_mode="floor")
        crop = index % self.factor**2
        row = torch.div(crop, self.factor, rounding_mode="floor")
        height, width = stored.shape[-2:]
        if height % self.factor or width % self.factor:
            # Grey, with which they are extended, lies between two bytes.
            stored = _as_numbers(stored.index_select(0, image))
            image = torch.arange(len(index), device=index.device)
        crops = self._crops(stored)[image, row, crop % self.factor]
        return self._enlarge(_as_numbers(crops), stored.shape[-2:])

    def as_stored(self, images: Tensor) -> Tensor:
        """What storing would leave of images: their resolution, and the traces of compression.

        Without compression the rounding to bytes, which shows in no image, is left out.

        Args:
            images: Floating-point images ``[batch, channels, height, width]`` in ``[0, 1]``.

        Returns:
            Images of the same shape and type; the same ones where they are stored as they are.
        """
        height, width = images.shape[-2:]
        if self.compression == 1 and height % self.factor == width % self.factor == 0:
            return self._coarse(images)  # what packing leaves, in two thirds of the time
        # A layer holds several images. Those that fill up the last one are dropped again.
        filling = images[:1].expand(-len(images) % self.factor**2, -1, -1, -1)
        layers = self._side_by_side(torch.cat([images, filling]))
        if self.compression > 1:
            code = self._code_of(layers)
            layers = code.decode(code.encode(layers)).to(images.dtype)
        shown = Formation(self.factor).decode(layers)[: len(images)]
        # The code has no byte for what is no number, and would hide that something went wrong.
        return torch.where(images.isfinite(), shown, images)

    def _coarse(self, images: Tensor) -> Tensor:
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
            ``[count, compression * channels, height, width]``. Decoding it gives the images back at
            the resolution of a crop, in the same order.

        Raises:
            ArgumentError: If the number of images is not a multiple of ``images_per_stored``.
        """
        if len(images) % self.images_per_stored:
            raise ArgumentError(
                f"`images` holds {len(images)} images, which is not a multiple of the "
                f"{self.images_per_stored} that a stored image takes at factor {self.factor} and "
                f"compression {self.compression}; pass images_per_stored images for each stored "
                f"image"
            )
        packed = self._side_by_side(images)
        if self.compression == 1:
            return packed
        height, width = images.shape[2:]
        return packed.reshape(-1, self.compression * images.shape[1], height, width)

    def _coded(self, stored: Tensor) -> Tensor:
        """The bytes of each layer, ``[count, compression, length]``."""
        length = layout_of(stored.shape[1:], self.compression).length
        used = stored.flatten(1)[:, : self.compression * length]
        return used.reshape(len(stored), self.compression, length)

    def _code_of(self, images: Tensor) -> TransformCode:
        """The code of layers, or of stored images, which are of the same shape."""
        found = layout_of(images.shape[1:], self.compression)
        return transform_code(*found.shape, found.length, images.device)

    def _side_by_side(self, images: Tensor) -> Tensor:
        if self.factor == 1:
            return images
        channels, height, width = images.shape[1:]
        crop_height, crop_width = self._crop_size(height, width)
        # Means of pixels, which leave no jags; the published code starts from every second pixel.
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
        check_crops(self.factor, height, width)
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
