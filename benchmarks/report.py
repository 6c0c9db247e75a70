"""Turn result rows into a report and a terminal table.

``python -m benchmarks.report DIR`` makes the plots and ``report.md`` of any benchmark again from
``DIR/results.jsonl``, also of a run that was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.pictures import accuracy_plot, exemplar_sheet
from benchmarks.results import ResultStore
from benchmarks.set_reports import write_set_report
from benchmarks.summary import Comparison, accuracy_on, compare
from benchmarks.tables import (
    environment_table,
    listed,
    markdown_table,
    measured_on,
    percent,
    text_table,
)
from dc_replay.errors import ArgumentError

__all__ = [
    "accuracy_plot",
    "exemplar_sheet",
    "markdown_report",
    "results_section",
    "terminal_table",
    "write_any_report",
    "write_report",
]


def markdown_report(
    rows: Iterable[Mapping[str, Any]],
    command: str,
    *,
    settings: Mapping[str, Any],
    plot: str = "accuracy.png",
    exemplars: str | None = None,
) -> str:
    """Write the report of a run: the plot, the table, the command, the environment.

    Args:
        rows: The result rows.
        command: The exact command line, or several on lines of their own.
        settings: The settings shared by all rows.
        plot: Path of the plot as the report's reader finds it.
        exemplars: Path of the exemplar sheet, likewise.

    Raises:
        ArgumentError: If there are no rows.
    """
    rows = list(rows)
    comparisons = compare(rows)
    parts = [f"# {', '.join(dict.fromkeys(c.data for c in comparisons))}: accuracy by method"]
    measured = listed(accuracy_on(c.data) for c in comparisons)
    parts.append(f"![{measured.capitalize()} over the classes seen]({plot})")
    for comparison in comparisons:
        parts.append(
            f"## {comparison.protocol}, {comparison.network} on {comparison.data}\n\n"
            f"{_explanation(comparison)}"
        )
        header, lines = _table(comparison)
        parts.append(markdown_table(header, lines))
    if exemplars is not None:
        parts.append(f"## Exemplars\n\n![Exemplars by method]({exemplars})")
    parts.append(f"## Command\n\n```sh\n{command.strip()}\n```")
    if settings:
        cells = [(f"`{name}`", f"`{value}`") for name, value in settings.items()]
        parts.append("## Settings\n\n" + markdown_table(("setting", "value"), cells))
    parts.append("## Environment\n\n" + environment_table(rows))
    return "\n\n".join(parts) + "\n"


def results_section(rows: Iterable[Mapping[str, Any]], command: str) -> str:
    """Write the tables of a run for a longer page: what was measured, the figures, the command.

    Raises:
        ArgumentError: If there are no rows.
    """
    rows = list(rows)
    parts = []
    for comparison in compare(rows):
        parts.append(
            f"{comparison.data}, {len(comparison.classes_seen)} steps, {comparison.network}, "
            f"{comparison.protocol}. {_explanation(comparison)}"
        )
        parts.append(markdown_table(*_table(comparison)))
    parts.append(measured_on(rows))
    parts.append(f"```sh\n{command.strip()}\n```")
    return "\n\n".join(parts)


def terminal_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Lay out the report's tables for a terminal.

    Raises:
        ArgumentError: If there are no rows.
    """
    blocks = []
    for comparison in compare(rows):
        table = text_table(*_table(comparison))
        blocks.append("\n".join((comparison.title, comparison.subtitle, "", table)))
    return "\n\n".join(blocks)


def _table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    last = comparison.classes_seen[-1]
    differing = not comparison.same_seeds
    header = (
        "method",
        *(["seeds"] if differing else []),
        "stored bytes",
        "images/class",
        *(f"{seen} classes" if seen == last else str(seen) for seen in comparison.classes_seen),
        "average",
        "forgetting",
        "condense s",
        "train s",
    )
    lines = [
        (
            summary.method,
            *([_listed(summary.seeds)] if differing else []),
            f"{summary.stored_bytes:,}",
            f"{summary.images_per_class:g}",
            *(percent(summary.accuracy[seen]) for seen in comparison.classes_seen),
            percent(summary.average),
            percent(summary.forgetting),
            _seconds(summary.condense_seconds),
            _seconds(summary.train_seconds),
        )
        for summary in comparison.methods
    ]
    return header, lines


def _explanation(comparison: Comparison) -> str:
    sentences = [
        *_stored(comparison),
        f"{accuracy_on(comparison.data).capitalize()} in percent over the classes seen so far, and",
        "its average over the steps;",
        "forgetting in percentage points after the last step; seconds in total over the steps, the",
        "least of the seeds.",
        _seeds(comparison),
    ]
    if not comparison.complete:
        sentences.append(
            "**Unfinished:** not every method has every step of each of its seeds; "
            "means are over those there are."
        )
    return " ".join(sentences)


def _stored(comparison: Comparison) -> Iterator[str]:
    unequal = comparison.unequal
    if comparison.classes_seen[-1] in unequal:
        yield "**Stored bytes differ between methods: this is no comparison at equal memory.**"
        return
    yield f"After the last step every method stores {comparison.sizes[0]:,} bytes of pixels."
    for step, stored in unequal.items():
        least = min(stored.values())
        fewer = [method for method, size in stored.items() if size == least]
        store = "stores" if len(fewer) == 1 else "store"
        yield (
            f"**After {step} classes the memories differ:** {', '.join(fewer)} {store} {least:,} "
            f"bytes, others up to {max(stored.values()):,}."
        )


def _seeds(comparison: Comparison) -> str:
    if not comparison.same_seeds:
        return "Mean ± standard deviation over the seeds that are named; without it, of one seed."
    count, listed = len(comparison.seeds), _listed(comparison.seeds)
    if count == 1:
        return f"One seed ({listed})."
    return f"Mean ± standard deviation over {count} seeds ({listed})."


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _seconds(values: Sequence[float]) -> str:
    """The least, to which other work on the machine has added least."""
    if not values:
        return "–"
    least = min(values)
    return f"{least:.1f}" if least < 100 else f"{least:,.0f}"


def write_report(out_dir: str | Path) -> str:
    """Make ``accuracy.png`` and ``report.md`` in a results folder, and return the terminal table.

    Raises:
        ArgumentError: If the folder has no results, or they are damaged.
    """
    store = ResultStore(out_dir)
    rows = store.rows()
    if not rows:
        raise ArgumentError(
            f"{str(store.path)!r} holds no results; "
            "name the folder that a benchmark was told to write to"
        )
    cut = store.settings().get("shrink_at")
    accuracy_plot(
        rows,
        store.out_dir / "accuracy.png",
        cut=tuple(int(number) for number in cut.split(":")) if cut else None,
    )
    sheet = "exemplars.png" if (store.out_dir / "exemplars.png").exists() else None
    report = markdown_report(
        rows,
        "\n".join(store.commands()) or "unknown",
        settings=store.settings(),
        exemplars=sheet,
    )
    (store.out_dir / "report.md").write_text(report, encoding="utf-8")
    return terminal_table(rows)


def write_any_report(out_dir: str | Path) -> str:
    """Make the plots and report of whichever benchmark wrote a folder; return its table.

    Raises:
        ArgumentError: If the folder has no results, or they are damaged.
    """
    sets = any("kind" in row for row in ResultStore(out_dir).rows())
    return write_set_report(out_dir) if sets else write_report(out_dir)


def main(out_dir: tyro.conf.Positional[Path], /) -> None:
    """Make the plots and report.md of a benchmark again from its results folder.

    Args:
        out_dir: The folder that a benchmark wrote to.
    """
    try:
        print(write_any_report(out_dir))
    except ArgumentError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    tyro.cli(main)
