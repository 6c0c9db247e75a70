import math
from dataclasses import replace

import pytest
import torch

from dc_replay.errors import ArgumentError
from dc_replay.recipes import idc, random
from dc_replay.subsets import SubsetMatching


@pytest.mark.parametrize("count", [2, 3, 7, 64])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_are_as_even_as_can_be_and_random(count, parts, generator, device):
    divided = [SubsetMatching(parts).divide(count, generator, device) for _ in range(20)]
    for parted in divided:
        sizes = torch.bincount(parted, minlength=parts)
        assert len(sizes) == parts and sizes.max() - sizes.min() <= 1 and sizes.sum() == count
        assert parted.device.type == device.type
    assert len({tuple(parted.tolist()) for parted in divided}) > 1


def test_the_generator_alone_says_which_parts(device):
    before = torch.get_rng_state()
    first, again = (
        SubsetMatching(3).divide(64, torch.Generator().manual_seed(4), device) for _ in range(2)
    )
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)


def test_the_weight_falls_linearly_to_0():
    matching = SubsetMatching(weight=0.8)
    weights = [matching.weight_at(share) for share in (0, 0.25, 0.5, 0.75)]
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_must_be_numbers_of_at_least_0(weight):
    with pytest.raises(ArgumentError, match=f"`weight` is {weight}; pass a finite number of at"):
        SubsetMatching(weight=weight)


@pytest.mark.parametrize("parts", [0, -2, 2.5])
def test_there_must_be_a_whole_number_of_parts(parts):
    with pytest.raises(ArgumentError, match=f"`parts` is {parts}; pass a whole number"):
        SubsetMatching(parts)


def test_one_part_is_none():
    with pytest.raises(ArgumentError, match="`parts` is 1, but must be at least 2; for no parts"):
        SubsetMatching(1)


def test_a_recipe_that_optimises_nothing_has_nothing_to_match():
    with pytest.raises(ArgumentError, match="`subsets` is .*, but random optimises nothing"):
        replace(random(), subsets=SubsetMatching())
    assert replace(idc(), subsets=SubsetMatching(3)).subsets == SubsetMatching(parts=3)
