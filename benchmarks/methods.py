"""Methods as a command line names them: a recipe, and what is added to it.

``dream_plus+mdc`` is DREAM+ with multisize condensation; ``idc+sm=0.3`` is IDC with subset matching
of weight 0.3; ``herding+compress=10`` fits ten images into the bytes of one. To add a modifier,
write a function from a condenser and its value, and name it here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.presets import PRESETS, Preset, condenser
from dc_replay import RECIPES, Condenser, Multisize, SubsetMatching
from dc_replay.errors import ArgumentError
from dc_replay.networks import NetworkFactory
from dc_replay.objectives import BidirectionalMatching
from dc_replay.sampling import Representative
from dc_replay.selection import ClusterCentres


def _subset_matching(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    weight = settings.subset_weight if value is None else value
    return replace(built, subsets=SubsetMatching(weight=weight))


def _multisize(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    period = settings.multisize_period if value is None else value
    multisize = Multisize(period=_whole(period), proportional=settings.multisize_proportional)
    return replace(built, multisize=multisize)


def _representative(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    if value is None:
        value = min(128, settings.real_batch or 128)
    return replace(built, sampler=Representative(_whole(value)))


def _initialised(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    return replace(built, selection=ClusterCentres())


def _bidirectional(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    # Its networks train for an epoch before they match, which the published component includes.
    return replace(built, objective=BidirectionalMatching(), warm_up=1)


def _compress(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    compression = 10 if value is None else _whole(value)
    return replace(built, formation=replace(built.formation, compression=compression))


def _factor(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    factor = 1 if value is None else _whole(value)
    return replace(built, formation=replace(built.formation, factor=factor))


def _rate(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    return replace(built, pixels=replace(built.pixels, lr=_given(value), normalised=False))


def _final(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    return replace(built, pixels=replace(built.pixels, final=_given(value)))


def _outer(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    return replace(built, outer=_whole(_given(value)))


def _inner(built: Condenser, settings: Preset, value: float | None) -> Condenser:
    return replace(built, inner=_whole(_given(value)))


def _given(value: float | None) -> float:
    if value is None:
        raise ArgumentError("it needs a value, after an equals sign")
    return value


def _whole(value: float) -> int:
    if value != int(value):
        raise ArgumentError(f"its value is {value}, but must be a whole number")
    return int(value)


MODIFIERS: dict[str, Callable[[Condenser, Preset, float | None], Condenser]] = {
    "sm": _subset_matching,
    "mdc": _multisize,
    "representative": _representative,
    "init": _initialised,
    "bidirectional": _bidirectional,
    "compress": _compress,
    "factor": _factor,
    "lr": _rate,
    "final": _final,
    "outer": _outer,
    "inner": _inner,
}
"""Subset matching and its weight, multisize condensation and its period, DREAM+'s components, the
images that share the bytes of one, the crops along its sides, the learning rate of pixels in
[0, 1] and the share of it that is left at the end, the number of matching networks, and that of
pixel steps with each."""

_TAKES_VALUE = (
    "sm",
    "mdc",
    "representative",
    "compress",
    "factor",
    "lr",
    "final",
    "outer",
    "inner",
)
_FOR_ALL = ("compress", "factor")


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        name: As it was given.
        recipe: The recipe that it starts from.
        modifiers: What is added, in order, each with its value or None.
    """

    name: str
    recipe: str
    modifiers: tuple[tuple[str, float | None], ...] = ()

    def condenser(
        self, settings: Preset, *, factor: int, ipc: int, network: NetworkFactory
    ) -> Condenser:
        """Build it the way a preset has it; see :func:`~benchmarks.presets.condenser`."""
        built = condenser(self.recipe, settings, factor=factor, ipc=ipc, network=network)
        for modifier, value in self.modifiers:
            built = MODIFIERS[modifier](built, settings, value)
        return replace(built, name=self.name)

    def without(self, *modifiers: str) -> str:
        """The name that is left without some modifiers."""
        added = self.name.split("+")[1:]
        kept = [text for text in added if text.partition("=")[0] not in modifiers]
        return "+".join((self.recipe, *kept))


def method(name: str, *, argument: str = "methods") -> Method:
    """Read a method's name.

    Args:
        name: The name.
        argument: The option that it comes from, for the message of an error.

    Raises:
        ArgumentError: If the recipe, a modifier or its value is unknown, or the recipe optimises
            nothing, so that nothing can be added to it.
    """
    recipe, *added = name.split("+")
    if recipe not in RECIPES:
        raise ArgumentError(
            f"`{argument}` names {name!r}, but the known recipes are {', '.join(RECIPES)}; add to "
            f"them with {_known()}"
        )
    modifiers = tuple(_modifier(argument, name, text) for text in added)
    optimising = [modifier for modifier, _ in modifiers if modifier not in _FOR_ALL]
    if optimising and RECIPES[recipe]().objective is None:
        raise ArgumentError(
            f"`{argument}` names {name!r}, but {recipe} optimises nothing that {optimising[0]!r} "
            f"could be added to; leave it out"
        )
    return Method(name, recipe, modifiers)


def _modifier(argument: str, name: str, text: str) -> tuple[str, float | None]:
    modifier, equals, value = text.partition("=")
    if modifier not in MODIFIERS:
        raise ArgumentError(
            f"`{argument}` names {name!r}, but nothing is called {modifier!r}; add {_known()}"
        )
    try:
        number = float(value) if equals else None
        if number is not None and (modifier not in _TAKES_VALUE or not math.isfinite(number)):
            raise ValueError
    except ValueError:
        raise ArgumentError(
            f"`{argument}` names {name!r}, but {modifier!r} takes "
            f"{'a number, not ' + repr(value) if modifier in _TAKES_VALUE else 'no value'}"
        ) from None
    try:  # what the value means is checked where it is used, and better now than after hours
        MODIFIERS[modifier](RECIPES["idc"](), PRESETS["smoke"], number)
    except ArgumentError as error:
        raise ArgumentError(f"`{argument}` names {name!r}: {error}") from None
    return modifier, number


def _known() -> str:
    return ", ".join(f"+{known}" for known in MODIFIERS)
