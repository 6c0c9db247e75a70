"""Differentiable Siamese augmentation: the same random change for real and synthetic images.

Source: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021.

Everything here takes and returns *normalised* images ``[batch, channels, height, width]``, is
differentiable in them, and draws from the generator it is given. Draws are made on the generator's
device and moved to the images', so a CPU generator gives the same augmentation everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dc_replay.errors import ArgumentError


class Operation(Protocol):
    """One random change: draws a parameter for each of ``draws`` images, or one for all."""

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Return changed images; ``draws`` is 1 (shared by the batch) or the batch size."""
        ...


def uniform(generator: Generator, shape: Sequence[int], like: Tensor) -> Tensor:
    """Draw from [0, 1) on the generator's device, then follow ``like``'s device and dtype."""
    drawn = torch.rand(tuple(shape), generator=generator, device=generator.device)
    return drawn.to(device=like.device, dtype=like.dtype)


def _column(generator: Generator, draws: int, like: Tensor) -> Tensor:
    return uniform(generator, (draws, 1, 1, 1), like)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right.

    Attributes:
        probability: Chance of mirroring.
    """

    probability: float = 0.5

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Apply the change."""
        mirrored = _column(generator, draws, images) < self.probability
        return torch.where(mirrored, images.flip(-1), images)


@dataclass(frozen=True)
class Color:
    """Change brightness, then saturation, then contrast.

    Attributes:
        brightness: Width of the interval, centred on 0, that is added.
        saturation: Largest factor on the distance from the mean over channels.
        contrast: Width of the interval, centred on 1, of the factor on the distance from the
            mean over the whole image.
    """

    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 1.0

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Apply the change."""
        added, saturated, contrasted = (_column(generator, draws, images) for _ in range(3))
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
    """

    ratio: float = 0.125

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Apply the change."""
        height, width = images.shape[-2:]
        reach_y, reach_x = round(height * self.ratio), round(width * self.ratio)
        drawn = torch.rand((2, draws), generator=generator, device=generator.device)
        shift_y = (drawn[0] * (2 * reach_y + 1)).long() - reach_y
        shift_x = (drawn[1] * (2 * reach_x + 1)).long() - reach_x
        padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y))
        if draws == 1 and generator.device.type == "cpu":
            top, left = int(shift_y) + reach_y, int(shift_x) + reach_x
            return padded[..., top : top + height, left : left + width]
        device = images.device
        rows = torch.arange(height, device=device) + (shift_y + reach_y).to(device)[:, None]
        columns = torch.arange(width, device=device) + (shift_x + reach_x).to(device)[:, None]
        count, channels = images.shape[:2]
        rows = rows.expand(count, height)[:, None, :, None]
        rows = rows.expand(count, channels, height, padded.shape[-1])
        columns = columns.expand(count, width)[:, None, None, :]
        columns = columns.expand(count, channels, height, width)
        return padded.gather(2, rows).gather(3, columns)


@dataclass(frozen=True)
class Scale:
    """Enlarge or shrink each axis on its own about the centre, filling with zeros.

    Attributes:
        ratio: The factor of an axis lies in ``[1 / ratio, ratio]``.
    """

    ratio: float = 1.2

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Apply the change."""
        factor = uniform(generator, (draws, 2), images) * (self.ratio - 1 / self.ratio)
        factor = factor + 1 / self.ratio
        return _warp(images, torch.diag_embed(factor))


@dataclass(frozen=True)
class Rotate:
    """Turn about the centre, filling with zeros.

    Attributes:
        degrees: Largest angle either way.
    """

    degrees: float = 15.0

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Apply the change."""
        turn = uniform(generator, (draws,), images) * 2 - 1
        angle = turn * (self.degrees * math.pi / 180)
        height, width = images.shape[-2:]
        cosine, sine = torch.cos(angle), torch.sin(angle)
        # Sampling coordinates run from -1 to 1 between the centres of the outermost pixels, so a
        # true rotation of an image that is not square needs their distances in the mixed terms.
        high, wide = max(height - 1, 1), max(width - 1, 1)
        first = torch.stack([cosine, sine * (-high / wide)], dim=-1)
        second = torch.stack([sine * (wide / high), cosine], dim=-1)
        return _warp(images, torch.stack([first, second], dim=-2))


@dataclass(frozen=True)
class Cutout:
    """Set a randomly placed rectangle to zero; it may reach over the border.

    Attributes:
        ratio: Its sides as a share of the image's.
    """

    ratio: float = 0.5

    def __call__(self, images: Tensor, generator: Generator, draws: int) -> Tensor:
        """Apply the change."""
        centre = uniform(generator, (2, draws, 1, 1, 1), images)
        inside_y = self._inside(images.shape[-2], centre[0], images).unsqueeze(-1)
        inside_x = self._inside(images.shape[-1], centre[1], images).unsqueeze(-2)
        return images * ~(inside_y & inside_x)

    def _inside(self, side: int, centre: Tensor, like: Tensor) -> Tensor:
        length = round(side * self.ratio)
        first = torch.floor(centre.flatten(1) * (side + 1 - length % 2)) - length // 2
        position = torch.arange(side, device=like.device, dtype=like.dtype)
        return ((position >= first) & (position < first + length))[:, None, :]


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

    def __call__(self, images: Tensor, generator: Generator, *, shared: bool = False) -> Tensor:
        """Augment a batch.

        Args:
            images: Normalised images ``[batch, channels, height, width]``.
            generator: Source of the draws.
            shared: Whether one draw serves the whole batch, or each image has its own.

        Returns:
            Images of the same shape, differentiable in ``images``.
        """
        if images.ndim != 4:
            raise ArgumentError(
                f"`images` has shape {list(images.shape)}, but must be "
                f"[batch, channels, height, width]; add the missing dimension"
            )
        draws = 1 if shared else len(images)
        for operation in self.always:
            images = operation(images, generator, draws)
        if self.one_of:
            pick = torch.randint(len(self.one_of), (), generator=generator, device=generator.device)
            images = self.one_of[int(pick)](images, generator, draws)
        for operation in self.last:
            images = operation(images, generator, draws)
        return images

    def siamese(
        self, real: Tensor, synthetic: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Augment real and synthetic images with one and the same draw."""
        both = self(torch.cat([real, synthetic]), generator, shared=True)
        return both[: len(real)], both[len(real) :]


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


def cutmix(
    images: Tensor, generator: Generator, *, probability: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a rectangle of other images of the batch into each image.

    The share that each image keeps is drawn from Beta(1, 1), that is uniformly.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features", ICCV 2019.

    Args:
        images: ``[batch, channels, height, width]``.
        generator: Source of the draws.
        probability: Chance that the batch is mixed at all.

    Returns:
        The images, the int64 positions ``[batch]`` of the partners, and the share (a scalar
        tensor) that each image keeps of itself: the loss is
        ``share * loss(labels) + (1 - share) * loss(labels[partners])``.
    """
    device, count = images.device, len(images)
    height, width = images.shape[-2:]
    chance, centre_y, centre_x = torch.rand(3, generator=generator, device=generator.device)
    partners = torch.randperm(count, generator=generator, device=generator.device).to(device)
    keep = torch.rand((), generator=generator, device=generator.device)
    keep = torch.where(chance < probability, keep, torch.ones_like(keep))
    edge = torch.sqrt(1 - keep)
    top, bottom = _interval(height, centre_y, edge, device)
    left, right = _interval(width, centre_x, edge, device)
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)
    pasted = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    share = 1 - pasted.float().mean()
    return torch.where(pasted, images[partners], images), partners, share


def _interval(
    side: int, centre: Tensor, share: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First and one-past-last position of a stretch around ``centre``, cut off at the border."""
    middle, half = (centre * side).floor(), (share * side / 2).floor()
    return (middle - half).clamp(0, side).to(device), (middle + half).clamp(0, side).to(device)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample images at linearly mapped positions; ``matrix`` is ``[1 or batch, 2, 2]``."""
    affine = F.pad(matrix.expand(len(images), 2, 2), (0, 1))
    grid = F.affine_grid(affine, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)
