"""What a matching step compares: sets of images, stated as the share of each image in them.

The mean loss and the mean features of a set are linear in its images' shares. One forward pass over
all images of a class therefore serves every set made of them, and a set that is made of others
needs no gradient of its own. Shares are tensors of fixed shapes, so one compiled function serves
all sets, however they change from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Statistics = tuple[Tensor, ...]
"""What an objective takes from sets of images: tensors whose first dimension counts the sets."""


class Terms(NamedTuple):
    """The sets of one step and the pairs of them whose distances are added up.

    Attributes:
        synthetic: Share of each synthetic image in each set, ``[sets, images]``; rows add up to 1.
        real: The same for real images, ``[sets, images]``.
        synthetic_mix: Which synthetic set a term is about: its share of each row of ``synthetic``,
            ``[terms, sets]``.
        real_mix: The same for ``real``, ``[terms, sets]``.
        weights: Factor on the distance of each term, ``[terms]``; 0 leaves it out.
        prefixes: Synthetic sets whose feature distance from all real images is wanted,
            ``[prefixes, images]``, perhaps none.
    """

    synthetic: Tensor
    real: Tensor
    synthetic_mix: Tensor
    real_mix: Tensor
    weights: Tensor
    prefixes: Tensor

    def sides(self, synthetic: Statistics, real: Statistics) -> list[tuple[Statistics, Statistics]]:
        """For each term the statistics of its synthetic and of its real set."""
        return list(
            zip(_mixed(self.synthetic_mix, synthetic), _mixed(self.real_mix, real), strict=True)
        )


def _mixed(mix: Tensor, statistics: Statistics) -> list[Statistics]:
    if mix.shape == (1, 1):  # a set that is mixed of itself alone
        return [tuple(statistic[0] for statistic in statistics)]
    return [
        tuple(torch.tensordot(row, statistic, dims=1) for statistic in statistics) for row in mix
    ]


@dataclass(frozen=True, eq=False)
class Sides:
    """The images of a class in one step, before anything says which sets they form.

    Attributes:
        synthetic: Share of each synthetic image in the whole, ``[images]``.
        real: Share of each real image in the whole, ``[images]``.
    """

    synthetic: Tensor
    real: Tensor

    @classmethod
    def even(cls, synthetic: int, real: int, like: Tensor) -> Sides:
        """Every image counts the same; ``like`` gives the device and type."""
        return cls(like.new_full((synthetic,), 1 / synthetic), like.new_full((real,), 1 / real))

    def whole(self) -> Terms:
        """One term: all images of each side."""
        one = self.real.new_ones((1, 1))
        none = self.synthetic.new_empty((0, len(self.synthetic)))
        return Terms(self.synthetic[None], self.real[None], one, one, one[0], none)


def with_parts(
    sides: Sides, synthetic_part: Tensor, real_part: Tensor, parts: int, weight: float
) -> Terms:
    """The whole, and each part of the synthetic images against the same part of the real ones.

    A part that either side has no image of is left out.

    Args:
        sides: The images.
        synthetic_part: The part of each synthetic image, int64 ``[images]`` in ``[0, parts)``.
        real_part: The part of each real image, likewise.
        parts: How many parts.
        weight: Factor on the distance of each part.
    """
    number = torch.arange(parts, device=sides.real.device)[:, None]
    rows, masses = [], []
    for share, part in ((sides.synthetic, synthetic_part), (sides.real, real_part)):
        row = share * (part == number)
        mass = row.sum(dim=1)
        rows.append(row / mass.clamp(min=torch.finfo(row.dtype).tiny)[:, None])
        masses.append(mass)
    there = (masses[0] > 0) & (masses[1] > 0)
    own = torch.eye(parts, dtype=sides.real.dtype, device=sides.real.device)
    return sides.whole()._replace(
        synthetic=rows[0],
        real=rows[1],
        synthetic_mix=torch.cat([masses[0][None], own]),
        real_mix=torch.cat([masses[1][None], own]),
        weights=torch.cat([own.new_ones(1), there.to(own.dtype) * weight]),
    )


def with_prefix(terms: Terms, prefixes: Tensor, size: int, weight: float = 1.0) -> Terms:
    """Add one term: a prefix of the synthetic images against all real ones.

    Args:
        terms: Whose first term is the whole.
        prefixes: Share of each synthetic image in the prefixes of 1, 2, ... stored images,
            ``[prefixes, images]``; their feature distances are asked for, too.
        size: Stored images in the prefix that is matched.
        weight: Factor on its distance.
    """
    mix = torch.nn.functional.pad(terms.synthetic_mix, (0, 1, 0, 1))
    mix[-1, -1] = 1
    return Terms(
        synthetic=torch.cat([terms.synthetic, prefixes[size - 1 : size]]),
        real=terms.real,
        synthetic_mix=mix,
        real_mix=torch.cat([terms.real_mix, terms.real_mix[:1]]),
        weights=torch.nn.functional.pad(terms.weights, (0, 1), value=weight),
        prefixes=prefixes,
    )
