"""Each script in ``examples/`` runs alone, and shows what it says."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dc_replay import ExemplarMemory
from dc_replay.pixels import Normalization

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore:::avalanche")


def naive(found: dict[str, Any]) -> None:
    assert found["with_replay"] > found["without"] + 0.1
    memory = ExemplarMemory.load("memory.safetensors")
    assert memory.counts == found["replay"].memory.counts and memory.recipe == "dream_plus"
    assert set(memory.counts.values()) == {5} and len(memory.classes) == 10


def stock_replay(found: dict[str, Any]) -> None:
    assert found["accuracy"] > 0.3
    buffer = found["buffer"]
    assert set(buffer.memory.counts.values()) == {5} and len(buffer.buffer) == buffer.max_size == 50


def constant_size(found: dict[str, Any]) -> None:
    assert found["accuracy"] > 0.3
    assert found["sizes"] == [found["BYTES"]] * 5
    assert set(found["replay"].memory.counts.values()) == {2}
    assert all(found["replay"].history[step]["prefix_sizes"] for step in range(4))


def custom_network(found: dict[str, Any]) -> None:
    assert found["accuracy"] > 0.3
    assert found["replay"].buffer.condenser.network is found["small_network"]


def grayscale(found: dict[str, Any]) -> None:
    assert found["accuracy"] > 1.8 / 6
    memory = found["memory"]
    assert memory.normalization == Normalization((0.13,), (0.31,))
    assert memory.image_shape == (1, 28, 28) and memory.nbytes == 6 * 3 * 28 * 28
    assert memory.decoded_len == 4 * len(memory)


def spectrogram(found: dict[str, Any]) -> None:
    assert found["accuracy"] > 1.8 / 6
    memory = found["replay"].memory
    assert memory.image_shape == (1, 40, 98) and memory.nbytes == 6 * 3 * 40 * 98
    levels, _ = memory.decoded()
    assert levels.min() >= -80 - 1e-3 and levels.max() <= 1e-3 and levels.min() < -40


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    check.__name__: check
    for check in (naive, stock_replay, constant_size, custom_network, grayscale, spectrogram)
}


@pytest.mark.parametrize("name", CHECKS)
def test_example_shows_what_it_says(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    torch.random.set_rng_state(state)
    CHECKS[name](found)
    last = capsys.readouterr().out.splitlines()[-2:]
    assert any(word in " ".join(last) for word in ("accuracy on", "holds"))


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example_is_short_and_says_what_it_shows(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert len([line for line in source.splitlines() if line.strip()]) <= 60
