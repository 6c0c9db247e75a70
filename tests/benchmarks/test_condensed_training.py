from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.condensed_sets import CondensedSet, FreshTraining
from benchmarks.condensed_training import Arguments, cli, main
from benchmarks.data import DataError, hold_out, load
from benchmarks.presets import PRESETS
from dc_replay import ArgumentError, Exemplars, Formation


def smoke(out: Path, **changes: object) -> Arguments:
    small = Arguments(
        preset="smoke", recipes="random,idc+sm", ipc="1,2", classes=3, out=out, quiet=True
    )
    return replace(small, **changes)


def rows(out: Path) -> list[dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "accuracy"]


def test_every_recipe_size_network_and_run_is_measured(tmp_path: Path) -> None:
    asked = smoke(tmp_path, networks="convnet1,resnet10", runs=2, seeds="0,1")
    table = main(asked, "the command")
    found = rows(tmp_path)
    keys = ("method", "ipc", "network", "seed", "run")
    assert {tuple(row[key] for key in keys) for row in found} == {
        (name, ipc, network, seed, run)
        for name in ("random", "idc+sm")
        for ipc in (1, 2)
        for network in ("convnet1", "resnet10")
        for seed in (0, 1)
        for run in (0, 1)
    }
    assert all(row["stored_bytes"] == row["ipc"] * 3 * 64 for row in found)
    assert len(list((tmp_path / "sets").iterdir())) == 8
    assert "resnet10" in table and "±" in table
    assert "the command" in (tmp_path / "report.md").read_text()


def test_a_second_call_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(smoke(tmp_path), "x")
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(FreshTraining, "accuracy", lambda *_: pytest.fail("computed again"))
    main(smoke(tmp_path), "x")
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_network_learns_what_the_set_shows() -> None:
    data = load("digits")
    settings = replace(PRESETS["smoke"], width=16, set_steps=150, batch=32, lr=0.02)
    training = FreshTraining(
        "convnet1",
        data,
        settings,
        device=torch.device("cpu"),
        mode=False,
        precision="float32",
        quiet=True,
    )

    def stored(count: int) -> CondensedSet:
        rows = [torch.nonzero(data.y_train == c).flatten()[:count] for c in range(10)]
        labels = torch.arange(10).repeat_interleave(count)
        return CondensedSet(Exemplars(data.x_train[torch.cat(rows)], labels), Formation(1), 0.0, [])

    many, few = training.accuracy(stored(40), seed=0), training.accuracy(stored(1), seed=0)
    assert many > 80 > few > 20
    assert training.accuracy(stored(1), seed=0) == few  # nothing of the run before is left


def test_settings_are_chosen_on_held_out_training_images(tmp_path: Path) -> None:
    data = load("digits")
    parted = hold_out(data, 20)
    assert len(parted.x_test) == 200 and len(parted.x_train) == len(data.x_train) - 200
    train = {image.numpy().tobytes() for image in data.x_train}
    assert all(image.numpy().tobytes() in train for image in parted.x_test)
    last = data.x_train[data.y_train == 3][-20:]
    assert torch.equal(parted.x_test[parted.y_test == 3], last)
    kept = torch.cat([parted.x_train, parted.x_test]).flatten(1).sort(dim=0).values
    assert torch.equal(kept, data.x_train.flatten(1).sort(dim=0).values)
    main(smoke(tmp_path, holdout=20), "x")
    assert {row["data"] for row in rows(tmp_path)} == {"digits, held-out training images"}
    assert "held-out training images" in (tmp_path / "report.md").read_text()
    for count in (0, 1000):
        with pytest.raises(DataError, match=f"`holdout` is {count}, but digits has a class of"):
            hold_out(data, count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": "best"}, "'best'"),
        ({"recipes": " "}, "`recipes` is ' '; name at least one"),
        ({"ipc": "0"}, "`ipc` is 0"),
        ({"ipc": "one"}, "`ipc` is 'one'"),
        ({"runs": 0}, "`runs` is 0"),
        ({"steps": 0}, "`steps` is 0"),
        ({"networks": "convnet1,vgg"}, "`network` is 'vgg'"),
        ({"matching": "resnet10"}, "`matching` is 'resnet10', but ConvNets condense"),
        ({"classes": 0}, "`classes` is 0"),
        ({"recipes": "idc_i+sm"}, r"idc_i\+sm divides .* at 1 stored images .* there are 1; leave"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        main(smoke(tmp_path, **changes), "x")
    assert not list(tmp_path.iterdir())  # found before anything began


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--preset", "smoke", "--classes", "2", "--quiet", "--out", str(tmp_path)]
    assert cli([*asked, "--recipes", "random", "--ipc", "1"]) == 0
    assert "random" in capsys.readouterr().out
    assert cli([*asked, "--recipes", "none"]) == 2
    assert capsys.readouterr().err.startswith("error: `recipes` names 'none'")
