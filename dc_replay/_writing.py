"""Writing files in one piece."""

from __future__ import annotations

import glob
import os
import secrets
from contextlib import suppress
from pathlib import Path

from dc_replay._checks import path_of
from dc_replay.errors import ArgumentError, DCReplayError


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what processes that were killed while they wrote a file have left beside it.

    Only where no other process can be writing it.
    """
    path = Path(path)
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], data: bytes, *, name: str) -> None:
    """Put data in place of what a file holds, in a single step.

    A reader sees the old file or the whole new one, never a part, also after a crash.

    Args:
        path: The file.
        data: What it is to hold.
        name: What the message of an error calls the path.

    Raises:
        ArgumentError: If the folder does not exist, or ``path`` is a folder or no path.
        DCReplayError: If writing fails, on a full disk for example.
    """
    path = path_of(name, path)
    # Not with_name(), which raises for an empty path.
    unfinished = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        if path.is_dir():
            raise ArgumentError(f"`{name}` is {path}, which is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ArgumentError(f"`{name}` is {path}, whose folder does not exist; create it first")
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise DCReplayError(
            f"`{name}`: {path} could not be written: {error.strerror or error}; what it held "
            f"before is still there"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
