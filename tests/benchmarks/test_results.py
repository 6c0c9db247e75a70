"""The result store: what survives a kill, what is finished, and what may share a folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import results
from benchmarks.results import ResultStore, environment
from dc_replay.errors import ArgumentError

ROW = {"method": "idc", "seed": 0, "step": 0, "accuracy": 0.5}


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new" / "run")
    assert store.rows() == [] and store.settings() == {} and store.commands() == []
    store.append(ROW)
    store.append({**ROW, "step": 1})
    assert ResultStore(tmp_path / "new" / "run").rows() == [ROW, {**ROW, "step": 1}]


def test_half_written_row_is_dropped_and_overwritten(tmp_path: Path) -> None:
    first, second, third = ({**ROW, "step": step} for step in range(3))
    store = ResultStore(tmp_path)
    store.append(first)
    one = store.path.read_bytes()
    store.append(second)
    two = store.path.read_bytes()
    for length in range(len(one), len(two) + 1):
        store.path.write_bytes(two[:length])
        # All but the line break is a whole row: an editor may have taken the break away.
        whole = [first, second] if length >= len(two) - 1 else [first]
        assert store.rows() == whole
        store.append(third)
        assert store.rows() == [*whole, third]
        assert store.path.read_bytes().count(b"\n") == len(whole) + 1


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.path.write_text('{"method": "a"}\n{"meth\n{"method": "b"}\n')
    for action in (store.rows, lambda: store.append(ROW)):
        with pytest.raises(ArgumentError, match="line 2 of 3 is no JSON object; remove that line"):
            action()


def test_values_become_plain_json(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.append(
        {
            "tensor": torch.tensor(2.5),
            "numpy": np.float32(0.5),
            "count": np.int64(3),
            "nan": float("nan"),
            "path": Path("a/b"),
            "nested": {"pair": (1, 2)},
        }
    )
    assert store.rows() == [
        {
            "tensor": 2.5,
            "numpy": 0.5,
            "count": 3,
            "nan": None,
            "path": "a/b",
            "nested": {"pair": [1, 2]},
        }
    ]
    with pytest.raises(ArgumentError, match=r"`row\['images'\]` is a Tensor, which has no JSON"):
        store.append({"images": torch.zeros(3)})
    assert len(store.rows()) == 1


def test_finished_matches_every_key(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.append({**ROW, "protocol": "replay"})
    store.append({**ROW, "protocol": "replay", "accuracy": 0.6})
    assert store.finished("idc", 0, step=0)
    assert store.finished("idc", 0, step=0, protocol="replay")
    assert not store.finished("idc", 0, step=0, protocol="gdumb")
    assert not store.finished("idc", 0, step=0, preset=None)
    assert not store.finished("idc", 1, step=0)
    assert not store.finished("idc", 0, step=1)
    assert not store.finished("dm", 0, step=0)
    newest = store.find("idc", 0, step=0)
    assert newest is not None and newest["accuracy"] == 0.6
    assert store.find("dm", 0, step=0) is None


def test_settings_hold_for_the_folder(tmp_path: Path) -> None:
    settings = {"data": "digits", "budget": (20, 30), "root": Path("data")}
    ResultStore(tmp_path).claim(settings, command="run one")
    ResultStore(tmp_path).claim(settings, command="run one")
    ResultStore(tmp_path).claim(settings, command="run two")
    store = ResultStore(tmp_path)
    assert store.settings() == {"data": "digits", "budget": [20, 30], "root": "data"}
    assert store.commands() == ["run one", "run two"]
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_other_settings_are_named(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.claim({"data": "digits", "width": 64, "old": 1, "same": True})
    with pytest.raises(ArgumentError) as caught:
        store.claim({"data": "cifar10", "width": 32, "new": None, "same": True}, command="other")
    message = str(caught.value)
    assert f"`out` is {str(tmp_path)!r}, which holds results of other settings" in message
    assert "data was 'digits' and is now 'cifar10'" in message
    assert "width was 64 and is now 32" in message
    assert "old was 1 and is now absent" in message
    assert "new was absent and is now None" in message
    assert "same" not in message
    assert store.settings()["data"] == "digits" and store.commands() == []


def test_results_without_settings_are_not_adopted(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.append(ROW)
    with pytest.raises(ArgumentError, match="has results but no settings.json"):
        store.claim({"data": "digits"})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 3}'])
def test_damaged_settings_are_an_error(tmp_path: Path, content: str) -> None:
    store = ResultStore(tmp_path)
    store.settings_path.write_text(content)
    with pytest.raises(ArgumentError, match="settings.json' is damaged: it holds no settings"):
        store.claim({"data": "digits"})


def test_environment_is_json_and_names_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"device", "commit", "versions"}
    assert set(found["versions"]) == {
        "python",
        "torch",
        "torchvision",
        "avalanche-lib",
        "dc_replay",
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"].endswith(" 3 threads")
    assert environment("meta")["device"] == "meta"


def test_settings_are_whole_whenever_writing_them_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(tmp_path)
    store.claim({"data": "digits"}, command="first")
    before = store.settings_path.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.results.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.claim({"data": "digits"}, command="second")
    assert store.settings_path.read_bytes() == before
    monkeypatch.undo()
    store.claim({"data": "digits"}, command="second")
    assert store.commands() == ["first", "second"]


@pytest.mark.parametrize(
    ("changed", "mark"),
    [
        ("README.md", "-dirty"),
        ("benchmarks/results.py", "-dirty"),
        ("dc_replay/results/a.py", "-dirty"),
        ("benchmarks/results/fast/rows.jsonl", ""),  # what a measurement wrote is not its source
        ("benchmarks/untracked.py", ""),
        (None, ""),
    ],
)
def test_commit_says_when_its_source_is_changed(
    changed: str | None, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked = [
        "README.md",
        "benchmarks/results.py",
        "benchmarks/results/fast/rows.jsonl",
        "dc_replay/results/a.py",
    ]
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    if changed is not None:
        (tmp_path / changed).write_text("after")
    # Of the source, wherever it is called from.
    monkeypatch.setattr(results, "__file__", str(tmp_path / "benchmarks" / "results.py"))
    assert environment()["commit"] == git("rev-parse", "--short", "HEAD") + mark


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")]
)
def test_commit_is_unknown_without_git(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("benchmarks.results.subprocess.run", git)
    assert environment()["commit"] == "unknown"
