import copy
import pickle
import random
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
)
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.checkpointing import save_checkpoint
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from avalanche.training.plugins import EvaluationPlugin, GDumbPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay import _progress, recipes
from dc_replay.adjustment import LogitAdjustmentPlugin
from dc_replay.budgets import ImagesPerClass, TotalImages
from dc_replay.buffer import CondensedBuffer
from dc_replay.distillation import DistillationPlugin, distillation_loss
from dc_replay.errors import ArgumentError
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.memory_only import MemoryOnlyPlugin
from dc_replay.networks import convnet_for
from dc_replay.pixels import Normalization
from dc_replay.plugin import CondensedReplayPlugin
from dc_replay.randomness import Purpose, stream

SIDE = 8
NETWORK = convnet_for((3, SIDE, SIDE), width=8)
NORMALIZE = v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
ORDER = [3, 1, 0, 5, 2, 4]
TASK_OF = torch.tensor([1, 0, 2, 0, 2, 1])


class Pictures(Dataset):
    """Ten images of each of six classes, brighter from class to class."""

    def __init__(self, per_class=10, classes=6):
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.arange(classes).repeat_interleave(per_class).tolist()
        noise = torch.rand(len(self.targets), 3, SIDE, SIDE, generator=generator)
        level = torch.tensor(self.targets).view(-1, 1, 1, 1) / classes
        self.images = 0.8 * level + 0.2 * noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


GROUPS = {"train": v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE]), "eval": NORMALIZE}


def pairs():
    """Three experiences of two classes; items are (image, label)."""
    data = {
        name: as_classification_dataset(Pictures(), transform_groups=GROUPS)
        for name in ("train", "test")
    }
    return class_incremental_benchmark(data, num_experiences=3, class_order=ORDER)


def triples(**options):
    """Three experiences of two classes; items are (image, label, task label)."""
    options = {"task_labels": True, "fixed_class_order": ORDER, **options}
    return nc_benchmark(
        Pictures(),
        Pictures(),
        3,
        train_transform=v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE]),
        eval_transform=NORMALIZE,
        **options,
    )


both_arities = pytest.mark.parametrize("benchmark", [pairs, triples])
both_plugins = pytest.mark.parametrize("make", [CondensedReplayPlugin, MemoryOnlyPlugin])


def idc():
    return recipes.idc(network=NETWORK, outer=1, inner=1)


def options_of(**changes):
    condenser = recipes.random(factor=2, network=NETWORK)
    return {
        "condenser": condenser,
        "budget": ImagesPerClass(2),
        "augment": None,
        "progress": False,
        **changes,
    }


def model(head=None):
    """Everything that a mode or a random state can show in."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        head or nn.Linear(4 * 36, 6),
    )


def naive(*plugins, network=None, **options):
    network = network or model()
    options = {"train_mb_size": 5, "train_epochs": 2, "evaluator": None, **options}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    return Naive(model=network, optimizer=optimizer, plugins=list(plugins), **options)


class Batches(SupervisedPlugin):
    """What a strategy trains on, by experience; goes last in its plugins."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_training_exp(self, strategy, **kwargs):
        self.seen.append([])

    def before_forward(self, strategy, **kwargs):
        self.seen[-1].append([part.clone() for part in strategy.mbatch])


def random_states():
    # Reading the legacy global state is the point.
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


class Witness(SupervisedPlugin):
    """Notes all that condensing must leave alone; one goes before the plugin, one after."""

    def __init__(self, notes, hook):
        super().__init__()
        self.notes = notes
        setattr(self, hook, self.note)

    def note(self, strategy, **kwargs):
        self.notes.append(
            {
                "random": random_states(),
                "modes": [module.training for module in strategy.model.modules()],
                "weights": copy.deepcopy(strategy.model.state_dict()),
                "gradients": [
                    None if p.grad is None else p.grad.clone() for p in strategy.model.parameters()
                ],
                "identity": [id(p) for p in strategy.model.parameters()],
                "optimizer": copy.deepcopy(strategy.optimizer.state_dict()),
                "enabled": (torch.is_grad_enabled(), torch.get_default_dtype()),
            }
        )


def assert_same(first, second):
    for key in ("random", "modes", "identity", "enabled"):
        assert first[key] == second[key], key
    for key in ("weights", "gradients", "optimizer"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


@both_plugins
@pytest.mark.parametrize("recipe", [recipes.random, partial(recipes.idc, outer=1, inner=1)])
def test_condensing_leaves_everything_else_alone(make, recipe):
    hook = "after_training_exp" if make is CondensedReplayPlugin else "before_training_exp"
    notes = []
    plugin = make(**options_of(condenser=recipe(network=NETWORK)))
    strategy = naive(Witness(notes, hook), plugin, Witness(notes, hook), train_epochs=1)
    for experience in pairs().train_stream:
        strategy.train(experience)
    assert len(notes) == 6
    for before, after in zip(notes[::2], notes[1::2], strict=True):
        assert_same(before, after)


@both_arities
@pytest.mark.parametrize("condenser", [recipes.random(factor=2, network=NETWORK), idc()])
def test_replay_is_appended_on_the_device(benchmark, condenser, device):
    plugin, batches = CondensedReplayPlugin(**options_of(condenser=condenser)), Batches()
    strategy = naive(plugin, batches, device=device)
    for experience in benchmark().train_stream:
        strategy.train(experience)
    assert plugin.memory.counts == dict.fromkeys([1, 3, 0, 5, 2, 4], 2)
    assert plugin.memory.device.type == device.type
    assert [{len(b[0]) for b in seen} for seen in batches.seen] == [{5}, {10}, {10}]
    for n, seen in enumerate(batches.seen):
        for batch in seen:
            assert len({len(part) for part in batch}) == 1
            assert {part.device.type for part in batch} == {device.type}
            assert batch[0].dtype == torch.float32 and batch[1].dtype == torch.int64
            assert set(batch[1][:5].tolist()) <= set(ORDER[2 * n : 2 * n + 2])
            assert set(batch[1][5:].tolist()) <= set(ORDER[: 2 * n])
            assert len(batch) == (3 if benchmark is triples else 2)
            if benchmark is triples:
                assert torch.equal(batch[2].cpu(), TASK_OF[batch[1].cpu()])


def test_exemplars_are_replayed_normalised():
    plugin, batches = CondensedReplayPlugin(**options_of(batch_size_mem=40)), Batches()
    strategy = naive(plugin, batches)
    stream = pairs().train_stream
    strategy.train(stream[0])
    images, labels = plugin.memory.decoded()
    strategy.train(stream[1])
    replayed = batches.seen[1][0]
    assert len(replayed[0]) == 45
    for image, label in zip(replayed[0][5:], replayed[1][5:], strict=True):
        same = (images == image).flatten(1).all(dim=1)
        assert same.any() and set(labels[same].tolist()) == {int(label)}


class Bytes(Pictures):
    """The same as bytes, for networks that begin by scaling them."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image * 255).to(torch.uint8), label


class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model()
        self.seen = []

    def forward(self, images):
        scaled = v2.ToDtype(torch.float32, scale=True)(images)
        self.seen.append(scaled)
        return self.inner(scaled)


def of_bytes():
    data = as_classification_dataset(Bytes())
    return class_incremental_benchmark(
        {"train": data, "test": data}, num_experiences=2, class_order=ORDER
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_of_bytes_stay_bytes(share):
    benchmark = of_bytes()
    condenser = recipes.random(factor=2, network=NETWORK)
    plugin = CondensedReplayPlugin(**options_of(condenser=condenser, match_storage=share))
    batches, network = Batches(), Scaling()
    strategy = naive(plugin, batches, network=network)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    shown = batches.seen[1][0][0]
    assert shown.dtype == torch.uint8 and len(shown) == 10
    decoded = plugin.memory.decoded(normalised=False)[0]
    for image in shown[5:]:
        assert (decoded * 255 - image).abs().flatten(1).amax(dim=1).min() <= 0.51
    assert max(float(seen.max()) for seen in network.seen) <= 1
    new = torch.stack([image for image, _ in Bytes()]).float()
    new = Formation(2).as_stored(new / 255).mul(255).round() if share else new
    for image in shown[:5]:
        # Halves of a byte may go either way.
        assert (new - image).abs().flatten(1).amax(dim=1).min() <= share


def test_augmentation_is_for_exemplars_alone(device):
    given = []

    def augment(images, generator):
        given.append((images.shape, torch.rand(1, generator=generator, device=images.device)))
        return images + 100

    plugin = CondensedReplayPlugin(**options_of(batch_size_mem=3, augment=augment))
    batches = Batches()
    strategy = naive(plugin, batches, device=device)
    for experience in pairs().train_stream:
        strategy.train(experience)
    assert {shape for shape, _ in given} == {(3, 3, SIDE, SIDE)}
    assert len({float(draw) for _, draw in given}) == len(given)
    for batch in (b for seen in batches.seen[1:] for b in seen):
        assert batch[0][:5].max() < 50 < batch[0][5:].min()


def new_images(**options):
    """The new images of the second experience's batches, as they came and as they are shown."""

    class Before(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            came.append(strategy.mbatch[0].clone())

    came, last = [], Batches()
    plugin = CondensedReplayPlugin(**options_of(**options))
    strategy = naive(Before(), plugin, last, train_mb_size=20, train_epochs=3)
    for experience in pairs().train_stream[:2]:
        strategy.train(experience)
    shown = [batch[0] for batch in last.seen[1]]
    return torch.cat(came[3:]), torch.cat([batch[:20] for batch in shown])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("formation", [Formation(2), Formation(1, 3), Formation(2, 2)], ids=str)
def test_a_share_of_the_new_images_is_shown_as_exemplars_are(formation, share):
    options = {"factor": formation.factor, "compression": formation.compression}
    condenser = recipes.random(network=NETWORK, **options)
    came, shown = new_images(condenser=condenser, match_storage=share)
    stored = torch.cat([as_stored_slowly(batch, formation) for batch in came.split(20)])
    changed = (shown != came).flatten(1).any(dim=1)
    torch.testing.assert_close(shown[changed], stored[changed])
    assert torch.equal(shown[~changed], came[~changed])
    assert (0.2 < changed.float().mean() < 0.8) if share == 0.5 else bool((changed == share).all())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("formation", [Formation(2), Formation(1, 3), Formation(2, 2)], ids=str)
def test_compressed_exemplars_are_shown_as_stored_once_more_after_augment(formation, share):
    """As new images are, which come augmented; packed ones would lose sharpness by it."""
    augmented = []

    def augment(images, generator):
        augmented.append(images.roll(3, dims=-1) * 0.7)
        return augmented[-1]

    options = {"factor": formation.factor, "compression": formation.compression}
    batches = Batches()
    plugin = CondensedReplayPlugin(
        **options_of(
            condenser=recipes.random(network=NETWORK, **options),
            match_storage=share,
            augment=augment,
            batch_size_mem=20,
        )
    )
    strategy = naive(plugin, batches, train_epochs=3)
    for experience in pairs().train_stream[:2]:
        strategy.train(experience)
    shown = torch.cat([batch[0][-20:] for batch in batches.seen[1]])
    stored = torch.cat([as_stored_slowly(images, formation) for images in augmented])
    augmented = torch.cat(augmented)
    if formation.factor > 1:
        share = 0
    changed = (shown != augmented).flatten(1).any(dim=1)
    torch.testing.assert_close(shown[changed], stored[changed])
    assert torch.equal(shown[~changed], augmented[~changed])
    assert (0.2 < changed.float().mean() < 0.8) if share == 0.5 else bool((changed == share).all())


def as_stored_slowly(images, formation):
    """Normalised images as they are when they have been stored, and are replayed."""
    count = len(images)
    normalization = Normalization(NORMALIZE.mean, NORMALIZE.std)
    filling = images[:1].repeat(-count % formation.images_per_stored, 1, 1, 1)
    opened = formation.pack(normalization.invert(torch.cat([images, filling])))
    if formation.compression > 1:
        opened = formation.open(formation.store(opened))
    return normalization.apply(formation.decode(opened))[:count]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_nothing_is_drawn_or_changed_where_images_are_stored_as_they_are(share):
    runs = []
    for match_storage in (share, 0.0):
        batches = Batches()
        plugin = CondensedReplayPlugin(
            **options_of(
                condenser=recipes.random(factor=1, network=NETWORK), match_storage=match_storage
            )
        )
        torch.manual_seed(0)
        strategy = naive(plugin, batches)
        for experience in pairs().train_stream[:2]:
            strategy.train(experience)
        runs.append(torch.cat([batch[0] for batch in batches.seen[1]]))
    assert torch.equal(*runs)


@both_plugins
def test_the_seed_decides(make):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        plugin, batches = make(**options_of(seed=seed, condenser=idc())), Batches()
        strategy = naive(plugin, batches)
        for experience in pairs().train_stream:
            strategy.train(experience)
        seen = (
            torch.stack([b[0] for s in batches.seen[1:] for b in s if len(b[0]) == 10][:6])
            if make is CondensedReplayPlugin
            else batches.seen[0][0][0]
        )
        runs.append((plugin.memory.exemplars.pixels, seen))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_replay_draws_nothing_from_global_generators(share):
    """So what else is random goes the way it would without replay."""
    orders, states = [], []
    options = options_of(augment=lambda images, _: images, match_storage=share)
    for plugins in ([], [CondensedReplayPlugin(**options)]):
        batches = Batches()
        torch.manual_seed(7)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 6))
        strategy = naive(*plugins, batches, network=network)
        for experience in pairs().train_stream:
            strategy.train(experience)
        states.append(torch.get_rng_state())
        orders.append(torch.cat([b[0][:5] for seen in batches.seen for b in seen]))
    assert torch.equal(*states)
    assert torch.equal(*orders) == (share == 0)


@both_plugins
def test_every_experience_has_draws_of_its_own(make):
    seeds = []

    def spy(images, generator):
        seeds.append(generator.initial_seed())
        return images

    plugin = make(**options_of(augment=spy, seed=3))
    strategy = naive(plugin)
    for experience in pairs().train_stream:
        strategy.train(experience)
    # Replay beside new data begins with the second, and stores an experience after it.
    before = (1, 2) if make is CondensedReplayPlugin else (1, 2, 3)
    own = [stream(3, Purpose.REPLAYING, count, 0, device="cpu").initial_seed() for count in before]
    assert list(dict.fromkeys(seeds)) == own and len(set(own)) == len(own)


@both_plugins
def test_a_normalization_that_is_given_is_taken(make):
    given = Normalization.from_range([-4.0] * 3, [4.0] * 3)
    plugin = make(**options_of(normalization=given))
    naive(plugin).train(pairs().train_stream[0])
    assert plugin.memory.normalization == given


def test_a_smaller_last_batch_has_as_many_exemplars_as_the_others():
    batches = Batches()
    strategy = naive(CondensedReplayPlugin(**options_of()), batches, train_mb_size=8)
    for experience in pairs().train_stream[:2]:
        strategy.train(experience)
    assert [len(batch[0]) for batch in batches.seen[1]][:3] == [16, 16, 12]


def test_evaluation_sees_no_exemplars():
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    plugin, benchmark = CondensedReplayPlugin(**options_of()), pairs()
    strategy = naive(plugin, evaluator=evaluator, eval_every=1, eval_mb_size=16)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    assert len(plugin.memory.classes) == 6
    (value,) = strategy.eval(benchmark.test_stream).values()
    strategy.plugins.remove(plugin)
    assert list(strategy.eval(benchmark.test_stream).values()) == [value]


def gdumb():
    plugin = GDumbPlugin(mem_size=30)
    plugin.storage_policy = CondensedBuffer(
        condenser=recipes.random(), budget=ImagesPerClass(5), max_size=30
    )
    return plugin


@pytest.mark.filterwarnings("ignore:.*deprecated function update")
@pytest.mark.parametrize(
    "make", [lambda: MemoryOnlyPlugin(**options_of(condenser=recipes.random())), gdumb]
)
def test_what_is_trained_on_alone_is_bytes_where_images_are(make):
    batches, network = Batches(), Scaling()
    strategy = naive(make(), batches, network=network)
    for experience in of_bytes().train_stream:
        strategy.train(experience)
        strategy.eval(experience)
    assert {shown[0].dtype for seen in batches.seen for shown in seen} == {torch.uint8}
    assert max(float(seen.max()) for seen in network.seen) <= 1


def test_memory_only_trains_in_double_precision_where_images_are():
    data = TensorDataset(torch.rand(20, 3, SIDE, SIDE).double(), torch.arange(20) % 2)
    data.targets = data.tensors[1].tolist()
    data = as_classification_dataset(data)
    benchmark = class_incremental_benchmark({"train": data, "test": data}, num_experiences=1)
    batches = Batches()
    plugin = MemoryOnlyPlugin(**options_of(condenser=recipes.random()))
    naive(plugin, batches, network=model().double()).train(benchmark.train_stream[0])
    assert {shown[0].dtype for seen in batches.seen for shown in seen} == {torch.float64}


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 2]), (True, [5, 5])])
def test_memory_only_may_leave_a_smaller_last_batch_out(drop_last, sizes):
    options = options_of(condenser=recipes.random(), budget=ImagesPerClass(6))
    batches = Batches()
    strategy = naive(MemoryOnlyPlugin(**options), batches)
    strategy.train(pairs().train_stream[0], drop_last=drop_last)
    assert [len(shown[0]) for shown in batches.seen[0]] == sizes * strategy.train_epochs


class Spoil(SupervisedPlugin):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def before_training_iteration(self, strategy, **kwargs):
        self.change(strategy.mbatch)


def narrower(batch):
    batch[0] = batch[0][..., 1:]


def further(batch):
    batch.extend([batch[1], batch[1]])


def soft(batch):
    batch[1] = nn.functional.one_hot(batch[1], 6).float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrower, r"images of shape \(3, 8, 7\), but exemplars are \(3, 8, 8\)"),
        (further, "`mbatch` holds 4 values"),
        (soft, r"labels of shape \[5, 6\].*must come after this one"),
    ],
)
@pytest.mark.parametrize("trained", [0, 1])
def test_batches_that_exemplars_do_not_fit_are_refused(change, message, trained):
    plugin, stream = CondensedReplayPlugin(**options_of()), pairs().train_stream
    strategy = naive(plugin)
    for experience in stream[:trained]:
        strategy.train(experience)
    strategy.plugins.insert(0, Spoil(change))
    with pytest.raises(ArgumentError, match=message):
        strategy.train(stream[trained])
    assert strategy.clock.train_exp_iterations == 0


LATE = {
    "budget": (options_of(budget=TotalImages(1)), "below one image for each of 2 classes"),
    "network": (
        options_of(condenser=recipes.herding(network=convnet_for((1, SIDE, SIDE)))),
        r"`network` does not accept images of shape \[3, 8, 8\]",
    ),
    "factor": (options_of(condenser=recipes.random(factor=7)), "`factor` is 7, which leaves whole"),
    "compression": (
        options_of(condenser=recipes.random(compression=200)),
        "`compression` is too high",
    ),
    "normalization": (
        options_of(normalization=Normalization((0.5,), (0.2,))),
        r"this normalization is for \[batch, 1, height, width\]",
    ),
    "folder": (options_of(checkpoint_dir=__file__), "`checkpoint_dir` is .*cannot be made"),
}


@pytest.mark.parametrize(("options", "message"), LATE.values(), ids=LATE)
def test_what_cannot_be_condensed_is_refused_before_training(options, message):
    strategy = naive(CondensedReplayPlugin(**options))
    with pytest.raises(ArgumentError, match=message):
        strategy.train(pairs().train_stream[0])
    assert strategy.clock.train_iterations == 0


def test_classes_that_begin_at_zero_in_each_experience_are_refused_before_training():
    stream = triples(class_ids_from_zero_in_each_exp=True, fixed_class_order=None).train_stream
    strategy = naive(CondensedReplayPlugin(**options_of()))
    strategy.train(stream[0])
    done = strategy.clock.train_iterations
    with pytest.raises(ArgumentError, match="class_ids_from_zero_in_each_exp=False"):
        strategy.train(stream[1])
    assert strategy.clock.train_iterations == done > 0


def test_looking_ahead_refuses_nothing_that_could_be_remembered():
    """Neither labels that only the items have, nor data that lists none."""
    images, labels = torch.rand(40, 3, SIDE, SIDE), torch.arange(2).repeat_interleave(20)
    unlisted = benchmark_from_datasets(
        train=[AvalancheDataset([TensorDataset(images, labels + 2 * n)]) for n in range(2)]
    )
    data = Pictures(10, 2)
    moved = benchmark_from_datasets(
        train=[
            TaskAwareSupervisedClassificationDataset(
                [data],
                transform_groups={
                    group: (None, lambda label, n=n: label + 2 * n) for group in ("train", "eval")
                },
                data_attributes=[DataAttribute(data.targets, "targets"), TaskLabels([n] * 20)],
            )
            for n in range(2)
        ]
    )
    for benchmark in (unlisted, moved):
        plugin = CondensedReplayPlugin(**options_of())
        strategy = naive(plugin, network=nn.Sequential(nn.Flatten(), nn.Linear(192, 6)))
        for experience in benchmark.train_stream:
            strategy.train(experience)
        assert len(plugin.memory.classes) >= 2


def test_integers_that_are_no_bytes_stay_as_they_are():
    plugin, batches = CondensedReplayPlugin(**options_of()), Batches()

    def sixteen(batch):
        batch[0] = (batch[0] * 4000).to(torch.int16)

    strategy = naive(Spoil(sixteen), plugin, batches, network=Scaled())
    for experience in pairs().train_stream[:2]:
        strategy.train(experience)
    assert batches.seen[1][0][0][:5].max() > 255


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, images):
        return self.inner(images.float() / 4000)


def test_looking_ahead_draws_nothing_from_global_generators():
    states = []
    for plugins in ([], [CondensedReplayPlugin(**options_of(condenser=recipes.herding()))]):
        strategy, experience = naive(*plugins), pairs().train_stream[0]
        strategy.experience = experience
        torch.manual_seed(5)
        for plugin in plugins:
            plugin.before_training_exp(strategy)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_double_precision_stays():
    plugin, batches = CondensedReplayPlugin(**options_of()), Batches()

    def double(batch):
        batch[0] = batch[0].double()

    strategy = naive(Spoil(double), plugin, batches, network=model().double())
    for experience in list(pairs().train_stream)[:2]:
        strategy.train(experience)
    assert {b[0].dtype for seen in batches.seen for b in seen} == {torch.float64}


@both_plugins
def test_a_trained_plugin_can_be_copied_and_pickled(make):
    plugin = make(**options_of())
    strategy = naive(plugin)
    for experience in pairs().train_stream:
        strategy.train(experience)
    assert len(pickle.dumps(plugin)) < plugin.memory.nbytes + 6000
    again = copy.deepcopy(plugin)
    assert torch.equal(again.memory.exemplars.pixels, plugin.memory.exemplars.pixels)


@both_plugins
def test_training_goes_on_from_a_file_and_after_shrinking(make, tmp_path):
    path, stream = tmp_path / "memory.safetensors", pairs().train_stream
    first = make(**options_of())
    naive(first).train(stream[0])
    first.memory.save(path)
    second, batches = make(**options_of()), Batches()
    second.memory = ExemplarMemory.load(path)
    second.memory.shrink(images_per_class=1)
    naive(second, batches).train(stream[1])
    assert second.memory.counts == {1: 1, 3: 1, 0: 1, 5: 1}
    seen = torch.cat([b[1] for b in batches.seen[0]])
    assert set(seen.tolist()) == {1, 3, 0, 5}


class ShrinkWithin(SupervisedPlugin):
    """Cuts the memory to one image per class before the third iteration of an experience."""

    def __init__(self, replay):
        super().__init__()
        self.replay = replay
        self.held = None
        self.iterations = 0

    def before_training_iteration(self, strategy, **kwargs):
        self.iterations += 1
        if self.iterations == 3:
            pixels = self.replay.memory.exemplars.pixels
            self.held = weakref.ref(pixels)
            del pixels
            self.replay.memory.shrink(images_per_class=1)


@both_plugins
def test_the_memory_may_be_cut_inside_an_epoch(make):
    replay, stream = make(**options_of()), pairs().train_stream
    naive(replay).train(stream[0])
    cut, batches = ShrinkWithin(replay), Batches()
    # First among the plugins, so that the cut comes before the replay of its own iteration.
    naive(cut, replay, batches, train_epochs=1, train_mb_size=4).train(stream[1])
    assert cut.held() is None  # the bytes are free although the epoch went on
    # Those that arrive after the cut obey it.
    assert replay.memory.counts == {3: 1, 1: 1, 0: 1, 5: 1}
    kept, _ = replay.memory.decoded()
    later = batches.seen[0][3:]
    shown = torch.cat([batch[0][torch.isin(batch[1], torch.tensor([3, 1]))] for batch in later])
    assert len(later) >= 2 and len(shown) >= 4
    for image in shown:
        assert (kept - image).abs().flatten(1).amax(dim=1).min() < 1e-6


@both_plugins
def test_an_error_in_condensing_leaves_the_memory(make):
    plugin, stream = make(**options_of(budget=TotalImages(3))), pairs().train_stream
    strategy = naive(plugin)
    strategy.train(stream[0])
    before = plugin.memory.exemplars
    with pytest.raises(ArgumentError, match="below one image for each of 4 classes"):
        strategy.train(stream[1])
    assert plugin.memory.exemplars is before


@both_plugins
def test_distributed_training_is_supported(make):
    assert make.supports_distributed and DistillationPlugin.supports_distributed


@both_arities
@pytest.mark.parametrize("condenser", [recipes.random(factor=2, network=NETWORK), idc()])
def test_memory_only_trains_on_the_memory_alone(benchmark, condenser, device):
    plugin, batches = MemoryOnlyPlugin(**options_of(condenser=condenser)), Batches()
    strategy = naive(plugin, batches, device=device)
    for n, experience in enumerate(benchmark().train_stream, start=1):
        strategy.train(experience)
        images, labels = plugin.memory.decoded()
        assert len(images) == 16 * n
        seen = [torch.cat(parts) for parts in zip(*batches.seen[-1], strict=True)]
        assert len(seen[0]) == 2 * 16 * n
        epochs = [part.split(16 * n) for part in seen]
        for epoch in zip(*epochs, strict=True):
            distance = torch.cdist(epoch[0].flatten(1), images.flatten(1))
            nearest = distance.argmin(dim=1)
            torch.testing.assert_close(epoch[0], images[nearest])
            assert sorted(nearest.tolist()) == list(range(16 * n))
            assert torch.equal(epoch[1], labels[nearest])
            if benchmark is triples:
                assert torch.equal(epoch[2].cpu(), TASK_OF[epoch[1].cpu()])
        assert not torch.equal(*epochs[1])
        assert len(seen) == (3 if benchmark is triples else 2)
        assert {part.device.type for part in seen} == {device.type}


@pytest.mark.parametrize(
    ("shown", "size", "sizes"),
    [
        (None, None, [5, 5, 5, 1]),
        (10, 16, [16, 16, 8]),
        (2, 6, [6, 2]),
        (4, 16, [16]),
    ],
)
def test_the_length_of_an_epoch(shown, size, sizes):
    plugin = MemoryOnlyPlugin(**options_of(presentations_per_stored=shown, batch_size=size))
    batches, lengths = Batches(), []

    class Length(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            lengths.append(len(strategy.dataloader))

    strategy = naive(plugin, batches, Length(), train_epochs=2)
    strategy.train(pairs().train_stream[0])
    assert [len(batch[0]) for batch in batches.seen[0]] == sizes * 2
    assert lengths == [len(sizes)] * 2
    counts = torch.cat([batch[1] for batch in batches.seen[0]])[: sum(sizes)].bincount()
    if shown == 10:
        assert 8 * 2 <= int(counts[1]) <= 8 * 3


def test_each_pass_over_the_memory_has_an_order_of_its_own():
    plugin = MemoryOnlyPlugin(**options_of(presentations_per_stored=8, batch_size=16))
    batches = Batches()
    naive(plugin, batches, train_epochs=1).train(pairs().train_stream[0])
    first, second = (batch[0].flatten(1) for batch in batches.seen[0])
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(dim=1).sort()[0], second.sum(dim=1).sort()[0])


@pytest.mark.parametrize("compression", [1, 3])
def test_an_epoch_is_as_long_whatever_part_of_the_budget_is_filled(compression):
    """Ten images of a class fill ten places, or compressed four."""
    condenser = recipes.random(compression=compression, network=NETWORK)
    plugin = MemoryOnlyPlugin(
        **options_of(condenser=condenser, budget=ImagesPerClass(20), presentations_per_stored=2)
    )
    batches = Batches()
    naive(plugin, batches, train_epochs=1).train(pairs().train_stream[0])
    assert set(plugin.memory.counts.values()) == {10 if compression == 1 else 4}
    assert sum(len(batch[0]) for batch in batches.seen[0]) == 2 * 20 * 2


def test_memory_only_augments_every_batch(device):
    plugin = MemoryOnlyPlugin(**options_of(augment=lambda images, generator: images + 100))
    batches = Batches()
    naive(plugin, batches, device=device).train(pairs().train_stream[0])
    assert min(batch[0].min() for batch in batches.seen[0]) > 50


def test_memory_only_with_evaluation_in_between():
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    plugin, batches, benchmark = MemoryOnlyPlugin(**options_of()), Batches(), pairs()
    strategy = naive(plugin, batches, evaluator=evaluator, eval_every=1, eval_mb_size=16)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    assert [sum(len(b[0]) for b in seen) for seen in batches.seen] == [32, 64, 96]


def growing():
    return model(IncrementalClassifier(4 * 36, initial_out_features=1))


@pytest.mark.parametrize(
    "benchmark", [pairs, partial(triples, task_labels=False)], ids=["pairs", "triples"]
)
@both_plugins
def test_a_classifier_that_grows(make, benchmark):
    plugin, network = make(**options_of()), growing()
    strategy = naive(plugin, DistillationPlugin(), network=network, train_epochs=3)
    for experience, width in zip(benchmark().train_stream, (4, 6, 6), strict=True):
        strategy.train(experience)
        assert network[-1].classifier.out_features == width
        assert all(p.isfinite().all() for p in network.parameters())
    tracked = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in network.parameters()} <= tracked


class Losses(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.seen = []

    def before_backward(self, strategy, **kwargs):
        self.seen.append(strategy.loss.detach().clone())


@pytest.mark.parametrize("make", [model, growing])
def test_distillation_adds_its_loss(make):
    before, after = Losses(), Losses()
    batches, outputs = Batches(), []

    class Outputs(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            outputs.append(strategy.mb_output.detach().clone())

    plugin = DistillationPlugin(weight=0.5, temperature=3.0)
    strategy = naive(batches, Outputs(), before, plugin, after, network=make(), train_epochs=1)
    stream = pairs().train_stream
    strategy.train(stream[0])
    assert plugin.columns == (1, 3)
    assert before.seen == after.seen
    teacher = copy.deepcopy(strategy.model).eval()
    strategy.train(stream[1])
    assert plugin.columns == (0, 1, 3, 5)
    for n, (batch, output) in enumerate(zip(batches.seen[1], outputs[4:], strict=True)):
        loss = distillation_loss(
            output, teacher(batch[0]).detach(), temperature=3.0, columns=[1, 3]
        )
        torch.testing.assert_close(after.seen[4 + n] - before.seen[4 + n], 0.5 * loss.view(1))
        assert n == 0 or loss > 0


def test_the_teacher_is_frozen_and_apart():
    plugin = DistillationPlugin()
    strategy = naive(plugin)
    stream = pairs().train_stream
    strategy.train(stream[0])
    teacher = plugin.teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in strategy.model.parameters()}
    torch.testing.assert_close(teacher.state_dict(), strategy.model.state_dict())
    assert any(p.requires_grad for p in strategy.model.parameters())
    before = copy.deepcopy(teacher.state_dict())
    strategy.train(stream[1])
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert plugin.teacher is not teacher


def test_a_teacher_can_be_given():
    plugin, model = DistillationPlugin(), nn.Dropout().train()
    plugin.hold(model, [4, 1])
    assert plugin.columns == (1, 4)
    assert plugin.teacher is not model and not plugin.teacher.training and model.training


def test_the_teacher_draws_nothing_from_global_generators():
    """A loss of weight 0 changes nothing, although its teacher has dropout."""
    results = []
    for plugins in ([], [DistillationPlugin(weight=0.0)]):
        torch.manual_seed(3)
        strategy = naive(*plugins)
        for experience in pairs().train_stream:
            strategy.train(experience)
        results.append(strategy.model.state_dict())
    torch.testing.assert_close(*results)


class WithFeatures(nn.Module):
    """Returns its logits together with what they were computed from."""

    def __init__(self, classes=6):
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, classes)

    def forward(self, images):
        features = images.flatten(1)
        return self.head(features), features


@pytest.mark.parametrize("make", [DistillationPlugin, LogitAdjustmentPlugin])
def test_models_that_return_more_than_logits_are_refused_at_once(make):
    strategy = naive(
        make(),
        network=WithFeatures(),
        criterion=lambda output, labels: nn.functional.cross_entropy(output[0], labels),
    )
    with pytest.raises(ArgumentError, match="`model` returns a tuple, but here it must return its"):
        strategy.train(pairs().train_stream[0])


def test_choosing_shows_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(_progress, "LOG_SECONDS", 0.0)
    condenser = recipes.herding(network=NETWORK, epochs=4)
    naive(CondensedReplayPlugin(**options_of(condenser=condenser, progress=True))).train(
        pairs().train_stream[0]
    )
    assert "herding: network" in capsys.readouterr().err


def test_distillation_keeps_what_was_known():
    drifts = []
    for weight in (0.0, 100.0):
        torch.manual_seed(3)
        plugin = DistillationPlugin(weight=weight)
        strategy = naive(plugin, network=model(), train_epochs=4)
        stream = pairs().train_stream
        strategy.train(stream[0])
        images = torch.stack([stream[1].dataset.eval()[i][0] for i in range(20)])
        teacher, student = plugin.teacher, strategy.model
        strategy.train(stream[1])
        with torch.no_grad():
            old, new = teacher(images), student.eval()(images)
        drifts.append(float(distillation_loss(new, old, columns=[1, 3])))
    assert drifts[1] < drifts[0] / 2


def test_experiences_that_do_not_list_their_classes():
    data = as_classification_dataset(Pictures(classes=2))
    stream = benchmark_from_datasets(train=[data]).train_stream
    assert not hasattr(stream[0], "classes_in_this_experience")
    plugin, replay = DistillationPlugin(), CondensedReplayPlugin(**options_of())
    naive(plugin, replay).train(stream[0])
    assert plugin.columns == replay.memory.classes == (0, 1)


def test_a_head_for_each_task_is_refused():
    strategy = naive(DistillationPlugin(), network=MultiHeadClassifier(3 * SIDE * SIDE))
    with pytest.raises(ArgumentError, match="`model` is a MultiTaskModule.*LwFPlugin"):
        strategy.train(triples().train_stream[0])


BAD = {
    "weight": (DistillationPlugin, {"weight": -1.0}, r"`weight` is -1\.0; pass"),
    "temperature": (DistillationPlugin, {"temperature": 0.0}, r"`temperature` is 0\.0; pass"),
    "batch_size_mem": (
        CondensedReplayPlugin,
        options_of(batch_size_mem=0),
        "`batch_size_mem` is 0; pass",
    ),
    "batch_size": (MemoryOnlyPlugin, options_of(batch_size=0), "`batch_size` is 0; pass"),
    "presentations": (
        MemoryOnlyPlugin,
        options_of(presentations_per_stored=0),
        "`presentations_per_stored` is 0; pass",
    ),
    "resolution": (
        CondensedReplayPlugin,
        options_of(match_storage=1.5),
        "`match_storage` is 1.5; pass a number from 0 to 1",
    ),
    "recipe": (CondensedReplayPlugin, options_of(condenser=recipes.idc), "call a recipe"),
    "one argument": (
        MemoryOnlyPlugin,
        options_of(augment=lambda images: images),
        "does not take a batch of images and a generator",
    ),
    "transform": (
        CondensedReplayPlugin,
        options_of(augment=v2.RandomHorizontalFlip()),
        r"lambda images, generator: t\(images\)",
    ),
    "older transform": (
        CondensedReplayPlugin,
        options_of(augment=v1.RandomHorizontalFlip()),
        "does not take a batch of images and a generator",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(make, options, message):
    with pytest.raises(ArgumentError, match=message):
        make(**options)


@pytest.fixture
def picklable_optimizers(monkeypatch):
    """Put torch.optim's modules back where dill looks for them; torch takes them from there."""
    for name, module in list(sys.modules.items()):
        package, _, last = name.rpartition(".")
        if package == "torch.optim" and not hasattr(torch.optim, last):
            monkeypatch.setattr(torch.optim, last, module, raising=False)


@pytest.mark.usefixtures("picklable_optimizers")
def test_a_checkpoint_grows_by_what_the_memory_stores(tmp_path):
    sizes = []
    plugin = CondensedReplayPlugin(**options_of(budget=ImagesPerClass(200)))
    for name, plugins in (("without", []), ("with", [plugin])):
        benchmark = benchmark_from_datasets(
            train=[as_classification_dataset(Pictures(900, 2), transform_groups=GROUPS)]
        )
        strategy = naive(*plugins, train_epochs=1, train_mb_size=900)
        strategy.train(benchmark.train_stream[0])
        save_checkpoint(strategy, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert plugin.memory.nbytes == 2 * 200 * 3 * SIDE * SIDE
    assert plugin.memory.nbytes < sizes[1] - sizes[0] < 1.1 * plugin.memory.nbytes
