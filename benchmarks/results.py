"""What a benchmark has measured: one JSON line per result, so that a stopped run can go on."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dc_replay.errors import ArgumentError

Row = dict[str, Any]

_PACKAGES = ("torchvision", "avalanche-lib", "dc_replay")


class ResultStore:
    """The results under one output folder, ``results.jsonl``, and the settings they belong to.

    Rows are only ever appended. A row that a killed run left half written is dropped when read
    and overwritten by the next one.

    Args:
        out_dir: The output folder; made when the first thing is written.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self.out_dir = Path(out_dir).expanduser()
        self.path = self.out_dir / "results.jsonl"
        self.settings_path = self.out_dir / "settings.json"

    def rows(self) -> list[Row]:
        """Read all complete rows, oldest first.

        Raises:
            ArgumentError: If a line other than the last is no JSON object.
        """
        return self._read()[0]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on disk when this returns.

        Tensors and NumPy values of one element become numbers, paths text, and NaN and infinities
        null.

        Raises:
            ArgumentError: If a value has no JSON form, or the file is damaged.
        """
        line = _dumps(_plain(row, "row")).encode() + b"\n"
        _, whole, ended = self._read()
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(whole)
            file.write(line if ended else b"\n" + line)
            file.flush()
            os.fsync(file.fileno())

    def find(self, method: str, seed: int, **key: Any) -> Row | None:
        """Return the newest row of this method and seed whose other fields equal ``key``."""
        wanted = _plain({"method": method, "seed": seed, **key}, "key")
        for row in reversed(self.rows()):
            if all(field in row and row[field] == value for field, value in wanted.items()):
                return row
        return None

    def finished(self, method: str, seed: int, **key: Any) -> bool:
        """Whether there is a row of this method and seed whose other fields equal ``key``."""
        return self.find(method, seed, **key) is not None

    def settings(self) -> Row:
        """The settings that the rows were measured under; empty before the first `claim`."""
        return dict(self._read_settings().get("settings", {}))

    def commands(self) -> list[str]:
        """The different commands that have added to this folder, oldest first."""
        return list(self._read_settings().get("commands", []))

    def claim(self, settings: Mapping[str, Any], *, command: str | None = None) -> None:
        """Tie the folder to ``settings``, or make sure that it is already tied to the same.

        Leave out of ``settings`` what may differ between the runs that share a folder, such as
        which methods and seeds to run.

        Args:
            settings: Everything that must not differ between rows that are compared.
            command: The command line of this run, kept for the report.

        Raises:
            ArgumentError: If the folder holds results of other settings; the message names them.
        """
        settings = _plain(settings, "settings")
        known = self._read_settings()
        if "settings" not in known and self.rows():
            raise ArgumentError(
                f"`out` is {str(self.out_dir)!r}, which has results but no "
                f"{self.settings_path.name} to tell how they were made; choose another folder"
            )
        before = known.get("settings", settings)
        different = [
            f"{name} was {_shown(before, name)} and is now {_shown(settings, name)}"
            for name in dict.fromkeys((*before, *settings))
            if (name in before) != (name in settings) or before.get(name) != settings.get(name)
        ]
        if different:
            raise ArgumentError(
                f"`out` is {str(self.out_dir)!r}, which holds results of other settings: "
                f"{'; '.join(different)}. Choose another folder, or the settings of before"
            )
        commands = list(known.get("commands", []))
        if command is not None and command not in commands:
            commands.append(command)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        partial = self.settings_path.with_suffix(".partial")
        partial.write_text(_dumps({"settings": settings, "commands": commands}, indent=2) + "\n")
        os.replace(partial, self.settings_path)

    def _read(self) -> tuple[list[Row], int, bool]:
        """Return the complete rows, the bytes they take, and whether a line break ends them."""
        rows: list[Row] = []
        whole, ended = 0, True
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is None and number == len(lines):
                break
            if row is None:
                raise ArgumentError(
                    f"{str(self.path)!r} is damaged: line {number} of {len(lines)} is no JSON "
                    "object; remove that line to have its result computed again"
                )
            rows.append(row)
            whole += len(line)
            ended = line.endswith(b"\n")
        return rows, whole, ended

    def _read_settings(self) -> Row:
        if not self.settings_path.exists():
            return {}
        known = _parsed(self.settings_path.read_bytes())
        if known is None or not isinstance(known.get("settings"), dict):
            raise ArgumentError(
                f"{str(self.settings_path)!r} is damaged: it holds no settings; "
                "choose another output folder"
            )
        return known


def environment(device: torch.device | str = "cpu") -> Row:
    """Describe where results come from, as the row fields ``device``, ``commit``, ``versions``.

    ``commit`` is the short hash of the source's git commit, followed by ``-dirty`` when tracked
    files other than committed results differ from it, or ``unknown`` outside a git repository.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions.update((package, _version(package)) for package in _PACKAGES)
    return {"device": _device_name(torch.device(device)), "commit": _commit(), "versions": versions}


def write_figures(
    folder: Path,
    benchmark: str,
    rows: Sequence[Row],
    *,
    command: str,
    settings: Row,
    device: torch.device | str,
) -> None:
    """Write measured figures, and where they come from, to ``results.json`` in a folder.

    Args:
        folder: Made if it is not there.
        benchmark: What measured them.
        rows: The figures.
        command: How it was called.
        settings: Its options.
        device: Where it ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "benchmark": benchmark,
        "command": command,
        "settings": settings,
        **environment(device),
        "rows": rows,
    }
    text = _dumps(_plain(found, "figures"), indent=1)
    (folder / "results.json").write_text(text + "\n")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        # A campaign that is started again has written results itself.
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(exclude)results")
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def _plain(value: Any, where: str) -> Any:
    """Turn ``value`` into what JSON gives back after a round trip."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if getattr(value, "shape", None) == ():
        return _plain(value.item(), where)
    raise ArgumentError(
        f"`{where}` is a {type(value).__name__}, which has no JSON form; "
        "use numbers, text, lists and dicts"
    )


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, allow_nan=False)


def _parsed(line: bytes) -> Row | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"
