"""The errors that this package raises on purpose."""

from typing import Any


class DCReplayError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(DCReplayError, ValueError):
    """An argument cannot be used; the message names it, what was found and the way out."""


class MemoryFileError(DCReplayError, ValueError):
    """A memory file cannot be read; nothing of it was used."""


class DivergedError(DCReplayError):
    """A condensation left the range of numbers; the message names the iteration and the class.

    Attributes:
        condensed: What it had reached before, a :class:`~dc_replay.condense.Condensed` with the
            exemplars as they were after the last matching network whose steps were all finite; None
            if already the first diverged, or the error does not come from a condenser.
    """

    condensed: Any = None
