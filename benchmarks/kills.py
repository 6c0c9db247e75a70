"""That a process which is killed at any moment goes on, and ends with the same bytes.

    python -m benchmarks.kills --kills 50 --out runs/kills

A process condenses a stream of experiences into a memory file, and is killed by SIGKILL at random
moments of its life, from its first import to its end. It is started again until it finishes, and
its memory files are compared with those of a process that nobody disturbed. That is repeated until
there are enough kills. States are written after every matching network, which is more often than
the package does it, so that a process of seconds has as many as one of hours. Writes
``results.json``; ends with 1 where a file differs or a process cannot go on. On Linux and macOS.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.killed import PHASES, STARTING, Task
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.workload import Missed, Place, at_least_1, child_environment, command_line
from dc_replay._progress import progress
from dc_replay.errors import ArgumentError, DCReplayError


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Kill a condensation again and again, and compare what it ends with.

    Attributes:
        kills: Kills of a process that was alive, in all runs together.
        method: A recipe that optimises, to which others are added as in dream_plus+mdc+sm.
        experiences: Experiences of the stream, of 3 classes each.
        outer: Matching networks of an experience.
        inner: Pixel steps with each.
        avalanche: Train an Avalanche strategy with the plugin and compare its weights as well, in
            place of condensing alone. It takes several times as long to import.
        as_shipped: Write states as rarely as the package does, at most a hundredth of the time.
        seed: Images, condensing and the moments follow from it.
        out: Output folder.
    """

    kills: int = 50
    method: str = "dream_plus+mdc+sm"
    experiences: int = 3
    outer: int = 20
    inner: int = 2
    avalanche: bool = False
    as_shipped: bool = False
    seed: int = 0
    out: Path = Path("runs/kills")


def main(arguments: Arguments, command: str) -> str:
    """Kill, write ``results.json``, and return the table for the terminal.

    Raises:
        DCReplayError: If an argument cannot be used, or the undisturbed process fails.
        Missed: If a file differs, or a process cannot go on.
    """
    for name in ("kills", "experiences", "outer", "inner"):
        at_least_1(name, getattr(arguments, name))
    if arguments.seed < 0:
        raise ArgumentError(f"`seed` is {arguments.seed}, but must be at least 0")
    states = arguments.out / "states"
    task = _task(arguments, states / "undisturbed")
    if task.condenser().objective is None:
        raise ArgumentError(
            f"`method` is {arguments.method!r}, which optimises nothing that could be interrupted; "
            f"use a recipe with an objective, for example dream_plus"
        )
    shutil.rmtree(states, ignore_errors=True)
    whole = live(task, None).seconds
    chance = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    left, problem = arguments.kills, None
    with progress(total=left, desc="kills", unit="kill", disable=None) as bar:
        while left and problem is None:
            again = replace(task, folder=str(states / f"run-{len(rows)}"))
            row = one_run(again, chance, whole, most=left)
            problem = row["problem"]
            identical = problem is None and same(task, again)
            rows.append({"run": len(rows), **row, "identical": identical})
            left -= len(row["kills"])
            bar.update(len(row["kills"]))
            write_figures(
                arguments.out,
                "kills",
                [{**row, "undisturbed_seconds": whole} for row in rows],
                command=command,
                settings=asdict(arguments),
                device=arguments.chosen_device(),
            )
    if problem is not None:
        raise Missed(f"run {rows[-1]['run']} could not go on: {problem}; see {states}")
    different = [str(row["run"]) for row in rows if not row["identical"]]
    if different:
        raise Missed(
            f"the files of run {', '.join(different)} differ from those of the undisturbed "
            f"process; all are under {states}"
        )
    killed = sum(len(row["kills"]) for row in rows)
    return (
        f"{text_table(*cells(rows))}\n\n{killed} kills in {len(rows)} runs, each of which ended "
        f"with the bytes of the undisturbed one"
    )


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """In which phase the kills hit, as a table."""
    kills = [(kill, row["identical"]) for row in rows for kill in row["kills"]]
    lines = []
    for name, phases in [*((phase, (phase,)) for phase in PHASES), ("all", PHASES)]:
        chosen = [(kill, same) for kill, same in kills if kill["phase"] in phases]
        within = sum(kill["within_a_write"] for kill, _ in chosen)
        identical = sum(same for _, same in chosen)
        lines.append((name, str(len(chosen)), str(within), str(identical)))
    return ("killed while", "kills", "within a write", "same bytes in the end"), lines


@dataclass(frozen=True)
class Life:
    """How a process ended.

    Attributes:
        seconds: From its start to its end.
        phase: What it had begun last.
        killed: Whether it was killed, and did not end by itself.
    """

    seconds: float
    phase: str
    killed: bool


def live(task: Task, moment: float | None) -> Life:
    """Start a process, and kill it after some seconds unless it ended by itself.

    Raises:
        DCReplayError: If it failed.
    """
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "stderr.txt", "w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.killed", json.dumps(asdict(task))],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=child_environment(),
        ) as process,
    ):
        began = time.perf_counter()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment)
        finally:
            process.kill()  # does nothing to one that has ended
        said = process.communicate()[0].split()
        seconds = time.perf_counter() - began
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
    killed = process.returncode == -signal.SIGKILL
    if process.returncode and not (killed and moment is not None):
        raise DCReplayError(
            f"the process that condenses ended with {process.returncode}: "
            f"{''.join(last) or 'it said nothing'}"
        )
    return Life(seconds, said[-1] if said else STARTING, killed)


def one_run(task: Task, chance: random.Random, whole: float, *, most: int) -> dict[str, Any]:
    """Start a process again and again until it has finished.

    Args:
        task: What it does, in a folder that is not there.
        chance: When it is killed.
        whole: Seconds that it lives if it is not.
        most: Kills after which it is left alone.

    Returns:
        The kills, the seconds of all processes together, and what prevented one from going on.
    """
    folder = Path(task.folder)
    kills: list[dict[str, Any]] = []
    seconds, problem = 0.0, None
    while True:
        unfinished = _unfinished(folder)
        moment = chance.uniform(0, whole) if len(kills) < most else None
        try:
            life = live(task, moment)
        except DCReplayError as error:
            problem = str(error)
            break
        seconds += life.seconds
        if not life.killed:
            break
        left = _unfinished(folder) - unfinished
        kills.append({"moment": moment, "phase": life.phase, "within_a_write": bool(left)})
    return {"kills": kills, "seconds": seconds, "problem": problem}


def same(task: Task, again: Task) -> bool:
    """Whether two tasks have written the same memories, and models if there are any."""

    def written(task: Task) -> dict[str, bytes]:
        steps = range(task.experiences)
        files = [task.memory_file(step) for step in steps]
        if task.avalanche:
            files += [task.model_file(step) for step in steps]
        return {file.name: file.read_bytes() for file in files}

    return written(task) == written(again)


def _task(arguments: Arguments, folder: Path) -> Task:
    return Task(
        folder=str(folder.resolve()),
        method=arguments.method,
        experiences=arguments.experiences,
        outer=arguments.outer,
        inner=arguments.inner,
        seed=arguments.seed,
        device=str(arguments.chosen_device()),
        avalanche=arguments.avalanche,
        as_shipped=arguments.as_shipped,
    )


def _unfinished(folder: Path) -> set[Path]:
    """Files that a process was writing when it was killed."""
    return set(folder.rglob(".*.tmp"))


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(Arguments, main, module="benchmarks.kills", description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(cli())
