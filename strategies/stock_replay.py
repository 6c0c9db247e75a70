"""Avalanche's own replay: a class-balanced buffer of random images, at the same stored bytes."""

from __future__ import annotations

from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer

from strategies.common import Contender, Setup, naive


def stock_replay(setup: Setup) -> Contender:
    """Keep as many raw images of each class as the condensed memories store."""
    size = setup.ipc * setup.classes
    policy = ClassBalancedBuffer(
        max_size=size, adaptive_size=False, total_num_classes=setup.classes
    )
    replay = ReplayPlugin(mem_size=size, storage_policy=policy)
    return Contender(strategy=naive(setup, [replay]), stored_images=lambda: len(policy.buffer))
