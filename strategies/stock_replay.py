"""Avalanche's own replay: a class-balanced buffer of random images, at the same stored bytes."""

from __future__ import annotations

from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer

from strategies.common import Contender, Setup, naive


class CappedBuffer(ClassBalancedBuffer):
    """Avalanche's class-balanced buffer that never keeps more than ``most`` images of a class."""

    def __init__(self, most: int, max_size: int, total_num_classes: int | None) -> None:
        super().__init__(
            max_size,
            adaptive_size=total_num_classes is None,
            total_num_classes=total_num_classes,
        )
        self.most = most

    def get_group_lengths(self, num_groups: int) -> list[int]:
        """The images that each class may keep."""
        return [min(length, self.most) for length in super().get_group_lengths(num_groups)]


def stock_replay(setup: Setup) -> Contender:
    """Keep as many raw images of each class as the condensed memories store."""
    if setup.total_images is None:
        policy = CappedBuffer(setup.ipc, setup.ipc * setup.classes, setup.classes)
    else:  # a total is shared by the classes seen so far
        policy = CappedBuffer(setup.ipc, setup.total_images, None)
    replay = ReplayPlugin(mem_size=policy.max_size, storage_policy=policy)
    strategy = naive(setup, [replay])

    def shrink(ipc: int) -> None:
        policy.most = ipc
        policy.resize(strategy, policy.max_size)

    return Contender(strategy=strategy, stored_images=lambda: len(policy.buffer), shrink=shrink)
