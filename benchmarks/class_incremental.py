"""Class-incremental learning with replay memories, compared at the same stored bytes.

    python -m benchmarks.class_incremental --data digits --methods random,dream_plus --out runs/x

Writes ``results.jsonl``, ``accuracy.png``, ``exemplars.png``, ``report.md`` and Avalanche's logs
into the output folder. Started again with the same folder, it goes on where it stopped, also inside
a condensation or, with a condensed memory, the training on an experience.

    torchrun --nproc-per-node 4 -m benchmarks.class_incremental ...

condenses all experiences first, on all processes together, into the folder ``condensed``. Then the
first process alone trains and writes, as without ``torchrun``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.logging import CSVLogger, TensorboardLogger
from avalanche.models.utils import avalanche_model_adaptation
from avalanche.training.plugins import EvaluationPlugin
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

from benchmarks import distributed
from benchmarks.allocator import keep_freed_memory
from benchmarks.compiled import compile_layers
from benchmarks.data import ImageData, class_order
from benchmarks.image_data import LabelledImages
from benchmarks.methods import method as named_method
from benchmarks.presets import matching_factory, network_factory
from benchmarks.report import exemplar_sheet, write_report
from benchmarks.results import ResultStore, Row, environment
from benchmarks.workload import Workload, command_line, names
from dc_replay import (
    Budget,
    CondensedBuffer,
    Condenser,
    ExemplarMemory,
    ImagesPerClass,
    Smallest,
    TotalBytes,
    TotalImages,
)
from dc_replay._progress import progress
from dc_replay.augment import augmentation
from dc_replay.errors import ArgumentError
from dc_replay.networks import computed_in, set_precision
from dc_replay.pixels import quantise
from strategies import PROTOCOLS, WITHOUT_RECIPE, Contender, Setup
from strategies.training_state import TrainingState

_BESIDE_NEW_DATA = ("logit_adjustment", "distillation", "match_condensing")


@dataclass(frozen=True, kw_only=True)
class Arguments(Workload):
    """Compare replay memories on a class-incremental stream, at the same stored bytes.

    Attributes:
        methods: Methods, separated by commas: recipes, to which modifiers are added, as in
            dream_plus+sm+mdc or herding+compress=10 (all are in benchmarks/methods.py); with
            protocol replay also naive, cumulative, and stock_replay, stock_herding and
            stock_reservoir, which are Avalanche's.
        network: The network to train: convnet3 (or another depth; convnet3:128 with a width
            of its own), resnet10, resnetap10 or densenet121.
        protocol: What is trained on: the memory alone from the model before with distillation, the
            memory alone from scratch, or new data together with the memory.
        ipc: Stored images per class.
        steps: Experiences that the classes are divided among.
        budget: A total that holds over the whole stream besides the images per class:
            total-bytes:N or total-images:N, in stored bytes or images.
        shrink_at: STEP:IPC cuts the memory to IPC images per class before the experience STEP,
            counted from 0, is learned.
        match_storage: With protocol replay, the share of new images that are shown as storing would
            leave them, beside packed or compressed exemplars; 0 leaves all as they are.
        match_condensing: With protocol replay, how strong a noise new images get beside condensed
            exemplars, as a multiple of what these have more than they have at each frequency; 0
            leaves them as they are. Beside other exemplars they always are. The plugin's own
            default is 0.5 beside images condensed in transform code.
        logit_adjustment: With protocol replay, the weight of the logit adjustment to how often each
            class is shown; 0 is none.
        distillation: With protocol replay, the weight of the distillation from the model before; 0
            is none. The protocol memory-only always has it, with weight 1.
        augmentation: Whole mini-batches, exemplars and new images alike, by colour, crop, flip,
            scale, rotation and CutMix; or, with protocol replay, the experience's training
            transforms by the padded crops and flips of Avalanche's SplitCIFAR100, for each memory
            to deal with as it does when it is attached.
        epochs: Overrides the preset's epochs of training.
        condensed: A folder to keep condensed experiences in, for runs that train something else on
            the same ones: another network, or under another protocol. What is there is not
            condensed again; it has to be of the same preset and numbers of images.
    """

    methods: str = "random,herding,representative,idc,dream_plus"
    protocol: Literal["memory-only", "gdumb", "replay"] = "memory-only"
    network: str = "convnet3"
    ipc: int = 20
    steps: int = 5
    budget: str | None = None
    shrink_at: str | None = None
    match_storage: float = 1.0
    match_condensing: float = 0.0
    logit_adjustment: float = 0.0
    distillation: float = 0.0
    augmentation: Literal["batch", "training"] = "batch"
    epochs: int | None = None
    condensed: Path | None = None
    out: Path = Path("runs/class_incremental")


def main(arguments: Arguments, command: str) -> str:
    """Run what is not finished, write the outputs, and return the table for the terminal.

    Raises:
        DCReplayError: If an argument cannot be used.
    """
    if distributed.processes() > 1 and arguments.condensed is None:
        arguments = replace(arguments, condensed=arguments.out / "condensed")
    run = Run(arguments)
    if distributed.is_first():
        run.store.claim(run.settings(), command=command)
    left = [
        (seed, method)
        for seed in run.seeds
        for method in run.methods
        if not all(run.store.finished(method, seed, step=step) for step in range(arguments.steps))
    ]
    if distributed.processes() > 1:
        distributed.condense_first(left, run.memories, run.device, cut=run.cut)
    with progress(
        total=len(left) * arguments.steps, desc="all", unit="step", disable=arguments.quiet
    ) as bar:
        for seed, method in left:
            for row in run.contest(method, seed):
                bar.update()
                bar.set_postfix_str(
                    f"{method} {row['classes_seen']} classes {row['accuracy']:.1f}%"
                )
    run.draw_exemplars()
    return write_report(arguments.out)


class Run:
    """The parsed arguments, the data and the results of one invocation."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.preset = arguments.chosen_preset("width", "outer", "inner", "epochs")
        self.methods = _methods(arguments)
        self.seeds = arguments.chosen_seeds()
        self.device = arguments.chosen_device()
        arguments.counts("ipc", "steps", "factor", "classes")
        self.data = arguments.load()
        self.classes = arguments.classes or self.data.classes
        if self.classes % arguments.steps or self.classes < arguments.steps:
            raise ArgumentError(
                f"`steps` is {arguments.steps}, which does not divide the {self.classes} classes; "
                f"choose a divisor, or a number of `classes` that it divides"
            )
        if not 0 <= arguments.match_storage <= 1:
            raise ArgumentError(
                f"`match_storage` is {arguments.match_storage}, but is a share of the new images, "
                f"from 0 to 1"
            )
        self.added = {name: getattr(arguments, name) for name in _BESIDE_NEW_DATA}
        for name, weight in self.added.items():
            if not 0 <= weight < float("inf"):
                raise ArgumentError(f"`{name}` is {weight}, but must be at least 0 and finite")
            if weight and arguments.protocol != "replay":
                raise ArgumentError(
                    f"`{name}` is {weight}, but `protocol` is {arguments.protocol}; only replay "
                    f"beside new data takes it"
                )
        if arguments.augmentation == "training" and arguments.protocol != "replay":
            raise ArgumentError(
                f"`augmentation` is training, but `protocol` is {arguments.protocol}; only replay "
                f"beside new data has training transforms"
            )
        self.total = _total(arguments.budget, classes=self.classes, image=self.data.x_train[0])
        self.cut = _cut(arguments)
        self.store = ResultStore(arguments.out)

    def settings(self) -> Row:
        """What must not differ between rows that are compared."""
        # Left out while they are as they always were, so that older results stay comparable.
        absent = [name for name, weight in self.added.items() if not weight]
        absent += ["augmentation"] if self.arguments.augmentation == "batch" else []
        return self.arguments.settings(
            self.preset, free=("methods", "condensed", *absent), classes=self.classes
        )

    @property
    def protocol(self) -> str:
        """What is trained on, with which losses besides, and how it is augmented."""
        words = [
            f"{name.replace('_', ' ')} {weight:g}" for name, weight in self.added.items() if weight
        ]
        words += ["training transforms"] if self.arguments.augmentation == "training" else []
        return ", ".join((self.arguments.protocol, *words))

    def contest(self, method: str, seed: int) -> list[Row]:
        """Run one method with one seed, from where it stopped; return the new rows."""
        steps = self.arguments.steps
        data = self.arguments.in_order(self.data, seed=seed)
        stream = _stream(data, steps, self.arguments.augmentation)
        torch.manual_seed(seed)
        state = State(self.arguments.out / "state" / f"{method}-{seed}")
        condensing = self.arguments.condensed or state.condensing
        # Others begin with the first step in any case.
        training = (
            None if method in WITHOUT_RECIPE else state.training(self.settings(), self.device)
        )
        contender = self._contender(method, seed, data, condensing, training)
        done = self._resume(contender, state, method, seed, stream)
        if done < state.steps():  # of rows that are not there any more
            state.remove()
        rows = []
        for step in range(done, steps):
            torch.manual_seed(1_000_003 * (seed + 1) + step)
            row = self._step(contender, method, seed, step, data, stream)
            if not self.store.finished(method, seed, step=step):
                self.store.append(row)
                rows.append(row)
            state.save(contender, step + 1)
            if contender.buffer is not None and step == steps - 1 and seed == self.seeds[0]:
                contender.buffer.memory.save(self._memory_file(method))
        state.remove()
        return rows

    def _contender(
        self,
        method: str,
        seed: int,
        data: ImageData,
        condensing: Path,
        training: Path | None = None,
    ) -> Contender:
        arguments, settings = self.arguments, self.preset
        channels, height, width = data.image_shape
        per_step = self.classes // arguments.steps
        factory = network_factory(
            arguments.network, channels=channels, size=(height, width), width=settings.width
        )
        epochs, presentations = settings.epochs, arguments.factor**2
        batches = arguments.augmentation == "batch"
        images = len(data.x_train) // arguments.steps
        if arguments.protocol != "replay":
            images = per_step * arguments.ipc * presentations
        mode = arguments.compile_mode()
        batch = settings.gdumb_batch if arguments.protocol == "gdumb" else settings.batch
        model = compile_layers(
            factory(per_step),
            batch=2 * batch if arguments.protocol == "replay" else batch,
            mode=mode,
            steps=epochs * images // batch * arguments.steps,
        )
        set_precision(model, arguments.precision, self.device)
        chosen = None if method in WITHOUT_RECIPE else self._condenser(method, data)
        setup = Setup(
            model=model,
            classes_per_step=per_step,
            classes=self.classes,
            ipc=arguments.ipc,
            total_images=self._total_images(),
            budget=self._budget(),
            condenser=chosen,
            epochs=epochs,
            presentations_per_stored=presentations,
            batch=batch,
            lr=settings.lr,
            milestones=(0.5,) if arguments.protocol == "gdumb" else (0.6, 0.8),
            decay=0.1 if arguments.protocol == "gdumb" else 0.2,
            match_storage=arguments.match_storage,
            augment=augmentation("color", "crop", "flip", "scale", "rotate") if batches else None,
            cutmix=0.5,
            **self.added,
            device=self.device,
            seed=seed,
            checkpoint_dir=condensing,
            training_state=training,
            evaluator=self._evaluator(method, seed),
            progress=not arguments.quiet,
        )
        if method in WITHOUT_RECIPE:
            return WITHOUT_RECIPE[method](setup)
        return PROTOCOLS[arguments.protocol](setup)

    def _condenser(self, method: str, data: ImageData) -> Condenser:
        arguments, settings = self.arguments, self.preset
        channels, height, width = data.image_shape
        matching = matching_factory(
            arguments.network, channels=channels, size=(height, width), width=settings.width
        )
        built = named_method(method).condenser(
            settings, factor=arguments.factor, ipc=arguments.ipc, network=matching
        )
        return replace(built, compile=arguments.compile_mode(), precision=arguments.precision)

    def memories(self, left: Sequence[tuple[int, str]]) -> Iterator[tuple[CondensedBuffer, Any]]:
        """For each seed and method that optimises, an empty memory and its experiences."""
        for seed, method in left:
            data = self.arguments.in_order(self.data, seed=seed)
            if method in WITHOUT_RECIPE:
                continue
            condenser = self._condenser(method, data)
            if condenser.objective is not None:
                buffer = CondensedBuffer(
                    condenser=condenser,
                    budget=self._budget(),
                    seed=seed,
                    progress=not self.arguments.quiet,
                    checkpoint_dir=self.arguments.condensed,
                )
                stream = _stream(data, self.arguments.steps, self.arguments.augmentation)
                yield buffer, stream.train_stream

    def _budget(self) -> Budget:
        each = ImagesPerClass(self.arguments.ipc)
        return each if self.total is None else Smallest((each, self.total))

    def _total_images(self) -> int | None:
        if isinstance(self.total, TotalBytes):
            return self.total.bytes // self.data.x_train[0].nbytes
        return None if self.total is None else self.total.images

    def _evaluator(self, method: str, seed: int) -> EvaluationPlugin:
        logs = self.arguments.out / "logs" / f"{method}-{seed}"
        logs.mkdir(parents=True, exist_ok=True)
        return EvaluationPlugin(
            accuracy_metrics(experience=True, stream=True),
            forgetting_metrics(experience=True, stream=True),
            loggers=[CSVLogger(str(logs)), TensorboardLogger(str(logs / "tensorboard"))],
        )

    def _step(
        self, contender: Contender, method: str, seed: int, step: int, data: ImageData, stream: Any
    ) -> Row:
        buffer, strategy = contender.buffer, contender.strategy
        if self.cut is not None and self.cut[0] == step and contender.shrink is not None:
            contender.shrink(self.cut[1])
        started = time.perf_counter()
        strategy.train(stream.train_stream[step])
        seconds = time.perf_counter() - started
        condensing, before = 0.0, 0.0  # the second is no part of the seconds of this process
        if buffer is not None:
            condensing, before = buffer.seconds[-1], buffer.seconds_before[-1]
        for plugin in strategy.plugins:
            if isinstance(plugin, TrainingState):
                seconds += plugin.seconds_before
        accuracies = _accuracies(strategy.eval(stream.test_stream[: step + 1]), step)
        per_step = self.classes // self.arguments.steps
        seen = (step + 1) * per_step
        test = torch.bincount(data.y_test, minlength=data.classes).view(-1, per_step).sum(1)
        weights = test[: step + 1].double()
        overall = float((torch.tensor(accuracies).double() * weights).sum() / weights.sum())
        stored = contender.stored_images()
        return {
            "method": method,
            "protocol": self.protocol,
            "seed": seed,
            "step": step,
            "classes_seen": seen,
            "accuracy": overall,
            "forgetting": self._forgetting(method, seed, accuracies),
            "experience_accuracies": accuracies,
            "stored_bytes": stored * data.x_train[0].nbytes,
            "images_per_class": stored / seen,
            "condense_seconds": condensing,
            "train_seconds": seconds - (condensing - before),
            "network": self.arguments.network,
            "data": data.name,
            "preset": self.arguments.preset,
            "iterations": strategy.clock.train_exp_iterations,
            "precision": computed_in(self.arguments.precision, self.device),
            **environment(self.device),
        }

    def _forgetting(self, method: str, seed: int, accuracies: list[float]) -> float | None:
        """Mean over earlier experiences of how far accuracy fell since they were learned."""
        falls = []
        for step, now in enumerate(accuracies[:-1]):
            row = self.store.find(method, seed, step=step)
            if row is None:
                return None
            falls.append(row["experience_accuracies"][step] - now)
        return sum(falls) / len(falls) if falls else None

    def _resume(
        self, contender: Contender, state: State, method: str, seed: int, stream: Any
    ) -> int:
        """Bring a contender to where its saved state is; return the steps that are done."""
        done = state.steps()
        finished = all(self.store.finished(method, seed, step=step) for step in range(done))
        if not done or not finished or contender.resume is None or contender.buffer is None:
            return 0
        model = contender.strategy.model
        for experience in stream.train_stream[:done]:
            avalanche_model_adaptation(model, experience)
        model_file, memory_file = state.files(done)
        model.load_state_dict(load_file(model_file))
        memory = ExemplarMemory.load(memory_file, device=str(self.device))
        contender.buffer.memory = memory
        contender.buffer.experiences = done
        contender.resume(done)
        return done

    def _memory_file(self, method: str) -> Path:
        folder = self.arguments.out / "memories"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{method}.safetensors"

    def draw_exemplars(self, *, classes: int = 10, images: int = 10) -> None:
        """Draw what each method stores of the first classes."""
        sheet: dict[str, torch.Tensor] = {}
        order = class_order(
            self.data, self.arguments.order, seed=self.seeds[0], classes=self.classes
        )
        names: list[str] = []
        # Of earlier calls into this folder, too, as in the plot beside it.
        for method in dict.fromkeys(row["method"] for row in self.store.rows()):
            path = self._memory_file(method)
            if path.exists():
                memory = ExemplarMemory.load(path)
                shown = memory.classes[:classes]
                formation = memory.formation
                # With compression, all images that a stored one holds.
                opened = [formation.open(memory.of_class(label)) for label in shown]
                rows = [quantise(formation.layers(images)) for images in opened]
                names = [self.data.class_names[order[label]] for label in shown]
                width = min([images, *(len(row) for row in rows)])
                sheet[method] = torch.stack([row[:width] for row in rows])
        if sheet:
            exemplar_sheet(sheet, self.arguments.out / "exemplars.png", class_names=names)


@dataclass(frozen=True)
class State:
    """Where a run of one method and seed is.

    The model and the memory after its last step, and how far condensing and training are in the
    next one. Whoever is killed meanwhile leaves one step or the next, never a mixture.
    """

    folder: Path

    @property
    def condensing(self) -> Path:
        """The folder of the condensation's own states."""
        return self.folder / "condensing"

    def training(self, settings: Row, device: torch.device) -> Path:
        """The file of the state of training within a step, with these settings and device alone."""
        known = json.dumps({**settings, "device": device.type}, sort_keys=True)
        digest = hashlib.sha256(known.encode()).hexdigest()
        return self.folder / f"training-{digest[:16]}.pt"

    def steps(self) -> int:
        """Steps that are saved; 0 where nothing is."""
        whole = [0]
        for path in self.folder.glob("after-*"):
            whole.append(int(path.name.removeprefix("after-")))
        return max(whole)

    def files(self, steps: int) -> tuple[Path, Path]:
        """The model and the memory after some steps."""
        after = self.folder / f"after-{steps}"
        return after / "model.safetensors", after / "memory.safetensors"

    def save(self, contender: Contender, steps: int) -> None:
        """Save a contender after some steps, if it can go on from there."""
        if contender.buffer is None or contender.resume is None:
            return
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        weights = {
            name: value.contiguous()
            for name, value in contender.strategy.model.state_dict().items()
        }
        save_file(weights, unfinished / "model.safetensors")
        contender.buffer.memory.save(unfinished / "memory.safetensors")
        # Under this name it counts.
        unfinished.rename(self.folder / f"after-{steps}")
        shutil.rmtree(self.folder / f"after-{steps - 1}", ignore_errors=True)
        shutil.rmtree(self.condensing, ignore_errors=True)
        for path in self.folder.glob("training-*"):
            path.unlink()

    def remove(self) -> None:
        """Forget what is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _stream(data: ImageData, steps: int, augmented: str) -> Any:
    normalization = data.normalization()
    seen = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(normalization.mean), list(normalization.std)),
    ]
    _, height, width = data.image_shape
    crop = v2.RandomCrop((height, width), padding=max(height, width) // 8)  # 4 for CIFAR's images
    changes = [crop, v2.RandomHorizontalFlip()]
    trained = [*changes, *seen] if augmented == "training" else seen
    both = {"train": (v2.Compose(trained), None), "eval": (v2.Compose(seen), None)}

    def dataset(images: torch.Tensor, labels: torch.Tensor) -> Any:
        tensors = LabelledImages(images, labels.tolist())
        # Avalanche's own class-balanced buffers add task labels, and so need them here.
        return TaskAwareSupervisedClassificationDataset(
            [tensors],
            transform_groups=both,
            data_attributes=[
                DataAttribute(tensors.targets, "targets"),
                TaskLabels([0] * len(tensors)),
            ],
        )

    return class_incremental_benchmark(
        {
            "train": dataset(data.x_train, data.y_train),
            "test": dataset(data.x_test, data.y_test),
        },
        class_order=list(range(data.classes)),
        num_experiences=steps,
    )


def _accuracies(metrics: dict[str, Any], step: int) -> list[float]:
    """Test accuracy on each experience so far, in percent."""
    found: dict[int, float] = {}
    for name, value in metrics.items():
        if name.startswith("Top1_Acc_Exp/eval_phase/test_stream"):
            found[int(name.rsplit("Exp", 1)[1])] = 100 * float(value)
    return [found[experience] for experience in range(step + 1)]


def _methods(arguments: Arguments) -> list[str]:
    others = WITHOUT_RECIPE if arguments.protocol == "replay" else {}
    methods = names("methods", arguments.methods)
    for name in methods:
        if name in WITHOUT_RECIPE and not others:
            raise ArgumentError(
                f"`methods` names {name!r}, which trains on new data, but `protocol` is "
                f"{arguments.protocol}; compare it with protocol replay"
            )
        if name not in others:
            named_method(name)
    return methods


def _total(
    text: str | None, *, classes: int, image: torch.Tensor
) -> TotalBytes | TotalImages | None:
    if text is None:
        return None
    kind, _, number = text.partition(":")
    kinds: dict[str, type[TotalBytes | TotalImages]] = {
        "total-bytes": TotalBytes,
        "total-images": TotalImages,
    }
    if kind not in kinds or not number.isdigit() or int(number) < 1:
        raise ArgumentError(
            f"`budget` is {text!r}, but must be total-bytes:N or total-images:N with a whole "
            f"number of at least 1"
        )
    total = kinds[kind](int(number))
    total.quotas(list(range(classes)), image_bytes=image.nbytes)
    return total


def _cut(arguments: Arguments) -> tuple[int, int] | None:
    text = arguments.shrink_at
    if text is None:
        return None
    if arguments.budget is not None:
        raise ArgumentError("`shrink_at` and `budget` both bound the memory; pass one of them")
    step, _, ipc = text.partition(":")
    fits = step.isdigit() and ipc.isdigit()
    if not fits or not 0 < int(step) < arguments.steps or not 0 < int(ipc) <= arguments.ipc:
        raise ArgumentError(
            f"`shrink_at` is {text!r}, but must be STEP:IPC with a step from 1 to "
            f"{arguments.steps - 1} and from 1 to {arguments.ipc} images per class"
        )
    return int(step), int(ipc)


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.class_incremental", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(cli())
