"""Published curves beside what is measured here.

``python -m benchmarks.readme`` writes the table between the markers ``<!-- published -->`` and
``<!-- end of published -->``, and that of one folder's curves between ``<!-- curves: FOLDER -->``
and ``<!-- end of curves -->``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import ResultStore
from benchmarks.summary import Comparison, Summary, compare
from benchmarks.tables import Table, bold_best

# Read off the figure of class-incremental CIFAR-100 in Kim et al., "Dataset Condensation via
# Efficient Synthetic-Data Parameterization" (ICML 2022), about 0.3 points to either side: 5 steps
# of 20 classes, 20 stored images per class, trained on these alone with distillation.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "convnet3": {
        "herding": (48.5, 43.9, 40.0, 36.3, 32.9),
        "dm": (57.4, 50.8, 46.6, 42.3, 38.9),
        "idc_i": (60.7, 54.1, 49.9, 46.5, 42.8),
        "idc": (67.9, 62.1, 57.9, 53.9, 49.7),
    },
    "resnet10": {
        "herding": (46.3, 42.1, 38.4, 35.3, 32.3),
        "dm": (49.2, 42.1, 37.5, 33.2, 30.1),
        "idc_i": (56.1, 48.9, 43.6, 38.7, 34.9),
        "idc": (66.5, 60.1, 54.9, 48.8, 44.2),
    },
}
"""Test accuracy in percent after each step, by the network that is trained and the exemplars."""
CLASSES = (20, 40, 60, 80, 100)
"""The classes seen after each step of the published curves."""


def published_table(results: Path, *, scales: dict[str, dict[str, str]]) -> Table:
    """Published, and measured at each scale, side by side.

    Args:
        results: The folder of committed results.
        scales: For each scale the folder in ``results`` of each network's comparison.

    Returns:
        A header, and a line for each network and method; a dash where there is nothing. What is
        highest after the last step is bold, for each network in each column.
    """
    found = {
        scale: {network: finished(results / folder) for network, folder in by_network.items()}
        for scale, by_network in scales.items()
    }
    lines = []
    for network, curves in PUBLISHED.items():
        ours = [by_network.get(network, {}) for by_network in found.values()]
        methods = list(dict.fromkeys((*curves, *(method for column in ours for method in column))))
        columns = [_bold([(curves.get(method), "") for method in methods])]
        columns += [_bold([_measured(column.get(method)) for method in methods]) for column in ours]
        lines += [(network, *cells) for cells in zip(methods, *columns, strict=True)]
    return ("network", "exemplars", "published", *scales), lines


def curves_table(folder: Path, *, network: str = "convnet3") -> Table:
    """The published curves of one network, and below them those of one folder of results.

    Args:
        folder: Results of the steps of the published curves; those of other steps are left out.
        network: The network that is trained.

    Returns:
        A header, and a line for each curve; what is highest after each step is bold.
    """
    curves = [(method, "published", curve) for method, curve in PUBLISHED[network].items()]
    for method, (comparison, summary) in finished(folder).items():
        if comparison.classes_seen == CLASSES:
            curves.append((method, "ours", tuple(_means(comparison, summary))))
    columns = [
        bold_best([f"{value:.1f}" for value in values], list(values))
        for values in zip(*(curve for _, _, curve in curves), strict=True)
    ]
    lines = [
        (f"`{method}`", where, *(column[place] for column in columns))
        for place, (method, where, _) in enumerate(curves)
    ]
    return ("exemplars", "figures", *(f"{seen} classes" for seen in CLASSES)), lines


def finished(folder: Path) -> dict[str, tuple[Comparison, Summary]]:
    """Each method's finished seeds in a folder of results, with their comparison."""
    rows = ResultStore(folder).rows()
    steps = {row["step"] for row in rows}
    cells = {(row["method"], row["seed"], row["step"]) for row in rows}
    whole = [
        row for row in rows if all((row["method"], row["seed"], step) in cells for step in steps)
    ]
    if not whole:
        return {}
    (comparison,) = compare(whole)
    return {summary.method: (comparison, summary) for summary in comparison.methods}


def _measured(found: tuple[Comparison, Summary] | None) -> tuple[Sequence[float] | None, str]:
    """The mean curve of the seeds that are finished, and how many those are."""
    if found is None:
        return None, ""
    comparison, summary = found
    count = len(summary.average)
    return _means(comparison, summary), f" ({count} seed{'s' * (count > 1)})"


def _means(comparison: Comparison, summary: Summary) -> list[float]:
    """The mean accuracy of the seeds after each step."""
    return [statistics.fmean(summary.accuracy[seen]) for seen in comparison.classes_seen]


def _bold(curves: Sequence[tuple[Sequence[float] | None, str]]) -> list[str]:
    """A column of curves, each with what is said of it."""
    cells = [
        "–" if curve is None else " ".join(f"{value:.1f}" for value in curve) + remark
        for curve, remark in curves
    ]
    return bold_best(cells, [None if curve is None else curve[-1] for curve, _ in curves])
