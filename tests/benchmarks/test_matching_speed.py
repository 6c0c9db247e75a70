from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.eager import EagerMatching
from benchmarks.matching_speed import (
    Arguments,
    Case,
    cli,
    main,
    pictures,
    relative_error,
    thresholds,
)
from benchmarks.timing import Stopwatch, Threshold, alternating, failures, peak_bytes, ratio
from benchmarks.workload import Missed
from dc_replay import ArgumentError, OnReal, dm, dream_plus, idc
from dc_replay.augment import augmentation
from dc_replay.matching import ClassBatch, match_function
from dc_replay.networks import ConvNet, MatchingNetwork
from dc_replay.pixels import Normalization
from dc_replay.terms import Sides
from dc_replay.training import TrainingBatch

CPU = torch.device("cpu")


def build(classes: int) -> ConvNet:
    return ConvNet(classes, channels=2, size=(8, 8), width=3, depth=1).double()


@pytest.mark.parametrize("index", [None, [6, 1, 3]], ids=["all", "some"])
@pytest.mark.parametrize("recipe", [idc, dream_plus])
def test_the_plain_way_computes_what_the_fast_one_does(recipe, index, generator) -> None:
    condenser = recipe(network=build)
    network = MatchingNetwork(build, 3, torch.zeros(1, 2, 8, 8).double())
    parameters = network.fresh()
    eager = EagerMatching(condenser, build(3))
    eager.load(parameters)
    scale = Normalization((0.4, 0.5), (0.3, 0.2)).scale(CPU, torch.float64)
    stored = torch.rand(2, 2, 8, 8, generator=generator, dtype=torch.float64)
    batch = ClassBatch(
        real=torch.randint(256, (5, 2, 8, 8), dtype=torch.uint8, generator=generator),
        stored=stored,
        used=None if index is None else torch.tensor(index),
        changes=condenser.augment.draw(generator, 1),
        label=torch.tensor(2),
        terms=Sides.even(8 if index is None else len(index), 5, stored).whole(),
    )
    match = match_function(network, condenser.objective, condenser.formation, condenser.augment)
    ours = match(parameters, scale, batch)
    distance, slope = eager.match(scale, batch)
    torch.testing.assert_close(ours.distance, distance, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.slope, slope, rtol=1e-8, atol=1e-13)

    training = TrainingBatch(
        images=torch.randint(256, (4, 2, 8, 8), dtype=torch.uint8, generator=generator),
        labels=torch.tensor([0, 1, 2, 1]),
        partners=torch.tensor([2, 0, 3, 1]),
        changes=augmentation("color", "crop").draw(generator, 4),
        mix=torch.tensor([0.1, 0.4, 0.6, 0.5]),
    )
    found = condenser.training.step_function(network)(parameters, scale, training)
    eager.train(scale, training)
    for name, weight in eager.network.named_parameters():
        torch.testing.assert_close(weight.grad, found[name], rtol=1e-9, atol=1e-13)


def test_recipes_that_match_something_else_are_refused() -> None:
    with pytest.raises(ArgumentError, match="`recipes` names 'dm', which the plain loop does not"):
        EagerMatching(dm(), build(2))


def small(out: Path) -> Arguments:
    return Arguments(
        recipes="idc,dream_plus",
        widths="4",
        ipc="1",
        classes=2,
        images=20,
        real_batch=8,
        network_images=64,
        rounds=2,
        device="cpu",
        out=out,
    )


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dc_replay.programs.compiled", lambda function, compile, **_: function)


@pytest.mark.usefixtures("uncompiled")
def test_every_case_is_measured(tmp_path: Path) -> None:
    table = main(small(tmp_path), "the command")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["command"] == "the command" and found["commit"]
    assert found["settings"]["classes"] == 2
    assert [row["recipe"] for row in found["rows"]] == ["idc", "dream_plus"]
    for row in found["rows"]:
        assert len(row["eager_step_seconds"]) == 2
        assert row["float32_error"] < max(1e-4, 3 * row["eager_error"])
        assert row["float32_step_ratio"] > 0 and row["float32_iteration_ratio"] > 0
    assert "dream_plus" in table and "iteration" in table


@pytest.mark.usefixtures("uncompiled")
def test_the_gate_closes_on_a_wrong_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = iter([0.0, 0.0, 0.5, 0.5] * 2)  # of two classes, eager and then in float32
    monkeypatch.setattr("benchmarks.matching_speed.relative_error", lambda *_: next(errors))
    monkeypatch.setattr("benchmarks.matching_speed.has_bfloat16", lambda device: False)
    asked = replace(small(tmp_path), recipes="idc", gate=True, iterations=False)
    with pytest.raises(Missed, match=r"idc width 4 ipc 1: error of float32 is 0.5, above 0"):
        main(asked, "x")
    argv = ["--recipes", "idc", "--widths", "4", "--ipc", "1", "--classes", "2", "--images", "20"]
    argv += ["--real-batch", "8", "--rounds", "1", "--no-iterations", "--gate", "--device", "cpu"]
    assert cli([*argv, "--out", str(tmp_path)]) == 1
    assert "missed: idc width 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["classes", "images", "network_images", "factor", "exact", "rounds"]
)
def test_counts_below_1_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"`{option}` is 0, but must be at least 1"):
        main(replace(small(tmp_path), **{option: 0}), "x")


def test_a_case_compares_what_is_above_most_decoded(tmp_path: Path) -> None:
    case = Case(small(tmp_path), "idc", 4, 40, CPU, *pictures(None, tmp_path, 2, 20))
    batch = case._class_batch(1, torch.Generator().manual_seed(0))
    assert len(batch.used) == 128 == len(batch.used.unique())
    assert batch.terms.synthetic.shape == (1, 128)
    assert case.real.targets.bincount().tolist() == [20, 20]


def test_real_images_are_used_where_they_are_named(tmp_path: Path) -> None:
    images = np.arange(12 * 3 * 32 * 32, dtype=np.uint8).reshape(12, 32, 32, 3)
    labels = np.arange(12) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    source = f"npz:{tmp_path / 'd.npz'}"
    found, targets = pictures(source, tmp_path, 2, 3)
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found, torch.from_numpy(images[[0, 3, 6, 1, 4, 7]]).permute(0, 3, 1, 2))
    with pytest.raises(ArgumentError, match=r"`data` is 'npz.* with 3 classes .* but 4 classes"):
        pictures(source, tmp_path, 4, 3)


def test_thresholds_name_what_misses_them() -> None:
    row = {
        "recipe": "idc",
        "width": 8,
        "ipc": 2,
        "eager_error": 2e-6,
        "float32_error": 1e-6,
        "bfloat16_error": 0.4,
        "bfloat16_step_ratio": 0.5,
        "bfloat16_iteration_ratio": 3.0,
    }
    assert failures(thresholds(row)) == [
        "idc width 8 ipc 2: speed of a step is 0.5, below 1",
        "idc width 8 ipc 2: error of bfloat16 is 0.4, above 0.3",
    ]
    assert failures([Threshold("x", float("nan"), least=1), Threshold("y", 1.0, 1, 1)]) == [
        "x is nan, below 1"
    ]


def test_works_take_turns_and_the_median_counts() -> None:
    calls: list[str] = []
    found = alternating(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=2, times=2
    )
    assert calls == ["a", "b", "a", "a", "b", "b", "a", "a", "b", "b"]
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0]) == 3


def test_memory_that_is_touched_shows() -> None:
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert peak is None or 0.8 * size < peak < 3 * size


def test_an_error_is_relative_to_the_length() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_a_stopwatch_notes_every_iteration() -> None:
    watch = Stopwatch(OnReal(8))
    condenser = replace(
        idc(network=build_float, outer=1, inner=4), update=watch, most_decoded=8, compile=False
    )
    images = torch.randint(256, (20, 2, 8, 8), dtype=torch.uint8)
    condenser.condense(
        images, torch.arange(20) % 2, quotas=1, generator=torch.Generator().manual_seed(0)
    )
    assert len(watch.ends) == 4 and len(watch.iterations(skip=1)) == 2
    assert all(seconds > 0 for seconds in watch.iterations(skip=0))


def build_float(classes: int) -> ConvNet:
    return ConvNet(classes, channels=2, size=(8, 8), width=3, depth=1)
