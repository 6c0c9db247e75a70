"""Logit adjustment: training on unequally frequent classes without favouring the frequent ones."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin
from avalanche.distributed import DistributedHelper
from avalanche.models import MultiTaskModule
from avalanche.training.templates.problem_type.supervised_problem import SupervisedProblem
from avalanche.training.templates.update_type.sgd_update import SGDUpdate
from torch import Tensor, nn
from torch.nn import functional as F

from dc_replay._checks import check_number
from dc_replay.errors import ArgumentError


def log_prior(counts: Tensor) -> Tensor:
    """The logarithm of how often each class occurs, as the loss is to see it.

    Classes that have not occurred get the largest value of those that have, so that a loss with it
    holds their logits down as far as the plain loss does.

    Args:
        counts: How often each class has occurred, ``[classes]``.

    Returns:
        ``[classes]``, at most 0; all of them 0 if none has occurred.
    """
    frequencies = counts / counts.sum().clamp(min=1)
    most = frequencies.max()
    # By where, not by an if, which would wait for a GPU.
    most = torch.where(most > 0, most, 1)
    return torch.where(counts > 0, frequencies, most).log()


class LogitAdjustmentPlugin(SupervisedPlugin[Any], supports_distributed=True):
    """Keeps new classes, of which a mini-batch holds many images, from being preferred.

    A mini-batch of new images and exemplars shows each new class more often than each old one, and
    a network trained on that takes old classes for new ones. The criterion sees the logits plus
    ``weight * log(frequency of the class)``, so that the network learns what speaks for a class
    apart from how often it is shown; evaluation and metrics see the logits as they are.

    Frequencies are counted in the mini-batches of an experience, with the exemplars that
    :class:`~dc_replay.plugin.CondensedReplayPlugin` or ``ReplayPlugin`` has put into them; of an
    online stream, since the last boundary that it tells of. Exemplars that a plugin gives to the
    criterion by itself, as MIR and RAR do, are not counted, and not adjusted. In distributed
    training each process counts its own mini-batches.

    For a classifier with one column per class label, and strategies whose loss is the criterion of
    ``strategy.mb_output`` and integer labels. It comes before the plugins that add to the loss,
    such as :class:`~dc_replay.distillation.DistillationPlugin`, which are to see the logits as they
    are.

    Source: the logit adjusted loss of Menon et al., "Long-tail Learning via Logit Adjustment", ICLR
    2021; with a weight of 1 also the balanced softmax of Ren et al., "Balanced Meta-Softmax for
    Long-Tailed Visual Recognition", NeurIPS 2020.

    Args:
        weight: At least 0; 1 makes the error balanced over classes.

    Raises:
        ArgumentError: If the weight is out of range.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_number("weight", weight)
        self.weight = weight
        self._counts: Tensor | None = None
        self._plain: Tensor | None = None

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what would go wrong in silence.

        Raises:
            ArgumentError: If the model has a head for each task, the strategy a loss or a loop of
                its own, or a plugin that adds to the loss comes before this one.
        """
        check_one_head(
            strategy.model,
            "logit adjustment needs one column per class; with a head for each task, new classes "
            "do not compete with old ones",
        )
        if _has_own_loss(type(strategy)):
            raise ArgumentError(
                f"`strategy` is {type(strategy).__name__}, whose loss is not the criterion of its "
                f"outputs alone; use logit adjustment with Naive and plugins"
            )
        for plugin in strategy.plugins:
            if plugin is self:
                break
            adds = getattr(type(plugin), "before_backward", None)
            if adds is not None and adds is not SupervisedPlugin.before_backward:
                raise ArgumentError(
                    f"`plugins` has {type(plugin).__name__}, which may add to the loss, before "
                    f"{type(self).__name__}; put {type(self).__name__} before it"
                )

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start counting, unless this is a further part of an experience."""
        if _begins_anew(strategy.experience):
            self._counts = None

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Count the labels, and put adjusted logits before the criterion.

        Raises:
            ArgumentError: If the logits or labels are not those of one column per class.
        """
        logits, labels = strategy.mb_output, strategy.mb_y
        check_logits(logits)
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ArgumentError(
                f"`mbatch` holds labels of shape {list(labels.shape)} and {labels.dtype} for "
                f"outputs of shape {list(logits.shape)}; logit adjustment counts integer labels, "
                f"one for each image, with a column for each class"
            )
        columns = logits.shape[1]
        if self._counts is None:
            self._counts = torch.zeros(columns, device=logits.device)
        counts = self._counts.to(logits.device)
        counts = F.pad(counts, (0, columns - len(counts)))  # the classifier may have grown
        # Labels that cross entropy ignores are no columns. Unlike bincount this does not wait.
        known = (labels >= 0) & (labels < columns)
        counts.scatter_add_(0, labels.long().clamp(0, columns - 1), known.to(counts.dtype))
        self._counts, self._plain = counts, logits
        strategy.mb_output = logits + self.weight * log_prior(counts).to(logits.dtype)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Put the logits back as they are; the criterion has seen the others."""
        if self._plain is not None:
            strategy.mb_output = self._plain
        self._plain = None

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Leave nothing behind for a checkpoint that is not needed."""
        self._plain = None
        if not isinstance(strategy.experience, OnlineCLExperience):
            self._counts = None


def check_one_head(model: nn.Module, why: str) -> None:
    """Raise an ArgumentError if a model has a head for each task in place of a column per class."""
    if isinstance(DistributedHelper.unwrap_model(model), MultiTaskModule):
        raise ArgumentError(
            f"`model` is a MultiTaskModule, which has a head for each task, but {why}"
        )


def check_logits(output: object) -> None:
    """Raise an ArgumentError unless a model's output is a tensor."""
    if not isinstance(output, Tensor):
        raise ArgumentError(
            f"`model` returns a {type(output).__name__}, but here it must return its logits alone, "
            f"a tensor [batch, classes]; wrap it in a module that does"
        )


def _begins_anew(experience: Any) -> bool:
    """Whether an experience is not the further part of another."""
    if isinstance(experience, OnlineCLExperience):
        return bool(experience.access_task_boundaries and experience.is_first_subexp)
    return True


def _has_own_loss(strategy: type) -> bool:
    """Whether a strategy of Avalanche's goes through mini-batches, or computes its loss, otherwise.

    What users derive from these is trusted to call its ``criterion``.
    """
    usual = (SGDUpdate.training_epoch, SupervisedProblem.criterion)
    methods = (getattr(strategy, method.__name__, None) for method in usual)
    modules = (getattr(own, "__module__", "") for own in methods if own not in usual)
    return any(module.startswith("avalanche.") for module in modules)
