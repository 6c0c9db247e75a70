"""What a condensation costs, fitted to what was measured, and what follows for a large one.

``python -m benchmarks.readme`` writes both tables of ``docs/scaling.md`` from the committed results
of ``benchmarks.scaling``.

A pass over one image costs ``f`` operations forwards. Gradients of the weights take the forward
pass and twice as much backwards, 3 f; that of a distance of such gradients by the pixels goes
through all of it again, backwards, 9 f. So a pixel step of one class costs
``f (3 real + 9 decoded)``, and what the network learns from ``n`` images ``3 f n``. Each kind is
done at a rate of its own, which is what is fitted, with a time that comes once in an iteration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.presets import preset
from benchmarks.tables import Table
from dc_replay.networks import convnet_for, resnet_ap10

MOST_DECODED = 128
"""Decoded images of a class in one step, as the recipes have it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The operations of one inner iteration.

    Attributes:
        step: Of the pixel step of one class.
        classes: Classes.
        training: Of what the network learns between two steps.
        features: Of the features of one class's real images, in the iterations that cluster them
            spread over all.
    """

    step: float
    classes: int
    training: float
    features: float = 0.0


@dataclass(frozen=True)
class Rates:
    """How fast a machine does them.

    Attributes:
        step: Operations of pixel steps in a second.
        training: Operations of training in a second.
        fixed: Seconds of an iteration that come whatever there is to do.
    """

    step: float
    training: float
    fixed: float = 0.0

    def seconds(self, work: Work, *, ranks: int = 1) -> float:
        """Of an inner iteration on several processes, which all train the network."""
        own = -(-work.classes // ranks)
        pixels = own * (work.step + work.features) / self.step
        return pixels + work.training / self.training + self.fixed


def forward_operations(build: Callable[[], nn.Module], shape: tuple[int, int, int]) -> int:
    """Multiplications and additions of a network for one image, forwards; nothing is computed."""
    with torch.device("meta"):
        network, image = build(), torch.empty(1, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return int(counter.get_total_flops())


def work_of(
    forward: float,
    *,
    classes: int,
    ipc: int,
    factor: int,
    real: int,
    network_images: int,
    images: int,
    every: int = 10,
) -> Work:
    """The operations of an inner iteration with a network that takes ``forward`` for an image.

    Args:
        forward: Operations.
        classes: Classes.
        ipc: Stored images of each.
        factor: Crops along each side of a stored image.
        real: Real images of a class in a step.
        network_images: Images that the network learns from between two steps.
        images: Real images of each class.
        every: Iterations that share one choice of real images.
    """
    decoded = min(MOST_DECODED, ipc * factor**2)
    return Work(
        step=forward * (3 * real + 9 * decoded),
        classes=classes,
        training=3 * forward * network_images,
        features=forward * images / every,
    )


def measured_work(row: dict[str, Any], settings: dict[str, Any]) -> Work:
    """The operations of an iteration that ``benchmarks.scaling`` has timed."""
    chosen = preset(settings["preset"])
    shape = (3, row["side"], row["side"])
    network = convnet_for(shape, width=chosen.width)
    return work_of(
        forward_operations(lambda: network(row["classes"]), shape),
        classes=row["classes"],
        ipc=row["ipc"],
        factor=2,
        real=chosen.real_batch or 128,
        network_images=chosen.network_images,
        images=settings["images"],
    )


def fitted(works: Sequence[Work], seconds: Sequence[float]) -> Rates:
    """The rates that come nearest to measured seconds, in proportion; none is negative."""
    from scipy.optimize import nnls

    columns = [(work.classes * (work.step + work.features), work.training, 1.0) for work in works]
    scale = np.array(columns).max(axis=0)
    # Divided by the seconds, so that a short iteration counts as much as a long one.
    matrix = np.array(columns) / scale / np.array(seconds)[:, None]
    found = nnls(matrix, np.ones(len(works)))[0] / scale
    step, training, fixed = (float(value) for value in found)
    return Rates(1 / step, 1 / training if training else float("inf"), fixed)


def fit_table(found: dict[str, Any]) -> Table:
    """Measured seconds of an iteration beside those that the fitted rates give."""
    works = [measured_work(row, found["settings"]) for row in found["rows"]]
    seconds = [float(np.median(row["seconds"])) for row in found["rows"]]
    rates = fitted(works, seconds)
    lines = [
        (
            str(row["classes"]),
            str(row["ipc"]),
            str(row["side"]),
            f"{(work.classes * (work.step + work.features) + work.training) / 1e9:,.0f}",
            f"{second:.2f}",
            f"{rates.seconds(work):.2f}",
        )
        for row, work, second in zip(found["rows"], works, seconds, strict=True)
    ]
    return ("classes", "ipc", "side", "10⁹ operations", "measured s", "fitted s"), lines


def fit_sentence(found: dict[str, Any]) -> str:
    """The fitted rates in words."""
    works = [measured_work(row, found["settings"]) for row in found["rows"]]
    rates = fitted(works, [float(np.median(row["seconds"])) for row in found["rows"]])
    training = "no time of its own"
    if rates.training != float("inf"):
        training = f"{rates.training / 1e9:,.0f}·10⁹ a second"
    return (
        f"On {found['device']}: pixel steps at {rates.step / 1e9:,.0f}·10⁹ operations a second, "
        f"training {training}, {rates.fixed:.2f} s in each iteration besides."
    )


ASSUMED = Rates(step=100e12, training=100e12, fixed=0.01)
"""What the prediction takes a GPU to do: a tenth of an H200's peak in bfloat16. Not measured."""
OUTER, INNER = 60, 100


def prediction_table() -> Table:
    """ImageNet-1k on several GPUs: hours, and how much of what is added is used."""
    shape, network = (3, 224, 224), functools.partial(resnet_ap10, 1000)
    work = work_of(
        forward_operations(network, shape),
        classes=1000,
        ipc=10,
        factor=3,
        real=128,
        network_images=500,
        images=1281,
    )
    parameters = sum(value.numel() for value in network().parameters())
    one = ASSUMED.seconds(work)
    lines = []
    for ranks in (1, 8, 64):
        seconds = ASSUMED.seconds(work, ranks=ranks)
        # The weights to every rank, and at the end everyone's open pixels to everyone.
        moved = 4 * parameters + 4 * work.classes * 10 * int(np.prod(shape)) / OUTER
        lines.append(
            (
                str(ranks),
                f"{seconds:.2f}",
                f"{seconds * OUTER * INNER / 3600:,.1f}",
                f"{one / seconds / ranks:.0%}",
                "0" if ranks == 1 else f"{moved / 1e6:,.0f} MB",
            )
        )
    return ("GPUs", "s of an inner iteration", "hours", "efficiency", "received per network"), lines
