"""What the numbers in a memory file may be, checked without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Iterable

from dc_replay.errors import ArgumentError

# From here on single precision, in which torch holds numbers, rounds to infinity.
_INFINITE = 2.0**128 - 2.0**103


def check_factor(factor: object) -> None:
    """Raise an ArgumentError unless ``factor`` is a whole number of at least 1."""
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ArgumentError(
            f"`factor` must be a whole number of at least 1, but is {factor!r}; "
            f"1 stores images as they are, 2 packs four into each stored image"
        )


def check_crops(factor: int, height: int, width: int) -> None:
    """Raise an ArgumentError if the factor would put whole crops outside of such images."""
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
        ArgumentError: If the two differ in length, or a deviation is not positive and finite.
    """
    means, deviations = (tuple(float(value) for value in values) for values in (mean, std))
    if not means or len(means) != len(deviations):
        raise ArgumentError(
            f"`mean` and `std` must hold one value per channel each, but they hold "
            f"{len(means)} and {len(deviations)}; pass two sequences of equal length"
        )
    finite = all(abs(value) < _INFINITE for value in means + deviations)
    if not finite or min(deviations) <= 0:
        raise ArgumentError(
            f"`mean` and `std` must be finite and `std` positive, but got mean {means} "
            f"and std {deviations}; a channel that never varies takes a std of 1"
        )
    return means, deviations


def _fits(factor: int, side: int) -> bool:
    """Whether the last crop along a side begins inside of it."""
    return (factor - 1) * -(-side // factor) < side
