"""One condensation cut to every smaller size, against the other ways to get there.

    python -m benchmarks.shrink --data cifar100 --classes 20 --ipc 10 --sizes 1,2,3,5,10 --out DIR

At each size a fresh network is trained on what four methods store: ``mdc`` and ``prefix`` keep the
first images of a set condensed with and without multisize condensation, ``k-means`` chooses among
the latter by k-means, and ``separate`` condenses anew at that size. Writes ``results.jsonl``,
``shrink.png``, ``prefixes.png`` and ``report.md``; started again, it goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks.allocator import keep_freed_memory
from benchmarks.condensed_sets import CondensedSet, Condensery, FreshTraining
from benchmarks.data import ImageData
from benchmarks.methods import method as named_method
from benchmarks.presets import Preset, matching_factory
from benchmarks.results import ResultStore, Row, environment
from benchmarks.set_reports import write_shrink_report
from benchmarks.workload import Workload, command_line, names, numbers
from dc_replay import Exemplars
from dc_replay._progress import progress
from dc_replay.errors import ArgumentError
from dc_replay.networks import MatchingNetwork, computed_in
from dc_replay.sampling import Embed, nearest_to_centres
from dc_replay.training import NetworkTraining

METHODS = ("mdc", "prefix", "k-means", "separate")


@dataclass(frozen=True, kw_only=True)
class Arguments(Workload):
    """Cut one condensation to smaller sizes, and compare with the other ways to get there.

    Attributes:
        recipe: The method that is condensed with and without multisize condensation.
        methods: What to compare, separated by commas.
        network: The network to train: convnet3 (or another depth; convnet3:128 with a width
            of its own), resnet10, resnetap10 or densenet121.
        ipc: Stored images per class of the sets that are cut.
        sizes: Stored images per class to compare at, separated by commas.
        steps: Overrides the preset's gradient steps of training on a set.
        period: Overrides the preset's outer iterations between two choices.
    """

    recipe: str = "dream_plus"
    methods: str = "mdc,prefix,k-means,separate"
    network: str = "convnet3"
    ipc: int = 10
    sizes: str = "1,2,3,5,10"
    steps: int | None = None
    period: int | None = None
    out: Path = Path("runs/shrink")


def main(arguments: Arguments, command: str) -> str:
    """Run what is not finished, write the outputs, and return the table for the terminal.

    Raises:
        DCReplayError: If an argument cannot be used.
    """
    settings = arguments.chosen_preset(
        "width", "outer", "inner", steps="set_steps", period="multisize_period"
    )
    sizes = numbers("sizes", arguments.sizes)
    arguments.counts("ipc", "factor", "classes")
    if not sizes or min(sizes) < 1 or max(sizes) > arguments.ipc:
        raise ArgumentError(
            f"`sizes` is {arguments.sizes!r}, but a set of {arguments.ipc} images per class can "
            f"only be cut to sizes from 1 to {arguments.ipc}"
        )
    unknown = [name for name in names("methods", arguments.methods) if name not in METHODS]
    if unknown:
        raise ArgumentError(
            f"`methods` names {', '.join(unknown)}, but the known ones are {', '.join(METHODS)}"
        )
    *before, _ = named_method(f"{arguments.recipe}+mdc", argument="recipe").modifiers
    if "mdc" in dict(before):
        raise ArgumentError(
            f"`recipe` is {arguments.recipe!r}, which has multisize condensation already; name it "
            f"without +mdc"
        )
    everything = arguments.load()
    store = ResultStore(arguments.out)
    Condensery(arguments, settings, store, network=arguments.network).check(
        [arguments.recipe], [*sizes, arguments.ipc], everything
    )
    store.claim(
        arguments.settings(settings, free=("methods", "sizes", "steps", "period")), command=command
    )
    for seed in arguments.chosen_seeds():
        data = arguments.in_order(everything, seed=seed)
        _Contest(arguments, settings, store, data, seed).run(sorted(sizes))
    return write_shrink_report(arguments.out)


class _Contest:
    """All methods at all sizes, for one seed."""

    def __init__(
        self,
        arguments: Arguments,
        settings: Preset,
        store: ResultStore,
        data: ImageData,
        seed: int,
    ) -> None:
        self.arguments = arguments
        self.settings = settings
        self.store = store
        self.data = data
        self.seed = seed
        self.device = arguments.chosen_device()
        self.condensery = Condensery(arguments, settings, store, network=arguments.network)
        self._embed: Embed | None = None
        self.training = FreshTraining(
            arguments.network,
            data,
            settings,
            device=self.device,
            mode=arguments.compile_mode(),
            precision=arguments.precision,
            quiet=arguments.quiet,
        )

    def run(self, sizes: Sequence[int]) -> None:
        """Measure what is missing."""
        left = [
            (name, size)
            for name in METHODS
            if name in names("methods", self.arguments.methods)
            for size in sizes
            if not self.store.finished(name, self.seed, kind="accuracy", size=size)
        ]
        for name, size in progress(
            left, desc=f"seed {self.seed}", unit="set", disable=self.arguments.quiet
        ):
            # At the full size three of the methods are the same set, which is trained on once.
            twin = self._twin(name, size)
            if twin is not None:
                self.store.append({**twin, "method": name})
                continue
            found = self._set(name, size)
            started = time.perf_counter()
            accuracy = self.training.accuracy(found, seed=self.seed)
            self.store.append(self._row(name, size, found, accuracy, time.perf_counter() - started))

    def _twin(self, name: str, size: int) -> Row | None:
        if size < self.arguments.ipc or name in METHODS[:2]:
            return None
        return self.store.find("prefix", self.seed, kind="accuracy", size=size)

    def _set(self, name: str, size: int) -> CondensedSet:
        recipe, ipc = self.arguments.recipe, self.arguments.ipc
        if name == "separate":
            return self.condensery.condense(recipe, self.data, ipc=size, seed=self.seed)
        if name == "mdc":
            recipe += "+mdc"
        found = self.condensery.condense(recipe, self.data, ipc=ipc, seed=self.seed)
        if name == "k-means":
            return self._reselected(found, size)
        return found.prefix(size)

    def _reselected(self, found: CondensedSet, size: int) -> CondensedSet:
        """Choose stored images whose mean features are nearest to the centres of k-means."""
        generator = Generator(device=self.device).manual_seed(self.seed)
        if self._embed is None:
            self._embed = self._embedding()
        pixels, labels = [], []
        for label in found.exemplars.classes:
            stored = found.exemplars.of_class(label)
            decoded = found.formation.decode(found.formation.open(stored))
            features = self._embed(self.data.normalization().apply(decoded))
            means = features.view(len(stored), -1, features.shape[1]).mean(dim=1)
            chosen = nearest_to_centres(means, size, generator)
            rest = [i for i in range(len(stored)) if i not in chosen.tolist()]
            chosen = torch.cat([chosen, chosen.new_tensor(rest)])[:size]
            pixels.append(stored[chosen])
            labels += [label] * len(chosen)
        exemplars = Exemplars(
            torch.cat(pixels), torch.tensor(labels, device=found.exemplars.labels.device)
        )
        return CondensedSet(exemplars, found.formation, found.seconds, [], found.precision)

    def _embedding(self) -> Embed:
        """Features of a matching network that was trained for one epoch on the real images."""
        torch.manual_seed(self.seed)
        channels, height, width = self.data.image_shape
        network = MatchingNetwork(
            matching_factory(
                self.arguments.network,
                channels=channels,
                size=(height, width),
                width=self.settings.width,
            ),
            self.data.classes,
            torch.zeros(1, channels, height, width, device=self.device),
        )
        parameters, training = network.fresh(), NetworkTraining()
        training.train(
            training.step_function(network),
            parameters,
            training.optimizer(parameters),
            self.data.x_train.to(self.device),
            self.data.y_train.to(self.device),
            scale=self.data.normalization().scale(self.device),
            generator=Generator(device=self.device).manual_seed(self.seed),
        )

        def embed(images: Tensor) -> Tensor:
            with torch.no_grad():
                return network(parameters, images)[1]

        return embed

    def _row(
        self, name: str, size: int, found: CondensedSet, accuracy: float, seconds: float
    ) -> Row:
        return {
            "kind": "accuracy",
            "method": name,
            "size": size,
            "accuracy": accuracy,
            "seed": self.seed,
            "stored_bytes": found.exemplars.nbytes,
            "condense_seconds": found.seconds,
            "train_seconds": seconds,
            "data": self.data.name,
            "network": self.arguments.network,
            "preset": self.arguments.preset,
            "precision": computed_in(self.arguments.precision, self.device),
            "condense_precision": found.precision,
            **environment(self.device),
        }


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(Arguments, main, module="benchmarks.shrink", description=__doc__, argv=argv)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(cli())
