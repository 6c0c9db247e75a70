from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import campaign, class_incremental
from benchmarks.campaign import RESULTS, TABLES, Arguments, Table, chosen, cli, deadline, main
from benchmarks.data import ImageData
from benchmarks.presets import PRESETS
from dc_replay import ArgumentError
from dc_replay.optimisation import Optimisation

DIGITS = {"ipc": 2, "order": "shuffled", "compile": "never"}
SMALL = {
    "first": Table(("random", "idc"), DIGITS, "same"),
    "second": Table(("idc",), {**DIGITS, "protocol": "gdumb"}, "same"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Arguments:
    monkeypatch.setitem(campaign.TABLES, "fast", SMALL)
    return Arguments(
        data="digits",
        preset="smoke",
        seeds="0",
        quiet=True,
        state=tmp_path / "state",
        out=tmp_path / "results",
    )


def rows(arguments: Arguments, table: str) -> list[dict]:
    path = arguments.out / "fast" / table / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_piece_is_made_and_told(small: Arguments) -> None:
    assert "3 of 3 pieces are left" in main(replace(small, list=True), "x")
    assert not small.out.exists()
    table = main(small, "x")
    assert "0 of 3 pieces are left" in table and table.count("5 of 5") == 3
    assert [(r["method"], r["step"]) for r in rows(small, "first")] == [
        (method, step) for method in ("random", "idc") for step in range(5)
    ]
    report = (small.out / "fast" / "first" / "report.md").read_text()
    assert (
        "python -m benchmarks.campaign --scale fast --tables first --data digits --preset smoke"
        in report
    )


def test_what_two_tables_need_is_condensed_once(
    small: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Optimisation.run

    def slow(self: Optimisation, checkpoint: object = None) -> object:
        time.sleep(1)
        yield from run(self, checkpoint)

    monkeypatch.setattr(Optimisation, "run", slow)
    main(replace(small, tables="first"), "x")
    before = [row["condense_seconds"] for row in rows(small, "first") if row["method"] == "idc"]

    def refuse(self: Optimisation, checkpoint: object = None) -> object:
        assert self.pace.over, "condensed again"
        return run(self, checkpoint)

    monkeypatch.setattr(Optimisation, "run", refuse)
    main(replace(small, tables="second"), "x")
    found = rows(small, "second")
    assert len(found) == 5
    for row, seconds in zip(found, before, strict=True):
        # What the first table's took, whoever reads it; only loading it comes on top.
        assert 1 <= row["condense_seconds"] < seconds + 2
        assert row["train_seconds"] > 0


def test_it_stops_in_time_and_goes_on(
    small: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = class_incremental.Run._step

    def slow(self, contender, method, seed, number, data, stream):
        if (method, number) == ("idc", 1):
            for _ in range(300):
                time.sleep(0.1)
        return step(self, contender, method, seed, number, data, stream)

    monkeypatch.setattr(class_incremental.Run, "_step", slow)
    began = time.monotonic()
    main(replace(small, tables="first", methods="random"), "x")
    first = main(replace(small, tables="first", minutes=5 / 60), "x")
    assert time.monotonic() - began < 28
    assert "are over" in capsys.readouterr().out
    assert "1 of 2 pieces are left" in first
    monkeypatch.setattr(class_incremental.Run, "_step", step)
    assert "0 of 2 pieces are left" in main(replace(small, tables="first"), "x")
    found = [(row["method"], row["step"]) for row in rows(small, "first")]
    assert len(found) == len(set(found)) == 10


def test_a_deadline_that_somebody_swallows_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    swallowed = 0
    with deadline(0.5 / 60):
        for _ in range(100):
            try:
                time.sleep(0.1)
            except KeyboardInterrupt:
                swallowed += 1
                if swallowed == 2:
                    raise
    assert swallowed == 2 and "are over" in capsys.readouterr().out
    with deadline(1):
        pass
    assert not capsys.readouterr().out


def test_ctrl_c_is_no_deadline() -> None:
    with pytest.raises(KeyboardInterrupt), deadline(10):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": "first,third"}, "`tables` names 'third', but those of scale fast are first, "),
        ({"methods": "dm"}, "`methods` names 'dm', but those of the tables are random, idc"),
        ({"minutes": 0.0}, "`minutes` is 0.0, but must be above 0"),
        ({"seeds": "a"}, "`seeds` is 'a'"),
        ({"out": RESULTS}, "`preset` is 'smoke', which makes no results to keep; name another"),
    ],
)
def test_bad_arguments(small: Arguments, changes: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        main(replace(small, **changes), "x")


def test_command_line(small: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["--list", "--out", str(small.out)]) == 0
    assert "pieces are left" in capsys.readouterr().out
    assert cli(["--tables", "none"]) == 2
    assert "error: `tables`" in capsys.readouterr().err


@pytest.mark.parametrize("scale", TABLES)
def test_every_table_can_be_run(scale: str) -> None:
    """Options exist, methods have names, and every memory of a table gets the same bytes."""
    assert scale in PRESETS
    for piece in chosen(Arguments(scale=scale)):
        arguments = class_incremental.Arguments(
            **{
                **piece.table.options,
                "data": "digits",
                "methods": piece.method,
                "preset": scale,
                "steps": 5,
            }
        )
        assert class_incremental.Run(arguments).methods == [piece.method]


def test_a_memory_of_a_total_is_always_full(
    small: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = campaign._REPLAYED
    table = Table(methods, {**DIGITS, "protocol": "replay", "budget": "total-images:20"}, total=20)
    monkeypatch.setitem(campaign.TABLES, "fast", {"replay": table})
    main(replace(small, classes=10), "x")
    found = rows(small, "replay")
    assert len(found) == 5 * len(methods)
    # 8x8 pixels of one channel, 20 images of however many classes there are.
    assert {row["stored_bytes"] for row in found} == {1280}


def asked(table: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> class_incremental.Run:
    """What the campaign would run for a table, on data of no weight."""
    found: list[class_incremental.Arguments] = []
    labels = torch.arange(100)
    images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    names = tuple(map(str, range(100)))
    data = ImageData("cifar100", images, labels, images, labels, 100, names)
    with monkeypatch.context() as patch:
        patch.setattr(class_incremental, "main", lambda workload, command: found.append(workload))
        patch.setattr(class_incremental.Arguments, "load", lambda self: data)
        chosen(Arguments(scale=scale, tables=table, data="npz:data/cifar100.npz"))[0].run(
            Arguments(scale=scale, data="npz:data/cifar100.npz")
        )
        return class_incremental.Run(found[0])


@pytest.mark.parametrize("table", TABLES["fast"])
def test_committed_results_are_of_what_the_campaign_asks_for(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = json.loads((RESULTS / "fast" / table / "settings.json").read_text())
    assert asked(table, "fast", monkeypatch).settings() == committed["settings"]


@pytest.mark.parametrize("table", TABLES["paper"])
def test_published_tables_have_the_published_settings(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(table, "paper", monkeypatch).settings()
    published = {"protocol": "memory-only", "order": "idc", "classes": 100, "steps": 5, "ipc": 20}
    published |= {"width": 128, "epochs": 1000, "batch": 64, "lr": 0.01, "pixel_lr": 5e-3}
    published |= {"inner": None, "network_images": 2048, "real_batch": None, "factor": 2}
    assert {name: found[name] for name in published} == published
    assert found["outer"] == (60 if table.endswith("60") else 20)
    assert found["network"] == ("resnet10" if table == "resnet10" else "convnet3")


def test_every_table_has_a_seed_before_any_has_another() -> None:
    pieces = chosen(Arguments(tables="balanced_200,memory_only", methods="random", seeds="1,0"))
    assert [(piece.seed, piece.name) for piece in pieces] == [
        (seed, name) for seed in (1, 0) for name in ("balanced_200", "memory_only")
    ]
