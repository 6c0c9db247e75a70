"""Training iterations a second with replay, next to Avalanche's own and to bare tensors.

    python -m benchmarks.replay_throughput --data npz:cifar100.npz --out runs/replay_throughput

The second of two experiences is trained on with as many images of a full memory as new ones in each
batch. ``bare tensors`` is a loop written by hand that indexes bytes on the device: what is left of
an iteration without a framework and without a data loader. ``stock`` is Avalanche's ReplayPlugin,
``ours`` CondensedReplayPlugin, also beside DeviceResident. A network of one layer costs next to
nothing, as any does on a fast GPU. All ways take turns in one process. Writes ``results.json``.

What to expect without augmentation: ``ours`` 1.25 times the rate of ``stock`` from tensors and 1.8
times from pictures with one layer, with DeviceResident 2.5 and 10 times; and with DeviceResident at
most 1.05 times the time of bare tensors with ConvNet-3.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from benchmarks.data import load
from benchmarks.image_data import DataError
from benchmarks.presets import network_factory
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.timing import Threshold, failures, ratio, wait_for
from benchmarks.workload import Missed, Place, at_least_1, command_line, names
from dc_replay import CondensedReplayPlugin, DeviceResident, ExemplarMemory, ImagesPerClass, random
from dc_replay.batch_changes import cropped, flipped
from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization

BARE = "bare tensors"
SOURCES = ("tensors", "PIL")
WAYS = ("stock", "ours", "ours + DeviceResident")
VARIANTS = (BARE, *(f"{way}, {source}" for way in WAYS for source in SOURCES))

# What a run with --gate must reach on any machine with one layer, at the size that tests use.
GATES = {
    ("ours", "tensors"): 1.1,
    ("ours", "PIL"): 1.3,
    ("ours + DeviceResident", "tensors"): 1.8,
    ("ours + DeviceResident", "PIL"): 4.0,
}
ONE_LAYER = "one-layer"
PADDING = 4


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Compare ways to replay by the iterations that they train in a second.

    Attributes:
        data: npz:PATH, cifar100 or another source of images; random bytes where it is not given.
        images: New images, those of the second experience, in whole numbers of each class. A last
            batch that is smaller is left out.
        memory: Images in the memory of the first, at least one of each class and a batch in all.
        classes: Classes of both together, half of them new.
        iterations: The least that are timed in a round, by whole epochs after one that is not.
        rounds: Rounds in which all ways take turns; the medians count.
        batch: New images in a batch, and as many of the memory.
        model: one-layer and convnetD for a depth D, separated by commas.
        width: Channels of a ConvNet's layers.
        augment: Crop images out of padded ones and mirror them at random.
        gate: Exit with 1 where a ratio with one layer misses a modest threshold.
        root: Where downloaded data are, or go.
        out: Output folder.
    """

    data: str | None = None
    images: int = 2560
    memory: int = 200
    classes: int = 20
    iterations: int = 120
    rounds: int = 5
    batch: int = 64
    model: str = "one-layer,convnet3"
    width: int = 32
    augment: bool = False
    gate: bool = False
    root: Path = Path("data")
    out: Path = Path("runs/replay_throughput")


def main(arguments: Arguments, command: str) -> str:
    """Measure, write ``results.json``, and return the table for the terminal.

    Raises:
        ArgumentError: If an argument cannot be used.
        Missed: If a threshold is, and there is to be a gate.
    """
    for name in ("images", "memory", "iterations", "rounds", "batch", "width"):
        at_least_1(name, getattr(arguments, name))
    models = names("model", arguments.model)
    if arguments.gate and ONE_LAYER not in models:
        raise ArgumentError(
            f"`model` is {arguments.model!r}, but the gate holds ratios of {ONE_LAYER}; name it, "
            f"or leave --gate out"
        )
    contest = Contest(arguments, arguments.chosen_device())
    makes = {model: contest.network(model) for model in models}
    rows = [row for model, make in makes.items() for row in contest.measure(model, make)]
    write_figures(
        arguments.out,
        "replay_throughput",
        rows,
        command=command,
        settings=asdict(arguments),
        device=contest.device,
    )
    shown = text_table(*cells(rows))
    missed = failures(thresholds(rows)) if arguments.gate else []
    if missed:
        print(shown)
        raise Missed("\n".join(missed))
    return shown


class Contest:
    """All ways to train on the second of two experiences."""

    def __init__(self, arguments: Arguments, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.pixels, self.labels, self.classes = _images(arguments)
        scale = (0.5,) * self.pixels.shape[1], (0.25,) * self.pixels.shape[1]
        self.normalization = Normalization(*scale)
        self.per_epoch = len(self.labels) // 2 // arguments.batch
        self.epochs = math.ceil(arguments.iterations / self.per_epoch)
        self.streams = {source: self._stream(source) for source in SOURCES}
        self.stored = self._memory()

    def network(self, name: str) -> Callable[[], nn.Module]:
        """What builds a model for the images, or an ArgumentError if its name is unknown."""
        channels, height, width = self.pixels.shape[1:]
        if name == ONE_LAYER:
            return lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(channels * height * width, self.classes)
            )
        factory = network_factory(
            name, channels=channels, size=(height, width), width=self.arguments.width
        )
        return partial(factory, self.classes)

    def measure(self, model: str, make: Callable[[], nn.Module]) -> list[dict[str, Any]]:
        """Time all ways with a model, in turns.

        Args:
            model: Its name, for the record.
            make: Builds it.

        Returns:
            For each way the iterations a second of each round, and where there are any the seconds
            of bringing the experience to the device.
        """
        rows = [{"model": model, "variant": name, "rates": []} for name in VARIANTS]
        for _ in range(self.arguments.rounds):
            for row in rows:
                rate, bringing = self._time(row["variant"], make)
                row["rates"].append(rate)
                if bringing is not None:
                    row.setdefault("bringing_seconds", []).append(bringing)
        return rows

    def _time(self, variant: str, make: Callable[[], nn.Module]) -> tuple[float, float | None]:
        torch.manual_seed(0)
        network = make().to(self.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        if variant == BARE:
            return self._bare(network, optimizer), None
        way, _, source = variant.partition(", ")
        plugins: list[Any] = [self._stock(source) if way == "stock" else self._ours()]
        if way.endswith("DeviceResident"):
            plugins.insert(0, DeviceResident())
        watch = EpochTimes(self.device)
        with warnings.catch_warnings():
            # Nothing is logged, so that it costs nothing.
            warnings.filterwarnings("ignore", "No loggers specified")
            strategy = Naive(
                model=network,
                optimizer=optimizer,
                criterion=nn.CrossEntropyLoss(),
                train_mb_size=self.arguments.batch,
                train_epochs=1 + self.epochs,
                device=self.device,
                plugins=[*plugins, watch],
                evaluator=None,
            )
            strategy.train(self.streams[source][1], drop_last=True)
        bringing = plugins[0].seconds[0] if isinstance(plugins[0], DeviceResident) else None
        return self._rate(watch.seconds), bringing

    def _rate(self, epochs: Sequence[float]) -> float:
        """Iterations a second; the first epoch warms up."""
        return self.per_epoch * self.epochs / sum(epochs[1:])

    def _bare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        generator = Generator(device=self.device).manual_seed(0)
        old = self.labels < self.classes // 2
        new, memory = (
            [part[chosen].to(self.device) for part in (self.pixels, self.labels)]
            for chosen in (~old, old.nonzero().flatten()[: self.arguments.memory])
        )
        scale = self.normalization.scale(self.device)
        black = torch.zeros_like(self.pixels[:1, :, :1, :1]).to(self.device)
        batch, loss = self.arguments.batch, nn.CrossEntropyLoss()
        seconds = []
        for _ in range(1 + self.epochs):
            wait_for(self.device)
            began = time.perf_counter()
            order = torch.randperm(len(new[0]), generator=generator, device=self.device)
            for index in order.split(batch)[: self.per_epoch]:
                others = torch.randint(
                    len(memory[0]), (batch,), generator=generator, device=self.device
                )
                images, labels = (
                    torch.cat([a.index_select(0, index), b.index_select(0, others)])
                    for a, b in zip(new, memory, strict=True)
                )
                if self.arguments.augment:
                    images = crop_and_mirror(images, generator, fill=black)
                images = scale.normalise(images)
                optimizer.zero_grad()
                loss(network(images), labels).backward()
                optimizer.step()
            wait_for(self.device)
            seconds.append(time.perf_counter() - began)
        return self._rate(seconds)

    def _stock(self, source: str) -> ReplayPlugin:
        policy = StockBuffer(self.arguments.memory)
        policy.update_from_dataset(self.streams[source][0].dataset)
        return ReplayPlugin(mem_size=self.arguments.memory, storage_policy=policy)

    def _ours(self) -> CondensedReplayPlugin:
        plugin = self._replay()
        plugin.memory = copy.deepcopy(self.stored)
        return plugin

    def _replay(self) -> CondensedReplayPlugin:
        return CondensedReplayPlugin(
            condenser=random(),
            budget=ImagesPerClass(self.arguments.memory // (self.classes // 2)),
            augment=self._augment(),
            progress=False,
        )

    def _memory(self) -> ExemplarMemory:
        plugin = self._replay()
        plugin.buffer.remember(self.streams["tensors"][0], device=self.device)
        return plugin.memory

    def _stream(self, source: str) -> Any:
        """The train stream of a benchmark of two experiences, transformed the way users do."""
        mean, std = self.normalization.mean, self.normalization.std
        size = self.pixels.shape[-2:]
        random_changes: list[Any] = []
        shown: list[Any]
        if source == "PIL":
            shown = [v1.ToTensor(), v1.Normalize(mean, std)]
            if self.arguments.augment:
                random_changes = [v1.RandomCrop(size, PADDING), v1.RandomHorizontalFlip()]
        else:
            shown = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
            if self.arguments.augment:
                random_changes = [v2.RandomCrop(size, PADDING), v2.RandomHorizontalFlip()]
        compose = v1.Compose if source == "PIL" else v2.Compose
        data = Pictures(self.pixels, self.labels, source)
        return nc_benchmark(
            data,
            data,
            2,
            task_labels=False,
            fixed_class_order=list(range(self.classes)),
            train_transform=compose([*random_changes, *shown]),
            eval_transform=compose(shown),
        ).train_stream

    def _augment(self) -> Callable[[Tensor, Generator], Tensor] | None:
        """The random changes on normalised batches."""
        if not self.arguments.augment:
            return None
        black = torch.zeros((1, self.normalization.channels, 1, 1), device=self.device)
        return partial(crop_and_mirror, fill=self.normalization.apply(black))


def crop_and_mirror(images: Tensor, generator: Generator, *, fill: Tensor) -> Tensor:
    """Crop each image out of its padded self at random, and mirror every other."""
    images = cropped(images, generator, padding=(PADDING,) * 4, fill=fill)
    return flipped(images, generator, axis=-1, probability=0.5)


class Pictures(Dataset[tuple[Any, int]]):
    """Images in memory, as uint8 tensors or as pictures.

    Args:
        pixels: uint8 ``[images, channels, height, width]``.
        labels: int64 ``[images]``.
        source: ``tensors`` or ``PIL``.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, source: str) -> None:
        make = v1.functional.to_pil_image if source == "PIL" else Tensor.contiguous
        self.images = [make(image) for image in pixels]
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]


class StockBuffer(ClassBalancedBuffer):
    """Avalanche's buffer, without its warning that Avalanche's plugin calls it by an old name."""

    def update(self, strategy: Any, **kwargs: Any) -> None:
        """Store images of the current experience."""
        self.post_adapt(strategy, strategy.experience)


class EpochTimes(SupervisedPlugin[Any], supports_distributed=True):
    """Notes the seconds of each epoch of training, without what comes before the first."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: list[float] = []
        self._began = 0.0

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        wait_for(self.device)
        self._began = time.perf_counter()

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        wait_for(self.device)
        self.seconds.append(time.perf_counter() - self._began)


def thresholds(rows: Sequence[dict[str, Any]]) -> list[Threshold]:
    """What a gate asks of the rates with one layer."""
    rates = {row["variant"]: row["rates"] for row in rows if row["model"] == ONE_LAYER}
    return [
        Threshold(
            f"{way}, {source}: rate over stock",
            ratio(rates[f"{way}, {source}"], rates[f"stock, {source}"]),
            least=least,
        )
        for (way, source), least in GATES.items()
    ]


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as a table."""
    header = ("model", "variant", "it/s", "x stock", "x bare", "bringing s")
    return header, list(_lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    rates = {(row["model"], row["variant"]): row["rates"] for row in rows}
    for row in rows:
        model, variant = row["model"], row["variant"]
        _, comma, source = variant.partition(", ")
        stock = rates[model, f"stock, {source}"] if comma else None
        bringing = row.get("bringing_seconds")
        yield (
            model,
            variant,
            f"{statistics.median(row['rates']):.1f}",
            "" if stock is None else f"{ratio(row['rates'], stock):.2f}",
            f"{ratio(row['rates'], rates[model, BARE]):.2f}",
            "" if bringing is None else f"{statistics.median(bringing):.2f}",
        )


def _images(arguments: Arguments) -> tuple[Tensor, Tensor, int]:
    """The images of both experiences, class after class, their labels, and how many classes."""
    half = arguments.classes // 2
    if half < 1 or arguments.classes % 2:
        raise ArgumentError(
            f"`classes` is {arguments.classes}, but both experiences have equally many; pass an "
            f"even number of at least 2"
        )
    if arguments.memory < half:
        raise ArgumentError(
            f"`memory` is {arguments.memory}, but the first experience has {half} classes; pass at "
            f"least one image for each"
        )
    if arguments.memory < arguments.batch:
        raise ArgumentError(
            f"`memory` is {arguments.memory}, of which Avalanche's loader makes no mini-batch of "
            f"{arguments.batch}, so that it would replay nothing; pass at least as many, or a "
            f"smaller batch"
        )
    each = -(-max(arguments.images, arguments.memory) // half)
    labels = torch.arange(arguments.classes).repeat_interleave(each)
    if arguments.data is None:
        generator = Generator().manual_seed(0)
        shape = (len(labels), 3, 32, 32)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return pixels, labels, arguments.classes
    data = load(arguments.data, root=arguments.root)
    rows = [(data.y_train == label).nonzero().flatten()[:each] for label in labels.unique()]
    short = [str(label) for label, found in enumerate(rows) if len(found) < each]
    if short:
        raise DataError(
            f"`data` is {arguments.data!r}, which has fewer than {each} images of class "
            f"{short[0]}; lower `images`, `memory` or `classes`"
        )
    return data.x_train[torch.cat(rows)], labels, arguments.classes


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.replay_throughput", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(cli())
