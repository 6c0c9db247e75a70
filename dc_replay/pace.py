"""How far a condensation is: by its steps, or by the clock."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from dc_replay._checks import real
from dc_replay.checkpoints import Snapshot
from dc_replay.distributed import SINGLE, Ranks
from dc_replay.errors import ArgumentError


class Pace(Protocol):
    """Says when to stop, and how much is done by now."""

    @property
    def share(self) -> float:
        """What is done, from 0 to 1."""
        ...

    @property
    def over(self) -> bool:
        """Whether to stop."""
        ...

    @property
    def total(self) -> float:
        """What a progress bar counts up to."""
        ...

    @property
    def unit(self) -> str:
        """What it counts."""
        ...

    def advance(self) -> None:
        """Take note of a finished inner iteration."""
        ...

    def state(self) -> Snapshot:
        """All that changes."""
        ...

    def restore(self, state: Snapshot) -> None:
        """Go back to where :meth:`state` was taken."""
        ...


class BySteps:
    """Ends after a number of inner iterations.

    Args:
        steps: How many, at least 1.
    """

    unit = "step"

    def __init__(self, steps: int) -> None:
        self.total: float = steps
        self.done = 0

    @property
    def share(self) -> float:
        """What is done, from 0 to 1."""
        return self.done / self.total

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self.done >= self.total

    def advance(self) -> None:
        """Take note of a finished inner iteration."""
        self.done += 1

    def state(self) -> Snapshot:
        """All that changes."""
        return Snapshot(values={"done": self.done})

    def restore(self, state: Snapshot) -> None:
        """Go back to where :meth:`state` was taken."""
        self.done = state.values["done"]


class ByClock:
    """Ends when another inner iteration would take longer than there is time left.

    The clock starts here. One iteration always fits. Of several processes the slowest one's clock
    counts, so that all stop after the same iteration.

    Args:
        seconds: The time there is, above 0.
        device: Where the work is done, which may lag behind the calls that ask for it.
        ranks: The processes that do it.
    """

    unit = "s"

    def __init__(self, seconds: float, device: torch.device, ranks: Ranks = SINGLE) -> None:
        check_seconds(seconds)
        self.total = seconds
        self._device = device
        self._ranks = ranks
        self._began = self._last = time.perf_counter()
        self._longest: float | None = None
        self._passed = 0.0

    @property
    def share(self) -> float:
        """What is done, from 0 to 1."""
        return min(1.0, self._passed / self.total)

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self._longest is not None and self._passed + self._longest > self.total

    def advance(self) -> None:
        """Take note of a finished inner iteration."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        # The first includes what comes once: a compiler, the choice of the initial images.
        longest = 0.0 if self._longest is None else max(self._longest, now - self._last)
        self._last = now
        self._longest, self._passed = self._ranks.largest([longest, now - self._began])

    def state(self) -> Snapshot:
        """The time that has passed, and the longest iteration."""
        return Snapshot(values={"passed": self._passed, "longest": self._longest})

    def restore(self, state: Snapshot) -> None:
        """Count the time that had passed by then, too."""
        self._longest = state.values["longest"]
        self._began = time.perf_counter() - state.values["passed"]
        self._last, self._passed = time.perf_counter(), state.values["passed"]


def check_seconds(seconds: float) -> None:
    """Raise an ArgumentError if a time budget is not above 0 and finite."""
    if not 0 < real(seconds) < float("inf"):
        raise ArgumentError(
            f"`seconds` is {seconds}, but a time budget must be above 0; leave it None to take "
            f"`outer` times `inner` steps"
        )
