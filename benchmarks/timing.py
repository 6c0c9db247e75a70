"""Measuring time and memory, and holding figures against thresholds."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.allocator import return_freed_memory
from dc_replay.apprentice import Apprentice
from dc_replay.optimisation import NetworkUpdate


def seconds(work: Callable[[], Any], device: torch.device, *, times: int = 1) -> float:
    """Seconds of one call, as the mean over some."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / times


def alternating(
    works: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    times: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each work in each round, one after the other within a round.

    So what slows the machine down for a while slows all of them down. Each is called once before
    anything is timed.
    """
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds(work, device, times=times))
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times as fast: the median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call takes at most above what was in use before it.

    Returns:
        On a GPU what its allocator gave out; on Linux the growth of the process, whose allocator
        may hold on to freed memory and so shows less; None where neither is known.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        return_freed_memory()
        reset.write_text("5")  # forgets the highest value so far
        before = _resident(status, "VmRSS")
        if _resident(status, "VmHWM") > before + _FORGOTTEN:
            return None
        work()
        return max(0, _resident(status, "VmHWM") - before)
    except OSError:
        return None


# Where the highest value is above the present one by more than this, it was not forgotten.
_FORGOTTEN = 2**20


def _resident(status: Path, name: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"{status} does not say {name}")


@dataclass(frozen=True)
class Stopwatch:
    """A network update that notes when it ends, which is when an inner iteration does.

    Attributes:
        update: What it stands for; None updates nothing.
        ends: The time at the end of each inner iteration.
    """

    update: NetworkUpdate | None
    ends: list[float] = field(default_factory=list)

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Update, and note the time."""
        if self.update is not None:
            self.update(apprentice, pixels)
        wait_for(apprentice.real.images.device)
        self.ends.append(time.perf_counter())

    def iterations(self, *, skip: int) -> list[float]:
        """Seconds of each inner iteration, without the first ``skip``."""
        ends = self.ends[skip:]
        return [after - before for before, after in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Threshold:
    """A figure that must not fall below, or rise above, a bound.

    Attributes:
        name: What it is.
        value: What was measured.
        least: Its lower bound; None is none.
        most: Its upper bound; None is none.
    """

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def failure(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        if self.least is not None and not self.value >= self.least:
            return f"{self.name} is {self.value:.3g}, below {self.least:g}"
        if self.most is not None and not self.value <= self.most:
            return f"{self.name} is {self.value:.3g}, above {self.most:g}"
        return None


def failures(thresholds: Sequence[Threshold]) -> list[str]:
    """One line for each threshold that is not met."""
    return [line for line in (threshold.failure for threshold in thresholds) if line is not None]
