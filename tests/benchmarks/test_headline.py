from __future__ import annotations

from pathlib import Path

from benchmarks.headline import COLUMNS, MEMORIES, headline
from benchmarks.readme import ROOT, updated
from benchmarks.results import ResultStore


def results(folder: Path, method: str, last: dict[int, float]) -> None:
    store = ResultStore(folder)
    for seed, accuracy in last.items():
        for step in range(2):
            store.append(
                {
                    "method": method,
                    "seed": seed,
                    "step": step,
                    "data": "cifar100",
                    "network": "convnet3",
                    "protocol": "replay",
                    "classes_seen": 50 * (step + 1),
                    "accuracy": accuracy + 30 * (1 - step),
                    "forgetting": None,
                    "stored_bytes": 10,
                    "images_per_class": 2.0,
                }
            )


def test_each_memory_has_its_last_accuracies(tmp_path: Path) -> None:
    results(tmp_path / "fast" / "balanced_200", "stock_replay", {0: 20.0, 1: 22.0})
    results(tmp_path / "fast" / "balanced_200", "herding+compress=10", {0: 40.0})
    results(tmp_path / "fast" / "balanced_200", "random", {0: 99.0})
    results(tmp_path / "cifar100_fast", "random", {0: 25.0})
    results(tmp_path / "fast" / "memory_only", "random", {0: 98.0})
    results(tmp_path / "fast" / "memory_only", "herding", {0: 24.0})
    header, lines = headline(tmp_path)
    assert header == ("memory", *(column.title for column in COLUMNS))
    assert [line[0] for line in lines] == [memory for memory, _ in MEMORIES]
    assert [line[1:] for line in lines] == [
        ("21.0 ± 1.4", "–", "–", "**25.0**"),
        ("–", "–", "–", "24.0"),
        ("–", "–", "–", "–"),
        ("**40.0**", "–", "–", "–"),
    ]


def test_the_readme_begins_with_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text.index("<!-- headline -->")
    assert first < text.index("<!-- results") and updated(text) == text
