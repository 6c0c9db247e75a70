"""What exemplars are augmented with when they are shown again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torchvision.transforms import v2

from dc_replay.batch_changes import Flip, value_changes
from dc_replay.errors import ArgumentError
from dc_replay.random_changes import RandomChanges, random_changes
from dc_replay.randomness import isolated

ImageAugment = Callable[[Tensor, Generator], Tensor]
"""Changes normalised images ``[batch, channels, height, width]``, keeping their shape."""

ExemplarAugment = ImageAugment | Literal["training"] | None
"""What exemplars are augmented with: ``"training"`` is what new images are mirrored and cropped by,
and None nothing."""


def augment_for(
    augment: ExemplarAugment,
    training: RandomChanges,
    *,
    channels: int,
    device: torch.device,
) -> ImageAugment | None:
    """The function by which exemplars are augmented beside images of a dataset.

    They come from the evaluation transforms, so that new images alone would be augmented.

    Args:
        augment: What was asked for; anything but ``"training"`` is returned as it is.
        training: What :func:`training_changes` finds in the dataset; a warning names what is left
            out. Not used for anything else.
        channels: Of the exemplars.
        device: Where they are.
    """
    if augment is None or callable(augment):
        return augment
    warn_of(
        training.left_out,
        "a function of a batch of normalised images and a generator such as "
        "augmentation('color', 'crop', 'flip')",
    )
    return value_changes(training.changes, channels=channels, device=device)


def training_changes(
    dataset: Any, image_shape: tuple[int, ...], *, device: torch.device, generator: Generator
) -> RandomChanges:
    """What exemplars get of a dataset's training transforms.

    Args:
        dataset: Set to the transforms that are used for training.
        image_shape: ``(channels, height, width)`` of the exemplars.
        device: Whose global generators are seeded while the dataset is looked into.
        generator: Seeds them; they are then as they were.

    Returns:
        The random changes that exemplars get, and the names of those that they do not get.
    """
    channels, height, width = image_shape
    with isolated(generator, device):
        found = random_changes(dataset, (height, width))
    fitting = tuple(c for c in found.changes if isinstance(c, Flip) or len(c.fill) == channels)
    if len(fitting) == len(found.changes):
        return found
    # The others were done to images of other channels.
    return RandomChanges(fitting, (*found.left_out, "RandomCrop"))


def warn_of(left_out: Sequence[str], instead: str) -> None:
    """Name the training transforms that exemplars do not get, if any, and what may be passed."""
    if left_out:
        warnings.warn(
            f"the experience applies {', '.join(left_out)} when training, which exemplars do not "
            f"get when they are replayed; pass `augment`, {instead}, or None for none",
            stacklevel=3,
        )


def check_exemplar_augment(augment: object) -> None:
    """Raise an ArgumentError unless it is an :data:`ExemplarAugment`.

    That is unless it can be called with two arguments, or is ``"training"`` or None.
    """
    if augment is None or (isinstance(augment, str) and augment == "training"):
        return
    if not callable(augment):
        raise ArgumentError(
            f"`augment` is {augment!r}, which cannot be called; pass a function of a batch of "
            f"images and a generator, 'training' or None"
        )
    # Those of version 2 take any number of arguments, and would transform the generator.
    if isinstance(augment, v2.Transform) or not _takes(augment, 2):
        raise ArgumentError(
            f"`augment` is {augment!r}, which does not take a batch of images and a generator; "
            f"pass augmentation('crop', 'flip'), or for a transform t, which draws from torch's "
            f"global generator, lambda images, generator: t(images)"
        )


def check_transform(augment: object) -> None:
    """Raise an ArgumentError unless it is a transform of one image, ``"training"`` or None."""
    if augment is None or (isinstance(augment, str) and augment == "training"):
        return
    # A class could be called as well, and would give a transform in place of an image.
    if isinstance(augment, type) or not callable(augment) or not _takes(augment, 1):
        raise ArgumentError(
            f"`augment` is {augment!r}, which does not change an image; pass a transform such as "
            f"torchvision's RandomHorizontalFlip(), 'training' or None"
        )


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many arguments; a module says so of its ``forward``."""
    try:
        inspect.signature(getattr(function, "forward", function)).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some that are written in C do not say
        return True
    return True
