"""The first table of the README: the memories that matter, each in a few figures.

``python -m benchmarks.readme`` writes it between the markers ``<!-- headline -->`` and
``<!-- end of headline -->``.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published import finished
from benchmarks.tables import Table, percent


@dataclass(frozen=True)
class Column:
    """One way to use a memory.

    Attributes:
        title: What stands above it.
        folders: Folders of results, of which the first that has a method counts.
        place: Which of the names of a memory is its method there.
    """

    title: str
    folders: tuple[str, ...]
    place: int


# What a memory is, and the method that stands for it beside new data and alone.
MEMORIES = (
    ("random images; beside new data Avalanche's own replay", ("stock_replay", "random")),
    ("`herding`: chosen images", ("herding", "herding")),
    ("`dream_plus`: condensed (beside new data with MDC)", ("dream_plus+mdc", "dream_plus")),
    (
        "`herding(compression=10)`: chosen images in 307 bytes each",
        ("herding+compress=10", "herding+compress=10"),
    ),
)
COLUMNS = (
    *(
        Column(f"beside new data: {images:,} images", (f"fast/balanced_{images}",), 0)
        for images in (200, 500, 2000)
    ),
    Column("alone: 20 per class", ("cifar100_fast", "fast/memory_only"), 1),
)


def headline(results: Path) -> Table:
    """Test accuracy after the last step, the best of each column in bold.

    Args:
        results: The folder of committed results.

    Returns:
        A header, and a line for each memory; a dash where there is nothing.
    """
    columns = [_last_accuracies(results, column) for column in COLUMNS]
    lines = []
    for place, (memory, _) in enumerate(MEMORIES):
        cells = []
        for accuracies in columns:
            means = [statistics.fmean(values) for values in accuracies if values]
            values = accuracies[place]
            best = values and statistics.fmean(values) == max(means)
            cells.append(f"**{percent(values)}**" if best else percent(values))
        lines.append((memory, *cells))
    return ("memory", *(column.title for column in COLUMNS)), lines


def _last_accuracies(results: Path, column: Column) -> list[list[float]]:
    """Of each memory, what every finished seed ends with."""
    found = finished(results, column.folders)
    accuracies = []
    for _, methods in MEMORIES:
        known = found.get(methods[column.place])
        accuracies.append(known[1].accuracy[known[0].classes_seen[-1]] if known else [])
    return accuracies
