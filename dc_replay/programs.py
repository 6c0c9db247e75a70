"""The functions that condensing repeats, built and compiled once for all experiences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dc_replay.compilation import compiled
from dc_replay.networks import MatchingNetwork, NetworkFactory, Parameters, Precision
from dc_replay.objectives import Matched, Objective, matching_step
from dc_replay.randomness import isolated
from dc_replay.terms import Terms
from dc_replay.training import StepFunction, step_function

MatchFunction = Callable[[Parameters, Tensor, Tensor, Tensor, Terms], Matched]
"""What :func:`~dc_replay.objectives.matching_step` does with one network and objective."""


@dataclass(frozen=True, eq=False)
class Programs:
    """A matching network and the functions of it that are called over and over.

    Attributes:
        network: The network as a function.
        forward: Logits and features for weights and images.
        step: Gradients of the weights, see :func:`~dc_replay.training.step_function`.
        match: See :func:`~dc_replay.objectives.matching_step`; None without an objective.
    """

    network: MatchingNetwork
    forward: Callable[[Parameters, Tensor], tuple[Tensor, Tensor]]
    step: StepFunction
    match: MatchFunction | None


def programs(
    factory: NetworkFactory,
    classes: int,
    shape: tuple[int, int, int],
    device: torch.device,
    objective: Objective | None,
    precision: Precision,
    compile: bool,
) -> Programs:
    """Build, or find again, the functions for a network, images and an objective.

    Args:
        factory: Builds the network.
        classes: Classes that it tells apart.
        shape: Channels, height and width of its images.
        device: Where it runs.
        objective: What is matched.
        precision: What its convolutions compute in.
        compile: Whether to compile the functions.
    """
    arguments = (factory, classes, shape, device, objective, precision, compile)
    try:
        hash(arguments)
    except TypeError:  # a factory or objective of the user's that has no hash is built each time
        return _build(*arguments)
    return _cached(*arguments)


def _build(
    factory: NetworkFactory,
    classes: int,
    shape: tuple[int, int, int],
    device: torch.device,
    objective: Objective | None,
    precision: Precision,
    compile: bool,
) -> Programs:
    # Whether this is a cache hit must not show in what a seed gives, so no draw leaves here.
    with isolated(Generator().manual_seed(0), device):
        example = torch.zeros((1, *shape), device=device)
        network = MatchingNetwork(factory, classes, example, precision=precision)
    matching: MatchFunction | None = None
    if objective is not None:
        goal = objective

        def matched(
            parameters: Parameters, real: Tensor, synthetic: Tensor, label: Tensor, terms: Terms
        ) -> Matched:
            return matching_step(goal, network, parameters, real, synthetic, label, terms)

        matching = compiled(matched, compile)
    return Programs(
        network=network,
        forward=compiled(network.__call__, compile),
        step=compiled(step_function(network), compile),
        match=matching,
    )


_cached = functools.lru_cache(maxsize=8)(_build)
