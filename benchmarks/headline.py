"""The first table of the README: the memories that matter, each in a few figures.

``python -m benchmarks.readme`` writes it between the markers ``<!-- headline -->`` and
``<!-- end of headline -->``.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published import finished
from benchmarks.tables import Table, bold_best, percent


@dataclass(frozen=True)
class Column:
    """One way to use a memory.

    Attributes:
        title: What stands above it.
        folder: Its results.
        methods: What stands for each memory there.
    """

    title: str
    folder: str
    methods: tuple[str, ...]


MEMORIES = (
    "random images; beside new data Avalanche's own replay",
    "`herding`: chosen images",
    "`dream_plus`: condensed by 160 pixel steps (beside new data with MDC)",
    "`herding(compression=10)`: chosen images in 307 bytes each",
)
_BESIDE_NEW_DATA = ("stock_replay", "herding", "dream_plus+mdc", "herding+compress=10")
_ALONE = ("random", "herding", "dream_plus", "herding+compress=10")
COLUMNS = (
    *(
        Column(
            f"beside new data: bytes of {images:,} images",
            f"fast/balanced_{images}",
            _BESIDE_NEW_DATA,
        )
        for images in (200, 500, 2000)
    ),
    Column("alone: bytes of 20 images per class", "fast/memory_only", _ALONE),
)


def headline(results: Path) -> Table:
    """Test accuracy after the last step, the best of each column in bold.

    Args:
        results: The folder of committed results.

    Returns:
        A header, and a line for each memory; a dash where there is nothing.
    """
    header = ("memory", *(column.title for column in COLUMNS))
    cells = [_cells(results, column) for column in COLUMNS]
    return header, list(zip(MEMORIES, *cells, strict=True))


def _cells(results: Path, column: Column) -> list[str]:
    """Of each memory, what every finished seed ends with."""
    found = finished(results / column.folder)
    last: list[list[float]] = []
    for method in column.methods:
        if method in found:
            comparison, summary = found[method]
            last.append(summary.accuracy[comparison.classes_seen[-1]])
        else:
            last.append([])
    scores = [statistics.fmean(values) if values else None for values in last]
    return bold_best([percent(values) for values in last], scores)
