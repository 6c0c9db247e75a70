"""Which random training transforms can be done to exemplars as well, found by trying them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay.transform_paths import (
    CROPS,
    FLIPS,
    NORMALIZE,
    TO_TENSOR,
    TO_TYPE,
    Path,
    borders,
    is_random,
    name_of,
    parts_of,
    training_paths,
    type_and_size,
)
from dc_replay.transforms import Crop, Flip

RandomChanges = tuple[tuple[Flip | Crop, ...], tuple[str, ...]]
"""What training transforms do at random, in order, and the names of those that do other things."""

# What rounding may do to a value, and resizing, as a share of the range of an image.
_ROUNDING = 1e-3
_RESIZING = 2e-2
_MOST = 0.5


def random_changes(dataset: Any, size: tuple[int, int]) -> RandomChanges:
    """Find what an Avalanche dataset does to images at random when training.

    Those are the mirroring and the padded crops of torchvision's two versions, if what follows them
    gives the same, up to rounding, when it comes before them: exemplars have been through that.
    This is tried with the pixels of one image, in disorder, at the ends of what may be drawn. What
    is padded with is looked at in the same way, so that it may be normalised by any function.
    Between a crop and a ``Resize`` that follows, paddings grow as the image does.

    Args:
        dataset: The dataset, set to the transforms that are used for training. The global
            generators may be drawn from.
        size: Height and width of an image as the network sees it.

    Returns:
        The random changes, in order and in values that the network sees, and the names of what else
        it does when training and not when evaluating, conversions and ``Normalize`` apart; no
        changes where parts of the dataset differ.
    """
    tried: dict[Any, RandomChanges] = {}
    for path in training_paths(dataset):
        kinds = type_and_size(path.image)
        ways = (path.training, path.evaluation)
        key = (*(tuple(map(id, parts_of(*way))) for way in ways), type(path.image), kinds)
        if key not in tried:  # many parts of a stream are transformed alike
            tried[key] = _Chain.of(path).changes(size)
    found = set(tried.values())
    if len(found) == 1:
        return found.pop()
    names = {name for _, others in found for name in others}
    if len({changes for changes, _ in found}) > 1:
        names.add("different flips and crops to its parts")
    return (), tuple(sorted(names))


def torchvision_transform(changes: Iterable[Flip | Crop], size: tuple[int, int]) -> v2.Compose:
    """Random changes as a transform of single images, as datasets apply them.

    Args:
        changes: One or more, in order.
        size: Height and width of an image.

    Returns:
        A transform of tensors ``[channels, height, width]`` that draws from torch's global
        generator.
    """
    flips = {-1: v2.RandomHorizontalFlip, -2: v2.RandomVerticalFlip}
    return v2.Compose(
        [
            flips[change.axis](change.probability)
            if isinstance(change, Flip)
            else v2.RandomCrop(size, padding=list(change.padding), fill=list(change.fill))
            for change in changes
        ]
    )


@dataclass(frozen=True, eq=False)
class _Chain:
    """The training transforms of an image.

    Attributes:
        image: One with as much disorder as can be had.
        steps: Flips and crops, and what is done when evaluating, too, in order.
        others: The names of those that are left out.
    """

    image: Any
    steps: tuple[Any, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> _Chain:
        kept = Counter(_identity(part) for part in parts_of(*path.evaluation))
        steps, others = [], []
        for part in parts_of(*path.training):
            shared = bool(kept[_identity(part)])
            if is_random(part):
                if shared:  # Exemplars hold what it did to them.
                    kept[_identity(part)] -= 1
                elif type(part) in _MOVES:
                    steps.append(part)
                else:
                    others.append(name_of(part))
            elif shared or type(part) in (*TO_TYPE, *TO_TENSOR, *_TO_PICTURE, *NORMALIZE):
                steps.append(part)
            else:
                others.append(name_of(part))
        return cls(_disordered(path.image), tuple(steps), tuple(others))

    def changes(self, size: tuple[int, int]) -> RandomChanges:
        """Those that exemplars of a size can be given, and the names of all others."""
        found: list[Flip | Crop] = []
        others = list(self.others)
        image = self.image
        for place, step in enumerate(self.steps):
            later = [s for s in self.steps[place + 1 :] if type(s) not in _MOVES]
            try:
                if type(step) in FLIPS:
                    found += _flip(step, _Trial(image, later, size))
                elif type(step) in CROPS:
                    found += _crop(step, _Trial(image, later, size))
                else:
                    image = step(image)
            except Exception:  # of whatever a user's transform may raise of an unusual image
                if type(step) not in _MOVES:
                    left = (s for s in self.steps[place:] if type(s) in _MOVES)
                    return tuple(found), (*others, *map(name_of, left))
                others.append(name_of(step))
        return tuple(found), tuple(others)


class _Trial:
    """An image before a random change, and what comes after it.

    Attributes:
        image: The image before it.
        plain: What becomes of that if it is not changed, ``[channels, height, width]``.
    """

    def __init__(self, image: Any, later: Sequence[Any], size: tuple[int, int]) -> None:
        self.image = image
        self._later = later
        self.plain = self.after(image)
        if tuple(self.plain.shape[-2:]) != size:
            raise _CannotBeDoneError

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image before the change."""
        height, width = type_and_size(self.image)[1]
        return height, width

    def after(self, image: Any) -> Tensor:
        """What becomes of an image before the change."""
        image = copy.deepcopy(image)  # some transforms work in place
        for step in self._later:
            image = step(image)
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise _CannotBeDoneError
        return image.as_subclass(Tensor).double()

    def must_be(self, changed: Any, expected: Tensor, *, corner: int = 0) -> None:
        """Raise an error unless an image that was changed becomes what is expected.

        Resizing mixes both sides of an edge, so that only most values can then agree, and the one
        in a corner: 0 is the first row and column, -1 the last.
        """
        found = self.after(changed)
        resized = any(isinstance(step, _RESIZES) for step in self._later)
        scale = max(float(self.plain.max() - self.plain.min()), 1e-6)
        near = (found - expected).abs() <= scale * (_RESIZING if resized else _ROUNDING)
        mixed = near.double().mean() > _MOST and near[:, corner, corner].all()
        if not (mixed if resized else near.all()):
            raise _CannotBeDoneError


class _CannotBeDoneError(Exception):
    """A change that exemplars cannot be given after what they have been through."""


def _flip(step: Any, trial: _Trial) -> list[Flip | Crop]:
    axis = FLIPS[type(step)]
    if not step.p > 0:
        return []
    mirror = v2.functional.horizontal_flip if axis == -1 else v2.functional.vertical_flip
    trial.must_be(mirror(trial.image), trial.plain.flip(axis))
    return [Flip(axis, float(step.p))]


def _crop(step: Any, trial: _Trial) -> list[Flip | Crop]:
    height, width = trial.size
    left, top, right, bottom = padding = borders(step)
    if tuple(step.size) != trial.size or step.padding_mode != "constant" or min(padding) < 0:
        raise _CannotBeDoneError
    if not any(padding):
        return []

    several = isinstance(step.fill, (tuple, list))
    numbers = [float(value) for value in step.fill] if several else step.fill

    def cut(row: int, column: int, padding: tuple[int, ...]) -> Any:
        if isinstance(step, v2.RandomCrop):
            padded = v2.functional.pad(trial.image, list(padding), fill=numbers)
        else:
            padded = v1.functional.pad(trial.image, list(padding), fill=step.fill)
        return v2.functional.crop(padded, row, column, height, width)

    filled = trial.after(cut(0, 0, (width, height, width, height)))
    fill = filled[:, :1, :1]
    if not torch.isfinite(fill).all() or not torch.allclose(filled, fill.expand_as(filled)):
        raise _CannotBeDoneError
    rows, columns = trial.plain.shape[-2:]
    seen = tuple(
        round(border * new / old)
        for border, new, old in zip(
            padding, (columns, rows, columns, rows), (width, height, width, height), strict=True
        )
    )
    # Both ends of what may be drawn, so that all four borders come into sight.
    for share in (0, 1):
        changed = cut(share * (top + bottom), share * (left + right), padding)
        row, column = share * (seen[1] + seen[3]), share * (seen[0] + seen[2])
        ordered = (seen[0], seen[2], seen[1], seen[3])  # another than torchvision's
        moved = F.pad(trial.plain - fill, ordered) + fill
        trial.must_be(changed, moved[:, row : row + rows, column : column + columns], corner=-share)
    return [Crop((seen[0], seen[1], seen[2], seen[3]), tuple(fill.flatten().tolist()))]


_MOVES = (*FLIPS, *CROPS)
_TO_PICTURE = (v1.ToPILImage, v2.ToPILImage)
_RESIZES = (v1.Resize, v2.Resize)


def _identity(transform: Any) -> Any:
    """What is the same for transforms that do the same, as far as can be seen.

    Two of a class are taken for the same; functions must have the same code.
    """
    function = getattr(transform, "lambd", transform)  # that of a Lambda
    if isinstance(function, MethodType):
        return function.__func__
    if isinstance(function, FunctionType):
        code = function.__code__
        return code.co_code, code.co_consts, code.co_names
    return type(transform)


def _disordered(image: Any) -> Any:
    """An image with its pixels in another order, so that its parts do not look like one another."""
    height, width = type_and_size(image)[1]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    if isinstance(image, Tensor):
        return image.flatten(-2)[..., order].unflatten(-1, (height, width))
    array = np.asarray(image)
    mixed = array.reshape(height * width, -1)[order.numpy()].reshape(array.shape)
    if not isinstance(image, Image.Image):
        return np.ascontiguousarray(mixed)
    return Image.fromarray(mixed) if image.mode in ("L", "RGB") else image
