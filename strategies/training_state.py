"""The state of training within an experience, from which a run that was killed goes on."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Generator, Tensor

from dc_replay._writing import remove_unfinished, write_whole
from dc_replay.traces import TraceNoise


class TrainingState(SupervisedPlugin[Any]):
    """Writes the state after an epoch now and then, and starts from it where there is one.

    To be appended to the plugins of a strategy that is complete, because it has to come after
    Avalanche's clock, too: it puts back what the others begin an experience with, which is their
    numbers, tensors and generators, those of the noise that they add, and those of the data loader.
    What they hold besides, such as a memory or the model before, has to be theirs by then.

    Args:
        path: The file, of the experience that is trained on; others' are ignored.
        seconds: How much training may be lost.

    Attributes:
        seconds_before: How long processes that were interrupted had trained on the experience.
    """

    def __init__(self, path: Path, *, seconds: float = 30.0) -> None:
        super().__init__()
        self.path = path
        self.seconds = seconds
        self.seconds_before = 0.0
        self._all_epochs = 0
        self._began = self._saved = 0.0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Go on after the last epoch that was written, if there is one."""
        self._began = self._saved = time.perf_counter()
        self.seconds_before = 0.0
        self._all_epochs = strategy.train_epochs
        remove_unfinished(self.path)
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        if state["experience"] != strategy.experience.current_experience:
            return
        self.seconds_before = state["seconds"]
        strategy.model.load_state_dict(state["model"])
        parameters = dict(strategy.model.named_parameters())
        for name, kept in state["optimizer"].items():
            strategy.optimizer.state[parameters[name]] = _on(kept, strategy.device)
        for (holder, _), kept in zip(_holders(strategy), state["held"], strict=True):
            _restore(holder, _on(kept, strategy.device))
        torch.set_rng_state(state["random"])
        if strategy.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_of_gpu"], strategy.device)
        strategy.train_epochs -= state["epochs"]

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Write the state after the last epoch, and after others if it is time."""
        epochs = strategy.clock.train_exp_epochs
        now = time.perf_counter()
        if epochs < self._all_epochs and now - self._saved < self.seconds:
            return
        state = {
            "experience": strategy.experience.current_experience,
            "epochs": epochs,
            "seconds": self.seconds_before + now - self._began,
            "model": strategy.model.state_dict(),
            # By name: the numbers of an optimiser's own state count what it held before, too.
            "optimizer": {
                name: strategy.optimizer.state[parameter]
                for name, parameter in strategy.model.named_parameters()
                if parameter in strategy.optimizer.state
            },
            "held": [_kept(*holder) for holder in _holders(strategy)],
            "random": torch.get_rng_state(),
        }
        if strategy.device.type == "cuda":
            state["random_of_gpu"] = torch.cuda.get_rng_state(strategy.device)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        contents = io.BytesIO()
        torch.save(state, contents)
        write_whole(self.path, contents.getvalue(), name="training_state")
        self._saved = time.perf_counter()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Have all epochs again in the next experience."""
        strategy.train_epochs = self._all_epochs


def _holders(strategy: Any) -> Iterator[tuple[Any, tuple[type, ...]]]:
    """Whose attributes change from epoch to epoch, and those of which types."""
    for plugin in strategy.plugins:
        if not isinstance(plugin, TrainingState):
            noise = [part for part in vars(plugin).values() if isinstance(part, TraceNoise)]
            for holder in (plugin, *noise):
                yield holder, (int, float, Tensor, Generator)
    yield strategy.dataloader, (Generator,)


def _kept(holder: Any, types: tuple[type, ...]) -> dict[str, Any]:
    return {
        name: value.get_state() if isinstance(value, Generator) else value
        for name, value in vars(holder).items()
        if isinstance(value, types)
    }


def _restore(holder: Any, kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        now = getattr(holder, name, None)
        if isinstance(now, Generator):
            now.set_state(value.cpu())
        else:
            setattr(holder, name, value)


def _on(kept: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in kept.items()
    }
