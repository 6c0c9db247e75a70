"""The condenser: parts that compose, and the one optimisation loop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from dc_replay.apprentice import Apprentice
from dc_replay.augment import Augmentation, augmentation
from dc_replay.budgets import whole
from dc_replay.comparison import Comparison
from dc_replay.compilation import CompileMode, wanted
from dc_replay.errors import ArgumentError, DCReplayError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.multisize import Multisize
from dc_replay.networks import NetworkFactory, Precision, convnet_for
from dc_replay.objectives import Objective
from dc_replay.pixels import Normalization, dequantise, quantise
from dc_replay.programs import MatchFunction, programs
from dc_replay.randomness import isolated
from dc_replay.sampling import RealImages, Sampler, Uniform
from dc_replay.selection import RandomImages, Selection
from dc_replay.subsets import SubsetMatching
from dc_replay.training import NetworkTraining


@dataclass(frozen=True, eq=False)
class Condensed:
    """What condensing yields.

    Attributes:
        exemplars: The stored images.
        history: ``distance``: the mean over classes of the matching distance in each inner
            iteration, with all terms of subset matching and multisize condensation.
            ``prefix_sizes``, with multisize condensation: for each period the stored images of each
            class, in increasing order of classes, in the prefix that was matched besides the
            whole. Empty for recipes that optimise nothing.
    """

    exemplars: Exemplars
    history: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PixelStep:
    """How pixels move: SGD in ``[0, 1]`` image space.

    Attributes:
        lr: Learning rate.
        momentum: Momentum.
        reference: The number of stored images per class that ``lr`` is for; a class with more gets
            a rate in proportion, because each image then has a smaller share in the mean. None
            uses ``lr`` as it is.
        final: The share of the rate that is left at the end of the condensation, to which it falls
            linearly. The published methods keep the rate, 1; where steps are few, large ones that
            die away reach further than equal ones.
    """

    lr: float = 5e-3
    momentum: float = 0.5
    reference: int | None = 10
    final: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ArgumentError(f"`lr` is {self.lr}, but the pixels' learning rate must be above 0")
        if self.reference is not None and self.reference < 1:
            raise ArgumentError(
                f"`reference` is {self.reference}, but must be at least 1 image per class, or None "
                f"to use `lr` as it is"
            )
        if not 0 <= self.final <= 1:
            raise ArgumentError(
                f"`final` is {self.final}, but must be between 0, to let the rate die away, and 1, "
                f"to keep it"
            )

    def optimizer(self, pixels: list[Tensor]) -> torch.optim.SGD:
        """An optimiser over the stored images of each class."""
        groups = [
            {"params": [p], "lr": self.lr * (len(p) / self.reference if self.reference else 1)}
            for p in pixels
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)

    def schedule(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """What lets the rate fall over so many steps of the optimiser."""
        return torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=self.final, total_iters=steps
        )


class NetworkUpdate(Protocol):
    """What the matching network learns between two pixel steps."""

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Train the apprentice, given the stored images of each class in ``[0, 1]``."""
        ...


@dataclass(frozen=True)
class OnReal:
    """Train on real images, as IDC does: gradients then do not vanish.

    Attributes:
        images: Images in an inner iteration.
    """

    images: int = 2000

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Train the apprentice."""
        apprentice.train_on_real(limit=self.images)


@dataclass(frozen=True)
class OnSynthetic:
    """Train on the synthetic images, as DC and DSA do.

    Attributes:
        epochs: Epochs in an inner iteration.
    """

    epochs: int = 50

    def __call__(self, apprentice: Apprentice, pixels: list[Tensor]) -> None:
        """Train the apprentice."""
        for _ in range(self.epochs):
            apprentice.train_on_synthetic(pixels)


@dataclass(frozen=True, kw_only=True)
class Condenser:
    """Turns the images of an experience into a few stored ones per class.

    It selects real images, packs them by multi-formation and, where there is an objective,
    optimises the result so that a matching network cannot tell it from the real images. Parts are
    objects; :func:`dataclasses.replace` swaps one. See :mod:`dc_replay.recipes` for the methods of
    the literature.

    The matching network is thrown away afterwards; no other network is involved.

    Attributes:
        name: What to call the result.
        formation: How stored images become those that a network sees.
        selection: Real images to start from; None starts from uniform noise.
        objective: What to match; None keeps the selected images as they are.
        subsets: Matches parts of each class besides; None does not.
        multisize: Makes prefixes good by themselves, so that the result can be cut; None does not.
        sampler: Real images to match in each step.
        augment: Augmentation of matched images, one draw for real and synthetic ones alike.
        network: Builds a matching network for a number of classes; None is a ConvNet of width 128
            that fits the images.
        training: How the matching network is trained.
        warm_up: Epochs on the real images for each new matching network before it is used.
        update: What the network learns after each pixel step; None leaves it as it is.
        pixels: How pixels move.
        most_decoded: Decoded synthetic images of a class in one step; above that, a random subset.
        outer: Matching networks, one after the other.
        inner: Pixel steps with each network.
        compile: Whether to compile the step functions; ``"auto"`` does where the planned steps
            repay it.
        precision: What the matching network's convolutions compute in: ``"float32"``,
            ``"bfloat16"``, or ``"auto"`` for bfloat16 where the device has it.

    Raises:
        ArgumentError: If a number is below its minimum.
    """

    name: str
    formation: Formation = Formation(1)
    selection: Selection | None = RandomImages()
    objective: Objective | None = None
    subsets: SubsetMatching | None = None
    multisize: Multisize | None = None
    sampler: Sampler = Uniform(64)
    augment: Augmentation = augmentation("color", "crop", "cutout")
    network: NetworkFactory | None = None
    training: NetworkTraining = NetworkTraining()
    warm_up: int = 0
    update: NetworkUpdate | None = OnReal()
    pixels: PixelStep = PixelStep()
    most_decoded: int = 128
    outer: int = 60
    inner: int = 100
    compile: CompileMode = "auto"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for argument, least in {"outer": 1, "inner": 1, "most_decoded": 1, "warm_up": 0}.items():
            value = getattr(self, argument)
            if value < least:
                raise ArgumentError(f"`{argument}` is {value}, but must be at least {least}")
        for argument in ("subsets", "multisize"):
            if self.objective is None and getattr(self, argument) is not None:
                raise ArgumentError(
                    f"`{argument}` is {getattr(self, argument)}, but {self.name} optimises "
                    f"nothing; use a recipe with an objective, for example dream_plus()"
                )

    @property
    def stores_raw_images(self) -> bool:
        """Whether what is stored are unmodified real images."""
        return self.objective is None and self.formation.factor == 1

    def condense(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        quotas: Mapping[int, int] | int,
        generator: Generator,
        normalization: Normalization | None = None,
        progress: bool = False,
    ) -> Condensed:
        """Condense labelled images.

        Runs where the images are. Global random states are left as they were, and the same
        generator state gives the same bytes on the same device.

        Args:
            images: Real images, uint8 ``[count, channels, height, width]``.
            labels: int64 ``[count]``.
            quotas: Stored images of each class, or one number for all. A class with fewer real
                images gets as many as it has.
            generator: Source of all randomness.
            normalization: What makes ``[0, 1]`` images the network's input; None is none.
            progress: Whether to show a progress bar.

        Returns:
            Exemplars on the images' device, classes in increasing order, and the history.

        Raises:
            ArgumentError: If an argument cannot be used.
            DCReplayError: If the optimisation leaves the range of numbers.
        """
        real, counts = self._checked(images, labels, quotas, normalization)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            isolated(generator, images.device),
        ):
            return self._condense(real, counts, generator, progress)

    def _checked(
        self,
        images: Tensor,
        labels: Tensor,
        quotas: Mapping[int, int] | int,
        normalization: Normalization | None,
    ) -> tuple[RealImages, list[int]]:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ArgumentError(
                f"`images` must be uint8 of shape [count, channels, height, width], but is "
                f"{images.dtype} of shape {list(images.shape)}; bring them to [0, 1] and use "
                f"dc_replay.pixels.quantise"
            )
        if not len(images):
            raise ArgumentError("`images` holds no images; there is nothing to condense")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ArgumentError(
                f"`labels` must be int64 of shape [{len(images)}], one for each image, but is "
                f"{labels.dtype} of shape {list(labels.shape)}"
            )
        self.formation.check(images.shape[2], images.shape[3])
        found, targets = labels.to(images.device).unique(return_inverse=True)
        names = tuple(found.tolist())
        if not isinstance(quotas, Mapping):
            quotas = dict.fromkeys(names, quotas)
        missing = [name for name in names if name not in quotas]
        if missing:
            raise ArgumentError(
                f"`quotas` names no number of stored images for the classes {missing}; "
                f"name one for each class in `labels`, or pass a single number"
            )
        most = [whole(f"quotas[{name}]", quotas[name]) for name in names]
        if normalization is None:
            normalization = Normalization.identity(images.shape[1])
        real = RealImages(images, targets, names, normalization)
        normalization.apply(torch.zeros_like(images[:1], dtype=torch.float32))
        counts = [min(limit, len(rows)) for limit, rows in zip(most, real.rows, strict=True)]
        return real, counts

    def _condense(
        self, real: RealImages, counts: list[int], generator: Generator, progress: bool
    ) -> Condensed:
        steps = self.outer * self.inner * len(real.labels) if self.objective is not None else 0
        channels, height, width = real.images.shape[1:]
        functions = programs(
            self.network or convnet_for((channels, height, width)),
            len(real.labels),
            (channels, height, width),
            real.images.device,
            self.objective,
            self.precision,
            wanted(self.compile, steps=steps),
        )
        apprentice = Apprentice(
            functions,
            training=self.training,
            formation=self.formation,
            real=real,
            generator=generator,
        )
        total = self.outer * self.inner
        if self.multisize is not None and self.outer <= 2 * self.multisize.period:
            _say_that_nothing_is_chosen(self.multisize.period, self.outer)
        # Before anything that takes time, because it refuses parts that do not fit the images.
        comparison = Comparison(
            real,
            counts,
            each=self.formation.images_per_stored,
            most_decoded=self.most_decoded,
            subsets=self.subsets,
            multisize=self.multisize,
            steps=total,
            generator=generator,
        )
        pixels = self._initial(real, counts, apprentice)
        history: dict[str, list[Any]] = {}
        if functions.match is not None:
            distances: list[Tensor] = []
            with tqdm(
                total=total, desc=self.name, unit="step", disable=not progress, leave=False
            ) as bar:
                for distance in self._optimise(functions.match, pixels, comparison, apprentice):
                    distances.append(distance)
                    bar.update()
            history["distance"] = torch.stack(distances).tolist()
            if comparison.choice is not None:
                history["prefix_sizes"] = comparison.choice.history
        labels = torch.tensor(real.labels, device=real.images.device)
        exemplars = Exemplars(
            torch.cat([quantise(p) for p in pixels]),
            labels.repeat_interleave(torch.tensor(counts, device=labels.device)),
        )
        return Condensed(exemplars, history)

    def _initial(self, real: RealImages, counts: list[int], apprentice: Apprentice) -> list[Tensor]:
        generator = apprentice.generator
        if self.selection is None:
            shape = real.images.shape[1:]
            return [
                torch.rand((n, *shape), generator=generator, device=generator.device).to(
                    real.images.device
                )
                for n in counts
            ]
        wanted = [n * self.formation.images_per_stored for n in counts]
        chosen = self.selection.choose(real, wanted, apprentice, generator)
        return [self.formation.pack(dequantise(real.images[index])) for index in chosen]

    def _optimise(
        self,
        match: MatchFunction,
        pixels: list[Tensor],
        comparison: Comparison,
        apprentice: Apprentice,
    ) -> Iterator[Tensor]:
        """Move the pixels in place; yield the mean distance of each inner iteration."""
        real, generator = apprentice.real, apprentice.generator
        labels = torch.arange(len(pixels), device=real.images.device).unbind()
        for stored in pixels:
            stored.requires_grad_(True)
        optimizer = self.pixels.optimizer(pixels)
        schedule = self.pixels.schedule(optimizer, self.outer * self.inner)
        for outer in range(self.outer):
            apprentice.restart()
            apprentice.train(self.warm_up)
            batches: list[Tensor] | None = None
            for inner in range(self.inner):
                batches = self.sampler.draw(real, batches, inner, apprentice.embed, generator)
                total = torch.zeros((), device=real.images.device)
                for position, (stored, index) in enumerate(zip(pixels, batches, strict=True)):
                    drawn = comparison.draw(position)
                    synthetic = self.formation.decode(stored)
                    if drawn.index is not None:
                        synthetic = synthetic[drawn.index]
                    synthetic = real.normalization.apply(synthetic)
                    matched, synthetic = self.augment.siamese(
                        real.normalised(index), synthetic, generator
                    )
                    found = match(
                        apprentice.parameters,
                        matched.detach(),
                        synthetic.detach(),
                        labels[position],
                        comparison.terms(position, drawn, index, outer * self.inner + inner),
                    )
                    synthetic.backward(found.slope)
                    total += found.distance
                    comparison.record(position, found.prefixes)
                comparison.hold(pixels)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                if self.update is not None:
                    self.update(apprentice, [stored.detach() for stored in pixels])
                yield total / len(pixels)
            with torch.no_grad():
                for stored, name in zip(pixels, real.labels, strict=True):
                    if not torch.isfinite(stored).all():
                        raise DCReplayError(
                            f"the pixels of class {name} became NaN or infinite in outer "
                            f"iteration {outer}; lower the pixels' learning rate, now "
                            f"{self.pixels.lr}, with dataclasses.replace(condenser, "
                            f"pixels=PixelStep(lr=...))"
                        )
                    stored.clamp_(0, 1)
            comparison.end_outer_iteration(pixels, optimizer)


@functools.cache
def _say_that_nothing_is_chosen(period: int, outer: int) -> None:
    """Warn once in a process, however many experiences there are."""
    warnings.warn(
        f"`period` of Multisize is {period}, so that `outer`={outer} matching networks end before "
        f"another prefix than that of one image is chosen; use a period of about "
        f"{max(1, outer // 20)}, and an outer of more than twice the period",
        UserWarning,
        stacklevel=2,
    )
