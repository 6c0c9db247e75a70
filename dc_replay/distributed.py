"""Condensing one experience on all processes of torch.distributed, each with classes of its own.

There is no launcher here and nothing that keeps processes alive: ``torchrun`` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dc_replay.errors import ArgumentError, DCReplayError

Found = TypeVar("Found")

_CPU = torch.device("cpu")
_BY_ITSELF: ContextVar[bool] = ContextVar("_BY_ITSELF", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process condense by itself, although it is one of several.

    Inside the block nothing is shared and nobody is waited for, so the other processes may do
    something else meanwhile.
    """
    token = _BY_ITSELF.set(True)
    try:
        yield
    finally:
        _BY_ITSELF.reset(token)


@dataclass(frozen=True)
class Ranks:
    """The processes that condense together, and how they talk; by default there is one.

    What communicates has to be called by all of them, in the same order. With one process it does
    nothing.

    Attributes:
        rank: The number of this process.
        size: How many there are.
        device: Where what they exchange must be.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @classmethod
    def here(cls, device: torch.device | None = None) -> Ranks:
        """Those of torch.distributed's default group; this process alone where there is none.

        Args:
            device: Where the work is done. NCCL exchanges what is on a GPU, and takes this one.
        """
        if _BY_ITSELF.get() or not dist.is_available() or not dist.is_initialized():
            return cls()
        size = dist.get_world_size()
        if size == 1:
            return cls()
        where = _CPU
        if dist.get_backend() == "nccl":
            where = torch.device("cuda", torch.cuda.current_device())
            if device is not None and device.type == "cuda":
                where = device
        return cls(dist.get_rank(), size, where)

    def share(self, classes: int) -> Share:
        """Deal classes out."""
        return Share(self, classes)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape and type."""
        if self.size == 1:
            return [tensor]
        own = tensor.detach().to(self.device).contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [part.to(tensor.device) for part in found]

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """For each number the largest that a rank has."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        largest: list[float] = found.tolist()
        return largest

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of the first rank, all in one message."""
        if self.size == 1:
            return
        packed = _packed(tensors, self.device)
        dist.broadcast(packed, src=0)
        if self.rank:
            _unpack(packed, tensors)

    def as_first(self, choice: bool) -> bool:
        """What the first rank has chosen."""
        found = torch.tensor(choice)
        self.take_from_first([found])
        return bool(found)

    def by_first(self, work: Callable[[], Found]) -> Found:
        """Let the first rank do something; every rank returns, or raises, what it did."""
        if self.size == 1:
            return work()
        found: list[Any] = [None, None]
        if not self.rank:
            try:
                found[0] = work()
            except DCReplayError as error:
                found[1] = error
            except Exception as error:
                # Of another's exceptions it is not known whether they can be sent.
                dist.broadcast_object_list(
                    [None, DCReplayError(f"rank 0 of torch.distributed failed: {error!r}")],
                    src=0,
                    device=self.device,
                )
                raise
        dist.broadcast_object_list(found, src=0, device=self.device)
        if found[1] is not None:
            raise found[1]
        result: Found = found[0]
        return result

    def compare(self, arguments: Mapping[str, str] | None) -> None:
        """Make sure that all ranks were given the same.

        Args:
            arguments: What tells each argument from others, by its name. None says that this rank
                has an error of its own and is about to leave.

        Raises:
            ArgumentError: On every rank, if an argument differs, or another rank leaves.
        """
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        # The library takes the current GPU, whichever that is.
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            dist.all_gather_object(everyone, arguments)
        if arguments is None:
            return
        for rank, other in enumerate(everyone):
            if other is None:
                raise ArgumentError(
                    f"`images` cannot be condensed together, because rank {rank} of "
                    f"torch.distributed refused its arguments; see the error there"
                )
        for name in everyone[0]:
            for rank, other in enumerate(everyone):
                if other.get(name) != everyone[0][name]:
                    raise ArgumentError(
                        f"`{name}` is not the same on all ranks of torch.distributed, which "
                        f"condense an experience together: rank 0 has {everyone[0][name]}, rank "
                        f"{rank} has {other.get(name)}; give every rank the whole experience and "
                        f"the same seed, or let each condense by itself inside "
                        f"dc_replay.distributed.alone()"
                    )


SINGLE = Ranks()
"""This process by itself."""


@dataclass(frozen=True)
class Share:
    """The classes of an experience, dealt out among ranks.

    Each rank has classes that follow one another, at most one more than any other has. So what it
    computes for batches over the images of all classes lies side by side.

    Attributes:
        ranks: Who shares.
        classes: How many classes there are.
    """

    ranks: Ranks
    classes: int

    @property
    def own(self) -> range:
        """The classes of this rank."""
        return self.of(self.ranks.rank)

    def of(self, rank: int) -> range:
        """The classes of a rank, perhaps none."""
        size = self.ranks.size
        return range(rank * self.classes // size, (rank + 1) * self.classes // size)

    def complete(self, *sequences: Sequence[Tensor]) -> None:
        """Overwrite what belongs to other ranks' classes by what those ranks have.

        Args:
            sequences: Each with one tensor for every class, whose shape and type all ranks know.
        """
        ranks = self.ranks
        if ranks.size == 1:
            return
        parts = [
            [tensors[position] for tensors in sequences for position in self.of(rank)]
            for rank in range(ranks.size)
        ]
        most = max(sum(tensor.nbytes for tensor in own) for own in parts)
        packed = torch.zeros(most, dtype=torch.uint8, device=ranks.device)
        own = _packed(parts[ranks.rank], ranks.device)
        packed[: len(own)] = own
        for rank, theirs in enumerate(ranks.gather(packed)):
            if rank != ranks.rank:
                _unpack(theirs, parts[rank])

    def numbers(self, own: Sequence[int]) -> list[int]:
        """One whole number for each class, from the rank that it belongs to."""
        if self.ranks.size == 1:
            return list(own)
        found = torch.tensor(own)
        self.complete(found.unbind())
        numbers: list[int] = found.tolist()
        return numbers


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of tensors, one after the other."""
    parts = [t.detach().to(device).contiguous().flatten().view(torch.uint8) for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=device)


def _unpack(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    """Fill tensors with bytes that :func:`_packed` has put together."""
    start = 0
    with torch.no_grad():
        for tensor in tensors:
            # Copied, because a view of another type must begin at a multiple of its size.
            part = packed[start : start + tensor.nbytes].clone()
            tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
            start += tensor.nbytes
