"""Replay memories for Avalanche that hold condensed exemplars.

Names that need Avalanche are loaded when they are first used, because importing it takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dc_replay.budgets import Budget, ImagesPerClass, Smallest, TotalBytes, TotalImages
from dc_replay.condense import Condensed, Condenser, OnReal, OnSynthetic, PixelStep
from dc_replay.errors import ArgumentError, DCReplayError, MemoryFileError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import ExemplarMemory
from dc_replay.pixels import Normalization
from dc_replay.recipes import (
    RECIPES,
    dc,
    dm,
    dream,
    dream_plus,
    dsa,
    forgetting,
    herding,
    idc,
    idc_i,
    k_center,
    random,
    recipe,
    representative,
)

if TYPE_CHECKING:
    from dc_replay.buffer import CondensedBuffer as CondensedBuffer
    from dc_replay.plugin import CondensedReplayPlugin as CondensedReplayPlugin
    from dc_replay.plugin import DistillationPlugin as DistillationPlugin
    from dc_replay.plugin import MemoryOnlyPlugin as MemoryOnlyPlugin

__version__ = "0.1.0"

_NEED_AVALANCHE = {
    "CondensedBuffer": "dc_replay.buffer",
    "CondensedReplayPlugin": "dc_replay.plugin",
    "DistillationPlugin": "dc_replay.plugin",
    "MemoryOnlyPlugin": "dc_replay.plugin",
}

__all__ = [
    "RECIPES",
    "ArgumentError",
    "Budget",
    "Condensed",
    "CondensedBuffer",
    "CondensedReplayPlugin",
    "Condenser",
    "DCReplayError",
    "DistillationPlugin",
    "ExemplarMemory",
    "Exemplars",
    "Formation",
    "ImagesPerClass",
    "MemoryFileError",
    "MemoryOnlyPlugin",
    "Normalization",
    "OnReal",
    "OnSynthetic",
    "PixelStep",
    "Smallest",
    "TotalBytes",
    "TotalImages",
    "dc",
    "dm",
    "dream",
    "dream_plus",
    "dsa",
    "forgetting",
    "herding",
    "idc",
    "idc_i",
    "k_center",
    "random",
    "recipe",
    "representative",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_AVALANCHE:
        raise AttributeError(f"module 'dc_replay' has no attribute {name!r}")
    return getattr(import_module(_NEED_AVALANCHE[name]), name)


def __dir__() -> list[str]:
    return __all__
