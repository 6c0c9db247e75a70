from dataclasses import replace

import pytest
import torch

from dc_replay.errors import ArgumentError
from dc_replay.multisize import Multisize, PrefixChoice
from dc_replay.recipes import herding


def period(choice, *distances):
    """Two pixel steps with these mean distances for each class, then the end of a period."""
    for offset in (-0.5, 0.5):
        for position, values in enumerate(distances):
            if values:
                choice.record(position, torch.tensor(values) + offset)
    return [choice.end_outer_iteration() for _ in range(choice.multisize.period)]


@pytest.mark.parametrize("length", [1, 3])
def test_the_fastest_changing_prefix_is_chosen_once_there_are_two_periods(length):
    choice = PrefixChoice(Multisize(period=length), [4])
    assert choice.sizes == [1] and choice.frozen == [0]
    assert period(choice, [9.0, 5.0, 4.0]) == [False] * (length - 1) + [True]
    assert choice.sizes == [1] and choice.frozen == [0]
    period(choice, [8.5, 3.0, 3.0])  # the second fell most
    assert choice.sizes == [2] and choice.frozen == [1]
    period(choice, [8.5, 2.9, 3.5])  # a rise counts as much as a fall
    assert choice.sizes == [3] and choice.frozen == [2]
    period(choice, [8.5, 2.9, 1.0])  # the same again: nothing is frozen
    assert choice.sizes == [3] and choice.frozen == [0]
    period(choice, [7.0, 2.9, 1.0])
    assert choice.sizes == [1] and choice.frozen == [0]
    assert choice.history == [[1], [1], [2], [3], [3]]  # the last choice was never matched


def test_one_choice_for_all_classes_goes_by_the_mean():
    rates = ([0.0, 0.0], [0.0, 0.0]), ([1.0, 2.0], [4.0, 0.5])
    together, alone = (
        PrefixChoice(Multisize(period=1, per_class=each), [3, 3]) for each in (False, True)
    )
    for choice in (together, alone):
        for distances in rates:
            period(choice, *distances)
    assert together.sizes == [1, 1]  # means 2.5 and 1.25
    assert alone.sizes == [2, 1] and alone.frozen == [1, 0]


def test_classes_may_have_different_counts_or_a_single_image():
    choice = PrefixChoice(Multisize(period=1), [1, 2, 4])
    assert choice.sizes == [0, 1, 1]
    period(choice, [], [1.0], [1.0, 1.0, 1.0])
    period(choice, [], [2.0], [1.5, 1.2, 9.0])
    assert choice.sizes == [0, 1, 3] and choice.frozen == [0, 0, 1]


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_the_period_is_at_least_one_outer_iteration(value):
    with pytest.raises(ArgumentError, match=f"`period` is {value}; pass a whole number of at"):
        Multisize(period=value)


def test_a_recipe_that_optimises_nothing_has_no_prefixes_to_match():
    with pytest.raises(ArgumentError, match="`multisize` is .*, but herding optimises nothing"):
        replace(herding(), multisize=Multisize())
