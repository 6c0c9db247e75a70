"""What the README says is run, and its figures are those of the committed results."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import avalanche.benchmarks
import pytest
import torch
from torch.utils.data import Dataset

import dc_replay
from benchmarks.readme import FILES, ROOT, updated
from benchmarks.results import write_figures
from dc_replay import ExemplarMemory
from dc_replay.networks import ConvNet

README = (ROOT / "README.md").read_text(encoding="utf-8")


class Images(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(10).repeat_interleave(4).tolist()
        self.data = torch.rand(len(self.targets), 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data[index], self.targets[index]


def attach_example() -> str:
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Naive" in b)


def test_attach_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(n_experiences: int, seed: int) -> object:
        return avalanche.benchmarks.nc_benchmark(
            Images(), Images(), n_experiences, task_labels=False, seed=seed
        )

    recipe = dc_replay.dream_plus
    monkeypatch.chdir(tmp_path)
    # The same lines on small data, with a small network and few steps.
    monkeypatch.setattr(avalanche.benchmarks, "SplitCIFAR100", split)
    monkeypatch.setattr(
        dc_replay,
        "dream_plus",
        lambda outer: recipe(outer=1, inner=1, network=partial(ConvNet, width=4)),
    )
    exec(attach_example(), {})
    memory = ExemplarMemory.load("memory.safetensors")
    assert memory.recipe == "dream_plus" and len(memory.classes) == 10
    # Four real images of a class are all there are, so four are what it may store.
    assert set(memory.counts.values()) == {4}


def test_shrink_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    example = next(
        b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Multisize" in b
    )
    compose, shrink = example.split("# ... train")
    recipe = dc_replay.dream_plus
    monkeypatch.setattr(
        dc_replay,
        "dream_plus",
        lambda outer: recipe(outer=outer // 8, inner=1, network=partial(ConvNet, width=4)),
    )
    names: dict[str, object] = {}
    exec(compose, names)
    replay = names["replay"]
    assert isinstance(replay, dc_replay.CondensedReplayPlugin)
    benchmark = avalanche.benchmarks.nc_benchmark(Images(), Images(), 5, task_labels=False, seed=0)
    replay.buffer.remember(benchmark.train_stream[0], device="cpu")
    assert set(replay.memory.counts.values()) == {4}
    assert replay.history[0]["prefix_sizes"][0] == [1, 1]
    exec("#" + shrink.replace("images_per_class=5", "images_per_class=2"), names)
    assert set(replay.memory.counts.values()) == {2}


def test_attach_example_is_short() -> None:
    assert len([line for line in attach_example().splitlines() if line.strip()]) <= 20


def test_figures_are_those_of_the_results() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert updated(text) == text, path
    assert "<!-- results:" in README


def test_linked_files_exist() -> None:
    found = [
        (path.parent, link)
        for path in FILES
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8"))
    ]
    assert found
    for folder, link in found:
        assert (folder / link).exists(), link


def test_figures_of_time_become_a_table(tmp_path: Path) -> None:
    write_figures(
        tmp_path / "figures",
        "scaling",
        [{"classes": 5, "ipc": 10, "side": 32, "seconds": [0.2, 0.4, 0.3]}],
        command="the command",
        settings={},
        device="cpu",
    )
    text = "before\n<!-- results: figures -->\n<!-- end of results -->\nafter"
    found = updated(text, root=tmp_path)
    assert "| 5 | 10 | 32 | 0.300 |" in found and "the command" in found
    assert updated(found, root=tmp_path) == found
