"""Keeping what an earlier model knew: distillation of its logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from dc_replay._checks import check_number
from dc_replay.errors import ArgumentError


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
    check_temperature(temperature)
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


def check_temperature(temperature: float) -> None:
    """Raise an ArgumentError unless it is above 0 and finite."""
    check_number("temperature", temperature, above=True)
