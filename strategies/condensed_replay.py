"""Training on each experience's data together with a condensed memory of the earlier ones."""

from __future__ import annotations

from functools import partial

from dc_replay import CondensedReplayPlugin
from strategies.common import Contender, Setup, naive, resume, shrinking


def condensed_replay(setup: Setup) -> Contender:
    """Append as many exemplars to each mini-batch as it has new images."""
    replay = CondensedReplayPlugin(
        condenser=setup.condenser,
        budget=setup.budget,
        # Nothing where whole mini-batches are augmented, whatever is in them.
        augment=None if setup.augment else "training",
        match_storage=setup.match_storage,
        match_condensing=setup.match_condensing,
        seed=setup.seed,
        progress=setup.progress,
        checkpoint_dir=setup.checkpoint_dir,
    )
    strategy = naive(setup, [replay])
    return Contender(
        strategy=strategy,
        stored_images=lambda: len(replay.memory),
        buffer=replay.buffer,
        resume=partial(resume, strategy, setup),
        shrink=shrinking(replay.buffer),
    )
