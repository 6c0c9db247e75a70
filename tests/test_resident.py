import copy
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Cumulative, Naive
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay import recipes
from dc_replay.budgets import ImagesPerClass
from dc_replay.errors import ArgumentError
from dc_replay.experiences import ExperienceImages, Items
from dc_replay.memory_only import MemoryOnlyPlugin
from dc_replay.pixels import Normalization
from dc_replay.plugin import CondensedReplayPlugin
from dc_replay.resident import DeviceResident, ResidentLoader

SIDE = 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZE = v1.Normalize(MEAN, STD)
SHOWN = {
    "PIL": v1.Compose([v1.ToTensor(), NORMALIZE]),
    "tensors": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]),
}
CROP = v1.RandomCrop(SIDE, padding=2)
ORDER = [3, 1, 0, 2]


class Pictures(Dataset):
    """Ten images of each of four classes."""

    def __init__(self, kind):
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.arange(4).repeat_interleave(10).tolist()
        shape = (40, 3, SIDE, SIDE)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        make = v1.functional.to_pil_image if kind == "PIL" else torch.clone
        self.images = [make(image) for image in pixels]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def stream(*, arity=2, kind="tensors", training=None, evaluation=None, **options):
    """Two experiences of two classes, with 20 images each."""
    training = v2.Compose([training, SHOWN[kind]]) if training else SHOWN[kind]
    evaluation = evaluation or SHOWN[kind]
    if arity == 3:
        options = {"task_labels": True, "fixed_class_order": ORDER, **options}
        return nc_benchmark(
            Pictures(kind),
            Pictures(kind),
            2,
            train_transform=training,
            eval_transform=evaluation,
            **options,
        ).train_stream
    groups = {"train": training, "eval": evaluation}
    data = {
        name: as_classification_dataset(Pictures(kind), transform_groups=groups)
        for name in ("train", "test")
    }
    return class_incremental_benchmark(data, num_experiences=2, class_order=ORDER).train_stream


class Batches(SupervisedPlugin):
    """What a strategy trains on, by experience and epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.lengths = []

    def before_training_exp(self, strategy, **kwargs):
        self.seen.append([])

    def before_training_epoch(self, strategy, **kwargs):
        self.seen[-1].append([])
        self.lengths.append(len(strategy.dataloader))

    def before_forward(self, strategy, **kwargs):
        self.seen[-1][-1].append([part.clone() for part in strategy.mbatch])


def strategy_of(*plugins, make=Naive, **options):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4))
    options = {"train_mb_size": 6, "train_epochs": 2, "evaluator": None, **options}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return make(
        model=network,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        plugins=list(plugins),
        **options,
    )


def trained(experiences, *plugins, kwargs=None, **options):
    """The batches of a strategy, by experience and epoch."""
    batches = Batches()
    strategy = strategy_of(*plugins, batches, **options)
    for experience in experiences:
        strategy.train(experience, **(kwargs or {}))
    return batches.seen


def items(epoch):
    """Everything that an epoch shows, in an order that does not depend on the epoch's."""
    joined = [torch.cat(parts).cpu() for parts in zip(*epoch, strict=True)]
    columns = zip(*(part.tolist() for part in joined), strict=True)
    return sorted(columns, key=repr), [part.dtype for part in joined]


def random_states():
    # Reading the legacy global state is the point.
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize("kind", ["PIL", "tensors"])
def test_without_random_transforms_epochs_hold_what_a_data_loader_yields(arity, kind, device):
    experiences = stream(arity=arity, kind=kind)
    usual = trained(experiences, device=device)
    ours = trained(experiences, DeviceResident(), device=device)
    assert len(usual) == len(ours) == 2
    for before, after in zip(usual, ours, strict=True):
        for epoch, other in zip(before, after, strict=True):
            assert [len(b[0]) for b in other] == [len(b[0]) for b in epoch] == [6, 6, 6, 2]
            assert {len(b) for b in other} == {arity}
            assert {part.device.type for b in other for part in b} == {device.type}
            (expected, types), (found, found_types) = items(epoch), items(other)
            assert types == found_types
            if kind == "PIL":
                assert found == expected
            for one, same in zip(found, expected, strict=True):
                assert one[1:] == same[1:]
                # torchvision's second version multiplies by the rounded inverse of 255.
                torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(same[0]))


@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize(
    ("kwargs", "sizes"),
    [({}, [6, 6, 6, 2]), ({"drop_last": True}, [6, 6, 6]), ({"shuffle": False}, [6, 6, 6, 2])],
)
def test_batches_follow_the_loader_that_they_replace(arity, kwargs, sizes):
    experience, batches = stream(arity=arity)[0], Batches()
    strategy_of(DeviceResident(), batches).train(experience, **kwargs)
    for epoch in batches.seen[0]:
        assert [len(b[0]) for b in epoch] == sizes
        labels = torch.cat([b[1] for b in epoch]).tolist()
        in_order = labels == list(experience.dataset.targets)[: len(labels)]
        assert in_order == (not kwargs.get("shuffle", True))
    assert batches.lengths == [len(sizes)] * 2


def test_training_transforms_are_applied_to_each_image():
    flip = v1.RandomHorizontalFlip(1.0)
    (seen,) = trained([stream(training=flip)[0]], DeviceResident())
    (plain,) = trained([stream()[0]], DeviceResident())
    # The order of the first epoch is drawn before anything else, hence the same.
    for (images, labels), (others, same_labels) in zip(seen[0], plain[0], strict=True):
        assert torch.equal(images, others.flip(-1)) and torch.equal(labels, same_labels)


def test_crops_move_images_of_one_batch_differently():
    (seen,) = trained([stream(training=CROP)[0]], DeviceResident(), train_mb_size=20)
    (plain,) = trained([stream()[0]], DeviceResident(), train_mb_size=20)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    offsets = set()
    for image, source in zip(seen[0][0][0], plain[0][0][0], strict=True):
        padded = black.view(3, 1, 1).repeat(1, SIDE + 4, SIDE + 4)
        padded[:, 2:-2, 2:-2] = source
        offsets |= {
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.allclose(padded[:, row : row + SIDE, column : column + SIDE], image)
        }
    assert len(offsets) > 8


def test_the_seed_decides():
    experiences = stream(training=CROP)
    seen = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        seen.append(trained(experiences, DeviceResident(seed=seed)))

    def same(first, second):
        pairs = zip(first, second, strict=True)
        return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)

    for experience in range(2):
        for epoch in range(2):
            assert same(seen[0][experience][epoch], seen[1][experience][epoch])
            assert not same(seen[0][experience][epoch], seen[2][experience][epoch])
        assert not same(seen[0][experience][0], seen[0][experience][1])


def test_experiences_have_orders_of_their_own():
    experience = stream()[0]
    first, second = trained([experience, experience], DeviceResident())
    assert not torch.equal(first[0][0][0], second[0][0][0])


def test_global_random_states_are_left_alone():
    experience = stream(training=CROP)[0]
    strategy = strategy_of(DeviceResident())
    before = random_states()
    strategy.train(experience)
    assert random_states() == before


def test_a_function_stands_in_for_the_training_transforms(device):
    given = []

    def augment(images, generator):
        given.append((images.shape, images.dtype))
        return images + torch.rand(1, generator=generator, device=images.device) + 100

    experience = stream(training=v2.ColorJitter(0.5))[0]
    (seen,) = trained([experience], DeviceResident(augment=augment), device=device)
    assert given == [((size, 3, SIDE, SIDE), torch.float32) for size in (6, 6, 6, 2)] * 2
    shown = {round(float(b[0].min()), 4) for epoch in seen for b in epoch}
    assert min(shown) > 90 and len(shown) == 8


def test_nothing_may_stand_in_for_the_training_transforms():
    (seen,) = trained([stream(training=v2.ColorJitter(0.5))[0]], DeviceResident(augment=None))
    (plain,) = trained([stream()[0]], DeviceResident())
    assert items(seen[0]) == items(plain[0])


def test_a_normalization_may_be_given():
    plugin = DeviceResident(normalization=Normalization.identity(3))
    with pytest.raises(ArgumentError, match="`normalization`, given or found.* has mean"):
        strategy_of(plugin).train(stream()[0])
    (seen,) = trained([stream()[0]], DeviceResident(normalization=Normalization(MEAN, STD)))
    (found,) = trained([stream()[0]], DeviceResident())
    assert items(seen[0]) == items(found[0])


class Watch(SupervisedPlugin):
    """Notes the images that are held while training."""

    def __init__(self):
        super().__init__()
        self.pixels = []
        self.loaders = []

    def before_training_epoch(self, strategy, **kwargs):
        self.pixels.append(weakref.ref(strategy.dataloader.images.pixels))

    def after_training_exp(self, strategy, **kwargs):
        self.loaders.append(strategy.dataloader)


@pytest.mark.parametrize("arity", [2, 3])
def test_nothing_is_held_after_the_experience(arity):
    plugin, watch = DeviceResident(), Watch()
    strategy = strategy_of(plugin, watch)
    strategy.train(stream(arity=arity))
    assert [pixels() for pixels in watch.pixels] == [None] * 4
    assert not any(isinstance(loader, ResidentLoader) for loader in watch.loaders)
    assert len(pickle.dumps(plugin)) < 1000
    assert len(copy.deepcopy(plugin).seconds) == 2 and min(plugin.seconds) > 0


def replay(**options):
    return CondensedReplayPlugin(
        condenser=recipes.random(), budget=ImagesPerClass(2), progress=False, **options
    )


@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize("first", [True, False])
def test_condensed_replay_goes_beside_it(arity, first, device):
    experiences = stream(arity=arity, kind="PIL", training=CROP)
    plugins = [DeviceResident(), replay()] if first else [replay(), DeviceResident()]
    seen = trained(experiences, *plugins, device=device)
    assert [[len(b[0]) for b in epoch] for epoch in seen[0]] == [[6, 6, 6, 2]] * 2
    assert [[len(b[0]) for b in epoch] for epoch in seen[1]] == [[12, 12, 12, 8]] * 2
    for batch in (b for epoch in seen[1] for b in epoch):
        assert set(batch[1][:-6].tolist()) <= {0, 2} and set(batch[1][-6:].tolist()) <= {1, 3}
        assert len(batch) == arity


def test_what_is_trained_on_may_be_more_than_the_experience():
    experiences = stream(arity=3, training=CROP, task_labels=False)
    seen = trained(experiences, DeviceResident(), make=Cumulative)
    counts = [torch.cat([b[1] for b in epoch]).bincount() for exp in seen for epoch in exp]
    assert [each.tolist() for each in counts] == [[0, 10, 0, 10]] * 2 + [[10] * 4] * 2


def test_several_tasks_at_once_are_refused():
    experiences, plugin = stream(arity=3), DeviceResident()
    strategy = strategy_of(plugin, make=Cumulative)
    strategy.train(experiences[0])
    with pytest.raises(ArgumentError, match="`experience` holds images of tasks 0, 1, of which"):
        strategy.train(experiences[1])


def test_other_transforms_are_refused_before_anything_is_read():
    experience = stream(training=v2.ColorJitter(0.5))[0]
    with pytest.raises(ArgumentError, match="applies ColorJitter when training"):
        strategy_of(DeviceResident()).train(experience)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ReplayPlugin(mem_size=4), "ReplayDataLoader"),
        (
            lambda: MemoryOnlyPlugin(
                condenser=recipes.random(), budget=ImagesPerClass(2), progress=False
            ),
            "MemoryLoader",
        ),
    ],
)
def test_plugins_with_loaders_of_their_own_are_refused(make, name, first):
    plugins = [make(), DeviceResident()] if first else [DeviceResident(), make()]
    strategy = strategy_of(*plugins)
    with pytest.raises(
        ArgumentError, match=f"`strategy` trains from a {name} of.*CondensedReplayPlugin.*leave"
    ):
        strategy.train(stream(arity=3)[0])
    assert strategy.clock.train_iterations == 0


class Draws(Naive):
    """Draws images with replacement."""

    def make_train_dataloader(self, **kwargs):
        sampler = RandomSampler(self.adapted_dataset, replacement=True)
        self.dataloader = DataLoader(self.adapted_dataset, batch_size=5, sampler=sampler)


def test_a_loader_that_draws_in_another_way_is_refused():
    with pytest.raises(ArgumentError, match="`strategy` trains from a DataLoader of another"):
        strategy_of(DeviceResident(), make=Draws).train(stream()[0])


def test_evaluation_in_between_keeps_the_loader():
    batches = Batches()
    strategy = strategy_of(DeviceResident(), batches, eval_every=1, eval_mb_size=4)
    experiences = stream()
    strategy.train(experiences[0], eval_streams=[experiences])
    assert [[len(b[0]) for b in epoch] for epoch in batches.seen[0]] == [[6, 6, 6, 2]] * 2


def images_of(count, tasks=None):
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(count)
    return ExperienceImages(pixels, labels, Normalization.identity(1), tasks, Items())


def test_a_loader_goes_through_all_images_again_and_again():
    loader = ResidentLoader(
        images_of(7, dict.fromkeys(range(7), 5)),
        batch_size=3,
        apply=lambda pixels, generator: pixels,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(loader) == 3
    epochs = [list(loader) for _ in range(3)]
    for epoch in epochs:
        pixels, labels, tasks = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        assert sorted(labels.tolist()) == list(range(7))
        assert pixels.flatten().tolist() == labels.tolist() and tasks.tolist() == [5] * 7
    assert len({tuple(torch.cat([b[1] for b in epoch]).tolist()) for epoch in epochs}) == 3


@pytest.mark.parametrize(("count", "size", "length"), [(4, 8, 0), (8, 8, 1), (9, 8, 1)])
def test_a_loader_may_drop_the_last_batch(count, size, length):
    loader = ResidentLoader(
        images_of(count),
        batch_size=size,
        apply=lambda pixels, generator: pixels,
        generator=torch.Generator(),
        drop_last=True,
    )
    assert len(loader) == length == len(list(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "`seed` is -1; pass a whole number"),
        ({"seed": True}, "`seed` is True"),
        ({"augment": 3}, "`augment` is 3, which cannot be called; pass .*, 'training' or None"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        DeviceResident(**options)


def test_distributed_training_is_not_supported():
    assert not DeviceResident.supports_distributed
