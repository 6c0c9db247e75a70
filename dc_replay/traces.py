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

# What is below is what images show, in which classes differ.
_LOWEST = 3


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
