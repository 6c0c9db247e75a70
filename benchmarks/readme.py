"""Keep the tables in the README files equal to the committed results.

``python -m benchmarks.readme`` writes, between each pair of markers in the files below, the
table of the results folder that the first marker names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    iteration_profile,
    kills,
    long_stream,
    matching_speed,
    replay_throughput,
    scaling,
)
from benchmarks.report import results_section
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


FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "reliability.md")
CELLS: dict[str, Callable[[Sequence[Any]], Table]] = {
    "matching_speed": matching_speed.cells,
    "replay_throughput": replay_throughput.cells,
    "scaling": scaling.cells,
    "iteration_profile": iteration_profile.cells,
    "kills": kills.cells,
    "long_stream": long_stream.cells,
    "bad_input": bad_input_cells,
}
"""Tables of the benchmarks that write figures."""

_SECTION = re.compile(
    r"(<!-- results: (?P<folder>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL
)


def updated(text: str, *, root: Path = ROOT) -> str:
    """Replace what stands between the markers by the tables of the results they name."""

    def section(match: re.Match[str]) -> str:
        folder = root / match["folder"]
        if (folder / "results.json").exists():
            return f"{match[1]}{_figures(folder / 'results.json')}\n{match[3]}"
        store = ResultStore(folder)
        rows = store.rows()
        if any("kind" in row for row in rows):
            table = set_section(store)
        else:
            table = results_section(rows, "\n".join(store.commands()))
        return f"{match[1]}{table}\n{match[3]}"

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


def main() -> None:
    """Bring the files up to date."""
    for path in FILES:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
