import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dc_replay import matching
from dc_replay.augment import Augmentation, Crop, Cutout, Flip, Rotate, Scale, augmentation
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.formation import Formation
from dc_replay.matching import ClassBatch, Launches, for_several, match_function
from dc_replay.networks import ConvNet, MatchingNetwork
from dc_replay.objectives import (
    BidirectionalMatching,
    FeatureMatching,
    GradientMatching,
    Matched,
    cosine_distance,
)
from dc_replay.pixels import Normalization
from dc_replay.terms import Sides, with_parts, with_prefix

CLASSES, COUNT, BATCH = 3, 2, 5
SHAPE = (2, 8, 8)
NORMALIZATION = Normalization((0.3, 0.5), (0.2, 0.4))
FORMATION = Formation(2)
EACH = FORMATION.images_per_stored
AUGMENT = augmentation("color", "crop", "cutout")
ONE_OF = Augmentation(one_of=(Flip(), Crop(), Scale(), Rotate(), Cutout()))

OBJECTIVES = [
    GradientMatching(),
    GradientMatching(error=cosine_distance, convolutions_only=False),
    FeatureMatching(),
    BidirectionalMatching(),
]
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=["gradients", "cosine", "features", "both"]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(classes):
    return ConvNet(classes, channels=2, size=(8, 8), width=3, depth=1).double()


@pytest.fixture
def network(device):
    torch.manual_seed(0)
    return MatchingNetwork(build, CLASSES, torch.zeros(1, *SHAPE).double().to(device))


def scale(device):
    return NORMALIZATION.scale(device, torch.float64)


def batch(device, label=1, *, augment=AUGMENT, index=None, kind="whole"):
    """A class with two stored images, that is eight decoded ones, and five real ones."""
    generator = seeded(label)
    real = torch.randint(256, (BATCH, *SHAPE), dtype=torch.uint8, generator=generator)
    stored = torch.rand(COUNT, *SHAPE, generator=generator, dtype=torch.float64)
    changes = augment.draw(generator, 1)
    images = COUNT * EACH if index is None else len(index)
    terms = Sides.even(images, BATCH, stored)
    terms = terms.whole()
    if kind == "every":
        sides = Sides.even(images, BATCH, stored)
        terms = with_parts(sides, torch.arange(images) % 2, torch.arange(BATCH) % 2, 2, 0.5)
        prefix = torch.zeros(1, images, dtype=torch.float64)
        prefix[:, : images // 2] = 2 / images
        terms = with_prefix(terms, prefix, 1)
    found = ClassBatch(real, stored, index, changes, torch.tensor(label), terms)
    return ClassBatch(
        *(None if part is None else part.to(device) for part in found[:5]),
        type(terms)(*(part.to(device) for part in terms)),
    )


@pytest.mark.parametrize("index", [None, [5, 0, 7]], ids=["all", "some"])
@pytest.mark.parametrize("augment", [AUGMENT, ONE_OF], ids=["idc", "dsa"])
def test_the_step_is_the_gradient_in_the_stored_images(network, augment, index, device):
    chosen = None if index is None else torch.tensor(index)
    parameters = network.fresh()
    for label in range(CLASSES):
        given = batch(device, label, augment=augment, index=chosen)
        match = match_function(network, GradientMatching(), FORMATION, augment)
        found = match(parameters, scale(device), given)

        module = build(CLASSES).to(device)
        module.load_state_dict(parameters)
        stored = given.stored.clone().requires_grad_()
        decoded = FORMATION.decode(stored)
        decoded = decoded if index is None else decoded[index]
        weights = [p for p in module.parameters() if p.ndim == 4]
        sides = []
        for images in (decoded, given.real.double() / 255):
            seen = augment.apply(NORMALIZATION.apply(images), given.changes)
            loss = F.cross_entropy(module(seen), given.label.expand(len(seen)))
            sides.append(torch.autograd.grad(loss, weights, create_graph=True))
        distance = sum(((a - b.detach()) ** 2).sum() for a, b in zip(*sides, strict=True))
        (slope,) = torch.autograd.grad(distance, stored)
        torch.testing.assert_close(found.distance, distance.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(found.slope, slope, rtol=1e-8, atol=1e-12)


@every_objective
@pytest.mark.parametrize("kind", ["whole", "every"])
@pytest.mark.parametrize("augment", [AUGMENT, ONE_OF], ids=["idc", "dsa"])
def test_several_classes_in_one_call_equal_one_after_the_other(
    network, objective, kind, augment, device
):
    match = match_function(network, objective, FORMATION, augment)
    parameters = network.fresh()
    batches = [batch(device, label, augment=augment, kind=kind) for label in range(CLASSES)]
    together = Launches(match, for_several(match), most=CLASSES)
    for ours, given in zip(together(parameters, scale(device), batches), batches, strict=True):
        for mine, theirs in zip(ours, match(parameters, scale(device), given), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_classes_of_unequal_shapes_are_launched_apart(network, device):
    match = match_function(network, FeatureMatching(), FORMATION, AUGMENT)
    batches = [
        batch(device, 0),
        batch(device, 1, index=torch.tensor([1, 2, 6])),
        batch(device, 2),
        batch(device, 0, index=torch.tensor([0, 3, 4])),
    ]
    sizes = []

    def several(parameters, scale, given):
        sizes.append(len(given.stored))
        return for_several(match)(parameters, scale, given)

    parameters = network.fresh()
    found = Launches(match, several, most=4)(parameters, scale(device), batches)
    assert sizes == [2, 2]
    for ours, given in zip(found, batches, strict=True):
        expected = match(parameters, scale(device), given)
        torch.testing.assert_close(ours.slope, expected.slope, rtol=1e-9, atol=1e-12)


class Device:
    """A matching step whose device has room for so many classes."""

    def __init__(self, room):
        self.room, self.sizes = room, []

    def alone(self, parameters, scale, given):
        return self._take(1, given.label)

    def several(self, parameters, scale, given):
        return self._take(len(given.label), given.label)

    def _take(self, size, label):
        self.sizes.append(size)
        if size > self.room:
            raise torch.OutOfMemoryError("full")
        return Matched(label, label, label)


def launched(room, count, most):
    device = Device(room)
    launches = Launches(device.alone, device.several, most=most)
    batches = [batch("cpu", 1)._replace(label=torch.tensor(n)) for n in range(count)]
    return device, launches, [int(found.slope) for found in launches({}, None, batches)]


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [
        (6, 6, [6]),
        (6, 4, [3, 3]),
        (7, 3, [3, 2, 2]),
        (7, 1, [1] * 7),
        (3, 9, [3]),
        (5, None, [1] * 5),
    ],
)
def test_parts_are_nearly_of_one_size(count, most, sizes):
    device, _, labels = launched(100, count, most)
    assert device.sizes == sizes and labels == list(range(count))


def test_a_device_that_is_full_gets_half_as_many(recwarn):
    device, launches, labels = launched(2, 10, 10)
    assert labels == list(range(10)) and launches.most == 2
    assert device.sizes == [10, 5, 2, 2, 2, 2, 2]
    messages = [str(warning.message) for warning in recwarn]
    assert messages == [
        "a pixel step of 10 classes at a time does not fit the device's memory; going on with 5",
        "a pixel step of 5 classes at a time does not fit the device's memory; going on with 2",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it stays at what was found
        launches({}, None, [batch("cpu", 1)] * 4)


def test_a_device_that_is_full_with_one_class_is_an_error():
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(
            DCReplayError,
            match="even for one class at a time; give the condenser a smaller `sampler`",
        ) as caught,
    ):
        launched(0, 2, 2)
    assert not isinstance(caught.value, ArgumentError)


def test_as_many_classes_as_a_share_of_the_free_memory_holds(monkeypatch):
    """The memory of the largest class's step, over what there was before it."""
    ran, peak = [], 0

    def alone(parameters, scale, given):
        nonlocal peak
        ran.append(len(given.stored))
        peak = 1000 + 100 * len(given.stored)

    gpu = SimpleNamespace(type="cuda")
    given = [SimpleNamespace(stored=Stored(count, gpu)) for count in (2, 5, 3)]
    monkeypatch.setattr(matching.torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(matching.torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(matching.torch.cuda, "max_memory_allocated", lambda device: peak)
    for free, most in ((20_000, 10), (400, 1)):
        monkeypatch.setattr(matching, "free_bytes", lambda device, free=free: free)
        assert Launches(alone, alone)._fitting({}, None, given) == most
    # Once to compile, and once to measure.
    assert ran == [5, 5] * 2


class Stored:
    """So many images on a device."""

    def __init__(self, count, device):
        self.count, self.device = count, device

    def __len__(self):
        return self.count
