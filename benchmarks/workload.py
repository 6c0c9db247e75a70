"""What the benchmarks' command lines share: the data, how much work to do, and where."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro

from benchmarks.data import ImageData, class_order, hold_out, keep_classes, load
from benchmarks.presets import Preset, preset
from benchmarks.results import Row
from dc_replay.compilation import CompileMode
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.networks import Precision


class Missed(Exception):
    """A figure that a gate asked for was not reached."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a benchmark runs and writes.

    Attributes:
        out: Output folder.
        device: Where to run; the GPU where there is one.
    """

    out: Path = Path("runs/benchmark")
    device: str | None = None

    def chosen_device(self) -> torch.device:
        """The device, or an ArgumentError if it is not here."""
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(
                f"`device` is {self.device!r}, which is not here: {str(error).splitlines()[0]}; "
                f"use cpu, or cuda where there is a GPU"
            ) from None
        return device


@dataclass(frozen=True, kw_only=True)
class Workload(Place):
    """Options that all benchmarks which learn from images take.

    Attributes:
        data: digits, cifar10, cifar100, svhn, mnist, fashion, npz:PATH or folder:PATH.
        preset: How much work to do: seconds, minutes on a CPU, or the published settings.
        seeds: Seeds, separated by commas.
        order: Order of classes: shuffled by the seed, or the published one for CIFAR-100.
        classes: Use only the first classes of the order.
        factor: Crops along each side of a stored image, for recipes that pack.
        width: Overrides the preset's channels of ConvNets.
        outer: Overrides the preset's matching networks.
        inner: Overrides the preset's pixel steps for each matching network.
        holdout: Training images of each class that are left out and tested on in place of the test
            images, for choosing settings.
        root: Where downloaded data are, or go.
        compile: Whether to compile what repeats.
        precision: What convolutions compute in, of the network that condenses and of the one that
            is trained; auto takes bfloat16 where the device multiplies it natively.
        quiet: Show no progress bars.
    """

    data: str = "digits"
    preset: str = "fast"
    seeds: str = "0"
    order: Literal["shuffled", "idc"] = "shuffled"
    classes: int | None = None
    factor: int = 2
    width: int | None = None
    outer: int | None = None
    inner: int | None = None
    holdout: int | None = None
    root: Path = Path("data")
    compile: Literal["auto", "always", "never"] = "auto"
    precision: Precision = "auto"
    quiet: bool = False

    def settings(self, chosen: Preset, *, free: tuple[str, ...] = (), **known: object) -> Row:
        """What must not differ between rows that are compared.

        Args:
            chosen: The preset with what overrides it, whose fields are part of them.
            free: Options of one benchmark that may differ, besides those of all.
            known: Options whose value follows from others, in place of what was given.
        """
        arguments = asdict(self)
        for name in ("seeds", "out", "quiet", "root", "device", "compile", *free):
            del arguments[name]
        return {**arguments, **asdict(chosen), **known}

    def chosen_preset(self, *options: str, **renamed: str) -> Preset:
        """The preset, overridden by options where they are given.

        Args:
            options: Options that are called like the preset's fields.
            renamed: For other options, the field that each overrides.

        Raises:
            ArgumentError: If there is no such preset, or a number is below 1.
        """
        fields = dict(zip(options, options, strict=True)) | renamed
        given = self.counts(*fields)
        return replace(preset(self.preset), **{fields[name]: n for name, n in given.items()})

    def counts(self, *options: str) -> dict[str, int]:
        """Those of the options that are given, or an ArgumentError if one is below 1."""
        given = {name: getattr(self, name) for name in options if getattr(self, name) is not None}
        for name, value in given.items():
            at_least_1(name, value)
        return given

    def chosen_seeds(self) -> list[int]:
        """The seeds as numbers."""
        return numbers("seeds", self.seeds)

    def compile_mode(self) -> CompileMode:
        """The option as the package takes it."""
        modes: dict[str, CompileMode] = {"auto": "auto", "always": True, "never": False}
        return modes[self.compile]

    def load(self) -> ImageData:
        """All images of the source, those to be tested on held out where that is asked for."""
        data = load(self.data, root=self.root)
        return data if self.holdout is None else hold_out(data, self.holdout)

    def in_order(self, data: ImageData, *, seed: int) -> ImageData:
        """The images of the chosen classes, numbered in the order that belongs to a seed."""
        classes = data.classes if self.classes is None else self.classes
        return keep_classes(data, class_order(data, self.order, seed=seed, classes=classes))


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers that an option lists, or an ArgumentError that calls it ``name``."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ArgumentError(
            f"`{name}` is {text!r}, but must be whole numbers separated by commas, such as 0,1,2"
        ) from None


def names(name: str, text: str) -> list[str]:
    """What an option lists, each once, or an ArgumentError if that is nothing."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ArgumentError(f"`{name}` is {text!r}; name at least one, separated by commas")
    return list(dict.fromkeys(found))


def at_least_1(name: str, value: int) -> None:
    """Raise an ArgumentError that calls the value ``name`` unless it is."""
    if value < 1:
        raise ArgumentError(f"`{name}` is {value}, but must be at least 1")


def child_environment() -> dict[str, str]:
    """The environment of a process that imports this copy of the project."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


Options = TypeVar("Options", bound=Place)


def command_line(
    options: type[Options],
    run: Callable[[Options, str], str],
    *,
    module: str,
    description: str | None,
    argv: Sequence[str] | None,
) -> int:
    """Run a benchmark from the command line, print its table, and return the exit code.

    Args:
        options: The dataclass of its options.
        run: Takes them and the command, writes the outputs, and returns the table.
        module: The name to run it by, for the report.
        description: What ``--help`` says.
        argv: Arguments; None takes those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = tyro.cli(options, args=list(argv), description=description)
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        print(run(arguments, shlex.join(["python", "-m", module, *argv])))
    except DCReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Missed as error:
        print(f"missed: {error}", file=sys.stderr)
        return 1
    print(f"\nplots and report: {arguments.out}")
    return 0
