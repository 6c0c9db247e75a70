"""Replay memories for Avalanche that hold condensed exemplars.

Names are loaded when they are first used, because importing torch and Avalanche takes seconds.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dc_replay.adjustment import LogitAdjustmentPlugin
    from dc_replay.budgets import Budget, ImagesPerClass, Smallest, TotalBytes, TotalImages
    from dc_replay.buffer import CondensedBuffer
    from dc_replay.condense import Condensed, Condenser
    from dc_replay.errors import ArgumentError, DCReplayError, DivergedError, MemoryFileError
    from dc_replay.exemplars import Exemplars
    from dc_replay.formation import Formation
    from dc_replay.memory import ExemplarMemory
    from dc_replay.multisize import Multisize
    from dc_replay.optimisation import OnReal, OnSynthetic, PixelStep
    from dc_replay.pixels import Normalization
    from dc_replay.plugin import (
        CondensedReplayPlugin,
        DistillationPlugin,
        MatchStoragePlugin,
        MemoryOnlyPlugin,
    )
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
    from dc_replay.resident import DeviceResident
    from dc_replay.subsets import SubsetMatching

__version__ = "0.1.0"

_NAMES = {
    "adjustment": ("LogitAdjustmentPlugin",),
    "budgets": ("Budget", "ImagesPerClass", "Smallest", "TotalBytes", "TotalImages"),
    "buffer": ("CondensedBuffer",),
    "condense": ("Condensed", "Condenser"),
    "errors": ("ArgumentError", "DCReplayError", "DivergedError", "MemoryFileError"),
    "exemplars": ("Exemplars",),
    "formation": ("Formation",),
    "memory": ("ExemplarMemory",),
    "multisize": ("Multisize",),
    "optimisation": ("OnReal", "OnSynthetic", "PixelStep"),
    "pixels": ("Normalization",),
    "plugin": (
        "CondensedReplayPlugin",
        "DistillationPlugin",
        "MatchStoragePlugin",
        "MemoryOnlyPlugin",
    ),
    "recipes": (
        "RECIPES",
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
    ),
    "resident": ("DeviceResident",),
    "subsets": ("SubsetMatching",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "RECIPES",
    "ArgumentError",
    "Budget",
    "Condensed",
    "CondensedBuffer",
    "CondensedReplayPlugin",
    "Condenser",
    "DCReplayError",
    "DeviceResident",
    "DistillationPlugin",
    "DivergedError",
    "ExemplarMemory",
    "Exemplars",
    "Formation",
    "ImagesPerClass",
    "LogitAdjustmentPlugin",
    "MatchStoragePlugin",
    "MemoryFileError",
    "MemoryOnlyPlugin",
    "Multisize",
    "Normalization",
    "OnReal",
    "OnSynthetic",
    "PixelStep",
    "Smallest",
    "SubsetMatching",
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
    """A public name, or a module of this package, which importing it makes an attribute."""
    if name in _MODULE_OF:
        found = getattr(import_module(f"dc_replay.{_MODULE_OF[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("__") and find_spec(f"dc_replay.{name}") is not None:
        return import_module(f"dc_replay.{name}")
    raise AttributeError(f"module 'dc_replay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
