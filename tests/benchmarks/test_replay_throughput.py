from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from benchmarks.replay_throughput import (
    GATES,
    PADDING,
    SOURCES,
    VARIANTS,
    Arguments,
    Contest,
    Pictures,
    cells,
    cli,
    main,
    thresholds,
)
from benchmarks.tables import text_table
from benchmarks.timing import failures
from dc_replay import ArgumentError
from dc_replay.pixels import quantise


def tiny(out: Path, **changes: object) -> Arguments:
    small = Arguments(
        images=32,
        memory=20,
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
    np.savez(path, x_train=images, y_train=labels, x_test=255 - images, y_test=labels)
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


class Noting(nn.Module):
    """One layer that notes the images it is shown, as the bytes that they were."""

    def __init__(self, contest: Contest) -> None:
        super().__init__()
        self.layers = contest.network("one-layer")()
        self.normalization = contest.normalization
        self.shown: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shown.append(quantise(self.normalization.invert(images.detach())))
        return self.layers(images)


def windows(images: torch.Tensor) -> set[bytes]:
    """All that cropping with a black border and mirroring makes of images."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (PADDING,) * 4)
    found = set()
    for row in range(2 * PADDING + 1):
        for column in range(2 * PADDING + 1):
            crops = padded[:, :, row : row + height, column : column + width]
            for one in (crops, crops.flip(-1)):
                found |= {image.numpy().tobytes() for image in one.contiguous()}
    return found


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_is_shown_as_many_images_of_the_same_kind(
    variant: str, augment: bool, tmp_path: Path, npz: str
) -> None:
    contest = Contest(tiny(tmp_path, augment=augment, data=npz), torch.device("cpu"))
    source = variant.partition(", ")[2]
    if source:  # and of no other
        contest.streams = {source: contest.streams[source]}
    made: list[Noting] = []
    contest._time(variant, lambda: made.append(Noting(contest)) or made[0])
    shown = made[0].shown
    assert len(shown) == (1 + contest.epochs) * contest.per_epoch == (1 + 2) * 2
    assert {len(batch) for batch in shown} == {2 * 16}
    old = contest.labels < 2
    for part, own in ((slice(16, 32), old), (slice(0, 16), ~old)):
        pixels = contest.pixels[own]
        plain = {image.numpy().tobytes() for image in pixels}
        found = [image.numpy().tobytes() for batch in shown for image in batch[part].contiguous()]
        assert set(found) <= (windows(pixels) if augment else plain)
        unchanged = sum(image in plain for image in found)
        assert unchanged < len(found) / 4 if augment else unchanged == len(found)
    memory = {image.numpy().tobytes() for batch in shown for image in batch[16:].contiguous()}
    if not augment:
        assert 10 < len(memory) <= 20


def test_pictures_are_pictures() -> None:
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    made = {source: Pictures(pixels, torch.zeros(2), source) for source in SOURCES}
    assert isinstance(made["PIL"][0][0], Image.Image)
    assert torch.equal(made["tensors"][1][0], pixels[1])


def test_the_first_epoch_warms_up_and_ways_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contest = Contest(tiny(tmp_path), torch.device("cpu"))
    assert contest._rate([100.0, 1.0, 3.0]) == 2 * 2 / 4
    turns = []

    def timed(self: Contest, variant: str, make: object) -> tuple[float, None]:
        turns.append(variant)
        return 1.0, None

    monkeypatch.setattr(Contest, "_time", timed)
    contest.measure("one-layer", contest.network("one-layer"))
    assert turns == [*VARIANTS, *VARIANTS]


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
    asked = ["--images", "32", "--memory", "16", "--classes", "4", "--batch", "16"]
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
        ({"memory": 15}, "`memory` is 15, of which Avalanche's loader .* mini-batch of 16, so"),
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
