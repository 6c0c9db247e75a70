"""Train fresh networks on condensed sets of all classes: the form of the papers' tables.

    python -m benchmarks.condensed_training --data cifar10 --recipes idc,idc+sm --ipc 1,10

Each method condenses all classes at once, once for each seed and number of images per class, and
networks are trained on the set from scratch, ``runs`` times each. With ``--networks`` they may be
others than the one that condensed. Writes ``results.jsonl`` and ``report.md``; started again, it
goes on where it stopped.

    python -m benchmarks.condensed_training --recipes idc,dream_plus+outer=2,dream_plus+outer=8

also draws accuracy over the seconds that condensing took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.allocator import keep_freed_memory
from benchmarks.condensed_sets import Condensery, FreshTraining
from benchmarks.data import ImageData
from benchmarks.methods import method as named_method
from benchmarks.presets import network_factory
from benchmarks.results import ResultStore, environment
from benchmarks.set_reports import write_training_report
from benchmarks.workload import Workload, at_least_1, command_line, names, numbers
from dc_replay._progress import progress
from dc_replay.errors import ArgumentError
from dc_replay.networks import computed_in


@dataclass(frozen=True, kw_only=True)
class Arguments(Workload):
    """Compare methods by what fresh networks learn from their condensed sets.

    Attributes:
        recipes: Recipes, separated by commas, to which modifiers are added, such as +sm, +mdc,
            DREAM+'s components (+representative, +init, +bidirectional), +compress=10, +lr=0.1 for
            the pixels' learning rate, +outer=4 for the number of matching networks and +inner=100
            for the pixel steps with each; all are in benchmarks/methods.py.
        ipc: Stored images per class, separated by commas.
        networks: Networks to train, separated by commas: convnet3 (or another depth; convnet3:128
            with a width of its own), resnet10, resnetap10 and densenet121.
        matching: The ConvNet that condenses.
        runs: Networks trained on each set.
        steps: Overrides the preset's gradient steps of training on a set.
    """

    recipes: str = "random,idc,dream_plus"
    ipc: str = "10"
    networks: str = "convnet3"
    matching: str = "convnet3"
    runs: int = 1
    steps: int | None = None
    out: Path = Path("runs/condensed_training")


def main(arguments: Arguments, command: str) -> str:
    """Run what is not finished, write the outputs, and return the table for the terminal.

    Raises:
        DCReplayError: If an argument cannot be used.
    """
    recipes, networks = names("recipes", arguments.recipes), names("networks", arguments.networks)
    sizes = numbers("ipc", arguments.ipc)
    at_least_1("ipc", min(sizes))
    arguments.counts("runs", "factor", "classes")
    settings = arguments.chosen_preset("width", "outer", "inner", steps="set_steps")
    everything = arguments.load()
    store = ResultStore(arguments.out)
    condensery = Condensery(arguments, settings, store, network=arguments.matching)
    _check(arguments, recipes, networks, condensery, everything)
    free = ("recipes", "ipc", "networks", "runs", "steps")
    store.claim(arguments.settings(settings, free=free), command=command)
    for seed in arguments.chosen_seeds():
        data = arguments.in_order(everything, seed=seed)
        for network in networks:
            left = [
                (name, ipc, run)
                for name in recipes
                for ipc in sizes
                for run in range(arguments.runs)
                if not store.finished(
                    name, seed, kind="accuracy", ipc=ipc, network=network, run=run
                )
            ]
            if left:
                _measure(arguments, condensery, network, data, seed, left)
    return write_training_report(arguments.out)


def _check(
    arguments: Arguments,
    recipes: Sequence[str],
    networks: Sequence[str],
    condensery: Condensery,
    data: ImageData,
) -> None:
    """Find out before anything takes time whether all that is named can be used."""
    for name in recipes:
        named_method(name, argument="recipes")
    if not arguments.matching.startswith("convnet"):
        raise ArgumentError(
            f"`matching` is {arguments.matching!r}, but ConvNets condense; name one, such as "
            f"convnet3"
        )
    channels, height, width = data.image_shape
    for network in (*networks, arguments.matching):
        network_factory(network, channels=channels, size=(height, width), width=1)
    condensery.check(recipes, numbers("ipc", arguments.ipc), data)


def _measure(
    arguments: Arguments,
    condensery: Condensery,
    network: str,
    data: ImageData,
    seed: int,
    left: Sequence[tuple[str, int, int]],
) -> None:
    """Train one network on the sets of some methods, sizes and runs."""
    training = FreshTraining(
        network,
        data,
        condensery.settings,
        device=condensery.device,
        mode=arguments.compile_mode(),
        precision=arguments.precision,
        quiet=arguments.quiet,
    )
    for name, ipc, run in progress(
        left, desc=f"{network}, seed {seed}", unit="run", disable=arguments.quiet
    ):
        found = condensery.condense(name, data, ipc=ipc, seed=seed)
        started = time.perf_counter()
        accuracy = training.accuracy(found, seed=1000 * seed + run)
        condensery.store.append(
            {
                "kind": "accuracy",
                "method": name,
                "ipc": ipc,
                "network": network,
                "seed": seed,
                "run": run,
                "accuracy": accuracy,
                "stored_bytes": found.exemplars.nbytes,
                "condense_seconds": found.seconds,
                "train_seconds": time.perf_counter() - started,
                "data": data.name,
                "preset": arguments.preset,
                "precision": computed_in(arguments.precision, condensery.device),
                "condense_precision": found.precision,
                **environment(condensery.device),
            }
        )


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.condensed_training", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(cli())
