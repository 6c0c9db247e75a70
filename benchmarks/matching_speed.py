"""How fast condensing is, next to the plain way of doing the same.

    python -m benchmarks.matching_speed --widths 64,128 --ipc 10,20,50 --out runs/matching_speed

The plain way is a module, autograd and float32, one class after the other, in the same process and
with the same images, weights and draws. Writes ``results.json``.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.allocator import keep_freed_memory
from benchmarks.data import load
from benchmarks.eager import EagerMatching
from benchmarks.presets import PRESETS
from benchmarks.presets import condenser as preset_condenser
from benchmarks.results import write_figures
from benchmarks.tables import Table, text_table
from benchmarks.timing import (
    Stopwatch,
    Threshold,
    alternating,
    failures,
    peak_bytes,
    ratio,
    seconds,
)
from benchmarks.workload import Missed, Place, at_least_1, command_line, names, numbers
from dc_replay import Condenser, OnReal
from dc_replay.errors import ArgumentError
from dc_replay.matching import ClassBatch
from dc_replay.networks import Parameters, Precision, convnet_for, has_bfloat16
from dc_replay.pixels import Normalization, dequantise, quantise
from dc_replay.programs import Plan, Programs, programs
from dc_replay.sampling import RealImages, Representative
from dc_replay.terms import Sides

SIZE = (3, 32, 32)
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

# What a run with --gate must reach on any machine, at the small size that tests run it with.
GATE_STEP = 1.0
GATE_ITERATION = 1.0
# Far above what a unit near 0 does that is on in one way of adding up and off in another; what a
# wrong formula does is near 1. Tests compare to 1e-9 in float64.
FLOAT32_ERROR = 1e-2
BFLOAT16_ERROR = 0.3


@dataclass(frozen=True, kw_only=True)
class Arguments(Place):
    """Time the matching step and a whole inner iteration against plain, eager float32.

    Attributes:
        data: Images of 32x32 pixels, as for the other benchmarks; None makes some up.
        root: Where downloaded data are, or go.
        recipes: idc, dream or dream_plus, separated by commas.
        widths: Channels of the matching network, separated by commas.
        ipc: Stored images per class, separated by commas.
        classes: Classes of the experience.
        images: Real images of each class.
        real_batch: Real images that a step matches; None is the recipe's published number.
        network_images: Real images that the network learns from in an inner iteration.
        factor: Crops along each side of a stored image.
        exact: Classes whose pixels' gradients are compared with those in float64.
        rounds: Rounds in which all ways take turns; the median of their ratios counts.
        iterations: Also time whole inner iterations.
        keep_memory: Let the C library keep memory that is freed, which the plain way gains more by.
        gate: Exit with 1 where a figure misses a modest threshold.
        out: Output folder.
    """

    data: str | None = None
    root: Path = Path("data")
    recipes: str = "idc,dream_plus"
    widths: str = "64,128"
    ipc: str = "10,20,50"
    classes: int = 20
    images: int = 500
    real_batch: int | None = None
    network_images: int = 2000
    factor: int = 2
    exact: int = 5
    rounds: int = 5
    iterations: bool = True
    keep_memory: bool = False
    gate: bool = False
    out: Path = Path("runs/matching_speed")


def main(arguments: Arguments, command: str) -> str:
    """Measure, write ``results.json``, and return the table for the terminal.

    Raises:
        ArgumentError: If an argument cannot be used.
        Missed: If a threshold is, and there is to be a gate.
    """
    for name in ("classes", "images", "network_images", "factor", "exact", "rounds"):
        at_least_1(name, getattr(arguments, name))
    if arguments.keep_memory:
        keep_freed_memory()
    device = arguments.chosen_device()
    images, targets = pictures(arguments.data, arguments.root, arguments.classes, arguments.images)
    cases = [
        Case(arguments, recipe, width, ipc, device, images, targets)
        for recipe in names("recipes", arguments.recipes)
        for width in numbers("widths", arguments.widths)
        for ipc in numbers("ipc", arguments.ipc)
    ]
    rows = []
    for case in cases:
        rows.append(case.measure())
        write_figures(
            arguments.out,
            "matching_speed",
            rows,
            command=command,
            settings=asdict(arguments),
            device=device,
        )
    missed = failures([t for row in rows for t in thresholds(row)]) if arguments.gate else []
    if missed:
        raise Missed("; ".join(missed))
    return text_table(*cells(rows))


class Case:
    """One recipe, width and number of stored images per class."""

    def __init__(
        self,
        arguments: Arguments,
        recipe: str,
        width: int,
        ipc: int,
        device: torch.device,
        images: Tensor,
        targets: Tensor,
    ) -> None:
        self.arguments, self.recipe, self.width, self.ipc = arguments, recipe, width, ipc
        self.device = device
        settings = replace(
            PRESETS["paper"],
            real_batch=arguments.real_batch,
            network_images=arguments.network_images,
        )
        self.factory = convnet_for(SIZE, width=width)
        self.condenser: Condenser = preset_condenser(
            recipe, settings, factor=arguments.factor, ipc=ipc, network=self.factory
        )
        network: Any = self.factory(arguments.classes).to(device)
        self.eager = EagerMatching(self.condenser, network)
        self.real = RealImages(
            images.to(device), targets.to(device), tuple(range(arguments.classes)), NORMALIZATION
        )

    def programs(self, precision: Precision) -> Programs:
        """The package's functions, compiled."""
        condenser = self.condenser
        return programs(
            Plan(
                factory=self.factory,
                classes=self.arguments.classes,
                shape=SIZE,
                device=self.device,
                objective=condenser.objective,
                formation=condenser.formation,
                augment=condenser.augment,
                training=condenser.training,
                precision=precision,
                compile=True,
            )
        )

    def measure(self) -> dict[str, Any]:
        """All figures of the case."""
        ways: dict[str, Precision] = {"float32": "float32"}
        if has_bfloat16(self.device):
            ways["bfloat16"] = "bfloat16"
        row: dict[str, Any] = {"recipe": self.recipe, "width": self.width, "ipc": self.ipc}
        row |= self._step(ways)
        if self.arguments.iterations:
            row |= self._iteration(ways)
        return row

    def _step(self, ways: dict[str, Precision]) -> dict[str, Any]:
        built = {name: self.programs(precision) for name, precision in ways.items()}
        parameters = next(iter(built.values())).network.fresh()
        self.eager.load(parameters)
        generator = Generator().manual_seed(1)
        batches = [self._class_batch(label, generator) for label in range(self.arguments.classes)]
        scale = self.real.scale
        # On a GPU all classes are one call, so that is what is compared.
        several = batches if self.device.type == "cuda" else batches[:1]

        def plain() -> None:
            for batch in several:
                self.eager.match(scale, batch)

        works: dict[str, Any] = {"eager": plain}
        for name, found in built.items():
            works[name] = functools.partial(found.match, parameters, scale, several)  # type: ignore[arg-type]
        times = alternating(works, self.device, rounds=self.arguments.rounds)
        result: dict[str, Any] = {
            f"{name}_step_seconds": [t / len(several) for t in found]
            for name, found in times.items()
        }
        some = batches[: self.arguments.exact]
        slopes = {"eager": [self.eager.match(scale, batch)[1] for batch in some]}
        for name, found in built.items():
            result[f"{name}_step_ratio"] = ratio(times["eager"], times[name])
            matched = found.match(parameters, scale, some)  # type: ignore[misc]
            slopes[name] = [one.slope for one in matched]
        exact = [self._exact(parameters, batch) for batch in some]
        for name, own in slopes.items():
            result[f"{name}_error"] = statistics.median(map(relative_error, own, exact))
        for name, work in works.items():
            result[f"{name}_peak_bytes"] = peak_bytes(work, self.device)
        return result

    def _exact(self, parameters: Parameters, batch: ClassBatch) -> Tensor:
        """The pixels' gradient in float64."""
        eager = EagerMatching(self.condenser, copy.deepcopy(self.eager.network).double())
        eager.load({name: value.double() for name, value in parameters.items()})
        scale = self.real.normalization.scale(self.device, torch.float64)
        return eager.match(scale, batch._replace(stored=batch.stored.double()))[1]

    def _class_batch(self, label: int, generator: Generator) -> ClassBatch:
        condenser = self.condenser
        each = condenser.formation.images_per_stored
        decoded = min(self.ipc * each, condenser.most_decoded)
        batch = condenser.sampler.batch  # type: ignore[attr-defined]
        rows = self.real.rows[label]
        index = torch.randint(len(rows), (batch,), generator=generator)
        some = torch.randperm(self.ipc * each, generator=generator)[:decoded].to(self.device)
        packed = torch.randint(len(rows), (self.ipc * each,), generator=generator)
        first = dequantise(self.real.images[rows[packed.to(self.device)]])
        stored = condenser.formation.pack(first)
        return ClassBatch(
            real=self.real.images[rows[index.to(self.device)]],
            stored=stored,
            used=None if decoded == self.ipc * each else some,
            changes=condenser.augment.draw(generator, 1).to(self.device),
            label=torch.tensor(label, device=self.device),
            terms=Sides.even(decoded, batch, stored).whole(),
        )

    def _iteration(self, ways: dict[str, Precision]) -> dict[str, Any]:
        """Seconds of whole inner iterations: sampling, all classes, and the network's learning."""
        found: dict[str, list[float]] = {name: [] for name in ("eager", *ways)}
        for _ in range(max(1, self.arguments.rounds // 2)):
            for name, precision in ways.items():
                found[name].append(self._our_iteration(precision))
            found["eager"].append(self._eager_iteration())
        result: dict[str, Any] = {f"{name}_iteration_seconds": t for name, t in found.items()}
        for name in ways:
            result[f"{name}_iteration_ratio"] = ratio(found["eager"], found[name])
        return result

    @property
    def _every(self) -> int:
        """Inner iterations that share one choice of real images by clustering; 1 without any."""
        return getattr(self.condenser.sampler, "every", 1)

    def _our_iteration(self, precision: Precision) -> float:
        """Seconds of an inner iteration of a condensation, with its share of a clustering."""
        watch = Stopwatch(self.condenser.update)
        sampler = self.condenser.sampler
        if isinstance(sampler, Representative):  # so that few iterations hold both kinds
            sampler = replace(sampler, every=2)
        condenser = replace(
            self.condenser,
            outer=1,
            inner=5,
            warm_up=0,
            sampler=sampler,
            update=watch,
            precision=precision,
            compile=True,
        )
        condenser.condense(
            self.real.images,
            self.real.targets,
            quotas=self.ipc,
            normalization=NORMALIZATION,
            generator=Generator().manual_seed(2),
        )
        # The first ends before anything is timed; it may compile.
        without, clustering = (statistics.fmean(watch.iterations(skip=0)[n::2]) for n in (0, 1))
        return without + (clustering - without) / self._every

    def _eager_iteration(self) -> float:
        """The same, the plain way."""
        condenser, real, eager = self.condenser, self.real, self.eager
        generator = Generator().manual_seed(2)
        update = condenser.update
        images = update.images if isinstance(update, OnReal) else 0

        def sample() -> None:
            condenser.sampler.draw(real, None, 0, eager.embed, generator)

        def work() -> None:
            for label in range(self.arguments.classes):
                eager.match(real.scale, self._class_batch(label, generator))
            self._train_eagerly(images, generator)

        return seconds(sample, self.device) / self._every + seconds(work, self.device)

    def _train_eagerly(self, images: int, generator: Generator) -> None:
        training = self.condenser.training

        def step(parameters: Any, scale: Any, batch: Any) -> Any:
            self.eager.train(scale, batch)
            return {}

        training.train(
            step,
            {},
            torch.optim.SGD([torch.zeros(1)], lr=0.1),
            self.real.images,
            self.real.targets,
            scale=self.real.scale,
            generator=generator,
            limit=images,
        )


def pictures(source: str | None, root: Path, classes: int, each: int) -> tuple[Tensor, Tensor]:
    """The images that are condensed, uint8, and the class of each.

    Without data they are smooth patterns, one for each class, under noise: what is matched is a
    difference of gradients, and between images that show nothing it is not what it is in use.

    Args:
        source: Where real images come from; None makes some up.
        root: Where downloaded data are, or go.
        classes: Classes.
        each: Images of each.
    """
    if source is None:
        generator = Generator().manual_seed(0)
        patterns = torch.rand((classes, 3, 4, 4), generator=generator)
        patterns = F.interpolate(patterns, size=SIZE[1:], mode="bilinear")
        noise = torch.rand((classes * each, *SIZE), generator=generator)
        images = quantise(0.7 * patterns.repeat_interleave(each, dim=0) + 0.3 * noise)
        return images, torch.arange(classes).repeat_interleave(each)
    data = load(source, root=root)
    if data.image_shape != SIZE or data.classes < classes:
        raise ArgumentError(
            f"`data` is {source!r} with {data.classes} classes of shape "
            f"{data.image_shape}, but {classes} classes of shape {SIZE} are needed"
        )
    rows = torch.cat(
        [torch.nonzero(data.y_train == label).flatten()[:each] for label in range(classes)]
    )
    return data.x_train[rows], data.y_train[rows]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def thresholds(row: dict[str, Any]) -> list[Threshold]:
    """What a gate asks of one case."""
    name = f"{row['recipe']} width {row['width']} ipc {row['ipc']}"
    best = "bfloat16" if "bfloat16_error" in row else "float32"
    found = [
        Threshold(f"{name}: error of float32", row["float32_error"], most=FLOAT32_ERROR),
        Threshold(f"{name}: speed of a step", row[f"{best}_step_ratio"], least=GATE_STEP),
    ]
    if "bfloat16_error" in row:
        found.append(
            Threshold(f"{name}: error of bfloat16", row["bfloat16_error"], most=BFLOAT16_ERROR)
        )
    if f"{best}_iteration_ratio" in row:
        value = row[f"{best}_iteration_ratio"]
        found.append(Threshold(f"{name}: speed of an iteration", value, least=GATE_ITERATION))
    return found


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """The figures as a table."""
    header = ("recipe", "width", "ipc", "what", "eager s", "float32", "bfloat16", "errors")
    lines = []
    for row in rows:
        case = (row["recipe"], str(row["width"]), str(row["ipc"]))
        for what in ("step", "iteration"):
            if f"eager_{what}_seconds" not in row:
                continue
            eager = statistics.median(row[f"eager_{what}_seconds"])
            ratios = [
                f"{row[f'{way}_{what}_ratio']:.1f}x" if f"{way}_{what}_ratio" in row else "–"
                for way in ("float32", "bfloat16")
            ]
            errors = " / ".join(
                f"{row[f'{way}_error']:.0e}"
                for way in ("eager", "float32", "bfloat16")
                if f"{way}_error" in row
            )
            lines.append((*case, what, f"{eager:.3f}", *ratios, errors if what == "step" else ""))
    return header, lines


def cli(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    return command_line(
        Arguments, main, module="benchmarks.matching_speed", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(cli())
