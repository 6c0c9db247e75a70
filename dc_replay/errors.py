"""The errors that this package raises on purpose."""


class DCReplayError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(DCReplayError, ValueError):
    """An argument cannot be used; the message names it, what was found and the way out."""


class MemoryFileError(DCReplayError, ValueError):
    """A memory file cannot be read; nothing of it was used."""
