"""The transforms that a dataset's images pass, through whatever datasets it is nested in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

TO_TYPE = (v1.ConvertImageDtype, v2.ConvertImageDtype, v2.ToDtype)
NORMALIZE = (v1.Normalize, v2.Normalize)
TO_TENSOR = (
    v1.ToTensor,
    v2.ToTensor,
    v1.PILToTensor,
    v2.PILToTensor,
    v2.ToImage,
    v2.ToPureTensor,
)
FLIPS = {
    v1.RandomHorizontalFlip: -1,
    v2.RandomHorizontalFlip: -1,
    v1.RandomVerticalFlip: -2,
    v2.RandomVerticalFlip: -2,
}
"""The axis that each mirrors."""
CROPS = (v1.RandomCrop, v2.RandomCrop)
NOTHING = (nn.Identity, v2.Identity)

# What a dataset has that is none of torch's.
_HELD = ("_flat_data", "transform", "dataset", "datasets")

# Random ones whose names do not begin so.
_RANDOM = (
    "AugMix",
    "AutoAugment",
    "ColorJitter",
    "ElasticTransform",
    "GaussianNoise",
    "RandAugment",
    "ScaleJitter",
    "TrivialAugmentWide",
)
# Those that draw a number, and from which range; of one number they are not random.
_RANGES = {"GaussianBlur": "sigma", "JPEG": "quality"}


@dataclass(frozen=True)
class Path:
    """The way of images from the innermost dataset outwards.

    Attributes:
        image: The first image as that dataset yields it.
        inside: The transform by which the dataset itself has made it.
        training: What is applied to it when training, the first first.
        evaluation: What is applied to it when evaluating.
        labels: What is applied to its label when training and when evaluating, which may differ.
        always: What is applied in both, by datasets that are none of Avalanche's.
    """

    image: Any
    inside: Any
    training: tuple[Any, ...] = ()
    evaluation: tuple[Any, ...] = ()
    labels: tuple[tuple[Any, Any], ...] = ()
    always: tuple[Any, ...] = ()


def training_paths(dataset: Any) -> Iterator[Path]:
    """The paths by the transforms that the dataset is set to."""
    group = getattr(getattr(dataset, "_flat_data", None), "_transform_groups", None)
    return paths(dataset, getattr(group, "current_group", "train"))


def paths(dataset: Any, group: str, *, look: bool = True) -> Iterator[Path]:
    """Each way that an image may take through nested datasets, which may be no Avalanche ones.

    Args:
        dataset: The outermost.
        group: Which of Avalanche's transform groups is that of training.
        look: Whether to read an image of each path, which else has none.
    """
    dataset = getattr(dataset, "_flat_data", dataset)
    # Avalanche's transform groups have no public accessor.
    groups = [
        getattr(dataset, name)
        for name in ("_frozen_transform_groups", "_transform_groups")
        if hasattr(dataset, name)
    ]
    own = None if groups else getattr(dataset, "transform", None)
    inner: list[Any] = list(getattr(dataset, "_datasets", ()) or getattr(dataset, "datasets", ()))
    wrapped = getattr(dataset, "dataset", None)
    if not inner and (isinstance(wrapped, Dataset) or any(map(partial(hasattr, wrapped), _HELD))):
        inner = [wrapped]
    if not inner:
        item = dataset[0] if look else None
        yield Path(item[0] if isinstance(item, (tuple, list)) else item, inside=own)
        return
    training: list[Any] = [each[group] for each in groups] if groups else [own]
    evaluation: list[Any] = [each["eval"] for each in groups] if groups else [own]
    # Avalanche's benchmarks number classes anew by such a transform, which is always the same.
    labels = [
        [] if not hasattr(transform, "flat_transforms") else transform.flat_transforms(1)
        for transform in (*training, *evaluation)
    ]
    half = len(training)
    for part in inner:
        for path in paths(part, group, look=look):
            yield Path(
                path.image,
                path.inside,
                (*path.training, *training),
                (*path.evaluation, *evaluation),
                (*path.labels, *zip(labels[:half], labels[half:], strict=True)),
                (*path.always, own),
            )


def parts_of(*transforms: Any) -> Iterator[Any]:
    """The single transforms that transforms consist of, in order."""
    for transform in transforms:
        if transform is None:
            continue
        parts: Iterable[Any]
        if hasattr(transform, "flat_transforms"):
            # Avalanche's (image transform, label transform) groups: position 0 is the image's.
            parts = transform.flat_transforms(0)
        elif _is_plain(transform, v1.Compose) or _is_plain(transform, v2.Compose):
            parts = transform.transforms
        elif _is_plain(transform, nn.Sequential):
            parts = transform
        else:
            yield transform
            continue
        yield from parts_of(*parts)


def _is_plain(transform: Any, kind: type) -> bool:
    """Whether it does what this kind of composition does, as subclasses may or may not."""
    return isinstance(transform, kind) and all(
        getattr(type(transform), name, None) is getattr(kind, name, None)
        for name in ("__call__", "forward")
    )


def is_random(transform: Any) -> bool:
    """Whether a transform is one of torchvision's random ones, or is named like them."""
    name = name_of(transform)
    if name in _RANGES:
        ends = getattr(transform, _RANGES[name], None)
        return isinstance(ends, (tuple, list)) and len(set(ends)) > 1
    return name.startswith("Random") or name in _RANDOM


def happening(*transforms: Any) -> Iterator[Any]:
    """The parts of transforms, without random ones whose chance is 0."""
    for part in parts_of(*transforms):
        if not is_random(part) or getattr(part, "p", 1) != 0:
            yield part


def random_when_evaluating(dataset: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of torchvision's random transforms that a dataset applies when evaluating, too.

    Args:
        dataset: An Avalanche dataset.

    Returns:
        Those that it applies inside of itself, which Avalanche cannot leave out, and those that it
        was given as evaluation transforms.
    """
    inside: dict[str, None] = {}
    given: dict[str, None] = {}
    for path in paths(dataset, "eval", look=False):
        always = [*happening(path.inside, *path.always)]
        inside |= dict.fromkeys(name_of(part) for part in always if is_random(part))
        known = {id(part) for part in always}
        others = (part for part in happening(*path.evaluation) if id(part) not in known)
        given |= dict.fromkeys(name_of(part) for part in others if is_random(part))
    return tuple(inside), tuple(given)


def type_and_size(image: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """The type of an image's values, uint8 for pictures of bytes, and its height and width."""
    if isinstance(image, Tensor):
        return image.dtype, tuple(image.shape[-2:])
    array = np.asarray(image)
    return torch.float32 if array.dtype.kind == "f" else torch.uint8, array.shape[:2]


def borders(crop: Any) -> tuple[int, int, int, int]:
    """The padding of one of :data:`CROPS` at the left, top, right and bottom."""
    padding: Any = crop.padding or 0
    given = [padding] if isinstance(padding, int) else list(padding)
    first, second, third, fourth = given * (4 // len(given))
    # Both versions are given it in this order, but the second keeps it in another.
    second_version = isinstance(crop, v2.RandomCrop)
    return (first, third, second, fourth) if second_version else (first, second, third, fourth)


def name_of(transform: Any) -> str:
    """What a transform is called in messages."""
    return str(getattr(transform, "__name__", type(transform).__name__))


def floats(values: Iterable[float] | float) -> tuple[float, ...]:
    """The mean or deviation of a ``Normalize``, which keeps sequences, tensors or one number."""
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())
