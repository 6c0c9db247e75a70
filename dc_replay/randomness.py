"""Generators that follow from a seed, and keeping the global random states out of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Generator

from dc_replay._checks import integer
from dc_replay.errors import ArgumentError


class Purpose(IntEnum):
    """What a generator of :func:`stream` is for, so that no two share their numbers."""

    CONDENSING = 0
    REPLAYING = 1
    ORDERING = 2
    CHECKING = 3
    TRAINING = 4
    MATCHING = 5


def check_seed(seed: int) -> None:
    """Raise an ArgumentError unless :func:`stream` takes the seed."""
    if integer(seed) < 0:
        raise ArgumentError(f"`seed` is {seed!r}; pass a whole number from 0 to 2**63 - 1")


def stream(seed: int, purpose: Purpose, *path: int, device: torch.device | str) -> Generator:
    """A generator that follows from a seed and from what it is for."""
    entropy = (seed, int(purpose), *path)
    state = np.random.SeedSequence(entropy).generate_state(2).tolist()
    return Generator(device=device).manual_seed(state[0] | (state[1] & 0x7FFFFFFF) << 32)


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
