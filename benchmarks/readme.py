"""Keep the tables and plots equal to the committed results.

``python -m benchmarks.readme`` makes the plots and the report of every results folder again, and
writes, between each pair of markers in the files below, the table that the first marker names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    cost_model,
    iteration_profile,
    kills,
    long_stream,
    matching_speed,
    ranks,
    replay_throughput,
    scaling,
)
from benchmarks.choice import choice_caption, choice_table
from benchmarks.headline import headline
from benchmarks.published import curves_table, published_table
from benchmarks.report import results_section, write_any_report
from benchmarks.results import ResultStore
from benchmarks.set_reports import set_section
from benchmarks.tables import Table, markdown_table

ROOT = Path(__file__).parent.parent


def bad_input_cells(rows: Sequence[Any]) -> Table:
    """How many inputs the campaigns of ``tests/campaigns`` have tried, as a table."""
    names = {
        "test_arguments": "arguments",
        "test_memory_files": "damaged files",
        "test_memory_machine": "calls in any order",
    }
    lines = [
        (names[row["campaign"]], f"{row['tried']:,}", f"{row['refused']:,}", str(row["failed"]))
        for row in rows
    ]
    return ("campaign", "inputs tried", "refused", "tests failed"), lines


FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md")))
CELLS: dict[str, Callable[[Sequence[Any]], Table]] = {
    "matching_speed": matching_speed.cells,
    "replay_throughput": replay_throughput.cells,
    "scaling": scaling.cells,
    "ranks": ranks.cells,
    "iteration_profile": iteration_profile.cells,
    "kills": kills.cells,
    "long_stream": long_stream.cells,
    "bad_input": bad_input_cells,
}
"""Tables of the benchmarks that write figures."""

SCALES = {
    "fast, CPU": {"convnet3": "fast/memory_only", "resnet10": "fast/resnet10"},
    "fast, CPU, 160 epochs": {"convnet3": "fast/memory_only_160"},
    "fast, CPU, width 128, 250 epochs": {"convnet3": "fast/memory_only_wide"},
    "paper, GPU": {"convnet3": "paper/memory_only", "resnet10": "paper/resnet10"},
}
"""The results that stand beside the published curves; see :mod:`benchmarks.campaign`."""


def _results(root: Path, folder: str) -> str:
    """The table of a results folder, whichever benchmark has written it."""
    path = root / folder
    if (path / "results.json").exists():
        return _figures(path / "results.json")
    store = ResultStore(path)
    rows = store.rows()
    if any("kind" in row for row in rows):
        return set_section(store)
    return results_section(rows, "\n".join(store.commands()))


def _published(root: Path, folder: str) -> str:
    return markdown_table(*published_table(root / "benchmarks" / "results", scales=SCALES))


def _curves(root: Path, folder: str) -> str:
    return markdown_table(*curves_table(root / folder))


def _headline(root: Path, folder: str) -> str:
    return markdown_table(*headline(root / "benchmarks" / "results", folder))


def _choice(root: Path, folder: str) -> str:
    return f"{choice_caption(root / folder)}\n\n{markdown_table(*choice_table(root / folder))}"


def _cost_fit(root: Path, folder: str) -> str:
    found = json.loads((root / folder / "results.json").read_text())
    return f"{cost_model.fit_sentence(found)}\n\n{markdown_table(*cost_model.fit_table(found))}"


def _cost_prediction(root: Path, folder: str) -> str:
    return markdown_table(*cost_model.prediction_table())


SECTIONS: dict[str, Callable[[Path, str], str]] = {
    "results": _results,
    "headline": _headline,
    "published": _published,
    "curves": _curves,
    "choice": _choice,
    "cost fit": _cost_fit,
    "cost prediction": _cost_prediction,
}
"""What stands between ``<!-- NAME: FOLDER -->`` and ``<!-- end of NAME -->``, by name."""

_SECTION = re.compile(
    rf"(<!-- (?P<name>{'|'.join(SECTIONS)})(?:: (?P<folder>\S+))? -->\n).*?"
    r"(<!-- end of (?P=name) -->)",
    re.DOTALL,
)


def updated(text: str, *, root: Path = ROOT) -> str:
    """Replace what stands between the markers by the tables of the results they name."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}{SECTIONS[match['name']](root, match['folder'] or '')}\n{match[4]}"

    return _SECTION.sub(section, text)


def _figures(path: Path) -> str:
    """The table of measured figures, and how they were measured."""
    found = json.loads(path.read_text())
    return "\n".join(
        [
            markdown_table(*CELLS[found["benchmark"]](found["rows"])),
            "",
            f"Measured on {found['device']}, torch {found['versions']['torch']}, commit "
            f"{found['commit']}:",
            "",
            f"```sh\n{found['command']}\n```",
        ]
    )


def _draw(path: Path) -> None:
    """Make the plot of measured figures again, where there is one."""
    found = json.loads(path.read_text())
    if found["benchmark"] == "scaling":
        options = {
            name: found["settings"][name]
            for name in ("classes", "ipc", "sides", "base_classes", "base_ipc", "base_side")
        }
        scaling.draw(found["rows"], scaling.Arguments(**options, out=path.parent))


def main() -> None:
    """Bring plots, reports and files up to date."""
    for path in sorted((ROOT / "benchmarks" / "results").rglob("results.jsonl")):
        write_any_report(path.parent)
    for path in sorted((ROOT / "benchmarks" / "results").rglob("results.json")):
        _draw(path)
    for path in FILES:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
