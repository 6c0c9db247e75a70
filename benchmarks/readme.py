"""Keep the README's tables equal to the committed results.

``python -m benchmarks.readme`` writes, between each pair of markers in ``README.md``, the table of
the results folder that the first marker names.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report import results_section
from benchmarks.results import ResultStore
from benchmarks.set_reports import set_section

ROOT = Path(__file__).parent.parent
_SECTION = re.compile(
    r"(<!-- results: (?P<folder>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL
)


def updated(text: str, *, root: Path = ROOT) -> str:
    """Replace what stands between the markers by the tables of the results they name."""

    def section(match: re.Match[str]) -> str:
        store = ResultStore(root / match["folder"])
        rows = store.rows()
        if any("kind" in row for row in rows):
            table = set_section(store)
        else:
            table = results_section(rows, "\n".join(store.commands()))
        return f"{match[1]}{table}\n{match[3]}"

    return _SECTION.sub(section, text)


def main() -> None:
    """Bring the README up to date."""
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
