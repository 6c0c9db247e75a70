"""Avalanche's own checkpoints of a strategy, with what this package puts into it."""

import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from dc_replay import (
    CondensedBuffer,
    CondensedReplayPlugin,
    DeviceResident,
    DistillationPlugin,
    ImagesPerClass,
    LogitAdjustmentPlugin,
    MatchStoragePlugin,
    MemoryOnlyPlugin,
    TotalImages,
    idc,
)
from dc_replay.networks import convnet_for

SHAPE = (3, 8, 8)


def stream():
    """Three experiences of two classes."""
    targets = torch.arange(6).repeat_interleave(10)
    noise = torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(0.8 * targets.view(-1, 1, 1, 1) / 6 + 0.2 * noise, targets)
    data.targets = targets.tolist()
    sets = {name: as_classification_dataset(data) for name in ("train", "test")}
    return class_incremental_benchmark(sets, num_experiences=3, class_order=[3, 1, 0, 5, 2, 4])


def options(**changes):
    return {
        "condenser": idc(network=convnet_for(SHAPE, width=8), outer=1, inner=2),
        "budget": TotalImages(8),
        "seed": 7,
        "progress": False,
        **changes,
    }


def stored_by(plugin):
    """The memory that a plugin, or the policy of Avalanche's, holds."""
    return getattr(plugin, "storage_policy", plugin).memory


def policy():
    buffer = CondensedBuffer(**options(budget=ImagesPerClass(2), max_size=48))
    replay = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    return [replay, MatchStoragePlugin(buffer, match_condensing=0.5)]


WAYS = {
    "replay": lambda: [CondensedReplayPlugin(**options(), match_condensing=0.5)],
    "replay, distillation": lambda: [CondensedReplayPlugin(**options()), DistillationPlugin()],
    "replay, both losses": lambda: [
        CondensedReplayPlugin(**options()),
        LogitAdjustmentPlugin(),
        DistillationPlugin(),
    ],
    "replay, device resident": lambda: [CondensedReplayPlugin(**options()), DeviceResident()],
    "memory only": lambda: [MemoryOnlyPlugin(**options(), presentations_per_stored=4)],
    "storage policy": policy,
}


def strategy(make, device="cpu"):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(3 * 64, 6))
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=5,
        device=device,
        plugins=make(),
        evaluator=None,
    )


@pytest.fixture(autouse=True)
def _picklable_optimizers():
    """Do what the documentation says before a strategy is saved."""
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_a_run_goes_on_from_avalanches_checkpoint(make, tmp_path):
    whole, experiences = strategy(make), stream().train_stream
    for experience in experiences:
        whole.train(experience)
    interrupted = strategy(make)
    for experience in experiences[:2]:
        interrupted.train(experience)
        save_checkpoint(interrupted, tmp_path / "run")
    torch.manual_seed(99)  # another process
    resumed, done = maybe_load_checkpoint(strategy(make), tmp_path / "run")
    assert done == 2
    for experience in stream().train_stream[done:]:
        resumed.train(experience)
    expected, found = stored_by(whole.plugins[0]), stored_by(resumed.plugins[0])
    assert found.counts == expected.counts and found.budget == expected.budget
    assert torch.equal(found.exemplars.pixels, expected.exemplars.pixels)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_without_a_file_a_run_starts_from_the_beginning(tmp_path):
    begun, done = maybe_load_checkpoint(strategy(WAYS["replay"]), tmp_path / "none")
    assert done == 0 and len(stored_by(begun.plugins[0])) == 0


class Notes(pickle.Pickler):
    """Notes the devices and generators of what it pickles."""

    def __init__(self):
        super().__init__(io.BytesIO())
        self.found = []

    def reducer_override(self, obj):
        if isinstance(obj, torch.device | torch.Generator):
            self.found.append(obj)
        return NotImplemented


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_nothing_of_ours_in_a_checkpoint_names_a_device(make):
    """Tensors move to where a checkpoint is loaded; the names of devices would stay."""
    trained = strategy(make)
    trained.train(stream().train_stream[0])
    for plugin in trained.plugins:
        notes = Notes()
        notes.dump(plugin)
        assert notes.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_a_run_on_a_gpu_goes_on_without_one(make, tmp_path):
    trained = strategy(make, device=torch.device("cuda"))
    for experience in stream().train_stream[:2]:
        trained.train(experience)
    save_checkpoint(trained, tmp_path / "run")
    resumed, done = maybe_load_checkpoint(
        strategy(make), tmp_path / "run", map_location=torch.device("cpu")
    )
    resumed.device = torch.device("cpu")  # which Avalanche leaves as it was
    before = stored_by(trained.plugins[0]).exemplars.pixels
    assert torch.equal(stored_by(resumed.plugins[0]).exemplars.pixels, before.cpu())
    resumed.train(stream().train_stream[done])
    assert stored_by(resumed.plugins[0]).device == torch.device("cpu")
