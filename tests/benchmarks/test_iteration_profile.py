from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.iteration_profile import PARTS, Arguments, main

ASKED = {"preset": "smoke", "classes": 2, "ipc": 1, "images": 20, "iterations": 4, "device": "cpu"}


@pytest.mark.parametrize("recipe", ["idc", "dream_plus"])
def test_parts_are_told_apart(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dc_replay.programs.compiled", lambda function, compile, **_: function)
    table = main(Arguments(recipe=recipe, out=tmp_path, **ASKED), "the command")
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["way"] for row in found["rows"]] == ["eager float32", "compiled"]
    for row in found["rows"]:
        clusters = recipe == "dream_plus"
        named = {part for part in PARTS if row[part] > 1e-6}
        assert "pixel steps of all classes" in named and "training the network" in named
        assert clusters or "k-means" not in named
        assert row["all"] > 0
    assert "the rest" in table and "k-means" in table
