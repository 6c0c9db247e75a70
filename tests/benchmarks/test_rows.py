"""What a row of results says, and that the run it is of was trained as the protocol describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import class_incremental
from benchmarks.class_incremental import Arguments, Run, _accuracies, _stream, main
from benchmarks.image_data import class_order
from dc_replay import ExemplarMemory, MemoryOnlyPlugin
from dc_replay.random_changes import random_changes
from strategies.common import AugmentBatch, Schedule


def smoke(out: Path, **changes: object) -> Arguments:
    small = Arguments(preset="smoke", methods="idc", ipc=2, classes=4, steps=2, out=out, quiet=True)
    return replace(small, **changes)


def metric(experience: int) -> str:
    return f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00{experience}"


def test_accuracies_are_percentages_in_the_order_of_experiences() -> None:
    found = {metric(1): 0.5, metric(0): 0.25, metric(2): 0.1}
    found["Top1_Acc_Stream/eval_phase/test_stream/Task000"] = 0.4
    assert _accuracies(found, 1) == [25.0, 50.0]


def test_accuracy_is_of_all_images_and_seconds_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(smoke(tmp_path, protocol="replay", classes=6, steps=3))
    now = 100.0

    def train(_: object) -> None:
        nonlocal now
        now += 10

    monkeypatch.setattr(class_incremental, "time", SimpleNamespace(perf_counter=lambda: now))
    strategy = SimpleNamespace(
        train=train,
        eval=lambda _: {metric(0): 0.9, metric(1): 0.3},
        plugins=[],
        clock=SimpleNamespace(train_exp_iterations=7),
    )
    # Of 5 seconds for the second experience 2 had passed in a process that was stopped.
    buffer = SimpleNamespace(seconds=[3.0, 5.0], seconds_before=[0.0, 2.0])
    contender = SimpleNamespace(strategy=strategy, buffer=buffer, stored_images=lambda: 12)
    # Of the two classes of the first experience there are 6 and 2 test images.
    data = SimpleNamespace(
        classes=6,
        y_test=torch.tensor([0] * 6 + [1] * 2 + [2, 3] + [4, 5] * 10),
        x_train=torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        name="digits",
    )
    stream = SimpleNamespace(train_stream=[None] * 3, test_stream=[None] * 3)
    row = run._step(contender, "idc", 0, 1, data, stream)  # type: ignore[arg-type]
    assert row["accuracy"] == pytest.approx((8 * 90 + 2 * 30) / 10)
    assert row["condense_seconds"] == 5 and row["train_seconds"] == 10 - (5 - 2)
    assert row["stored_bytes"] == 12 * 64 and row["images_per_class"] == 3
    assert row["classes_seen"] == 4 and row["iterations"] == 7


def test_forgetting_is_the_mean_fall_since_an_experience_was_learned(tmp_path: Path) -> None:
    run = Run(smoke(tmp_path))
    for step, found in enumerate([[90.0], [70.0, 80.0], [65.0, 75.0, 99.0]]):
        row = {"method": "idc", "seed": 0, "step": step, "experience_accuracies": found}
        run.store.append(row)
    assert run._forgetting("idc", 0, [99.0]) is None
    assert run._forgetting("idc", 0, [60.0, 70.0, 99.0]) == pytest.approx((30 + 10) / 2)
    assert run._forgetting("idc", 1, [60.0, 70.0, 99.0]) is None


def test_seeds_differ_in_weights_orders_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int, int]] = []
    weights: list[torch.Tensor] = []
    classes: list[list[str]] = []
    draws: list[float] = []
    step = Run._step

    def note(self: Run, contender: Any, method: str, seed: int, number: int, *rest: Any) -> Any:
        begun.append((seed, number, contender.buffer.seed))
        if number == 0:
            weights.append(next(contender.strategy.model.parameters()).detach().clone())
            classes.append(rest[0].class_names)
        draws.append(float(torch.rand(())))
        return step(self, contender, method, seed, number, *rest)

    monkeypatch.setattr(Run, "_step", note)
    main(smoke(tmp_path / "both", seeds="0,1"), "x")
    assert begun == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
    assert not torch.equal(*weights) and classes[0] != classes[1]
    assert len(set(draws)) == 4
    # The memory in the folder is of the first seed, as are the pictures.
    main(smoke(tmp_path / "first"), "x")
    first, both = (
        (tmp_path / out / "memories" / "idc.safetensors").read_bytes() for out in ("first", "both")
    )
    assert first == both


RATES = {
    "memory-only": [1.0] * 6 + [0.2] * 2 + [0.04] * 2,
    "gdumb": [1.0] * 5 + [0.1] * 5,
    "replay": [1.0] * 6 + [0.2] * 2 + [0.04] * 2,
}


@pytest.mark.parametrize("protocol", RATES)
def test_protocols_are_trained_as_published(protocol: str, tmp_path: Path) -> None:
    run = Run(smoke(tmp_path, protocol=protocol, preset="paper", epochs=10))
    data = run.arguments.in_order(run.data, seed=0)
    strategy = run._contender("random", 0, data, tmp_path).strategy
    [schedule] = [plugin for plugin in strategy.plugins if isinstance(plugin, Schedule)]
    schedule.before_training_exp(strategy)
    rates = []
    for _ in range(10):
        schedule.before_training_epoch(strategy)
        rates.append(strategy.optimizer.param_groups[0]["lr"] / run.preset.lr)
    assert rates == pytest.approx(RATES[protocol])
    assert strategy.train_mb_size == {"gdumb": 256}.get(protocol, 64)
    shown = [
        plugin.presentations_per_stored
        for plugin in strategy.plugins
        if isinstance(plugin, MemoryOnlyPlugin)
    ]
    [mixing] = [p.probability for p in strategy.plugins if isinstance(p, AugmentBatch)]
    assert mixing == 0.5
    assert shown == ([] if protocol == "replay" else [2**2])


def test_images_are_normalised_and_augmented_by_the_training_transforms(tmp_path: Path) -> None:
    run = Run(smoke(tmp_path))
    data = run.arguments.in_order(run.data, seed=0)
    stream = _stream(data, 2, "training").train_stream
    plain = torch.stack([item[0] for step in stream for item in step.dataset.eval()])
    assert float(plain.mean()) == pytest.approx(0, abs=0.01)
    assert float(plain.std()) == pytest.approx(1, abs=0.01)
    (crop, flip), others = random_changes(stream[0].dataset.train(), (8, 8))
    assert crop.padding == (1, 1, 1, 1) and flip.probability == 0.5 and not others


def test_exemplars_are_drawn_under_the_names_of_their_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        class_incremental,
        "exemplar_sheet",
        lambda sheet, path, class_names: drawn.extend(class_names),
    )
    arguments = smoke(tmp_path, methods="random", seeds="3")
    main(arguments, "x")
    data = Run(arguments).data
    order = class_order(data, "shuffled", seed=3, classes=4)
    memory = ExemplarMemory.load(tmp_path / "memories" / "random.safetensors")
    assert drawn == [data.class_names[order[label]] for label in memory.classes]
    for label, name in zip(memory.classes, drawn, strict=True):
        own = data.x_train[data.y_train == data.class_names.index(name)]
        for image in memory.of_class(label):
            assert (own == image).flatten(1).all(dim=1).any()
