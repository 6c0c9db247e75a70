"""The functions that condensing repeats, built and compiled once for all experiences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dc_replay.augment import Augmentation
from dc_replay.compilation import compiled
from dc_replay.formation import Formation
from dc_replay.matching import Launches, MatchFunction, for_several, match_function
from dc_replay.networks import MatchingNetwork, NetworkFactory, Parameters, Precision
from dc_replay.objectives import Objective
from dc_replay.randomness import isolated
from dc_replay.training import NetworkTraining, StepFunction


@dataclass(frozen=True)
class Plan:
    """All that decides which functions a condensation repeats.

    Attributes:
        factory: Builds the matching network.
        classes: Classes that it tells apart.
        shape: Channels, height and width of its images.
        device: Where it runs.
        objective: What is matched; None if nothing is.
        formation: How stored images become those that it sees.
        augment: Augmentation of matched images.
        training: How the network is trained.
        precision: What its convolutions compute in.
        compile: Whether to compile the functions.
        classes_at_once: Classes in one call of the pixel step; None finds it.
    """

    factory: NetworkFactory
    classes: int
    shape: tuple[int, int, int]
    device: torch.device
    objective: Objective | None
    formation: Formation
    augment: Augmentation
    training: NetworkTraining
    precision: Precision
    compile: bool
    classes_at_once: int | None = None


@dataclass(frozen=True, eq=False)
class Programs:
    """A matching network and the functions of it that are called over and over.

    Attributes:
        network: The network as a function.
        forward: Logits and features for weights and normalised images.
        step: Gradients of the weights, see :func:`~dc_replay.training.step_function`.
        match: The pixel steps of all classes; None without an objective.
    """

    network: MatchingNetwork
    forward: Callable[[Parameters, Tensor], tuple[Tensor, Tensor]]
    step: StepFunction
    match: Launches | None


def programs(plan: Plan) -> Programs:
    """Build the functions of a plan, or find them again."""
    try:
        hash(plan)
    except TypeError:  # a factory or objective of the user's that has no hash is built each time
        return _build(plan)
    return _cached(plan)


def _build(plan: Plan) -> Programs:
    # Whether this is a cache hit must not show in what a seed gives, so no draw leaves here.
    with isolated(Generator().manual_seed(0), plan.device):
        example = torch.zeros((1, *plan.shape), device=plan.device)
        network = MatchingNetwork(plan.factory, plan.classes, example, precision=plan.precision)

    def fast(function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function, plan.compile, graphs=plan.device.type == "cuda")

    launches: Launches | None = None
    if plan.objective is not None:
        match: MatchFunction = match_function(network, plan.objective, plan.formation, plan.augment)
        several = for_several(match)
        launches = Launches(fast(match), fast(several), most=plan.classes_at_once)
    return Programs(
        network=network,
        forward=fast(network.__call__),
        step=fast(plan.training.step_function(network)),
        match=launches,
    )


_cached = functools.lru_cache(maxsize=8)(_build)
