"""Training transforms of a dataset that `resident` can do on batches as torchvision does them."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay.batch_changes import Crop, Flip, TrainingTransforms
from dc_replay.dataset_transforms import (
    CROPS,
    FLIPS,
    NORMALIZE,
    NOTHING,
    TO_TENSOR,
    TO_TYPE,
    Path,
    borders,
    floats,
    name_of,
    parts_of,
    training_paths,
    type_and_size,
)
from dc_replay.errors import ArgumentError


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
    found = {_read(path) for path in training_paths(dataset)}
    if len(found) > 1:
        raise _refusal("joins images that are transformed in different ways when training")
    return found.pop()


def _read(path: Path) -> TrainingTransforms:
    for trained_by, seen_by in path.labels:
        if trained_by != seen_by:
            raise _refusal("changes labels in another way when training than when evaluating")
    seen = _Image(path.image, "evaluating")
    seen.was_made_by(path.inside)
    for transform in path.evaluation:
        seen.pass_through(transform)
    if seen.changes:
        raise _refusal(f"applies {seen.changes[0][0]} when evaluating")
    trained = _Image(path.image, "training")
    trained.was_made_by(path.inside)
    for transform in path.training:
        trained.pass_through(transform)
    if trained.normalize != seen.normalize:
        raise _refusal(
            f"applies {_scale_name(trained.normalize)} when training, but "
            f"{_scale_name(seen.normalize)} when evaluating"
        )
    seen.check_type()
    trained.check_type()
    return trained.summary()


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
        self._dtype, self.size = type_and_size(image)

    def was_made_by(self, transform: Any) -> None:
        """Note what happened before the image was seen, the same in training and evaluation."""
        for part in parts_of(transform):
            if type(part) in NORMALIZE:
                self._normalise(part)
            elif type(part) not in (*TO_TENSOR, *TO_TYPE, *NOTHING):
                raise _refusal(f"applies {name_of(part)} inside of its own dataset")

    def pass_through(self, transform: Any) -> None:
        """Apply a transform."""
        for part in parts_of(transform):
            kind = type(part)
            if kind in TO_TENSOR:
                if self._picture and kind in _SCALING and self._dtype == torch.uint8:
                    self._dtype = torch.get_default_dtype()
                self._picture = False
            elif kind in TO_TYPE:
                self._convert(part)
            elif kind in NORMALIZE:
                self._normalise(part)
            elif kind in FLIPS:
                if part.p > 0:
                    self._change(part, Flip(FLIPS[kind], float(part.p)))
            elif kind in CROPS:
                self._crop(part)
            elif kind not in NOTHING:
                raise _refusal(f"applies {name_of(part)} when {self.when}")

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
        self.changes.append((name_of(transform), change, self.normalize is None))

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
        mean, std = floats(transform.mean), floats(transform.std)
        size = max(len(mean), len(std))
        self.normalize = (
            mean * size if len(mean) == 1 else mean,
            std * size if len(std) == 1 else std,
        )

    def _crop(self, transform: Any) -> None:
        name, size = name_of(transform), tuple(transform.size)
        if size != self.size:
            raise _refusal(
                f"applies {name} of size {size} to images of size {self.size} when {self.when}"
            )
        padding = borders(transform)
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


def _scale_name(normalize: tuple[tuple[float, ...], tuple[float, ...]] | None) -> str:
    return "no Normalize" if normalize is None else "Normalize({}, {})".format(*normalize)


def _refusal(what: str) -> ArgumentError:
    return ArgumentError(
        f"`experience` {what}, which DeviceResident cannot do on the device; pass `augment`, a "
        f"function of normalised batches and a generator in the place of the training transforms, "
        f"or None for none, or leave DeviceResident out"
    )
