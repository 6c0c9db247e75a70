"""Pictures of results: accuracy over the classes seen, and the exemplars themselves."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from torch import Tensor

from benchmarks.summary import accuracy_on, compare, deviation
from dc_replay.errors import ArgumentError

COLOURS = (
    "#0b5fa5",
    "#d1495b",
    "#2a9d60",
    "#8a4fbf",
    "#e08a00",
    "#16909e",
    "#7a5230",
    "#d45fa8",
    "#5c6b1e",
    "#4d4d4d",
)
MARKERS = "osD^vPX<>h"
INK, FAINT = "#222222", "#777777"

Lines = Mapping[str, Mapping[float, Sequence[float]]]
"""For each line's name the values at each place, one for each seed."""


def accuracy_plot(
    rows: Iterable[Mapping[str, Any]], path: str | Path, *, cut: tuple[int, int] | None = None
) -> None:
    """Draw accuracy over the classes seen, one line per method and one panel per comparison.

    Lines are means over seeds; bands are one standard deviation on either side.

    Args:
        rows: The result rows.
        path: The PNG file.
        cut: The step before which memories were cut, counted from 0, and to how many images per
            class; None if they were not.

    Raises:
        ArgumentError: If there are no rows.
    """
    comparisons = compare(rows)
    figure = Figure(figsize=(8.4 * len(comparisons), 5.2), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(m.method for c in comparisons for m in c.methods))
    panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        _draw(
            axes,
            {
                summary.method: {seen: summary.accuracy[seen] for seen in comparison.classes_seen}
                for summary in comparison.methods
            },
            methods,
            title=comparison.title,
            subtitle=comparison.subtitle,
            xlabel="classes seen",
            ylabel=f"{accuracy_on(comparison.data)} over the classes seen",
        )
        if cut is not None and 0 < cut[0] < len(comparison.classes_seen):
            _mark_cut(axes, comparison.classes_seen[cut[0] - 1 : cut[0] + 1], cut[1])
    figure.savefig(path)


def _mark_cut(axes: Axes, around: Sequence[int], images: int) -> None:
    """Draw where memories were cut, between two numbers of classes."""
    place = sum(around) / 2
    axes.axvline(place, color=FAINT, linewidth=1, linestyle=":")
    axes.annotate(
        f" cut to {images} per class",
        (place, 0.99),
        xycoords=("data", "axes fraction"),
        color=FAINT,
        fontsize=9,
        va="top",
    )


def line_plot(
    lines: Lines, path: str | Path, *, title: str, subtitle: str, xlabel: str, ylabel: str
) -> None:
    """Draw one panel of lines, means over seeds with a band of one standard deviation.

    Args:
        lines: For each name the values at each place, one for each seed.
        path: The PNG file.
        title: What is compared.
        subtitle: How it was measured.
        xlabel: What the places are.
        ylabel: What the values are; percentages.
    """
    figure, axes = _panel_of_lines()
    _draw(axes, lines, list(lines), title=title, subtitle=subtitle, xlabel=xlabel, ylabel=ylabel)
    figure.savefig(path)


def seconds_plot(
    lines: Lines, path: str | Path, *, title: str, subtitle: str, xlabel: str, ylabel: str
) -> None:
    """Draw the same over seconds, which differ by orders of magnitude from line to line.

    Each line is dotted on to the longest time of all.

    Args:
        lines: For each name the values at its seconds, in ascending order.
        path: The PNG file.
        title: What is compared.
        subtitle: How it was measured.
        xlabel: What takes the seconds.
        ylabel: What the values are; percentages.
    """
    figure, axes = _panel_of_lines()
    _draw(axes, lines, list(lines), title=title, subtitle=subtitle, xlabel=xlabel, ylabel=ylabel)
    places = [place for line in lines.values() for place in line]
    last = max(places)
    wide = last > 1000 * min(places)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
    for style, line in enumerate(lines.values()):
        end = max(line)
        height = statistics.fmean(line[end])
        colour = COLOURS[style % len(COLOURS)]
        axes.plot((end, last), (height, height), ":", color=colour, linewidth=1)
    figure.savefig(path)


def _panel_of_lines() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, 5.2), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def scaling_plot(
    lines: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, *, ylabel: str
) -> None:
    """Draw how a time grows, one panel for each size that changes.

    Args:
        lines: For each size the places and the seconds there.
        path: The PNG file.
        ylabel: What takes the seconds.
    """
    figure = Figure(figsize=(3.6 * len(lines), 3.8), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (name, line) in zip(panels, lines.items(), strict=True):
        places, values = zip(*line, strict=True)
        axes.plot(places, values, color=COLOURS[0], marker="o", clip_on=False)
        axes.set_xlabel(name)
        # Not shared: what one number costs would hide another.
        axes.set_xlim(0, 1.05 * max(places))
        axes.set_ylim(0, 1.05 * max(values))
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel(ylabel)
    figure.savefig(path)


def _draw(
    axes: Axes,
    lines: Lines,
    names: Sequence[str],
    *,
    title: str,
    subtitle: str,
    xlabel: str,
    ylabel: str,
) -> None:
    ends: list[tuple[float, str, str]] = []
    bottom, top = 100.0, 0.0
    for name, line in lines.items():
        style = names.index(name)
        colour = COLOURS[style % len(COLOURS)]
        dashes = "-" if style < len(COLOURS) else "--"
        places = [place for place, values in line.items() if values]
        means = np.array([statistics.fmean(line[place]) for place in places])
        spread = np.array([deviation(line[place]) for place in places])
        if spread.any():
            axes.fill_between(
                places, means - spread, means + spread, color=colour, alpha=0.14, linewidth=0
            )
        axes.plot(
            places,
            means,
            dashes,
            color=colour,
            marker=MARKERS[style % len(MARKERS)],
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=2,
            label=name,
            clip_on=False,
        )
        ends.append((float(means[-1]), f"{name}  {means[-1]:.1f}", colour))
        bottom = min(bottom, float((means - spread).min()))
        top = max(top, float((means + spread).max()))
    axes.set_ylim(
        max(0, math.floor((bottom - 3) / 10) * 10), min(100, math.ceil(top / 5 + 0.4) * 5)
    )
    _label_ends(axes, ends)
    title = textwrap.fill(title, 78)  # what a figure is wide enough for
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=24)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=FAINT, fontsize=9.5)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    places = sorted({place for line in lines.values() for place in line})
    axes.set_xticks(places[:: -math.ceil(len(places) / 12)])
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.margins(x=0.03)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def step_plot(
    lines: Mapping[str, Sequence[float]], path: str | Path, *, xlabel: str, ylabel: str
) -> None:
    """Draw what was chosen in each of a row of periods, one stepped line for each name."""
    figure = Figure(figsize=(8.4, 3.2), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for style, (name, values) in enumerate(lines.items()):
        axes.step(
            range(1, len(values) + 1),
            values,
            where="mid",
            color=COLOURS[style % len(COLOURS)],
            marker=MARKERS[style % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.tick_params(colors=FAINT, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name each line at its right end, moved apart where labels would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * min(0.052, 1 / len(ends))
    ordered = sorted(ends)
    heights = _spread_out([height for height, _, _ in ordered], gap, low, high)
    for (height, text, colour), place in zip(ordered, heights, strict=True):
        axes.plot(
            (1, 1.028),
            (height, place),
            transform=axes.get_yaxis_transform(),
            color=colour,
            linewidth=0.8,
            alpha=0.6,
            clip_on=False,
        )
        axes.text(
            1.035,
            place,
            text,
            transform=axes.get_yaxis_transform(),
            color=colour,
            fontsize=9.5,
            va="center",
        )


def _spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending heights apart by at least ``gap``, each group staying around its middle."""
    groups: list[list[float]] = []
    for height in wanted:
        groups.append([height])
        while len(groups) > 1:
            upper, lower = groups[-1], groups[-2]
            if _bottom(upper, gap, low, high) - _top(lower, gap, low, high) >= gap:
                break
            groups[-2:] = [lower + upper]
    return [
        _bottom(group, gap, low, high) + gap * place
        for group in groups
        for place in range(len(group))
    ]


def _bottom(group: Sequence[float], gap: float, low: float, high: float) -> float:
    length = gap * (len(group) - 1)
    return max(low, min(statistics.fmean(group) - length / 2, high - length))


def _top(group: Sequence[float], gap: float, low: float, high: float) -> float:
    return _bottom(group, gap, low, high) + gap * (len(group) - 1)


def exemplar_sheet(
    images_by_method: Mapping[str, Tensor],
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw each method's exemplars side by side: one row per class, one column per image.

    Args:
        images_by_method: uint8 ``[rows, columns, channels, height, width]`` per method, with 1 or
            3 channels.
        path: Where the PNG is written.
        class_names: A name for each row.

    Raises:
        ArgumentError: If there are no images, or they are not of that form.
    """
    if not images_by_method:
        raise ArgumentError("`images_by_method` is empty; give the images of at least one method")
    panels = {name: _panel(name, images) for name, images in images_by_method.items()}
    rows = {images.shape[0] for images in images_by_method.values()}
    if class_names is not None and rows != {len(class_names)}:
        raise ArgumentError(
            f"`class_names` holds {len(class_names)} names, but the sheet has "
            f"{' or '.join(str(count) for count in sorted(rows))} rows; give one name per row"
        )
    dpi, margin, title = 100, 24, 34
    names = 0 if class_names is None else 16 + 7 * max(len(name) for name in class_names)
    # A letter of a title is about 11 pixels wide.
    widest = max(max(panel.shape[1], 11 * len(name)) for name, panel in panels.items())
    tallest = max(panel.shape[0] for panel in panels.values())
    across = min(len(panels), max(1, 1800 // (widest + margin)))
    down = math.ceil(len(panels) / across)
    width = margin + names + across * (widest + margin)
    height = margin + down * (tallest + title + margin // 2)
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    for index, (name, panel) in enumerate(panels.items()):
        line, column = divmod(index, across)
        left = margin + names + column * (widest + margin)
        top = margin // 2 + line * (tallest + title + margin // 2)
        figure.text(
            left / width,
            1 - (top + title / 2) / height,
            name,
            color=INK,
            fontsize=12,
            fontweight="bold",
            va="center",
        )
        figure.figimage(panel, xo=left, yo=height - top - title - panel.shape[0])
        if class_names is not None and column == 0:
            for row, label in enumerate(class_names):
                middle = top + title + panel.shape[0] * (row + 0.5) / len(class_names)
                figure.text(
                    (left - 8) / width,
                    1 - middle / height,
                    label,
                    color=FAINT,
                    fontsize=9,
                    ha="right",
                    va="center",
                )
    figure.savefig(path, dpi=dpi)


def _panel(method: str, images: Tensor) -> np.ndarray:
    """Lay one method's images out as uint8 ``[height, width, 3]``, enlarged by whole pixels."""
    if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[2] not in (1, 3):
        raise ArgumentError(
            f"`images_by_method[{method!r}]` is {images.dtype} of shape {list(images.shape)}; "
            "expected uint8 [rows, columns, channels, height, width] with 1 or 3 channels"
        )
    if 0 in images.shape:
        raise ArgumentError(f"`images_by_method[{method!r}]` has no images")
    rows, columns, _channels, height, width = images.shape
    pixels = images.cpu().numpy().transpose(0, 3, 1, 4, 2)
    scale = max(1, math.ceil(48 / max(height, width)))
    tall, wide = height * scale, width * scale
    gap = max(3, min(tall, wide) // 9)
    sheet = np.full((rows * (tall + gap) - gap, columns * (wide + gap) - gap, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = pixels[row, :, column].repeat(scale, axis=0).repeat(scale, axis=1)
            top, left = row * (tall + gap), column * (wide + gap)
            sheet[top : top + tall, left : left + wide] = tile
    return sheet
