"""The condenser: parts that compose into what turns an experience into exemplars."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from dc_replay._checks import integer, whole
from dc_replay._files import own_version
from dc_replay._progress import progress as progress_bar
from dc_replay.apprentice import Apprentice
from dc_replay.augment import Augmentation, augmentation
from dc_replay.checkpoints import Checkpoint, fingerprint
from dc_replay.comparison import Comparison
from dc_replay.compilation import CompileMode, wanted
from dc_replay.distributed import Ranks
from dc_replay.errors import ArgumentError, DivergedError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation, check_formation
from dc_replay.identity import words
from dc_replay.multisize import Multisize
from dc_replay.networks import NetworkFactory, Precision, convnet_for
from dc_replay.objectives import Objective
from dc_replay.optimisation import NetworkUpdate, OnReal, Optimisation, PixelStep
from dc_replay.pace import ByClock, BySteps, Pace, check_seconds
from dc_replay.pixels import Normalization, check_normalization, dequantise
from dc_replay.placement import HostImages
from dc_replay.programs import Plan, programs
from dc_replay.randomness import check_generator, isolated
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
        seconds_before: How long processes had worked on it that were interrupted, and from whose
            checkpoint it went on; 0 if there were none.
    """

    exemplars: Exemplars
    history: dict[str, list[Any]] = field(default_factory=dict)
    seconds_before: float = 0.0

    @property
    def iterations(self) -> int:
        """Inner iterations that were done; 0 for recipes that optimise nothing."""
        return len(self.history.get("distance", ()))


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
        seconds: Time to spend on an experience, from its images to its exemplars, in place of
            ``outer``: another network follows until the time is over, and the optimisation ends
            with the last inner iteration that fits. What comes out then depends on the machine's
            speed, and no longer on the seed alone.
        compile: Whether to compile the step functions; ``"auto"`` does where the planned steps, or
            seconds, repay it.
        precision: What the matching network's convolutions compute in: ``"float32"`` (on a GPU in
            TF32, unless ``torch.backends.cudnn.allow_tf32`` is False), ``"bfloat16"``, or
            ``"auto"`` for bfloat16 where the device multiplies it natively. The pixels' gradient
            then differs by a few percent, because here and there a unit near 0 is on in one and
            off in the other.
        classes_at_once: Classes whose pixel steps are one call; None takes what fits a quarter of
            a GPU's free memory, and 1 elsewhere, which is what is fastest. The result is the same
            but for rounding.

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
    seconds: float | None = None
    compile: CompileMode = "auto"
    precision: Precision = "auto"
    classes_at_once: int | None = None

    def __post_init__(self) -> None:
        for argument, least in {"outer": 1, "inner": 1, "most_decoded": 1, "warm_up": 0}.items():
            value = getattr(self, argument)
            if integer(value) < least:
                raise ArgumentError(f"`{argument}` is {value}, but must be at least {least}")
        check_formation(self.formation)
        self._check_parts()
        if self.classes_at_once is not None:
            whole("classes_at_once", self.classes_at_once)
        if self.seconds is not None:
            check_seconds(self.seconds)
        for argument in ("subsets", "multisize"):
            if self.objective is None and getattr(self, argument) is not None:
                raise ArgumentError(
                    f"`{argument}` is {getattr(self, argument)}, but {self.name} optimises "
                    f"nothing; use a recipe with an objective, for example dream_plus()"
                )

    def _check_parts(self) -> None:
        """Raise an ArgumentError for a part that is none, such as one that was not called."""
        for argument, (methods, example) in _PARTS.items():
            part = getattr(self, argument)
            unused = self.objective is None and argument not in ("selection", "training")
            if part is None and (unused or argument in _MAY_BE_NONE):
                continue
            missing = [name for name in methods if not callable(getattr(part, name, None))]
            if missing or isinstance(part, type):
                raise ArgumentError(
                    f"`{argument}` is {part!r}, which is no such part; pass one that has "
                    f"{' and '.join(methods)}, for example {example}"
                )
        for argument, kind in _KINDS.items():
            part = getattr(self, argument)
            if not isinstance(part, kind) and (part is not None or argument not in _MAY_BE_NONE):
                raise ArgumentError(f"`{argument}` is {part!r}; pass {kind.__name__}(...)")

    @property
    def stores_raw_images(self) -> bool:
        """Whether what is stored are real images of full size, as they are or compressed."""
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
        checkpoint: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
    ) -> Condensed:
        """Condense labelled images.

        Runs where the images are, unless a device is given. Global random states are left as they
        were. On the CPU, the same generator state gives the same bytes; on a GPU some sums are made
        in any order, unless ``torch.use_deterministic_algorithms`` is set, and differ by rounding.

        Under torch.distributed all processes condense together: each calls this with the same
        images, labels, quotas and generator state, moves the pixels of its own classes, and returns
        the exemplars of all. On the CPU, how many there are does not change the bytes, if each has
        as many threads; on GPUs they differ by rounding. See
        :func:`~dc_replay.distributed.alone` for a process that is to condense by itself.

        Args:
            images: Real images, uint8 ``[count, channels, height, width]``.
            labels: int64 ``[count]``.
            quotas: Stored images of each class, or one number for all. A class with fewer real
                images gets as many as it has; if nothing is optimised, as many as hold them all.
            generator: Source of all randomness.
            normalization: What makes ``[0, 1]`` images the network's input; None is none.
            progress: Whether to show progress bars.
            checkpoint: A file to write the state to after matching networks, as often as takes a
                hundredth of the time, and at the end. If it is there already, and belongs to this
                recipe, these images and this generator's state, the condensation goes on from it
                and ends with the same bytes, on a GPU up to rounding. Recipes that optimise nothing
                take no notice. Of several processes the first reads and writes it.
            device: Where to compute. Images in the host's memory stay there, and those that a step
                needs are brought over: for more images than a GPU has room for.

        Returns:
            Exemplars on the device, classes in increasing order, and the history.

        Raises:
            ArgumentError: If an argument cannot be used, or is not the same on all processes.
            DivergedError: If the optimisation leaves the range of numbers. What it had reached
                before, if anything, is in ``condensed``.
        """
        given = None if device is None else _as_device(device)
        place = images.device if given is None and isinstance(images, Tensor) else given
        ranks = Ranks.here(place)
        try:
            real, counts = self._checked(images, labels, quotas, normalization, ranks, given)
            check_generator(generator)
        except Exception:
            ranks.compare(None)  # the others are told, who would wait for ever
            raise
        if ranks.size > 1:
            ranks.compare(self._described(real, counts, generator, checkpoint))
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            isolated(generator, real.images.device),
            # What is computed in which precision is for `precision` to say.
            torch.autocast(real.images.device.type, enabled=False),
        ):
            return self._condense(real, counts, generator, progress, checkpoint)

    def check(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Refuse images that :meth:`condense` would, as far as their shape tells.

        For those who condense only after hours of training.

        Args:
            image_shape: ``(channels, height, width)``.
            classes: How many classes there will be.
            device: Where they are to be condensed.

        Raises:
            ArgumentError: If such images cannot be stored so, the network does not accept them or
                has no usable features, or the device lacks the precision.
        """
        self.formation.check(*image_shape)
        with torch.inference_mode(False), torch.enable_grad():
            programs(self._plan(image_shape, classes, _as_device(device)))

    def _checked(
        self,
        images: Tensor,
        labels: Tensor,
        quotas: Mapping[int, int] | int,
        normalization: Normalization | None,
        ranks: Ranks,
        device: torch.device | None,
    ) -> tuple[RealImages, list[int]]:
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise ArgumentError(f"`{name}` is a {type(value).__name__}; pass a tensor")
        check_normalization(normalization)
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
        self.formation.check(*images.shape[1:])
        kept: Tensor | HostImages = images
        if device is not None:
            on_host = images.device.type == "cpu"
            kept = HostImages(images, device) if on_host else images.to(device)
        found, targets = labels.to(kept.device).unique(return_inverse=True)
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
        real = RealImages(kept, targets, names, normalization, ranks)
        normalization.apply(torch.zeros_like(images[:1], dtype=torch.float32))
        counts = [
            min(limit, self._useful(len(rows))) for limit, rows in zip(most, real.rows, strict=True)
        ]
        return real, counts

    def _useful(self, images: int) -> int:
        """How many stored images a class of so many real ones can fill."""
        if self.objective is not None:  # copies need not stay alike
            return images
        return math.ceil(images / self.formation.images_per_stored)

    def _condense(
        self,
        real: RealImages,
        counts: list[int],
        generator: Generator,
        progress: bool,
        checkpoint: str | os.PathLike[str] | None,
    ) -> Condensed:
        shown = progress and real.ranks.rank == 0
        channels, height, width = real.images.shape[1:]
        functions = programs(
            self._plan((channels, height, width), len(real.labels), real.images.device)
        )
        file: Checkpoint | None = None
        if checkpoint is not None and self.objective is not None:
            arguments = self._arguments(real, counts, generator).values()
            parts = (part for parts in arguments for part in parts)
            file = Checkpoint(
                checkpoint, fingerprint([*parts, functions.network.structure]), real.ranks
            )
        saved = file.load(real.images.device) if file is not None else None
        pace = self._pace(real.images.device, real.ranks)
        apprentice = Apprentice(
            functions,
            training=self.training,
            formation=self.formation,
            real=real,
            generator=generator,
            progress=f"{self.name}: network" if shown else None,
        )
        period = self.multisize.period if self.multisize is not None else 0
        if self.seconds is None and self.outer <= 2 * period:
            _say_that_nothing_is_chosen(period, self.outer)
        # Before anything that takes time, because it refuses parts that do not fit the images.
        comparison = Comparison(
            real,
            counts,
            each=self.formation.images_per_stored,
            most_decoded=self.most_decoded,
            subsets=self.subsets,
            multisize=self.multisize,
            generator=generator,
        )
        if saved is None:
            pixels = self._initial(real, counts, apprentice)
        else:  # what comes from there replaces it all
            shape = self.formation.open_shape(channels, height, width)
            pixels = [real.scale.mean.new_zeros((n, *shape)) for n in counts]

        def result(stored: list[Tensor], **history: list[Any]) -> Condensed:
            labels = torch.tensor(real.labels, device=real.images.device)
            exemplars = Exemplars(
                torch.cat(stored),
                labels.repeat_interleave(torch.tensor(counts, device=labels.device)),
            )
            before = 0.0 if file is None else file.seconds_before
            return Condensed(exemplars, history, before)

        if functions.match is None:
            real.share.complete(pixels)
            return result([self.formation.store(images) for images in pixels])
        optimisation = Optimisation(
            pixels,
            match=functions.match,
            apprentice=apprentice,
            comparison=comparison,
            sampler=self.sampler,
            augment=self.augment,
            step=self.pixels,
            update=self.update,
            warm_up=self.warm_up,
            inner=self.inner,
            pace=pace,
        )
        if saved is not None:
            optimisation.restore(saved)
        finished_before = pace.over
        with progress_bar(
            initial=pace.share * pace.total,
            total=pace.total,
            desc=self.name,
            unit=pace.unit,
            disable=not shown,
            leave=False,
            bar_format=None if self.seconds is None else _CLOCK,
        ) as bar:
            try:
                for _ in optimisation.run(file):
                    bar.update(pace.share * pace.total - bar.n)
            except DivergedError as error:
                if optimisation.distances:  # else these are the images that it began with
                    error.condensed = result(optimisation.stored(), **optimisation.history)
                raise
        if file is not None and not finished_before:
            file.try_to_save(optimisation.state())
        return result(optimisation.stored(), **optimisation.history)

    def _plan(self, shape: tuple[int, int, int], classes: int, device: torch.device) -> Plan:
        return Plan(
            factory=convnet_for(shape) if self.network is None else self.network,
            # With a single output the loss would be 0, and so would its gradients.
            classes=max(2, classes),
            shape=shape,
            device=device,
            objective=self.objective,
            formation=self.formation,
            augment=self.augment,
            training=self.training,
            precision=self.precision,
            compile=self._compiles(classes),
            classes_at_once=self.classes_at_once,
        )

    def _initial(self, real: RealImages, counts: list[int], apprentice: Apprentice) -> list[Tensor]:
        generator = apprentice.generator
        if self.selection is None:
            channels, height, width = real.images.shape[1:]
            shape = self.formation.open_shape(channels, height, width)
            start = [
                torch.rand((n, *shape), generator=generator, device=generator.device).to(
                    real.images.device
                )
                for n in counts
            ]
        else:
            wanted = [n * self.formation.images_per_stored for n in counts]
            chosen = self.selection.choose(real, wanted, apprentice, generator)
            start = [self.formation.pack(dequantise(real.images[index])) for index in chosen]
            if self.objective is None:  # stored as they are
                return start
        return [self.formation.keep(images) for images in start]

    def _arguments(
        self, real: RealImages, counts: list[int], generator: Generator
    ) -> dict[str, list[object]]:
        """All that the result follows from."""
        return {
            "dc_replay": [own_version()],
            "condenser": [self],
            "images": [real.pixels],
            "labels": [real.targets, real.labels],
            "normalization": [real.normalization],
            "quotas": [counts],
            "generator": [generator.get_state()],
            "device": [real.images.device.type],
        }

    def _described(
        self,
        real: RealImages,
        counts: list[int],
        generator: Generator,
        checkpoint: str | os.PathLike[str] | None,
    ) -> dict[str, str]:
        """What tells each argument from others, in few words."""
        shown = {
            "dc_replay": own_version(),
            "images": f"{len(real.images)} of shape {list(real.images.shape[1:])}",
            "quotas": str(dict(zip(real.labels, counts, strict=True))),
            "device": real.images.device.type,
        }
        arguments = self._arguments(real, counts, generator)
        # What it says of itself: parts of a user's may know which process they are in.
        arguments["condenser"] = [words(self)]
        described = {
            name: " ".join([*filter(None, [shown.get(name)]), f"#{fingerprint(parts)[:8]}"])
            for name, parts in arguments.items()
        }
        return {**described, "checkpoint": "none" if checkpoint is None else "a path"}

    def _pace(self, device: torch.device, ranks: Ranks) -> Pace:
        if self.seconds is not None:
            return ByClock(self.seconds, device, ranks)
        return BySteps(self.outer * self.inner)

    def _compiles(self, classes: int) -> bool:
        if self.objective is None:
            return wanted(self.compile, steps=0)
        if self.seconds is not None:
            return wanted(self.compile, seconds=self.seconds)
        return wanted(self.compile, steps=self.outer * self.inner * classes)


def _as_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"`device` is {device!r}, which names none: {str(error).splitlines()[0]}; pass cpu, "
            f"cuda or a torch.device"
        ) from None


# What the parts of a user's own must have, and one of ours.
_PARTS = {
    "selection": (("choose",), "RandomImages()"),
    "objective": (("statistics", "distance"), "GradientMatching()"),
    "sampler": (("draw",), "Uniform(64)"),
    "augment": (("draw", "apply"), "augmentation('color', 'crop', 'cutout')"),
    "training": (("optimizer", "step_function", "train"), "NetworkTraining()"),
    "update": (("__call__",), "OnReal()"),
}
_KINDS = {
    "subsets": SubsetMatching,
    "multisize": Multisize,
    "pixels": PixelStep,
}
_MAY_BE_NONE = ("selection", "objective", "subsets", "multisize", "update")

# A bar over seconds knows how many are left, whatever the rate is.
_CLOCK = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"


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
