"""New images beside a buffer that Avalanche's own plugins and strategies replay."""

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import GDumbPlugin, ReplayPlugin
from avalanche.training.supervised import ER_ACE, Naive
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from dc_replay import recipes
from dc_replay.budgets import ImagesPerClass
from dc_replay.buffer import CondensedBuffer
from dc_replay.errors import ArgumentError
from dc_replay.experiences import classes_of
from dc_replay.formation import Formation
from dc_replay.match_storage import MatchStoragePlugin, on_numbers
from dc_replay.networks import convnet_for
from dc_replay.plugin import CondensedReplayPlugin

SHAPE = (3, 8, 8)
NETWORK = convnet_for(SHAPE, width=8)
FORMATIONS = pytest.mark.parametrize("formation", [Formation(2), Formation(1, 3)], ids=str)


def stream(target_transform=None, train=None):
    """Three experiences of two classes, of ten images each."""
    targets = torch.arange(6).repeat_interleave(10)
    images = torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(images, targets)
    data.targets = targets.tolist()
    transforms = {"train": (train, target_transform), "eval": (None, target_transform)}
    data = as_classification_dataset(
        data, transform_groups=transforms if target_transform or train else None
    )
    return class_incremental_benchmark({"train": data, "test": data}, num_experiences=3)


def buffer_of(formation, **options):
    condenser = recipes.random(
        factor=formation.factor, compression=formation.compression, network=NETWORK
    )
    budget = ImagesPerClass(1)
    return CondensedBuffer(
        condenser=condenser, budget=budget, max_size=60, progress=False, **options
    )


class Batches(SupervisedPlugin):
    """The mini-batches of the last experience, before or after another plugin."""

    def before_training_exp(self, strategy, **kwargs):
        self.seen = []

    def before_training_iteration(self, strategy, **kwargs):
        self.seen.append((strategy.mbatch[0].clone(), strategy.mbatch[1].clone()))


def trained(make, formation, *, experiences=3, **options):
    """What a strategy was given and shown in the last experience, and its buffer."""
    buffer = buffer_of(formation, with_task_labels=make is er_ace)
    given, shown = Batches(), Batches()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 106))
    strategy = make(
        buffer,
        [given, MatchStoragePlugin(buffer), shown],
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=5,
        evaluator=None,
    )
    memories = []
    for experience in stream(**options).train_stream[:experiences]:
        memories.append(set(buffer.memory.classes))
        strategy.train(experience)
    return given.seen, shown.seen, buffer.memory, memories[-1]


def naive(buffer, plugins, **options):
    replay = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    return Naive(plugins=[replay, *plugins], **options)


def er_ace(buffer, plugins, **options):
    strategy = ER_ACE(plugins=plugins, batch_size_mem=5, **options)
    strategy.storage_policy = buffer
    return strategy


@FORMATIONS
@pytest.mark.parametrize("make", [naive, er_ace])
def test_new_images_alone_are_changed(make, formation):
    given, shown, memory, old = trained(make, formation)
    assert len(given) == len(shown) >= 4
    replayed = 0
    for (before, labels), (after, _) in zip(given, shown, strict=True):
        exemplars = torch.tensor([int(label) in old for label in labels])
        assert torch.equal(after[exemplars], before[exemplars])
        expected = memory.as_stored(before)[~exemplars]
        torch.testing.assert_close(after[~exemplars], expected, rtol=0, atol=0)
        assert (after != before)[~exemplars].flatten(1).any(dim=1).all()
        replayed += int(exemplars.sum())
    # ER-ACE draws exemplars by itself, beside a mini-batch of new images.
    assert (replayed > 0) == (make is naive)


@FORMATIONS
def test_compressed_exemplars_that_the_buffer_augments_are_changed_as_new_images_are(formation):
    given, shown, memory, old = trained(naive, formation, train=v2.RandomCrop(8, padding=2))
    replayed = 0
    for (before, labels), (after, _) in zip(given, shown, strict=True):
        packed = torch.tensor([int(label) in old for label in labels])
        replayed += int(packed.sum())
        if formation.factor == 1:
            packed[:] = False
        torch.testing.assert_close(after[~packed], memory.as_stored(before)[~packed])
        assert (after != before)[~packed].flatten(1).any(dim=1).all()
        assert torch.equal(after[packed], before[packed])
    assert replayed


@FORMATIONS
@pytest.mark.parametrize("make", [naive, er_ace])
def test_nothing_is_changed_before_something_is_replayed(make, formation):
    given, shown, _, _ = trained(make, formation, experiences=1)
    assert given
    for (before, _), (after, _) in zip(given, shown, strict=True):
        assert torch.equal(before, after)


def test_labels_that_a_target_transform_makes_are_new():
    """The experience's list has them as they were before it."""
    given, shown, memory, old = trained(
        naive, Formation(2), experiences=2, target_transform=lambda label: label + 100
    )
    assert old == {100, 101}
    for (before, labels), (after, _) in zip(given, shown, strict=True):
        new = labels > 101
        assert torch.equal(after[~new], before[~new])
        torch.testing.assert_close(after[new], memory.as_stored(before)[new], rtol=0, atol=0)


def test_nothing_happens_where_images_are_stored_as_they_are():
    given, shown, _, _ = trained(naive, Formation(1))
    for (before, _), (after, _) in zip(given, shown, strict=True):
        assert torch.equal(before, after)


def test_bytes_are_changed_as_numbers_and_labels_of_pixels_stay():
    def halved(images):
        return images / 2 + 300 * (images == 7)

    images = torch.tensor([0, 3, 7, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    assert on_numbers(images, halved).flatten().tolist() == [0, 2, 255, 128]
    assert on_numbers(images, halved).dtype == torch.uint8
    half = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    assert torch.equal(on_numbers(half, halved), half / 2)
    whole = images.long()
    assert on_numbers(whole, halved) is whole


@pytest.mark.parametrize("other", ["GDumbPlugin", "CondensedReplayPlugin"])
def test_plugins_that_leave_nothing_to_match_are_refused(other):
    buffer = buffer_of(Formation(2))
    if other == "GDumbPlugin":
        plugin = GDumbPlugin()
        plugin.storage_policy = buffer
    else:
        plugin = CondensedReplayPlugin(condenser=recipes.random(), budget=ImagesPerClass(1))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6))
    strategy = Naive(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
        plugins=[plugin, MatchStoragePlugin(buffer)],
        evaluator=None,
    )
    message = f"`plugins` has {other}, beside which .*; leave MatchStoragePlugin out"
    with pytest.raises(ArgumentError, match=message):
        strategy.train(stream().train_stream[0])


def test_mixed_labels_are_refused():
    class Mixing(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            strategy.mbatch[1] = nn.functional.one_hot(strategy.mbatch[1], 106).float()

    def make(buffer, plugins, **options):
        return naive(buffer, [Mixing(), *plugins], **options)

    with pytest.raises(ArgumentError, match=r"`mbatch` holds labels of shape \[10, 106\]"):
        trained(make, Formation(2), experiences=2)


@pytest.mark.parametrize("buffer", [None, ImagesPerClass(1), CondensedBuffer])
def test_it_is_given_a_buffer(buffer):
    with pytest.raises(ArgumentError, match="`buffer` is .*; pass the CondensedBuffer"):
        MatchStoragePlugin(buffer)


def test_new_classes_are_those_of_the_items():
    """As a target transform numbers them, which what is listed does not show."""
    buffer = buffer_of(Formation(2))
    watch, plugin = Batches(), MatchStoragePlugin(buffer)
    experiences = stream(target_transform=lambda label: label + 2).train_stream
    buffer.remember(experiences[0], device="cpu")
    assert classes_of(experiences[1]) != set(experiences[1].classes_in_this_experience)
    strategy = Naive(
        model=nn.Sequential(nn.Flatten(), nn.Linear(192, 8)),
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1),
        train_mb_size=20,
        plugins=[plugin, watch],
        evaluator=None,
    )
    strategy.train(experiences[1])
    images = torch.stack([item[0] for item in experiences[1].dataset])
    shown, _ = watch.seen[0]
    coarse = Formation(2).as_stored(images)
    assert all((image - coarse).abs().flatten(1).amax(dim=1).min() < 1e-5 for image in shown)
