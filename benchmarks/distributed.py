"""What the benchmarks do when torchrun starts them as several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dc_replay import CondensedBuffer, ImagesPerClass
from dc_replay.distributed import Ranks

Left = TypeVar("Left")


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def together(device: torch.device) -> Iterator[torch.device]:
    """Let the processes that torchrun has started talk to one another.

    By NCCL where each has a GPU of its own, else by gloo.

    Args:
        device: The kind of device that each computes on.

    Yields:
        The device of this process.
    """
    backend = "gloo"
    if device.type == "cuda":
        gpus, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus:
            backend = "nccl"
        device = torch.device("cuda", own % gpus)
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def condense_first(
    left: Sequence[Left],
    memories: Callable[[Sequence[Left]], Iterable[tuple[CondensedBuffer, Any]]],
    device: torch.device,
    *,
    cut: tuple[int, int] | None = None,
) -> None:
    """Condense all experiences on all processes, and end all of them but the first.

    What is condensed stays in the buffers' ``checkpoint_dir``, where whoever condenses the same
    experiences with the same seed finds it.

    Args:
        left: What is to be done. That of the first process counts, who sees the results.
        memories: Given that, yields empty buffers, and for each the experiences to go through.
        device: The kind of device that each process computes on.
        cut: A step, and the images per class that memories are cut to before it.

    Raises:
        SystemExit: In every process but the first.
    """
    with together(device) as own:
        agreed = Ranks.here(own).by_first(lambda: left)
        for buffer, experiences in memories(agreed):
            for step, experience in enumerate(experiences):
                if cut is not None and cut[0] == step:
                    buffer.memory.limit(ImagesPerClass(cut[1]))
                buffer.remember(experience, device=own)
        dist.barrier()
    if not is_first():
        raise SystemExit(0)
