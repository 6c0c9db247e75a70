"""How the time to condense grows with classes, stored images per class, and the images' side.

    python -m benchmarks.scaling --classes 5,10,20,40 --ipc 5,10,20,50 --sides 32,64

Seconds of an inner iteration, that is of one pixel step for every class and what the network learns
after it. One of the three numbers changes at a time. Writes ``results.json`` and ``scaling.png``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from benchmarks.pictures import scaling_plot
from benchmarks.presets import condenser as preset_condenser
from benchmarks.presets import preset
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.timing import Stopwatch
from benchmarks.workload import Place, at_least_1, command_line, numbers
from dc_replay.networks import convnet_for
from dc_replay.pixels import Normalization

NAMES = {"classes": "classes", "ipc": "stored images per class", "side": "side in pixels"}


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Time inner iterations of a condensation while one size at a time grows.

    Attributes:
        recipe: A recipe that optimises.
        preset: Whose settings, such as width and real batch, are used.
        classes: Numbers of classes, separated by commas.
        ipc: Numbers of stored images per class, separated by commas.
        sides: Heights and widths of the images, separated by commas.
        base_classes: Classes while another number changes.
        base_ipc: Stored images per class while another number changes.
        base_side: Height and width while another number changes.
        images: Real images of each class.
        iterations: Inner iterations that are timed, after those that compile.
        out: Output folder.
    """

    recipe: str = "dream_plus"
    preset: str = "fast"
    classes: str = "5,10,20,40"
    ipc: str = "5,10,20,50"
    sides: str = "32,64"
    base_classes: int = 20
    base_ipc: int = 10
    base_side: int = 32
    images: int = 100
    iterations: int = 10
    out: Path = Path("runs/scaling")


@dataclass(frozen=True)
class Point:
    """A size to time.

    Attributes:
        classes: Classes.
        ipc: Stored images per class.
        side: Height and width of the images.
    """

    classes: int
    ipc: int
    side: int


def main(arguments: Arguments, command: str) -> str:
    """Time what is not timed yet, write the outputs, and return the table for the terminal.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    for name in ("images", "iterations", "base_classes", "base_ipc", "base_side"):
        at_least_1(name, getattr(arguments, name))
    device = arguments.chosen_device()
    chosen = points(arguments)
    rows: list[dict[str, Any]] = []
    for point in dict.fromkeys(point for line in chosen.values() for point in line):
        rows.append({**asdict(point), "seconds": iteration_seconds(arguments, point, device)})
        write_figures(
            arguments.out,
            "scaling",
            rows,
            command=command,
            settings=asdict(arguments),
            device=device,
        )
    draw(rows, arguments)
    return text_table(*cells(rows))


def draw(rows: Sequence[dict[str, Any]], arguments: Arguments) -> None:
    """Make the plot of a run that is finished."""
    chosen = points(arguments)
    lines = {NAMES[axis]: series(rows, axis, line) for axis, line in chosen.items()}
    scaling_plot(lines, arguments.out / "scaling.png", ylabel="seconds of an inner iteration")


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as a table."""
    return (
        ("classes", "ipc", "side", "seconds per iteration"),
        [
            (*(str(row[axis]) for axis in NAMES), f"{statistics.median(row['seconds']):.3f}")
            for row in rows
        ],
    )


def points(arguments: Arguments) -> dict[str, list[Point]]:
    """For each number that changes, the sizes to time."""
    sizes = {
        "classes": numbers("classes", arguments.classes),
        "ipc": numbers("ipc", arguments.ipc),
        "side": numbers("sides", arguments.sides),
    }
    for name, values in sizes.items():
        for value in values:
            at_least_1(name, value)
    middle = Point(arguments.base_classes, arguments.base_ipc, arguments.base_side)
    return {
        axis: [replace(middle, **{axis: value}) for value in values]
        for axis, values in sizes.items()
    }


def series(
    rows: Sequence[dict[str, Any]], axis: str, line: Sequence[Point]
) -> list[tuple[int, float]]:
    """The seconds of some sizes, by the number that changes."""
    known = {
        Point(row["classes"], row["ipc"], row["side"]): statistics.median(row["seconds"])
        for row in rows
    }
    return [(getattr(point, axis), known[point]) for point in line]


def iteration_seconds(arguments: Arguments, point: Point, device: torch.device) -> list[float]:
    """Seconds of each timed inner iteration of a condensation of random images."""
    settings = preset(arguments.preset)
    shape = (3, point.side, point.side)
    network = convnet_for(shape, width=settings.width)
    condenser = preset_condenser(
        arguments.recipe, settings, factor=2, ipc=point.ipc, network=network
    )
    watch = Stopwatch(condenser.update)
    condenser = replace(
        condenser,
        outer=1,
        inner=arguments.iterations + 1,
        warm_up=0,
        update=watch,
        compile=True,
    )
    count = point.classes * arguments.images
    generator = Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    condenser.condense(
        images.to(device),
        (torch.arange(count) % point.classes).to(device),
        quotas=point.ipc,
        normalization=Normalization((0.5,) * 3, (0.25,) * 3),
        generator=generator,
    )
    return watch.iterations(skip=0)


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.scaling", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(cli())
