"""How whatever is compared is trained: alike, but for what it remembers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.class_incremental import Arguments, Run, _stream
from dc_replay import DistillationPlugin, MemoryOnlyPlugin
from dc_replay.augment import augmentation, cutmix
from strategies import WITHOUT_RECIPE, Contender
from strategies.common import AugmentBatch, Schedule
from strategies.training_state import TrainingState

BESIDE = ["random", *(name for name in WITHOUT_RECIPE if name != "stock_reservoir")]


def run_of(out: Path, **changes: Any) -> Run:
    small = {"preset": "smoke", "methods": "random", "ipc": 2, "classes": 4, "steps": 2}
    return Run(Arguments(out=out, quiet=True, **{**small, **changes}))


def contender(run: Run, method: str = "random", seed: int = 0) -> tuple[Contender, Any]:
    data = run.arguments.in_order(run.data, seed=seed)
    found = run._contender(method, seed, data, run.arguments.out)
    return found, _stream(data, run.arguments.steps, run.arguments.augmentation).train_stream


def plugin_of(kind: type, strategy: Any) -> Any:
    [found] = [plugin for plugin in strategy.plugins if isinstance(plugin, kind)]
    return found


@pytest.mark.parametrize(
    ("protocol", "method"),
    [("memory-only", "random"), ("gdumb", "random"), *(("replay", name) for name in BESIDE)],
)
def test_all_have_the_same_optimiser(protocol: str, method: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, protocol=protocol, methods=method)
    strategy = contender(run, method)[0].strategy
    (group,) = strategy.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (run.preset.lr, 0.9, 5e-4)
    assert not group["nesterov"] and type(strategy.optimizer) is torch.optim.SGD
    assert {id(p) for p in group["params"]} == {id(p) for p in strategy.model.parameters()}
    assert strategy.train_epochs == run.preset.epochs


def test_an_experience_begins_at_the_full_rate_without_momentum(tmp_path: Path) -> None:
    run = run_of(tmp_path, protocol="replay", epochs=5)
    strategy, stream = (found := contender(run))[0].strategy, found[1]
    rates, momenta = [], []

    class Note(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            rates.append(strategy.optimizer.param_groups[0]["lr"] / run.preset.lr)
            momenta.append(len(strategy.optimizer.state))

    strategy.plugins.append(Note())
    for experience in stream:
        strategy.train(experience)
    assert rates == pytest.approx([1, 1, 1, 0.2, 0.04] * 2)
    assert [count == 0 for count in momenta] == [True, *[False] * 4] * 2


def test_the_memory_alone_is_trained_on_with_distillation_and_from_scratch_without(
    tmp_path: Path,
) -> None:
    alone = contender(run_of(tmp_path / "a", protocol="memory-only"))[0].strategy
    assert plugin_of(DistillationPlugin, alone).weight == 1
    scratch = contender(run_of(tmp_path / "b", protocol="gdumb"))[0].strategy
    assert not any(isinstance(plugin, DistillationPlugin) for plugin in scratch.plugins)
    for strategy in (alone, scratch):
        assert plugin_of(MemoryOnlyPlugin, strategy).augment is None  # batches are


@pytest.mark.parametrize("protocol", ["memory-only", "gdumb", "replay"])
def test_a_memory_has_the_seed_of_its_run(protocol: str, tmp_path: Path) -> None:
    found, _ = contender(run_of(tmp_path, protocol=protocol), seed=3)
    assert found.buffer is not None and found.buffer.seed == 3
    assert plugin_of(AugmentBatch, found.strategy).seed == 3


def test_the_bound_is_trained_on_all_data_so_far(tmp_path: Path) -> None:
    found, stream = contender(
        run_of(tmp_path, protocol="replay", methods="cumulative"), "cumulative"
    )
    shown: list[list[int]] = []

    class Note(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            shown.append([])

        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            shown[-1] += strategy.mb_y.tolist()

    found.strategy.plugins.append(Note())
    for experience in stream:
        found.strategy.train(experience)
    counts = [len(experience.dataset) for experience in stream]
    assert set(shown[0]) == {0, 1} and set(shown[-1]) == {0, 1, 2, 3}
    assert len(shown[0]) == counts[0] and len(shown[-1]) == sum(counts)


AUGMENT = augmentation("flip")


def batch(seed: int = 0) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    images = torch.rand(16, 3, 8, 8, generator=generator)
    return [images, torch.randint(4, (16,), generator=generator)]


def begun(seed: int = 0, step: int = 0, probability: float = 0.5) -> tuple[AugmentBatch, Any]:
    plugin = AugmentBatch(AUGMENT, probability, seed)
    strategy = SimpleNamespace(experience=SimpleNamespace(current_experience=step), mbatch=batch())
    plugin.before_training_exp(strategy)
    return plugin, strategy


def test_mixed_images_have_the_labels_of_both_by_their_shares() -> None:
    plugin, strategy = begun(seed=2, step=1, probability=1.0)
    images, labels = batch()
    logits = torch.randn(16, 4, generator=Generator().manual_seed(5))
    plain = F.cross_entropy(logits, labels)
    assert torch.equal(plugin.criterion(logits, labels), plain)
    plugin.before_forward(strategy)
    # The same draws, one after the other.
    generator = Generator().manual_seed(2001)
    augmented = AUGMENT(images, generator)
    mixed, partners, share = cutmix(augmented, generator, probability=1.0)
    assert torch.equal(strategy.mbatch[0], mixed) and 0 < share < 1
    # Of each image the share's part of the pixels is its own.
    own = (mixed == augmented).all(dim=1).float().mean(dim=(1, 2))
    foreign = own[(partners != torch.arange(16)).nonzero().flatten()]
    torch.testing.assert_close(foreign, torch.full_like(foreign, float(share)))
    expected = float(share) * plain + (1 - float(share)) * F.cross_entropy(logits, labels[partners])
    torch.testing.assert_close(plugin.criterion(logits, labels), expected)
    plugin.after_backward(strategy)
    assert torch.equal(plugin.criterion(logits, labels), plain)


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0, 0), (0.5, 70, 130)])
def test_so_many_batches_are_mixed(probability: float, least: int, most: int) -> None:
    plugin, strategy = begun(probability=probability)
    mixed = 0
    for _ in range(200):
        strategy.mbatch = batch()
        plugin.before_forward(strategy)
        assert plugin._mixed is not None
        mixed += bool(plugin._mixed[1] < 1)
    assert least <= mixed <= most


def test_seeds_and_experiences_have_draws_of_their_own() -> None:
    found = []
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        plugin, strategy = begun(seed, step, probability=1.0)
        plugin.before_forward(strategy)
        found.append(strategy.mbatch[0])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Trained:
    """As much of a strategy as a state of training is of."""

    def __init__(self, plugin: TrainingState, experience: int, epochs: int = 3) -> None:
        self.plugin, self.train_epochs = plugin, epochs
        self.experience = SimpleNamespace(current_experience=experience)
        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.device, self.plugins = torch.device("cpu"), [Schedule(SimpleNamespace())]
        self.dataloader, self.clock = SimpleNamespace(), SimpleNamespace(train_exp_epochs=0)
        plugin.before_training_exp(self)

    def epochs(self, count: int) -> None:
        for _ in range(count):
            self.clock.train_exp_epochs += 1
            self.plugin.after_training_epoch(self)


def test_a_state_is_taken_up_in_its_own_experience_alone(tmp_path: Path) -> None:
    first = Trained(TrainingState(tmp_path / "state", seconds=0), experience=1)
    first.epochs(2)
    again = Trained(TrainingState(tmp_path / "state"), experience=1)
    assert again.train_epochs == 1 and torch.equal(again.model.weight, first.model.weight)
    other = Trained(TrainingState(tmp_path / "state"), experience=2)
    assert other.train_epochs == 3 and not torch.equal(other.model.weight, first.model.weight)
    assert other.plugin.seconds_before == 0


def test_the_last_epoch_is_written_however_short_the_training(tmp_path: Path) -> None:
    found = Trained(TrainingState(tmp_path / "state", seconds=1000), experience=0)
    found.epochs(2)
    assert not (tmp_path / "state").exists()
    found.epochs(1)
    again = Trained(TrainingState(tmp_path / "state"), experience=0)
    assert again.train_epochs == 0


def test_seconds_add_up_over_several_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr("strategies.training_state.time", SimpleNamespace(perf_counter=lambda: now))
    for before in (0.0, 7.0, 14.0):
        found = Trained(TrainingState(tmp_path / "state", seconds=0), experience=0)
        assert found.plugin.seconds_before == before
        now += 7
        found.epochs(1)
