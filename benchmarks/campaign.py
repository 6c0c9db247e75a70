"""Comparisons at equal bytes, with three seeds, made piece by piece.

    python -m benchmarks.campaign --data cifar100 --list
    python -m benchmarks.campaign --data cifar100 --minutes 8

A piece is one method with one seed in one table. Each call goes on where the last one stopped, also
inside a condensation or training, and ends when its minutes are over, so that hours of work fit
where a machine can be had for minutes at a time. Avalanche's own memories (``stock_*``) are the
exception: they begin anew, so that one of these needs a call as long as it takes, 6 to 11 minutes
at scale fast on two cores. Results go to ``benchmarks/results/SCALE/TABLE``; ``make report`` writes
the tables and plots from them.
"""

from __future__ import annotations

import _thread
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import class_incremental
from benchmarks.allocator import keep_freed_memory
from benchmarks.results import ResultStore
from benchmarks.tables import text_table
from benchmarks.workload import Place, command_line, names, numbers
from dc_replay.errors import ArgumentError

RESULTS = Path("benchmarks/results")

# What is compared of the recipes that condense, and the raw and packed images of the same bytes.
_REAL = ("random", "herding", "representative")
_RECIPES = ("dm", "idc_i", "idc", "dream_plus")
_CONDENSED = (*_RECIPES, "dream_plus+sm", "dream_plus+mdc")
# Ten raw images in the bytes of one, and as many condensed ones as packing holds.
_COMPRESSED = ("herding+compress=10", "dream_plus+factor=1+compress=4")
# Published is a choice of the prefix after 100 of 2,000 networks, so after 1 of 20.
_BY_TWENTY = (*_REAL, *(name.replace("+mdc", "+mdc=1") for name in _CONDENSED))
_REPLAYED = (
    "stock_replay",
    "herding",
    "dream_plus+mdc",
    "herding+compress=10",
    "random+compress=10",
    "dream_plus+factor=1+compress=8+mdc",
    "stock_reservoir",
    "stock_herding",
    "representative",
    "random",
)
# Condensed images in transform code, condensed at the number that stays, by 400 pixel steps.
IN_CODE = "dream_plus+factor=1+compress=8+outer=20"


@dataclass(frozen=True)
class Table:
    """One comparison at equal bytes: methods that differ in nothing but their memory.

    Attributes:
        methods: The methods, those first that the others are judged by.
        options: Options of ``class_incremental`` besides those of the scale.
        condensed: Where condensed experiences are kept. Tables in which the same ones are needed
            name the same folder.
        total: Images that the memory holds in all; None where it grows with the classes.
    """

    methods: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    condensed: str = "ipc20"
    total: int | None = None


def _replay(
    images: int, methods: tuple[str, ...] = _REPLAYED, *, epochs: int = 10, **more: float | str
) -> Table:
    """New data beside a memory of some images in all, which is always full."""
    options = {"protocol": "replay", "budget": f"total-images:{images}", "epochs": epochs, **more}
    return Table(methods, options, f"images{images}", total=images)


# What helps every memory to keep old classes: see docs/experiments.md.
_BALANCED = {"logit_adjustment": 1.0, "distillation": 1.0}
# As many bytes of each class from the beginning: nothing is cut.
_BALANCED_TWO = {"protocol": "replay", "ipc": 2, "epochs": 10, **_BALANCED}


_STREAM = {"ipc": 20, "steps": 5, "order": "idc", "compile": "always"}
_CLASSES = 100
TABLES: dict[str, dict[str, Table]] = {
    # Hours on two cores.
    "fast": {
        "replay_200": _replay(200),
        "balanced_200": _replay(200, **_BALANCED),
        "balanced_500": _replay(500, **_BALANCED),
        "balanced_2000": _replay(2000, **_BALANCED),
        # Twice as long: ten epochs end before the network has learned what it can.
        "balanced_200_20": _replay(
            200, ("stock_replay", "herding+compress=10", "herding"), epochs=20, **_BALANCED
        ),
        "balanced_two": Table(
            ("stock_replay", "herding", "herding+compress=10", IN_CODE), _BALANCED_TWO, "ipc2"
        ),
        # New images with half as much noise as condensing leaves, chosen on held-out images; beside
        # other memories than condensed ones nothing differs from the table before.
        "balanced_two_noise": Table((IN_CODE,), {**_BALANCED_TWO, "match_condensing": 0.5}, "ipc2"),
        # The same noise beside memories that are cut.
        "balanced_200_noise": _replay(
            200,
            ("dream_plus+mdc", "dream_plus+factor=1+compress=8+mdc"),
            match_condensing=0.5,
            **_BALANCED,
        ),
        # The same memories alone, shown as many images as with twenty images per class.
        "memory_only_two": Table(
            ("random", "herding", "herding+compress=10", IN_CODE),
            {"ipc": 2, "epochs": 400},
            "ipc2",
        ),
        # As memories are attached by default: each deals with the training transforms by itself.
        "attached_200": _replay(
            200,
            ("stock_replay", "herding", "herding+compress=10"),
            augmentation="training",
            **_BALANCED,
        ),
        # What every memory lies between: no images of old classes, and all of them.
        "bounds": _replay(200, ("naive", "cumulative"), **_BALANCED),
        "memory_only": Table((*_REAL, *_CONDENSED, *_COMPRESSED)),
        # Four times as long: short training hides a part of what more or better images are worth.
        "memory_only_160": Table(
            ("random", "herding", "herding+compress=10", "dream_plus"), {"epochs": 160}
        ),
        # The published network and a quarter of the published training, for what condenses nothing.
        "memory_only_wide": Table(
            ("herding+compress=10", "herding", "random"), {"width": 128, "epochs": 250}, "wide"
        ),
        # Another network than the one that chooses and condenses.
        "resnet10": Table(("herding+compress=10", *_REAL, *_RECIPES), {"network": "resnet10"}),
    },
    # The published settings, but for the number of matching networks.
    "paper": {
        "memory_only": Table((*_BY_TWENTY, *_COMPRESSED), {"outer": 20}, "outer20"),
        "memory_only_60": Table((*_REAL, "idc", "dream_plus"), {"outer": 60}, "outer60"),
        "resnet10": Table(_BY_TWENTY, {"outer": 20, "network": "resnet10"}, "outer20"),
    },
}
"""The comparisons by scale: preset ``fast`` on a CPU, the published settings on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Make comparisons at equal bytes, from where the last call stopped.

    Attributes:
        data: CIFAR-100: cifar100, which is downloaded, or npz:PATH.
        root: Where downloaded data are, or go.
        scale: The preset, and with it the tables: fast for a CPU, paper for a GPU.
        tables: Only some of the tables, separated by commas.
        methods: Only some of their methods, separated by commas.
        seeds: Seeds, separated by commas; one after the other for all tables.
        minutes: Stop after this time, at once and wherever it is.
        list: Only say what is finished.
        quiet: Show no progress bars.
        preset: In place of the scale's, to try a whole campaign in seconds; into another ``out``.
        classes: Only the first classes, likewise.
        state: Where unfinished work is kept.
        out: Folder of the results, with a folder for each scale and table.
    """

    data: str = "cifar100"
    root: Path = Path("data")
    scale: Literal["fast", "paper"] = "fast"
    tables: str | None = None
    methods: str | None = None
    seeds: str = "0,1,2"
    minutes: float | None = None
    list: bool = False
    quiet: bool = False
    preset: str | None = None
    classes: int | None = None
    state: Path = Path("runs/campaign")
    out: Path = RESULTS


@dataclass(frozen=True)
class Piece:
    """One method with one seed in one table."""

    name: str
    table: Table
    method: str
    seed: int

    def store(self, arguments: Arguments) -> ResultStore:
        """Where its results go."""
        return ResultStore(arguments.out / arguments.scale / self.name)

    def steps_done(self, arguments: Arguments) -> int:
        """Experiences whose results are there."""
        store = self.store(arguments)
        return sum(store.finished(self.method, self.seed, step=n) for n in range(_STREAM["steps"]))

    def run(self, arguments: Arguments) -> None:
        """Do it, or what is left of it."""
        state = arguments.state / arguments.scale
        full = {}
        if self.table.total is not None:  # by the classes of the first experience alone
            classes = (arguments.classes or _CLASSES) // _STREAM["steps"]
            full["ipc"] = self.table.total // classes
        workload = class_incremental.Arguments(
            **{
                **_STREAM,
                **self.table.options,
                **full,
                "data": arguments.data,
                "root": arguments.root,
                "preset": arguments.preset or arguments.scale,
                "classes": arguments.classes,
                "device": arguments.device,
                "quiet": arguments.quiet,
                "methods": self.method,
                "seeds": str(self.seed),
                "condensed": state / "condensed" / self.table.condensed,
                "out": arguments.out / arguments.scale / self.name,
            }
        )
        class_incremental.main(workload, made_by(arguments, self.name))


def made_by(arguments: Arguments, table: str) -> str:
    """What makes a table, for its report."""
    words = ["--scale", arguments.scale, "--tables", table, "--data", arguments.data]
    if arguments.preset is not None:
        words += ["--preset", arguments.preset]
    if arguments.classes is not None:
        words += ["--classes", str(arguments.classes)]
    return shlex.join(["python", "-m", "benchmarks.campaign", *words])


def main(arguments: Arguments, command: str) -> str:
    """Go on with what is not finished; return how far everything is.

    Raises:
        ArgumentError: If an argument cannot be used.
    """
    pieces = chosen(arguments)
    trial = [name for name in ("preset", "classes") if getattr(arguments, name) is not None]
    if trial and arguments.out == RESULTS:
        raise ArgumentError(
            f"`{trial[0]}` is {getattr(arguments, trial[0])!r}, which makes no results to keep; "
            f"name another `out`, and `state`, than those of the campaign itself"
        )
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ArgumentError(f"`minutes` is {arguments.minutes}, but must be above 0")
    if not arguments.list:
        with deadline(arguments.minutes):
            for piece in pieces:
                if piece.steps_done(arguments) < _STREAM["steps"]:
                    piece.run(arguments)
    return progress(arguments, pieces)


def chosen(arguments: Arguments) -> list[Piece]:
    """The pieces that are asked for, in their order.

    Raises:
        ArgumentError: If a table or method is not among those of the scale.
    """
    known = TABLES[arguments.scale]
    tables = list(known) if arguments.tables is None else names("tables", arguments.tables)
    strange = [name for name in tables if name not in known]
    if strange:
        raise ArgumentError(
            f"`tables` names {strange[0]!r}, but those of scale {arguments.scale} are "
            f"{', '.join(known)}"
        )
    everything = list(dict.fromkeys(m for table in tables for m in known[table].methods))
    wanted = everything if arguments.methods is None else names("methods", arguments.methods)
    strange = [name for name in wanted if name not in everything]
    if strange:
        raise ArgumentError(
            f"`methods` names {strange[0]!r}, but those of the tables are {', '.join(everything)}"
        )
    return [
        Piece(name, known[name], method, seed)
        for seed in numbers("seeds", arguments.seeds)
        for name in tables
        for method in known[name].methods
        if method in wanted
    ]


def progress(arguments: Arguments, pieces: Sequence[Piece]) -> str:
    """A table of how many experiences of each piece are done."""
    seeds = sorted({piece.seed for piece in pieces})
    done = {(piece.name, piece.method, piece.seed): piece.steps_done(arguments) for piece in pieces}
    lines = [
        (
            name,
            method,
            *(f"{done[name, method, seed]} of {_STREAM['steps']}" for seed in seeds),
        )
        for name, method in dict.fromkeys((piece.name, piece.method) for piece in pieces)
    ]
    left = sum(count < _STREAM["steps"] for count in done.values())
    table = text_table(("table", "method", *(f"seed {seed}" for seed in seeds)), lines)
    return f"{table}\n\n{left} of {len(pieces)} pieces are left"


@contextmanager
def deadline(minutes: float | None) -> Iterator[None]:
    """Leave the block when the time is over, as if Ctrl-C had been pressed, but quietly."""
    if minutes is None:
        yield
        return
    over, left = threading.Event(), threading.Event()

    def stop() -> None:
        if left.wait(60 * minutes):
            return
        over.set()
        # Again and again, because somebody may take the first for an error of his own.
        while not left.is_set():
            _thread.interrupt_main()
            left.wait(1)

    watch = threading.Thread(target=stop, daemon=True)
    watch.start()
    try:
        try:
            yield
        finally:
            left.set()
            watch.join()  # an interrupt that is under way arrives here
    except KeyboardInterrupt:
        if not over.is_set():
            raise
        print(f"{minutes:g} minutes are over; the same command goes on from here")


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.campaign", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(cli())
