import warnings

import pytest
import torch

from dc_replay.comparison import Comparison, _say_that_nothing_is_smaller
from dc_replay.errors import ArgumentError
from dc_replay.multisize import Multisize
from dc_replay.pixels import Normalization
from dc_replay.sampling import RealImages
from dc_replay.subsets import SubsetMatching


def real_images(counts, device="cpu"):
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
    images = torch.zeros(len(targets), 1, 4, 4, dtype=torch.uint8, device=device)
    names = tuple(10 + position for position in range(len(counts)))
    return RealImages(images, targets, names, Normalization.identity(1))


def compare(counts, real, *, most=128, each=4, subsets=None, multisize=None, seed=0):
    return Comparison(
        real,
        counts,
        each=each,
        most_decoded=most,
        subsets=subsets,
        multisize=multisize,
        generator=torch.Generator().manual_seed(seed),
    )


def test_all_images_are_compared_where_they_are_few_enough(device):
    comparison = compare([2, 1], real_images([6, 5], device))
    drawn = comparison.draw(0)
    assert drawn.index is None and drawn.shares.tolist() == pytest.approx([1 / 8] * 8)
    terms = comparison.terms(0, drawn, torch.arange(3, device=device), 0)
    assert terms.synthetic[0].tolist() == pytest.approx([1 / 8] * 8)
    assert terms.real[0].tolist() == pytest.approx([1 / 3] * 3)
    assert terms.weights.tolist() == [1] and not len(terms.prefixes)


def test_the_subset_is_drawn_without_replacement():
    comparison = compare([3], real_images([6]), most=7)
    drawn = [comparison.draw(0).index.tolist() for _ in range(30)]
    assert all(len(index) == len(set(index)) == 7 for index in drawn)
    assert {position for index in drawn for position in index} == set(range(12))


def test_the_subset_is_drawn_from_the_generator_alone():
    found = []
    for seed in (0, 0, 1):
        found.append(compare([3], real_images([6]), most=7, seed=seed).draw(0).index)
        torch.rand(1)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_with_prefixes_each_stored_image_is_drawn_and_counts_the_same():
    comparison = compare([5], real_images([9]), most=12, multisize=Multisize())
    found, often = set(), set()
    for _ in range(40):
        drawn = comparison.draw(0)
        image = drawn.index // 4
        assert len(drawn.index) == len(drawn.index.unique()) == 12
        counts = torch.bincount(image, minlength=5)
        assert counts.min() == 2 and counts.max() == 3
        often |= set(counts.eq(3).nonzero().flatten().tolist())
        mass = torch.zeros(5).index_add(0, image, drawn.shares)
        torch.testing.assert_close(mass, torch.full((5,), 0.2))
        for size, prefix in enumerate(drawn.prefixes, start=1):
            mass = torch.zeros(5).index_add(0, image, prefix)
            torch.testing.assert_close(mass, torch.tensor([1 / size] * size + [0.0] * (5 - size)))
        found |= set(drawn.index.tolist())
    assert found == set(range(20)) and often == set(range(5))


def test_parts_stay_the_same_and_their_weight_falls():
    real = real_images([8, 6])
    comparison = compare([2, 1], real, subsets=SubsetMatching(2, 0.5))
    rows = torch.tensor([8, 13, 9, 10, 11])
    first, last = (comparison.terms(1, comparison.draw(1), rows, share) for share in (0, 0.75))
    assert first.weights.tolist() == pytest.approx([1, 0.5, 0.5])
    assert last.weights.tolist() == pytest.approx([1, 0.125, 0.125])
    torch.testing.assert_close(first.synthetic, last.synthetic)
    torch.testing.assert_close(first.real, last.real)
    assert (first.synthetic > 0).sum(dim=1).tolist() == [2, 2]
    whole = first.real_mix[0] @ first.real
    torch.testing.assert_close(whole, torch.full((5,), 0.2))
    again = compare([2, 1], real, subsets=SubsetMatching(2, 0.5), seed=1)
    different = [again.terms(1, again.draw(1), rows, 0).real, first.real]
    assert not torch.equal(*different)


def test_an_image_is_in_one_part_whatever_else_is_drawn():
    comparison = compare([3], real_images([20]), most=5, subsets=SubsetMatching(3, 0.5))
    part = {}
    for _ in range(30):
        drawn = comparison.draw(0)
        terms = comparison.terms(0, drawn, torch.arange(20), 0)
        for image, shares in zip(drawn.index.tolist(), terms.synthetic.T, strict=True):
            (own,) = shares.nonzero().flatten().tolist()
            assert part.setdefault(image, own) == own
    assert set(part) == set(range(12)) and set(part.values()) == {0, 1, 2}


def test_the_matched_prefix_joins_the_whole_and_its_parts():
    comparison = compare(
        [3, 1], real_images([8, 6]), subsets=SubsetMatching(2, 0.5), multisize=Multisize(period=1)
    )
    terms = comparison.terms(0, comparison.draw(0), torch.arange(4), 0)
    assert terms.weights.tolist() == pytest.approx([1, 0.5, 0.5, 1])
    torch.testing.assert_close(
        terms.synthetic_mix[-1] @ terms.synthetic, torch.tensor([0.25] * 4 + [0.0] * 8)
    )
    torch.testing.assert_close(terms.real_mix[-1] @ terms.real, torch.full((4,), 0.25))
    single = comparison.terms(1, comparison.draw(1), torch.arange(8, 12), 0)
    assert single.weights.tolist() == pytest.approx([1, 0.5, 0.5])


@pytest.mark.parametrize(("proportional", "weight"), [(False, 1.0), (True, 0.25)])
def test_a_prefix_weighs_1_or_its_share_of_the_images(proportional, weight):
    multisize = Multisize(proportional=proportional)
    comparison = compare([4], real_images([8]), multisize=multisize)
    terms = comparison.terms(0, comparison.draw(0), torch.arange(4), 0)
    assert terms.weights.tolist() == [1, weight]


def test_each_class_has_the_size_and_the_weight_of_its_own_prefix():
    multisize = Multisize(period=1, proportional=True)
    comparison = compare([3, 4], real_images([8, 6]), each=1, multisize=multisize)
    comparison.choice.sizes = [1, 2]
    for position, (count, size) in enumerate([(3, 1), (4, 2)]):
        terms = comparison.terms(position, comparison.draw(position), torch.arange(4), 0)
        assert terms.weights.tolist() == pytest.approx([1, size / count])
        expected = [1 / size] * size + [0.0] * (count - size)
        torch.testing.assert_close(
            terms.synthetic_mix[-1] @ terms.synthetic, torch.tensor(expected)
        )


def test_frozen_images_get_no_update():
    comparison = compare([3, 2], real_images([8, 6]), multisize=Multisize(period=1))
    pixels = [torch.rand(count, 1, 4, 4, requires_grad=True) for count in (3, 2)]
    optimizer = torch.optim.SGD(pixels, lr=0.1, momentum=0.9)

    def step(first):
        for position, distances in enumerate((first, [0.1])):
            comparison.record(position, torch.tensor(distances))
        before = [stored.detach().clone() for stored in pixels]
        for stored in pixels:
            stored.grad = torch.ones_like(stored)
        comparison.hold(pixels)
        optimizer.step()
        comparison.end_outer_iteration(pixels, optimizer)
        changed = [now != then for now, then in zip(pixels, before, strict=True)]
        return [stored.flatten(1).any(dim=1).tolist() for stored in changed]

    assert step([3.0, 2.0]) == step([3.0, 1.0]) == [[True] * 3, [True] * 2]
    assert comparison.choice.sizes == [2, 1] and comparison.choice.frozen == [1, 0]
    assert step([3.0, 1.0]) == [[False, True, True], [True] * 2]


def test_one_image_per_class_has_no_smaller_prefix_and_it_says_so_once():
    real = real_images([8, 6])
    _say_that_nothing_is_smaller.cache_clear()
    with pytest.warns(UserWarning, match="multisize condensation does nothing with one stored"):
        comparison = compare([1, 1], real, multisize=Multisize())
    assert comparison.choice is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare([1, 1], real, multisize=Multisize())
        assert compare([1, 2], real, multisize=Multisize()).choice is not None


def test_prefixes_need_a_decoded_image_of_each_stored_one():
    with pytest.raises(ArgumentError, match="`most_decoded` is 4, but class 10 stores 5 images"):
        compare([5], real_images([9]), most=4, multisize=Multisize())
    drawn = compare([4], real_images([9]), most=4, multisize=Multisize()).draw(0)
    assert (drawn.index // 4).tolist() == [0, 1, 2, 3]


def test_there_may_be_no_more_parts_than_decoded_images():
    message = "`parts` is 5, but class 10 has only 2 decoded images; use at most 2"
    with pytest.raises(ArgumentError, match=message):
        compare([2], real_images([4]), each=1, subsets=SubsetMatching(5))
    # Also where there are fewer real images than decoded ones, but more than stored ones.
    with pytest.raises(ArgumentError, match="`parts` is 9, .* has only 8 decoded images"):
        compare([2], real_images([6]), each=4, subsets=SubsetMatching(9))


@pytest.mark.parametrize(("each", "matched"), [(1, 1), (4, 1)])
def test_a_class_of_one_image_has_one_part(each, matched):
    comparison = compare([1, 2], real_images([1, 6]), each=each, subsets=SubsetMatching(2, 0.5))
    terms = comparison.terms(0, comparison.draw(0), torch.tensor([0, 0, 0]), 0)
    assert (terms.weights[1:] > 0).sum() == matched
    assert all(part.isfinite().all() for part in terms)
