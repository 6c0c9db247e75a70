"""Differentiable Siamese augmentation: the same random change for real and synthetic images.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021.

Everything here takes and returns *normalised* images ``[batch, channels, height, width]`` and is
differentiable in them. Numbers are drawn first, from a generator and on its device; what is done
with them is a pure function of tensors, which a compiler can take together with what comes after
and which one call can apply to many classes at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dc_replay._checks import check_number
from dc_replay.errors import ArgumentError
from dc_replay.placement import brought


class Operation(Protocol):
    """One random change, made by numbers that were drawn for each image, or once for all."""

    @property
    def uniforms(self) -> int:
        """How many numbers from ``[0, 1)`` a draw takes."""
        ...

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return changed images; ``drawn`` is ``[1 or batch, uniforms]``."""
        ...


def _numbers(drawn: Tensor, images: Tensor) -> list[Tensor]:
    """Each number of a draw as a column ``[1 or batch, 1, 1, 1]`` of the images' type."""
    return list(drawn.to(images.dtype)[:, :, None, None, None].unbind(1))


@dataclass(frozen=True)
class Flip:
    """Mirror left and right.

    Attributes:
        probability: Chance of mirroring.

    Raises:
        ArgumentError: If the number is out of its range.
    """

    probability: float = 0.5
    uniforms: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("probability", self.probability, 0, 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the change."""
        (chance,) = _numbers(drawn, images)
        return torch.where(chance < self.probability, images.flip(-1), images)


@dataclass(frozen=True)
class Color:
    """Change brightness, then saturation, then contrast.

    Attributes:
        brightness: Width of the interval, centred on 0, that is added.
        saturation: Largest factor on the distance from the mean over channels.
        contrast: Width of the interval, centred on 1, of the factor on the distance from the
            mean over the whole image.

    Raises:
        ArgumentError: If a number is out of its range.
    """

    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 1.0
    uniforms: ClassVar[int] = 3

    def __post_init__(self) -> None:
        for name in ("brightness", "saturation", "contrast"):
            check_number(name, getattr(self, name))

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the change."""
        added, saturated, contrasted = _numbers(drawn, images)
        images = images + (added - 0.5) * self.brightness
        if images.shape[1] > 1:
            mean = images.mean(dim=1, keepdim=True)
            images = (images - mean) * (saturated * self.saturation) + mean
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return (images - mean) * ((contrasted - 0.5) * self.contrast + 1) + mean


@dataclass(frozen=True)
class Crop:
    """Shift by whole pixels, filling with zeros.

    Attributes:
        ratio: Largest shift as a share of the side.

    Raises:
        ArgumentError: If the number is out of its range.
    """

    ratio: float = 0.125
    uniforms: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0, 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the change."""
        positions = []
        for side, number in zip(images.shape[-2:], drawn.to(images.dtype).unbind(1), strict=True):
            reach = round(side * self.ratio)
            shift = torch.floor(number * (2 * reach + 1)) - reach
            positions.append(_range(side, images) + shift[:, None])
        return _resample(images, *positions)


@dataclass(frozen=True)
class Scale:
    """Enlarge or shrink each axis on its own about the centre, filling with zeros.

    Attributes:
        ratio: The factor of an axis lies in ``[1 / ratio, ratio]``.

    Raises:
        ArgumentError: If the number is out of its range.
    """

    ratio: float = 1.2
    uniforms: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the change."""
        positions = []
        across, down = drawn.to(images.dtype).unbind(1)
        for side, number in zip(images.shape[-2:], (down, across), strict=True):
            factor = number * (self.ratio - 1 / self.ratio) + 1 / self.ratio
            middle = (side - 1) / 2
            positions.append((_range(side, images) - middle) * factor[:, None] + middle)
        return _resample(images, *positions)


@dataclass(frozen=True)
class Rotate:
    """Turn about the centre, filling with zeros.

    Attributes:
        degrees: Largest angle either way.

    Raises:
        ArgumentError: If the number is out of its range.
    """

    degrees: float = 15.0
    uniforms: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("degrees", self.degrees)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the change."""
        turn = drawn.to(images.dtype)[:, 0] * 2 - 1
        angle = turn * (self.degrees * math.pi / 180)
        height, width = images.shape[-2:]
        cosine, sine = torch.cos(angle), torch.sin(angle)
        # Sampling coordinates run from -1 to 1 between the centres of the outermost pixels, so a
        # true rotation of an image that is not square needs their distances in the mixed terms.
        high, wide = max(height - 1, 1), max(width - 1, 1)
        first = torch.stack([cosine, sine * (-high / wide)], dim=-1)
        second = torch.stack([sine * (wide / high), cosine], dim=-1)
        down, across = (
            _range(side, images) * (2 / max(side - 1, 1)) - min(side - 1, 1)
            for side in (height, width)
        )
        place = torch.stack(torch.broadcast_tensors(across, down[:, None]), dim=-1)
        matrix = torch.stack([first, second], dim=-1)
        grid = (place @ matrix[:, None]).expand(len(images), height, width, 2)
        return F.grid_sample(images, grid, align_corners=True)


@dataclass(frozen=True)
class Cutout:
    """Set a randomly placed rectangle to zero; it may reach over the border.

    Attributes:
        ratio: Its sides as a share of the image's.

    Raises:
        ArgumentError: If the number is out of its range.
    """

    ratio: float = 0.5
    uniforms: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0, 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the change."""
        inside = []
        for side, number in zip(images.shape[-2:], drawn.to(images.dtype).unbind(1), strict=True):
            length = round(side * self.ratio)
            # An even length is centred between pixels, so it has one more place to be.
            first = torch.floor(number * (side + 1 - length % 2)) - length // 2
            position = _range(side, images)
            inside.append((position >= first[:, None]) & (position < first[:, None] + length))
        rows, columns = inside
        return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


@dataclass(frozen=True)
class Augmentation:
    """A random change made of operations: all of ``always`` and one of ``one_of``.

    Flips and colours come first, then the one drawn from ``one_of``, then cut-outs.

    Attributes:
        always: Operations that always apply, before the drawn one.
        one_of: Operations of which one is drawn in each call.
        last: Operations that always apply, after the drawn one.
    """

    always: tuple[Operation, ...] = ()
    one_of: tuple[Operation, ...] = ()
    last: tuple[Operation, ...] = ()

    @property
    def uniforms(self) -> int:
        """How many numbers a draw takes: which of ``one_of``, then those of each operation."""
        operations = (*self.always, *self.one_of, *self.last)
        return 1 + sum(operation.uniforms for operation in operations)

    def draw(self, generator: Generator, count: int) -> Tensor:
        """Draw the numbers of ``count`` changes, ``[count, uniforms]``, on the generator's device.

        :meth:`apply` takes all of them for a batch of as many images, or one of them, as
        ``[1, uniforms]``, for a batch of any size.
        """
        return torch.rand((count, self.uniforms), generator=generator, device=generator.device)

    def __call__(self, images: Tensor, generator: Generator, *, shared: bool = False) -> Tensor:
        """Augment a batch.

        Args:
            images: Normalised images ``[batch, channels, height, width]``.
            generator: Source of the draws.
            shared: Whether one draw serves the whole batch, or each image has its own.

        Returns:
            Images of the same shape, differentiable in ``images``.
        """
        _check_batch(images)
        drawn = self.draw(generator, 1 if shared else len(images))
        picked = None
        if len(self.one_of) > 1 and drawn.device.type == "cpu" and len(drawn):
            picked = int(drawn[0, 0] * len(self.one_of))
        return self._apply(images, brought(drawn, images.device), picked)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augment a batch by numbers drawn before; a pure function of tensors.

        Args:
            images: Normalised images ``[batch, channels, height, width]``.
            drawn: From :meth:`draw`, on the images' device: ``[batch, uniforms]``, or
                ``[1, uniforms]`` for one change of them all. The first row says which of
                ``one_of`` applies.

        Returns:
            Images of the same shape, differentiable in ``images``.
        """
        _check_batch(images)
        return self._apply(images, drawn, None)

    def _apply(self, images: Tensor, drawn: Tensor, picked: int | None) -> Tensor:
        """Apply to a batch; where ``picked`` is None all of ``one_of`` are made, and one kept."""
        taken = 1

        def change(operation: Operation, images: Tensor) -> Tensor:
            nonlocal taken
            first, taken = taken, taken + operation.uniforms
            return operation(images, drawn[:, first:taken])

        for operation in self.always:
            images = change(operation, images)
        if len(self.one_of) == 1:
            images = change(self.one_of[0], images)
        elif self.one_of and len(images):
            before = images
            which = torch.floor(drawn[0, 0] * len(self.one_of))
            for number, operation in enumerate(self.one_of):
                if picked is None:
                    images = torch.where(which == number, change(operation, before), images)
                elif picked == number:
                    images = change(operation, before)
                else:
                    taken += operation.uniforms
        for operation in self.last:
            images = change(operation, images)
        return images


def _check_batch(images: Tensor) -> None:
    if images.ndim != 4:
        raise ArgumentError(
            f"`images` has shape {list(images.shape)}, but must be "
            f"[batch, channels, height, width]; add the missing dimension"
        )


def augmentation(*names: str) -> Augmentation:
    """Build the published strategies from the names of their parts, with the published strengths.

    Args:
        names: Any of ``color``, ``crop``, ``cutout``, ``flip``, ``scale`` and ``rotate``. Of crop,
            scale and rotate, where several are named, one is drawn in each call.

    Raises:
        ArgumentError: If a name is unknown.
    """
    known: dict[str, Operation] = {
        "flip": Flip(),
        "color": Color(),
        "crop": Crop(),
        "scale": Scale(),
        "rotate": Rotate(),
        "cutout": Cutout(),
    }
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ArgumentError(f"`names` holds {unknown}, but the known ones are {sorted(known)}")

    def of(*group: str) -> tuple[Operation, ...]:
        return tuple(known[name] for name in group if name in names)

    return Augmentation(
        always=of("flip", "color"), one_of=of("crop", "scale", "rotate"), last=of("cutout")
    )


@dataclass(frozen=True)
class CutMix:
    """Paste a rectangle of other images of the batch into each image.

    The share that each image keeps is drawn from Beta(1, 1), that is uniformly.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features", ICCV 2019.

    Attributes:
        probability: Chance that a batch is mixed at all.

    Raises:
        ArgumentError: If the number is out of its range.
    """

    probability: float = 0.5
    uniforms: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_number("probability", self.probability, 0, 1)

    def apply(self, images: Tensor, partners: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch by numbers drawn before; a pure function of tensors.

        Args:
            images: ``[batch, channels, height, width]``.
            partners: Whose rectangle each image gets, int64 ``[batch]``.
            drawn: ``[4]`` from ``[0, 1)``.

        Returns:
            The images, and the share (a scalar) that each keeps of itself: the loss is
            ``share * loss(labels) + (1 - share) * loss(labels[partners])``.
        """
        chance, centre_y, centre_x, keep = drawn.unbind()
        keep = torch.where(chance < self.probability, keep, torch.ones_like(keep))
        edge = torch.sqrt(1 - keep)
        inside = []
        for side, centre in zip(images.shape[-2:], (centre_y, centre_x), strict=True):
            # A stretch around the centre, cut off at the border.
            middle, half = (centre * side).floor(), (edge * side / 2).floor()
            position = torch.arange(side, device=images.device)
            inside.append((position >= middle - half) & (position < middle + half))
        pasted = inside[0][:, None] & inside[1]
        share = 1 - pasted.float().mean()
        return torch.where(pasted, images[partners], images), share


def cutmix(
    images: Tensor, generator: Generator, *, probability: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw for a batch and mix it by :class:`CutMix`.

    Args:
        images: ``[batch, channels, height, width]``.
        generator: Source of the draws.
        probability: Chance that the batch is mixed at all.

    Returns:
        The images, the int64 positions ``[batch]`` of the partners, and the share that each image
        keeps of itself, as :meth:`CutMix.apply` says.
    """
    device = generator.device
    drawn = torch.rand(CutMix.uniforms, generator=generator, device=device)
    partners = torch.randperm(len(images), generator=generator, device=device)
    partners, drawn = (brought(tensor, images.device) for tensor in (partners, drawn))
    mixed, share = CutMix(probability).apply(images, partners, drawn)
    return mixed, partners, share


def _range(side: int, like: Tensor) -> Tensor:
    return torch.arange(side, device=like.device, dtype=like.dtype)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read images linearly at positions along each axis, in pixels, with zeros outside.

    A product with two small matrices, because its gradient is one, too; that of reading at indices
    adds up one by one. Positions that are whole numbers give the pixels exactly.

    Args:
        images: ``[batch, channels, height, width]``.
        rows: ``[1 or batch, new height]``.
        columns: ``[1 or batch, new width]``.
    """
    height, width = images.shape[-2:]
    vertical, horizontal = (
        (1 - (positions[..., None] - _range(side, images)).abs()).clamp(min=0)
        for positions, side in ((rows, height), (columns, width))
    )
    across = torch.matmul(images, horizontal.transpose(-2, -1)[:, None])
    return torch.matmul(vertical[:, None], across)
