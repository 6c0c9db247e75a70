"""What :mod:`benchmarks.kills` kills: a process that condenses one experience after the other.

Started again with the same folder it goes on where it died: with the newest memory in the folder,
and within an experience with the state of its condensation. It prints what it begins. It stands
alone because the options of a command line take longer to import than everything here.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from benchmarks.image_data import LabelledImages
from benchmarks.methods import method
from benchmarks.presets import PRESETS
from dc_replay import Condenser, ExemplarMemory, Normalization, TotalImages, checkpoints
from dc_replay.networks import convnet_for

SHAPE = (3, 8, 8)
CLASSES = 3
IMAGES = 20
NEW = 2
"""Classes of an experience that are new; the other was in the one before as well."""

STARTING, WORKING, SAVING, ENDING = "starting", "condensing", "saving", "ending"
PHASES = (STARTING, WORKING, SAVING, ENDING)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to do.

    Attributes:
        folder: Where its memories and states are; it exists.
        method: A method that optimises.
        experiences: Experiences of the stream.
        outer: Matching networks of each.
        inner: Pixel steps with each.
        seed: Everything follows from it.
        device: Where to condense.
        avalanche: Train a strategy with the plugin, in place of condensing alone.
        as_shipped: Write states as rarely as the package does, which is at most a hundredth of the
            time, in place of after every matching network.
    """

    folder: str
    method: str
    experiences: int
    outer: int
    inner: int
    seed: int
    device: str
    avalanche: bool
    as_shipped: bool

    def condenser(self) -> Condenser:
        """The method, in the size of tests."""
        settings = replace(PRESETS["smoke"], outer=self.outer, inner=self.inner)
        network = convnet_for(SHAPE, width=settings.width)
        built = method(self.method, argument="method").condenser(
            settings, factor=2, ipc=self.budget().images // CLASSES, network=network
        )
        return replace(built, compile=False)

    def budget(self) -> TotalImages:
        """So few images that earlier classes are cut as others come."""
        return TotalImages(4 * self.classes())

    def classes(self) -> int:
        """Classes of all experiences."""
        return self.experiences * NEW + CLASSES - NEW

    def images(self, step: int) -> tuple[Tensor, Tensor]:
        """The uint8 images of an experience, and their labels."""
        generator = Generator().manual_seed(1_000 * self.seed + step)
        labels = torch.arange(CLASSES).repeat_interleave(IMAGES) + NEW * step
        level = labels.view(-1, 1, 1, 1) / self.classes()
        noise = torch.rand((len(labels), *SHAPE), generator=generator)
        return ((0.6 * level + 0.4 * noise) * 255).to(torch.uint8), labels

    def memory_file(self, step: int) -> Path:
        """The memory after an experience."""
        return Path(self.folder) / f"memory-{step}.safetensors"

    def model_file(self, step: int) -> Path:
        """The weights after an experience."""
        return Path(self.folder) / f"model-{step}.safetensors"

    def done(self) -> int:
        """How many experiences have been finished."""
        return sum(self.memory_file(step).exists() for step in range(self.experiences))


def condense(task: Task) -> None:
    """Condense what is not finished, experience by experience."""
    condenser, done = task.condenser(), task.done()
    normalization = Normalization.identity(SHAPE[0])
    memory = ExemplarMemory(
        budget=task.budget(),
        formation=condenser.formation,
        normalization=normalization,
        recipe=condenser.name,
    )
    if done:
        memory = ExemplarMemory.load(task.memory_file(done - 1), device=task.device)
    for step in range(done, task.experiences):
        _say(WORKING)
        images, labels = task.images(step)
        classes = labels.unique().tolist()
        quotas = memory.quotas_with(classes, SHAPE)
        found = condenser.condense(
            images.to(task.device),
            labels.to(task.device),
            quotas=quotas,
            normalization=normalization,
            generator=Generator(device=task.device).manual_seed(1_000 * task.seed + step),
            checkpoint=Path(task.folder) / f"condensing-{step}.safetensors",
        )
        memory.add(found.exemplars)
        _say(SAVING)
        memory.save(task.memory_file(step))


def train(task: Task) -> None:
    """Train a strategy with the plugin on what is not finished, experience by experience."""
    # Imported here because it takes several times as long as all the rest.
    from avalanche.benchmarks import DatasetExperience
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from dc_replay import CondensedReplayPlugin

    torch.manual_seed(task.seed)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(math.prod(SHAPE), task.classes())
    )
    replay = CondensedReplayPlugin(
        condenser=task.condenser(),
        budget=task.budget(),
        normalization=Normalization.identity(SHAPE[0]),
        seed=task.seed,
        progress=False,
        checkpoint_dir=Path(task.folder) / "condensing",
    )
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=32,
        device=task.device,
        plugins=[replay],
        evaluator=EvaluationPlugin(),
    )
    done = task.done()
    if done:
        model.load_state_dict(load_file(task.model_file(done - 1)))
        replay.memory = ExemplarMemory.load(task.memory_file(done - 1), device=task.device)
        replay.buffer.experiences = done
    for step in range(done, task.experiences):
        _say(WORKING)
        images, labels = task.images(step)
        dataset = as_classification_dataset(LabelledImages(images.float() / 255, labels.tolist()))
        torch.manual_seed(1_000 * task.seed + step)
        experience = DatasetExperience(dataset=dataset, current_experience=step)
        strategy.train(experience, eval_streams=[])
        _say(SAVING)
        # The memory comes last: where it is, the model is whole.
        save_file(model.state_dict(), task.model_file(step))
        replay.memory.save(task.memory_file(step))


def _say(phase: str) -> None:
    print(phase, flush=True)


def main(options: dict[str, Any]) -> None:
    """Do a task, given its fields."""
    task = Task(**options)
    torch.set_num_threads(1)
    if not task.as_shipped:
        checkpoints.SHARE = math.inf
    (train if task.avalanche else condense)(task)
    _say(ENDING)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
