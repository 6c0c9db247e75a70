"""Where the time of an inner iteration goes, eager and compiled.

    python -m benchmarks.iteration_profile --recipe dream_plus --ipc 10 --out runs/iteration_profile

Writes ``results.json`` and prints the table.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from benchmarks.matching_speed import NORMALIZATION, SIZE, pictures
from benchmarks.presets import condenser as preset_condenser
from benchmarks.presets import preset
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.timing import Stopwatch
from benchmarks.workload import Place, at_least_1, command_line
from dc_replay import Condenser
from dc_replay.matching import Launches
from dc_replay.networks import Precision, convnet_for
from dc_replay.optimisation import Optimisation
from dc_replay.sampling import RealImages, nearest_in_each
from dc_replay.training import NetworkTraining

PARTS: dict[str, Callable[..., Any]] = {
    "features of all real images": RealImages.features_by_class,
    "k-means": nearest_in_each,
    "gathering, draws and terms": Optimisation._batches,
    "pixel steps of all classes": Launches.__call__,
    "training the network": NetworkTraining.train,
}
"""The functions whose time is told apart; none of them calls another."""

WAYS: dict[str, tuple[bool, Precision]] = {
    "eager float32": (False, "float32"),
    "compiled": (True, "auto"),
}


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Tell apart what an inner iteration spends its time on.

    Attributes:
        data: Images of 32x32 pixels, as for the other benchmarks; None makes some up.
        root: Where downloaded data are, or go.
        recipe: A recipe that optimises.
        preset: Whose settings, such as width and real batch, are used.
        width: Overrides the preset's channels of the network.
        classes: Classes.
        ipc: Stored images per class.
        images: Real images of each class.
        iterations: Inner iterations that count, after one that compiles.
        out: Output folder.
    """

    data: str | None = None
    root: Path = Path("data")
    recipe: str = "dream_plus"
    preset: str = "fast"
    width: int | None = None
    classes: int = 20
    ipc: int = 10
    images: int = 500
    iterations: int = 10
    out: Path = Path("runs/iteration_profile")


def main(arguments: Arguments, command: str) -> str:
    """Measure, write ``results.json``, and return the table for the terminal.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    for name in ("classes", "ipc", "images", "iterations"):
        at_least_1(name, getattr(arguments, name))
    device = arguments.chosen_device()
    settings = preset(arguments.preset)
    network = convnet_for(SIZE, width=arguments.width or settings.width)
    condenser = preset_condenser(
        arguments.recipe, settings, factor=2, ipc=arguments.ipc, network=network
    )
    images, labels = pictures(arguments.data, arguments.root, arguments.classes, arguments.images)
    rows = [
        {
            "way": way,
            **seconds_of_parts(
                replace(condenser, compile=compile, precision=precision),
                images.to(device),
                labels.to(device),
                ipc=arguments.ipc,
                iterations=arguments.iterations,
            ),
        }
        for way, (compile, precision) in WAYS.items()
    ]
    write_figures(
        arguments.out,
        "iteration_profile",
        rows,
        command=command,
        settings=asdict(arguments),
        device=device,
    )
    return text_table(*cells(rows))


def seconds_of_parts(
    condenser: Condenser, images: torch.Tensor, labels: torch.Tensor, *, ipc: int, iterations: int
) -> dict[str, float]:
    """Seconds that each part takes of an inner iteration, in the mean, and ``all`` of it."""
    watch = Stopwatch(condenser.update)
    condenser = replace(condenser, outer=1, warm_up=0, update=watch)

    def condense(inner: int) -> None:
        replace(condenser, inner=inner).condense(
            images,
            labels,
            quotas=ipc,
            normalization=NORMALIZATION,
            generator=Generator().manual_seed(0),
        )

    condense(1)  # compiles
    short, long = _cumulative(lambda: condense(1)), _cumulative(lambda: condense(1 + iterations))
    watch.ends.clear()
    condense(1 + iterations)
    # What comes once, such as choosing the first images, is in both and cancels out.
    found = {part: (long[part] - short[part]) / iterations for part in PARTS}
    found["all"] = sum(watch.iterations(skip=0)) / iterations
    return found


def _cumulative(work: Callable[[], None]) -> dict[str, float]:
    profile = cProfile.Profile()
    profile.runcall(work)
    by_code = {
        (file, line): cumulative
        for (file, line, _), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    }
    return {
        part: by_code.get((function.__code__.co_filename, function.__code__.co_firstlineno), 0.0)
        for part, function in PARTS.items()
    }


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as a table."""
    header = ["ms of an inner iteration"]
    for row in rows:
        header += [row["way"], "%"]
    lines = []
    for part in (*PARTS, "the rest", "all"):
        line = [part]
        for row in rows:
            rest = row["all"] - sum(row[name] for name in PARTS)
            value = rest if part == "the rest" else row[part]
            line += [f"{1000 * value:.0f}", f"{100 * value / row['all']:.0f}"]
        lines.append(line)
    return header, lines


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.iteration_profile", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(cli())
