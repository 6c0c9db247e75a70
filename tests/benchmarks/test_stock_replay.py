from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.storage_policy import ClassBalancedBuffer
from torch.utils.data import TensorDataset

from benchmarks.class_incremental import Arguments, Run
from benchmarks.presets import PRESETS, condenser
from dc_replay.networks import ConvNet, convnet_for
from strategies.stock_replay import Features, FullBatches, HerdingOfClasses


def images(count: int, side: int = 8) -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, side, side, generator=generator)
    dataset = TensorDataset(pixels, torch.arange(count) % 2)
    return nc_benchmark(dataset, dataset, 1, task_labels=False, seed=0).train_stream[0].dataset


@pytest.mark.parametrize("stored", [6, 10, 16, 25])
def test_every_mini_batch_has_as_many_exemplars(stored: int) -> None:
    policy = ClassBalancedBuffer(stored)
    policy.update_from_dataset(images(stored))
    plugin = FullBatches(mem_size=stored, storage_policy=policy)
    strategy = SimpleNamespace(train_mb_size=8, adapted_dataset=images(40), dataloader=None)
    plugin.before_training_exp(strategy)
    assert plugin.storage_policy is policy
    sizes = {len(batch[0]) for batch in strategy.dataloader}
    assert sizes == {16}


def test_herding_of_avalanche_compares_whole_features() -> None:
    network = ConvNet(2, size=(16, 16), width=4, depth=2)  # features of 4x4 pixels
    setup = SimpleNamespace(model=network)
    policy = HerdingOfClasses(5, 10, setup)
    # Those of the network that is trained, as it is by then.
    assert policy.selection_strategy.feature_extractor.network is network
    dataset = images(30, side=16)
    strategy = SimpleNamespace(device="cpu", eval_mb_size=7)
    with torch.no_grad():
        order = policy.selection_strategy.make_sorted_indices(strategy, dataset)
        features = Features(network)(torch.stack([image for image, *_ in dataset]))
    assert features.shape == (30, 64) and sorted(order) == list(range(30))
    mean = features.mean(dim=0)
    # The first is the one nearest to the mean, and the first ten are nearer together than any ten.
    assert order[0] == int((features - mean).square().sum(dim=1).argmin())
    chosen = (features[order[:10]].mean(dim=0) - mean).norm()
    assert chosen < (features[:10].mean(dim=0) - mean).norm()


@pytest.mark.parametrize("preset", ["smoke", "fast", "paper"])
def test_dm_takes_as_many_pixel_steps_as_the_others(preset: str) -> None:
    settings = PRESETS[preset]
    options = {"factor": 2, "ipc": 10, "network": convnet_for((3, 32, 32), width=4)}
    dm, idc = (condenser(name, settings, **options) for name in ("dm", "idc"))
    assert dm.inner == 1
    expected = 20_000 if preset == "paper" else idc.outer * idc.inner
    assert dm.outer == expected


def test_a_published_method_of_few_networks_takes_few_steps(tmp_path) -> None:
    run = Run(Arguments(preset="paper", outer=20, methods="dm", steps=2, out=tmp_path))
    built = condenser("dm", run.preset, factor=2, ipc=10, network=convnet_for((3, 32, 32), width=4))
    assert (built.outer, built.inner) == (2000, 1)
