"""Keeping the global random states out of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Generator

from dc_replay.errors import ArgumentError


def check_generator(generator: object) -> None:
    """Raise an ArgumentError unless it is one."""
    if not isinstance(generator, Generator):
        raise ArgumentError(
            f"`generator` is {generator!r}; pass torch.Generator().manual_seed(seed)"
        )


@contextmanager
def isolated(generator: Generator, device: torch.device) -> Iterator[None]:
    """Run a block whose use of global random generators follows from ``generator`` alone.

    Building a network draws from the global generator, and there is no way to pass one in. Inside
    the block Python's, numpy's and torch's global generators (of the CPU and of ``device``) are
    seeded from ``generator``; afterwards they are as they were.
    """
    check_generator(generator)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            # torch.manual_seed would seed every device, and those not forked would keep the seed.
            torch.default_generator.manual_seed(seed)
            for forked in devices:
                with torch.cuda.device(forked):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
