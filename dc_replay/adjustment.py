"""Logit adjustment: training on unequally frequent classes without favouring the frequent ones."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.distributed import DistributedHelper
from avalanche.models import MultiTaskModule
from torch import Tensor

from dc_replay._checks import real
from dc_replay.errors import ArgumentError


def log_prior(counts: Tensor) -> Tensor:
    """The logarithm of how often each class occurs, as the loss is to see it.

    Classes that have not occurred get the largest value of those that have, so that a loss with it
    holds their logits down as far as the plain loss does.

    Args:
        counts: How often each class has occurred, ``[classes]``, at least one of them above 0.

    Returns:
        ``[classes]``, at most 0.
    """
    frequencies = counts / counts.sum()
    return torch.where(counts > 0, frequencies, frequencies.max()).log()


class LogitAdjustmentPlugin(SupervisedPlugin[Any], supports_distributed=True):
    """Keeps new classes, of which a mini-batch holds many images, from being preferred.

    A mini-batch of new images and exemplars shows each new class more often than each old one, and
    a network trained on that takes old classes for new ones. The loss of this plugin's strategy
    sees the logits plus ``weight * log(frequency of the class)``, so that the network learns what
    speaks for a class apart from how often it is shown; evaluation and metrics see the logits as
    they are. Frequencies are counted in the mini-batches of the current experience, exemplars
    included, with whatever puts them there: any of this package, ``ReplayPlugin``, or none.

    For a classifier with one column per class label, and strategies whose loss is the criterion of
    ``strategy.mb_output`` and integer labels. Plugins whose own loss reads ``strategy.mb_output``
    in ``before_backward``, such as :class:`~dc_replay.plugin.DistillationPlugin`, see the logits as
    they are if they come after this one. In distributed training each process counts its own
    mini-batches.

    Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, equation 10; with a
    weight of 1 also Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition",
    NeurIPS 2020.

    Args:
        weight: At least 0; 1 makes the error balanced over classes.

    Raises:
        ArgumentError: If the weight is out of range.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not 0 <= real(weight) < float("inf"):
            raise ArgumentError(f"`weight` is {weight}, but must be at least 0 and finite")
        self.weight = weight
        self._counts: Tensor | None = None
        self._plain: Tensor | None = None

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse models whose columns do not stand for class labels.

        Raises:
            ArgumentError: If the model has a head for each task.
        """
        if isinstance(DistributedHelper.unwrap_model(strategy.model), MultiTaskModule):
            raise ArgumentError(
                "`model` is a MultiTaskModule, which has a head for each task, but logit "
                "adjustment needs one column per class; with a head for each task, new classes do "
                "not compete with old ones"
            )

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start counting."""
        self._counts = None

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Count the labels, and put adjusted logits before the loss.

        Raises:
            ArgumentError: If the logits or labels are not those of one column per class.
        """
        logits, labels = strategy.mb_output, strategy.mb_y
        if logits.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
            raise ArgumentError(
                f"`mbatch` holds labels of shape {list(labels.shape)} and {labels.dtype} for "
                f"outputs of shape {list(logits.shape)}; logit adjustment counts integer labels, "
                f"one for each image, with a column for each class"
            )
        if self._counts is None or len(self._counts) != logits.shape[1]:
            self._counts = torch.zeros(logits.shape[1], device=logits.device)
        # Unlike bincount this does not wait for a GPU.
        ones = torch.ones(len(labels), device=logits.device)
        self._counts.scatter_add_(0, labels.long(), ones)
        self._plain = logits
        strategy.mb_output = logits + self.weight * log_prior(self._counts).to(logits.dtype)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Put the logits back as they are; the loss has been computed."""
        if self._plain is not None:
            strategy.mb_output = self._plain
        self._plain = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Leave nothing behind for a checkpoint."""
        self._counts = self._plain = None
