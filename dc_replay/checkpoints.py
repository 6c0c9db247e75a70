"""Where an interrupted condensation goes on: a file that is always whole, checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dc_replay._checks import path_of
from dc_replay._writing import remove_unfinished, write_whole
from dc_replay.distributed import SINGLE, Ranks
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.identity import identity

FORMAT = "dc-replay-condensation"
FORMAT_VERSION = "2"

SHARE = 0.01
"""At most this share of the time goes into writing."""

_SECONDS = "seconds"


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a condensation between two matching networks.

    Attributes:
        tensors: By name.
        values: What JSON can hold, by name.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Snapshot:
        """What was put there by :func:`joined`."""
        start = f"{name}."
        return Snapshot(
            {key[len(start) :]: t for key, t in self.tensors.items() if key.startswith(start)},
            {key[len(start) :]: v for key, v in self.values.items() if key.startswith(start)},
        )


def joined(parts: Mapping[str, Snapshot]) -> Snapshot:
    """One snapshot of several, each under a name."""
    return Snapshot(
        {f"{name}.{key}": t for name, part in parts.items() for key, t in part.tensors.items()},
        {f"{name}.{key}": v for name, part in parts.items() for key, v in part.values.items()},
    )


class Checkpoint:
    """A file with the state of one condensation, which one condensation at a time may use.

    It is written in one step, so that whoever is killed meanwhile leaves the state before. Nothing
    in it is executed when it is read. Of several processes the first reads and writes it, and what
    it finds is what all of them get.

    Args:
        path: The file.
        fingerprint: Of everything that the result follows from; see :func:`fingerprint`.
        ranks: The processes that condense together.

    Attributes:
        seconds_before: Once a state was loaded, how long the processes that led to it had worked.

    Raises:
        ArgumentError: If the folder does not exist, or ``path`` is no path.
    """

    def __init__(
        self, path: str | os.PathLike[str], fingerprint: str, ranks: Ranks = SINGLE
    ) -> None:
        self.path = path_of("checkpoint", path)
        self.fingerprint = fingerprint
        self._ranks = ranks
        ranks.by_first(self._prepare)
        self.seconds_before = 0.0
        self._opened = self._last = time.perf_counter()
        self._cost = 0.0
        self._failed = False

    def load(self, device: torch.device) -> Snapshot | None:
        """What was written, with tensors on a device; None if nothing was.

        Raises:
            ArgumentError: If the file is damaged, or belongs to another condensation.
        """
        found = self._ranks.by_first(self._read)
        if found is None:
            return None
        tensors, values = found
        self.seconds_before = values.pop(_SECONDS, 0.0)
        # Generators keep their states on the CPU, whatever their device is.
        moved = {n: t if n.endswith("generator") else t.to(device) for n, t in tensors.items()}
        return Snapshot(moved, values)

    def _prepare(self) -> None:
        # Not Path.is_dir(), which raises for names that are too long.
        if not os.path.isdir(self.path.parent):
            raise ArgumentError(
                f"`checkpoint` is {str(self.path)!r}, whose folder does not exist; create it first"
            )
        remove_unfinished(self.path)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        try:
            if not self.path.exists():
                return None
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = json.loads(metadata.get("values", "null"))
        except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ArgumentError(
                f"`checkpoint` is {str(self.path)!r}, which cannot be read: {error}; delete it to "
                f"start anew"
            ) from error
        known = metadata.get("format"), metadata.get("version")
        if known != (FORMAT, FORMAT_VERSION) or not isinstance(values, dict):
            raise ArgumentError(
                f"`checkpoint` is {str(self.path)!r}, which is of format {known}, not "
                f"{(FORMAT, FORMAT_VERSION)}; delete it to start anew"
            )
        if metadata.get("fingerprint") != self.fingerprint:
            raise ArgumentError(
                f"`checkpoint` is {str(self.path)!r}, which belongs to another recipe, other "
                f"images, another seed or another version; delete it to start anew, or use another "
                f"folder"
            )
        if metadata.get("digest") != _digest(metadata["values"], tensors):
            raise ArgumentError(
                f"`checkpoint` is {str(self.path)!r}, which is damaged; delete it to start anew"
            )
        return tensors, values

    def save_if_due(self, state: Callable[[], Snapshot]) -> None:
        """Write the state, if writing takes no more than its share of the time since the last.

        Where it cannot be written a warning says so once, and the condensation goes on.
        """
        began = time.perf_counter()
        if self._ranks.as_first((began - self._last) * SHARE >= self._cost):
            self.try_to_save(state())
            self._cost = time.perf_counter() - began  # with what collecting it took

    def try_to_save(self, snapshot: Snapshot) -> None:
        """Write a state; where that fails, warn once."""
        try:
            self.save(snapshot)
        except DCReplayError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"the condensation goes on, but if it is interrupted it starts from an older "
                    f"state, or anew: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def save(self, snapshot: Snapshot) -> None:
        """Write a state, if this is the first process.

        Raises:
            DCReplayError: If it cannot be written; the file then holds what it held before.
        """
        if self._ranks.rank:
            return
        began = time.perf_counter()
        tensors = {name: t.detach().cpu().contiguous() for name, t in snapshot.tensors.items()}
        seconds = self.seconds_before + began - self._opened
        values = json.dumps({**snapshot.values, _SECONDS: seconds})
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "values": values,
            "digest": _digest(values, tensors),
        }
        write_whole(self.path, save(tensors, metadata), name="checkpoint")
        self._last = time.perf_counter()
        self._cost = self._last - began


def _digest(values: str, tensors: Mapping[str, Tensor]) -> str:
    """What tells whether a file holds what was written."""
    parts = (part for named in sorted(tensors.items()) for part in named)
    return fingerprint([values, *parts])


def fingerprint(parts: Iterable[object]) -> str:
    """A digest of what a result follows from.

    Args:
        parts: Each counts with its :func:`~dc_replay.identity.identity`.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(identity(part))
    return digest.hexdigest()
