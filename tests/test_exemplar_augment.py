"""Exemplars are augmented as new images are."""

import warnings

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay import (
    ArgumentError,
    CondensedBuffer,
    CondensedReplayPlugin,
    ImagesPerClass,
    MemoryOnlyPlugin,
    recipes,
)
from dc_replay.batch_changes import value_changes
from dc_replay.exemplar_augment import check_transform, training_changes
from dc_replay.random_changes import random_changes

SIDE = 8
NORMALIZE = v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.4))
IMAGES = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
IMAGES = (IMAGES * 255).round() / 255  # so that storing as bytes loses nothing


def benchmark(train, evaluation=NORMALIZE):
    data = TensorDataset(IMAGES, torch.arange(4).repeat_interleave(10))
    return nc_benchmark(
        data,
        data,
        n_experiences=2,
        task_labels=False,
        shuffle=False,
        train_transform=train,
        eval_transform=evaluation,
    )


def shown(make, train, evaluation=NORMALIZE, **options):
    """What the network is shown of exemplars, and the exemplars as they are stored."""
    plugin = make(condenser=recipes.random(), budget=ImagesPerClass(10), progress=False, **options)
    batches = []

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * SIDE * SIDE, 4)

        def forward(self, images):
            batches.append(images.detach())
            return self.layer(images.flatten(1))

    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy = Naive(
        model=model, optimizer=optimizer, train_mb_size=20, plugins=[plugin], evaluator=None
    )
    stream = benchmark(train, evaluation).train_stream
    strategy.train(stream[0])
    stored = plugin.memory.decoded()[0]
    if make is CondensedReplayPlugin:
        batches.clear()
        strategy.train(stream[1])
        return torch.cat([batch[20:] for batch in batches]), stored
    return torch.cat(batches), stored


def is_one_of(image, images):
    return bool(torch.isclose(images, image, atol=1e-5).flatten(1).all(dim=1).any())


def windows(images):
    """What may be cut out of normalised images that have a white border of three pixels."""
    border = NORMALIZE(torch.ones(3, 1, 1))
    padded = border.expand(3, SIDE + 6, SIDE + 6).repeat(len(images), 1, 1, 1).contiguous()
    padded[:, :, 3:-3, 3:-3] = images
    found = padded.unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    return found.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIDE, SIDE)


both_plugins = pytest.mark.parametrize("make", [CondensedReplayPlugin, MemoryOnlyPlugin])
both_versions = pytest.mark.parametrize("version", [v1, v2])


@both_plugins
@both_versions
def test_exemplars_are_mirrored_as_new_images_are(make, version):
    train = version.Compose([version.RandomHorizontalFlip(p=1.0), NORMALIZE])
    seen, stored = shown(make, train)
    assert all(is_one_of(image.flip(-1), stored) for image in seen)
    assert not any(is_one_of(image, stored) for image in seen)
    seen, stored = shown(make, train, augment=None)
    assert all(is_one_of(image, stored) for image in seen)


@both_plugins
@both_versions
def test_exemplars_are_cropped_as_new_images_are(make, version):
    train = version.Compose([version.RandomCrop(SIDE, padding=3, fill=1.0), NORMALIZE])
    seen, stored = shown(make, train)
    assert all(is_one_of(image, windows(stored)) for image in seen)
    assert sum(is_one_of(image, stored) for image in seen) < len(seen) / 2


@both_plugins
def test_nothing_is_drawn_where_training_transforms_draw_nothing(make):
    seen, stored = shown(make, NORMALIZE)
    again, _ = shown(make, NORMALIZE, augment=None)
    assert torch.equal(seen, again) and all(is_one_of(image, stored) for image in seen)


@both_plugins
def test_what_exemplars_do_not_get_is_named(make):
    train = v2.Compose([v2.ColorJitter(0.5), v2.RandomHorizontalFlip(p=1.0), NORMALIZE])
    with pytest.warns(UserWarning, match="applies ColorJitter when training, which exemplars"):
        seen, stored = shown(make, train)
    assert all(is_one_of(image.flip(-1), stored) for image in seen)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the experience applies")
        shown(make, train, augment=None)
        shown(make, train, augment=lambda images, generator: images)


CROPPED = v2.Compose([v2.RandomCrop(SIDE, padding=3, fill=1.0), NORMALIZE])


def cropped(images, generator):
    """What ``CROPPED`` does, to a batch."""
    (change,), _ = random_changes(benchmark(CROPPED).train_stream[0].dataset, (SIDE, SIDE))
    return value_changes([change], channels=3, device=images.device)(images, generator)


def noting(plugin, *, batch):
    """A strategy with a plugin, and the list of images and labels that its network is shown."""
    seen = []

    class Noting(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            seen.append((strategy.mbatch[0].clone(), strategy.mbatch[1].clone()))

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=batch,
        plugins=[plugin, Noting()],
        evaluator=None,
    )
    return strategy, seen


def replayed(train, **options):
    """What the network is shown of new images in both experiences, and of exemplars.

    Besides, the new images of the second one as storing would leave them, and the exemplars.
    """
    plugin = CondensedReplayPlugin(budget=ImagesPerClass(10), progress=False, **options)
    strategy, seen = noting(plugin, batch=20)
    stream = benchmark(train).train_stream
    strategy.train(stream[0])
    decoded = plugin.memory.decoded()[0]
    strategy.train(stream[1])
    stored = plugin.memory.as_stored(images_of(stream[1].dataset.eval()))
    (first, _), (second, _) = seen
    assert [len(first), len(second)] == [20, 40]
    return first, second[:20], second[20:], stored, decoded


PACKED = recipes.random(factor=2)
COMPRESSED = recipes.random(compression=3)
RAW = recipes.random()


def some_are_cropped(images, plain):
    found = windows(plain)
    assert all(is_one_of(image, found) for image in images)
    return sum(is_one_of(image, plain) for image in images) < len(images) / 2


kinds_of_storage = pytest.mark.parametrize(
    "condenser", [PACKED, COMPRESSED, RAW], ids=["packed", "coded", "raw"]
)


@kinds_of_storage
def test_new_images_are_augmented_after_they_went_through_storage(condenser):
    first, new, old, stored, decoded = replayed(
        NORMALIZE, condenser=condenser, augment=cropped, augment_new=True
    )
    assert some_are_cropped(first, NORMALIZE(IMAGES[:20]))
    assert some_are_cropped(new, stored)
    assert some_are_cropped(old, decoded)


def test_new_images_are_left_to_their_training_transforms_otherwise():
    for options in ({}, {"augment": cropped}):
        first, new, old, stored, decoded = replayed(NORMALIZE, condenser=PACKED, **options)
        assert all(is_one_of(image, NORMALIZE(IMAGES[:20])) for image in first)
        assert all(is_one_of(image, stored) for image in new)
        if options:
            assert some_are_cropped(old, decoded)


@pytest.mark.parametrize("augment", ["training", None])
def test_augmenting_new_images_takes_a_function(augment):
    with pytest.raises(ArgumentError, match="`augment_new` is True, but `augment` is .*; pass a f"):
        CondensedReplayPlugin(
            condenser=RAW, budget=ImagesPerClass(1), augment=augment, augment_new=True
        )


def test_packed_exemplars_beside_padded_crops_are_warned_of():
    with pytest.warns(UserWarning, match=r"packed exemplars .*only convert.*augment_new=True"):
        replayed(CROPPED, condenser=PACKED)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the experience")
        replayed(CROPPED, condenser=COMPRESSED)
        replayed(CROPPED, condenser=RAW)
        replayed(CROPPED, condenser=PACKED, match_storage=0.0)
        replayed(NORMALIZE, condenser=PACKED, augment=cropped, augment_new=True)
        replayed(v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE]), condenser=PACKED)


def test_training_transforms_are_looked_into_twice_for_an_experience(monkeypatch):
    looked = []

    def counted(*arguments, **options):
        looked.append(1)
        return training_changes(*arguments, **options)

    monkeypatch.setattr("dc_replay.buffer.training_changes", counted)
    with pytest.warns(UserWarning, match="packed exemplars"):
        replayed(CROPPED, condenser=PACKED)
    # Before training on each of two experiences, and when it is remembered.
    assert len(looked) == 4


def test_new_images_that_are_augmented_twice_are_warned_of():
    train = v2.Compose([v2.RandomHorizontalFlip(), *CROPPED.transforms])
    with pytest.warns(UserWarning, match="transforms crop and flip images, which `augment_new` au"):
        replayed(train, condenser=RAW, augment=cropped, augment_new=True)


def images_of(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def filled_buffer(train, **options):
    options = {"condenser": RAW, **options}
    buffer = CondensedBuffer(budget=ImagesPerClass(10), **options)
    assert buffer.augments == callable(buffer.augment)
    buffer.remember(benchmark(train).train_stream[0], device="cpu")
    return buffer, buffer.memory.decoded()[0]


@kinds_of_storage
@both_versions
def test_a_buffer_augments_what_is_trained_on(version, condenser):
    crop = version.RandomCrop(SIDE, padding=3, fill=1.0)
    buffer, stored = filled_buffer(
        version.Compose([crop, version.RandomHorizontalFlip(p=1.0), NORMALIZE]),
        condenser=condenser,
    )
    assert buffer.augments
    allowed = windows(stored).flip(-1)
    parts = [group.buffer for group in buffer.buffer_groups.values()]
    for view in (buffer.buffer, buffer.buffer.eval().train(), *parts):
        seen = images_of(view)
        assert all(is_one_of(image, allowed) for image in seen)
        assert sum(is_one_of(image, stored) for image in seen) < len(seen) / 2
    plain = torch.cat([images_of(part.eval()) for part in parts])
    torch.testing.assert_close(images_of(buffer.buffer.eval()), stored)
    torch.testing.assert_close(plain, stored)


def test_a_buffer_augments_as_it_is_told():
    train = v2.Compose([v2.RandomHorizontalFlip(p=1.0), NORMALIZE])
    buffer, stored = filled_buffer(train, augment=None)
    assert torch.equal(images_of(buffer.buffer), stored) and not buffer.augments
    buffer, stored = filled_buffer(train, augment=lambda image: image + 100)
    assert torch.equal(images_of(buffer.buffer), stored + 100) and buffer.augments
    assert torch.equal(images_of(buffer.buffer.eval()), stored)
    buffer, stored = filled_buffer(NORMALIZE)
    assert torch.equal(images_of(buffer.buffer), stored) and not buffer.augments
    for wrong in ("crop", v2.RandomHorizontalFlip, lambda images, generator: images):
        with pytest.raises(ArgumentError, match="`augment` is .*, which does not change an image"):
            filled_buffer(train, augment=wrong)


def test_a_buffer_whose_memory_comes_from_a_file_says_that_it_does_not_augment_yet():
    train = v2.Compose([v2.RandomHorizontalFlip(p=1.0), NORMALIZE])
    buffer, stored = filled_buffer(train)
    loaded = CondensedBuffer(condenser=RAW, budget=ImagesPerClass(10))
    loaded.memory = buffer.memory
    with pytest.warns(UserWarning, match="from a file, which knows no training transforms.*pass `"):
        assert torch.equal(images_of(loaded.buffer), stored)
    loaded.remember(benchmark(train).train_stream[1], device="cpu")
    assert torch.equal(images_of(loaded.buffer)[:20], stored.flip(-1))
    mirrored = v2.RandomHorizontalFlip(p=1.0)
    given = CondensedBuffer(condenser=RAW, budget=ImagesPerClass(10), augment=mirrored)
    given.memory = buffer.memory
    assert torch.equal(images_of(given.buffer)[:20], stored.flip(-1))


def test_a_buffer_names_what_its_images_do_not_get_when_they_are_asked_for():
    train = v2.Compose([v2.ColorJitter(0.5), v2.RandomHorizontalFlip(p=1.0), NORMALIZE])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the experience applies")
        buffer, stored = filled_buffer(train)
        images_of(filled_buffer(train, augment=None)[0].buffer)
    with pytest.warns(UserWarning, match="ColorJitter when training.*`augment`, a transform of an"):
        assert torch.equal(images_of(buffer.buffer), stored.flip(-1))


@pytest.mark.filterwarnings("ignore:.*deprecated function update")
def test_avalanche_replays_exemplars_as_it_trains_on_new_images():
    buffer, _ = filled_buffer(v2.Compose([v2.RandomHorizontalFlip(p=1.0), NORMALIZE]))
    plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    strategy, seen = noting(plugin, batch=10)
    stored = buffer.memory.decoded()[0]
    strategy.train(benchmark(NORMALIZE).train_stream[1])
    exemplars = torch.cat([images[labels < 2] for images, labels in seen])
    assert len(exemplars) == 20
    assert all(is_one_of(image.flip(-1), stored) for image in exemplars)


def changes_of(dataset, channels=3):
    shape = (channels, SIDE, SIDE)
    generator = torch.Generator().manual_seed(0)
    return training_changes(dataset, shape, device=torch.device("cpu"), generator=generator)


def test_looking_for_transforms_draws_nothing_from_global_generators():
    noise = v2.Lambda(lambda image: image + torch.randn(()))
    for evaluation, followed in (([NORMALIZE], True), ([noise, NORMALIZE], False)):
        train = v2.Compose([v2.RandomHorizontalFlip(), *evaluation])
        dataset = benchmark(train, v2.Compose(evaluation)).train_stream[0].dataset
        before = torch.get_rng_state()
        assert bool(changes_of(dataset).changes) == followed
        assert torch.equal(torch.get_rng_state(), before)


def test_crops_of_images_with_other_channels_are_left_out():
    train = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(SIDE, padding=2), NORMALIZE])
    dataset = benchmark(train).train_stream[0].dataset
    assert [type(change).__name__ for change in changes_of(dataset).changes] == ["Flip", "Crop"]
    found = changes_of(dataset, channels=1)
    assert [type(change).__name__ for change in found.changes] == ["Flip"]
    assert found.left_out == ("RandomCrop",)


def test_a_transform_that_does_not_say_what_it_takes_is_trusted():
    check_transform(torch.relu)
