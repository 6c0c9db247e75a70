"""Loaders with workers, and processes that are started afresh."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dc_replay import (
    CondensedBuffer,
    CondensedReplayPlugin,
    DeviceResident,
    ImagesPerClass,
    MemoryOnlyPlugin,
    idc,
    random,
)
from dc_replay.networks import convnet_for

SHAPE = (3, 8, 8)
NETWORK = convnet_for(SHAPE, width=8)


def data():
    targets = torch.arange(4).repeat_interleave(8)
    images = torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = TensorDataset(images, targets)
    found.targets = targets.tolist()
    return found


def pairs():
    sets = {name: as_classification_dataset(data()) for name in ("train", "test")}
    return class_incremental_benchmark(sets, num_experiences=2)


def triples():
    return nc_benchmark(data(), data(), 2, task_labels=False, seed=0)


def options():
    return {
        "condenser": random(factor=2, network=NETWORK),
        "budget": ImagesPerClass(2),
        "progress": False,
    }


def policy():
    buffer = CondensedBuffer(**options(), max_size=32)
    return [ReplayPlugin(mem_size=32, storage_policy=buffer)]


WAYS = {
    "replay": lambda: [CondensedReplayPlugin(**options())],
    "replay, device resident": lambda: [CondensedReplayPlugin(**options()), DeviceResident()],
    "memory only": lambda: [MemoryOnlyPlugin(**options(), presentations_per_stored=4)],
    "storage policy": policy,
}


class Seen:
    """The labels that were trained on, in order; goes last in the plugins."""

    def __init__(self):
        self.labels = []

    def before_forward(self, strategy, **kwargs):
        self.labels.append(strategy.mbatch[1].tolist())


def trained(make, benchmark, **loading):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = Seen()
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        train_mb_size=4,
        plugins=[*make(), seen],
        evaluator=None,
    )
    for experience in benchmark().train_stream:
        strategy.train(experience, **loading)
        strategy.eval(experience, **loading)
    return seen.labels


@pytest.mark.parametrize("benchmark", [pairs, triples])
@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_loaders_with_workers(make, benchmark):
    alone = trained(make, benchmark)
    assert trained(make, benchmark, num_workers=2) == alone


@pytest.fixture(scope="module")
def fresh():
    """A process that is started afresh, with nothing of this one's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *call, **options: pool.submit(*call, **options).result(timeout=300)


def filled():
    buffer = CondensedBuffer(**options())
    for experience in pairs().train_stream:
        buffer.remember(experience, device="cpu")
    return buffer


def test_a_memory_is_passed_to_a_process(fresh):
    memory = filled().memory
    for one, other in zip(fresh(memory.decoded), memory.decoded(), strict=True):
        assert torch.equal(one, other)


def test_a_process_condenses_to_the_same_bytes(fresh):
    experience = pairs().train_stream[0]  # those of nc_benchmark cannot be pickled themselves
    condenser = idc(network=NETWORK, outer=1, inner=2)
    buffers = [CondensedBuffer(**options() | {"condenser": condenser}) for _ in range(2)]
    there = fresh(buffers[0].remember, experience, device="cpu")
    here = buffers[1].remember(experience, device="cpu")
    assert torch.equal(there.exemplars.pixels, here.exemplars.pixels)
    assert torch.equal(there.exemplars.labels, here.exemplars.labels)
    assert there.history == here.history


def test_workers_that_are_started_afresh_read_the_buffer():
    dataset = filled().buffer
    loader = DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context="spawn")
    found = torch.cat([images for images, _ in loader])
    assert torch.equal(found, torch.stack([image for image, _ in dataset]))


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_what_is_attached_can_be_pickled(make):
    for plugin in make():
        assert type(pickle.loads(pickle.dumps(plugin))) is type(plugin)
