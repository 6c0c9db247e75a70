"""Result rows summarised: methods side by side, each over its seeds.

Accuracy is in percent and forgetting in percentage points, in the rows and here. A row's
``condense_seconds`` and ``train_seconds`` are those of its own step.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.image_data import HELD_OUT
from dc_replay.errors import ArgumentError


def accuracy_on(data: str) -> str:
    """Which accuracy rows give, by the name of their data."""
    return "validation accuracy" if data.endswith(HELD_OUT) else "test accuracy"


@dataclass(frozen=True)
class Summary:
    """One method under one protocol, over its seeds.

    Attributes:
        method: The method's name.
        seeds: The seeds that have at least one result.
        accuracy: For each number of classes seen, one percentage per seed that got there.
        average: The mean over all steps, one percentage per seed that finished them.
        forgetting: The forgetting after the last step, one number per seed that has it.
        stored_bytes: Bytes in memory after the last step.
        bytes_at: The same after each number of classes seen.
        images_per_class: Stored images per class after the last step.
        condense_seconds: Condensing time over all steps, one per seed that finished them.
        train_seconds: Training time over all steps, likewise.
    """

    method: str
    seeds: tuple[int, ...]
    accuracy: dict[int, list[float]]
    average: list[float]
    forgetting: list[float]
    stored_bytes: int
    bytes_at: dict[int, int]
    images_per_class: float
    condense_seconds: list[float]
    train_seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """The methods that may be compared: same data, network and protocol.

    Attributes:
        data: Name of the images.
        network: Name of the trained network.
        protocol: Name of the protocol.
        classes_seen: The numbers of classes after each step, ascending.
        methods: One summary per method, in order of first appearance.
    """

    data: str
    network: str
    protocol: str
    classes_seen: tuple[int, ...]
    methods: tuple[Summary, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that any method has results of."""
        return tuple(sorted({seed for method in self.methods for seed in method.seeds}))

    @property
    def same_seeds(self) -> bool:
        """Whether every method has results of every seed."""
        return all(method.seeds == self.seeds for method in self.methods)

    @property
    def complete(self) -> bool:
        """Whether every method has finished every step of each of its seeds."""
        return all(
            len(method.accuracy.get(step, ())) == len(method.seeds)
            for method in self.methods
            for step in self.classes_seen
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different numbers of stored bytes among the methods that finished the last step."""
        arrived = [m for m in self.methods if m.accuracy[self.classes_seen[-1]]]
        return tuple(sorted({method.stored_bytes for method in arrived}))

    @property
    def unequal(self) -> dict[int, dict[str, int]]:
        """The bytes by method after those steps, by classes seen, where they are not the same."""
        steps = {
            step: {m.method: m.bytes_at[step] for m in self.methods if step in m.bytes_at}
            for step in self.classes_seen
        }
        return {step: stored for step, stored in steps.items() if len(set(stored.values())) > 1}

    @property
    def stored(self) -> str:
        """The stored bytes in words: one number when they are equal, else the range."""
        return _ends([_bytes(size) for size in self.sizes]) + " stored"

    @property
    def title(self) -> str:
        """What is compared: data, protocol and bytes."""
        return f"{self.data} · {self.protocol} · {self.stored}"

    @property
    def subtitle(self) -> str:
        """How it was measured: network and seeds."""
        return f"{self.network} · {self.over_seeds}{'' if self.complete else ' · unfinished'}"

    @property
    def over_seeds(self) -> str:
        """How many seeds the figures are of."""
        number = _ends([str(count) for count in sorted({len(m.seeds) for m in self.methods})])
        return "one seed" if number == "1" else f"mean and standard deviation of {number} seeds"


def compare(rows: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """Group rows into comparisons and summarise each method over its seeds.

    Of several rows of one method, seed and step, the newest counts.

    Raises:
        ArgumentError: If there are no rows.
    """
    groups: dict[tuple[str, str, str], dict[str, dict[tuple[int, int], Mapping[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["data"], row["network"], row["protocol"]), {})
        group.setdefault(row["method"], {})[row["seed"], row["classes_seen"]] = row
    if not groups:
        raise ArgumentError("`rows` is empty; run a benchmark into this folder first")
    comparisons = []
    for (data, network, protocol), methods in groups.items():
        seen = tuple(sorted({step for cells in methods.values() for _, step in cells}))
        summaries = tuple(_summary(method, cells, seen) for method, cells in methods.items())
        comparisons.append(Comparison(data, network, protocol, seen, summaries))
    return comparisons


def _summary(
    method: str, cells: Mapping[tuple[int, int], Mapping[str, Any]], seen: Sequence[int]
) -> Summary:
    seeds = tuple(sorted({seed for seed, _ in cells}))
    finished = [seed for seed in seeds if all((seed, step) in cells for step in seen)]
    last = cells[max(cells, key=lambda cell: cell[1])]

    def over_steps(seed: int, field: str) -> list[float]:
        return [cells[seed, step].get(field) or 0.0 for step in seen]

    forgetting = [cells[seed, seen[-1]].get("forgetting") for seed in finished]
    return Summary(
        method=method,
        seeds=seeds,
        accuracy={
            step: [cells[seed, step]["accuracy"] for seed in seeds if (seed, step) in cells]
            for step in seen
        },
        average=[statistics.fmean(over_steps(seed, "accuracy")) for seed in finished],
        forgetting=[value for value in forgetting if value is not None],
        stored_bytes=last["stored_bytes"],
        bytes_at={step: row["stored_bytes"] for (_, step), row in cells.items()},
        images_per_class=last["images_per_class"],
        condense_seconds=[sum(over_steps(seed, "condense_seconds")) for seed in finished],
        train_seconds=[sum(over_steps(seed, "train_seconds")) for seed in finished],
    )


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _ends(ascending: Sequence[str]) -> str:
    """The first and the last, or the one that is both."""
    return " to ".join(dict.fromkeys((*ascending[:1], *ascending[-1:])))


def _bytes(count: int) -> str:
    for unit, size in (("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
