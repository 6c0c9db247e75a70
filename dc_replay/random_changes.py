"""Which random training transforms can be done to exemplars as well, found by trying them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from dc_replay.batch_changes import Crop, Flip
from dc_replay.dataset_transforms import (
    CROPS,
    FLIPS,
    NORMALIZE,
    NOTHING,
    TO_TENSOR,
    TO_TYPE,
    Path,
    borders,
    happening,
    is_random,
    name_of,
    parts_of,
    training_paths,
    type_and_size,
)


class RandomChanges(NamedTuple):
    """What training transforms do at random.

    Attributes:
        changes: Those that exemplars can be given, in order.
        left_out: The names of the others.
    """

    changes: tuple[Flip | Crop, ...] = ()
    left_out: tuple[str, ...] = ()


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
    Paddings grow with the image where a ``Resize`` follows, if they grow by whole pixels.

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
    names = {name for one in found for name in one.left_out}
    if len({one.changes for one in found}) > 1:
        names.add("different flips and crops to its parts")
    return RandomChanges(left_out=tuple(sorted(names)))


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
        """The chain of a path."""
        kept = Counter(_identity(part) for part in happening(*path.evaluation))
        steps, others = [], []
        for part in happening(*path.training):
            shared = bool(kept[_identity(part)])
            if is_random(part):
                if shared:  # Exemplars hold what it did to them.
                    kept[_identity(part)] -= 1
                elif type(part) in _MOVES:
                    steps.append(part)
                else:
                    others.append(name_of(part))
            elif shared or type(part) in _HARMLESS:
                steps.append(part)
            else:
                others.append(name_of(part))
        return cls(_disordered(path.image), tuple(steps), tuple(others))

    def changes(self, size: tuple[int, int]) -> RandomChanges:
        """Those that exemplars of a size can be given, and the names of all others."""
        found: list[Flip | Crop] = []
        others = list(self.others)
        if not any(type(step) in _MOVES for step in self.steps):
            return RandomChanges(left_out=self.others)
        image = self.image
        for place, step in enumerate(self.steps):
            later = [s for s in self.steps[place + 1 :] if type(s) not in _MOVES]
            try:
                if type(step) in FLIPS:
                    found += _flip(step, _Trial(image, later))
                elif type(step) in CROPS:
                    found += _crop(step, _Trial(image, later), size)
                else:
                    image = step(image)
            except Exception:  # of whatever a user's transform may raise of an unusual image
                if type(step) not in _MOVES:
                    left = (s for s in self.steps[place:] if type(s) in _MOVES)
                    return RandomChanges(tuple(found), (*others, *map(name_of, left)))
                others.append(name_of(step))
        return RandomChanges(tuple(found), tuple(others))


class _Trial:
    """An image before a random change, and what comes after it.

    Attributes:
        image: The image before it.
        plain: What becomes of that if it is not changed, ``[channels, height, width]``.
    """

    def __init__(self, image: Any, later: Sequence[Any]) -> None:
        self.image = image
        self._later = later
        self.plain = self.after(image)

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

    def is_followed_by(self, kinds: tuple[type, ...]) -> bool:
        """Whether a transform of one of these kinds comes later."""
        return any(isinstance(step, kinds) for step in self._later)

    def alike(self, found: Tensor, expected: Tensor) -> bool:
        """Whether two outcomes are the same up to rounding.

        Resizing mixes both sides of an edge, so that after it only most values can be.
        """
        resized = self.is_followed_by(_RESIZES)
        scale = max(float(self.plain.max() - self.plain.min()), 1e-6)
        near = (found - expected).abs() <= scale * (_RESIZING if resized else _ROUNDING)
        return bool(near.double().mean() > _MOST if resized else near.all())


class _CannotBeDoneError(Exception):
    """A change that exemplars cannot be given after what they have been through."""


def _flip(step: Any, trial: _Trial) -> list[Flip | Crop]:
    axis = FLIPS[type(step)]
    mirror = v2.functional.horizontal_flip if axis == -1 else v2.functional.vertical_flip
    found, expected = trial.after(mirror(trial.image)), trial.plain.flip(axis)
    # The centre of an image is one pixel off where an odd number is cut away.
    shifts = (0, 1, -1) if trial.is_followed_by(_CENTRES) else (0,)
    length = expected.shape[axis]
    for shift in shifts:
        left = length - abs(shift)
        one, other = (
            image.narrow(axis, max(by, 0), left)
            for image, by in ((found, shift), (expected, -shift))
        )
        if left and trial.alike(one, other):
            return [Flip(axis, float(step.p))]
    raise _CannotBeDoneError


def _crop(step: Any, trial: _Trial, size: tuple[int, int]) -> list[Flip | Crop]:
    height, width = trial.size
    rows, columns = trial.plain.shape[-2:]
    # Where an image is cut out of a larger one, exemplars are of another size than what it is.
    if tuple(step.size) != (height, width) or (rows, columns) != size:
        raise _CannotBeDoneError
    left, top, right, bottom = padding = borders(step)
    if not any(padding):
        return []
    if step.padding_mode != "constant":
        raise _CannotBeDoneError

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
    if not torch.allclose(filled, fill.expand_as(filled)):
        raise _CannotBeDoneError
    seen = tuple(
        round(border * new / old)
        for border, new, old in zip(
            padding, (columns, rows, columns, rows), (width, height, width, height), strict=True
        )
    )
    ordered = (seen[0], seen[2], seen[1], seen[3])  # another than torchvision's
    moved = F.pad(trial.plain - fill, ordered) + fill
    # Both ends of what may be drawn, so that all four borders come into sight.
    for share in (0, 1):
        changed = trial.after(cut(share * (top + bottom), share * (left + right), padding))
        row, column = share * (seen[1] + seen[3]), share * (seen[0] + seen[2])
        if not trial.alike(changed, moved[:, row : row + rows, column : column + columns]):
            raise _CannotBeDoneError
    return [Crop((seen[0], seen[1], seen[2], seen[3]), tuple(fill.flatten().tolist()))]


_MOVES = (*FLIPS, *CROPS)
_RESIZES = (v1.Resize, v2.Resize)
_CENTRES = (v1.CenterCrop, v2.CenterCrop)
# Done to new images alone, they make no difference that exemplars could show.
_HARMLESS = (*TO_TYPE, *TO_TENSOR, *NORMALIZE, *NOTHING, v1.ToPILImage, v2.ToPILImage)


def _identity(transform: Any) -> Any:
    """What is the same for transforms that do the same, as far as can be seen.

    Two of a class are taken for the same, also of torchvision's two versions; functions must have
    the same code.
    """
    function = getattr(transform, "lambd", transform)  # that of a Lambda
    if isinstance(function, MethodType):
        return function.__func__
    if isinstance(function, FunctionType):
        code = function.__code__
        return code.co_code, code.co_consts, code.co_names
    kind = type(transform)
    return kind.__name__ if kind.__module__.startswith("torchvision.") else kind


def _disordered(image: Any) -> Any:
    """An image with its pixels in another order, so that its parts do not look like one another.

    One of a single colour is made of other pixels. What is no image yet stays as it is.
    """
    size = type_and_size(image)[1]
    if len(size) != 2:
        return image
    height, width = size
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(height * width, generator=generator)
    if isinstance(image, Tensor):
        mixed = image.flatten(-2)[..., order].unflatten(-1, size)
        if image.numel() and image.amin() == image.amax():
            mixed = (order.view(size) % 251).expand_as(image).to(image.dtype)
        known = isinstance(image, tv_tensors.TVTensor)  # with which transforms do more
        return tv_tensors.wrap(mixed, like=image) if known else mixed
    array = np.asarray(image)
    pixels = array.reshape(height * width, -1)[order.numpy()]
    if array.size and array.min() == array.max():
        pixels = np.broadcast_to((order % 251).numpy()[:, None], pixels.shape).astype(array.dtype)
    mixed = np.ascontiguousarray(pixels.reshape(array.shape))
    if not isinstance(image, Image.Image):
        return mixed
    return Image.fromarray(mixed) if image.mode in ("L", "RGB") else image
