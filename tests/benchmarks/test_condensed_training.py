from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from benchmarks.condensed_sets import CondensedSet, FreshTraining
from benchmarks.condensed_training import Arguments, cli, main
from benchmarks.data import DataError, hold_out, load
from benchmarks.pictures import Lines, seconds_plot
from benchmarks.presets import PRESETS
from benchmarks.set_reports import _of_one_set, seconds_lines
from dc_replay import ArgumentError, Condenser, Exemplars, Formation
from dc_replay.augment import augmentation, cutmix
from dc_replay.networks import ConvNet
from dc_replay.pixels import dequantise


def smoke(out: Path, **changes: object) -> Arguments:
    small = Arguments(
        preset="smoke", recipes="random,idc+sm", ipc="1,2", classes=3, out=out, quiet=True
    )
    return replace(small, **changes)


def rows(out: Path) -> list[dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "accuracy"]


def test_every_recipe_size_network_and_run_is_measured(tmp_path: Path) -> None:
    asked = smoke(tmp_path, networks="convnet1,resnet10", runs=2, seeds="0,1", precision="float32")
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
    assert all(row["precision"] == row["condense_precision"] == "float32" for row in found)
    assert len(list((tmp_path / "sets").iterdir())) == 8
    assert "resnet10" in table and "±" in table
    assert "the command" in (tmp_path / "report.md").read_text()


def test_a_second_call_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(smoke(tmp_path), "x")
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(FreshTraining, "accuracy", lambda *_: pytest.fail("computed again"))
    main(smoke(tmp_path), "x")
    assert (tmp_path / "results.jsonl").read_bytes() == before


DATA = load("digits")


def fresh_training(network: str = "convnet1", **settings: float) -> FreshTraining:
    return FreshTraining(
        network,
        DATA,
        replace(PRESETS["smoke"], **settings),
        device=torch.device("cpu"),
        mode=False,
        precision="float32",
        quiet=True,
    )


def stored(count: int) -> CondensedSet:
    rows = [torch.nonzero(DATA.y_train == c).flatten()[:count] for c in range(10)]
    labels = torch.arange(10).repeat_interleave(count)
    return CondensedSet(Exemplars(DATA.x_train[torch.cat(rows)], labels), Formation(1), 0.0, [])


def test_a_network_learns_what_the_set_shows() -> None:
    training = fresh_training(width=16, set_steps=150, batch=32, lr=0.02)
    many, few = training.accuracy(stored(40), seed=0), training.accuracy(stored(1), seed=0)
    assert many > 80 > few > 20
    assert training.accuracy(stored(1), seed=0) == few  # nothing of the run before is left


@pytest.mark.parametrize("seed", [0, 1])
def test_training_equals_a_loop_written_by_hand(seed: int) -> None:
    training = fresh_training(width=4, set_steps=10, batch=8, lr=0.05)
    exemplars = stored(2).exemplars
    training.accuracy(stored(2), seed=seed)

    torch.manual_seed(seed)
    network = ConvNet(10, channels=1, size=(8, 8), width=4, depth=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(20, generator=generator) for _ in range(4)]
    augment = augmentation("color", "crop", "cutout", "flip", "scale", "rotate")
    mixed = 0
    for step, index in enumerate(torch.cat(order).split(8)):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 if step < 6 else 0.2 if step < 8 else 0.04)
        images = dequantise(exemplars.pixels[index])
        images = augment(DATA.normalization().apply(images), generator)
        images, partners, share = cutmix(images, generator, probability=0.5)
        labels, logits = exemplars.labels[index], network(images)
        loss = F.cross_entropy(logits, labels, reduction="none") * share
        loss += F.cross_entropy(logits, labels[partners], reduction="none") * (1 - share)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        mixed += int(share < 1)
    assert 0 < mixed < 10
    for ours, theirs in zip(training._model.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_testing_changes_nothing() -> None:
    training = fresh_training("resnet10", width=2, set_steps=4, batch=8)
    found = training.accuracy(stored(2), seed=0)
    assert not training._model.training
    before = {name: value.clone() for name, value in training._model.named_buffers()}
    assert training._test() == found
    for name, value in training._model.named_buffers():
        assert torch.equal(value, before[name])


def test_seconds_of_a_condensation_are_those_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condense = Condenser.condense
    monkeypatch.setattr(
        Condenser,
        "condense",
        lambda *args, **options: replace(condense(*args, **options), seconds_before=1000.0),
    )
    main(smoke(tmp_path, recipes="idc", ipc="1"), "x")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (made,) = [row for row in map(json.loads, lines) if row["kind"] == "set"]
    assert 1000 < made["seconds"] < 1900


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


def test_what_a_set_was_condensed_in_is_told_of_one_that_is_trained_on_elsewhere(
    tmp_path: Path,
) -> None:
    main(smoke(tmp_path, recipes="idc", ipc="1", precision="float32"), "x")
    path = tmp_path / "results.jsonl"
    made = [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "set"]
    assert [row["precision"] for row in made] == ["float32"]
    path.write_text(json.dumps({**made[0], "precision": "bfloat16"}) + "\n")
    main(smoke(tmp_path, recipes="idc", ipc="1", precision="float32"), "x")
    (row,) = rows(tmp_path)
    assert (row["precision"], row["condense_precision"]) == ("float32", "bfloat16")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| precision of convolutions | float32, bfloat16 |" in report


def test_accuracy_is_drawn_over_seconds_where_lengths_differ(tmp_path: Path) -> None:
    main(smoke(tmp_path, recipes="random,idc", ipc="1"), "x")
    assert not (tmp_path / "seconds.png").exists()
    main(smoke(tmp_path, recipes="idc+outer=1,idc+outer=2", ipc="1"), "x")
    assert (tmp_path / "seconds.png").exists()
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "![Accuracy over the seconds to condense](seconds.png)" in report


def accuracy_row(method: str, seconds: float, accuracy: float, **changes: object) -> dict:
    row = {"method": method, "condense_seconds": seconds, "accuracy": accuracy}
    return {**row, "ipc": 10, "network": "convnet3", **changes}


MEASURED = [
    accuracy_row("herding", 3.0, 40.0),
    accuracy_row("idc", 50.0, 48.0),
    accuracy_row("idc+outer=10", 100.0, 50.0),
    accuracy_row("idc+outer=10", 90.0, 52.0),
    accuracy_row("idc+outer=2", 20.0, 45.0),
    accuracy_row("idc+sm+outer=2", 30.0, 44.0),
]


def test_lines_over_seconds_are_in_the_order_of_seconds() -> None:
    lines = seconds_lines(MEASURED)
    assert list(lines) == ["herding", "idc", "idc+sm"]
    assert lines["herding"] == {3.0: [40.0]} and lines["idc+sm"] == {30.0: [44.0]}
    assert list(lines["idc"].items()) == [(20.0, [45.0]), (50.0, [48.0]), (90.0, [50.0, 52.0])]
    alike = [accuracy_row("idc", 50.0, 48.0), accuracy_row("idc+outer=9", 50.0, 50.0)]
    assert seconds_lines(alike) == {"idc": {50.0: [48.0, 50.0]}}
    assert seconds_lines([row for row in MEASURED if row["method"] in ("herding", "idc")]) == {}


def test_a_line_goes_on_where_more_steps_have_a_rate_of_their_own() -> None:
    short, long = accuracy_row("idc", 10.0, 40.0), accuracy_row("idc+inner=9+lr=0.1", 60.0, 50.0)
    longest = accuracy_row("idc+outer=9+inner=9+lr=0.1", 90.0, 51.0)
    assert seconds_lines([short, long, longest]) == {"idc": {10: [40.0], 60: [50.0], 90: [51.0]}}
    other_rate = accuracy_row("idc+inner=9+lr=0.5", 60.0, 30.0)
    assert seconds_lines([short, long, longest, other_rate]) == {
        "idc": {10: [40.0]},
        "idc+lr=0.1": {60: [50.0], 90: [51.0]},
        "idc+lr=0.5": {60: [30.0]},
    }


def test_only_the_largest_set_and_the_first_network_are_drawn() -> None:
    others = [
        accuracy_row("idc", 5.0, 20.0, ipc=1),
        accuracy_row("idc", 50.0, 35.0, network="resnet10"),
    ]
    assert _of_one_set([*MEASURED, *others]) == MEASURED


def drawn_over_seconds(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> Figure:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    texts = {"title": "a title", "subtitle": "how", "xlabel": "seconds", "ylabel": "accuracy"}
    seconds_plot(lines, "x.png", **texts)
    return drawn[0]


@pytest.mark.parametrize("seconds", [(0.1, 7000.0), (5.0, 4000.0), (20.0, 90.0)])
def test_seconds_below_the_axis_do_not_touch(
    seconds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {place: [40.0] for place in seconds}
    figure = drawn_over_seconds({"herding+compress=10": line}, monkeypatch)
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    shown = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_lines_over_seconds_go_on_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = drawn_over_seconds(seconds_lines(MEASURED), monkeypatch).axes
    assert axes.get_xscale() == "log"
    dotted = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [
        [[3.0, 40.0], [90.0, 40.0]],
        [[90.0, 51.0], [90.0, 51.0]],
        [[30.0, 44.0], [90.0, 44.0]],
    ]
    assert {"herding  40.0", "idc  51.0", "idc+sm  44.0"} <= {
        text.get_text() for text in axes.texts
    }
