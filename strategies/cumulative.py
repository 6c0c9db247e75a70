"""Training on the data of all experiences so far: an upper bound that stores everything."""

from __future__ import annotations

from typing import Any

from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.core import SupervisedPlugin

from strategies.common import Contender, Setup, naive


def cumulative(setup: Setup) -> Contender:
    """Keep every image of every experience."""
    keep = KeepEverything()
    return Contender(strategy=naive(setup, [keep]), stored_images=lambda: keep.images)


class KeepEverything(SupervisedPlugin[Any]):
    """Puts all data so far in the place of the experience's."""

    def __init__(self) -> None:
        super().__init__()
        self._data: AvalancheDataset[Any] | None = None

    @property
    def images(self) -> int:
        """Images kept."""
        return 0 if self._data is None else len(self._data)

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the experience's data to what is trained on."""
        new = strategy.adapted_dataset
        self._data = new if self._data is None else self._data.concat(new)
        strategy.adapted_dataset = self._data
