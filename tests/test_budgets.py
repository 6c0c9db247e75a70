import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dc_replay.budgets import (
    Budget,
    ImagesPerClass,
    Smallest,
    TotalBytes,
    TotalImages,
    check_budget,
    lowered,
)
from dc_replay.errors import ArgumentError

IMAGE_BYTES = 12
simple = st.one_of(
    st.builds(ImagesPerClass, st.integers(1, 9)),
    st.builds(TotalImages, st.integers(1, 60)),
    st.builds(TotalBytes, st.integers(IMAGE_BYTES, 60 * IMAGE_BYTES)),
)
budgets = st.one_of(simple, st.builds(Smallest, st.lists(simple, min_size=1, max_size=3)))


def test_images_per_class_gives_every_class_the_same():
    assert ImagesPerClass(20).quotas([7, 3], image_bytes=3072) == {7: 20, 3: 20}


def test_the_remainder_goes_to_the_classes_that_arrived_first():
    quotas = TotalImages(11).quotas([5, 0, 9], image_bytes=1)
    assert list(quotas.items()) == [(5, 4), (0, 4), (9, 3)]


def test_total_bytes_counts_whole_images():
    assert TotalBytes(5 * 3072 + 3071).quotas([0, 1], image_bytes=3072) == {0: 3, 1: 2}


def test_smallest_takes_the_smaller_quota_of_each_class():
    budget = Smallest((ImagesPerClass(3), TotalImages(7)))
    assert budget.quotas([0, 1], image_bytes=1) == {0: 3, 1: 3}
    assert budget.quotas([0, 1, 2], image_bytes=1) == {0: 3, 1: 2, 2: 2}


def test_smallest_takes_nested_ones_apart():
    first, second, third = ImagesPerClass(3), TotalImages(7), TotalBytes(40)
    nested = Smallest([Smallest((first, second)), third])
    assert nested == Smallest((first, second, third))


@pytest.mark.parametrize("budget", [ImagesPerClass(1), TotalImages(1), TotalBytes(1)])
def test_no_classes_have_no_quotas(budget):
    assert budget.quotas([], image_bytes=1) == {}
    assert isinstance(budget, Budget)


def test_numpy_integers_are_whole_numbers():
    assert TotalImages(np.int64(4)) == TotalImages(4)
    assert type(TotalImages(np.int64(4)).images) is int


@given(budgets, st.integers(0, 30))
def test_quotas_never_grow_and_keep_the_bound(budget, classes):
    before: dict[int, int] = {}
    for seen in range(1, classes + 1):
        try:
            quotas = budget.quotas(range(seen), image_bytes=IMAGE_BYTES)
        except ArgumentError:
            with pytest.raises(ArgumentError):  # Once too small, too small for good.
                budget.quotas(range(seen + 1), image_bytes=IMAGE_BYTES)
            return
        assert list(quotas) == list(range(seen))
        assert min(quotas.values()) >= 1
        assert all(quotas[label] <= quota for label, quota in before.items())
        total = sum(quotas.values())
        for part in budget.budgets if isinstance(budget, Smallest) else (budget,):
            match part:
                case ImagesPerClass(images):
                    assert max(quotas.values()) <= images
                case TotalImages(images):
                    assert total <= images
                case TotalBytes(limit):
                    assert total * IMAGE_BYTES <= limit
        before = quotas


@given(budgets, st.integers(1, 8), st.data())
def test_a_lowered_budget_obeys_both_bounds(budget, classes, data):
    """`lowered` leaves bounds out; compare it with keeping them all."""
    try:
        quotas = budget.quotas(range(classes), image_bytes=IMAGE_BYTES)
    except ArgumentError:
        return
    stored = sum(data.draw(st.integers(1, quota)) for quota in quotas.values())
    cap = data.draw(
        st.one_of(
            st.builds(ImagesPerClass, st.integers(1, max(quotas.values()))),
            st.builds(TotalImages, st.integers(classes, stored)),
            st.builds(TotalBytes, st.integers(classes * IMAGE_BYTES, stored * IMAGE_BYTES)),
        )
    )
    every = Smallest((budget, cap))
    for seen in range(classes, classes + 20):
        try:
            expected = every.quotas(range(seen), image_bytes=IMAGE_BYTES)
        except ArgumentError:
            break
        assert lowered(budget, cap).quotas(range(seen), image_bytes=IMAGE_BYTES) == expected


def test_a_lowered_budget_is_as_plain_as_it_can_be():
    assert lowered(ImagesPerClass(9), ImagesPerClass(4)) == ImagesPerClass(4)
    assert lowered(ImagesPerClass(9), TotalBytes(40)) == TotalBytes(40)
    assert lowered(TotalBytes(90), TotalImages(4)) == TotalImages(4)
    both = Smallest((TotalBytes(90), ImagesPerClass(4)))
    assert lowered(TotalBytes(90), ImagesPerClass(4)) == both
    assert lowered(both, ImagesPerClass(2)) == Smallest((TotalBytes(90), ImagesPerClass(2)))
    assert lowered(both, TotalImages(3)) == TotalImages(3)


def test_lowering_keeps_a_budget_of_another_kind():
    class FirstClassOnlyTwo:
        def quotas(self, classes, *, image_bytes):
            return {label: 2 if place == 0 else 1 for place, label in enumerate(classes)}

    budget = lowered(FirstClassOnlyTwo(), TotalImages(9))
    assert budget.quotas([4, 5, 6], image_bytes=1) == {4: 2, 5: 1, 6: 1}


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4", None])
@pytest.mark.parametrize(
    ("kind", "name"), [(ImagesPerClass, "images"), (TotalImages, "images"), (TotalBytes, "bytes")]
)
def test_a_size_below_one_or_no_whole_number_is_rejected(kind, name, value):
    message = f"`{name}` is {value!r}; pass a whole number of at least 1"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        kind(value)


def test_a_total_below_one_image_per_class_says_what_is_needed():
    message = r"`images` of TotalImages is 3, .* each of 4 classes; make it at least 4"
    with pytest.raises(ArgumentError, match=message):
        TotalImages(3).quotas(range(4), image_bytes=1)
    assert TotalImages(4).quotas(range(4), image_bytes=1) == dict.fromkeys(range(4), 1)


def test_bytes_below_one_image_per_class_say_what_is_needed():
    message = (
        r"`bytes` of TotalBytes is 6143, .* one image of 3072 bytes for each of 2 classes; "
        r"make it at least 6144"
    )
    with pytest.raises(ArgumentError, match=message):
        TotalBytes(6143).quotas(range(2), image_bytes=3072)
    assert TotalBytes(6144).quotas(range(2), image_bytes=3072) == {0: 1, 1: 1}


@pytest.mark.parametrize("budget", [ImagesPerClass(2), TotalImages(9), TotalBytes(9)])
def test_arguments_of_quotas_are_checked(budget):
    with pytest.raises(ArgumentError, match=r"`image_bytes` is 0; pass a whole number"):
        budget.quotas([0], image_bytes=0)
    with pytest.raises(ArgumentError, match=r"`classes` is \[1, 2, 1\]; name each class once"):
        budget.quotas([1, 2, 1], image_bytes=1)
    with pytest.raises(ArgumentError, match=r"`classes` is 3; pass a sequence of class labels"):
        budget.quotas(3, image_bytes=1)


def test_smallest_needs_budgets():
    with pytest.raises(ArgumentError, match=r"`budgets` of Smallest is empty; pass at least one"):
        Smallest(())
    with pytest.raises(ArgumentError, match=r"`budget` is 20, which is not a budget; pass Images"):
        Smallest((ImagesPerClass(2), 20))
    with pytest.raises(ArgumentError, match=r"`budgets` is 20; pass a tuple of budgets"):
        Smallest(20)


@pytest.mark.parametrize("value", [20, None, ImagesPerClass])
def test_what_is_no_budget_is_named(value):
    with pytest.raises(ArgumentError, match=r"`budget` is .*, which is not a budget; pass Images"):
        check_budget(value)
