import contextlib
import copy
import gc
import io
import json
import pickle
import re
import subprocess
import sys
import time
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dc_replay.budgets import ImagesPerClass, Smallest, TotalBytes, TotalImages
from dc_replay.errors import ArgumentError, DCReplayError, MemoryFileError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.pixels import Normalization, dequantise

SHAPE = (3, 4, 4)
IMAGE_BYTES = prod(SHAPE)
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_exemplars(counts, *, seed=0, shape=SHAPE):
    pixels = torch.randint(
        256, (sum(counts.values()), *shape), dtype=torch.uint8, generator=seeded(seed)
    )
    labels = [label for label, count in counts.items() for _ in range(count)]
    return Exemplars(pixels, torch.tensor(labels, dtype=torch.int64))


def make_memory(counts=None, *, budget=None, factor=2, shape=SHAPE, **options):
    options = {"normalization": NORMALIZATION, "recipe": "idc", **options}
    memory = ExemplarMemory(
        budget=budget or ImagesPerClass(5), formation=Formation(factor=factor), **options
    )
    if counts:
        memory.add(make_exemplars(counts, shape=shape))
    return memory


def same(first, second):
    """Whether two memories hold the same and would go on alike."""
    return (
        first.counts == second.counts
        and (first.exemplars is None) == (second.exemplars is None)
        and (
            first.exemplars is None or torch.equal(first.exemplars.pixels, second.exemplars.pixels)
        )
        and torch.equal(first.labels, second.labels)
        and (first.budget, first.formation, first.normalization, first.recipe)
        == (second.budget, second.formation, second.normalization, second.recipe)
    )


def allocated(memory):
    return memory.exemplars.pixels.untyped_storage().nbytes()


# What is stored


def test_an_empty_memory():
    memory = make_memory()
    assert (len(memory), memory.decoded_len, memory.nbytes) == (0, 0, 0)
    assert (memory.classes, memory.counts, memory.labels.tolist()) == ((), {}, [])
    assert (memory.exemplars, memory.image_shape, memory.device) == (None, None, None)


def test_the_defaults_store_images_as_they_are():
    memory = ExemplarMemory(budget=ImagesPerClass(1))
    assert (memory.formation.factor, memory.normalization, memory.recipe) == (1, None, "")


def test_what_was_added_is_there():
    exemplars = make_exemplars({7: 5, 2: 3})
    memory = make_memory()
    memory.add(exemplars)
    assert torch.equal(memory.exemplars.pixels, exemplars.pixels)
    assert torch.equal(memory.of_class(2), exemplars.of_class(2))
    assert (memory.classes, memory.counts) == ((7, 2), {7: 5, 2: 3})
    assert memory.labels.tolist() == [7] * 5 + [2] * 3
    assert (memory.image_shape, memory.device) == (SHAPE, torch.device("cpu"))
    assert (len(memory), memory.decoded_len, memory.nbytes) == (8, 32, 8 * IMAGE_BYTES)
    assert "8 images of 2 classes, 384 bytes, budget=ImagesPerClass(images=5)" in repr(memory)


def test_the_memory_owns_its_pixels():
    exemplars = make_exemplars({0: 2, 1: 2})
    memory = make_memory()
    memory.add(exemplars.prefix({0: 2}))
    before = memory.of_class(0)
    view = Exemplars(exemplars.pixels[2:], exemplars.labels[2:])
    memory.add(view)
    exemplars.pixels.zero_()
    assert torch.equal(memory.of_class(0), before)
    assert memory.of_class(1).any()
    assert allocated(memory) == memory.nbytes


def test_pixels_of_another_memory_format_are_stored_contiguously():
    exemplars = make_exemplars({0: 2})
    last = exemplars.pixels.contiguous(memory_format=torch.channels_last)
    memory = make_memory()
    memory.add(Exemplars(last, exemplars.labels))
    assert memory.exemplars.pixels.is_contiguous()
    assert torch.equal(memory.exemplars.pixels, exemplars.pixels)


def test_older_classes_are_cut_to_a_prefix_when_classes_arrive():
    memory = make_memory(budget=TotalImages(7))
    first = make_exemplars({0: 4, 1: 3}, seed=1)
    memory.add(first)
    assert memory.quotas_with([2]) == {0: 3, 1: 2, 2: 2}
    memory.add(make_exemplars({2: 2}, seed=2))
    assert memory.counts == {0: 3, 1: 2, 2: 2}
    assert torch.equal(memory.of_class(0), first.of_class(0)[:3])
    assert torch.equal(memory.of_class(1), first.of_class(1)[:2])
    assert allocated(memory) == 7 * IMAGE_BYTES


def test_a_class_that_returns_keeps_its_place():
    memory = make_memory({0: 5, 1: 5})
    again = make_exemplars({0: 3, 2: 1}, seed=9)
    assert memory.quotas_with([2, 0, 2]) == {0: 5, 1: 5, 2: 5}
    memory.add(again)
    assert memory.counts == {0: 3, 1: 5, 2: 1}
    assert torch.equal(memory.of_class(0), again.of_class(0))
    assert torch.equal(memory.of_class(2), again.of_class(2))


def test_quotas_of_an_empty_memory_need_the_image_shape():
    memory = make_memory(budget=TotalBytes(5 * IMAGE_BYTES))
    assert memory.quotas_with([3, 1], SHAPE) == {3: 3, 1: 2}
    with pytest.raises(ArgumentError, match=r"`image_shape` is None; while the memory is empty, p"):
        memory.quotas_with([0])
    with pytest.raises(ArgumentError, match=r"`image_shape` is \(3, 4\); while"):
        memory.quotas_with([0], (3, 4))
    with pytest.raises(ArgumentError, match=r"`image_shape` is \(3, 0, 4\); while"):
        memory.quotas_with([0], (3, 0, 4))


def test_quotas_for_another_image_shape_are_refused():
    memory = make_memory({0: 1})
    assert memory.quotas_with([1], list(SHAPE)) == {0: 5, 1: 5}
    with pytest.raises(ArgumentError, match=r"`image_shape` is \(1, 4, 4\), .* are \(3, 4, 4\)"):
        memory.quotas_with([1], (1, 4, 4))


def test_normalization_can_be_set_until_images_are_stored():
    memory = make_memory(normalization=None)
    memory.normalization = NORMALIZATION
    memory.add(make_exemplars({0: 1}))
    memory.normalization = NORMALIZATION
    with pytest.raises(ArgumentError, match=r"`normalization` is None, but the stored images are"):
        memory.normalization = None


# What is refused, leaving the memory as it was


@pytest.mark.parametrize(
    ("exemplars", "message"),
    [
        (
            make_exemplars({0: 5, 2: 6}),
            r"`exemplars` holds 6 images of class 2, but ImagesPerClass",
        ),
        (make_exemplars({2: 1}, shape=(3, 4, 5)), r"`exemplars` holds .* \(3, 4, 5\), but the sto"),
        (
            make_exemplars({}),
            r"`exemplars` holds no images \(shape \[0, 3, 4, 4\]\); pass at least",
        ),
        ("pixels", r"`exemplars` is a str, expected Exemplars; of the result of condensing, pass"),
    ],
)
def test_what_does_not_fit_is_not_added(exemplars, message):
    memory = make_memory({0: 5, 1: 5})
    before = copy.deepcopy(memory)
    with pytest.raises(ArgumentError, match=message):
        memory.add(exemplars)
    assert same(memory, before)


def test_a_budget_below_one_image_per_class_refuses_the_class():
    memory = make_memory({0: 1, 1: 1}, budget=TotalImages(2))
    before = copy.deepcopy(memory)
    with pytest.raises(ArgumentError, match=r"`images` of TotalImages is 2, .* make it at least 3"):
        memory.add(make_exemplars({2: 1}))
    assert same(memory, before)


def test_a_formation_or_normalization_that_does_not_fit_is_refused():
    with pytest.raises(ArgumentError, match=r"`factor` is 5, .* images of 4x4 pixels"):
        make_memory({0: 1}, factor=5)
    with pytest.raises(ArgumentError, match=r"images of 1 channels, but `normalization` is for 3"):
        make_memory().add(make_exemplars({0: 1}, shape=(1, 4, 4)))


def test_the_budget_must_be_one():
    with pytest.raises(ArgumentError, match=r"`budget` is 20, which is not a budget; pass Images"):
        ExemplarMemory(budget=20)


@pytest.mark.parametrize(
    "use",
    [
        lambda memory, path: memory.sample(1, generator=seeded(0)),
        lambda memory, path: memory.decoded(),
        lambda memory, path: memory.of_class(0),
        lambda memory, path: memory.shrink(images_per_class=1),
        lambda memory, path: memory.save(path),
    ],
)
def test_an_empty_memory_cannot_be_used(use, tmp_path):
    with pytest.raises(ArgumentError, match=r"the memory is empty; call `add` with exemplars fir"):
        use(make_memory(), tmp_path / "memory.safetensors")


def test_a_class_that_is_not_stored_is_named():
    with pytest.raises(ArgumentError, match=r"`label` is 4, but the classes held are \(0, 1\)"):
        make_memory({0: 1, 1: 1}).of_class(4)


# Shrinking


@pytest.mark.parametrize(
    ("size", "counts", "budget"),
    [
        ({"images_per_class": 3}, {0: 3, 1: 2}, ImagesPerClass(3)),
        ({"total_images": 3}, {0: 2, 1: 1}, TotalImages(3)),
        ({"total_bytes": 4 * IMAGE_BYTES + 1}, {0: 2, 1: 2}, TotalBytes(4 * IMAGE_BYTES + 1)),
    ],
)
def test_shrinking_keeps_prefixes_in_a_smaller_allocation(size, counts, budget):
    memory = make_memory({0: 5, 1: 2})
    before = make_exemplars({0: 5, 1: 2})
    old = memory.exemplars.pixels.data_ptr()
    memory.shrink(**size)
    assert (memory.counts, memory.budget) == (counts, budget)
    for label, count in counts.items():
        assert torch.equal(memory.of_class(label), before.of_class(label)[:count])
    assert memory.exemplars.pixels.data_ptr() != old
    assert allocated(memory) == memory.nbytes == sum(counts.values()) * IMAGE_BYTES
    assert memory.labels.untyped_storage().nbytes() == 8 * len(memory)


def tensor_bytes():
    """Bytes of all tensors of the process, each allocation once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            with contextlib.suppress(NotImplementedError):  # of torch.func's, which have none
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_shrinking_2000_images_takes_milliseconds_and_frees_their_bytes():
    seconds = []
    for _ in range(5):
        memory = ExemplarMemory(budget=ImagesPerClass(20))
        labels = torch.arange(100).repeat_interleave(20)
        memory.add(Exemplars(torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), labels))
        before, stored = tensor_bytes(), memory.nbytes
        began = time.perf_counter()
        memory.shrink(images_per_class=5)
        seconds.append(time.perf_counter() - began)
        assert stored - memory.nbytes == 1500 * 3072
        # Labels, 8 bytes each, go with their images.
        assert before - tensor_bytes() == 1500 * (3072 + 8)
    assert min(seconds) < 0.05  # about 1 ms; the rest is for busy machines


@pytest.mark.parametrize(
    "size", [{"images_per_class": 5}, {"total_images": 10}, {"total_bytes": 10 * IMAGE_BYTES}]
)
def test_shrinking_to_what_is_stored_changes_nothing(size):
    memory = make_memory({0: 5, 1: 5})
    before = memory.exemplars
    memory.shrink(**size)
    assert memory.exemplars is before


def test_shrinking_with_multi_formation_counts_stored_images():
    memory = make_memory({0: 5}, factor=2)
    before, _ = memory.decoded()
    memory.shrink(images_per_class=2)
    after, _ = memory.decoded()
    assert memory.decoded_len == 8
    assert torch.equal(after, before[:8])


def test_classes_that_arrive_after_shrinking_obey_it():
    memory = make_memory({0: 5})
    memory.shrink(images_per_class=2)
    with pytest.raises(ArgumentError, match=r"5 images of class 1, but .*images=2\) leaves it 2"):
        memory.add(make_exemplars({1: 5}))


def test_a_limit_may_be_above_what_is_stored_and_holds_for_what_comes():
    memory = make_memory({0: 3, 1: 2}, budget=ImagesPerClass(5))
    before = memory.exemplars
    memory.limit(TotalImages(8))
    assert memory.exemplars is before
    assert memory.quotas_with([2, 3]) == {0: 2, 1: 2, 2: 2, 3: 2}
    memory.add(make_exemplars({2: 2, 3: 2}))
    assert memory.counts == {0: 2, 1: 2, 2: 2, 3: 2}
    memory.limit(ImagesPerClass(20))  # lifts nothing
    assert memory.quotas_with([4]) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}


def test_a_limit_below_what_is_stored_cuts_it_and_an_empty_memory_takes_one():
    memory = make_memory({0: 3, 1: 2}, budget=ImagesPerClass(5))
    memory.limit(ImagesPerClass(1))
    assert memory.counts == {0: 1, 1: 1} and allocated(memory) == 2 * IMAGE_BYTES
    empty = ExemplarMemory(budget=ImagesPerClass(5))
    empty.limit(ImagesPerClass(2))
    with pytest.raises(ArgumentError, match="3 images of class 0, but .* leaves it 2"):
        empty.add(make_exemplars({0: 3}))


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (TotalImages(1), "is 1, which is below one image for each of 2 classes"),
        (7, "`budget` is 7, which is not a budget"),
    ],
)
def test_a_limit_that_cannot_be_leaves_the_memory(bound, message):
    memory = make_memory({0: 3, 1: 2})
    before, budget = memory.exemplars, memory.budget
    with pytest.raises(ArgumentError, match=message):
        memory.limit(bound)
    assert memory.exemplars is before and memory.budget is budget


def test_a_per_class_shrink_does_not_lift_a_total():
    memory = make_memory({0: 4, 1: 4}, budget=TotalImages(8))
    memory.shrink(images_per_class=3)
    assert memory.budget == Smallest((TotalImages(8), ImagesPerClass(3)))
    assert memory.quotas_with([2, 3]) == {0: 2, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, r"`shrink` got no argument; pass exactly one of `images_per_class`"),
        (
            {"images_per_class": 1, "total_bytes": 9},
            r"`shrink` got images_per_class, total_bytes; pass exactly one",
        ),
        ({"images_per_class": 0}, r"`images_per_class` is 0; pass a whole number of at least 1"),
        ({"total_images": 2.5}, r"`total_images` is 2.5; pass a whole number of at least 1"),
        ({"images_per_class": 6}, r"`images_per_class` is 6, but only 5 are stored .* at most 5,"),
        ({"total_images": 8}, r"`total_images` is 8, but only 7 are stored .* at most 7,"),
        ({"total_bytes": 337}, r"`total_bytes` is 337, but only 336 are stored .* at most 336,"),
        ({"total_images": 1}, r"`total_images` is 1, .* each of 2 classes; pass at least 2"),
        ({"total_bytes": 95}, r"`total_bytes` is 95, .* each of 2 classes; pass at least 96"),
    ],
)
def test_shrinking_to_what_cannot_be_is_refused(size, message):
    memory = make_memory({0: 5, 1: 2})
    before = copy.deepcopy(memory)
    with pytest.raises(ArgumentError, match=message):
        memory.shrink(**size)
    assert same(memory, before)


# The budget holds, whatever happens


def bounds(budget):
    """The bounds that a budget states, as (images per class, total bytes)."""
    match budget:
        case ImagesPerClass(images):
            return images, float("inf")
        case TotalImages(images):
            return float("inf"), images * IMAGE_BYTES
        case TotalBytes(limit):
            return float("inf"), limit


budgets = st.one_of(
    st.builds(ImagesPerClass, st.integers(1, 6)),
    st.builds(TotalImages, st.integers(1, 25)),
    st.builds(TotalBytes, st.integers(IMAGE_BYTES, 25 * IMAGE_BYTES)),
)


@settings(max_examples=150, deadline=None)
@given(budgets, st.data())
def test_stored_bytes_never_exceed_the_budget(budget, data):
    """Class arrivals, returns and shrinks in any order, for every kind of budget."""
    memory = make_memory(budget=budget)
    added: dict[int, torch.Tensor] = {}  # All that was given for each class, last time.
    stated = [bounds(budget)]
    quotas: dict[int, int] = {}
    for step in range(data.draw(st.integers(1, 8), label="steps")):
        if memory.classes and data.draw(st.booleans(), label="shrink"):
            size = data.draw(
                st.one_of(
                    st.fixed_dictionaries(
                        {"images_per_class": st.integers(1, max(memory.counts.values()))}
                    ),
                    st.fixed_dictionaries(
                        {"total_images": st.integers(len(memory.classes), len(memory))}
                    ),
                    st.fixed_dictionaries(
                        {
                            "total_bytes": st.integers(
                                len(memory.classes) * IMAGE_BYTES, memory.nbytes
                            )
                        }
                    ),
                ),
                label="size",
            )
            memory.shrink(**size)
            [(name, value)] = size.items()
            kinds = {
                "images_per_class": ImagesPerClass,
                "total_images": TotalImages,
                "total_bytes": TotalBytes,
            }
            stated.append(bounds(kinds[name](value)))
        else:
            arriving = data.draw(
                st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), label="classes"
            )
            before = copy.deepcopy(memory)
            try:
                offered = memory.quotas_with(arriving, SHAPE)
            except ArgumentError:
                with pytest.raises(ArgumentError, match="below one image"):
                    memory.add(make_exemplars(dict.fromkeys(arriving, 1)))
                assert same(memory, before)
                continue
            counts = {
                label: data.draw(st.integers(1, offered[label]), label="count")
                for label in arriving
            }
            exemplars = make_exemplars(counts, seed=step)
            memory.add(exemplars)
            assert {label: memory.counts[label] for label in arriving} == counts
            added.update({label: exemplars.of_class(label) for label in arriving})
        assert allocated(memory) == memory.nbytes == len(memory) * IMAGE_BYTES
        assert max(memory.counts.values()) <= min(images for images, _ in stated)
        assert memory.nbytes <= min(limit for _, limit in stated)
        assert list(memory.counts) == list(added)
        for label, images in added.items():
            stored = memory.of_class(label)
            assert torch.equal(stored, images[: len(stored)])
        now = memory.quotas_with([])
        assert all(memory.counts[label] <= quota for label, quota in now.items())
        assert all(now[label] <= quota for label, quota in quotas.items())
        quotas = now


# Replaying


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("normalization", [None, NORMALIZATION])
def test_sampling_is_decoding_everything_and_choosing(factor, normalization):
    shape = (3, 5, 5)
    memory = make_memory({3: 4, 1: 2}, factor=factor, shape=shape, normalization=normalization)
    images, labels = memory.sample(50, generator=seeded(5))
    index = torch.randint(memory.decoded_len, (50,), generator=seeded(5))
    everything, every_label = memory.decoded()
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (50, *shape), torch.int64)
    torch.testing.assert_close(images, everything[index])
    assert torch.equal(labels, every_label[index])


@pytest.mark.parametrize("normalization", [NORMALIZATION, None], ids=["normalised", "plain"])
@pytest.mark.parametrize("formation", [Formation(1), Formation(2), Formation(1, 2)], ids=str)
def test_what_has_been_stored_is_as_stored_before_it_is_stored(formation, normalization):
    side, each = 8, formation.images_per_stored
    memory = ExemplarMemory(
        budget=ImagesPerClass(2), formation=formation, normalization=normalization
    )
    images = torch.rand(2 * each, 3, side, side, generator=seeded(0))
    seen = images if normalization is None else normalization.apply(images)
    shown = memory.as_stored(seen)  # also of a memory that is empty
    memory.add(Exemplars(formation.store(formation.pack(images)), torch.tensor([4, 4])))
    decoded = memory.decoded()[0]
    # To within half a byte, where there is nothing but bytes to lose.
    coarsest = 1 if normalization is None else min(normalization.std)
    torch.testing.assert_close(shown, decoded, rtol=0, atol=0.51 / 255 / coarsest)
    assert torch.equal(memory.as_stored(seen), shown)
    assert torch.equal(shown, seen) == (each == 1)
    half = seen.to(torch.float16)
    # Computed in float32, whatever the type.
    assert torch.equal(memory.as_stored(half), memory.as_stored(half.float()).to(torch.float16))
    double = memory.as_stored(seen.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, shown.double(), rtol=0, atol=1 / 255 / coarsest)


def test_images_are_shown_as_stored_by_the_normalization_of_now():
    first, second = (
        ExemplarMemory(budget=ImagesPerClass(2), formation=Formation(2), normalization=own)
        for own in (NORMALIZATION, None)
    )
    images = torch.randn(4, 3, 8, 8, generator=seeded(1))
    first.as_stored(images)
    first.normalization = second.normalization = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert torch.equal(first.as_stored(images), second.as_stored(images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"`images` has shape \[3, 4, 4\] and type torch.float32, but must"),
        (torch.zeros(1, *SHAPE, dtype=torch.uint8), "type torch.uint8, but must be normalised"),
        (torch.zeros(1, 3, 8, 8), r"`images` holds images of shape \(3, 8, 8\), but the stored"),
    ],
    ids=["one", "bytes", "larger"],
)
def test_images_that_could_not_be_stored_are_refused(images, message):
    with pytest.raises(ArgumentError, match=message):
        make_memory({0: 1}).as_stored(images)
    with pytest.raises(ArgumentError, match="`images` holds images of 1 channels"):
        make_memory().as_stored(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("factor", [1, 2])
def test_decoding_is_normalised_and_grouped_by_class(factor):
    memory = make_memory({3: 4, 1: 2}, factor=factor)
    images, labels = memory.decoded()
    plain, _ = memory.decoded(normalised=False)
    slow = [
        memory.formation.decode(dequantise(image[None]))
        for label in (3, 1)
        for image in memory.of_class(label)
    ]
    torch.testing.assert_close(plain, torch.cat(slow))
    torch.testing.assert_close(images, NORMALIZATION.apply(plain))
    assert labels.tolist() == [3] * 4 * factor**2 + [1] * 2 * factor**2
    assert len(images) == memory.decoded_len


def test_same_seed_same_draws_and_global_randomness_untouched():
    memory = make_memory({0: 5, 1: 5})
    state = torch.get_rng_state()
    first, second = (memory.sample(20, generator=seeded(1)) for _ in range(2))
    other = memory.sample(20, generator=seeded(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_is_uniform_over_decoded_images():
    memory = make_memory({0: 1, 1: 3}, factor=1)
    _, labels = memory.sample(4000, generator=seeded(0))
    assert abs((labels == 0).float().mean().item() - 0.25) < 0.04


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_sample_has_at_least_one_image(count):
    with pytest.raises(ArgumentError, match=rf"`count` is {count}; pass a whole number"):
        make_memory({0: 1}).sample(count, generator=seeded(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_memory_follows_what_is_added():
    memory = make_memory({0: 5})
    memory.add(make_exemplars({1: 2}).to("cuda"))
    assert memory.device.type == "cuda"
    on_cpu, _ = make_memory({0: 5}).sample(9, generator=seeded(0))
    memory.shrink(total_images=6)
    images, labels = memory.sample(9, generator=seeded(0))
    assert (images.device.type, labels.device.type) == ("cuda", "cuda")
    images, _ = memory.sample(9, generator=torch.Generator("cuda").manual_seed(0))
    assert images.shape == on_cpu.shape


# Copies and files


@pytest.mark.parametrize("counts", [None, {0: 5, 4: 2}])
def test_copies_are_equal_and_independent(counts):
    memory = make_memory(counts, budget=TotalImages(10))
    for copied in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert same(copied, memory)
        copied.add(make_exemplars({9: 1}))
        assert 9 not in memory.classes
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=False), memory)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.safetensors"


BOTH = Smallest((TotalBytes(900), ImagesPerClass(6)))


@pytest.mark.parametrize("budget", [ImagesPerClass(5), TotalImages(12), TotalBytes(900), BOTH])
@pytest.mark.parametrize("normalization", [None, NORMALIZATION])
def test_a_saved_memory_comes_back(path, budget, normalization):
    memory = make_memory({8: 5, 2: 3}, budget=budget, normalization=normalization)
    memory.save(path)
    loaded = ExemplarMemory.load(str(path))
    assert same(loaded, memory)
    assert allocated(loaded) == loaded.nbytes
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_plain_safetensors_and_says_what_it_is(path):
    memory = make_memory({8: 5, 2: 3})
    memory.save(path)
    tensors = load_file(path)
    assert torch.equal(tensors["pixels"], memory.exemplars.pixels)
    assert tensors["labels"].tolist() == [8] * 5 + [2] * 3
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    fixed = {
        "format": "dc-replay-memory",
        "format_version": "1",
        "factor": "2",
        "classes": "[8, 2]",
        "counts": "[5, 3]",
        "recipe": "idc",
        "created_by": "dc-replay",
        "torch_version": str(torch.__version__),
    }
    assert {key: metadata[key] for key in fixed} == fixed
    assert json.loads(metadata["budget"]) == {"kind": "ImagesPerClass", "images": 5}
    assert json.loads(metadata["normalization"]) == {
        "mean": list(NORMALIZATION.mean),
        "std": list(NORMALIZATION.std),
    }
    assert {"dc_replay_version", "safetensors_version"} <= set(metadata)


def test_equal_memories_are_equal_files_in_every_process(path):
    make_memory({8: 5, 2: 3}).save(path)
    other = path.with_name("other.safetensors")
    code = (
        "import sys; from dc_replay.memory import ExemplarMemory; "
        "ExemplarMemory.load(sys.argv[1]).save(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, path, other], check=True)
    assert path.read_bytes() == other.read_bytes()


def test_a_loaded_memory_does_not_depend_on_its_file(path):
    memory = make_memory({0: 5})
    memory.save(path)
    loaded = ExemplarMemory.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(loaded, memory)


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    memory = make_memory({0: 5})
    memory.save(path)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    memory.shrink(images_per_class=1)
    with pytest.raises(DCReplayError, match="could not be written: no space; what it held before"):
        memory.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_path_that_cannot_be_written_is_named(path):
    memory = make_memory({0: 1})
    with pytest.raises(ArgumentError, match=r"`path` is .*, which is a folder; name a file in it"):
        memory.save(path.parent)
    with pytest.raises(ArgumentError, match=r"`path` is .*, whose folder does not exist; create"):
        memory.save(path / "memory.safetensors")


def test_loading_can_change_the_budget(path):
    make_memory({0: 5, 1: 5}).save(path)
    assert ExemplarMemory.load(path, budget=TotalImages(30)).budget == TotalImages(30)
    for small in (ImagesPerClass(4), TotalImages(1)):
        message = rf"`budget` is {re.escape(str(small))}, but .*memory.safetensors holds more"
        with pytest.raises(ArgumentError, match=message + ".*load the file without `budget` and"):
            ExemplarMemory.load(path, budget=small)
    with pytest.raises(ArgumentError, match=r"`budget` is 20, which is not a budget"):
        ExemplarMemory.load(path, budget=20)


class Two:
    """A user's own budget."""

    def quotas(self, classes, *, image_bytes):
        return dict.fromkeys(classes, 2)


@pytest.mark.parametrize("budget", [Two(), Smallest((TotalImages(9), Two()))])
def test_a_budget_of_the_users_own_is_given_again(path, budget):
    make_memory({0: 2}, budget=budget).save(path)
    with pytest.raises(MemoryFileError, match=r"memory.safetensors: .* budget that .* pass `budg"):
        ExemplarMemory.load(path)
    assert ExemplarMemory.load(path, budget=budget).counts == {0: 2}


def test_a_missing_file_is_named(path):
    with pytest.raises(MemoryFileError, match=r"memory.safetensors: there is no such file; check"):
        ExemplarMemory.load(path)


def test_a_folder_is_no_memory_file(tmp_path):
    with pytest.raises(MemoryFileError, match="this is a folder; name the file that was saved"):
        ExemplarMemory.load(tmp_path)


def test_a_file_cut_short_anywhere_is_refused(path):
    make_memory({0: 5}).save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(MemoryFileError, match=r"memory.safetensors: this is not a whole safet"):
            ExemplarMemory.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all",
        b"\xff" * 64,
        (1 << 62).to_bytes(8, "little") + b"{}",
        pickle.dumps({"pixels": 1}),
    ],
)
def test_another_kind_of_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(MemoryFileError, match=r"memory.safetensors: this is not a whole safetens"):
        ExemplarMemory.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[5,3,4,4]', b'"shape":[6,3,4,4]'),
        (b'"data_offsets":[40,280]', b'"data_offsets":[40,270]'),
        (b'"dtype":"U8"', b'"dtype":"F9"'),
    ],
)
def test_a_header_that_contradicts_the_data_is_refused(path, old, new):
    make_memory({0: 5}).save(path)
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(MemoryFileError, match="this is not a whole safetensors file"):
        ExemplarMemory.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, r"`format` is None, expected 'dc-replay-memory'; .* not one that"),
        ({"format": "gguf"}, r"`format` is 'gguf', expected 'dc-replay-memory'"),
        (
            {"format_version": "3"},
            r"`format_version` is '3', but this release reads '1' and '2'",
        ),
        ({"format_version": "2"}, "the metadata has no `compression`"),
        (
            {"format_version": "2", "compression": "1"},
            r"`compression`.* cannot be used \(`compression` is 1, which is of the other version",
        ),
        (
            {"format_version": "2", "compression": "0"},
            r"`compression`.* cannot be used \(`compression` must be",
        ),
        (
            {"format_version": "2", "compression": "200"},
            r"`compression`.* cannot be used \(`compression` is too high",
        ),
        ({"format_version": "2", "compression": "4.0"}, "`compression`.* cannot be used"),
        ({"factor": None}, r"the metadata has no `factor`; the file is damaged or was edited"),
        ({"recipe": None}, r"the metadata has no `recipe`"),
        ({"counts": None}, r"the metadata has no `counts`"),
        (
            {"factor": "two"},
            r"`factor`, `compression`, `normalization` or `budget` cannot be used \(invalid lit",
        ),
        ({"factor": "0"}, r"cannot be used \(`factor` must be a whole number"),
        ({"factor": "99"}, r"cannot be used \(`factor` is 99, which leaves whole crops outside"),
        (
            {"factor": "9" * 5000},
            r"`factor`, `compression`, `normalization` or `budget` cannot be used",
        ),
        ({"classes": "[0"}, r"`classes` is '\[0', expected JSON"),
        ({"classes": "[" * 100_000}, r"`classes` is '\[+', expected JSON"),
        ({"classes": "[]"}, r"`classes` is \[\], expected a list of whole numbers, not empty"),
        ({"classes": "[0, true]"}, r"`classes` is \[0, True\], expected a list of whole numbers"),
        ({"classes": f"[0, {2**63}]"}, r"`classes` is .*, expected a list of whole numbers"),
        ({"classes": '{"0": 1}'}, r"`classes` is .*, expected a list of whole numbers"),
        ({"classes": "[0, 0]"}, r"classes \[0, 0\] with counts \[5, 2\], expected distinct"),
        ({"counts": "[7]"}, r"classes \[0, 1\] with counts \[7\], expected distinct"),
        ({"counts": "[8, -1]"}, r"with counts \[8, -1\], expected .* at least 1 for each"),
        ({"counts": "[5, 3]"}, r"`counts` add up to 8, but `pixels` holds 7 images"),
        ({"counts": "[4, 3]"}, r"`labels` disagrees with the metadata `classes` and `counts`"),
        ({"classes": "[1, 0]"}, r"`labels` disagrees with the metadata `classes` and `counts`"),
        ({"normalization": "[1]"}, r"`normalization` or `budget` cannot be used"),
        ({"normalization": '{"mean": [0], "std": [0]}'}, r"cannot be used \(`mean` and `std` must"),
        ({"normalization": '{"mean": [NaN], "std": [1]}'}, r"cannot be used \(`mean` and `std` "),
        ({"normalization": '{"mean": [0], "std": [1]}'}, r"`normalization` is for 1 channels, but"),
        ({"budget": '{"kind": "Endless"}'}, r"cannot be used \('Endless'\)"),
        ({"budget": '"ImagesPerClass"'}, r"`normalization` or `budget` cannot be used"),
        ({"budget": '{"kind": "ImagesPerClass"}'}, r"`normalization` or `budget` cannot be used"),
        ({"budget": '{"kind": "ImagesPerClass", "images": 0}'}, r"cannot be used \(`images` is 0"),
        (
            {"budget": '{"kind": "Smallest", "budgets": ["TotalImages"]}'},
            r"`budget` cannot be used",
        ),
        ({"budget": '{"kind": "Smallest", "budgets": [{"kind": "Smallest"}]}'}, r"\('Smallest'\)"),
        ({"budget": '{"kind": ["TotalImages"]}'}, r"`normalization` or `budget` cannot be used"),
        ({"budget": '{"kind": "Smallest", "budgets": []}'}, r"cannot be used \(`budgets` of Small"),
        (
            {"budget": '{"kind": "ImagesPerClass", "images": 3}'},
            r"holds more than its own budget allows .* pass a larger `budget`",
        ),
    ],
)
def test_metadata_that_lies_is_refused(path, changes, message):
    make_memory({0: 5, 1: 2}).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {key: v for key, v in metadata.items() if v is not None})
    with pytest.raises(MemoryFileError, match=message) as caught:
        ExemplarMemory.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"the tensors are \['pixels'\], expected \['labels', 'pixels'\]"),
        ({"more": torch.zeros(1)}, r"the tensors are \['labels', 'more', 'pixels'\], expected"),
        ({"pixels": torch.zeros(7, 3, 4, 4)}, r"`pixels` is F32 of shape \[7, 3, 4, 4\], expected"),
        ({"pixels": torch.zeros(7, 4, 4).byte()}, r"`pixels` is U8 of shape \[7, 4, 4\], expected"),
        ({"pixels": torch.zeros(7, 0, 4, 4).byte()}, r"`pixels` is U8 of shape \[7, 0, 4, 4\], ex"),
        ({"labels": torch.zeros(7).int()}, r"`labels` is I32 of shape \[7\], expected I64"),
        ({"labels": torch.zeros(6).long()}, r"`labels` is I64 of shape \[6\], expected .* \[7\]"),
    ],
)
def test_tensors_of_another_kind_are_refused(path, changes, message):
    make_memory({0: 5, 1: 2}).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path) | changes
    save_file({key: v for key, v in tensors.items() if v is not None}, path, metadata)
    with pytest.raises(MemoryFileError, match=message):
        ExemplarMemory.load(path)


def test_compression_is_saved_and_comes_back(tmp_path):
    formation = Formation(2, compression=2)
    memory = ExemplarMemory(budget=TotalBytes(10 * 3 * 64), formation=formation)
    pixels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=seeded(0))
    memory.add(Exemplars(pixels, torch.tensor([0, 0, 0, 1, 1, 1])))
    assert memory.nbytes == 6 * 3 * 64 and memory.decoded_len == 6 * 8
    memory.save(tmp_path / "file")
    found = ExemplarMemory.load(tmp_path / "file")
    assert found.formation == formation
    for one, other in zip(memory.decoded(), found.decoded(), strict=True):
        assert torch.equal(one, other)
    drawn, labels = found.sample(40, generator=seeded(3))
    index = torch.randint(found.decoded_len, (40,), generator=seeded(3))
    torch.testing.assert_close(drawn, found.decoded()[0][index])
    assert torch.equal(labels, found.decoded()[1][index])
    whole = found.decoded()[0]
    found.shrink(images_per_class=1)
    assert torch.equal(found.decoded()[0], torch.cat([whole[:8], whole[24:32]]))


def test_a_budget_of_ones_own_kind_is_not_written(tmp_path):
    """It could not be made again from its name."""

    class Half(ImagesPerClass):
        pass

    path = tmp_path / "memory.safetensors"
    make_memory({8: 2}, budget=Half(3)).save(path)
    with pytest.raises(MemoryFileError, match="budget that it cannot describe; pass `budget`"):
        ExemplarMemory.load(path)
    assert ExemplarMemory.load(path, budget=Half(3)).counts == {8: 2}
