"""What the bytes of an image in transform code mean, and how to read them, without torch.

An image becomes a few hundred bytes, as many for every image, so that any of them is found and
decoded on its own. Colour is turned into brightness and two colour differences (ITU-R BT.601,
as JPEG has it), each such plane into the coefficients of its two-dimensional cosine transform
(DCT-II, orthonormal), and each coefficient takes a fixed number of bits, between 0 and 8:

* Natural images have most of their variance at low frequencies. Of each plane the model is
  ``1 / (1 + f ** 2) ** 1.5`` with ``f`` in half periods along a side, and colour differences have
  0.06 times as much. Bits go one after the other to where the next one takes away most of the
  expected squared error (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
  quantizers", IEEE TASSP 1988).
* A coefficient over its standard deviation in the model and over a scale that is stored for each
  image and plane is taken for a variable of the Laplace distribution, and rounded to the levels
  that are best for one (Sullivan, "Efficient scalar quantization of exponential and Laplacian
  random variables", IEEE T-IT 1996).

The bytes are: the mean of each plane, in steps of a 255th of the range; the scale of each plane,
``2 ** ((byte - 128) / 8)``; then the bits of all coefficients, plane by plane and row by row, the
first bit of a number its highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dc_replay.errors import ArgumentError

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

# The transform is a matrix of side by side, and the allocation sorts eight numbers for each value.
_LARGEST_SIDE = 2048
_MOST_VALUES = 2**22
_COLOUR_SHARE = 0.06
_TO_PLANES = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything is in the bytes of an image.

    Attributes:
        shape: Channels, height and width of the image.
        length: Its bytes.
        planes: Maps channels to planes, ``[channels, channels]``.
        middle: The byte that stands for half of the brightness, or for no colour, ``[channels]``.
        cosines: The transforms along the height and along the width, ``[side, side]`` with a row
            for each frequency.
        place: Where the stored coefficients are among all of them, ``[stored]``.
        plane: The plane of each, ``[stored]``.
        deviation: The standard deviation of each in the model, ``[stored]``.
        bits: The bits of each, ``[stored]``.
        byte: The byte in which each begins, ``[stored]``.
        shift: How far it is from the end of this byte and the next one, in bits, ``[stored]``.
    """

    shape: tuple[int, int, int]
    length: int
    planes: Floats
    middle: Floats
    cosines: tuple[Floats, Floats]
    place: Places
    plane: Places
    deviation: Floats
    bits: Places
    byte: Places
    shift: Places

    @property
    def channels_of(self) -> Floats:
        """Maps planes to channels, ``[channels, channels]``."""
        return np.asarray(np.linalg.inv(self.planes), np.float64)

    @property
    def following(self) -> Places:
        """The byte after that in which each coefficient begins, or the last one, ``[stored]``."""
        return np.minimum(self.byte + 1, self.length - 1)

    def read(self, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode bytes ``[count, length]`` to uint8 images of this shape, count first."""
        at_once = max(1, _MOST_VALUES // math.prod(self.shape))
        parts = [stored[first : first + at_once] for first in range(0, len(stored), at_once)]
        return np.concatenate([self._read(part) for part in parts])

    def _read(self, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
        channels, height, width = self.shape
        windows = stored[:, self.byte].astype(np.int64) << 8 | stored[:, self.following]
        number = (windows >> self.shift) & ((1 << self.bits) - 1)
        scale = 2.0 ** ((stored[:, channels : 2 * channels].astype(np.float64) - 128) / 8)
        coefficients = np.zeros((len(stored), channels * height * width))
        coefficients[:, self.place] = (
            levels()[number + (1 << self.bits) - 2] * self.deviation * scale[:, self.plane]
        )
        grid = coefficients.reshape(-1, *self.shape)
        means = (stored[:, :channels] - self.middle) / 255
        grid[:, :, 0, 0] = means * math.sqrt(height * width)
        planes = self.cosines[0].T @ grid @ self.cosines[1]
        images: Floats = np.einsum("cp,nphw->nchw", self.channels_of, planes) + 0.5
        return (images.clip(0, 1) * 255).round().astype(np.uint8)


@lru_cache(maxsize=64)
def layout(channels: int, height: int, width: int, length: int) -> Layout:
    """The layout of images of so many bytes.

    Raises:
        ArgumentError: If the images are too large, or so few bytes cannot hold one.
    """
    if max(height, width) > _LARGEST_SIDE or channels * height * width > _MOST_VALUES:
        raise ArgumentError(
            f"images of {channels}x{height}x{width} are too large for transform code, which takes "
            f"sides of at most {_LARGEST_SIDE} and {_MOST_VALUES:,} values; use `compression` 1"
        )
    if length < 3 * channels:
        raise ArgumentError(
            f"`compression` is too high: an image of {channels}x{height}x{width} cannot be stored "
            f"in {length} bytes, of which {2 * channels} go for the mean and the scale of each "
            f"channel; lower it"
        )
    side = math.sqrt(height * width)
    rows = (np.arange(height) * side / height)[:, None] ** 2
    columns = (np.arange(width) * side / width)[None, :] ** 2
    variance = (1 + rows + columns) ** -1.5
    colour = channels == 3
    share = np.array([1, _COLOUR_SHARE, _COLOUR_SHARE]) if colour else np.ones(channels)
    bits = _allocate(share[:, None, None] * variance, 8 * (length - 2 * channels))
    place = np.flatnonzero(bits)
    bits = bits.ravel()[place]
    start = 16 * channels + np.cumsum(bits) - bits
    return Layout(
        shape=(channels, height, width),
        length=length,
        planes=planes_of(channels),
        middle=np.array([127.5, 128, 128]) if colour else np.full(channels, 127.5),
        cosines=(cosine_transform(height), cosine_transform(width)),
        place=place,
        plane=place // (height * width),
        deviation=np.sqrt(variance.ravel()[place % (height * width)]),
        bits=bits,
        byte=start // 8,
        shift=16 - start % 8 - bits,
    )


def layout_of(shape: Sequence[int], compression: int) -> Layout:
    """The layout of the images that share the bytes of a stored one.

    Args:
        shape: Channels, height and width of a stored image.
        compression: How many images share the bytes of one.

    Raises:
        ArgumentError: If the images are too large, or that leaves each of them too few bytes.
    """
    channels, height, width = shape
    return layout(channels, height, width, channels * height * width // compression)


def read_layers(
    stored: NDArray[np.uint8], compression: int, most: int | None = None
) -> NDArray[np.uint8]:
    """Decode the images that share the bytes of stored ones.

    Args:
        stored: Stored images, uint8 ``[count, channels, height, width]``, at least one.
        compression: How many images share the bytes of one.
        most: Stop after so many.

    Returns:
        uint8 ``[count * compression, channels, height, width]``, or the first of them.
    """
    found = layout_of(stored.shape[1:], compression)
    used = stored.reshape(len(stored), -1)[:, : compression * found.length]
    return found.read(used.reshape(-1, found.length)[:most])


@lru_cache(maxsize=1)
def levels() -> Floats:
    """What the numbers of 1 to 8 bits stand for, one after the other, ``[510]``.

    For each number of bits the levels that leave the smallest expected squared error of a variable
    of the Laplace distribution with variance 1, in ascending order.
    """
    return np.concatenate([_laplacian(bits) for bits in range(1, 9)])


def _laplacian(bits: int) -> Floats:
    """The best ``2 ** bits`` levels.

    Of an exponential variable with mean 1, the cell above the last threshold has its mean 1 above
    it. Each threshold is halfway between two levels, so the cell below has its level as far below
    its upper end, from which its width follows; and so on, down to 0.
    """
    above, widths = 1.0, []
    offsets = [above]
    for _ in range(2 ** (bits - 1) - 1):
        low, high = 0.0, 2 + 2 * above
        for _ in range(80):  # bisection, to the last bit
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_below(middle) < above else (low, middle)
        widths.append(high)
        above = high - above
        offsets.append(above)
    thresholds = np.concatenate([[0.0], np.cumsum(widths[::-1])])
    positive = (thresholds + np.array(offsets[::-1])) / math.sqrt(2)
    return np.concatenate([-positive[::-1], positive])


def _mean_below(width: float) -> float:
    """How far the mean of an exponential variable in a cell is below the cell's upper end."""
    return width / -math.expm1(-width) - 1 if width else 0.0


def _errors() -> list[float]:
    """The expected squared error with 0 to 8 bits of a variable with variance 1."""
    found = [1.0]
    for bits in range(1, 9):
        positive = levels()[2**bits - 2 :][2 ** (bits - 1) : 2**bits]
        # Levels are the means of their cells, so what they explain is their mean square.
        ends = np.concatenate([[0.0], (positive[1:] + positive[:-1]) / 2, [np.inf]])
        chance = -np.diff(np.exp(-math.sqrt(2) * ends))
        found.append(1 - float((chance * positive**2).sum()))
    return found


def _allocate(variance: Floats, available: int) -> Places:
    """Bits for each coefficient; none for the means, which are stored apart."""
    gains = -np.diff(_errors())
    # Rounded, so that the order is the same on every machine, and equals are in their own.
    worth = np.log2(variance)[..., None] + np.log2(gains)
    worth[:, 0, 0] = -np.inf
    order = np.argsort(-worth.round(6), axis=None, kind="stable")[:available]
    order = order[np.isfinite(worth.ravel()[order])]
    bits = np.bincount(order // len(gains), minlength=variance.size)
    return bits.reshape(variance.shape)


def planes_of(channels: int) -> Floats:
    """Maps channels to planes: of three, to brightness and two colour differences."""
    return np.array(_TO_PLANES) if channels == 3 else np.eye(channels)


def cosine_transform(side: int) -> Floats:
    """The orthonormal cosine transform (DCT-II), a row for each frequency."""
    angles = math.pi / side * np.outer(np.arange(side), np.arange(side) + 0.5)
    rows: Floats = np.cos(angles) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows
