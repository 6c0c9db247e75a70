"""Keeping what an earlier model knew: distillation of its logits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.distributed import DistributedHelper
from torch import Tensor, nn
from torch.nn import functional as F

from dc_replay._checks import check_number
from dc_replay.adjustment import check_logits, check_one_head
from dc_replay.errors import ArgumentError
from dc_replay.experiences import classes_of


def distillation_loss(
    new_logits: Tensor,
    old_logits: Tensor,
    *,
    temperature: float = 2.0,
    columns: Sequence[int] | None = None,
) -> Tensor:
    """How far a model has moved from an earlier one on the classes that the earlier one knew.

    With ``T`` the temperature and ``n`` the number of old classes it is ``T**2 * n`` times the
    Kullback-Leibler divergence of the softened class distributions, averaged over all
    ``batch * n`` elements; that is ``T**2`` times the mean divergence of an image. No gradient
    reaches the old logits.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, in the
    form that IDC's continual-learning experiment uses.

    Args:
        new_logits: ``[batch, classes]`` of the model in training.
        old_logits: ``[batch, old classes]`` of the earlier model, on the same images.
        temperature: Divides both logits; above 0.
        columns: The columns of the old classes, the same in both. None takes the first of
            ``new_logits``, as many as ``old_logits`` has.

    Returns:
        A scalar of at least 0.

    Raises:
        ArgumentError: If a shape, the temperature or a column cannot be used.
    """
    if new_logits.ndim != 2 or old_logits.ndim != 2 or len(new_logits) != len(old_logits):
        raise ArgumentError(
            f"`new_logits` has shape {list(new_logits.shape)} and `old_logits` "
            f"{list(old_logits.shape)}; expected [batch, classes] of the same batch"
        )
    check_number("temperature", temperature, above=True)
    chosen = list(range(old_logits.shape[1])) if columns is None else list(columns)
    width = min(new_logits.shape[1], old_logits.shape[1])
    if not chosen or min(chosen) < 0 or max(chosen) >= width:
        raise ArgumentError(
            f"`columns` is {chosen}, but must name one or more of the {width} columns that both "
            f"`new_logits` and `old_logits` have; a classifier may grow, but not shrink or reorder"
        )
    new = F.log_softmax(new_logits[:, chosen] / temperature, dim=1)
    old = F.softmax(old_logits.detach()[:, chosen] / temperature, dim=1)
    return F.kl_div(new, old, reduction="batchmean") * temperature**2


class DistillationPlugin(SupervisedPlugin[Any], supports_distributed=True):
    """Holds the logits of earlier classes near those of the model after the experience before.

    Adds ``weight`` times :func:`distillation_loss` to the loss of every mini-batch, whatever other
    plugins have put into it. The earlier model is a copy in evaluation mode; its classes are those
    of all experiences up to then. For a classifier with one column per class label, which may grow
    in between, such as ``IncrementalClassifier``.

    Args:
        weight: At least 0.
        temperature: Above 0.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    def __init__(self, *, weight: float = 1.0, temperature: float = 2.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_number("weight", weight)
        check_number("temperature", temperature, above=True)
        self.weight = weight
        self.temperature = temperature
        self.columns: tuple[int, ...] = ()
        self.teacher: nn.Module | None = None

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse models whose columns do not stand for class labels.

        Raises:
            ArgumentError: If the model has a head for each task.
        """
        check_one_head(
            strategy.model,
            "distillation here needs one column per class; use Avalanche's LwFPlugin",
        )

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the loss.

        Raises:
            ArgumentError: If the model returns anything but a tensor of logits.
        """
        check_logits(strategy.mb_output)
        if self.teacher is None:
            return
        with torch.no_grad():
            old = self.teacher(strategy.mb_x)
        loss = distillation_loss(
            strategy.mb_output, old, temperature=self.temperature, columns=self.columns
        )
        strategy.loss = strategy.loss + self.weight * loss

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keep a frozen copy of the model, and note the classes that it has learned."""
        self.hold(strategy.model, {*self.columns, *classes_of(strategy.experience)})

    def hold(self, model: nn.Module, classes: Iterable[int]) -> None:
        """Distil from a frozen copy of this model from now on, for example of one from a file.

        Args:
            model: As it was after the experience before, on the device of the training to come.
            classes: The labels that it has learned.
        """
        self.columns = tuple(sorted(classes))
        unwrapped = DistributedHelper.unwrap_model(model)
        self.teacher = copy.deepcopy(unwrapped).eval().requires_grad_(False)
