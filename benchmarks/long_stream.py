"""Whether memory and time stay flat over a long stream of small experiences.

    python -m benchmarks.long_stream --experiences 1000 --out runs/long_stream

Avalanche's Naive trains a tiny model on one small experience after the other, and
CondensedReplayPlugin condenses each into a memory of constant size. Classes return from a pool; the
rarest has one image at a time, the most frequent a hundred. After each experience the resident
memory of the process, the seconds and the stored bytes are noted. The same without the plugin, in a
process of its own, tells what Avalanche and the C library let grow. Writes ``results.json`` and
``flat.png``. On Linux.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Generator, nn

from benchmarks.image_data import LabelledImages
from benchmarks.methods import method as named_method
from benchmarks.pictures import COLOURS
from benchmarks.presets import PRESETS
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.timing import Threshold, failures
from benchmarks.workload import Missed, Place, at_least_1, child_environment, command_line
from dc_replay import CondensedReplayPlugin, Condenser, Normalization, TotalBytes
from dc_replay._progress import progress
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.networks import convnet_for

SHAPE = (3, 8, 8)
BATCH = 16
WITH, WITHOUT = "with replay", "without"

# What a run with --gate must reach. The C library's share falls for hundreds of experiences; a leak
# of one image of this size in each batch would be above it.
GATE_GROWTH = 16.0
GATE_TIME = 1.5


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Train on a long stream with a condensed memory, and see what grows.

    Attributes:
        experiences: Experiences of the stream.
        method: A recipe, to which others are added as in dream_plus+mdc.
        outer: Matching networks of an experience.
        inner: Pixel steps with each.
        width: Channels of the matching network.
        total_bytes: Pixel bytes of the memory, at least 192 for each class of the pool.
        pool: Classes that the experiences draw from.
        classes: The most classes of an experience; every number up to that takes its turn.
        most: Images that the most frequent class has in an experience; the rarest has one.
        warm_up: Experiences at the beginning that do not count.
        window: Experiences at the beginning, after those, and at the end whose times are compared.
        seed: Everything follows from it.
        without: Leave the plugin out.
        baseline: Also run without the plugin, in a process of its own.
        gate: Exit with 1 where a figure misses a generous bound.
        out: Output folder.
    """

    experiences: int = 1000
    method: str = "idc"
    outer: int = 1
    inner: int = 2
    width: int = 8
    total_bytes: int = 20_000
    pool: int = 50
    classes: int = 3
    most: int = 100
    warm_up: int = 100
    window: int = 100
    seed: int = 0
    without: bool = False
    baseline: bool = True
    gate: bool = False
    out: Path = Path("runs/long_stream")


def main(arguments: Arguments, command: str) -> str:
    """Run the stream, write the outputs, and return the table for the terminal.

    Raises:
        ArgumentError: If an argument cannot be used.
        Missed: If a figure misses a bound, and there is to be a gate.
    """
    _check(arguments)
    device = arguments.chosen_device()
    rows = [measure(arguments, device)]
    if arguments.baseline and not arguments.without:
        alone = replace(arguments, out=arguments.out / "without")
        rows.append(without_in_own_process(alone))
    write_figures(
        arguments.out,
        "long_stream",
        rows,
        command=command,
        settings=asdict(arguments),
        device=device,
    )
    draw(rows, arguments.out / "flat.png")
    missed = failures(thresholds(rows, arguments)) if arguments.gate else []
    if missed:
        raise Missed("; ".join(missed))
    return text_table(*cells(rows))


class LongStream:
    """Experiences that are made when they are asked for.

    Args:
        arguments: The options of the command line.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        levels = np.linspace(0, 1, arguments.pool)
        self.counts: list[int] = np.round(arguments.most**levels).astype(int).tolist()
        generator = Generator().manual_seed(arguments.seed)
        self.means = torch.rand((arguments.pool, *SHAPE), generator=generator)

    def experience(self, number: int) -> Any:
        """An experience of a few classes, each with the number of images that is its own."""
        chance = np.random.default_rng((self.arguments.seed, number))
        # In turn, so that any two windows hold alike many experiences of each size.
        many = 1 + number % self.arguments.classes
        chosen = chance.choice(self.arguments.pool, size=many, replace=False).tolist()
        labels = [label for label in chosen for _ in range(self.counts[label])]
        noise = torch.from_numpy(chance.random((len(labels), *SHAPE), dtype=np.float32))
        images = 0.5 * self.means[labels] + 0.5 * noise
        dataset = as_classification_dataset(LabelledImages(images, labels))
        return DatasetExperience(dataset=dataset, current_experience=number)


def measure(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Train on the stream in this process, and summarise what was noted of each experience."""
    torch.manual_seed(arguments.seed)
    stream = LongStream(arguments)
    replay = None if arguments.without else _replay(arguments)
    strategy = _strategy(arguments, replay, device)
    # All of it is there from the beginning, so that taking notes takes no memory.
    noted = {
        name: np.full(arguments.experiences, -1.0)
        for name in ("train_seconds", "condense_seconds", "resident_kib", "stored_bytes")
    }
    # What is there now need not be searched for garbage, experience by experience.
    gc.collect()
    gc.freeze()
    name = WITHOUT if replay is None else WITH
    try:
        for number in progress(range(arguments.experiences), desc=name, unit="exp", disable=None):
            began = time.perf_counter()
            strategy.train(stream.experience(number), eval_streams=[])
            seconds = time.perf_counter() - began
            condensing = 0.0 if replay is None else replay.buffer.seconds[-1]
            gc.collect()
            noted["train_seconds"][number] = seconds - condensing
            noted["condense_seconds"][number] = condensing
            noted["resident_kib"][number] = resident_kib()
            noted["stored_bytes"][number] = 0 if replay is None else replay.memory.nbytes
    finally:
        gc.unfreeze()
    return {
        "way": name,
        **summary(noted, warm_up=arguments.warm_up, window=arguments.window),
        "classes_stored": 0 if replay is None else len(replay.memory.classes),
        "record_bytes": 0.0 if replay is None else records(replay) / arguments.experiences,
        **{key: [round(float(v), 5) for v in values] for key, values in noted.items()},
    }


def summary(noted: dict[str, Any], *, warm_up: int, window: int) -> dict[str, float]:
    """How much memory and time grow.

    Args:
        noted: Of each experience, the seconds, the resident memory and the stored bytes.
        warm_up: Experiences at the beginning that do not count.
        window: Experiences at either end of the others whose times are compared.

    Returns:
        ``growth_kib``, the slope of a line through the resident memory, for each experience;
        ``train_ratio`` and ``condense_ratio``, how many times as long the last experiences take as
        the first, by the medians; and the most stored bytes.
    """
    resident = noted["resident_kib"][warm_up:]
    found = {
        "growth_kib": statistics.linear_regression(range(len(resident)), resident).slope,
        "most_stored_bytes": int(max(noted["stored_bytes"])),
    }
    for part in ("train", "condense"):
        seconds = noted[f"{part}_seconds"][warm_up:]
        first, last = statistics.median(seconds[:window]), statistics.median(seconds[-window:])
        found[f"{part}_ratio"] = last / first if first else 1.0
    return found


def thresholds(rows: Sequence[dict[str, Any]], arguments: Arguments) -> list[Threshold]:
    """What a run with ``--gate`` is held against."""
    ours, *others = rows
    besides = others[0]["growth_kib"] if others else 0.0
    growth = ours["growth_kib"] - max(0.0, besides)
    return [
        Threshold("growth in KiB per experience", growth, most=GATE_GROWTH),
        Threshold("time to condense, last to first", ours["condense_ratio"], most=GATE_TIME),
        Threshold("time to train, last to first", ours["train_ratio"], most=GATE_TIME),
        Threshold("stored bytes", ours["most_stored_bytes"], most=arguments.total_bytes),
    ]


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as a table."""
    header = (
        "",
        "MiB at the end",
        "KiB per experience",
        "of that records",
        "training, last to first",
        "condensing, last to first",
        "most stored bytes",
    )
    lines = [
        (
            row["way"],
            f"{row['resident_kib'][-1] / 1024:.0f}",
            f"{row['growth_kib']:.2f}",
            f"{row['record_bytes'] / 1024:.2f}",
            f"{row['train_ratio']:.2f}",
            f"{row['condense_ratio']:.2f}" if row["way"] == WITH else "",
            str(row["most_stored_bytes"]) if row["way"] == WITH else "",
        )
        for row in rows
    ]
    return header, lines


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw resident memory and seconds over the experiences."""
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds = figure.subplots(1, 2)
    for row, colour in zip(rows, COLOURS, strict=False):
        memory.plot([kib / 1024 for kib in row["resident_kib"]], color=colour, label=row["way"])
    parts = [("condense_seconds", "condensing"), ("train_seconds", "training")]
    for (part, label), colour in zip(parts, COLOURS, strict=False):
        if any(rows[0][part]):
            places = range(len(rows[0][part]))
            seconds.scatter(places, rows[0][part], s=3, color=colour, label=label, linewidths=0)
    # A few experiences that something else held up would leave no room for all the others.
    usual = np.quantile([rows[0][part] for part, _ in parts], 0.99)
    seconds.set_ylim(top=1.6 * usual)
    memory.set_ylabel("resident memory of the process in MiB")
    seconds.set_ylabel("seconds of an experience")
    for axes, place in ((memory, "lower right"), (seconds, "upper right")):
        axes.set_xlabel("experience")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.legend(frameon=False, loc=place, markerscale=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)


def without_in_own_process(arguments: Arguments) -> dict[str, Any]:
    """Run the stream without replay in a process of its own; return the figures.

    Raises:
        DCReplayError: If it fails.
    """
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(arguments).items()
        if value is not None and not isinstance(value, bool)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.long_stream", "--without", *options],
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise DCReplayError(f"the run without replay ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads((arguments.out / "results.json").read_text())["rows"][0]
    return found


def resident_kib() -> float:
    """Memory of this process that is in RAM.

    Raises:
        ArgumentError: Where the system does not say.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        raise ArgumentError(
            "this system has no /proc/self/statm to read the memory of a process from; use Linux"
        ) from None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def records(replay: CondensedReplayPlugin) -> int:
    """Bytes of the history and the seconds that the plugin keeps of all experiences."""
    return _size(replay.history) + _size(replay.buffer.seconds)


def _size(value: Any) -> int:
    parts: list[Any] = []
    if isinstance(value, dict):
        parts = list(value.values())  # the keys are the same objects every time
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    return sys.getsizeof(value) + sum(_size(part) for part in parts)


def _replay(arguments: Arguments) -> CondensedReplayPlugin:
    return CondensedReplayPlugin(
        condenser=_condenser(arguments),
        budget=TotalBytes(arguments.total_bytes),
        batch_size_mem=BATCH,
        normalization=Normalization.identity(SHAPE[0]),
        seed=arguments.seed,
        progress=False,
    )


def _condenser(arguments: Arguments) -> Condenser:
    settings = replace(
        PRESETS["smoke"], outer=arguments.outer, inner=arguments.inner, width=arguments.width
    )
    built = named_method(arguments.method, argument="method").condenser(
        settings,
        factor=2,
        ipc=max(1, arguments.total_bytes // prod(SHAPE) // arguments.pool),
        network=convnet_for(SHAPE, width=arguments.width),
    )
    return replace(built, compile=False)


def _strategy(
    arguments: Arguments, replay: CondensedReplayPlugin | None, device: torch.device
) -> Naive:
    model = nn.Sequential(nn.Flatten(), nn.Linear(prod(SHAPE), arguments.pool))
    with warnings.catch_warnings():
        # There are none because they keep what they log.
        warnings.filterwarnings("ignore", "No loggers specified")
        evaluator = EvaluationPlugin(collect_all=False, strict_checks=False)
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=BATCH,
        device=device,
        plugins=[] if replay is None else [replay],
        evaluator=evaluator,
    )


def _check(arguments: Arguments) -> None:
    for name in ("experiences", "outer", "inner", "width", "pool", "classes", "most", "window"):
        at_least_1(name, getattr(arguments, name))
    for name in ("warm_up", "seed"):
        if getattr(arguments, name) < 0:
            raise ArgumentError(f"`{name}` is {getattr(arguments, name)}, but must be at least 0")
    least = arguments.warm_up + 2 * arguments.window
    if arguments.experiences < least:
        raise ArgumentError(
            f"`experiences` is {arguments.experiences}, but a warm-up of {arguments.warm_up} and "
            f"two windows of {arguments.window} need {least}; lower `warm_up` and `window`"
        )
    if arguments.classes > arguments.pool:
        raise ArgumentError(
            f"`classes` is {arguments.classes}, but the pool has only {arguments.pool}"
        )
    # Says now what would else be said when the last class of the pool has arrived.
    TotalBytes(arguments.total_bytes).quotas(range(arguments.pool), image_bytes=prod(SHAPE))
    _condenser(arguments)
    resident_kib()


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.long_stream", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(cli())
