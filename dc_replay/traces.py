"""Noise like the traces of condensing, for images that have none.

Condensing moves pixels until networks learn what they learn from real images, and leaves a texture
that no photograph has, most of it in the colours. A network that sees old classes as condensed
exemplars alone and new ones as photographs learns to tell them apart by it, and takes photographs
of old classes for new ones. How strong the texture is at each frequency can be measured in what the
network is shown, and new images can be given noise of that strength.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from dc_replay._layout import cosine_transform, planes_of

# What is below is what images show, in which classes differ.
_LOWEST = 3


@dataclass(frozen=True, eq=False)
class Frequencies:
    """The cosine transform of images of one shape on one device; see :func:`frequencies`.

    Attributes:
        planes: Maps channels to brightness and colour differences, ``[channels, channels]``.
        channels_of: The inverse.
        rows: The transform along the height, ``[height, height]``.
        columns: The transform along the width, ``[width, width]``.
    """

    planes: Tensor
    channels_of: Tensor
    rows: Tensor
    columns: Tensor

    def power(self, images: Tensor) -> Tensor:
        """The mean square of each coefficient.

        Args:
            images: In ``[0, 1]``, ``[count, channels, height, width]``.

        Returns:
            ``[channels, height, width]``, in planes and frequencies.
        """
        planes = torch.einsum("pc,nchw->nphw", self.planes, images.detach().to(self.rows) - 0.5)
        return (self.rows @ planes @ self.columns.T).square().mean(dim=0)

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
        planes = self.rows.T @ (drawn.to(self.rows) * power.sqrt()) @ self.columns
        return torch.einsum("cp,nphw->nchw", self.channels_of, planes)


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


@lru_cache(maxsize=16)
def frequencies(channels: int, height: int, width: int, device: torch.device) -> Frequencies:
    """The transform for images of one shape on one device."""
    planes, rows, columns = planes_of(channels), cosine_transform(height), cosine_transform(width)
    with torch.inference_mode(False):  # else what the first caller's mode makes would stay
        found = [
            torch.as_tensor(values, dtype=torch.float32, device=device)
            for values in (planes, rows, columns)
        ]
    return Frequencies(found[0], torch.linalg.inv(found[0]), found[1], found[2])
