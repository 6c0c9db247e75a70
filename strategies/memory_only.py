"""Training on the memory alone, from the model before, with distillation (IDC's experiment)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from dc_replay import MemoryOnlyPlugin
from strategies.common import Contender, Setup, naive, resume, shrinking


def memory_only(setup: Setup) -> Contender:
    """Condense each experience, then train on the exemplars of all classes so far."""
    setup = replace(setup, distillation=1.0)
    memory = MemoryOnlyPlugin(
        condenser=setup.condenser,
        budget=setup.budget,
        augment=None,  # whole mini-batches are augmented, whatever is in them
        presentations_per_stored=setup.presentations_per_stored,
        seed=setup.seed,
        progress=setup.progress,
        checkpoint_dir=setup.checkpoint_dir,
    )
    strategy = naive(setup, [memory])
    return Contender(
        strategy=strategy,
        stored_images=lambda: len(memory.memory),
        buffer=memory.buffer,
        resume=partial(resume, strategy, setup),
        shrink=shrinking(memory.buffer),
    )
