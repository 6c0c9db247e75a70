"""Class-incremental learning with replay memories, compared at the same stored bytes.

    python -m benchmarks.class_incremental --data digits --methods random,dream_plus --out runs/x

Writes ``results.jsonl``, ``accuracy.png``, ``exemplars.png``, ``report.md`` and Avalanche's logs
into the output folder. Started again with the same folder, it goes on where it stopped.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
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
from tqdm.auto import tqdm

from benchmarks.compiled import compile_layers
from benchmarks.data import ImageData, class_order, keep_classes, load
from benchmarks.presets import Preset, condenser, network_factory, preset
from benchmarks.report import exemplar_sheet, write_report
from benchmarks.results import ResultStore, Row, environment
from dc_replay import RECIPES, ExemplarMemory, ImagesPerClass
from dc_replay.augment import augmentation
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.networks import set_precision
from strategies import PROTOCOLS, WITHOUT_RECIPE, Contender, Setup


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare replay memories on a class-incremental stream, at the same stored bytes.

    Attributes:
        data: digits, cifar10, cifar100, svhn, mnist, fashion, npz:PATH or folder:PATH.
        methods: Recipes, separated by commas; with protocol replay also naive, cumulative and
            stock_replay.
        protocol: What is trained on: the memory alone from the model before with distillation, the
            memory alone from scratch, or new data together with the memory.
        network: The network to train: convnet3 (or another depth), resnet10 or densenet121.
        preset: How much work to do: seconds, minutes on a CPU, or the published settings.
        ipc: Stored images per class.
        steps: Experiences that the classes are divided among.
        seeds: Seeds, separated by commas.
        order: Order of classes: shuffled by the seed, or the published one for CIFAR-100.
        out: Output folder.
        classes: Use only the first classes of the order.
        factor: Crops along each side of a stored image, for recipes that pack.
        width: Overrides the preset's channels of ConvNets.
        outer: Overrides the preset's matching networks.
        inner: Overrides the preset's pixel steps for each matching network.
        epochs: Overrides the preset's epochs of training.
        root: Where downloaded data are, or go.
        device: Where to run; the GPU where there is one.
        compile: Whether to compile what repeats.
        quiet: Show no progress bars.
    """

    data: str = "digits"
    methods: str = "random,herding,representative,idc,dream_plus"
    protocol: Literal["memory-only", "gdumb", "replay"] = "memory-only"
    network: str = "convnet3"
    preset: str = "fast"
    ipc: int = 20
    steps: int = 5
    seeds: str = "0"
    order: Literal["shuffled", "idc"] = "shuffled"
    out: Path = Path("runs/class_incremental")
    classes: int | None = None
    factor: int = 2
    width: int | None = None
    outer: int | None = None
    inner: int | None = None
    epochs: int | None = None
    root: Path = Path("data")
    device: str | None = None
    compile: Literal["auto", "always", "never"] = "auto"
    quiet: bool = False


def main(arguments: Arguments, command: str) -> str:
    """Run what is not finished, write the outputs, and return the table for the terminal.

    Raises:
        DCReplayError: If an argument cannot be used.
    """
    run = Run(arguments)
    run.store.claim(run.settings(), command=command)
    left = [
        (seed, method)
        for seed in run.seeds
        for method in run.methods
        if not all(run.store.finished(method, seed, step) for step in range(arguments.steps))
    ]
    with tqdm(
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
        self.preset = _overridden(preset(arguments.preset), arguments)
        self.methods = _methods(arguments)
        self.seeds = _numbers("seeds", arguments.seeds)
        self.device = _device(arguments.device)
        for name, least in {"ipc": 1, "steps": 1, "factor": 1}.items():
            if getattr(arguments, name) < least:
                raise ArgumentError(
                    f"`{name}` is {getattr(arguments, name)}, but must be at least {least}"
                )
        self.data = load(arguments.data, root=arguments.root)
        self.classes = arguments.classes or self.data.classes
        if self.classes % arguments.steps or self.classes < arguments.steps:
            raise ArgumentError(
                f"`steps` is {arguments.steps}, which does not divide the {self.classes} classes; "
                f"choose a divisor, or a number of `classes` that it divides"
            )
        self.store = ResultStore(arguments.out)

    def settings(self) -> Row:
        """What must not differ between rows that are compared."""
        arguments = asdict(self.arguments)
        for free in ("methods", "seeds", "out", "quiet", "root", "device", "compile"):
            del arguments[free]
        return {**arguments, **asdict(self.preset), "classes": self.classes}

    def contest(self, method: str, seed: int) -> list[Row]:
        """Run one method with one seed, from where it stopped; return the new rows."""
        steps = self.arguments.steps
        data = keep_classes(
            self.data,
            class_order(self.data, self.arguments.order, seed=seed, classes=self.classes),
        )
        stream = _stream(data, steps)
        torch.manual_seed(seed)
        contender = self._contender(method, seed, data)
        state = State(self.arguments.out / "state" / f"{method}-{seed}")
        done = self._resume(contender, state, method, seed, stream)
        rows = []
        for step in range(done, steps):
            torch.manual_seed(1_000_003 * (seed + 1) + step)
            row = self._step(contender, method, seed, step, data, stream)
            if not self.store.finished(method, seed, step):
                self.store.append(row)
                rows.append(row)
            state.save(contender, step + 1)
            if contender.buffer is not None and step == steps - 1 and seed == self.seeds[0]:
                contender.buffer.memory.save(self._memory_file(method))
        state.remove()
        return rows

    def _contender(self, method: str, seed: int, data: ImageData) -> Contender:
        arguments, settings = self.arguments, self.preset
        channels, height, width = data.image_shape
        per_step = self.classes // arguments.steps
        factory = network_factory(
            arguments.network, channels=channels, size=(height, width), width=settings.width
        )
        epochs, presentations = settings.epochs, arguments.factor**2
        images = len(data.x_train) // arguments.steps
        if arguments.protocol != "replay":
            images = per_step * arguments.ipc * presentations
        mode: Any = {"auto": "auto", "always": True, "never": False}[arguments.compile]
        batch = settings.gdumb_batch if arguments.protocol == "gdumb" else settings.batch
        model = compile_layers(
            factory(per_step),
            batch=2 * batch if arguments.protocol == "replay" else batch,
            mode=mode,
            steps=epochs * images // batch * arguments.steps,
        )
        set_precision(model, "auto", self.device)
        chosen = None
        if method in RECIPES:
            matching = network_factory(
                "convnet3" if arguments.network.startswith("resnet") else arguments.network,
                channels=channels,
                size=(height, width),
                width=settings.width,
            )
            chosen = condenser(
                method, settings, factor=arguments.factor, ipc=arguments.ipc, network=matching
            )
            chosen = replace(chosen, compile=mode)
        setup = Setup(
            model=model,
            classes_per_step=per_step,
            classes=self.classes,
            ipc=arguments.ipc,
            budget=ImagesPerClass(arguments.ipc),
            condenser=chosen,
            epochs=epochs,
            presentations_per_stored=presentations,
            batch=batch,
            lr=settings.lr,
            milestones=(0.5,) if arguments.protocol == "gdumb" else (0.6, 0.8),
            decay=0.1 if arguments.protocol == "gdumb" else 0.2,
            augment=augmentation("color", "crop", "flip", "scale", "rotate"),
            cutmix=0.5,
            device=self.device,
            seed=seed,
            evaluator=self._evaluator(method, seed),
            progress=not arguments.quiet,
        )
        if method in WITHOUT_RECIPE:
            return WITHOUT_RECIPE[method](setup)
        return PROTOCOLS[arguments.protocol](setup)

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
        started = time.perf_counter()
        strategy.train(stream.train_stream[step])
        seconds = time.perf_counter() - started
        condensing = buffer.seconds[-1] if buffer is not None else 0.0
        accuracies = _accuracies(strategy.eval(stream.test_stream[: step + 1]), step)
        per_step = self.classes // self.arguments.steps
        seen = (step + 1) * per_step
        test = torch.bincount(data.y_test, minlength=data.classes).view(-1, per_step).sum(1)
        weights = test[: step + 1].double()
        overall = float((torch.tensor(accuracies).double() * weights).sum() / weights.sum())
        stored = contender.stored_images()
        return {
            "method": method,
            "protocol": self.arguments.protocol,
            "seed": seed,
            "step": step,
            "classes_seen": seen,
            "accuracy": overall,
            "forgetting": self._forgetting(method, seed, accuracies),
            "experience_accuracies": accuracies,
            "stored_bytes": stored * data.x_train[0].nbytes,
            "images_per_class": stored / seen,
            "condense_seconds": condensing,
            "train_seconds": seconds - condensing,
            "network": self.arguments.network,
            "data": data.name,
            "preset": self.arguments.preset,
            **environment(self.device),
        }

    def _forgetting(self, method: str, seed: int, accuracies: list[float]) -> float | None:
        """Mean over earlier experiences of how far accuracy fell since they were learned."""
        falls = []
        for step, now in enumerate(accuracies[:-1]):
            row = self.store.find(method, seed, step)
            if row is None:
                return None
            falls.append(row["experience_accuracies"][step] - now)
        return sum(falls) / len(falls) if falls else None

    def _resume(
        self, contender: Contender, state: State, method: str, seed: int, stream: Any
    ) -> int:
        """Bring a contender to where its saved state is; return the steps that are done."""
        done = state.steps()
        finished = all(self.store.finished(method, seed, step) for step in range(done))
        if not done or not finished or contender.resume is None or contender.buffer is None:
            return 0
        model = contender.strategy.model
        for experience in stream.train_stream[:done]:
            avalanche_model_adaptation(model, experience)
        model.load_state_dict(load_file(state.model_file))
        memory = ExemplarMemory.load(state.memory_file, device=str(self.device))
        contender.buffer.memory = memory
        contender.buffer.seconds.extend([0.0] * done)
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
        for method in self.methods:
            path = self._memory_file(method)
            if path.exists():
                memory = ExemplarMemory.load(path)
                shown = memory.classes[:classes]
                rows = [memory.of_class(label) for label in shown]
                names = [self.data.class_names[order[label]] for label in shown]
                width = min([images, *(len(row) for row in rows)])
                sheet[method] = torch.stack([row[:width] for row in rows])
        if sheet:
            exemplar_sheet(sheet, self.arguments.out / "exemplars.png", class_names=names)


@dataclass
class State:
    """Where a run of one method and seed is: the model and memory after its last step."""

    folder: Path
    model_file: Path = field(init=False)
    memory_file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model_file = self.folder / "model.safetensors"
        self.memory_file = self.folder / "memory.safetensors"

    def steps(self) -> int:
        """Steps that are saved; 0 where nothing is."""
        done = self.folder / "steps"
        return int(done.read_text()) if done.exists() else 0

    def save(self, contender: Contender, steps: int) -> None:
        """Save a contender after some steps, if it can go on from there."""
        if contender.buffer is None or contender.resume is None:
            return
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.contiguous()
            for name, value in contender.strategy.model.state_dict().items()
        }
        save_file(weights, self.model_file)
        contender.buffer.memory.save(self.memory_file)
        # Written last: without it nothing of the above counts.
        (self.folder / "steps").write_text(str(steps))

    def remove(self) -> None:
        """Forget what is saved."""
        for path in (self.folder / "steps", self.model_file, self.memory_file):
            path.unlink(missing_ok=True)


def _stream(data: ImageData, steps: int) -> Any:
    normalization = data.normalization()
    transform = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(normalization.mean), list(normalization.std)),
        ]
    )

    def dataset(images: torch.Tensor, labels: torch.Tensor) -> Any:
        tensors = _Images(images, labels)
        both = {"train": (transform, None), "eval": (transform, None)}
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


class _Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images and labels, with the labels where Avalanche looks for them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.targets[index]


def _accuracies(metrics: dict[str, Any], step: int) -> list[float]:
    """Test accuracy on each experience so far, in percent."""
    found: dict[int, float] = {}
    for name, value in metrics.items():
        if name.startswith("Top1_Acc_Exp/eval_phase/test_stream"):
            found[int(name.rsplit("Exp", 1)[1])] = 100 * float(value)
    return [found[experience] for experience in range(step + 1)]


def _overridden(settings: Preset, arguments: Arguments) -> Preset:
    changes = {}
    for name in ("width", "outer", "inner", "epochs"):
        value = getattr(arguments, name)
        if value is not None:
            if value < 1:
                raise ArgumentError(f"`{name}` is {value}, but must be at least 1")
            changes[name] = value
    return replace(settings, **changes)


def _methods(arguments: Arguments) -> list[str]:
    known = [*RECIPES]
    if arguments.protocol == "replay":
        known += WITHOUT_RECIPE
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    unknown = [name for name in methods if name not in known]
    if unknown or not methods:
        raise ArgumentError(
            f"`methods` names {unknown or 'none'}, but the known ones with protocol "
            f"{arguments.protocol} are {', '.join(known)}"
        )
    return list(dict.fromkeys(methods))


def _numbers(name: str, text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ArgumentError(
            f"`{name}` is {text!r}, but must be whole numbers separated by commas, such as 0,1,2"
        ) from None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"`device` is {name!r}, which is not here: {str(error).splitlines()[0]}; "
            f"use cpu, or cuda where there is a GPU"
        ) from None
    return device


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = tyro.cli(Arguments, args=list(argv), description=__doc__)
    logging.getLogger("torch").setLevel(logging.ERROR)
    command = shlex.join(["python", "-m", "benchmarks.class_incremental", *argv])
    try:
        print(main(arguments, command))
    except DCReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nplots, exemplars and report: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli())
