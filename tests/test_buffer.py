import copy
import pickle
import random
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
    ni_benchmark,
)
from avalanche.benchmarks.utils import as_classification_dataset, concat_datasets
from avalanche.training.plugins import GDumbPlugin, MIRPlugin, RARPlugin, ReplayPlugin
from avalanche.training.supervised import ER_AML, Naive
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dc_replay import recipes
from dc_replay.budgets import ImagesPerClass, Smallest, TotalBytes, TotalImages
from dc_replay.buffer import CondensedBuffer
from dc_replay.condense import Condensed
from dc_replay.errors import ArgumentError, DivergedError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.networks import convnet_for
from dc_replay.optimisation import PixelStep
from dc_replay.pixels import Normalization

SIDE = 8
IMAGE_BYTES = 3 * SIDE * SIDE
NETWORK = convnet_for((3, SIDE, SIDE), width=8)
NORMALIZE = v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
ORDER = [3, 1, 0, 5, 2, 4]


class Pictures(Dataset):
    """Ten images of each of six classes, brighter from class to class."""

    def __init__(self, *, transform=None, per_class=10, classes=6):
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.arange(classes).repeat_interleave(per_class).tolist()
        noise = torch.rand(len(self.targets), 3, SIDE, SIDE, generator=generator)
        level = torch.tensor(self.targets).view(-1, 1, 1, 1) / classes
        self.images = (0.8 * level + 0.2 * noise).mul(255).round() / 255
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.targets[index]


def pairs():
    """Three experiences of two classes; items are (image, label)."""
    groups = {"train": v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE]), "eval": NORMALIZE}
    data = {
        name: as_classification_dataset(Pictures(), transform_groups=groups)
        for name in ("train", "test")
    }
    return class_incremental_benchmark(data, num_experiences=3, class_order=ORDER).train_stream


def triples(*, task_labels=True):
    """Three experiences of two classes; items are (image, label, task label)."""
    return nc_benchmark(
        Pictures(),
        Pictures(),
        3,
        task_labels=task_labels,
        fixed_class_order=ORDER,
        train_transform=v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE]),
        eval_transform=NORMALIZE,
    ).train_stream


STREAMS = {"pairs": pairs, "triples": triples}
both_arities = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


def idc(factor=2):
    return recipes.idc(factor=factor, network=NETWORK, outer=1, inner=1)


def any_images(factor=2):
    return recipes.random(factor=factor, network=NETWORK)


def make_buffer(condenser=None, budget=None, **options):
    return CondensedBuffer(
        condenser=condenser or any_images(), budget=budget or ImagesPerClass(2), **options
    )


@dataclass
class FirstImages:
    """Keeps the first images as they are, and what it was given."""

    formation: Formation = Formation(1)
    name: str = "first"
    given: list = field(default_factory=list)
    spoil: bool = False

    def condense(self, images, labels, *, quotas, normalization, generator, progress):
        self.given.append((images, labels, dict(quotas)))
        names = sorted(quotas)
        kept = {n: images[labels == n][: quotas[n] * (5 if self.spoil else 1)] for n in names}
        counts = torch.tensor([len(part) for part in kept.values()])
        exemplars = Exemplars(
            torch.cat(list(kept.values())), torch.tensor(names).repeat_interleave(counts)
        )
        return Condensed(exemplars, {"distance": [1.0]})


def model():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(IMAGE_BYTES, 6))


def naive(*plugins, network=None, **options):
    network = network or model()
    options = {"train_mb_size": 4, "train_epochs": 1, "evaluator": None, **options}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    return Naive(model=network, optimizer=optimizer, plugins=list(plugins), **options)


class Batches:
    """What a strategy trains on; goes last in its plugins."""

    def __init__(self):
        self.seen = []

    def before_forward(self, strategy, **kwargs):
        self.seen.append([part.clone() for part in strategy.mbatch])


def random_states():
    # Reading the legacy global state is the point.
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


def state_of(memory):
    stored = memory.exemplars
    return (
        None if stored is None else (stored.pixels.tolist(), stored.labels.tolist()),
        memory.budget,
        memory.normalization,
    )


@both_arities
@pytest.mark.parametrize("make", [any_images, idc])
def test_it_remembers_every_experience(stream, make, device):
    buffer = make_buffer(make())
    for experience in stream():
        condensed = buffer.remember(experience, device=device)
        assert isinstance(condensed, Condensed)
    memory = buffer.memory
    assert memory.counts == dict.fromkeys([1, 3, 0, 5, 2, 4], 2)
    assert memory.device.type == device.type
    assert memory.recipe == buffer.condenser.name
    assert memory.normalization.mean == pytest.approx((0.5, 0.4, 0.3))
    assert len(buffer.seconds) == len(buffer.history) == 3 and min(buffer.seconds) > 0
    levels = torch.stack([memory.of_class(n).float().mean() for n in range(6)])
    assert (levels.diff() > 0).all()


@both_arities
def test_the_view_is_the_decoded_memory(stream):
    buffer = make_buffer(augment=None)
    experiences = stream()
    for experience in experiences[:2]:
        buffer.remember(experience, device="cpu")
    images, labels = buffer.memory.decoded()
    view = buffer.buffer
    assert len(view) == len(images) == buffer.memory.decoded_len == 4 * 2 * 4
    example = experiences[0].dataset[0]
    for dataset in (view, view.eval(), view.train(), view.subset(list(range(32)))):
        items = [dataset[i] for i in range(len(dataset))]
        assert {len(item) for item in items} == {len(example)}
        assert torch.equal(torch.stack([item[0] for item in items]), images)
        assert [item[1] for item in items] == labels.tolist()
    assert images.dtype == torch.float32 and isinstance(view[0][1], int)
    assert list(view.targets) == labels.tolist()
    tasks = [0] * 16 + [1] * 16
    if len(example) == 3:
        assert list(view.targets_task_labels) == tasks == [item[2] for item in items]
        assert view.task_set[1][0][1] == 0
    joined = experiences[2].dataset.concat(view)
    assert len(joined) == 20 + 32
    batch = joined.collate_fn([joined[0], joined[51]])
    assert batch[0].shape == (2, 3, SIDE, SIDE) and len(batch) == len(example)
    assert len(concat_datasets(buffer.buffer_datasets)) == 32


def test_groups_are_the_classes():
    buffer = make_buffer()
    assert buffer.buffer_groups == {} and buffer.buffer_datasets == [] and len(buffer.buffer) == 0
    for experience in pairs():
        buffer.remember(experience, device="cpu")
    assert list(buffer.buffer_groups) == [1, 3, 0, 5, 2, 4]
    for label, group in buffer.buffer_groups.items():
        assert len(group.buffer) == 8 and set(group.buffer.targets) == {label}
        assert {group.buffer[i][1] for i in range(8)} == {label}


def test_the_view_follows_the_memory():
    buffer = make_buffer(budget=ImagesPerClass(3))
    buffer.remember(pairs()[0], device="cpu")
    before = buffer.buffer
    assert buffer.buffer is before
    buffer.memory.shrink(images_per_class=1)
    assert len(before) == 24 and len(buffer.buffer) == 8
    with pytest.raises(ArgumentError, match="`buffer` is a view of the memory"):
        buffer.buffer = before


def test_a_factor_that_does_not_divide_the_side():
    buffer = make_buffer(any_images(factor=3), ImagesPerClass(1))
    buffer.remember(pairs()[0], device="cpu")
    images, _ = buffer.memory.decoded()
    view = buffer.buffer.eval()
    seen = torch.stack([view[i][0] for i in range(18)])
    torch.testing.assert_close(seen, images)


@both_arities
@pytest.mark.parametrize("make", [any_images, idc])
def test_replay_plugin_takes_it(stream, make):
    buffer, batches = make_buffer(make()), Batches()
    plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    strategy = naive(plugin, batches)
    for experience in stream():
        strategy.train(experience)
    assert len(buffer.memory.classes) == 6
    assert {len(batch[0]) for batch in batches.seen[:5]} == {4}
    assert {len(batch[0]) for batch in batches.seen[5:]} == {8}
    assert {batch[0].dtype for batch in batches.seen} == {torch.float32}
    old = torch.cat([batch[1][4:] for batch in batches.seen[10:]])
    assert set(old.tolist()) <= {1, 3, 0, 5}
    if stream is triples:
        tasks = torch.cat([batch[2][4:] for batch in batches.seen[10:]])
        assert torch.equal(tasks, torch.tensor([1, 0, 9, 0, 9, 1])[old])


def test_labels_that_are_tensors_mix_with_the_memory():
    data = as_classification_dataset(TensorLabels())
    first, second = (
        SimpleNamespace(dataset=data.subset(list(range(*span)))) for span in ((0, 20), (20, 40))
    )
    buffer = make_buffer()
    buffer.remember(first, device="cpu")
    for joined in (second.dataset.concat(buffer.buffer), buffer.buffer.concat(second.dataset)):
        batch = joined.collate_fn([joined[0], joined[35]])
        assert batch[1].dtype == torch.int64 and batch[1].shape == (2,)


def tensors():
    """Three experiences of two classes, whose labels are tensors."""
    data = as_classification_dataset(TensorLabels())
    return class_incremental_benchmark({"train": data}, num_experiences=3).train_stream


class TensorLabels(Pictures):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, torch.tensor(label)


@both_arities
def test_gdumb_takes_it(stream):
    buffer, plugin, batches = make_buffer(), GDumbPlugin(), Batches()
    plugin.storage_policy = buffer
    strategy = naive(plugin, batches)
    for n, experience in enumerate(stream(), start=1):
        batches.seen.clear()
        strategy.train(experience)
        # Two classes of two stored images with four in each, for every experience so far.
        assert sum(len(batch[0]) for batch in batches.seen) >= 16 * n
        assert len(buffer.memory.classes) == 2 * n
        assert {len(batch) for batch in batches.seen} == {3 if stream is triples else 2}


def test_mir_and_rar_take_it():
    mir = MIRPlugin(batch_size_mem=4)
    mir.storage_policy = make_buffer()
    buffer = make_buffer(max_size=100)
    rar = RARPlugin(batch_size_mem=4, mem_size=100, storage_policy=buffer, name_ext_layer="1")
    for plugin in (mir, rar):
        strategy = naive(plugin)
        for experience in triples(task_labels=False):
            strategy.train(experience)
        assert len(plugin.storage_policy.memory.classes) == 6


def test_er_aml_is_refused_when_it_would_never_end():
    # Of three stored images, of four each, one class has two and the other one.
    for size, budget, least in (
        (8, ImagesPerClass(2), 8),
        (9, ImagesPerClass(2), 8),
        (4, TotalImages(3), 4),
        (5, TotalImages(3), 4),
    ):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(IMAGE_BYTES, 6))
        strategy = ER_AML(
            model=network,
            feature_extractor=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
            train_mb_size=size,
            evaluator=None,
        )
        strategy.storage_policy = make_buffer(budget=budget)
        strategy.experience = pairs()[0]
        if size <= least:
            strategy.storage_policy.update(strategy)
        else:
            with pytest.raises(
                ArgumentError, match=f"`train_mb_size` of ER_AML is {size}, but .* only {least}"
            ):
                strategy.storage_policy.update(strategy)


def test_an_experience_need_not_list_its_classes():
    stream = benchmark_from_datasets(train=[as_classification_dataset(Pictures())]).train_stream
    assert not hasattr(stream[0], "classes_in_this_experience")
    buffer = make_buffer()
    buffer.post_adapt(SimpleNamespace(), stream[0])
    assert buffer.memory.classes == (0, 1, 2, 3, 4, 5)


def test_update_says_nothing(recwarn, capsys):
    buffer = make_buffer()
    buffer.update(SimpleNamespace(device=torch.device("cpu"), experience=pairs()[0]), key=1)
    assert not [w for w in recwarn if "update" in str(w.message)]
    assert capsys.readouterr() == ("", "")


def test_a_class_that_returns_is_condensed_with_its_old_exemplars():
    stream = ni_benchmark(Pictures(), Pictures(), 2, shuffle=True, seed=0).train_stream
    condenser = FirstImages()
    buffer = make_buffer(condenser, ImagesPerClass(3))
    buffer.remember(stream[0], device="cpu")
    old = {label: buffer.memory.of_class(label) for label in buffer.memory.classes}
    buffer.remember(stream[1], device="cpu")
    images, labels, quotas = condenser.given[1]
    new = len(stream[1].dataset)
    assert len(images) == new + 6 * 3 and set(quotas.values()) == {3}
    for label, stored in old.items():
        assert torch.equal(images[new:][labels[new:] == label], stored)
    assert buffer.memory.counts == dict.fromkeys(range(6), 3)


@pytest.mark.parametrize("formation", [Formation(2), Formation(1, compression=3)], ids=str)
def test_what_returns_is_decoded_first(formation):
    experience = pairs()[0]
    buffer = make_buffer(replace(idc(), formation=formation), ImagesPerClass(1))
    buffer.remember(experience, device="cpu")
    decoded = buffer.memory.decoded(normalised=False)[0]
    given = buffer.condenser = FirstImages(formation=formation)
    buffer.remember(experience, device="cpu")
    images = given.given[0][0]
    assert len(images) == 20 + 2 * formation.images_per_stored == 20 + len(decoded)
    torch.testing.assert_close(images[20:] / 255, decoded, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize(
    "budget", [TotalImages(9), TotalBytes(9 * IMAGE_BYTES), Smallest((TotalImages(9),))]
)
def test_older_classes_make_room(budget):
    buffer = make_buffer(budget=budget)
    sizes = []
    for experience in pairs():
        buffer.remember(experience, device="cpu")
        sizes.append(len(buffer.memory))
        assert buffer.memory.nbytes <= 9 * IMAGE_BYTES
    assert sizes[-1] == 9
    assert list(buffer.memory.counts.values()) == [2, 2, 2, 1, 1, 1]


def test_the_seed_decides():
    results = {}
    for name, seed, noise in (("a", 3, 0), ("b", 3, 99), ("c", 4, 0)):
        torch.manual_seed(noise)
        buffer = make_buffer(idc(), seed=seed)
        for experience in pairs():
            buffer.remember(experience, device="cpu")
        results[name] = buffer.memory.exemplars.pixels
    assert torch.equal(results["a"], results["b"])
    assert not torch.equal(results["a"], results["c"])


@pytest.mark.parametrize("make", [any_images, idc])
def test_global_random_states_stay(make):
    experience, buffer = pairs()[0], make_buffer(make())
    before = random_states()
    buffer.remember(experience, device="cpu")
    assert len(buffer.buffer) == 16
    assert random_states() == before


def test_a_checkpoint_costs_what_is_stored():
    buffer = make_buffer(budget=ImagesPerClass(10))
    for experience in pairs():
        buffer.remember(experience, device="cpu")
    # The view, made here, would be in the way, and the datasets it comes from even more.
    assert len(buffer.buffer) == len(buffer.memory) * 4
    assert len(pickle.dumps(buffer)) < buffer.memory.nbytes + 6000
    copied = copy.deepcopy(buffer)
    assert state_of(copied.memory) == state_of(buffer.memory)
    copied.memory.shrink(images_per_class=1)
    assert len(copied.buffer) == 24 and len(buffer.memory) > 6


def broken(**changes):
    """The second experience, with something wrong."""
    data = Pictures()
    for name, value in changes.items():
        setattr(data, name, value(getattr(data, name)))
    return SimpleNamespace(dataset=as_classification_dataset(data))


def with_nan(images):
    images[7, 0, 0, 0] = torch.nan
    return images


BROKEN = {
    "NaN": (lambda: broken(images=with_nan), "NaN or infinite pixels in image 7"),
    "mixed shapes": (
        lambda: broken(images=lambda x: [*x[:-1], x[0, :, 1:]]),
        "different shapes",
    ),
    "empty": (lambda: SimpleNamespace(dataset=pairs()[1].dataset.subset([])), "no images"),
    "no images": (lambda: broken(images=lambda x: x[:, 0, 0]), "only images can be condensed"),
    "labels": (lambda: broken(targets=lambda x: [0.5] * 60), "single integer"),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("filled", [True, False])
def test_an_error_leaves_the_memory_as_it_was(make, message, filled):
    buffer = make_buffer(normalization=None)
    if filled:
        buffer.remember(SimpleNamespace(dataset=pairs_without_normalize()), device="cpu")
    before = state_of(buffer.memory)
    states = random_states()
    with pytest.raises(ArgumentError, match=message):
        buffer.remember(make(), device="cpu")
    assert state_of(buffer.memory) == before
    assert len(buffer.history) == len(buffer.seconds) == int(filled)
    assert random_states() == states


def test_images_of_another_shape_than_before_are_refused():
    buffer = make_buffer()
    buffer.remember(pairs()[0], device="cpu")
    before = state_of(buffer.memory)
    narrow = as_classification_dataset(
        Pictures(), transform_groups={"train": None, "eval": v2.CenterCrop((8, 7))}
    )
    with pytest.raises(ArgumentError, match=r"stored images are \(3, 8, 8\)"):
        buffer.remember(SimpleNamespace(dataset=narrow), device="cpu")
    assert state_of(buffer.memory) == before


def pairs_without_normalize():
    return as_classification_dataset(Pictures(classes=2))


def test_a_budget_that_is_too_small_says_so_before_condensing():
    condenser = FirstImages()
    buffer = make_buffer(condenser, TotalImages(3))
    stream = pairs()
    buffer.remember(stream[0], device="cpu")
    before = state_of(buffer.memory)
    with pytest.raises(ArgumentError, match="below one image for each of 4 classes"):
        buffer.remember(stream[1], device="cpu")
    assert state_of(buffer.memory) == before and len(condenser.given) == 1


def test_a_condenser_that_breaks_its_word_changes_nothing():
    buffer = make_buffer(FirstImages(spoil=True), ImagesPerClass(1))
    with pytest.raises(ArgumentError, match="leaves it 1"):
        buffer.remember(pairs()[0], device="cpu")
    assert state_of(buffer.memory) == (None, ImagesPerClass(1), None)


class Late(PixelStep):
    """Moves as it should in the first half of the condensation."""

    def set_rate(self, optimizer, share):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] if share < 0.5 else 1e35


def test_the_last_good_exemplars_of_a_condensation_that_diverged_are_stored():
    good = make_buffer(replace(idc(), outer=2, inner=3))
    diverging = make_buffer(replace(idc(), outer=4, inner=3, pixels=Late()))
    experience = pairs()[0]
    good.remember(experience, device="cpu")
    with pytest.warns(RuntimeWarning, match="diverged.* it had reached before are stored"):
        diverging.remember(experience, device="cpu")
    assert torch.equal(diverging.memory.exemplars.pixels, good.memory.exemplars.pixels)
    [history] = diverging.history
    assert len(history["distance"]) == 6 and "outer iteration 2" in history["diverged"][0]


def test_the_images_that_a_condensation_began_with_are_not_stored():
    buffer = make_buffer(replace(idc(), inner=2, pixels=PixelStep(lr=1e35)))
    with pytest.raises(DivergedError, match="outer iteration 0"):
        buffer.remember(pairs()[0], device="cpu")
    assert not len(buffer.memory) and not buffer.history


def test_the_history_of_a_long_condensation_is_kept_in_few_numbers():
    class Long(FirstImages):
        def condense(self, *arguments, **options):
            found = super().condense(*arguments, **options)
            return replace(found, history={"distance": list(range(1000)), "prefix_sizes": [[1]]})

    kept = make_buffer(Long())
    returned = kept.remember(pairs()[0], device="cpu")
    assert returned.history["distance"] == list(range(1000))
    [history] = kept.history
    assert len(history["distance"]) == 250 and history["prefix_sizes"] == [[1]]
    assert history["distance"][:2] == [1.5, 5.5] and history["distance"][-1] == 997.5


def test_one_label_for_several_classes_is_refused():
    stream = nc_benchmark(
        Pictures(), Pictures(), 3, task_labels=True, class_ids_from_zero_in_each_exp=True
    ).train_stream
    buffer = make_buffer()
    buffer.remember(stream[0], device="cpu")
    before = state_of(buffer.memory)
    with pytest.raises(ArgumentError, match="class . with task label 1, .*task label 0 before"):
        buffer.remember(stream[1], device="cpu")
    assert state_of(buffer.memory) == before


def test_the_normalization_stays_that_of_the_first_experience():
    """Images are stored so that the network sees again what it saw."""
    second = pairs()[1].dataset
    wide = Normalization.from_range([-4.0] * 3, [4.0] * 3)
    buffer = make_buffer(FirstImages(), ImagesPerClass(5), normalization=wide)
    buffer.remember(SimpleNamespace(dataset=pairs_without_normalize()), device="cpu")
    buffer.remember(SimpleNamespace(dataset=second), device="cpu")
    assert buffer.memory.normalization == wide
    seen = {second.eval()[i][1]: second.eval()[i][0] for i in reversed(range(len(second)))}
    for label, image in seen.items():
        again = buffer.buffer_groups[label].buffer.eval()[0][0]
        torch.testing.assert_close(again, image, atol=0.51 * 8 / 255, rtol=0)


def test_seconds_are_those_of_all_processes_that_condensed():
    class GoneOn(FirstImages):
        def condense(self, *args, **kwargs):
            return replace(super().condense(*args, **kwargs), seconds_before=1000.0)

    buffer = make_buffer(GoneOn())
    buffer.remember(pairs()[0], device="cpu")
    assert buffer.seconds_before == [1000.0] and 1000 < buffer.seconds[0] < 1900


def test_task_labels_can_be_left_out():
    buffer = make_buffer(with_task_labels=False)
    buffer.remember(triples()[0], device="cpu")
    assert not buffer.carries_tasks and len(buffer.buffer[0]) == 2


def test_max_size_counts_decoded_images():
    assert make_buffer(budget=TotalImages(7)).max_size == 28
    assert make_buffer(budget=Smallest((ImagesPerClass(2), TotalImages(7)))).max_size == 28
    assert make_buffer(budget=Smallest((TotalImages(9), TotalImages(7)))).max_size == 28
    assert make_buffer(budget=ImagesPerClass(7)).max_size == sys.maxsize
    buffer = make_buffer(budget=ImagesPerClass(7), max_size=50)
    assert buffer.max_size == 50
    for experience in pairs():
        buffer.remember(experience, device="cpu")
        assert len(buffer.buffer) <= 50
    assert len(buffer.buffer) == 48
    with pytest.raises(ArgumentError, match="`max_size` is 3, but .* one stored image is 4"):
        make_buffer(max_size=3)


def test_resize_cuts_and_goes_on_holding():
    stream = pairs()
    buffer = make_buffer(budget=ImagesPerClass(2))
    buffer.remember(stream[0], device="cpu")
    first = buffer.memory.of_class(1)
    buffer.resize(None, 20)
    assert buffer.max_size == 20 and len(buffer.memory) == 4
    buffer.resize(None, 8)
    assert buffer.max_size == 8 and buffer.memory.counts == {1: 1, 3: 1}
    assert torch.equal(buffer.memory.of_class(1), first[:1])
    with pytest.raises(ArgumentError, match="`new_size` is 9, but `max_size` is 8 .* cannot grow"):
        buffer.resize(None, 9)
    with pytest.raises(ArgumentError, match="below one image for each of 2 classes"):
        buffer.resize(None, 4)
    with pytest.raises(ArgumentError, match="below one image for each of 4 classes"):
        buffer.remember(stream[1], device="cpu")
    assert buffer.max_size == 8 and len(buffer.memory) == 2


def test_a_bound_above_what_is_stored_holds_later():
    stream = pairs()
    buffer = make_buffer(budget=ImagesPerClass(2))
    buffer.resize(None, 24)
    for experience in stream:
        buffer.remember(experience, device="cpu")
    assert len(buffer.buffer) == 24


def test_going_on_from_a_file(tmp_path):
    stream = triples(task_labels=False)
    first = make_buffer()
    first.remember(stream[0], device="cpu")
    first.memory.save(tmp_path / "memory.safetensors")
    second = make_buffer()
    second.memory = ExemplarMemory.load(tmp_path / "memory.safetensors")
    second.remember(stream[1], device="cpu")
    assert second.memory.classes == (1, 3, 0, 5)
    assert torch.equal(second.memory.of_class(1), first.memory.of_class(1))
    assert set(second.buffer.targets_task_labels) == {0}


@pytest.mark.filterwarnings("ignore:.*deprecated function update")
@pytest.mark.parametrize("labels", [pairs, triples, tensors])
def test_a_memory_from_a_file_takes_the_form_of_an_experience_that_was_looked_at(labels, tmp_path):
    stream = labels()
    first = make_buffer(any_images())
    first.remember(stream[0], device="cpu")
    first.memory.save(tmp_path / "memory.safetensors")
    buffer = make_buffer(any_images(), max_size=80)
    buffer.memory = ExemplarMemory.load(tmp_path / "memory.safetensors")
    buffer.experiences = 1
    buffer.check(stream[1], device="cpu")
    assert buffer.augments == first.augments
    one, other = buffer.buffer[0], first.buffer[0]
    assert len(one) == len(other) and type(one[1]) is type(other[1])
    plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    naive(plugin).train(stream[1])
    assert len(buffer.memory.classes) == 4


def saved(stream, tmp_path):
    first = make_buffer()
    first.remember(stream[0], device="cpu")
    first.memory.save(tmp_path / "memory.safetensors")
    return ExemplarMemory.load(tmp_path / "memory.safetensors"), first.memory.normalization


def test_a_memory_that_was_normalised_by_something_else_is_refused(tmp_path):
    loaded, normalization = saved(pairs(), tmp_path)
    buffer = make_buffer(normalization=normalization)
    buffer.memory = loaded
    other = Normalization((0.1, 0.1, 0.1), (0.3, 0.3, 0.3))
    buffer = make_buffer(normalization=other)
    with pytest.raises(ArgumentError, match="leave `normalization` out to go on with that of the"):
        buffer.memory = loaded


def test_a_memory_without_a_normalization_takes_the_one_that_was_given():
    wide = Normalization.from_range([-4.0] * 3, [4.0] * 3)
    buffer = make_buffer(FirstImages(), normalization=wide)
    buffer.memory = ExemplarMemory(budget=ImagesPerClass(2), formation=Formation(1))
    buffer.remember(pairs()[0], device="cpu")
    assert buffer.memory.normalization == wide
    # One that holds images without any holds them for networks that see them as they are.
    other = ExemplarMemory(budget=ImagesPerClass(2), formation=Formation(1))
    other.add(buffer.memory.exemplars)
    fresh = make_buffer(FirstImages(), normalization=wide)
    with pytest.raises(ArgumentError, match="`memory` holds images for Normalization.mean=.0.0, "):
        fresh.memory = other
    assert not len(fresh.memory)
    identity = Normalization.identity(3)
    fresh = make_buffer(FirstImages(), normalization=identity)
    fresh.memory = other
    assert fresh.memory is other


def test_what_is_drawn_for_an_experience_follows_from_how_many_came_before():
    stream, found = pairs(), []
    for before in (0, 1, 1):
        buffer = make_buffer(seed=3)
        buffer.experiences = before
        buffer.remember(stream[1], device="cpu")
        assert buffer.experiences == before + 1
        found.append(buffer.memory.exemplars.pixels)
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
    for unusable in (-1, 1.5, "x"):
        with pytest.raises(ArgumentError, match=f"`experiences` is {unusable!r}; pass a whole num"):
            make_buffer().experiences = unusable


def test_task_labels_that_a_file_does_not_hold_are_told_of(tmp_path, recwarn):
    stream = triples()
    loaded, _ = saved(stream, tmp_path)
    buffer = make_buffer()
    buffer.check(stream[1], device="cpu")
    assert not [w for w in recwarn if "task labels" in str(w.message)]
    buffer.memory = loaded
    with pytest.warns(UserWarning, match=r"classes \[1, 3\] come from a file, .* count as task 0"):
        buffer.check(stream[2], device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_exemplars_have_the_type_of_the_experiences_images(dtype):
    after = v2.Compose([NORMALIZE, v2.ToDtype(dtype)])
    groups = {"train": after, "eval": after}
    dataset = as_classification_dataset(Pictures(classes=2), transform_groups=groups)
    buffer = make_buffer()
    buffer.remember(SimpleNamespace(dataset=dataset), device="cpu")
    assert buffer.buffer[0][0].dtype == dataset[0][0].dtype == dtype


def test_items_that_were_asked_for_before_an_experience_take_its_form(tmp_path):
    stream = triples()
    loaded, _ = saved(stream, tmp_path)
    buffer = make_buffer()
    buffer.memory = loaded
    with pytest.warns(UserWarning, match="from a file"):
        assert len(buffer.buffer[0]) == 2
    with pytest.warns(UserWarning, match="task labels"):
        buffer.check(stream[1], device="cpu")
    assert len(buffer.buffer[0]) == 3


def test_a_memory_of_another_form_is_refused():
    buffer = make_buffer()
    with pytest.raises(ArgumentError, match="`memory` is a str; pass an ExemplarMemory"):
        buffer.memory = "memory.safetensors"
    other = ExemplarMemory(budget=ImagesPerClass(2), formation=Formation(1))
    with pytest.raises(ArgumentError, match=r"`memory` forms images by .*with formation=Form"):
        buffer.memory = other


BAD = {
    "recipe": ({"condenser": recipes.idc}, "`condenser` is .*call a recipe"),
    "seed": ({"seed": -1}, "`seed` is -1; pass"),
    "budget": ({"budget": 20}, "`budget` is 20, which is not a budget"),
    "max_size": ({"max_size": 0}, "`max_size` is 0; pass"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_buffer(**options)
