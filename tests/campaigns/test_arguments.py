"""Whatever is passed to a public argument is used, or refused in the package's own words."""

import functools
import inspect
import math
import operator
import os
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_replay import (
    BidirectionalMatching,
    CondensedBuffer,
    CondensedReplayPlugin,
    DeviceResident,
    DistillationPlugin,
    ExemplarMemory,
    Exemplars,
    Formation,
    GradientMatching,
    ImagesPerClass,
    LogitAdjustmentPlugin,
    MatchStoragePlugin,
    MemoryOnlyPlugin,
    Multisize,
    NetworkTraining,
    Normalization,
    OnReal,
    OnSynthetic,
    PixelStep,
    Smallest,
    SubsetMatching,
    TotalBytes,
    TotalImages,
    Uniform,
    recipes,
)
from dc_replay.augment import Color, Crop, CutMix, Cutout, Flip, Rotate, Scale
from dc_replay.errors import MemoryFileError
from dc_replay.experiences import gather
from dc_replay.networks import convnet_for
from dc_replay.sampling import Representative

CAMPAIGN, SLOW = settings.get_profile("campaign"), settings.get_profile("slow campaign")
# With pytest's settings here a warning of the package's would be an exception of another kind.
pytestmark = pytest.mark.filterwarnings("ignore")


SILLY = [
    *(None, True, False, 0, 1, 2, 3, 5, -1, 2**63, -(2**63) - 1, 10**30, 10**400),
    *(-(10**400), 0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -0.5, 1e-320, 1e300, math.nan, math.inf),
    *(-math.inf, 1j, Fraction(1, 2), Decimal("0.5"), Decimal("nan")),
    *(np.int64(2), np.uint8(0), np.int8(-1), np.float32(0.5), np.float64("nan"), np.bool_(True)),
    *(np.array(2), np.array([1, 2]), np.array([]), np.array(["x"])),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor([1, 2]), torch.zeros(0), torch.zeros(1, 1)),
    *("", "2", "nan", "auto", "x" * 300, "a\0b", "\ud800", b"", b"2"),
    *((), [], {}, set(), (1,), [0.5], (2.0, 0.5), [None], ["x"], [[1]], [True], [math.nan]),
    *([10**400], ["2"], {"a": 1}, {0: 1}, {0: None}, {0: -1}, {0: 1.5}, {2}, range(2)),
    *(object(), ..., NotImplemented, int, len, torch.nn.Linear(1, 1)),
    *(ImagesPerClass, ImagesPerClass(2), (ImagesPerClass(2),), [TotalImages(3), None]),
    *(Normalization, Normalization((0.5,), (0.2,)), Formation(2), recipes.idc, recipes.random()),
    torch.Generator(),
]
huge = st.integers(2**63, 2**70)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 40),
    huge,
    huge.map(operator.neg),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.floats() | st.integers(-3, 3) | st.none() | st.text(max_size=2), max_size=3),
    st.dictionaries(st.integers(-1, 2), st.integers(-1, 3) | st.floats(), max_size=2),
    st.floats(width=32).map(np.float32),
    st.integers(-9, 40).map(np.int64),
    st.fractions(),
)


# What an argument may be: True if it must be taken, False if it must be refused, None if either.


def truth(value):
    return isinstance(value, (bool, np.bool_))


def array(value):
    return isinstance(value, (np.ndarray, torch.Tensor))


def whole(least, most=2**40, *, plain=False):
    """Whole numbers; those of numpy must be taken, unless ``plain`` ones are asked for."""

    def usable(value):
        if truth(value) or array(value) or (plain and isinstance(value, np.integer)):
            return None if truth(value) or value.ndim == 0 else False
        if not isinstance(value, (int, np.integer)):
            return False
        return None if value > most else bool(value >= least)

    return usable


def number(least, most=math.inf, *, open=False):
    """Real numbers in a range, whose ends ``open`` leaves out; huge ones in it may be either."""

    def usable(value):
        if truth(value) or array(value) or isinstance(value, (Fraction, Decimal)):
            return None
        if not isinstance(value, (int, float, np.integer, np.floating)):
            return False
        if value == math.inf:
            return None if most == math.inf else False
        inside = least < value < most if open else least <= value <= most
        return None if inside and abs(value) > 2**62 else bool(inside)

    return usable


def taking(count):
    """Whether it can be called with so many arguments, as far as it says."""

    def usable(value):
        if not callable(value):
            return False
        try:
            inspect.signature(getattr(value, "forward", value)).bind(*[None] * count)
        except TypeError:
            return False
        except ValueError:
            return True
        return True

    return usable


def of_one(value):
    return taking(1)(value) and not isinstance(value, type)


def optional(usable):
    return lambda value: True if value is None else usable(value)


def one_of(*kinds):
    return lambda value: isinstance(value, kinds)


def either(value):
    return None


def never(value):
    return False


def sequence(value):
    """One finite number in a list or tuple; others are not asked for, but text is none."""
    if isinstance(value, (list, tuple)):
        return number(-math.inf)(value[0]) if len(value) == 1 else False
    return None if array(value) or isinstance(value, (dict, set, range)) else False


def triple(value):
    try:
        return None if len(value) == 3 else False
    except TypeError:
        return False


def positive(value):
    """Likewise, and one whose inverse is a number, too."""
    fitting = sequence(value)
    return (None if abs(value[0]) < 1e-30 else value[0] > 0) if fitting else fitting


def factory(value):
    """What can be called is asked for a network, and may raise whatever it likes."""
    if callable(value) and not isinstance(value, torch.nn.Module):
        return None
    return value is None


def path(value):
    return None if isinstance(value, (str, os.PathLike)) else False


# Calls with one argument open


BUDGET = ImagesPerClass(2)
ONE = Exemplars(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([1, 1]))
IMAGES, LABELS = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 0])


def generator():
    return torch.Generator().manual_seed(0)


def memory(**options):
    found = ExemplarMemory(**{"budget": BUDGET, **options})
    found.add(ONE)
    return found


def empty(**options):
    return ExemplarMemory(**{"budget": BUDGET, **options})


def with_normalization(value):
    found = empty()
    found.normalization = value
    return found


def loaded(**options):
    memory().save("memory.safetensors")
    return ExemplarMemory.load(**{"path": "memory.safetensors", **options})


def buffer(**options):
    return CondensedBuffer(**{"condenser": recipes.random(factor=2), "budget": BUDGET, **options})


def resized(value):
    found = buffer(max_size=8)
    found.resize(None, value)
    return found


def with_memory(value):
    found = buffer()
    found.memory = value
    return found


def replay(**options):
    return CondensedReplayPlugin(**{"condenser": recipes.random(), "budget": BUDGET, **options})


def matching(**options):
    return MatchStoragePlugin(buffer(), **options)


def memory_only(**options):
    return MemoryOnlyPlugin(**{"condenser": recipes.random(), "budget": BUDGET, **options})


def condenser(**parts):
    return replace(recipes.idc(), **parts)


def subsets(**options):
    found = SubsetMatching(**options)
    return found, found.weight_at(0.5)


def step(**options):
    found = PixelStep(**options)
    optimizer = found.optimizer([torch.zeros(2, 1, 2, 2, requires_grad=True)])
    found.set_rate(optimizer, 0.5)
    return found


def condensed(**options):
    arguments = {"images": IMAGES, "labels": LABELS, "quotas": 1, "generator": generator()}
    network = options.pop("network", convnet_for((1, 4, 4), width=2))
    built = recipes.random(network=network)
    if "checkpoint" in options:
        built = replace(recipes.dm(network=network, outer=1, inner=1), precision="float32")
    found = built.condense(**{**arguments, **options})
    return found.exemplars.pixels.shape, found.exemplars.labels


class Items:
    """A dataset that yields whatever it is given."""

    def __init__(self, *items, tasks=False):
        self.items = items
        if tasks:
            self.targets_task_labels = [0] * len(items)

    def eval(self):
        return self

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def gathered(**options):
    experience = SimpleNamespace(dataset=Items((torch.zeros(1, 4, 4), 0)))
    arguments = {"experience": experience, "device": "cpu", "generator": generator()}
    return gather(**{**arguments, **options})


def named(make, name, **others):
    return lambda value: make(**others, **{name: value})


normalization = optional(one_of(Normalization))
budget = one_of(ImagesPerClass, TotalImages, TotalBytes, Smallest)
ARGUMENTS = {
    "ImagesPerClass.images": (ImagesPerClass, whole(1)),
    "TotalImages.images": (TotalImages, whole(1)),
    "TotalBytes.bytes": (TotalBytes, whole(1)),
    "Smallest.budgets": (
        Smallest,
        lambda v: v == (ImagesPerClass(2),) if type(v) is tuple else False,
    ),
    "quotas.classes": (lambda v: BUDGET.quotas(v, image_bytes=9), either),
    "quotas.image_bytes": (lambda v: BUDGET.quotas([0], image_bytes=v), whole(1)),
    "Formation.factor": (Formation, whole(1, plain=True)),
    "Normalization.mean": (lambda v: Normalization(v, (1.0,)), sequence),
    "Normalization.std": (
        lambda v: Normalization((0.5,), v).apply(torch.zeros(1, 1, 1, 1)),
        positive,
    ),
    "Normalization.identity.channels": (Normalization.identity, whole(1, 99)),
    "Normalization.from_range.low": (lambda v: Normalization.from_range(v, (1.0,)), sequence),
    "Normalization.from_range.high": (
        lambda v: Normalization.from_range((0.0,), v),
        lambda v: positive(v) or (sequence(v) and (v[0] < 0 or None)),
    ),
    "Exemplars.pixels": (lambda v: Exemplars(v, LABELS), never),
    "Exemplars.labels": (lambda v: Exemplars(IMAGES[:1], v), never),
    "Exemplars.of_class.label": (ONE.of_class, either),
    "Exemplars.prefix.quotas": (ONE.prefix, lambda v: None if isinstance(v, dict) else False),
    "Exemplars.prefix.quotas.value": (lambda v: ONE.prefix({1: v}), whole(0)),
    "ExemplarMemory.budget": (named(empty, "budget"), budget),
    "ExemplarMemory.formation": (named(empty, "formation"), one_of(Formation)),
    "ExemplarMemory.normalization": (named(empty, "normalization"), normalization),
    "ExemplarMemory.recipe": (named(empty, "recipe"), one_of(str)),
    "memory.normalization": (with_normalization, normalization),
    "memory.quotas_with.new_classes": (lambda v: memory().quotas_with(v), either),
    "memory.quotas_with.image_shape": (
        lambda v: empty().quotas_with([0], v),
        triple,
    ),
    "memory.add.exemplars": (lambda v: memory().add(v), never),
    "memory.shrink.images_per_class": (
        lambda v: memory().shrink(images_per_class=v),
        lambda v: whole(1)(v) if array(v) or truth(v) or not whole(3)(v) else False,
    ),
    "memory.limit.bound": (lambda v: memory().limit(v), budget),
    "memory.sample.count": (lambda v: memory().sample(v, generator=generator()), whole(1, 99)),
    "memory.sample.generator": (
        lambda v: memory().sample(1, generator=v),
        one_of(torch.Generator),
    ),
    "memory.of_class.label": (lambda v: memory().of_class(v), either),
    "memory.save.path": (lambda v: memory().save(v), path),
    "ExemplarMemory.load.path": (ExemplarMemory.load, path),
    "ExemplarMemory.load.budget": (named(loaded, "budget"), optional(budget)),
    "Condenser.formation": (named(condenser, "formation"), one_of(Formation)),
    "Condenser.outer": (named(condenser, "outer"), whole(1)),
    "Condenser.inner": (named(condenser, "inner"), whole(1)),
    "Condenser.warm_up": (named(condenser, "warm_up"), whole(0)),
    "Condenser.most_decoded": (named(condenser, "most_decoded"), whole(1)),
    "Condenser.classes_at_once": (named(condenser, "classes_at_once"), optional(whole(1))),
    "Condenser.seconds": (named(condenser, "seconds"), optional(number(0, open=True))),
    "random.factor": (named(recipes.random, "factor"), whole(1, plain=True)),
    "idc.factor": (named(recipes.idc, "factor"), whole(1, plain=True)),
    "dsa.factor": (named(recipes.dsa, "factor"), whole(1, plain=True)),
    "dream_plus.outer": (named(recipes.dream_plus, "outer"), whole(1)),
    "dm.inner": (named(recipes.dm, "inner"), whole(1)),
    "dsa.inner": (named(recipes.dsa, "inner"), optional(whole(1))),
    "dc.seconds": (named(recipes.dc, "seconds"), optional(number(0, open=True))),
    "dc.ipc": (named(recipes.dc, "ipc"), whole(1)),
    "dsa.ipc": (named(recipes.dsa, "ipc"), whole(1)),
    "herding.epochs": (named(recipes.herding, "epochs"), whole(0)),
    "k_center.epochs": (named(recipes.k_center, "epochs"), whole(0)),
    "representative.epochs": (named(recipes.representative, "epochs"), whole(0)),
    "forgetting.epochs": (named(recipes.forgetting, "epochs"), whole(2)),
    "recipe.name": (recipes.recipe, never),
    "network": (
        lambda v: None if factory(v) is None else condensed(network=v),
        factory,
    ),
    "Multisize.period": (Multisize, whole(1)),
    "SubsetMatching.parts": (named(subsets, "parts"), whole(2)),
    "SubsetMatching.weight": (named(subsets, "weight"), number(0)),
    "PixelStep.lr": (named(step, "lr"), number(0, open=True)),
    "PixelStep.momentum": (named(step, "momentum"), number(0)),
    "PixelStep.reference": (
        named(step, "reference"),
        optional(lambda v: whole(1)(v) or (None if number(1)(v) is not False else False)),
    ),
    "PixelStep.final": (named(step, "final"), number(0, 1)),
    "OnReal.images": (OnReal, whole(1)),
    "Uniform.batch": (Uniform, whole(1)),
    "Representative.batch": (Representative, whole(1)),
    "Representative.every": (named(Representative, "every"), whole(1)),
    "GradientMatching.error": (GradientMatching, callable),
    "BidirectionalMatching.gradient": (BidirectionalMatching, one_of(GradientMatching)),
    "BidirectionalMatching.weight": (named(BidirectionalMatching, "weight"), number(0)),
    "NetworkTraining.lr": (named(NetworkTraining, "lr"), number(0, open=True)),
    "NetworkTraining.momentum": (named(NetworkTraining, "momentum"), number(0)),
    "NetworkTraining.weight_decay": (named(NetworkTraining, "weight_decay"), number(0)),
    "NetworkTraining.batch": (named(NetworkTraining, "batch"), whole(1)),
    "NetworkTraining.cutmix": (named(NetworkTraining, "cutmix"), number(0, 1)),
    "Flip.probability": (Flip, number(0, 1)),
    "Color.brightness": (Color, number(0)),
    "Color.saturation": (named(Color, "saturation"), number(0)),
    "Color.contrast": (named(Color, "contrast"), number(0)),
    "Crop.ratio": (Crop, number(0, 1)),
    "Scale.ratio": (Scale, number(1)),
    "Rotate.degrees": (Rotate, number(0)),
    "Cutout.ratio": (Cutout, number(0, 1)),
    "CutMix.probability": (CutMix, number(0, 1)),
    "OnSynthetic.epochs": (OnSynthetic, whole(0)),
    "CondensedBuffer.condenser": (named(buffer, "condenser"), one_of(type(recipes.random()))),
    "CondensedBuffer.budget": (named(buffer, "budget"), budget),
    "CondensedBuffer.normalization": (named(buffer, "normalization"), normalization),
    "CondensedBuffer.seed": (named(buffer, "seed"), whole(0, plain=True)),
    "CondensedBuffer.max_size": (named(buffer, "max_size"), optional(whole(4))),
    "CondensedBuffer.checkpoint_dir": (named(buffer, "checkpoint_dir"), optional(path)),
    "CondensedBuffer.augment": (named(buffer, "augment"), optional(of_one)),
    "CondensedBuffer.resize": (
        resized,
        lambda v: whole(4)(v) if array(v) or truth(v) or not whole(9)(v) else False,
    ),
    "CondensedBuffer.memory": (with_memory, never),
    "CondensedReplayPlugin.batch_size_mem": (named(replay, "batch_size_mem"), optional(whole(1))),
    "CondensedReplayPlugin.match_storage": (named(replay, "match_storage"), number(0, 1)),
    "CondensedReplayPlugin.match_condensing": (
        named(replay, "match_condensing"),
        optional(number(0)),
    ),
    "CondensedReplayPlugin.augment": (named(replay, "augment"), optional(taking(2))),
    "CondensedReplayPlugin.normalization": (named(replay, "normalization"), normalization),
    "MatchStoragePlugin.match_condensing": (
        named(matching, "match_condensing"),
        optional(number(0)),
    ),
    "MemoryOnlyPlugin.batch_size": (named(memory_only, "batch_size"), optional(whole(1))),
    "MemoryOnlyPlugin.presentations_per_stored": (
        named(memory_only, "presentations_per_stored"),
        optional(whole(1)),
    ),
    "MemoryOnlyPlugin.augment": (named(memory_only, "augment"), optional(taking(2))),
    "DistillationPlugin.weight": (named(DistillationPlugin, "weight"), number(0)),
    "DistillationPlugin.temperature": (
        named(DistillationPlugin, "temperature"),
        number(0, open=True),
    ),
    "LogitAdjustmentPlugin.weight": (named(LogitAdjustmentPlugin, "weight"), number(0)),
    "DeviceResident.augment": (named(DeviceResident, "augment"), optional(taking(2))),
    "DeviceResident.normalization": (named(DeviceResident, "normalization"), normalization),
    "DeviceResident.seed": (named(DeviceResident, "seed"), whole(0, plain=True)),
    "condense.images": (named(condensed, "images"), never),
    "condense.labels": (named(condensed, "labels"), lambda v: None if array(v) else False),
    "condense.quotas": (
        named(condensed, "quotas"),
        lambda v: whole(1)(v.get(0)) if isinstance(v, dict) else whole(1)(v),
    ),
    "condense.normalization": (named(condensed, "normalization"), normalization),
    "condense.generator": (named(condensed, "generator"), one_of(torch.Generator)),
    "condense.checkpoint": (named(condensed, "checkpoint"), optional(path)),
    "gather.experience": (named(gathered, "experience"), never),
    "gather.generator": (named(gathered, "generator"), one_of(torch.Generator)),
    "gather.normalization": (named(gathered, "normalization"), normalization),
}


def shown(value):
    try:
        return f"{type(value).__name__} {value!r:.60}"
    except (TypeError, ValueError):
        return f"{type(value).__name__} {type(value)!s:.60}"


def wrong(tried, name, value):
    """What is wrong with what becomes of a value; None where nothing is."""
    call, usable = ARGUMENTS[name]
    try:
        found, error = tried(call, value)
        assert repr(found)
    except Exception as foreign:  # the point of it all
        return f"{shown(value)}: {type(foreign).__name__}: {str(foreign)[:90]}"
    expected = usable(value)
    if expected is False and error is None:
        return f"{shown(value)} was taken"
    if expected and error is not None:
        return f"{shown(value)} was refused: {str(error)[:90]}"
    if error is not None and "`" not in str(error) and type(error) is not MemoryFileError:
        return f"{shown(value)} was refused without a name: {str(error)[:90]}"
    return None


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_is_used_or_refused(tried, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    problems = [problem for value in SILLY if (problem := wrong(tried, name, value))]
    assert not problems, "\n".join(["", *problems])

    @CAMPAIGN
    @given(values)
    def search(value):
        assert wrong(tried, name, value) is None

    search()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "name", ["ImagesPerClass.images", "TotalBytes.bytes", "Multisize.period", "memory.sample.count"]
)
def test_numbers_that_cannot_be_printed_are_used_or_refused(tried, name, sign):
    assert wrong(tried, name, sign * 10**5000) is None


@pytest.mark.parametrize("folder", ["file", "file/folder", "x" * 300])
def test_a_checkpoint_folder_that_cannot_be_made_is_refused(tried, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")

    def remember():
        built = recipes.random(network=convnet_for((1, 4, 4), width=2))
        experience = SimpleNamespace(dataset=Items((torch.zeros(1, 4, 4), 0)))
        buffer(condenser=built, checkpoint_dir=folder).remember(experience, device="cpu")

    assert tried(remember).error is not None


# Images to condense


def fits(factor, side):
    return (factor - 1) * -(-side // factor) < side


@pytest.mark.parametrize("make", [recipes.random, functools.partial(recipes.dm, outer=1, inner=1)])
@SLOW
@given(data=st.data())
def test_images_are_condensed_or_refused(tried, make, data):
    shape = data.draw(
        st.tuples(st.integers(0, 3), *[st.integers(1, 6)] * 3)
        | st.lists(st.integers(0, 3), max_size=5).filter(lambda shape: len(shape) != 4).map(tuple)
    )
    kinds = st.sampled_from([torch.uint8] * 6 + [torch.int8, torch.float32, torch.bool])
    dtype, factor = data.draw(kinds), data.draw(st.integers(1, 3))
    count = data.draw(st.just(shape[0] if shape else 1) | st.integers(0, 4))
    labels = data.draw(
        st.lists(st.integers(-2, 2) | st.just(2**63 - 1), min_size=count, max_size=count)
    )
    label_type = data.draw(st.sampled_from([torch.int64] * 6 + [torch.float64, torch.bool]))
    quotas = data.draw(
        st.integers(-1, 4) | st.dictionaries(st.integers(-2, 2), st.integers(0, 3), max_size=6)
    )
    usable = (
        dtype == torch.uint8
        and label_type == torch.int64
        and len(shape) == 4
        and count == shape[0] > 0
        and min(shape[2:]) > 1
        and all(fits(factor, side) for side in shape[2:])
        and all((quotas.get(n, 0) if isinstance(quotas, dict) else quotas) > 0 for n in labels)
    )
    found, error = tried(
        replace(make(factor=factor), precision="float32").condense,
        torch.zeros(shape, dtype=dtype),
        torch.tensor(labels, dtype=torch.int64).to(label_type),
        quotas=quotas,
        generator=generator(),
    )
    assert (error is None) == usable, error
    if usable:
        stored = found.exemplars
        assert stored.classes == tuple(sorted(set(labels)))
        assert stored.pixels.shape[1:] == shape[1:] and stored.pixels.dtype == torch.uint8
        assert all(1 <= n <= labels.count(label) for label, n in stored.counts.items())


@pytest.mark.parametrize("shape", [(2, 1, 0, 4), (2, 1, 4, 0), (2, 1, 0, 0)])
def test_images_without_pixels_are_refused(tried, shape):
    assert tried(condensed, images=torch.zeros(shape, dtype=torch.uint8)).error is not None


# Items of an experience


def filled(shape, dtype, value):
    return torch.full(shape, value, dtype=torch.float64).to(dtype)


good = st.builds(
    filled,
    st.just((1, 2, 2)),
    st.just(torch.float32),
    st.sampled_from([0.0, 0.5, 1.0, 1.0001, -2.0, 255.0]),
)
odd = st.one_of(
    st.builds(
        filled,
        st.sampled_from([(1, 2, 2), (1, 2, 2), (2, 2), (1, 2, 3), (1, 0, 2), (0, 2, 2), ()]),
        st.sampled_from(
            [
                *(torch.float32, torch.uint8, torch.float16, torch.bfloat16, torch.float64),
                *(torch.int64, torch.bool, torch.complex64, torch.int8),
            ]
        ),
        st.sampled_from([0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, 1e300, math.nan, math.inf]),
    ),
    st.sampled_from([None, 3, "image", np.zeros((1, 2, 2)), [[0.5]], object()]),
)
good_labels = st.integers(0, 2)
odd_labels = st.one_of(
    st.sampled_from([-1, 2**63 - 1, True, np.int64(1), np.array(1), torch.tensor(1), np.uint8(2)]),
    st.sampled_from([1.5, None, "a", "1", [1], torch.tensor([1, 2]), torch.tensor(0.5), math.nan]),
    st.sampled_from(
        [torch.tensor([1]), np.array([1]), np.float64(1), b"1", {}, torch.tensor(True)]
    ),
)


@st.composite
def items(draw):
    """A few items of one form, of which one may be of another, or hold something else."""
    tasks = draw(st.booleans())
    found = [
        [draw(good), draw(good_labels), *([0] if tasks else [])]
        for _ in range(draw(st.integers(1, 4)))
    ]
    broken = draw(st.sampled_from([None, "image", "label", "task", "form", "dataset"]))
    place = draw(st.integers(0, len(found) - 1))
    if broken == "image":
        found[place][0] = draw(odd)
    elif broken == "label":
        found[place][1] = draw(odd_labels)
    elif broken == "task" and tasks:
        found[place][2] = draw(odd_labels)
    elif broken == "form":
        image, label = found[place][:2]
        found[place] = draw(
            st.sampled_from(
                [
                    *((image,), (image, label), (image, label, 0), (image, label, 0, 0), ()),
                    *(None, "ab", image, {"image": image, "label": label}, {image, label}),
                    iter((image, label)),
                ]
            )
        )
    forms = st.sampled_from([tuple, list])
    found = [draw(forms)(item) if isinstance(item, list) else item for item in found]
    return Items(*found, tasks=tasks != (broken == "dataset"))


@CAMPAIGN
@given(
    items(),
    st.sampled_from(
        [None, None, Normalization((0.5,), (2.0,)), Normalization((0.5, 0.4), (0.2, 0.1))]
    ),
)
def test_an_experience_is_gathered_or_refused(tried, dataset, normalization):
    found, error = tried(
        gathered, experience=SimpleNamespace(dataset=dataset), normalization=normalization
    )
    if error is not None:
        assert "`experience`" in str(error) or normalization is not None
        return
    image = dataset[0][0]
    assert found.pixels.shape == (len(dataset), *image.shape)
    assert found.pixels.dtype == torch.uint8
    assert found.labels.tolist() == [operator.index(item[1]) for item in dataset.items]
    assert (found.tasks is not None) == (len(dataset[0]) == 3)


SPECIAL = {
    "sparse": lambda: torch.zeros(1, 2, 2).to_sparse(),
    "without data": lambda: torch.zeros(1, 2, 2, device="meta"),
    "with gradients": lambda: torch.zeros(1, 2, 2, requires_grad=True),
    "of 8-bit floats": lambda: torch.zeros(1, 2, 2).to(torch.float8_e5m2),
    "of quantised values": lambda: torch.quantize_per_tensor(
        torch.zeros(1, 2, 2), 0.1, 0, torch.quint8
    ),
    "expanded": lambda: torch.zeros(1, 1, 1).expand(1, 2, 2),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_images_of_special_kinds_are_gathered_or_refused(tried, make):
    dataset = Items(*[(make(), label) for label in range(2)])
    tried(gathered, experience=SimpleNamespace(dataset=dataset))


@pytest.mark.parametrize("label", [2**63, -(2**63) - 1, 10**30])
def test_labels_beyond_64_bits_are_refused(tried, label):
    dataset = Items((torch.zeros(1, 2, 2), label))
    assert tried(gathered, experience=SimpleNamespace(dataset=dataset)).error is not None
