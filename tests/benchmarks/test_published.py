from __future__ import annotations

from pathlib import Path

from benchmarks.headline import HEADLINES, headline
from benchmarks.published import CLASSES, PUBLISHED, curves_table, published_table
from benchmarks.readme import ROOT, updated
from benchmarks.results import ResultStore


def results(folder: Path, method: str, accuracies: dict[int, list[float]]) -> None:
    store = ResultStore(folder)
    for seed, curve in accuracies.items():
        for step, accuracy in enumerate(curve):
            store.append(
                {
                    "method": method,
                    "seed": seed,
                    "step": step,
                    "data": "cifar100",
                    "network": "convnet3",
                    "protocol": "memory-only",
                    "classes_seen": 20 * (step + 1),
                    "accuracy": accuracy,
                    "forgetting": None,
                    "stored_bytes": 10,
                    "images_per_class": 20.0,
                }
            )


def test_measured_curves_stand_beside_the_published(tmp_path: Path) -> None:
    results(tmp_path / "few", "idc", {0: [50.0, 40.0], 1: [52.0, 42.0], 2: [90.0]})
    results(tmp_path / "few", "random", {0: [30.0, 20.0]})
    results(tmp_path / "few", "dm", {0: [35.0, 25.0]})
    results(tmp_path / "alone", "idc", {0: [60.0, 50.0]})
    scales = {"fast": {"convnet3": "few", "resnet10": "alone"}, "paper": {}}
    header, lines = published_table(tmp_path, scales=scales)
    assert header == ("network", "exemplars", "published", "fast", "paper")
    cells = {(line[0], line[1]): line[2:] for line in lines}
    # What is highest after the last step is bold, but not what has nothing beside it.
    assert cells["convnet3", "idc"] == (
        "**67.9 62.1 57.9 53.9 49.7**",
        "**51.0 41.0 (2 seeds)**",
        "–",
    )
    assert cells["convnet3", "random"] == ("–", "30.0 20.0 (1 seed)", "–")
    assert cells["convnet3", "dm"] == ("57.4 50.8 46.6 42.3 38.9", "35.0 25.0 (1 seed)", "–")
    assert cells["resnet10", "idc"] == (
        "**66.5 60.1 54.9 48.8 44.2**",
        "60.0 50.0 (1 seed)",
        "–",
    )
    assert len(lines) == sum(map(len, PUBLISHED.values())) + 1


def test_the_best_is_the_highest_after_the_last_step(tmp_path: Path) -> None:
    results(tmp_path / "few", "idc", {0: [90.0, 20.0]})
    results(tmp_path / "few", "dm", {0: [50.0, 30.0]})
    _, lines = published_table(tmp_path, scales={"fast": {"convnet3": "few"}})
    cells = {(line[0], line[1]): line[3] for line in lines}
    assert cells["convnet3", "dm"] == "**50.0 30.0 (1 seed)**"
    assert cells["convnet3", "idc"] == "90.0 20.0 (1 seed)"


def test_it_stands_between_its_markers(tmp_path: Path) -> None:
    text = "a\n<!-- published -->\nold\n<!-- end of published -->\nb"
    found = updated(text, root=tmp_path)
    assert "| convnet3 | herding | 48.5 43.9 40.0 36.3 32.9 |" in found and "old" not in found
    assert updated(found, root=tmp_path) == found


def test_curves_of_a_folder_stand_below_the_published(tmp_path: Path) -> None:
    results(
        tmp_path, "random", {0: [70.0, 30.0, 60.0, 20.0, 49.69], 1: [70.0, 32.0, 60.0, 20.0, 49.69]}
    )
    header, lines = curves_table(tmp_path)
    assert header == ("exemplars", "figures", *(f"{seen} classes" for seen in CLASSES))
    assert [line[:2] for line in lines] == [
        *((f"`{method}`", "published") for method in PUBLISHED["convnet3"]),
        ("`random`", "ours"),
    ]
    # The highest of each step is bold, and what is printed alike is.
    assert lines[-1][2:] == ("**70.0**", "31.0", "**60.0**", "20.0", "**49.7**")
    idc = list(PUBLISHED["convnet3"]).index("idc")
    assert lines[idc][2:] == ("67.9", "**62.1**", "57.9", "**53.9**", "**49.7**")


def test_curves_of_other_steps_are_left_out(tmp_path: Path) -> None:
    results(tmp_path, "random", {0: [70.0, 30.0]})
    _, lines = curves_table(tmp_path, network="resnet10")
    assert {line[1] for line in lines} == {"published"}
    assert lines[0][2] == "46.3"


def test_headline_has_what_each_memory_ends_with(tmp_path: Path) -> None:
    beside = tmp_path / "fast" / "balanced_200"
    results(beside, "stock_replay", {0: [50.0, 20.0], 1: [52.0, 22.0], 2: [90.0]})
    results(beside, "herding+compress=10", {0: [60.0, 40.0]})
    results(beside, "random", {0: [99.0, 99.0]})
    results(tmp_path / "fast" / "memory_only", "random", {0: [45.0, 25.0]})
    results(tmp_path / "fast" / "memory_only", "herding", {0: [44.0, 24.0]})
    header, lines = headline(tmp_path, "sizes")
    assert header == ("memory", *(column.title for column in HEADLINES["sizes"].columns))
    assert [line[0] for line in lines] == list(HEADLINES["sizes"].memories)
    assert [line[1:] for line in lines] == [
        ("21.0 ± 1.4", "–", "–", "**25.0**"),
        ("–", "–", "–", "24.0"),
        ("–", "–", "–", "–"),
        ("**40.0**", "–", "–", "–"),
    ]


def test_a_headline_takes_each_memory_from_its_own_results(tmp_path: Path) -> None:
    for folder, method in HEADLINES["two"].columns[0].places:
        results(tmp_path / folder, method, {0: [50.0, 20.0 if folder.endswith("two") else 30.0]})
    results(tmp_path / "fast" / "memory_only_two", "herding", {0: [45.0, 25.0]})
    results(tmp_path / "fast" / "memory_only_two", "random", {0: [46.0, 26.0]})
    _, lines = headline(tmp_path, "two")
    assert [line[1] for line in lines] == ["20.0", "20.0", "20.0", "**30.0**"]
    assert [line[2] for line in lines] == ["**26.0**", "25.0", "–", "–"]


def test_what_is_printed_alike_is_bold_alike(tmp_path: Path) -> None:
    folder = tmp_path / "fast" / "memory_only"
    results(folder, "random", {0: [50.0, 24.94]})
    results(folder, "herding", {0: [50.0, 25.04]})
    results(folder, "dream_plus", {0: [50.0, 24.96]})
    _, lines = headline(tmp_path, "sizes")
    assert [line[4] for line in lines] == ["24.9", "**25.0**", "**25.0**", "–"]


def test_readme_has_the_headlines_and_begins_with_the_first() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"<!-- headline: {name} -->") for name in HEADLINES]
    assert places[0] < text.index("\n## ") and places == sorted(places)
    assert updated(text) == text
