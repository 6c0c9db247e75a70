"""Stored images as PNG files: one each, or a sheet with a row for each class."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

ROWS = 100
COLUMNS = 20
PIXELS = 2**26
"""At most these on a sheet, so that a small file cannot ask for a huge one."""
_SIDE = 48
_MARGIN = 8
_INK = "#222222"


def png(image: NDArray[np.uint8]) -> bytes:
    """One image as a PNG file.

    Args:
        image: uint8 ``[channels, height, width]`` with 1 or 3 channels.
    """
    return _encode(Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))


def channels_shown(channels: int) -> int:
    """How many of an image's first channels a picture can show: 1 as grey, 3 as colour."""
    return 1 if channels < 3 else 3


class Sheet(NamedTuple):
    """A picture of the first images of the first classes.

    Attributes:
        png: The file.
        rows: How many classes it shows.
        columns: How many images of each it has room for.
    """

    png: bytes
    rows: int
    columns: int


def sheet(classes: Mapping[int, NDArray[np.uint8]]) -> Sheet:
    """Draw one row of images for each class, labelled.

    There are at most ``ROWS`` of them, with ``COLUMNS`` images each, and fewer of both where they
    would take more than ``PIXELS`` in all: first fewer images of each class, then fewer classes.

    Small images are enlarged by whole pixels. Of 2 channels the first is shown as grey, and of
    more than 3 the first three as red, green and blue.

    Args:
        classes: uint8 ``[images, channels, height, width]`` by label, at least one image in all.
    """
    classes = dict(islice(classes.items(), ROWS))
    channels, height, width = next(iter(classes.values())).shape[1:]
    scale = ceil(_SIDE / max(height, width))
    tall, wide = height * scale, width * scale
    gap = max(3, min(tall, wide) // 9)
    font = ImageFont.load_default()
    boxes = {label: font.getbbox(str(label)) for label in classes}
    names = ceil(max(right for _, _, right, _ in boxes.values()))
    pitch = gap + max(tall, ceil(max(bottom for *_, bottom in boxes.values())))
    # What there is beside the columns and above the rows, each of which brings its gap.
    beside, above = 3 * _MARGIN + names - gap, 2 * _MARGIN - gap
    columns = min(COLUMNS, max(len(images) for images in classes.values()))
    fitting = (PIXELS // (above + len(classes) * pitch) - beside) // (wide + gap)
    columns = max(1, min(columns, fitting))
    across = beside + columns * (wide + gap)
    rows = max(1, min(len(classes), (PIXELS // across - above) // pitch))
    canvas = np.full((above + rows * pitch, across, 3), 255, np.uint8)
    for row, images in enumerate(islice(classes.values(), rows)):
        top = _MARGIN + row * pitch
        shown = images[:columns, : channels_shown(channels)].transpose(0, 2, 3, 1)
        for column, tile in enumerate(shown.repeat(scale, axis=1).repeat(scale, axis=2)):
            left = 2 * _MARGIN + names + column * (wide + gap)
            canvas[top : top + tall, left : left + wide] = tile
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, (label, (_, high, right, low)) in enumerate(islice(boxes.items(), rows)):
        middle = _MARGIN + row * pitch + tall / 2
        place = (_MARGIN + names - right, max(0, middle - (high + low) / 2))
        draw.text(place, str(label), fill=_INK, font=font)
    return Sheet(_encode(picture), rows, columns)


def _encode(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, format="png")
    return file.getvalue()
