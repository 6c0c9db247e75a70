"""Stored images as PNG files: one each, or a sheet with a row for each class."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 20
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


def sheet(classes: Mapping[int, NDArray[np.uint8]]) -> bytes:
    """A PNG file with one row of images for each class, labelled, at most ``COLUMNS`` of them.

    Small images are enlarged by whole pixels. Of 2 channels the first is shown as grey, and of
    more than 3 the first three as red, green and blue.

    Args:
        classes: uint8 ``[images, channels, height, width]`` by label, at least one image in all.
    """
    channels, height, width = next(iter(classes.values())).shape[1:]
    scale = ceil(_SIDE / max(height, width))
    tall, wide = height * scale, width * scale
    gap = max(3, min(tall, wide) // 9)
    font = ImageFont.load_default()
    boxes = {label: font.getbbox(str(label)) for label in classes}
    names = ceil(max(right for _, _, right, _ in boxes.values()))
    pitch = gap + max(tall, ceil(max(bottom for *_, bottom in boxes.values())))
    columns = min(COLUMNS, max(len(images) for images in classes.values()))
    size = (
        2 * _MARGIN + len(classes) * pitch - gap,
        3 * _MARGIN + names + columns * (wide + gap) - gap,
        3,
    )
    canvas = np.full(size, 255, np.uint8)
    for row, images in enumerate(classes.values()):
        top = _MARGIN + row * pitch
        shown = images[:columns, : channels_shown(channels)].transpose(0, 2, 3, 1)
        for column, tile in enumerate(shown.repeat(scale, axis=1).repeat(scale, axis=2)):
            left = 2 * _MARGIN + names + column * (wide + gap)
            canvas[top : top + tall, left : left + wide] = tile
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, (label, (_, above, right, below)) in enumerate(boxes.items()):
        middle = _MARGIN + row * pitch + tall / 2
        place = (_MARGIN + names - right, max(0, middle - (above + below) / 2))
        draw.text(place, str(label), fill=_INK, font=font)
    return _encode(picture)


def _encode(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, format="png")
    return file.getvalue()
