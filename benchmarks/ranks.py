"""How long a condensation takes on several processes of torch.distributed.

    python -m benchmarks.ranks --runs 1x1,2x1,1x2 --out runs/ranks

Writes ``results.json`` into the output folder. Each run is a start of ``torchrun``; started by
``torchrun`` itself, this times the processes that there are, and prints what it found.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import tyro
from torch import Generator, Tensor

from benchmarks.distributed import is_first, together
from benchmarks.presets import condenser as preset_condenser
from benchmarks.presets import preset
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.timing import wait_for
from benchmarks.workload import Place, at_least_1, child_environment, command_line, names
from dc_replay import Condenser, Normalization
from dc_replay.apprentice import Apprentice
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.networks import convnet_for
from dc_replay.optimisation import NetworkUpdate


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Time condensing on several processes.

    Attributes:
        runs: RANKSxTHREADS, separated by commas: how many processes, and the threads of each.
        recipe: What condenses.
        preset: Whose settings, but for the numbers below, are used.
        classes: Classes.
        ipc: Stored images per class.
        side: Height and width of the images.
        images: Real images of each class.
        outer: Matching networks.
        inner: Pixel steps with each.
        rounds: Condensations that are timed, after one that compiles.
        compile: Whether the step functions are compiled.
        out: Output folder.
    """

    runs: str = "1x1,2x1,1x2"
    recipe: str = "dream_plus"
    preset: str = "fast"
    classes: int = 20
    ipc: int = 10
    side: int = 32
    images: int = 100
    outer: int = 2
    inner: int = 10
    rounds: int = 3
    compile: bool = True
    out: Path = Path("runs/ranks")


def main(arguments: Arguments, command: str) -> str:
    """Time each run, write the outputs, and return the table for the terminal.

    Raises:
        DCReplayError: If an argument cannot be used, or a run fails.
    """
    for name in ("classes", "ipc", "side", "images", "outer", "inner", "rounds"):
        at_least_1(name, getattr(arguments, name))
    preset(arguments.preset)
    device = arguments.chosen_device()
    rows: list[dict[str, Any]] = []
    for ranks, threads in chosen_runs(arguments):
        rows.append(timed(arguments, ranks, threads))
        settings = asdict(arguments)
        write_figures(
            arguments.out, "ranks", rows, command=command, settings=settings, device=device
        )
    return text_table(*cells(rows))


def chosen_runs(arguments: Arguments) -> list[tuple[int, int]]:
    """How many processes and threads each run has.

    Raises:
        ArgumentError: If the option says something else.
    """
    found = []
    for text in names("runs", arguments.runs):
        ranks, _, threads = text.partition("x")
        if not (ranks.isdigit() and threads.isdigit() and int(ranks) and int(threads)):
            raise ArgumentError(
                f"`runs` is {arguments.runs!r}, but must be RANKSxTHREADS, separated by commas, "
                f"such as 1x1,2x1"
            )
        found.append((int(ranks), int(threads)))
    return found


def timed(arguments: Arguments, ranks: int, threads: int) -> dict[str, Any]:
    """Start processes that condense, and return what the first one found."""
    options = [
        *("--recipe", arguments.recipe, "--preset", arguments.preset),
        *(f"--{name}={getattr(arguments, name)}" for name in _NUMBERS),
        "--compile" if arguments.compile else "--no-compile",
        *(["--device", arguments.device] if arguments.device else []),
    ]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", "benchmarks.ranks", *options),
        ],
        env={**child_environment(), "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise DCReplayError(f"{ranks} processes ended with {process.returncode}; see their errors")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


_NUMBERS = ("classes", "ipc", "side", "images", "outer", "inner", "rounds")


@dataclass(frozen=True)
class Timed:
    """A network update that adds up its own seconds.

    Attributes:
        update: What it stands for, which does not look at pixels.
        device: Where it runs.
        seconds: How long each call took.
    """

    update: NetworkUpdate
    device: torch.device
    seconds: list[float] = field(default_factory=list, compare=False, repr=False)
    uses_pixels: ClassVar[bool] = False

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Update, and note the time."""
        wait_for(self.device)
        began = time.perf_counter()
        self.update(apprentice, pixels)
        wait_for(self.device)
        self.seconds.append(time.perf_counter() - began)


def work(arguments: Arguments) -> dict[str, Any]:
    """Condense in one of several processes: the seconds, and a digest of the bytes."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    with together(arguments.chosen_device()) as device:
        condenser, shape = _condenser(arguments)
        watch = None
        if condenser.update is not None and not getattr(condenser.update, "uses_pixels", True):
            watch = Timed(condenser.update, device)
            condenser = replace(condenser, update=watch)
        count = arguments.classes * arguments.images
        random = Generator().manual_seed(0)
        images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=random)
        images, labels = images.to(device), (torch.arange(count) % arguments.classes).to(device)

        def condense(condenser: Condenser) -> Tensor:
            found = condenser.condense(
                images,
                labels,
                quotas=arguments.ipc,
                normalization=Normalization((0.5,) * 3, (0.25,) * 3),
                generator=Generator().manual_seed(1),
            )
            return found.exemplars.pixels.cpu()

        condense(replace(condenser, outer=1, inner=1))
        seconds, alike = [], []
        for _ in range(arguments.rounds):
            if watch is not None:
                watch.seconds.clear()
            wait_for(device)
            dist.barrier()
            began = time.perf_counter()
            pixels = condense(condenser)
            seconds.append(time.perf_counter() - began)
            alike.append(sum(watch.seconds) if watch is not None else 0.0)
        return {
            "ranks": dist.get_world_size(),
            "threads": threads,
            "seconds": seconds,
            "network_seconds": alike,
            "digest": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        }


def _condenser(arguments: Arguments) -> tuple[Condenser, tuple[int, int, int]]:
    settings, shape = preset(arguments.preset), (3, arguments.side, arguments.side)
    network = convnet_for(shape, width=settings.width)
    built = preset_condenser(
        arguments.recipe, settings, factor=2, ipc=arguments.ipc, network=network
    )
    numbers = {"outer": arguments.outer, "inner": arguments.inner}
    return replace(built, compile=arguments.compile, **numbers), shape


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as a table."""
    first = statistics.median(rows[0]["seconds"])
    known: dict[int, str] = {}
    lines = []
    for row in rows:
        seconds = statistics.median(row["seconds"])
        alike = statistics.median(row["network_seconds"])
        digest = known.setdefault(row["threads"], row["digest"])
        lines.append(
            (
                str(row["ranks"]),
                str(row["threads"]),
                f"{seconds:.2f}",
                f"{alike:.2f}",
                f"{first / seconds:.2f}",
                "yes" if row["digest"] == digest else "no",
            )
        )
    return (
        (
            "ranks",
            "threads of each",
            "seconds",
            "of them in the network's training",
            "times as fast",
            "same bytes",
        ),
        lines,
    )


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command_line(
            Arguments, main, module="benchmarks.ranks", description=__doc__, argv=argv
        )
    found = work(tyro.cli(Arguments, args=argv))
    if is_first():
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli())
