"""The images of an experience, as an experience's own evaluation sees them."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from dc_replay.dataset_transforms import (
    NORMALIZE,
    Path,
    floats,
    parts_of,
    paths,
    random_when_evaluating,
)
from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization, check_normalization, quantise
from dc_replay.placement import Resident, home
from dc_replay.randomness import isolated

_CHUNK = 256
_HALF_STEP = 0.5 / 255
# Resizing overshoots a little; a wrong normalization misses by far.
_FEW = 0.05
_FAR = 0.5


@dataclass(frozen=True)
class Items:
    """The form of an experience's items, which those of a memory must share to be mixed with them.

    Attributes:
        dtype: The type of images.
        with_tasks: Whether they carry a task label.
        tensor_labels: Whether they carry their class label as a tensor.
    """

    dtype: torch.dtype = torch.float32
    with_tasks: bool = False
    tensor_labels: bool = False


@dataclass(frozen=True, eq=False)
class ExperienceImages:
    """The images of one experience, ready to be condensed.

    Attributes:
        pixels: uint8 ``[count, channels, height, width]``.
        labels: int64 ``[count]``, on the device that was asked for.
        normalization: The map from the pixels' ``[0, 1]`` to what the network sees.
        tasks: The task label of each class; None where items carry no task label.
        items: The form in which the experience yields them.
    """

    pixels: Tensor
    labels: Tensor
    normalization: Normalization
    tasks: dict[int, int] | None
    items: Items


def gather(
    experience: Any,
    *,
    device: torch.device | str,
    generator: Generator,
    normalization: Normalization | None = None,
    resident: Resident = True,
) -> ExperienceImages:
    """Bring an experience's images to a device as uint8, without random training transforms.

    Items come from ``experience.dataset.eval()``, one after the other in this process, so no loader
    draws from a global generator; transforms that do, find their state restored. Where no
    normalization is given, it is that of the last ``Normalize`` of the evaluation transforms if the
    images then lie in ``[0, 1]``. Without one, images in ``[0, 1]`` stay as they are, uint8 images
    use the range 0 to 255, and others the range of each channel, which takes a second pass.

    Args:
        experience: An experience whose ``dataset`` yields ``(image, label)`` or, with task labels,
            ``(image, label, task label)``; images ``[channels, height, width]``.
        device: Where to put the images.
        generator: Seeds torch's global generators for transforms that use them.
        normalization: The map to invert; None finds it as above.
        resident: Whether the images stay on the device, see :func:`~dc_replay.placement.home`; else
            they are computed there and go to the host's memory.

    Raises:
        ArgumentError: If there are no images, items are of another form, images are NaN, infinite,
            of several shapes or outside of what ``normalization`` can invert, labels are no
            integers, or a class comes with several task labels.
    """
    check_normalization(normalization)
    dataset = _evaluation_view(experience)
    device = torch.device(device)
    with isolated(generator, device), torch.no_grad():
        reader = _Reader(dataset, device, resident)
        _warn_of_random(dataset)
        if normalization is not None:
            given = reader.read(normalization)
            _check_given(given)
            return given.images
        channels = len(reader.first)
        found = find_normalize(dataset, channels)
        guess = reader.read(found or Normalization.identity(channels))
        if guess.clipped == 0 or (found is not None and guess.mild):
            if guess.clipped:
                _warn(guess)
            return guess.images
        if reader.first.dtype == torch.uint8:
            low, high = [0.0] * channels, [255.0] * channels
        else:
            low, high = guess.low.tolist(), guess.high.tolist()
        return reader.read(Normalization.from_range(low, high)).images


def glance(
    experience: Any, *, device: torch.device | str, generator: Generator
) -> tuple[Tensor, dict[int, int], Items]:
    """An experience's first image as :func:`gather` reads it, and the task label of each class.

    Args:
        experience: As :func:`gather` takes it.
        device: Where the images are to go.
        generator: As for :func:`gather`.

    Returns:
        The image ``[channels, height, width]`` as the evaluation transforms leave it, task labels
        where the item carries one and the dataset lists them, and the form of the item.

    Raises:
        ArgumentError: If there is no item, it is of another form, or a class comes with several
            task labels.
    """
    dataset = _evaluation_view(experience)
    with isolated(generator, torch.device(device)), torch.no_grad():
        reader = _Reader(dataset, torch.device(device), resident=True)
    tasks: dict[int, int] = {}
    if reader.items.with_tasks and _lists(dataset, reader.label(0)):
        listed = (getattr(dataset, name, ()) for name in ("targets", "targets_task_labels"))
        for label, task in set(zip(*listed, strict=False)):
            _note_task(tasks, int(label), int(task))
    return reader.first, tasks, reader.items


def classes_of(experience: Any) -> set[int]:
    """The class labels of an experience, which not every benchmark lists.

    Target transforms may give items other labels than are listed; an item of each class is read.

    Raises:
        ArgumentError: If neither the experience nor its dataset says.
    """
    dataset: Any = getattr(experience, "dataset", None)
    if callable(getattr(dataset, "eval", None)) and len(dataset):
        with isolated(Generator().manual_seed(0), torch.device("cpu")), torch.no_grad():
            carried = _carried_labels(dataset.eval())
        if carried is not None:
            return carried
    listed = getattr(experience, "classes_in_this_experience", None)
    if listed is None:
        targets = getattr(dataset, "targets", None)
        if targets is None:
            raise ArgumentError(
                "`experience` has neither classes_in_this_experience nor a dataset with targets; "
                "wrap its data by as_classification_dataset from avalanche.benchmarks.utils"
            )
        listed = targets.uniques if hasattr(targets, "uniques") else targets
    return {int(label) for label in listed}


def find_normalize(dataset: Any, channels: int) -> Normalization | None:
    """The last torchvision ``Normalize`` that a dataset applies to images when evaluating.

    Looks into Avalanche's transform groups, ``Compose`` of both versions, and the datasets inside.

    Returns:
        None where there is none for this number of channels, or parts of the dataset differ.
    """
    found = {_last_normalize(path) for path in paths(dataset, "eval", look=False)}
    if len(found) != 1:
        return None
    parameters = found.pop()
    if parameters is None:
        return None
    mean, std = (v * channels if len(v) == 1 else v for v in parameters)
    return Normalization(mean, std) if len(mean) == len(std) == channels else None


def _last_normalize(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the last ``Normalize`` on the way of an image."""
    found = None
    for part in parts_of(path.inside, *path.evaluation):
        if isinstance(part, NORMALIZE):
            found = floats(part.mean), floats(part.std)
    return found


class _Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class _Reading:
    images: ExperienceImages
    low: Tensor
    high: Tensor
    least: float
    most: float
    clipped: float

    @property
    def mild(self) -> bool:
        return self.clipped <= _FEW and self.least >= -_FAR and self.most <= 1 + _FAR


class _Reader:
    def __init__(self, dataset: _Dataset, device: torch.device, resident: Resident) -> None:
        self.dataset = dataset
        self.device = device
        self._zeroth: Any = dataset[0]
        item = self._item(0)
        self.first = self._image(0, item[0])
        self.items = Items(self.first.dtype, len(item) == 3, isinstance(item[1], Tensor))
        self.home = home(resident, len(dataset) * self.first.numel(), device=device)

    def read(self, normalization: Normalization) -> _Reading:
        pixels: list[Tensor] = []
        labels: list[int] = []
        tasks: dict[int, int] = {}
        lows, highs, bounds, clipped, values = [], [], [], 0, 0
        for start in range(0, len(self.dataset), _CHUNK):
            chunk = []
            for index in range(start, min(start + _CHUNK, len(self.dataset))):
                item = self._item(index)
                chunk.append(self._image(index, item[0]))
                label = self.label(index, item)
                labels.append(label)
                if len(item) == 3:
                    _note_task(tasks, label, _whole("task label", index, item[2]))
            images = torch.stack(chunk).to(self.device, torch.float32)
            finite = images.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                raise ArgumentError(
                    f"`experience` holds NaN or infinite pixels in image "
                    f"{start + int(finite.logical_not().nonzero()[0, 0])}; remove the image, or "
                    f"mend the evaluation transforms"
                )
            lows.append(images.amin(dim=(0, 2, 3)))
            highs.append(images.amax(dim=(0, 2, 3)))
            images = normalization.invert(images)
            outside = (images < -_HALF_STEP) | (images > 1 + _HALF_STEP)
            clipped, values = clipped + int(outside.sum()), values + images.numel()
            bounds += [images.amin(), images.amax()]
            pixels.append(quantise(images).to(self.home))
        gathered = ExperienceImages(
            torch.cat(pixels),
            torch.tensor(labels, device=self.device),
            normalization,
            tasks if self.items.with_tasks else None,
            self.items,
        )
        extremes = torch.stack(bounds)
        return _Reading(
            gathered,
            low=torch.stack(lows).amin(dim=0),
            high=torch.stack(highs).amax(dim=0),
            least=float(extremes.min()),
            most=float(extremes.max()),
            clipped=clipped / values,
        )

    def label(self, index: int, item: Sequence[Any] | None = None) -> int:
        return _whole("label", index, (self._item(index) if item is None else item)[1])

    def _item(self, index: int) -> Sequence[Any]:
        # Held because the number of channels must be known before the pass begins.
        item = self.dataset[index] if index else self._zeroth
        expected = 3 if hasattr(self.dataset, "targets_task_labels") else 2
        if not isinstance(item, (tuple, list)) or len(item) not in (2, expected):
            raise ArgumentError(
                f"`experience` yields {_describe(item)} as item {index}, but replay needs (image, "
                f"label), or (image, label, task label) where the dataset has targets_task_labels; "
                f"use a classification benchmark without further values"
            )
        return item

    def _image(self, index: int, image: Any) -> Tensor:
        if not isinstance(image, Tensor):
            raise ArgumentError(
                f"`experience` yields a {type(image).__name__} as image {index}, but replay needs "
                f"a tensor [channels, height, width]; end the evaluation transforms with ToTensor()"
            )
        usable = image.is_floating_point() or image.dtype == torch.uint8
        usable = usable and image.layout == torch.strided and not image.is_meta
        if image.ndim != 3 or not image.numel() or not usable:
            raise ArgumentError(
                f"`experience` yields a {image.dtype} tensor of shape {list(image.shape)} as image "
                f"{index}, but an image is floating point or uint8 of shape [channels, height, "
                f"width]; only images can be condensed"
            )
        first = getattr(self, "first", image)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ArgumentError(
                f"`experience` holds images of different shapes or types: image 0 is {first.dtype} "
                f"{list(first.shape)}, image {index} is {image.dtype} {list(image.shape)}; resize "
                f"them in the evaluation transforms"
            )
        return image


def _evaluation_view(experience: Any) -> _Dataset:
    dataset = getattr(experience, "dataset", None)
    if dataset is None or not callable(getattr(dataset, "eval", None)):
        raise ArgumentError(
            f"`experience` is a {type(experience).__name__} without an Avalanche dataset; pass an "
            f"experience of a benchmark's train stream"
        )
    if not len(dataset):
        raise ArgumentError(
            "`experience` holds no images; leave empty experiences out of the stream"
        )
    view: _Dataset = dataset.eval()
    return view


def _warn_of_random(dataset: Any) -> None:
    inside, given = random_when_evaluating(dataset)
    if inside:
        warnings.warn(
            f"the experience's own dataset applies {', '.join(inside)} to every image that is read "
            f"from it, so that exemplars hold what that left of them; make the dataset without it, "
            f"and pass it to Avalanche as training transform (train_transform=, or the group "
            f"'train' of transform_groups)",
            stacklevel=3,
        )
    if given:
        warnings.warn(
            f"the experience applies {', '.join(given)} when evaluating, too, so that exemplars "
            f"hold what that left of them; pass evaluation transforms without it (eval_transform=, "
            f"or the group 'eval' of transform_groups, which is 'train' where there is none)",
            stacklevel=3,
        )


def _carried_labels(dataset: Any) -> set[int] | None:
    """The labels that an item of each listed class carries; None where they are not like that."""
    try:
        listed = {int(label): place for place, label in enumerate(dataset.targets)}
        return {operator.index(dataset[place][1]) for place in listed.values()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _lists(dataset: Any, label: int) -> bool:
    """Whether a dataset lists the labels that its items carry, which transforms may change."""
    try:
        return int(dataset.targets[0]) == label
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def _note_task(tasks: dict[int, int], label: int, task: int) -> None:
    if tasks.setdefault(label, task) != task:
        raise ArgumentError(several_tasks(label, tasks[label], task))


def several_tasks(label: int, known: int, other: int) -> str:
    """Say that a class has two task labels."""
    return (
        f"`experience` holds class {label} with task label {other}, but it has come with task "
        f"label {known} before, and a memory tells classes apart by their label alone; give every "
        f"class a label of its own and one task label (in Avalanche's generators, "
        f"class_ids_from_zero_in_each_exp=False)"
    )


def _whole(what: str, index: int, value: Any) -> int:
    try:
        number = operator.index(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError
        return number
    except (TypeError, ValueError):
        raise ArgumentError(
            f"`experience` yields {_describe(value)} as the {what} of item {index}, but it must be "
            f"a single integer; convert it in the target transform"
        ) from None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return f"{value!r} ({type(value).__name__})"


def check_range(image: Tensor, normalization: Normalization) -> None:
    """Refuse an experience as :func:`gather` would, as far as one of its images tells.

    Args:
        image: ``[channels, height, width]`` as the evaluation transforms leave it.
        normalization: The map that is to be inverted.

    Raises:
        ArgumentError: If it is not the map that the image was normalised by.
    """
    inverted = normalization.invert(image[None].cpu().float())
    least, most = float(inverted.amin()), float(inverted.amax())
    if least < -_FAR or most > 1 + _FAR:
        raise _other_scale(normalization, least, most)


def _check_given(reading: _Reading) -> None:
    if not reading.clipped:
        return
    if not reading.mild:
        raise _other_scale(reading.images.normalization, reading.least, reading.most)
    _warn(reading)


def _other_scale(normalization: Normalization, least: float, most: float) -> ArgumentError:
    return ArgumentError(
        f"`normalization`, given or found in the first experience, has mean {normalization.mean} "
        f"and std {normalization.std}, but inverting it leaves the images between {least:.4g} and "
        f"{most:.4g} instead of within [0, 1]; normalise all experiences alike in the evaluation "
        f"transforms, and pass the mean and std of that, or Normalization.from_range(low, high) "
        f"with the range of all data to come"
    )


def _warn(reading: _Reading) -> None:
    warnings.warn(
        f"{reading.clipped:.2%} of the experience's pixel values lie outside of the range that "
        f"the memory stores, {reading.least:.4g} to {reading.most:.4g} instead of 0 to 1, and were "
        f"clipped; a normalization made by Normalization.from_range with a wider range keeps them",
        stacklevel=2,
    )
