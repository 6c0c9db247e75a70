from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.scaling import Arguments, Point, cli, iteration_seconds, main, points
from dc_replay import ArgumentError, Condenser, OnReal

ASKED = Arguments(
    preset="smoke",
    classes="2,3",
    ipc="1,3",
    sides="8",
    base_classes=2,
    base_ipc=1,
    base_side=8,
    images=9,
    iterations=2,
    device="cpu",
)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dc_replay.programs.compiled", lambda function, compile, **_: function)


def test_one_size_changes_at_a_time() -> None:
    assert points(replace(ASKED, base_classes=3, base_ipc=3)) == {
        "classes": [Point(2, 3, 8), Point(3, 3, 8)],
        "ipc": [Point(3, 1, 8), Point(3, 3, 8)],
        "side": [Point(3, 3, 8)],
    }


@pytest.mark.usefixtures("uncompiled")
def test_every_size_is_timed_once_and_drawn(tmp_path: Path) -> None:
    table = main(replace(ASKED, out=tmp_path), "the command")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["command"] == "the command" and found["versions"]["torch"]
    sizes = [(row["classes"], row["ipc"], row["side"]) for row in found["rows"]]
    assert sorted(sizes) == [(2, 1, 8), (2, 3, 8), (3, 1, 8)]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found["rows"])
    assert (tmp_path / "scaling.png").stat().st_size > 5_000
    assert "seconds per iteration" in table


def test_an_iteration_is_a_whole_one_of_the_size_that_it_is_named_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    def condense(self: Condenser, images: Any, labels: Any, **options: Any) -> None:
        given.update(condenser=self, images=images, labels=labels, **options)
        self.update.ends.extend([1.0, 3.0, 7.0])

    monkeypatch.setattr(Condenser, "condense", condense)
    assert iteration_seconds(ASKED, Point(4, 3, 12), torch.device("cpu")) == [2.0, 4.0]
    built = given["condenser"]
    assert given["images"].shape == (4 * 9, 3, 12, 12) and given["quotas"] == 3
    assert given["labels"].bincount().tolist() == [9] * 4
    assert built.update.update == OnReal(64) and built.compile is True
    assert (built.outer, built.inner) == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "0"], "`iterations` is 0, but must be at least 1"),
        (["--ipc", "1,0"], "`ipc` is 0, but must be at least 1"),
        (["--sides", "x"], "`sides` is 'x', but must be whole numbers"),
        (["--base-side", "0"], "`base_side` is 0"),
    ],
)
def test_unusable_options_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`name` is 'magic'"):
        main(replace(ASKED, recipe="magic", out=tmp_path), "x")
