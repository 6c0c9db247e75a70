"""Progress bars that can be read in a log file, too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm as bar_here
from tqdm.std import tqdm

LOG_SECONDS = 30.0
"""Time between two lines of a log."""


class Lines(tqdm):  # type: ignore[type-arg]
    """A bar that writes a line now and then, where it cannot draw over the last one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # What ends sooner writes nothing at all.
        super().__init__(
            *args, **{**options, "mininterval": LOG_SECONDS, "miniters": 1, "delay": LOG_SECONDS}
        )

    def close(self) -> None:
        """End with a last line, without the line break that a bar needs."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]
        if self.leave and self.last_print_t >= self.start_t + LOG_SECONDS:
            self.display()

    def moveto(self, n: int) -> None:
        """Stay: lines are not drawn over."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Write each state on a line of its own, unless nothing has moved."""
        last = ""

        def write(state: str) -> None:
            nonlocal last
            now = state.strip().partition(" [")[0]
            if now and now != last:
                last = now
                file.write(f"{state.strip()}\n")
                file.flush()

        return write


def progress(*args: Any, **options: Any) -> tqdm[Any]:
    """A progress bar for where standard error goes: a terminal, a notebook or a log.

    Args:
        args: As tqdm takes them.
        options: Likewise.
    """
    notebook = not issubclass(bar_here, tqdm) or "ipykernel" in sys.modules
    terminal = getattr(sys.stderr, "isatty", bool)()
    # None leaves a bar away where there is no terminal, which a log can now do without.
    if options.get("disable", False) is None:
        options["disable"] = False
    kind: type[tqdm[Any]] = bar_here if terminal or notebook else Lines
    return kind(*args, **options)
