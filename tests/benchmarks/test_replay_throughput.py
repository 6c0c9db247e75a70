from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay_throughput import (
    GATES,
    VARIANTS,
    Arguments,
    cells,
    cli,
    main,
    thresholds,
)
from benchmarks.tables import text_table
from benchmarks.timing import failures
from dc_replay import ArgumentError


def tiny(out: Path, **changes: object) -> Arguments:
    small = Arguments(
        images=32,
        memory=8,
        classes=4,
        iterations=3,
        rounds=2,
        batch=16,
        model="one-layer",
        width=4,
        device="cpu",
        out=out,
    )
    return replace(small, **changes)


@pytest.fixture
def npz(tmp_path: Path) -> str:
    images = np.random.default_rng(0).integers(256, size=(80, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(80) % 5
    path = tmp_path / "images.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f"npz:{path}"


def rates(**changes: float) -> list[dict]:
    """What a run would record: each ratio twice its threshold, unless a rate is given."""
    least = {f"{way}, {source}": 2 * value for (way, source), value in GATES.items()}
    found = {variant: least.get(variant, 1.0) for variant in VARIANTS} | changes
    return [
        {"model": model, "variant": variant, "rates": [rate, rate / 2, rate * 3]}
        for model, scale in (("one-layer", 1.0), ("convnet3", 0.0))
        for variant, rate in found.items()
        for rate in [rate * scale or 1.0]
    ]


@pytest.mark.parametrize("augment", [False, True])
def test_every_variant_is_measured(tmp_path: Path, npz: str, augment: bool) -> None:
    options = {"model": "one-layer,convnet1", "augment": augment, "data": npz}
    shown = main(tiny(tmp_path / "out", **options), "the command")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["command"] == "the command" and found["settings"]["images"] == 32
    assert {"device", "commit", "versions"} <= set(found)
    assert [(row["model"], row["variant"]) for row in found["rows"]] == [
        (model, variant) for model in ("one-layer", "convnet1") for variant in VARIANTS
    ]
    for row in found["rows"]:
        assert len(row["rates"]) == 2 and min(row["rates"]) > 0
        resident = "DeviceResident" in row["variant"]
        assert len(row.get("bringing_seconds", [])) == 2 * resident
    assert all(variant in shown for variant in VARIANTS)


def test_random_images_need_no_data(tmp_path: Path) -> None:
    main(tiny(tmp_path, rounds=1), "x")
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["data"] is None


def test_the_table_relates_rates_to_the_same_source() -> None:
    rows = rates(**{"stock, PIL": 2.0, "ours, PIL": 3.0, "bare tensors": 4.0})
    (line,) = [line for line in text_table(*cells(rows[:7])).splitlines() if "ours, PIL" in line]
    assert line.split()[-3:] == ["3.0", "1.50", "0.75"]


def test_good_ratios_pass_the_gate() -> None:
    assert failures(thresholds(rates())) == []
    assert len(thresholds(rates())) == 4


def test_each_bad_ratio_is_named() -> None:
    bad = rates(**{"ours, PIL": 1.2, "ours + DeviceResident, tensors": 1.7})
    assert failures(thresholds(bad)) == [
        "ours, PIL: rate over stock is 1.2, below 1.3",
        "ours + DeviceResident, tensors: rate over stock is 1.7, below 1.8",
    ]


@pytest.mark.parametrize(("stock", "code"), [(1.0, 0), (100.0, 1)])
def test_the_gate_decides_the_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stock: float,
    code: int,
) -> None:
    def measured(*_: object) -> list[dict]:
        return rates(**{"stock, tensors": stock})[: len(VARIANTS)]

    monkeypatch.setattr("benchmarks.replay_throughput.Contest.measure", measured)
    asked = ["--images", "32", "--memory", "8", "--classes", "4", "--batch", "16"]
    asked += ["--model", "one-layer", "--device", "cpu", "--out", str(tmp_path)]
    assert cli([*asked, "--gate"]) == code
    shown = capsys.readouterr()
    assert "bare tensors" in shown.out
    assert shown.err.count("below") == 2 * code
    assert cli(asked) == 0
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "`images` is 0"),
        ({"rounds": 0}, "`rounds` is 0"),
        ({"images": 4}, "`images` is 4, but a batch takes 16"),
        ({"classes": 3}, "`classes` is 3, but both"),
        ({"classes": 0}, "`classes` is 0, but both"),
        ({"memory": 1}, "`memory` is 1, but the first experience has 2 classes"),
        ({"model": "vgg"}, "`network` is 'vgg'"),
        ({"model": "convnet1", "gate": True}, "`model` is 'convnet1', but the gate"),
        ({"device": "nowhere"}, "`device` is 'nowhere'"),
        ({"data": "nowhere"}, "`data` is 'nowhere'"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match=message):
        main(tiny(out, **changes), "x")
    assert not out.exists()  # found before anything began


def test_too_few_images_of_a_class(tmp_path: Path, npz: str) -> None:
    with pytest.raises(ArgumentError, match="fewer than 50 images of class 0; lower"):
        main(tiny(tmp_path / "out", data=npz, images=100), "x")
    with pytest.raises(ArgumentError, match="fewer than 11 images of class 5; lower"):
        main(tiny(tmp_path / "out", data=npz, classes=6), "x")
