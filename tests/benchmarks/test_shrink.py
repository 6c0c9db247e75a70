from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.condensed_sets import FreshTraining
from benchmarks.data import load
from benchmarks.presets import PRESETS
from benchmarks.results import ResultStore
from benchmarks.shrink import METHODS, Arguments, _Contest, cli, main
from dc_replay import ArgumentError, ExemplarMemory
from dc_replay.networks import ConvNet
from dc_replay.training import NetworkTraining


def smoke(out: Path, **changes: object) -> Arguments:
    small = Arguments(preset="smoke", ipc=3, sizes="1,3", classes=3, outer=3, out=out, quiet=True)
    return replace(small, **changes)


def rows(out: Path, kind: str) -> list[dict]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_every_method_is_measured_at_every_size(tmp_path: Path) -> None:
    table = main(smoke(tmp_path, precision="float32"), "the command")
    found = rows(tmp_path, "accuracy")
    assert {(row["method"], row["size"]) for row in found} == {
        (name, size) for name in METHODS for size in (1, 3)
    }
    for row in found:
        assert row["stored_bytes"] == row["size"] * 3 * 64 and 0 <= row["accuracy"] <= 100
        assert row["precision"] == row["condense_precision"] == "float32"
    full = {row["method"]: row["accuracy"] for row in found if row["size"] == 3}
    assert full["prefix"] == full["k-means"] == full["separate"]
    assert sorted((row["method"], row["ipc"]) for row in rows(tmp_path, "set")) == [
        ("dream_plus", 1),
        ("dream_plus", 3),
        ("dream_plus+mdc", 3),
    ]
    for name in ("shrink.png", "prefixes.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 50
    report = (tmp_path / "report.md").read_text()
    assert "the command" in report and "prefixes.png" in report
    assert all(name in table for name in METHODS)


def test_what_is_trained_on_is_what_the_method_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def note(self: FreshTraining, found, *, seed: int) -> float:
        trained.append(found.exemplars)
        return 50.0

    monkeypatch.setattr(FreshTraining, "accuracy", note)
    main(smoke(tmp_path, sizes="2"), "x")
    names = ("dream_plus+mdc-3-0", "dream_plus-3-0", "dream_plus-3-0", "dream_plus-2-0")
    mdc, plain, again, separate = (
        ExemplarMemory.load(tmp_path / "sets" / f"{name}.safetensors") for name in names
    )
    assert len(trained) == 4
    for label in range(3):
        for memory, exemplars in zip((mdc, plain), trained[:2], strict=True):
            assert torch.equal(memory.of_class(label)[:2], exemplars.of_class(label))
        chosen = trained[2].of_class(label)
        stored = again.of_class(label)
        assert all((stored == image).flatten(1).all(dim=1).any() for image in chosen)
        assert len(chosen.flatten(1).unique(dim=0)) == 2
        assert torch.equal(separate.of_class(label), trained[3].of_class(label))


def test_each_seed_trains_networks_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    monkeypatch.setattr(
        FreshTraining, "accuracy", lambda self, found, *, seed: seeds.append(seed) or 50.0
    )
    main(smoke(tmp_path, methods="prefix", sizes="1", seeds="2,5"), "x")
    assert seeds == [2, 5]


def test_k_means_compares_features_of_a_network_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, given = NetworkTraining.train, []

    def note(self: NetworkTraining, step: Any, parameters: Any, *args: Any, **options: Any) -> None:
        before = {name: value.clone() for name, value in parameters.items()}
        train(self, step, parameters, *args, **options)
        given.append((before, parameters, args[1:3]))

    monkeypatch.setattr(NetworkTraining, "train", note)
    arguments = smoke(tmp_path)
    data = arguments.in_order(load("digits"), seed=0)
    contest = _Contest(arguments, PRESETS["smoke"], ResultStore(tmp_path), data, 0)
    images = torch.rand(5, *data.image_shape)
    found = contest._embedding()(images)
    ((before, parameters, (shown, labels)),) = given
    assert not torch.equal(before["layers.0.weight"], parameters["layers.0.weight"])
    assert torch.equal(shown, data.x_train) and torch.equal(labels, data.y_train)
    network = ConvNet(data.classes, channels=1, size=(8, 8), width=PRESETS["smoke"].width)
    network.load_state_dict(parameters)
    torch.testing.assert_close(found, network.embed(images))


def test_a_second_call_computes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(smoke(tmp_path, sizes="1"), "x")
    before = rows(tmp_path, "accuracy")
    sizes = []
    accuracy = FreshTraining.accuracy

    def note(self: FreshTraining, found, *, seed: int) -> float:
        sizes.append(len(found.exemplars) // 3)
        return accuracy(self, found, seed=seed)

    monkeypatch.setattr(FreshTraining, "accuracy", note)
    main(smoke(tmp_path, sizes="1,2"), "x")
    assert sizes == [2] * 4
    assert len(rows(tmp_path, "set")) == 4  # of size 2 one was condensed, the others were there
    assert rows(tmp_path, "accuracy")[:4] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": "0,1"}, "`sizes` is '0,1', .* cut to sizes from 1 to 3"),
        ({"sizes": "4"}, "`sizes` is '4'"),
        ({"methods": "mdc,magic"}, "`methods` names magic, but the known ones are mdc, prefix"),
        ({"sizes": "x"}, "`sizes` is 'x'"),
        ({"ipc": 0}, "`ipc` is 0"),
        ({"period": 0}, "`period` is 0"),
        ({"steps": 0}, "`steps` is 0"),
        ({"recipe": "herding"}, "`recipe` names .*herding optimises nothing"),
        ({"recipe": "dm+sm"}, r"dm\+sm divides .* at 1 stored images"),
        ({"classes": 0}, "`classes` is 0"),
        ({"recipe": "idc+mdc"}, r"`recipe` is 'idc\+mdc', which has multisize condensation"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        main(smoke(tmp_path, **changes), "x")
    assert not list(tmp_path.iterdir())  # found before anything began


def test_other_settings_in_the_same_folder(tmp_path: Path) -> None:
    main(smoke(tmp_path, sizes="1", methods="prefix"), "x")
    with pytest.raises(ArgumentError, match="outer was 3 and is now 4"):
        main(smoke(tmp_path, outer=4), "x")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--preset", "smoke", "--classes", "2", "--ipc", "1", "--quiet", "--out", str(tmp_path)]
    assert cli([*asked, "--sizes", "1", "--methods", "prefix"]) == 0
    assert "prefix" in capsys.readouterr().out
    assert cli([*asked, "--sizes", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: `sizes`")
