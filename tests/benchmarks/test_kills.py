from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kills
from benchmarks.killed import PHASES, STARTING, WORKING, Task
from benchmarks.kills import Arguments, Life, cells, cli, main
from dc_replay import ArgumentError, DCReplayError

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def small(out: Path, **changes: object) -> Arguments:
    asked = Arguments(
        kills=2, method="idc+mdc", experiences=2, outer=8, inner=1, device="cpu", out=out
    )
    return replace(asked, **changes)


def found(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
@needs_sigkill
def test_what_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    shown = main(small(tmp_path), "the command")
    assert found(tmp_path)["command"] == "the command"
    rows = found(tmp_path)["rows"]
    assert sum(len(row["kills"]) for row in rows) == 2
    for row in rows:
        assert row["identical"] and row["seconds"] > 0 and row["undisturbed_seconds"] > 0
        assert {kill["phase"] for kill in row["kills"]} <= set(PHASES)
    assert f"2 kills in {len(rows)} runs" in shown


def pretended(
    monkeypatch: pytest.MonkeyPatch, *, other: tuple[int, ...] = (), broken: bool = False
) -> list[float | None]:
    """Processes that are killed if their moment comes before the middle of their life.

    Those of the runs in ``other`` write other bytes. Returns the moments that were asked for.
    """
    moments: list[float | None] = []

    def live(task: Task, moment: float | None) -> Life:
        moments.append(moment)
        Path(task.folder).mkdir(parents=True, exist_ok=True)
        if moment is not None and moment < 5:
            if broken:
                raise DCReplayError("the process that condenses ended with 1: ValueError: oh")
            (Path(task.folder) / f".state.{len(moments)}.tmp").touch()
            return Life(moment, STARTING if moment < 2 else WORKING, killed=True)
        run = Path(task.folder).name
        text = "other" if run in [f"run-{number}" for number in other] else "same"
        for step in range(task.experiences):
            task.memory_file(step).write_text(text)
            task.model_file(step).write_text(run)
        return Life(10.0, PHASES[-1], killed=False)

    monkeypatch.setattr(kills, "live", live)
    return moments


def test_there_are_as_many_kills_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = pretended(monkeypatch)
    shown = main(small(tmp_path, kills=30), "x")
    rows = found(tmp_path)["rows"]
    assert sum(len(row["kills"]) for row in rows) == 30 and all(row["identical"] for row in rows)
    assert moments[0] is None and moments[-1] is None and moments.count(None) == 2
    drawn = [moment for moment in moments if moment is not None]
    assert min(drawn) < 1 and max(drawn) > 9
    early = sum(moment < 2 for moment in drawn)
    table = [line.split() for line in shown.splitlines()]
    assert [STARTING, *3 * [str(early)]] in table and ["all", *3 * ["30"]] in table
    before = list(moments)
    del moments[:]
    main(small(tmp_path, kills=30), "x")
    assert moments == before  # the moments follow from the seed


def test_other_bytes_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(monkeypatch, other=(1,))
    options = ["--kills", "9", "--device", "cpu", "--out", str(tmp_path)]
    assert cli(options) == 1
    assert "missed: the files of run 1 differ" in capsys.readouterr().err
    assert [row["identical"] for row in found(tmp_path)["rows"]].count(False) == 1


def test_other_weights_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch)
    with pytest.raises(kills.Missed, match="the files of run 0.* differ"):
        main(small(tmp_path, avalanche=True), "x")


def test_a_process_that_cannot_go_on_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(monkeypatch, broken=True)
    with pytest.raises(kills.Missed, match="run . could not go on: .*ValueError: oh"):
        main(small(tmp_path), "x")
    assert found(tmp_path)["rows"][-1]["problem"].endswith("oh")


def test_a_process_that_fails_is_an_error_that_says_why(tmp_path: Path) -> None:
    task = Task(
        folder=str(tmp_path),
        method="magic",
        experiences=1,
        outer=1,
        inner=1,
        seed=0,
        device="cpu",
        avalanche=False,
        as_shipped=False,
    )
    with pytest.raises(DCReplayError, match="ended with 1: .*: `method` names 'magic'"):
        kills.live(task, None)


def test_kills_are_counted_by_phase() -> None:
    rows = [
        {"identical": False, "kills": [{"phase": STARTING, "within_a_write": False}]},
        {
            "identical": True,
            "kills": [{"phase": WORKING, "within_a_write": within} for within in (True, False)],
        },
    ]
    header, lines = cells(rows)
    assert len(header) == 4
    counted = {line[0]: line[1:] for line in lines}
    assert counted[STARTING] == ("1", "0", "0") and counted[WORKING] == ("2", "1", "2")
    assert counted["all"] == ("3", "1", "2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kills": 0}, "`kills` is 0, but must be at least 1"),
        ({"experiences": 0}, "`experiences` is 0"),
        ({"outer": 0}, "`outer` is 0"),
        ({"seed": -1}, "`seed` is -1, but must be at least 0"),
        ({"method": "herding"}, "`method` is 'herding', which optimises nothing"),
        ({"method": "magic"}, "`method` names 'magic', but the known recipes"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        main(small(tmp_path, **changes), "x")
    assert not list(tmp_path.iterdir())
