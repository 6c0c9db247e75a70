"""What a run says to someone who has to choose a method: what it stores, keeps and costs.

``python -m benchmarks.readme`` writes the table between the markers ``<!-- choice: FOLDER -->`` and
``<!-- end of choice -->``.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.methods import method as named_method
from benchmarks.presets import PRESETS
from benchmarks.results import ResultStore
from benchmarks.summary import Comparison, Summary, compare
from benchmarks.tables import Table, percent
from dc_replay import RECIPES
from dc_replay.networks import convnet_for


def choice_table(folder: Path) -> Table:
    """The methods of a run, the most accurate first.

    Args:
        folder: Results of ``benchmarks.class_incremental``.

    Returns:
        A header and a line for each method that has finished. Seconds are those of condensing one
        experience, on average, with the seed to which other work has added least.
    """
    comparison = compare(ResultStore(folder).rows())[0]
    last = comparison.classes_seen[-1]
    finished = [method for method in comparison.methods if method.average]
    finished.sort(key=lambda method: -statistics.fmean(method.average))
    header = (
        "method",
        "what it stores",
        "average accuracy",
        f"after {last} classes",
        "forgetting",
        "seconds for an experience",
    )
    return header, [_line(method, comparison) for method in finished]


def choice_caption(folder: Path) -> str:
    """What the table is about, in one sentence."""
    comparison = compare(ResultStore(folder).rows())[0]
    return (
        f"{comparison.data} in {len(comparison.classes_seen)} steps, {comparison.network} trained "
        f"by protocol {comparison.protocol}, {comparison.stored}, {comparison.over_seeds}; "
        f"accuracy in percent, forgetting in points."
    )


def what_is_stored(method: str) -> str:
    """Say whether a method's exemplars are real images."""
    name = method.partition("+")[0]
    if name not in RECIPES:
        return "raw images"
    condenser = named_method(method).condenser(
        PRESETS["fast"], factor=2, ipc=1, network=convnet_for((3, 32, 32))
    )
    kind = "real" if condenser.objective is None else "synthetic"
    packed = ", packed" if condenser.formation.factor > 1 else ""
    compression = condenser.formation.compression
    compressed = "" if compression == 1 else f", compressed to 1/{compression}"
    return f"{'raw' if condenser.stores_raw_images else kind} images{packed}{compressed}"


def _line(method: Summary, comparison: Comparison) -> tuple[str, ...]:
    seconds = min(method.condense_seconds) / len(comparison.classes_seen)
    return (
        f"`{method.method}`",
        what_is_stored(method.method),
        percent(method.average),
        percent(method.accuracy[comparison.classes_seen[-1]]),
        percent(method.forgetting),
        f"{seconds:.1f}" if seconds < 10 else f"{seconds:,.0f}",
    )
