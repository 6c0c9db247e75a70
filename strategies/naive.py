"""Training on each experience alone: what forgetting costs."""

from __future__ import annotations

from strategies.common import Contender, Setup
from strategies.common import naive as plain


def naive(setup: Setup) -> Contender:
    """Store nothing."""
    return Contender(strategy=plain(setup), stored_images=lambda: 0)
