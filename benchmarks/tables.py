"""Tables of results, for a terminal and in Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.summary import deviation

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header and lines of cells."""

# Also one in bold, with a sign, not measured or left out.
_NUMBER = re.compile(r"[*–−-]*\d|–|$")
_NOT_NOTED = "not noted"


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay a table out for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    ]
    table.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(table)


def environment_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of where rows come from: device, commit, preset, precision and versions."""

    def seen(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values)) or "unknown"

    cells = [
        ("device", seen(row["device"] for row in rows)),
        ("commit", seen(row["commit"] for row in rows)),
        ("preset", seen(row["preset"] for row in rows)),
        ("precision of convolutions", seen(p for row in rows for p in _precisions(row))),
    ]
    packages = dict.fromkeys(name for row in rows for name in row["versions"])
    cells += [
        (name, seen(row["versions"].get(name, "unknown") for row in rows)) for name in packages
    ]
    return markdown_table(("", ""), cells)


def measured_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in one sentence where rows come from, before the command."""
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    devices = listed(row["device"] for row in rows)
    torches = listed(row["versions"]["torch"] for row in rows)
    return (
        f"Measured on {devices}{_precision_clause(rows)}, torch {torches}, "
        f"preset `{rows[-1]['preset']}`, commit{'s' * (len(commits) > 1)} {', '.join(commits)}:"
    )


def listed(words: Iterable[str]) -> str:
    """Each different one once, as in a sentence: "a", "a and b", "a, b and c".

    Three or more with commas within are told apart by semicolons.
    """
    *others, last = dict.fromkeys(words)
    if not others:
        return last
    if len(others) > 1 and any("," in word for word in (*others, last)):
        return f"{'; '.join(others)}; and {last}"
    return f"{', '.join(others)} and {last}"


def _precision_clause(rows: Sequence[Mapping[str, Any]]) -> str:
    """What convolutions were computed in; empty if no row notes it."""
    noted = list(dict.fromkeys(p for row in rows for p in _precisions(row)))
    if noted == [_NOT_NOTED]:
        return ""
    older = " (not noted of older rows)" if _NOT_NOTED in noted else ""
    return f", convolutions in {listed(p for p in noted if p != _NOT_NOTED)}{older}"


def _precisions(row: Mapping[str, Any]) -> list[str]:
    """Of training and, where that may have been on another machine, of condensing.

    Of machines with one name, some multiply bfloat16 natively and others do not.
    """
    found = [row.get("precision", _NOT_NOTED)]
    return [*found, row["condense_precision"]] if row.get("condense_precision") else found


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay a table out in Markdown, numbers to the right."""
    lines = list(lines)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    columns = zip(header, *lines, strict=True)
    rule = ["---:" if all(map(_NUMBER.match, cells)) else "---" for _, *cells in columns]
    return "\n".join((line(header), line(rule), *(line(cells) for cells in lines)))


def percent(values: Sequence[float]) -> str:
    """A mean with its standard deviation, to one decimal; a dash where there is none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.1f}"


def bold_best(cells: Sequence[str], scores: Sequence[float | None]) -> list[str]:
    """Put the cell of the highest score in bold, or of several that share it as it is printed.

    None is no score; one alone is not the highest of anything.
    """
    printed = [None if score is None else round(score, 1) for score in scores]
    there = [score for score in printed if score is not None]
    best = max(there) if len(there) > 1 else None
    return [
        f"**{cell}**" if score is not None and score == best else cell
        for cell, score in zip(cells, printed, strict=True)
    ]
