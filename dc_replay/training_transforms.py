"""What a dataset does to images when training, found among torchvision's transforms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay.errors import ArgumentError
from dc_replay.transforms import Crop, Flip, TrainingTransforms

RandomChanges = tuple[tuple[Flip | Crop, ...], tuple[str, ...]]
"""What training transforms do at random, in order, and the names of those that do other things."""


def training_transforms(dataset: Any) -> TrainingTransforms:
    """Find what an Avalanche dataset does to images when training and not when evaluating.

    It may convert images, normalise them once, mirror them, and cut them out of themselves padded
    with a constant, by the transforms of torchvision's two versions. When evaluating it may convert
    and normalise. What the datasets inside do without an attribute ``transform``, they do always.

    Args:
        dataset: The dataset, set to the transforms that are used for training.

    Raises:
        ArgumentError: If it does anything else, normalises or changes labels differently when
            evaluating, yields no floating-point images, or its parts differ.
    """
    found = {path.read() for path in _training_paths(dataset)}
    if len(found) > 1:
        raise _refusal("joins images that are transformed in different ways when training")
    return found.pop()


def random_changes(dataset: Any, size: tuple[int, int]) -> RandomChanges:
    """Find what an Avalanche dataset does to images at random when training.

    Those are the mirroring and the padded crops of torchvision's two versions. What else it does
    when training and not when evaluating is named, conversions and ``Normalize`` apart.

    Args:
        dataset: The dataset, set to the transforms that are used for training.
        size: Height and width of an image as the network sees it.

    Returns:
        The random changes, in order and in values that the network sees, and the names of other
        transforms; no changes where parts of the dataset differ.
    """
    found = {path.random(size) for path in _training_paths(dataset)}
    if len(found) == 1:
        return found.pop()
    names = {name for _, others in found for name in others}
    if len({changes for changes, _ in found}) > 1:
        names.add("different flips and crops to its parts")
    return (), tuple(sorted(names))


def random_inside(dataset: Any) -> tuple[str, ...]:
    """Names of torchvision's random transforms that a dataset applies inside of itself, always.

    Args:
        dataset: An Avalanche dataset, which can leave out only transforms that it was given.
    """
    paths = _paths(dataset, "eval", look=False)
    inside = (transform for path in paths for transform in (path.inside, *path.always))
    parts = (part for transform in inside for part in _parts(transform))
    names = (_name(part) for part in parts if isinstance(part, (nn.Module, v2.Transform)))
    return tuple(dict.fromkeys(n for n in names if n.startswith("Random") or n in _RANDOM))


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


@dataclass(frozen=True)
class _Path:
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

    def read(self) -> TrainingTransforms:
        for trained_by, seen_by in self.labels:
            if trained_by != seen_by:
                raise _refusal("changes labels in another way when training than when evaluating")
        seen = _Image(self.image, "evaluating")
        seen.was_made_by(self.inside)
        for transform in self.evaluation:
            seen.pass_through(transform)
        if seen.changes:
            raise _refusal(f"applies {seen.changes[0][0]} when evaluating")
        trained = _Image(self.image, "training")
        trained.was_made_by(self.inside)
        for transform in self.training:
            trained.pass_through(transform)
        if trained.normalize != seen.normalize:
            raise _refusal(
                f"applies {_scale_name(trained.normalize)} when training, but "
                f"{_scale_name(seen.normalize)} when evaluating"
            )
        seen.check_type()
        trained.check_type()
        return trained.summary()

    def random(self, size: tuple[int, int]) -> RandomChanges:
        """What is done at random to images that are of this size in the end, and other things."""
        kept = {type(part) for transform in self.evaluation for part in _parts(transform)}
        always = {id(part) for transform in self.always for part in _parts(transform)}
        image, others = _Image(self.image, "training"), []
        for part in (part for transform in self.training for part in _parts(transform)):
            kind = type(part)
            if kind in (*_FLIPS, *_CROPS) and id(part) in always:
                continue  # Exemplars hold what it did to them.
            if kind in _TO_PICTURE:
                image.become_picture()
            elif kind in _RESIZING and kind in kept:
                image.size = _resized(part, image.size)
            else:
                try:
                    image.pass_through(part)
                except ArgumentError:
                    if kind not in (*kept, *_TO_TYPE, *_NORMALIZE):
                        others.append(_name(part))
        changes = image.values()
        if image.size != size:  # by what is not known here; where a crop came is not, either
            others += [name for name, change, _ in image.changes if isinstance(change, Crop)]
            changes = tuple(change for change in changes if isinstance(change, Flip))
        return changes, tuple(others)


class _Image:
    """What becomes of an image in a chain of transforms.

    Attributes:
        changes: The random changes so far, with their names and whether they came before the image
            was normalised. Crops are filled with values of that moment.
        normalize: Mean and deviation of the ``Normalize`` so far.
        size: Height and width.
    """

    def __init__(self, image: Any, when: str) -> None:
        self.when = when
        self.changes: list[tuple[str, Flip | Crop, bool]] = []
        self.normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
        self._picture = not isinstance(image, Tensor)
        self._dtype, self.size = _type_and_size(image)

    def was_made_by(self, transform: Any) -> None:
        """Note what happened before the image was seen, the same in training and evaluation."""
        for part in _parts(transform):
            if type(part) in _NORMALIZE:
                self._normalise(part)
            elif type(part) not in (*_TO_TENSOR, *_TO_TYPE, *_NOTHING):
                raise _refusal(f"applies {_name(part)} inside of its own dataset")

    def pass_through(self, transform: Any) -> None:
        """Apply a transform."""
        for part in _parts(transform):
            kind = type(part)
            if kind in _TO_TENSOR:
                if self._picture and kind in _SCALING and self._dtype == torch.uint8:
                    self._dtype = torch.get_default_dtype()
                self._picture = False
            elif kind in _TO_TYPE:
                self._convert(part)
            elif kind in _NORMALIZE:
                self._normalise(part)
            elif kind in _FLIPS:
                if part.p > 0:
                    self._change(part, Flip(_FLIPS[kind], float(part.p)))
            elif kind in _CROPS:
                self._crop(part)
            elif kind not in _NOTHING:
                raise _refusal(f"applies {_name(part)} when {self.when}")

    def become_picture(self) -> None:
        """Note that it is a picture again, of bytes if it is one of numbers."""
        self._picture, self._dtype = True, torch.uint8

    def values(self) -> tuple[Flip | Crop, ...]:
        """The changes in values that the network sees, also where those are bytes to the end."""
        changes = self.summary().changes
        if self._dtype.is_floating_point:
            return changes
        return tuple(
            replace(c, fill=tuple(255 * value for value in c.fill)) if isinstance(c, Crop) else c
            for c in changes
        )

    def check_type(self) -> None:
        """Raise an ArgumentError unless the image is one that a network takes."""
        if self._picture or not self._dtype.is_floating_point:
            found = "a picture" if self._picture else f"a {self._dtype} tensor"
            raise ArgumentError(
                f"`experience` yields {found} when {self.when}, but DeviceResident serves "
                f"floating-point images; end the transforms with ToTensor(), or with "
                f"ToDtype(torch.float32, scale=True) where images are tensors"
            )

    def summary(self) -> TrainingTransforms:
        """The changes, those before ``Normalize`` filled with what it makes of their values."""
        changes = []
        for _, change, before in self.changes:
            if before and self.normalize is not None and isinstance(change, Crop):
                numbers = (change.fill, *self.normalize)
                count = max(map(len, numbers))
                channels = zip(*(n * count if len(n) == 1 else n for n in numbers), strict=True)
                fill = ((value - mean) / std for value, mean, std in channels)
                change = Crop(change.padding, tuple(fill))
            changes.append(change)
        return TrainingTransforms(tuple(changes), self._dtype)

    def _change(self, transform: Any, change: Flip | Crop) -> None:
        self.changes.append((_name(transform), change, self.normalize is None))

    def _convert(self, transform: Any) -> None:
        if self._picture:
            return  # Pictures pass unchanged.
        new, scaled = transform.dtype, getattr(transform, "scale", True)
        usual = isinstance(new, torch.dtype) and new.is_floating_point
        if new != self._dtype and not (usual and (scaled or self._dtype.is_floating_point)):
            raise _refusal(
                f"converts {self._dtype} images to {new}{'' if scaled else ' without scaling'} "
                f"when {self.when}"
            )
        self._dtype = new

    def _normalise(self, transform: Any) -> None:
        if self.normalize is not None:
            raise _refusal(f"applies Normalize twice when {self.when}")
        mean, std = _floats(transform.mean), _floats(transform.std)
        size = max(len(mean), len(std))
        self.normalize = (
            mean * size if len(mean) == 1 else mean,
            std * size if len(std) == 1 else std,
        )

    def _crop(self, transform: Any) -> None:
        name, size = _name(transform), tuple(transform.size)
        if size != self.size:
            raise _refusal(
                f"applies {name} of size {size} to images of size {self.size} when {self.when}"
            )
        padding = _borders(transform)
        if not any(padding):
            return
        if transform.padding_mode != "constant":
            raise _refusal(f"applies {name} with {transform.padding_mode} padding")
        if min(padding) < 0:
            raise _refusal(f"applies {name} with a negative padding")
        fill = transform.fill
        values = fill if isinstance(fill, (tuple, list)) else [fill]
        if not values or not all(isinstance(v, Real) and not isinstance(v, bool) for v in values):
            raise _refusal(f"applies {name} with `fill` {fill!r}, which is no number for a channel")
        scale = 255 if self._dtype == torch.uint8 else 1
        self._change(transform, Crop(padding, tuple(float(value) / scale for value in values)))


_SCALING = (v1.ToTensor, v2.ToTensor)
_TO_TENSOR = (*_SCALING, v1.PILToTensor, v2.PILToTensor, v2.ToImage, v2.ToPureTensor)
_TO_TYPE = (v1.ConvertImageDtype, v2.ConvertImageDtype, v2.ToDtype)
_NORMALIZE = (v1.Normalize, v2.Normalize)
_NOTHING = (nn.Identity, v2.Identity)
_FLIPS = {
    v1.RandomHorizontalFlip: -1,
    v2.RandomHorizontalFlip: -1,
    v1.RandomVerticalFlip: -2,
    v2.RandomVerticalFlip: -2,
}
_CROPS = (v1.RandomCrop, v2.RandomCrop)
_TO_PICTURE = (v1.ToPILImage, v2.ToPILImage)
_RESIZING = (v1.Resize, v2.Resize, v1.CenterCrop, v2.CenterCrop)
# Those whose names do not begin so.
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


def _training_paths(dataset: Any) -> Iterator[_Path]:
    """By the transforms that the dataset is set to."""
    group = getattr(getattr(dataset, "_flat_data", None), "_transform_groups", None)
    return _paths(dataset, getattr(group, "current_group", "train"))


def _paths(dataset: Any, group: str, *, look: bool = True) -> Iterator[_Path]:
    """Each way that an image may take through nested datasets, which may be no Avalanche ones.

    Without ``look`` no image is read, and paths have none.
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
    if not inner and (isinstance(wrapped, Dataset) or hasattr(wrapped, "_flat_data")):
        inner = [wrapped]
    if not inner:
        item = dataset[0] if look else None
        yield _Path(item[0] if isinstance(item, (tuple, list)) else item, inside=own)
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
        for path in _paths(part, group, look=look):
            yield _Path(
                path.image,
                path.inside,
                (*path.training, *training),
                (*path.evaluation, *evaluation),
                (*path.labels, *zip(labels[:half], labels[half:], strict=True)),
                (*path.always, own),
            )


def _parts(transform: Any) -> Iterator[Any]:
    """The single transforms that a transform consists of."""
    if transform is None:
        return
    parts: Iterable[Any]
    if hasattr(transform, "flat_transforms"):
        # Avalanche's (image transform, label transform) groups: position 0 is the image's.
        parts = transform.flat_transforms(0)
    elif type(transform) in (v1.Compose, v2.Compose):
        parts = transform.transforms
    elif type(transform) is nn.Sequential:
        parts = transform
    else:
        yield transform
        return
    for part in parts:
        yield from _parts(part)


def _type_and_size(image: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """The type of an image's values, uint8 for pictures of bytes, and its height and width."""
    if isinstance(image, Tensor):
        return image.dtype, tuple(image.shape[-2:])
    array = np.asarray(image)
    return torch.float32 if array.dtype.kind == "f" else torch.uint8, array.shape[:2]


def _resized(transform: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width after a ``Resize`` or ``CenterCrop``."""
    given = transform.size
    sides = [given] if isinstance(given, int) else list(given or ())
    if len(sides) == 2:
        return tuple(sides)
    square = len(set(size)) == 1 or isinstance(transform, (v1.CenterCrop, v2.CenterCrop))
    return tuple(sides * 2) if len(sides) == 1 and square else ()  # not known


def _borders(transform: Any) -> tuple[int, int, int, int]:
    """The padding of a crop at the left, top, right and bottom."""
    padding: Any = transform.padding or 0
    given = [padding] if isinstance(padding, int) else list(padding)
    first, second, third, fourth = given * (4 // len(given))
    # Both versions are given it in this order, but the second keeps it in another.
    second_version = isinstance(transform, v2.RandomCrop)
    return (first, third, second, fourth) if second_version else (first, second, third, fourth)


def _floats(values: Sequence[float] | float) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


def _scale_name(normalize: tuple[tuple[float, ...], tuple[float, ...]] | None) -> str:
    return "no Normalize" if normalize is None else "Normalize({}, {})".format(*normalize)


def _name(transform: Any) -> str:
    return str(getattr(transform, "__name__", type(transform).__name__))


def _refusal(what: str) -> ArgumentError:
    return ArgumentError(
        f"`experience` {what}, which DeviceResident cannot do on the device; pass `augment`, which "
        f"changes normalised batches in the place of the training transforms (lambda images, "
        f"generator: images changes nothing), or leave DeviceResident out"
    )
