"""GDumb: training a new model on the memory alone in every step (Prabhu et al., ECCV 2020)."""

from __future__ import annotations

import copy
from typing import Any

from avalanche.core import SupervisedPlugin
from torch import nn

from dc_replay import MemoryOnlyPlugin
from strategies.common import Contender, Setup, growing_head, naive, shrinking


def gdumb(setup: Setup) -> Contender:
    """Condense each experience, then train from scratch on the exemplars of all classes so far."""
    memory = MemoryOnlyPlugin(
        condenser=setup.condenser,
        budget=setup.budget,
        augment=None,  # whole mini-batches are augmented, whatever is in them
        presentations_per_stored=setup.presentations_per_stored,
        seed=setup.seed,
        progress=setup.progress,
        checkpoint_dir=setup.checkpoint_dir,
    )
    scratch = FromScratch(growing_head(setup))
    return Contender(
        strategy=naive(setup, [memory, scratch]),
        stored_images=lambda: len(memory.memory),
        buffer=memory.buffer,
        resume=lambda steps: None,
        shrink=shrinking(memory.buffer),
    )


class FromScratch(SupervisedPlugin[Any]):
    """Puts the initial model back before each experience.

    Args:
        model: The model as it is before the first, of which a copy is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.initial = copy.deepcopy(model)

    def before_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the strategy's model; it is adapted to the classes after this."""
        strategy.model = copy.deepcopy(self.initial).to(strategy.device)
