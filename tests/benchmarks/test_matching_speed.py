from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import matching_speed
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
from benchmarks.timing import (
    Stopwatch,
    Threshold,
    _resident,
    alternating,
    failures,
    peak_bytes,
    ratio,
    seconds,
)
from benchmarks.workload import Missed
from dc_replay import ArgumentError, Condenser, OnReal, dm, dream_plus, idc
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
    expected = {name: value.clone() for name, value in parameters.items()}
    optimizer = condenser.training.optimizer(expected)
    for name, weight in eager.network.named_parameters():
        torch.testing.assert_close(weight.grad, found[name], rtol=1e-9, atol=1e-13)
        expected[name].grad = found[name]
    optimizer.step()
    for name, weight in eager.network.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-9, atol=1e-13)
    assert not eager.embed(torch.rand(1, 2, 8, 8).double()).requires_grad


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


@pytest.mark.usefixtures("uncompiled")
def test_the_gate_looks_at_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.5, 0.0])
    row = {"width": 4, "ipc": 1, "float32_step_ratio": 9.0}
    monkeypatch.setattr(
        Case,
        "measure",
        lambda self: {**row, "recipe": self.recipe, "float32_error": next(errors)},
    )
    with pytest.raises(Missed, match="^idc width 4 ipc 1: error of float32 is 0.5, above [^;]*$"):
        main(replace(small(tmp_path), gate=True), "x")


def case_of(out: Path, recipe: str = "idc", *, ipc: int = 1, **changes: Any) -> Case:
    arguments = replace(small(out), **{"classes": 3, "exact": 3, **changes})
    images, targets = pictures(None, out, arguments.classes, arguments.images)
    return Case(arguments, recipe, 4, ipc, CPU, images, targets)


def test_a_step_of_both_ways_is_of_as_many_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(tmp_path)
    done: list[tuple[str, int]] = []
    match = EagerMatching.match

    def eager(self: EagerMatching, scale: Any, batch: Any) -> Any:
        done.append(("eager", 1))
        return match(self, scale, batch)

    monkeypatch.setattr(EagerMatching, "match", eager)
    programs_of = Case.programs

    def noted(self: Case, precision: Any) -> Any:
        found = programs_of(self, precision)

        def ours(parameters: Any, scale: Any, batches: Any) -> Any:
            done.append(("ours", len(batches)))
            return found.match(parameters, scale, batches)

        return SimpleNamespace(match=ours, network=found.network)

    monkeypatch.setattr("dc_replay.programs.compiled", lambda function, compile, **_: function)
    monkeypatch.setattr(Case, "programs", noted)
    works: dict[str, Any] = {}

    def timed(given: Any, device: Any, *, rounds: int) -> dict[str, list[float]]:
        works.update(given)
        return {name: [8.0, 9.0] if name == "eager" else [2.0, 3.0] for name in given}

    monkeypatch.setattr(matching_speed, "alternating", timed)
    errors = iter([1.0, 3.0, 20.0, 7.0, 5.0, 6.0])
    exact = []

    def error(own: torch.Tensor, expected: torch.Tensor) -> float:
        exact.append(expected)
        return next(errors)

    monkeypatch.setattr(matching_speed, "relative_error", error)
    peaks = {"eager": 100, "float32": 7}

    def peak(work: Any, device: Any) -> int:
        return next(peaks[name] for name, own in works.items() if own is work)

    monkeypatch.setattr(matching_speed, "peak_bytes", peak)
    row = case._step({"float32": "float32"})
    assert row["eager_step_seconds"] == [8.0, 9.0] and row["float32_step_seconds"] == [2.0, 3.0]
    assert row["float32_step_ratio"] == 3.5  # the median of 4 and 3
    assert (row["eager_error"], row["float32_error"]) == (3.0, 6.0)
    assert (row["eager_peak_bytes"], row["float32_peak_bytes"]) == (100, 7)
    # Both are held against the same three gradients, which are computed in double precision.
    assert all(one.dtype == torch.float64 for one in exact)
    assert all(map(torch.equal, exact[:3], exact[3:]))
    done.clear()
    for work in works.values():
        work()
    assert done == [("eager", 1), ("ours", 1)]


def test_a_class_is_compared_with_images_of_its_own(tmp_path: Path) -> None:
    arguments = replace(small(tmp_path), classes=3)
    targets = torch.arange(3).repeat_interleave(20)
    images = (targets * 50).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    case = Case(arguments, "idc", 4, 2, CPU, images.contiguous(), targets)
    assert case.factory(3).layers[0].out_channels == 4
    for label in range(3):
        batch = case._class_batch(label, torch.Generator().manual_seed(0))
        assert (batch.real == 50 * label).all() and int(batch.label) == label
        torch.testing.assert_close(batch.stored, torch.full_like(batch.stored, 50 * label / 255))
        assert len(batch.stored) == 2 and len(batch.real) == 8


@pytest.mark.parametrize(("recipe", "expected"), [("idc", 3.0), ("dream_plus", 1.2)])
def test_an_iteration_of_ours_is_a_whole_one(
    recipe: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(tmp_path, recipe, ipc=3)
    given: dict[str, Any] = {}

    def condense(self: Condenser, images: Any, labels: Any, **options: Any) -> None:
        given.update(condenser=self, count=len(images), **options)
        # One iteration takes 1 second, and the next, which clusters where that is done, 3.
        self.update.ends.extend([0.0, 1.0, 4.0, 5.0, 8.0])

    monkeypatch.setattr(Condenser, "condense", condense)
    assert case._our_iteration("bfloat16") == pytest.approx(expected)
    built = given["condenser"]
    assert given["quotas"] == 3 and given["count"] == 60
    assert built.compile is True and built.precision == "bfloat16"
    assert built.update.update == case.condenser.update == OnReal(64)
    assert (built.outer, built.inner) == (1, 5)
    if recipe == "dream_plus":
        assert built.sampler == replace(case.condenser.sampler, every=2)
        assert case.condenser.sampler.every == 10
    else:
        assert built.sampler == case.condenser.sampler


def test_ratios_of_iterations_say_how_many_times_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"float32": 2.0, "bfloat16": 1.0}
    monkeypatch.setattr(Case, "_our_iteration", lambda self, precision: ours[precision])
    monkeypatch.setattr(Case, "_eager_iteration", lambda self: 8.0)
    row = case_of(tmp_path, rounds=4)._iteration({name: name for name in ours})
    assert (row["float32_iteration_ratio"], row["bfloat16_iteration_ratio"]) == (4.0, 8.0)
    assert row["eager_iteration_seconds"] == [8.0] * 2
    assert row["bfloat16_iteration_seconds"] == [1.0] * 2


def test_an_iteration_of_the_plain_way_is_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(tmp_path, "dream_plus", images=50)
    counts = Counter[str]()
    for name in ("match", "train", "embed"):
        method = getattr(EagerMatching, name)

        def noted(self: Any, *args: Any, method: Any = method, name: str = name) -> Any:
            counts[name] += len(args[-1]) if name == "embed" else 1
            return method(self, *args)

        monkeypatch.setattr(EagerMatching, name, noted)
    took = iter([10.0, 100.0])

    def timed(work: Any, device: Any) -> float:
        work()
        return next(took)

    monkeypatch.setattr(matching_speed, "seconds", timed)
    assert case._eager_iteration() == 10 / 10 + 100
    # All classes, a mini-batch of 64 images, and features of all 150 in batches of 100.
    assert counts == {"match": 3, "train": 1, "embed": 200}


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
    other = 255 - images
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=other, y_test=labels)
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
    assert failures([Threshold("x", float("nan"), most=1)]) == ["x is nan, above 1"]


def test_works_take_turns_and_the_median_counts() -> None:
    calls: list[str] = []
    found = alternating(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=2, times=2
    )
    assert calls == ["a", "b", "a", "a", "b", "b", "a", "a", "b", "b"]
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0]) == 3


def test_seconds_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 40.0])
    monkeypatch.setattr("benchmarks.timing.time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert seconds(lambda: None, CPU, times=6) == 5


def test_memory_is_read_in_kib(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9 kB\nVmRSS:\t  123 kB\n")
    assert _resident(status, "VmRSS") == 123 * 1024


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
