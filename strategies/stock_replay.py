"""Avalanche's own replay of raw images, at the same stored bytes as the condensed memories."""

from __future__ import annotations

from math import gcd
from types import SimpleNamespace
from typing import Any

from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import (
    BalancedExemplarsBuffer,
    ClassBalancedBuffer,
    HerdingSelectionStrategy,
    ParametricBuffer,
    ReservoirSamplingBuffer,
)
from torch import Tensor, nn

from dc_replay.errors import ArgumentError
from dc_replay.networks import FeatureNetwork
from strategies.common import Contender, Setup, naive


class FullBatches(ReplayPlugin):
    """Avalanche's plugin, but for the last mini-batch of each pass over the memory.

    That would have as many exemplars as are left, 8 of 64 where there are 200, so that fewer would
    be replayed than from a condensed memory. Here a pass goes over the memory so often that it ends
    with a whole mini-batch.
    """

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Make the loader."""
        policy, images = self.storage_policy, self.storage_policy.buffer
        count, batch = len(images), self.batch_size_mem or strategy.train_mb_size
        if count:
            passes = batch // gcd(count, batch)
            self.storage_policy = SimpleNamespace(buffer=images.subset([*range(count)] * passes))
        super().before_training_exp(strategy, *args, **kwargs)
        self.storage_policy = policy


class Features(nn.Module):
    """The flattened features of a network, which herding compares."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[batch, features]``."""
        return self.network.embed(images)


class _Capped(BalancedExemplarsBuffer[Any]):
    """A buffer divided among the classes that never keeps more than ``most`` images of one."""

    most: int

    def get_group_lengths(self, num_groups: int) -> list[int]:
        """The images that each class may keep."""
        return [min(length, self.most) for length in super().get_group_lengths(num_groups)]


class RandomOfClasses(_Capped, ClassBalancedBuffer):
    """Random images of each class."""

    def __init__(self, most: int, max_size: int, total_num_classes: int | None) -> None:
        super().__init__(
            max_size,
            adaptive_size=total_num_classes is None,
            total_num_classes=total_num_classes,
        )
        self.most = most


class HerdingOfClasses(_Capped, ParametricBuffer):
    """Images of each class by herding on the features of the model that is trained."""

    def __init__(self, most: int, max_size: int, setup: Setup) -> None:
        selection = HerdingSelectionStrategy(setup.model, "layers")
        # A layer's output is a map of several pixels, where Avalanche expects one row of numbers.
        selection.feature_extractor = Features(setup.model)
        super().__init__(max_size, groupby="class", selection_strategy=selection)
        self.most = most


def stock_replay(setup: Setup) -> Contender:
    """Random images, as many of each class: ``ClassBalancedBuffer``."""
    # Without a total there is room for as many images of each class from the beginning.
    classes = setup.classes if setup.total_images is None else None
    return _contender(setup, RandomOfClasses(setup.ipc, _images(setup), classes))


def stock_herding(setup: Setup) -> Contender:
    """Images by herding, as iCaRL does: ``ParametricBuffer``.

    Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017.
    """
    return _contender(setup, HerdingOfClasses(setup.ipc, _images(setup), setup))


def stock_reservoir(setup: Setup) -> Contender:
    """Every image so far with the same chance, whatever its class: ``ReservoirSamplingBuffer``.

    Source: Vitter, "Random Sampling with a Reservoir", 1985.

    Raises:
        ArgumentError: If no total number of images is given, for it knows no other bound, or one
            that the other methods do not fill with the classes of the first experience.
    """
    if setup.total_images is None:
        raise ArgumentError(
            "`methods` names 'stock_reservoir', which takes no notice of classes and so cannot "
            "keep a number of images of each; give a `budget`, such as total-images:2000"
        )
    first = setup.ipc * setup.classes_per_step
    if first < setup.total_images:
        raise ArgumentError(
            f"`ipc` is {setup.ipc}, so that after the first experience the other methods store "
            f"{first} images, but 'stock_reservoir' {setup.total_images}; make it at least "
            f"{-(-setup.total_images // setup.classes_per_step)}, or leave stock_reservoir out"
        )
    policy = ReservoirSamplingBuffer(setup.total_images)
    replay = FullBatches(mem_size=policy.max_size, storage_policy=policy)
    return Contender(strategy=naive(setup, [replay]), stored_images=lambda: len(policy.buffer))


def _images(setup: Setup) -> int:
    return setup.ipc * setup.classes if setup.total_images is None else setup.total_images


def _contender(setup: Setup, policy: RandomOfClasses | HerdingOfClasses) -> Contender:
    replay = FullBatches(mem_size=policy.max_size, storage_policy=policy)
    strategy = naive(setup, [replay])

    def shrink(ipc: int) -> None:
        policy.most = ipc
        policy.resize(strategy, policy.max_size)

    return Contender(strategy=strategy, stored_images=lambda: len(policy.buffer), shrink=shrink)
