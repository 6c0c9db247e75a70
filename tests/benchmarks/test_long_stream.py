from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import long_stream
from benchmarks.long_stream import (
    GATE_GROWTH,
    Arguments,
    LongStream,
    cli,
    main,
    records,
    summary,
    thresholds,
)
from benchmarks.timing import failures
from dc_replay import ArgumentError, CondensedReplayPlugin, ImagesPerClass, recipes


def small(out: Path, **changes: object) -> Arguments:
    asked = Arguments(
        experiences=8,
        pool=4,
        most=20,
        total_bytes=6 * 192,
        warm_up=2,
        window=3,
        baseline=False,
        device="cpu",
        out=out,
    )
    return replace(asked, **changes)


def found(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_stream_is_measured_with_replay_and_without(tmp_path: Path) -> None:
    shown = main(small(tmp_path, baseline=True), "the command")
    assert found(tmp_path)["command"] == "the command"
    ours, without = found(tmp_path)["rows"]
    assert (ours["way"], without["way"]) == ("with replay", "without")
    for row in (ours, without):
        assert len(row["train_seconds"]) == 8 and min(row["train_seconds"]) > 0
        assert min(row["resident_kib"]) > 50_000 and row["train_ratio"] > 0
    assert min(ours["condense_seconds"]) > 0 and max(without["condense_seconds"]) == 0
    assert ours["classes_stored"] == 4 and without["classes_stored"] == 0
    assert ours["most_stored_bytes"] == max(ours["stored_bytes"]) <= 6 * 192
    assert ours["record_bytes"] > 0 and without["most_stored_bytes"] == 0
    assert (tmp_path / "flat.png").stat().st_size > 5_000
    assert "with replay" in shown and "without" in shown


def test_other_methods_can_be_measured(tmp_path: Path) -> None:
    main(small(tmp_path, method="dream_plus", experiences=5, window=1), "x")
    [row] = found(tmp_path)["rows"]
    assert row["way"] == "with replay" and row["most_stored_bytes"] > 0


def test_seconds_of_training_and_condensing_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, taken = 50.0, []
    memory = SimpleNamespace(nbytes=7, classes=(1, 2))
    replay = SimpleNamespace(buffer=SimpleNamespace(seconds=taken, history=[]), memory=memory)

    def train(experience: object, **_: object) -> None:
        nonlocal now
        taken.append(1.0 + len(taken))
        now += 10 + taken[-1]

    monkeypatch.setattr(long_stream, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(long_stream, "_replay", lambda arguments: replay)
    monkeypatch.setattr(long_stream, "_strategy", lambda *_: SimpleNamespace(train=train))
    monkeypatch.setattr(long_stream, "records", lambda replay: 0.0)
    noted = long_stream.measure(small(tmp_path), torch.device("cpu"))
    assert noted["train_seconds"] == [10.0] * 8
    assert noted["condense_seconds"] == [1.0 + number for number in range(8)]
    assert noted["stored_bytes"] == [7] * 8 and noted["classes_stored"] == 2


def test_resident_memory_is_that_of_this_process_in_kib() -> None:
    status = Path("/proc/self/status").read_text()
    expected = next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)
    assert long_stream.resident_kib() == pytest.approx(expected, rel=0.05)


def test_experiences_are_unequal_and_follow_from_the_seed(tmp_path: Path) -> None:
    arguments = small(tmp_path, pool=50, most=100)
    stream = LongStream(arguments)
    assert (stream.counts[0], stream.counts[-1]) == (1, 100)
    assert stream.counts == sorted(stream.counts)
    seen: dict[int, int] = {}
    for number in range(90):
        experience = stream.experience(number)
        labels = [experience.dataset[i][1] for i in range(len(experience.dataset))]
        assert len(set(labels)) == 1 + number % 3
        for label in set(labels):
            assert labels.count(label) == stream.counts[label]
            seen[label] = seen.get(label, 0) + 1
    assert len(seen) > 40 and sorted(seen.values())[len(seen) // 2] > 1
    same, other = LongStream(arguments), LongStream(replace(arguments, seed=1))
    first = stream.experience(5).dataset[0][0]
    assert first.equal(same.experience(5).dataset[0][0])
    assert not first.equal(other.experience(5).dataset[0][0])


def noted(count: int = 50, *, growth: float = 0.0, slower: float = 1.0) -> dict[str, np.ndarray]:
    """As after a run that grew a lot while it warmed up, for ten experiences."""
    late = np.arange(count) >= count - 20
    resident = 1000.0 + growth * np.arange(count)
    resident[:10] = np.arange(10)
    seconds = np.where(late, slower, 1.0)
    seconds[:10] = 70.0
    return {
        "train_seconds": seconds,
        "condense_seconds": 2 * seconds,
        "resident_kib": resident,
        "stored_bytes": np.full(count, 500.0),
    }


@pytest.mark.parametrize(("growth", "slower"), [(0.0, 1.0), (3.0, 2.0), (-1.0, 0.5)])
def test_growth_and_slowing_down_are_found_after_the_warm_up(growth: float, slower: float) -> None:
    figures = summary(noted(growth=growth, slower=slower), warm_up=10, window=20)
    assert figures["growth_kib"] == pytest.approx(growth)
    assert figures["train_ratio"] == figures["condense_ratio"] == slower
    assert figures["most_stored_bytes"] == 500


def test_without_condensing_its_time_does_not_grow() -> None:
    without = noted() | {"condense_seconds": np.zeros(50)}
    assert summary(without, warm_up=10, window=20)["condense_ratio"] == 1


@pytest.mark.parametrize(
    ("changes", "other_growth", "message"),
    [
        ({}, 0.0, None),
        ({"growth": GATE_GROWTH + 5}, 0.0, "growth in KiB"),
        ({"growth": GATE_GROWTH + 5}, 10.0, None),
        ({"growth": GATE_GROWTH + 5}, -10.0, "growth in KiB"),
        ({"slower": 2.0}, 0.0, "time to condense"),
    ],
)
def test_the_gate_counts_what_is_above_the_run_without(
    changes: dict, other_growth: float, message: str | None
) -> None:
    rows = [
        summary(noted(**figures), warm_up=10, window=20)
        for figures in (changes, {"growth": other_growth})
    ]
    missed = failures(thresholds(rows, Arguments()))
    assert (not missed) if message is None else (message in missed[0])
    [too_much] = failures(thresholds([{**rows[1], "growth_kib": 0}], Arguments(total_bytes=499)))
    assert "stored bytes is 500, above 499" in too_much
    for name, said in (("condense_ratio", "time to condense"), ("train_ratio", "time to train")):
        [slower] = failures(thresholds([{**rows[1], "growth_kib": 0, name: 9.0}], Arguments()))
        assert slower.startswith(f"{said}, last to first is 9")


def test_a_missed_gate_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resident = iter(range(10**6, 10**9, 10**6))
    monkeypatch.setattr(long_stream, "resident_kib", lambda: float(next(resident)))
    options = ["--experiences=3", "--warm-up=1", "--window=1", "--pool=3", "--no-baseline"]
    assert cli([*options, "--gate", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "missed: growth in KiB per experience is 1e+06, above" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists() and (tmp_path / "flat.png").exists()


def test_the_size_of_what_the_plugin_records() -> None:
    replay = CondensedReplayPlugin(condenser=recipes.random(), budget=ImagesPerClass(1))
    before = records(replay)
    replay.history.append({"distance": [float(number) for number in range(1000)]})
    assert 24_000 + 8_000 <= records(replay) - before <= 34_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiences": 7}, "`experiences` is 7, but a warm-up of 2 and two windows of 3 need 8"),
        ({"pool": 0}, "`pool` is 0, but must be at least 1"),
        ({"classes": 5}, "`classes` is 5, but the pool has only 4"),
        ({"total_bytes": 3 * 192}, "`bytes` of TotalBytes is 576, which is below one image"),
        ({"method": "magic"}, "`method` names 'magic'"),
        ({"warm_up": -1}, "`warm_up` is -1, but must be at least 0"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        main(small(tmp_path, **changes), "x")
    assert not list(tmp_path.iterdir())
