"""Noise like the traces of condensing, for images that have none.

Condensing moves pixels until networks learn what they learn from real images, and leaves a texture
that no photograph has, most of it in the colours. A network that sees old classes as condensed
exemplars alone and new ones as photographs learns to tell them apart by it, and takes photographs
of old classes for new ones. How strong the texture is at each frequency can be measured in what the
network is shown, and new images can be given noise of that strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dc_replay.coding import CosineTransform, cosine_transform_for
from dc_replay.pixels import Normalization

# What is below is what images show, in which classes differ.
_LOWEST = 3

# Mini-batches of an experience in which traces are measured.
_MEASURED = 100


@dataclass(frozen=True)
class Frequencies:
    """What images of one shape have, and noise gets, at each frequency; see :func:`frequencies`.

    Attributes:
        transform: The cosine transform of such images.
    """

    transform: CosineTransform

    def power(self, images: Tensor) -> Tensor:
        """The mean square of each coefficient.

        Args:
            images: In ``[0, 1]``, ``[count, channels, height, width]``.

        Returns:
            ``[channels, height, width]``, in planes and frequencies.
        """
        return self.transform.coefficients(images.detach().float() - 0.5).square().mean(dim=0)

    def noise(self, power: Tensor, count: int, generator: Generator) -> Tensor:
        """Normal noise whose coefficients are independent.

        Args:
            power: The variance of each coefficient, ``[channels, height, width]``.
            count: Images of noise.
            generator: Source of a number for each value.

        Returns:
            ``[count, channels, height, width]`` in units of ``[0, 1]`` image space.
        """
        drawn = torch.randn(count, *power.shape, generator=generator, device=generator.device)
        return self.transform.images(drawn.to(power.device) * power.sqrt())


def excess(exemplars: Tensor, images: Tensor) -> Tensor:
    """The power that exemplars have more than other images, but not at the lowest frequencies.

    Args:
        exemplars: Their power, as of :meth:`Frequencies.power`.
        images: That of the others.

    Returns:
        ``[channels, height, width]``, 0 where the others have more.
    """
    found = (exemplars - images).clamp(min=0)
    found[:, :_LOWEST, :_LOWEST] = 0
    return found


def frequencies(channels: int, height: int, width: int, device: torch.device) -> Frequencies:
    """Those of images of one shape on one device."""
    return Frequencies(cosine_transform_for(channels, height, width, device))


class TraceNoise:
    """Noise for the new images of one experience, as strong as the traces in its exemplars.

    At each frequency its standard deviation is a strength times the square root of what exemplars
    have more than new images (:func:`excess`), measured in the first 100 mini-batches that hold
    both.

    Args:
        strength: At least 0.
        scale: The normalization of the images; None where they lie in ``[0, 1]``.

    Attributes:
        measured: Mini-batches in which the traces were measured.
    """

    def __init__(self, strength: float, scale: Normalization | None) -> None:
        self.strength = strength
        self.scale = scale
        self.measured = 0
        # Of exemplars and of new images, summed over all that were measured.
        self._power: Tensor | None = None
        self._exemplars = self._images = 0

    @property
    def measures(self) -> bool:
        """Whether more mini-batches are to be measured."""
        return self.measured < _MEASURED

    def measure(self, exemplars: Tensor, images: Tensor) -> None:
        """Take what exemplars and new images of a mini-batch have at each frequency into account.

        Args:
            exemplars: ``[count, channels, height, width]``, as a network sees them.
            images: The new ones, as it would see them without noise. Nothing is measured where one
                of the two is empty.
        """
        if not len(exemplars) or not len(images):
            return
        channels, height, width = exemplars.shape[1:]
        transform = frequencies(channels, height, width, exemplars.device)
        both = (exemplars, images)
        power = torch.stack([len(some) * transform.power(self._plain(some)) for some in both])
        self._power = power if self._power is None else self._power + power
        self._exemplars += len(exemplars)
        self._images += len(images)
        self.measured += 1

    def added_to(self, images: Tensor, generator: Generator) -> Tensor:
        """New images with noise, or the same ones as long as nothing was measured.

        Args:
            images: ``[count, channels, height, width]`` of a floating-point type. What lies outside
                of ``[0, 1]`` without the normalization is clamped.
            generator: Source of the noise.

        Returns:
            Images of the same shape and type.
        """
        if self._power is None:
            return images
        channels, height, width = images.shape[1:]
        transform = frequencies(channels, height, width, images.device)
        exemplars, new = self._power
        power = self.strength**2 * excess(exemplars / self._exemplars, new / self._images)
        plain = self._plain(images)
        noise = transform.noise(power, len(images), generator)
        noisy = (plain + noise.to(plain)).clamp(0, 1)
        return (noisy if self.scale is None else self.scale.apply(noisy)).to(images.dtype)

    def _plain(self, images: Tensor) -> Tensor:
        plain = images.to(torch.promote_types(images.dtype, torch.float32))
        return plain if self.scale is None else self.scale.invert(plain)
