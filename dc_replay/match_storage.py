"""New images as storing would leave them, so that only what they show tells them from exemplars."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.distributed import DistributedHelper
from avalanche.training.plugins import GDumbPlugin
from torch import Generator, Tensor

from dc_replay._checks import check_number
from dc_replay.buffer import CondensedBuffer
from dc_replay.errors import ArgumentError
from dc_replay.experiences import classes_of
from dc_replay.pixels import in_type
from dc_replay.randomness import Purpose, stream
from dc_replay.traces import TraceNoise


class MatchStoragePlugin(SupervisedPlugin[Any], supports_distributed=True):
    """Shows new images as storing would leave them, beside a plugin that replays a buffer.

    For :class:`~dc_replay.buffer.CondensedBuffer` as the storage policy of Avalanche's plugins and
    strategies. :class:`~dc_replay.plugin.CondensedReplayPlugin` does this by itself; why is said
    there, at ``match_storage``.

    Images of classes that are in the memory and not in the experience count as exemplars, all
    others as new. So where a class comes back its exemplars are taken for new ones, and lose a
    little more. Compressed exemplars that the buffer augments are shown so once more, because new
    images come augmented, too. Nothing happens where images are stored as they are.

    Packed exemplars would lose sharpness by that which new images keep, and exemplars that a
    strategy draws when it has the mini-batch (MIR, ER-ACE) are not reached. With either, training
    transforms that crop out of padded images cost accuracy.

    Args:
        buffer: The storage policy that is replayed.
        match_condensing: How strong a noise new images get beside condensed exemplars, as in
            :class:`~dc_replay.plugin.CondensedReplayPlugin`. It is measured in mini-batches that
            hold exemplars, and there is none beside strategies that draw them later.

    Raises:
        ArgumentError: If an argument cannot be used.
    """

    def __init__(self, buffer: CondensedBuffer, *, match_condensing: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not isinstance(buffer, CondensedBuffer):
            raise ArgumentError(
                f"`buffer` is {buffer!r}; pass the CondensedBuffer that is replayed"
            )
        if match_condensing is not None:
            check_number("match_condensing", match_condensing, 0)
        self.buffer = buffer
        self.match_condensing = match_condensing
        self._old: Tensor | None = None
        self._noise: TraceNoise | None = None
        self._generator: Generator | None = None

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse plugins beside which this would make the difference that it is to remove.

        Raises:
            ArgumentError: If new images are shown as stored already, or nothing but exemplars.
        """
        for plugin in strategy.plugins:
            if isinstance(plugin, GDumbPlugin) or hasattr(plugin, "match_storage"):
                raise ArgumentError(
                    f"`plugins` has {type(plugin).__name__}, beside which new images are as "
                    f"exemplars already; leave {type(self).__name__} out"
                )

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Note the classes of which there are exemplars alone."""
        memory = self.buffer.memory
        self._noise = self.buffer.trace_noise(self.match_condensing)
        changed = memory.formation.images_per_stored > 1 or self._noise is not None
        old = sorted({*memory.classes} - classes_of(strategy.experience)) if changed else []
        self._old = torch.tensor(old, device=strategy.device) if old else None
        self._generator = stream(
            self.buffer.seed,
            Purpose.MATCHING,
            self.buffer.experiences,
            DistributedHelper.rank,
            device=strategy.device,
        )

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Change the images of a mini-batch, which is on the device by now.

        Raises:
            ArgumentError: If they could not be stored, because of their shape, or have more than
                one label each.
        """
        if self._old is None:
            return
        images, labels = strategy.mbatch[:2]
        check_labels(labels)
        exemplars = (labels[:, None] == self._old).any(dim=1)
        if self._noise is not None and self._generator is not None:
            if self._noise.measures:
                shown = self._as_shown(images, exemplars)
                self._noise.measure(shown[exemplars], shown[~exemplars])
            noisy = on_numbers(images, partial(self._noise.added_to, generator=self._generator))
            images = _where(exemplars, images, noisy)
        strategy.mbatch[0] = self._as_shown(images, exemplars)

    def _as_shown(self, images: Tensor, exemplars: Tensor) -> Tensor:
        """A mini-batch as the network sees it, all but the noise."""
        memory = self.buffer.memory
        changed = on_numbers(images, memory.as_stored)
        if not self.buffer.augments or memory.formation.factor > 1:
            changed = _where(exemplars, images, changed)
        return changed

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forget them."""
        self._old = self._noise = self._generator = None


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """Of each image of a mini-batch one of two."""
    return torch.where(chosen[:, None, None, None], images, others)


def check_labels(labels: Tensor) -> None:
    """Raise an ArgumentError unless each image of a mini-batch has one class label."""
    if labels.ndim != 1:
        raise ArgumentError(
            f"`mbatch` holds labels of shape {list(labels.shape)}, but exemplars have one class "
            f"label each; a plugin that mixes labels must come after this one"
        )


def on_numbers(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change images of a mini-batch as numbers of a floating-point type.

    Args:
        images: Of a floating-point type, or bytes, which networks take that begin by normalising
            them. Images of other types stay as they are.
        change: Gives images of the same shape and type, bytes' from 0 to 255.

    Returns:
        Images of the same shape and type.
    """
    if images.is_floating_point():
        return change(images)
    return in_type(change(images.float()), torch.uint8) if images.dtype == torch.uint8 else images
