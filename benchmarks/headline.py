"""The first tables of the README: the memories that matter, each in a few figures.

``python -m benchmarks.readme`` writes them between the markers ``<!-- headline: NAME -->`` and
``<!-- end of headline -->``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign import IN_CODE
from benchmarks.published import finished
from benchmarks.tables import Table, bold_best, percent


@dataclass(frozen=True)
class Column:
    """One way to use a memory.

    Attributes:
        title: What stands above it.
        folders: The results of each memory; one for all where they are in one.
        methods: What stands for each memory there.
    """

    title: str
    folders: tuple[str, ...]
    methods: tuple[str, ...]

    @property
    def places(self) -> Iterator[tuple[str, str]]:
        """The folder and the method of each memory."""
        folders = self.folders * (len(self.methods) // len(self.folders))
        return zip(folders, self.methods, strict=True)


@dataclass(frozen=True)
class Headline:
    """A table of what memories end with.

    Attributes:
        memories: What they are called, from the first line to the last.
        columns: The ways to use them.
    """

    memories: tuple[str, ...]
    columns: tuple[Column, ...]


_BESIDE_NEW_DATA = ("stock_replay", "herding", "dream_plus+mdc", "herding+compress=10")
_ALONE = ("random", "herding", "dream_plus", "herding+compress=10")
_RANDOM = "random images; beside new data Avalanche's own replay"
HEADLINES = {
    "sizes": Headline(
        (
            _RANDOM,
            "`herding`: chosen images",
            "`dream_plus`: condensed by 160 pixel steps (beside new data with MDC)",
            "`herding(compression=10)`: chosen images in 307 bytes each",
        ),
        (
            *(
                Column(
                    f"beside new data: bytes of {images:,} images",
                    (f"fast/balanced_{images}",),
                    _BESIDE_NEW_DATA,
                )
                for images in (200, 500, 2000)
            ),
            Column("alone: bytes of 20 images per class", ("fast/memory_only",), _ALONE),
        ),
    ),
    "two": Headline(
        (
            _RANDOM,
            "`herding`: chosen images",
            "`herding(compression=10)`: chosen images in 307 bytes each",
            "`dream_plus(factor=1, compression=8)`: condensed by 400 pixel steps, 384 bytes each",
        ),
        (
            Column(
                "beside new data: bytes of 2 images per class",
                (*["fast/balanced_two"] * 3, "fast/balanced_two_noise"),
                ("stock_replay", "herding", "herding+compress=10", IN_CODE),
            ),
            Column(
                "alone: bytes of 2 images per class",
                ("fast/memory_only_two",),
                ("random", "herding", "herding+compress=10", IN_CODE),
            ),
        ),
    ),
}
"""The tables by name: totals from small to large, and few images of each class from the start."""


def headline(results: Path, name: str) -> Table:
    """Test accuracy after the last step, the best of each column in bold.

    Args:
        results: The folder of committed results.
        name: Which of the tables.

    Returns:
        A header, and a line for each memory; a dash where there is nothing.
    """
    table = HEADLINES[name]
    header = ("memory", *(column.title for column in table.columns))
    cells = [_cells(results, column) for column in table.columns]
    return header, list(zip(table.memories, *cells, strict=True))


def _cells(results: Path, column: Column) -> list[str]:
    """Of each memory, what every finished seed ends with."""
    found = {folder: finished(results / folder) for folder in dict.fromkeys(column.folders)}
    last: list[list[float]] = []
    for folder, method in column.places:
        if method in found[folder]:
            comparison, summary = found[folder][method]
            last.append(summary.accuracy[comparison.classes_seen[-1]])
        else:
            last.append([])
    scores = [statistics.fmean(values) if values else None for values in last]
    return bold_best([percent(values) for values in last], scores)
