"""Reports: the numbers in the tables, and the pixels of the pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.report import (
    accuracy_plot,
    exemplar_sheet,
    markdown_report,
    results_section,
    terminal_table,
    write_report,
)
from benchmarks.results import ResultStore
from benchmarks.summary import compare
from dc_replay.errors import ArgumentError


def rows(*, seeds: int = 1, protocol: str = "gdumb", **fields: Any) -> list[dict[str, Any]]:
    """Two steps of two classes each, for idc and dm; the second seed is 10 points lower."""
    return [
        {
            "method": method,
            "protocol": protocol,
            "seed": seed,
            "step": step,
            "classes_seen": 2 * (step + 1),
            "accuracy": accuracy - 10 * seed - 20 * step,
            "forgetting": None if step == 0 else 25.0,
            "stored_bytes": 1280 * (step + 1),
            "images_per_class": 10,
            "condense_seconds": 1.5,
            "train_seconds": 80.0,
            "network": "convnet3",
            "data": "digits",
            "preset": "smoke",
            "device": "a CPU",
            "commit": "abc1234",
            "versions": {"torch": "2.11.0"},
            **fields,
        }
        for method, accuracy in (("idc", 90.0), ("dm", 70.0))
        for seed in range(seeds)
        for step in range(2)
    ]


def cells(markdown: str, method: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def report(found: list[dict[str, Any]], **options: Any) -> str:
    return markdown_report(found, "python -m benchmarks.x", settings={}, **options)


def test_table_of_one_seed_has_no_deviation() -> None:
    markdown = report(rows())
    assert cells(markdown, "method")[3:5] == ["2", "4 classes"]
    assert cells(markdown, "idc") == [
        *("idc", "2,560", "10", "90.0", "70.0", "80.0", "25.0", "3.0", "160"),
    ]
    assert "±" not in markdown and "One seed (0)." in markdown
    assert "every method stores 2,560 bytes of pixels" in markdown
    assert "±" not in terminal_table(rows())


def test_table_of_two_seeds_has_mean_and_sample_deviation() -> None:
    markdown = report(rows(seeds=2))
    assert cells(markdown, "dm")[3:7] == ["65.0 ± 7.1", "45.0 ± 7.1", "55.0 ± 7.1", "25.0 ± 0.0"]
    assert "Mean ± standard deviation over 2 seeds (0, 1)." in markdown
    assert "Unfinished" not in markdown


def test_unfinished_seeds_stay_out_of_the_averages() -> None:
    found = rows(seeds=2)[:-1]
    markdown = report(found)
    assert cells(markdown, "dm")[3:] == [
        *("65.0 ± 7.1", "50.0", "60.0", "25.0", "3.0", "160"),
    ]
    assert "**Unfinished:**" in markdown
    assert "unfinished" in terminal_table(found)
    only_started = [row for row in rows() if row["method"] == "idc" or row["step"] == 0]
    assert cells(report(only_started), "dm")[3:] == ["70.0", "–", "–", "–", "–", "–"]
    assert "every method stores 2,560 bytes" in report(only_started)


def test_methods_of_different_seeds_say_which() -> None:
    found = [row for row in rows(seeds=3) if row["method"] == "idc" or row["seed"] == 0]
    markdown = report(found)
    assert cells(markdown, "method")[:3] == ["method", "seeds", "stored bytes"]
    assert cells(markdown, "idc")[1:5] == ["0, 1, 2", "2,560", "10", "80.0 ± 10.0"]
    assert cells(markdown, "dm")[1:5] == ["0", "2,560", "10", "70.0"]
    assert "over the seeds that are named" in markdown and "Unfinished" not in markdown
    assert "deviation of 1 to 3 seeds" in terminal_table(found).splitlines()[1]
    alike = [{**row, "seed": 7 * (row["method"] == "dm")} for row in rows()]
    assert cells(report(alike), "dm")[1] == "7"
    assert "convnet3 · one seed" in terminal_table(alike)


def test_seconds_are_the_least_of_the_seeds() -> None:
    slow = ({"train_seconds": 100.0}, {"condense_seconds": 90.0})
    found = [{**row, **slow[row["seed"]]} for row in rows(seeds=2)]
    assert cells(report(found), "idc")[-2:] == ["3.0", "160"]
    assert "the least of the seeds" in report(found)


def test_seeds_without_a_step_on_the_way_stay_out_too() -> None:
    third = [
        {**row, "step": 2, "classes_seen": 6, "accuracy": row["accuracy"] - 20}
        for row in rows(seeds=2)
        if row["step"] == 1
    ]
    missing = ("dm", 1, 1)
    found = [
        row
        for row in (*rows(seeds=2), *third)
        if (row["method"], row["seed"], row["step"]) != missing
    ]
    idc, dm = compare(found)[0].methods
    assert idc.average == [70.0, 60.0] and dm.average == [50.0]


def test_newest_row_counts() -> None:
    again = {**rows()[0], "accuracy": 95.0}
    assert cells(report([*rows(), again]), "idc")[3] == "95.0"


def test_a_report_names_every_command_that_made_it(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for command in ("python -m one", "python -m two"):
        store.claim({"data": "digits"}, command=command)
    for row in rows():
        store.append(row)
    write_report(tmp_path)
    found = (tmp_path / "report.md").read_text()
    assert "python -m one\npython -m two" in found


def test_rows_say_where_they_come_from() -> None:
    later = rows(commit="def5678", versions={"torch": "2.15.0", "avalanche-lib": "0.6.0"})
    both = report([*rows(), *later])
    for line in (
        "| commit | abc1234, def5678 |",
        "| preset | smoke |",
        "| torch | 2.11.0, 2.15.0 |",
        "| avalanche-lib | unknown, 0.6.0 |",
    ):
        assert line in both
    section = results_section([*rows(), *later], "x")
    assert "torch 2.11.0 and 2.15.0, preset `smoke`, commits abc1234, def5678:" in section
    assert "commit abc1234:" in results_section(rows(), "x")


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (["a CPU", "a CPU"], "a CPU, torch"),
        (["X, 1 thread", "X, 2 threads"], "X, 1 thread and X, 2 threads, torch"),
        (["X", "Y", "Z"], "X, Y and Z, torch"),
        (["X, 1 thread", "Y", "Z"], "X, 1 thread; Y; and Z, torch"),
    ],
)
def test_devices_are_told_apart(devices: list[str], said: str) -> None:
    found = [row for device in devices for row in rows(device=device)]
    assert f"Measured on {said}" in results_section(found, "x")


def test_accuracy_on_held_out_images_is_not_called_test_accuracy() -> None:
    test, held_out = rows(), rows(data="digits, held-out training images")
    assert "Test accuracy in percent" in results_section(test, "x")
    for text in (results_section(held_out, "x"), report(held_out)):
        assert "Validation accuracy in percent" in text
        assert "test accuracy" not in text.lower()
    assert "![Test accuracy and validation accuracy over" in report([*test, *held_out])


def test_rows_say_what_convolutions_were_computed_in() -> None:
    older, newer = rows(), rows(precision="bfloat16")
    assert "on a CPU, torch 2.11.0" in results_section(older, "x")
    assert "on a CPU, convolutions in bfloat16, torch" in results_section(newer, "x")
    both = [*newer, *rows(precision="float32")]
    assert "on a CPU, convolutions in bfloat16 and float32, torch" in results_section(both, "x")
    mixed = results_section([*older, *newer], "x")
    assert "on a CPU, convolutions in bfloat16 (not noted of older rows), torch" in mixed
    assert "| precision of convolutions | not noted, bfloat16 |" in report([*older, *newer])


def test_bars_in_cells_do_not_end_them() -> None:
    assert "| `methods` | `a\\|b` |" in markdown_report(rows(), "x", settings={"methods": "a|b"})


@pytest.mark.parametrize("field", ["network", "data", "protocol"])
def test_rows_of_other_comparisons_are_kept_apart(field: str) -> None:
    first, second = compare([*rows(), *rows(**{field: "other", "accuracy": 10.0})])
    assert getattr(first, field) != getattr(second, field) == "other"
    assert first.methods[0].accuracy == {2: [90.0], 4: [70.0]}
    assert second.methods[0].accuracy == {2: [10.0], 4: [10.0]}


@pytest.mark.parametrize(
    ("count", "said"), [(999, "999 bytes"), (2560, "2.56 kB"), (6_144_000, "6.14 MB")]
)
def test_bytes_are_said_in_their_unit(count: int, said: str) -> None:
    assert f"{said} stored" in terminal_table(rows(stored_bytes=count))


def test_unequal_memory_is_said() -> None:
    found = [*rows(), *({**row, "method": "joint", "stored_bytes": 0} for row in rows()[:2])]
    assert "**Stored bytes differ between methods" in report(found)
    assert "0 bytes to 2.56 kB stored" in terminal_table(found)


def test_memory_that_is_unequal_on_the_way_is_said_where() -> None:
    first = rows()[0]["classes_seen"]
    found = [
        {
            **row,
            "stored_bytes": 1000 if (row["method"], row["classes_seen"]) == ("dm", first) else 2560,
        }
        for row in rows()
    ]
    assert (
        "After the last step every method stores 2,560 bytes of pixels. **After 2 classes the "
        "memories differ:** dm stores 1,000 bytes, others up to 2,560." in report(found)
    )
    assert "differ" not in report(rows())
    small = [{**row, "method": "dc"} for row in found if row["method"] == "dm"]
    assert "dm, dc store 1,000 bytes, others up to 2,560." in report([*found, *small])


def test_protocols_are_never_mixed() -> None:
    found = [*rows(), *rows(protocol="replay", accuracy=10.0)]
    first, second = compare(found)
    assert (first.protocol, second.protocol) == ("gdumb", "replay")
    assert first.methods[0].accuracy == {2: [90.0], 4: [70.0]}
    assert second.methods[0].accuracy == {2: [10.0], 4: [10.0]}
    markdown = report(found)
    assert "## gdumb, convnet3 on digits" in markdown
    assert "## replay, convnet3 on digits" in markdown


def test_report_starts_with_the_plot_and_ends_with_command_and_environment() -> None:
    markdown = markdown_report(
        rows(), "python -m benchmarks.x --a 1\n", settings={"width": 64}, exemplars="sheet.png"
    )
    parts = [
        "# digits: accuracy by method",
        "](accuracy.png)",
        "| method |",
        "](sheet.png)",
        "```sh\npython -m benchmarks.x --a 1\n```",
        "| `width` | `64` |",
        "| device | a CPU |",
        "| commit | abc1234 |",
        "| torch | 2.11.0 |",
    ]
    places = [markdown.index(part) for part in parts]
    assert places == sorted(places)
    assert "Exemplars" not in report(rows())


def test_several_environments_are_all_listed() -> None:
    markdown = report([*rows(), *rows(commit="def5678", versions={"torch": "2.15.0"})])
    assert "| commit | abc1234, def5678 |" in markdown
    assert "| torch | 2.11.0, 2.15.0 |" in markdown


def test_terminal_table_is_aligned() -> None:
    title, subtitle, blank, *table = terminal_table(rows()).splitlines()
    assert title == "digits · gdumb · 2.56 kB stored"
    assert subtitle == "convnet3 · one seed" and blank == ""
    assert len({len(line) for line in table}) == 1
    assert table[2].startswith("idc ")


@pytest.mark.parametrize(
    "found",
    [
        rows(),
        rows(seeds=2)[:-1],
        rows()[:1],
        [*rows(), *rows(protocol="replay")],
        rows(accuracy=100.0),
        rows(accuracy=0.0),
        [{**row, "method": f"m{index}"} for index in range(25) for row in rows()[:2]],
    ],
    ids=["one seed", "unfinished", "one step", "two protocols", "perfect", "nothing", "many"],
)
def test_plot_of(found: list[dict[str, Any]], tmp_path: Path) -> None:
    accuracy_plot(found, tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.width > 1000 and len(image.getcolors(1 << 24) or ()) > 20


def test_nothing_to_report(tmp_path: Path) -> None:
    for action in (
        lambda: accuracy_plot([], tmp_path / "a.png"),
        lambda: terminal_table([]),
        lambda: report([]),
    ):
        with pytest.raises(ArgumentError, match="`rows` is empty; run a benchmark"):
            action()


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_enlarges_by_whole_pixels(channels: int, tmp_path: Path) -> None:
    images = torch.zeros(2, 3, channels, 8, 8, dtype=torch.uint8)
    images[1, 2, :, 0, 7] = 200
    exemplar_sheet({"idc": images}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        grey = np.asarray(image.convert("L"))
    # The title, in the upper half, has greys of its own.
    grey = grey[len(grey) // 2 :]
    bright = np.argwhere(grey == 200)
    assert len(bright) == 36
    top, left = bright.min(axis=0)
    block = grey[top : top + 6, left : left + 6]
    assert (block == 200).all()
    assert (grey[top + 6 : top + 48, left : left + 6] == 0).all()


def test_sheet_wraps_many_methods(tmp_path: Path) -> None:
    sheet = torch.zeros(3, 10, 3, 32, 32, dtype=torch.uint8)
    exemplar_sheet({"a": sheet}, tmp_path / "one.png")
    exemplar_sheet(dict.fromkeys("abcde", sheet), tmp_path / "five.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "five.png") as five:
        assert five.width < 3 * one.width and five.height > 2 * one.height


def test_sheet_that_cannot_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    good = torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="`images_by_method` is empty"):
        exemplar_sheet({}, path)
    for bad in (good.float(), good[0], good.expand(2, 3, 2, 8, 8)):
        with pytest.raises(ArgumentError, match=r"`images_by_method\['a'\]` is torch.* expected"):
            exemplar_sheet({"a": bad}, path)
    with pytest.raises(ArgumentError, match=r"`images_by_method\['a'\]` has no images"):
        exemplar_sheet({"a": good[:0]}, path)
    with pytest.raises(ArgumentError, match="holds 1 names, but the sheet has 2 rows"):
        exemplar_sheet({"a": good}, path, class_names=["zero"])
    assert not path.exists()


def test_report_is_made_again_from_a_folder(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.claim({"data": "digits"}, command="python -m benchmarks.x")
    for row in rows():
        store.append(row)
    (tmp_path / "exemplars.png").touch()
    table = write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "idc" in table and (tmp_path / "accuracy.png").exists()
    assert "python -m benchmarks.x" in markdown and "](exemplars.png)" in markdown
    assert "| `data` | `digits` |" in markdown


def test_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="results.jsonl' holds no results; name the folder"):
        write_report(tmp_path)


def test_command_line(tmp_path: Path) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.report", str(folder)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )

    store = ResultStore(tmp_path)
    for row in rows():
        store.append(row)
    done = run(tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("digits · gdumb")
    assert (tmp_path / "report.md").exists()
    failed = run(tmp_path / "absent")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
