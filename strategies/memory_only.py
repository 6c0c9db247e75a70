"""Training on the memory alone, from the model before, with distillation (IDC's experiment)."""

from __future__ import annotations

import copy

from dc_replay import DistillationPlugin, MemoryOnlyPlugin
from strategies.common import Contender, Setup, naive, shrinking


def memory_only(setup: Setup) -> Contender:
    """Condense each experience, then train on the exemplars of all classes so far."""
    memory = MemoryOnlyPlugin(
        condenser=setup.condenser,
        budget=setup.budget,
        presentations_per_stored=setup.presentations_per_stored,
        seed=setup.seed,
        progress=setup.progress,
        checkpoint_dir=setup.checkpoint_dir,
    )
    distillation = DistillationPlugin(temperature=2.0)
    strategy = naive(setup, [memory, distillation])

    def resume(steps: int) -> None:
        distillation.columns = tuple(range(steps * setup.classes_per_step))
        distillation.teacher = copy.deepcopy(strategy.model).eval().requires_grad_(False)

    return Contender(
        strategy=strategy,
        stored_images=lambda: len(memory.memory),
        buffer=memory.buffer,
        resume=resume,
        shrink=shrinking(memory.buffer),
    )
