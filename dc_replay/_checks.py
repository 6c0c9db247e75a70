"""What numbers and paths may be, checked without torch, whose import takes seconds."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from dc_replay.errors import ArgumentError

# From here on single precision, in which torch holds numbers, rounds to infinity.
_INFINITE = 2.0**128 - 2.0**103
# And below this it has but few digits, or rounds to 0.
_LEAST = 2.0**-126


def integer(value: Any) -> int:
    """``value`` as an int; -1, below every bound here, if it is none or needs more than 64 bits."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1
    return number if number < 2**63 else -1


def real(value: Any) -> float:
    """``value`` as a float; NaN, which is within no bounds, if it is no real number."""
    usable = isinstance(value, Real) or getattr(value, "ndim", None) == 0
    try:
        return float(value) if usable and not isinstance(value, bool) else math.nan
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return math.nan


def reals(values: Any) -> tuple[float, ...]:
    """Each of the values by :func:`real`; none if they are no sequence."""
    if isinstance(values, (str, bytes, Mapping)):
        return ()
    try:
        return tuple(map(real, values))
    except TypeError:
        return ()


def whole(name: str, value: Any) -> int:
    """``value`` as an int of at least 1, or an ArgumentError that calls it ``name``."""
    number = integer(value)
    if number < 1:
        # Python does not print numbers of thousands of digits.
        long = isinstance(value, int) and abs(value) >= 2**63
        found = "of more than 64 bits" if long else repr(value)
        raise ArgumentError(f"`{name}` is {found}; pass a whole number of at least 1")
    return number


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> None:
    """Raise an ArgumentError that calls it ``name`` unless ``value`` is finite and in bounds.

    Args:
        name: The argument.
        value: What was passed for it.
        low: The least that it may be; with ``above`` it must be more.
        high: The most that it may be.
        above: As above.
    """
    found = real(value)
    inside = low < found if above else low <= found
    if inside and found <= high and found < _INFINITE:
        return
    if high < math.inf:
        bounds = f"a number from {low:g} to {high:g}"
    else:
        bounds = f"a finite number {'above' if above else 'of at least'} {low:g}"
    raise ArgumentError(f"`{name}` is {value!r}; pass {bounds}")


def path_of(name: str, path: Any) -> Path:
    """``path`` as a Path, or an ArgumentError that calls it ``name`` if no file can have it."""
    try:
        found = Path(path)
        usable = b"\0" not in os.fsencode(found)
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise ArgumentError(
            f"`{name}` is {path!r}, which cannot name a file; pass a str or a pathlib.Path"
        )
    return found


def check_factor(factor: object) -> int:
    """``factor`` as an int, or an ArgumentError unless it is a whole number of at least 1."""
    number = integer(factor)
    if number < 1:
        raise ArgumentError(
            f"`factor` must be a whole number of at least 1, but is {factor!r}; "
            f"1 stores images as they are, 2 packs four into each stored image"
        )
    return number


def check_compression(compression: object) -> int:
    """``compression`` as an int, or an ArgumentError unless it is a whole number from 1 to 256."""
    number = integer(compression)
    if number not in range(1, 257):
        raise ArgumentError(
            f"`compression` must be a whole number from 1 to 256, but is {compression!r}; "
            f"1 stores images as they are, 10 fits ten into the bytes of one"
        )
    return number


def check_crops(factor: int, height: int, width: int) -> None:
    """Raise an ArgumentError if the factor would put whole crops outside of such images."""
    if not height or not width:
        raise ArgumentError(f"`images` are of {height}x{width} pixels; pass images that have some")
    if not all(_fits(factor, side) for side in (height, width)):
        smaller = range(min(factor - 1, height, width), 0, -1)
        best = next(f for f in smaller if _fits(f, height) and _fits(f, width))
        raise ArgumentError(
            f"`factor` is {factor}, which leaves whole crops outside of images of "
            f"{height}x{width} pixels; use a factor that fits, such as {best}"
        )


def checked_scale(
    mean: Iterable[float], std: Iterable[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``mean`` and ``std`` as floats, or an ArgumentError if images cannot be normalised by them.

    Raises:
        ArgumentError: If the two differ in length, or hold anything but finite numbers, or a
            deviation is not positive.
    """
    means, deviations = reals(mean), reals(std)
    if not means or len(means) != len(deviations):
        raise ArgumentError(
            f"`mean` and `std` must hold one value per channel each, but they hold "
            f"{len(means)} and {len(deviations)}; pass two sequences of equal length"
        )
    finite = all(abs(value) < _INFINITE for value in means + deviations)
    if not finite or min(deviations) < _LEAST:
        raise ArgumentError(
            f"`mean` and `std` must be finite and `std` positive in single precision, but got mean "
            f"{means} and std {deviations}; a channel that never varies takes a std of 1"
        )
    return means, deviations


def _fits(factor: int, side: int) -> bool:
    """Whether the last crop along a side begins inside of it."""
    return (factor - 1) * -(-side // factor) < side
