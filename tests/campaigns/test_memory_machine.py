"""A memory against a dictionary of lists, whatever is done to it in whatever order."""

import copy
import math
import operator
import pickle
from math import prod

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dc_replay.budgets import ImagesPerClass, Smallest, TotalBytes, TotalImages
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.pixels import Normalization

SHAPE = (2, 2, 3)
IMAGE_BYTES = prod(SHAPE)
FITTING = Normalization((0.5, 0.4), (0.2, 0.3))
UNFITTING = Normalization((0.5,), (0.2,))
KINDS = {
    "images_per_class": ImagesPerClass,
    "total_images": TotalImages,
    "total_bytes": TotalBytes,
}
labels = st.sampled_from([0, 1, 2, 7, -1, 2**63 - 1, -(2**63)])
sizes = st.one_of(
    st.integers(-2, 12),
    st.integers(0, 20).map(lambda images: images * IMAGE_BYTES),
    st.integers(0, 300),
    st.sampled_from(
        [None, True, 2.0, 1.5, math.nan, math.inf, "3", "", [], np.int64(3), np.float32(2)]
    ),
)
bounds = st.one_of(
    st.tuples(st.just("images_per_class"), st.integers(1, 8)),
    st.tuples(st.just("total_images"), st.integers(1, 40)),
    st.tuples(st.just("total_bytes"), st.integers(1, 40 * IMAGE_BYTES)),
)


def whole(value):
    """The number that a size stands for; 0 where it is none."""
    if isinstance(value, (bool, np.bool_)):
        return 0
    try:
        return operator.index(value)
    except TypeError:
        return 0


def room(stated, classes):
    """What all bounds together leave each class; None where one has no room for them."""
    most = dict.fromkeys(classes, math.inf)
    for name, number in stated:
        if name == "images_per_class":
            shares = dict.fromkeys(classes, number)
        else:
            images = number if name == "total_images" else number // IMAGE_BYTES
            if images < len(most):
                return None
            shares = {
                label: images // len(most) + (place < images % len(most))
                for place, label in enumerate(most)
            }
        most = {label: min(most[label], shares[label]) for label in most}
    return most


def budget_of(stated):
    budgets = [KINDS[name](number) for name, number in stated]
    return budgets[0] if len(budgets) == 1 else Smallest(tuple(budgets))


def exemplars_of(counts, seed, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    size = (sum(counts.values()), *shape)
    pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    each = torch.tensor(list(counts.values()))
    return Exemplars(pixels, torch.tensor(list(counts)).repeat_interleave(each))


def pickled(memory):
    return pickle.loads(pickle.dumps(memory))


def plain(pixels):
    """Each image as bytes."""
    return [image.numpy().tobytes() for image in pixels]


def zeros(count, *shape, dtype=torch.uint8):
    return torch.zeros((count, *shape), dtype=dtype)


def numbers(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


# Made where they are added, because some cannot even be made.
UNFIT = {
    "floating point": lambda: Exemplars(zeros(1, *SHAPE, dtype=torch.float32), numbers(0)),
    "signed bytes": lambda: Exemplars(zeros(1, *SHAPE, dtype=torch.int8), numbers(0)),
    "one image": lambda: Exemplars(zeros(*SHAPE), numbers(0, 0)),
    "five dimensions": lambda: Exemplars(zeros(1, 1, *SHAPE), numbers(0)),
    "no images": lambda: Exemplars(zeros(0, *SHAPE), numbers()),
    "no rows": lambda: Exemplars(zeros(1, 2, 0, 3), numbers(0)),
    "no channels": lambda: Exemplars(zeros(1, 0, 2, 3), numbers(0)),
    "short labels": lambda: Exemplars(zeros(2, *SHAPE), numbers(0)),
    "no labels": lambda: Exemplars(zeros(2, *SHAPE), numbers()),
    "one label": lambda: Exemplars(zeros(1, *SHAPE), torch.tensor(0)),
    "labels in columns": lambda: Exemplars(zeros(2, *SHAPE), numbers(0, 0)[:, None]),
    "int32 labels": lambda: Exemplars(zeros(1, *SHAPE), numbers(0, dtype=torch.int32)),
    "uint8 labels": lambda: Exemplars(zeros(1, *SHAPE), numbers(0, dtype=torch.uint8)),
    "fractions": lambda: Exemplars(zeros(1, *SHAPE), numbers(0.5, dtype=torch.float32)),
    "scattered": lambda: Exemplars(zeros(3, *SHAPE), numbers(0, 1, 0)),
    "none": lambda: None,
    "a tensor": lambda: zeros(1, *SHAPE),
    "a pair": lambda: (zeros(1, *SHAPE), numbers(0)),
    "a number": lambda: 3,
    "a type": lambda: Exemplars,
}


class Memories(RuleBasedStateMachine):
    """One memory; beside it all bounds ever stated and the bytes of each class's images.

    ``images`` is what must be stored now, and ``added`` what each class was last given.
    """

    def __init__(self, tried, folder):
        super().__init__()
        self.tried = tried
        self.path = folder / "memory.safetensors"
        self.images: dict[int, list[bytes]] = {}
        self.added: dict[int, list[bytes]] = {}
        self.draws = 0

    @initialize(
        stated=st.lists(bounds, min_size=1, max_size=2),
        factor=st.sampled_from([1, 2]),
        normalization=st.sampled_from([FITTING, None, FITTING, None, UNFITTING]),
    )
    def begin(self, stated, factor, normalization):
        self.stated = list(stated)
        self.memory = ExemplarMemory(
            budget=budget_of(stated),
            formation=Formation(factor),
            normalization=normalization,
            recipe="idc",
        )

    def state(self):
        memory = self.memory
        everything = memory.exemplars
        return (
            None if everything is None else plain(everything.pixels),
            list(memory.counts.items()),
            memory.labels.tolist(),
            memory.budget,
            memory.formation,
            memory.normalization,
            memory.recipe,
        )

    def works(self, call, *args, **options):
        outcome = self.tried(call, *args, **options)
        assert outcome.error is None, f"refused: {outcome.error}"
        return outcome.value

    def is_refused(self, call, *args, **options):
        before = self.state()
        assert self.tried(call, *args, **options).error is not None, "this was not refused"
        assert self.state() == before

    def cut(self):
        most = room(self.stated, self.images)
        self.images = {label: found[: most[label]] for label, found in self.images.items()}

    @rule(
        arriving=st.dictionaries(labels, st.integers(1, 9), min_size=1, max_size=4),
        fitting=st.booleans(),
    )
    def add(self, arriving, fitting):
        classes = list(dict.fromkeys([*self.images, *arriving]))
        most = room(self.stated, classes)
        if fitting and most is not None:
            arriving = {label: min(count, most[label]) for label, count in arriving.items()}
        self.draws += 1
        exemplars = exemplars_of(arriving, self.draws)
        if (
            most is None
            or any(count > most[label] for label, count in arriving.items())
            or self.memory.normalization == UNFITTING
        ):
            self.is_refused(self.memory.add, exemplars)
            return
        self.works(self.memory.add, exemplars)
        new = {label: plain(exemplars.of_class(label)) for label in arriving}
        self.images = {label: self.images.get(label, []) for label in classes}
        self.cut()
        self.images |= new
        self.added |= new
        exemplars.pixels.zero_()  # the memory's are its own

    @rule(name=st.sampled_from(sorted(UNFIT)))
    def add_what_is_unfit(self, name):
        self.is_refused(lambda: self.memory.add(UNFIT[name]()))

    @precondition(lambda self: self.images)
    @rule(
        shape=st.tuples(*[st.integers(1, 4)] * 3).filter(lambda shape: shape != SHAPE),
        label=labels,
    )
    def add_another_shape(self, shape, label):
        self.is_refused(self.memory.add, exemplars_of({label: 1}, 0, shape))

    def sizes_that_fit(self, name):
        """The least and the most that the memory can be shrunk to; none while it is empty."""
        counts = [len(images) for images in self.images.values()]
        if name == "images_per_class":
            return 1, max(counts, default=0)
        each = IMAGE_BYTES if name == "total_bytes" else 1
        return max(1, len(counts) * each), sum(counts) * each

    @rule(name=st.sampled_from(sorted(KINDS)), size=sizes)
    def shrink(self, name, size):
        least, most = self.sizes_that_fit(name)
        if not least <= whole(size) <= most:
            self.is_refused(self.memory.shrink, **{name: size})
            return
        self.works(self.memory.shrink, **{name: size})
        self.stated.append((name, whole(size)))
        self.cut()

    @precondition(lambda self: self.images)
    @rule(name=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1))
    def shrink_to_a_share(self, name, share):
        least, most = self.sizes_that_fit(name)
        self.shrink(name, least + round(share * (most - least)))

    @rule(names=st.sets(st.sampled_from(sorted(KINDS))).filter(lambda names: len(names) != 1))
    def shrink_by_none_or_several(self, names):
        self.is_refused(self.memory.shrink, **dict.fromkeys(names, 1))

    @rule(stated=st.lists(bounds, min_size=1, max_size=3))
    def limit(self, stated):
        if room([*self.stated, *stated], self.images) is None:
            self.is_refused(self.memory.limit, budget_of(stated))
            return
        self.works(self.memory.limit, budget_of(stated))
        self.stated += stated
        self.cut()

    @rule(bound=st.sampled_from([None, 7, "TotalImages", (), ImagesPerClass, math.nan]))
    def limit_by_no_budget(self, bound):
        self.is_refused(self.memory.limit, bound)

    @rule(count=sizes, seed=st.integers(0, 99))
    def sample(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        if not self.images or whole(count) < 1:
            self.is_refused(self.memory.sample, count, generator=generator)
            return
        images, drawn = self.works(self.memory.sample, count, generator=generator)
        assert images.shape == (count, *SHAPE) and drawn.shape == (count,)
        assert images.isfinite().all() and set(drawn.tolist()) <= set(self.images)
        everything, _ = self.memory.decoded()
        apart = (images[:, None] - everything).abs().sum(dim=(2, 3, 4)).amin(dim=1)
        torch.testing.assert_close(apart, torch.zeros(count))

    @rule(normalised=st.booleans())
    def decoded(self, normalised):
        if not self.images:
            self.is_refused(self.memory.decoded, normalised=normalised)
            return
        images, every_label = self.works(self.memory.decoded, normalised=normalised)
        each = self.memory.formation.images_per_stored
        assert every_label.tolist() == [
            label for label, stored in self.images.items() for _ in range(len(stored) * each)
        ]
        assert len(images) == self.memory.decoded_len == len(every_label)

    @rule(label=st.one_of(labels, st.sampled_from([5, -3, 0.5, None, "0", math.nan])))
    def of_class(self, label):
        if label not in self.images:
            self.is_refused(self.memory.of_class, label)
            return
        self.works(self.memory.of_class, label).zero_()  # a copy

    @rule(new=st.lists(labels, max_size=3))
    def quotas_with(self, new):
        most = room(self.stated, [*self.images, *new])
        if most is None:
            self.is_refused(self.memory.quotas_with, new, SHAPE)
            return
        found = self.works(self.memory.quotas_with, new, SHAPE)
        assert list(found.items()) == list(most.items())

    @rule(
        shape=st.sampled_from(
            [(), (2, 2), (1, 2, 2, 3), (2, 0, 3), (2, 2, -3), (2.0, 2, 3), (2, 2, math.nan)]
        )
    )
    def quotas_with_no_shape(self, shape):
        self.is_refused(self.memory.quotas_with, [0], shape)

    @rule()
    def save_and_load(self):
        if not self.images:
            self.is_refused(self.memory.save, self.path)
            return
        before = self.state()
        self.works(self.memory.save, self.path)
        assert [entry.name for entry in self.path.parent.iterdir()] == [self.path.name]
        self.memory = self.works(ExemplarMemory.load, self.path)
        assert self.state() == before

    @rule(copied=st.sampled_from([copy.deepcopy, pickled]))
    def go_on_with_a_copy(self, copied):
        before, original = self.state(), self.memory
        self.memory = copied(original)
        if self.images:
            original.exemplars.pixels.zero_()
            original.limit(ImagesPerClass(1))
        assert self.state() == before

    @rule(
        normalization=st.sampled_from(
            [None, FITTING, UNFITTING, Normalization([0.5, 0.4], [0.2, 0.3])]
        )
    )
    def set_normalization(self, normalization):
        call = lambda: setattr(self.memory, "normalization", normalization)  # noqa: E731
        if self.images and normalization != self.memory.normalization:
            self.is_refused(call)
            return
        self.works(call)
        assert self.memory.normalization == normalization

    @rule(normalization=st.sampled_from([0.5, "none", (), ((0.5, 0.4), (0.2, 0.3)), math.nan]))
    def set_no_normalization(self, normalization):
        self.is_refused(lambda: setattr(self.memory, "normalization", normalization))

    @invariant()
    def it_holds_what_it_should(self):
        memory = self.memory
        counts = {label: len(images) for label, images in self.images.items()}
        assert list(memory.counts.items()) == list(counts.items())
        assert memory.classes == tuple(self.images)
        for label, images in self.images.items():
            assert plain(memory.of_class(label)) == images == self.added[label][: len(images)]
            assert images

    @invariant()
    def no_bound_is_exceeded(self):
        for name, number in self.stated:
            held = {
                "images_per_class": max(self.memory.counts.values(), default=0),
                "total_images": len(self.memory),
                "total_bytes": self.memory.nbytes,
            }
            assert held[name] <= number

    @invariant()
    def it_keeps_one_allocation_and_no_more(self):
        memory = self.memory
        assert len(memory) == sum(map(len, self.images.values()))
        assert memory.nbytes == len(memory) * IMAGE_BYTES
        if memory.exemplars is not None:
            pixels = memory.exemplars.pixels
            assert pixels.is_contiguous()
            assert pixels.untyped_storage().nbytes() == memory.nbytes
            assert memory.labels.untyped_storage().nbytes() == 8 * len(memory)


def test_a_memory_does_what_a_dictionary_of_lists_would(tried, tmp_path):
    run_state_machine_as_test(
        lambda: Memories(tried, tmp_path), settings=settings.get_profile("campaign")
    )
