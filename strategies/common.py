"""What all strategies of the benchmark share, so that they differ in their memory alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dc_replay import DistillationPlugin, LogitAdjustmentPlugin
from dc_replay._progress import progress
from dc_replay.augment import Augmentation, cutmix
from dc_replay.budgets import Budget, ImagesPerClass
from dc_replay.buffer import CondensedBuffer
from dc_replay.condense import Condenser
from dc_replay.networks import FeatureNetwork
from strategies.training_state import TrainingState


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a strategy is built from; the same for all methods of a comparison.

    Attributes:
        model: The network to train, freshly initialised.
        classes_per_step: New classes of an experience; labels come in order of arrival.
        classes: Classes of the whole stream.
        ipc: The most stored images per class.
        total_images: The most stored images of all classes; None where only ``ipc`` bounds them.
        budget: Both, as a budget.
        condenser: What fills the memory; None for strategies without one of ours.
        epochs: Epochs in an experience.
        presentations_per_stored: Images shown in an epoch for each stored image, where the memory
            alone is trained on: the same for every method, however many images a stored one holds.
        batch: Images in a mini-batch; where new data are trained on, as many exemplars join them.
        lr: Learning rate of SGD.
        milestones: Shares of the epochs after which the rate falls.
        decay: By what factor it falls.
        match_storage: Where new data are trained on beside packed or compressed exemplars, the
            share of them that is shown as storing would leave it. Raw exemplars have nothing to
            match.
        match_condensing: There, how strong a noise new images get beside condensed exemplars; 0 is
            none.
        augment: Augmentation of whole mini-batches, exemplars and new images alike. None where new
            images are augmented by the experience's training transforms, and exemplars are left to
            the memory.
        cutmix: Chance that a mini-batch is mixed, if whole ones are augmented.
        logit_adjustment: Weight of the logit adjustment to how often classes are shown; 0 is none.
        distillation: Weight of the distillation from the model before; 0 is none.
        device: Where to run.
        seed: Source of all randomness.
        checkpoint_dir: Where a condensation that was interrupted goes on.
        training_state: The file from which training within an experience goes on; None begins the
            experience anew.
        evaluator: Avalanche's.
        progress: Whether to show progress bars.
    """

    model: FeatureNetwork
    classes_per_step: int
    classes: int
    ipc: int
    total_images: int | None
    budget: Budget
    condenser: Condenser | None
    epochs: int
    presentations_per_stored: int
    batch: int
    lr: float
    milestones: tuple[float, ...]
    decay: float
    match_storage: float
    match_condensing: float
    augment: Augmentation | None
    cutmix: float
    logit_adjustment: float
    distillation: float
    device: torch.device
    seed: int
    checkpoint_dir: Path
    training_state: Path | None
    evaluator: EvaluationPlugin
    progress: bool


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A strategy and what it stores.

    Attributes:
        strategy: Trains and evaluates.
        stored_images: How many images it stores at the moment.
        buffer: Its condensed memory, if it has one.
        resume: Sets it up as after some steps, given how many; None if it cannot be.
        shrink: Cuts what it stores to a number of images per class, now and for classes to come;
            None if it stores nothing.
    """

    strategy: Naive
    stored_images: Callable[[], int]
    buffer: CondensedBuffer | None = None
    resume: Callable[[int], None] | None = None
    shrink: Callable[[int], None] | None = None


def shrinking(buffer: CondensedBuffer) -> Callable[[int], None]:
    """Cut a condensed memory, see :attr:`Contender.shrink`."""

    def shrink(ipc: int) -> None:
        buffer.memory.limit(ImagesPerClass(ipc))

    return shrink


def growing_head(setup: Setup) -> nn.Module:
    """The model, with a classifier that gets outputs for the classes of each experience."""
    head = setup.model.head
    if isinstance(head, nn.Linear):
        setup.model.head = IncrementalClassifier(
            head.in_features, initial_out_features=setup.classes_per_step, masking=False
        )
    return setup.model


def naive(setup: Setup, plugins: Sequence[SupervisedPlugin[Any]] = ()) -> Naive:
    """Plain training on what the plugins make of each experience, and on what the setup adds."""
    model = growing_head(setup)
    added: list[SupervisedPlugin[Any]] = []
    if setup.logit_adjustment:
        added.append(LogitAdjustmentPlugin(weight=setup.logit_adjustment))
    if setup.distillation:
        added.append(DistillationPlugin(weight=setup.distillation))
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    if setup.augment is not None:
        augment = AugmentBatch(setup.augment, setup.cutmix, setup.seed)
        added.append(augment)
        criterion = augment.criterion
    schedule = Schedule(setup)
    optimizer = torch.optim.SGD(model.parameters(), lr=setup.lr, momentum=0.9, weight_decay=5e-4)
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        criterion=criterion,
        train_mb_size=setup.batch,
        train_epochs=setup.epochs,
        eval_mb_size=500,
        device=setup.device,
        plugins=[*plugins, *added, schedule],
        evaluator=setup.evaluator,
    )
    if setup.training_state is not None:
        strategy.plugins.append(TrainingState(setup.training_state))
    return strategy


def resume(strategy: Naive, setup: Setup, steps: int) -> None:
    """Give back to distillation the model of before, which is the strategy's after some steps."""
    for plugin in strategy.plugins:
        if isinstance(plugin, DistillationPlugin):
            learned = range(steps * setup.classes_per_step)
            plugin.hold(strategy.model.to(strategy.device), learned)


class AugmentBatch(SupervisedPlugin[Any]):
    """Augments whole mini-batches, exemplars and new images alike, and mixes them by CutMix.

    Its ``criterion`` is the cross entropy of the mixed labels. It comes after the plugins that
    put images into the mini-batch.
    """

    def __init__(self, augment: Augmentation, probability: float, seed: int) -> None:
        super().__init__()
        self.augment = augment
        self.probability = probability
        self.seed = seed
        self._generator = Generator()
        self._mixed: tuple[Tensor, Tensor] | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the draws of this experience."""
        step = strategy.experience.current_experience
        self._generator = Generator().manual_seed(1_000 * self.seed + step)

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Augment and mix."""
        images = self.augment(strategy.mbatch[0], self._generator)
        images, partners, share = cutmix(images, self._generator, probability=self.probability)
        strategy.mbatch[0] = images
        self._mixed = (strategy.mbatch[1][partners], share)

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Forget the labels of the batch."""
        self._mixed = None

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, of the mixed labels while a mixed batch is trained on."""
        loss = F.cross_entropy(logits, labels)
        if self._mixed is None:
            return loss
        partners, share = self._mixed
        return share * loss + (1 - share) * F.cross_entropy(logits, partners)


class Schedule(SupervisedPlugin[Any]):
    """Starts every experience with a fresh optimiser at full rate, and lowers it at milestones."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self._epoch = 0
        self._bar: Any = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Reset the optimiser."""
        strategy.optimizer.state.clear()
        self._epoch = 0

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Set the learning rate of this epoch."""
        epochs, milestones = self.setup.epochs, self.setup.milestones
        if self._bar is None:
            self._bar = progress(
                initial=self._epoch,
                total=epochs,
                desc="train",
                unit="epoch",
                leave=False,
                disable=not self.setup.progress,
            )
        passed = sum(self._epoch >= milestone * epochs for milestone in milestones)
        for group in strategy.optimizer.param_groups:
            group["lr"] = self.setup.lr * self.setup.decay**passed
        self._epoch += 1

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
