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
    assert together.history == [[1, 1], [1, 1]]
    assert alone.sizes == [2, 1] and alone.frozen == [1, 0]


def test_classes_may_have_different_counts_or_a_single_image():
    choice = PrefixChoice(Multisize(period=1), [1, 2, 4])
    assert choice.sizes == [0, 1, 1]
    period(choice, [], [1.0], [1.0, 1.0, 1.0])
    period(choice, [], [2.0], [1.5, 1.2, 9.0])
    assert choice.sizes == [0, 1, 3] and choice.frozen == [0, 0, 1]


def test_the_mean_of_a_prefix_is_over_the_classes_that_have_it():
    choice = PrefixChoice(Multisize(period=1), [2, 4])
    period(choice, [0.0], [0.0, 0.0, 0.0])
    period(choice, [3.0], [3.0, 0.0, 4.0])
    assert choice.sizes == [1, 3]  # 4 against a mean of 3


def test_a_class_takes_the_best_of_the_prefixes_that_it_has():
    choice = PrefixChoice(Multisize(period=1), [3, 5])
    period(choice, [0.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    period(choice, [2.0, 1.0], [2.0, 1.0, 9.0, 0.0])
    assert choice.sizes == [1, 3]


def test_classes_of_one_image_have_no_choice():
    choice = PrefixChoice(Multisize(period=1), [1, 1])
    for _ in range(3):
        period(choice, [], [])
        assert choice.sizes == [0, 0] and choice.frozen == [0, 0]


def test_a_prefix_weighs_its_share_of_the_images_if_it_is_to():
    for proportional, weights in ((True, [0.75, 0.25]), (False, [1.0, 1.0])):
        choice = PrefixChoice(
            Multisize(period=1, per_class=True, proportional=proportional), [4, 4]
        )
        period(choice, [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
        period(choice, [0.0, 0.0, 1.0], [1.0, 0.0, 0.0])
        assert choice.sizes == [3, 1]
        assert [choice.weight(index) for index in range(2)] == weights


@pytest.mark.parametrize("cut", range(8))
@pytest.mark.parametrize("within", [False, True])
def test_from_a_state_the_choices_go_on_as_they_would_have(cut, within):
    counts, generator = [2, 4, 5], torch.Generator().manual_seed(3)
    # Distances of every class in a number of pixel steps that differs between outer iterations.
    steps = [torch.rand(1 + outer % 3, 3, 4, generator=generator) for outer in range(9)]

    def run(cut=None):
        choice = PrefixChoice(Multisize(period=2, per_class=True), counts)
        for outer, distances in enumerate(steps):
            for number, step in enumerate(distances):
                for index, count in enumerate(counts):
                    choice.record(index, step[index, : count - 1])
                if outer == cut and within and number == 0:
                    choice = restored(choice)
            choice.end_outer_iteration()
            if outer == cut and not within:
                choice = restored(choice)
        return choice

    def restored(choice):
        fresh = PrefixChoice(choice.multisize, counts)
        fresh.restore(choice.state())
        return fresh

    whole, parted = run(), run(cut)
    assert parted.history == whole.history and len(whole.history) == 5
    assert (parted.sizes, parted.frozen) == (whole.sizes, whole.frozen)
    assert len({tuple(sizes) for sizes in whole.history}) > 2


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_the_period_is_at_least_one_outer_iteration(value):
    with pytest.raises(ArgumentError, match=f"`period` is {value}; pass a whole number of at"):
        Multisize(period=value)


def test_a_recipe_that_optimises_nothing_has_no_prefixes_to_match():
    with pytest.raises(ArgumentError, match="`multisize` is .*, but herding optimises nothing"):
        replace(herding(), multisize=Multisize())
