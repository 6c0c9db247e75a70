from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ranks
from benchmarks.ranks import Arguments, cells, chosen_runs, cli, main

ASKED = Arguments(
    runs="1x1,2x1",
    preset="smoke",
    classes=3,
    ipc=2,
    side=8,
    images=9,
    outer=2,
    inner=2,
    rounds=1,
    compile=False,
    device="cpu",
)


def test_runs_are_ranks_and_threads() -> None:
    assert chosen_runs(Arguments(runs="1x1,2x4,1x1")) == [(1, 1), (2, 4)]


def test_bytes_are_compared_at_equal_threads() -> None:
    row = {"seconds": [4.0, 5.0, 30.0], "network_seconds": [1.0]}
    _, lines = cells(
        [
            {**row, "ranks": 1, "threads": 1, "digest": "a"},
            {**row, "ranks": 2, "threads": 1, "digest": "a", "seconds": [2.5]},
            {**row, "ranks": 1, "threads": 2, "digest": "b", "seconds": [10.0]},
            {**row, "ranks": 4, "threads": 1, "digest": "c", "seconds": [5.0]},
        ]
    )
    assert [line[4:] for line in lines] == [
        ("1.00", "yes"),
        ("2.00", "yes"),
        ("0.50", "yes"),
        ("1.00", "no"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "2"], "`runs` is '2', but must be RANKSxTHREADS"),
        (["--runs", "1x1,0x1"], "`runs` is '1x1,0x1', but must be"),
        (["--rounds", "0"], "`rounds` is 0, but must be at least 1"),
        (["--preset", "huge"], "`preset` is 'huge'"),
    ],
)
def test_unusable_options_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_figures_are_written_after_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(arguments: Arguments, ranks: int, threads: int) -> dict[str, Any]:
        found = {"ranks": ranks, "threads": threads, "digest": "x"}
        return {**found, "seconds": [1.0 / ranks], "network_seconds": [0.1]}

    monkeypatch.setattr(ranks, "timed", timed)
    table = main(Arguments(runs="1x1,2x1", device="cpu", out=tmp_path), "the command")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["command"] == "the command" and found["versions"]["torch"]
    assert [row["ranks"] for row in found["rows"]] == [1, 2]
    assert "times as fast" in table and "2.00" in table


@pytest.mark.slow
def test_processes_are_started_and_timed(tmp_path: Path) -> None:
    from dataclasses import replace

    main(replace(ASKED, out=tmp_path), "the command")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["ranks"], row["threads"]) for row in rows] == [(1, 1), (2, 1)]
    assert rows[0]["digest"] == rows[1]["digest"]
    for row in rows:
        assert 0 < row["network_seconds"][0] < row["seconds"][0]
