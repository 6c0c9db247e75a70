"""Replay memories for Avalanche that hold condensed exemplars.

Names are loaded when they are first used, because importing torch and Avalanche takes seconds.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dc_replay.adjustment import LogitAdjustmentPlugin
    from dc_replay.augment import augmentation
    from dc_replay.budgets import Budget, ImagesPerClass, Smallest, TotalBytes, TotalImages
    from dc_replay.buffer import CondensedBuffer
    from dc_replay.condense import Condensed, Condenser
    from dc_replay.distillation import DistillationPlugin
    from dc_replay.errors import ArgumentError, DCReplayError, DivergedError, MemoryFileError
    from dc_replay.exemplars import Exemplars
    from dc_replay.formation import Formation
    from dc_replay.match_storage import MatchStoragePlugin
    from dc_replay.memory import ExemplarMemory
    from dc_replay.memory_only import MemoryOnlyPlugin
    from dc_replay.multisize import Multisize
    from dc_replay.networks import convnet_for
    from dc_replay.objectives import BidirectionalMatching, FeatureMatching, GradientMatching
    from dc_replay.optimisation import OnReal, OnSynthetic, PixelStep
    from dc_replay.pixels import Normalization
    from dc_replay.plugin import CondensedReplayPlugin
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
    from dc_replay.sampling import Uniform
    from dc_replay.selection import RandomImages
    from dc_replay.subsets import SubsetMatching
    from dc_replay.training import NetworkTraining

__version__ = "0.1.0"

_NAMES = {
    "adjustment": ("LogitAdjustmentPlugin",),
    "augment": ("augmentation",),
    "budgets": ("Budget", "ImagesPerClass", "Smallest", "TotalBytes", "TotalImages"),
    "buffer": ("CondensedBuffer",),
    "condense": ("Condensed", "Condenser"),
    "distillation": ("DistillationPlugin",),
    "errors": ("ArgumentError", "DCReplayError", "DivergedError", "MemoryFileError"),
    "exemplars": ("Exemplars",),
    "formation": ("Formation",),
    "match_storage": ("MatchStoragePlugin",),
    "memory": ("ExemplarMemory",),
    "memory_only": ("MemoryOnlyPlugin",),
    "multisize": ("Multisize",),
    "networks": ("convnet_for",),
    "objectives": ("BidirectionalMatching", "FeatureMatching", "GradientMatching"),
    "optimisation": ("OnReal", "OnSynthetic", "PixelStep"),
    "pixels": ("Normalization",),
    "plugin": ("CondensedReplayPlugin",),
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
    "sampling": ("Uniform",),
    "selection": ("RandomImages",),
    "subsets": ("SubsetMatching",),
    "training": ("NetworkTraining",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "RECIPES",
    "ArgumentError",
    "BidirectionalMatching",
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
    "FeatureMatching",
    "Formation",
    "GradientMatching",
    "ImagesPerClass",
    "LogitAdjustmentPlugin",
    "MatchStoragePlugin",
    "MemoryFileError",
    "MemoryOnlyPlugin",
    "Multisize",
    "NetworkTraining",
    "Normalization",
    "OnReal",
    "OnSynthetic",
    "PixelStep",
    "RandomImages",
    "Smallest",
    "SubsetMatching",
    "TotalBytes",
    "TotalImages",
    "Uniform",
    "augmentation",
    "convnet_for",
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
