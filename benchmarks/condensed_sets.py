"""Condensed sets of all classes at once: made, kept on disk, and trained on from scratch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.compiled import compile_layers
from benchmarks.data import ImageData
from benchmarks.methods import method
from benchmarks.presets import Preset, matching_factory, network_factory
from benchmarks.results import ResultStore, Row, environment
from benchmarks.workload import Workload
from dc_replay import Condenser, ExemplarMemory, Exemplars, Formation, ImagesPerClass
from dc_replay._progress import progress
from dc_replay.augment import augmentation, cutmix
from dc_replay.compilation import CompileMode
from dc_replay.errors import ArgumentError
from dc_replay.networks import Precision, computed_in, set_precision
from dc_replay.pixels import dequantise


@dataclass(frozen=True, eq=False)
class CondensedSet:
    """One condensation of all classes.

    Attributes:
        exemplars: The stored images.
        formation: How they become what a network sees.
        seconds: What condensing took.
        prefix_sizes: The prefix that multisize condensation matched in each period, averaged over
            the classes; empty without it.
        precision: What the convolutions of its matching networks computed in; None if that was not
            noted.
    """

    exemplars: Exemplars
    formation: Formation
    seconds: float
    prefix_sizes: list[float]
    precision: str | None = None

    @classmethod
    def of(cls, memory: ExemplarMemory, row: Row) -> CondensedSet:
        """What a memory stores, which is not empty, and what was noted when it was made."""
        exemplars = memory.exemplars
        if exemplars is None:
            raise ArgumentError("`memory` is empty; condense something into it first")
        noted = row["seconds"], row["prefix_sizes"], row.get("precision")
        return cls(exemplars, memory.formation, *noted)

    def prefix(self, size: int) -> CondensedSet:
        """The first images of each class."""
        quotas = dict.fromkeys(self.exemplars.classes, size)
        return replace(self, exemplars=self.exemplars.prefix(quotas))


class Condensery:
    """Condenses sets, and keeps them under the output folder so that each is made once.

    Args:
        workload: The command line.
        settings: The preset with what overrides it.
        store: Where results go; what a set cost is kept there, too.
        network: Name of the network to train; the one that condenses follows from it, see
            :func:`~benchmarks.presets.matching_factory`.
    """

    def __init__(
        self, workload: Workload, settings: Preset, store: ResultStore, *, network: str
    ) -> None:
        self.workload = workload
        self.settings = settings
        self.store = store
        self.network = network
        self.device = workload.chosen_device()

    def check(self, names: Sequence[str], sizes: Sequence[int], data: ImageData) -> None:
        """Find out before anything takes time whether every method can condense every size.

        Raises:
            ArgumentError: If one cannot.
        """
        for name in names:
            for ipc in sizes:
                condenser = self._condenser(name, data, ipc)
                decoded = ipc * condenser.formation.images_per_stored
                subsets = condenser.subsets
                if subsets is not None and decoded < subsets.parts:
                    raise ArgumentError(
                        f"{name} divides the decoded images of a class into {subsets.parts} parts, "
                        f"but at {ipc} stored images per class and factor "
                        f"{condenser.formation.factor} there are {decoded}; leave +sm out"
                    )

    def condense(self, name: str, data: ImageData, *, ipc: int, seed: int) -> CondensedSet:
        """Condense all classes by a method, or load what was condensed before."""
        path = self.store.out_dir / "sets" / f"{name}-{ipc}-{seed}.safetensors"
        known = self.store.find(name, seed, kind="set", ipc=ipc)
        if known is not None and path.exists():
            memory = ExemplarMemory.load(path, device=self.device)
            return CondensedSet.of(memory, known)
        condenser = self._condenser(name, data, ipc)
        state = self.store.out_dir / "state" / path.name
        state.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        condensed = condenser.condense(
            data.x_train.to(self.device),
            data.y_train.to(self.device),
            quotas=ipc,
            generator=Generator(device=self.device).manual_seed(seed),
            normalization=data.normalization(),
            progress=not self.workload.quiet,
            checkpoint=state,
        )
        seconds = condensed.seconds_before + time.perf_counter() - started
        memory = ExemplarMemory(
            budget=ImagesPerClass(ipc),
            formation=condenser.formation,
            normalization=data.normalization(),
            recipe=name,
        )
        memory.add(condensed.exemplars)
        path.parent.mkdir(parents=True, exist_ok=True)
        memory.save(path)
        sizes = condensed.history.get("prefix_sizes", [])
        means = [sum(chosen) / len(chosen) for chosen in sizes]
        row = {
            "kind": "set",
            "method": name,
            "seed": seed,
            "ipc": ipc,
            "seconds": seconds,
            "prefix_sizes": means,
            "precision": computed_in(self.workload.precision, self.device),
            **environment(self.device),
        }
        self.store.append(row)
        state.unlink(missing_ok=True)
        return CondensedSet.of(memory, row)

    def _condenser(self, name: str, data: ImageData, ipc: int) -> Condenser:
        channels, height, width = data.image_shape
        network = matching_factory(
            self.network, channels=channels, size=(height, width), width=self.settings.width
        )
        condenser = method(name).condenser(
            self.settings, factor=self.workload.factor, ipc=ipc, network=network
        )
        return replace(
            condenser,
            compile=self.workload.compile_mode(),
            precision=self.workload.precision,
        )


class FreshTraining:
    """Trains a freshly initialised network on a condensed set, and tests it on real images.

    As in the papers: SGD with momentum, rate lowered at 60 and 80 percent of the steps, every
    image augmented by itself, CutMix. The number of gradient steps is the same for every set,
    whatever its size.

    Args:
        network: Name of the network, see :func:`~benchmarks.presets.network_factory`.
        data: Images to test on, and what they are normalised by.
        settings: Steps, batch, rate and width.
        device: Where to run.
        mode: Whether to compile the network.
        precision: What its convolutions compute in.
        quiet: Show no progress bar.
    """

    def __init__(
        self,
        network: str,
        data: ImageData,
        settings: Preset,
        *,
        device: torch.device,
        mode: CompileMode,
        precision: Precision,
        quiet: bool,
    ) -> None:
        channels, height, width = data.image_shape
        self._factory = network_factory(
            network, channels=channels, size=(height, width), width=settings.width
        )
        self._data = data
        self._normalization = data.normalization()
        self._settings = settings
        self._device = device
        self._quiet = quiet
        self._augment = augmentation("color", "crop", "cutout", "flip", "scale", "rotate")
        # Built, and compiled, once; every run starts from the weights of a new one.
        self._model = compile_layers(
            self._factory(data.classes), batch=settings.batch, mode=mode, steps=settings.set_steps
        )
        set_precision(self._model, precision, device)
        self._model.to(device)

    def accuracy(self, found: CondensedSet, *, seed: int) -> float:
        """Train on a set and return the accuracy on all test images in percent."""
        torch.manual_seed(seed)
        generator = Generator().manual_seed(seed)
        fresh = self._factory(self._data.classes).state_dict()
        own = self._model.state_dict()
        self._model.load_state_dict(dict(zip(own, fresh.values(), strict=True)))
        stored = found.exemplars.to(self._device)
        images = found.formation.decode(found.formation.open(stored.pixels))
        labels = stored.labels.repeat_interleave(found.formation.images_per_stored)
        self._train(images, labels, generator)
        return self._test()

    def _train(self, images: Tensor, labels: Tensor, generator: Generator) -> None:
        settings = self._settings
        optimizer = torch.optim.SGD(
            self._model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4
        )
        steps = settings.set_steps
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [int(0.6 * steps), int(0.8 * steps)], gamma=0.2
        )
        # Epoch after epoch in one row, so that sets smaller than a batch fill it, too.
        epochs = -(-steps * settings.batch // len(images))
        order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
        batches = order[: steps * settings.batch].to(images.device).split(settings.batch)
        self._model.train()
        for index in progress(batches, desc="train", unit="step", leave=False, disable=self._quiet):
            batch = self._augment(self._normalization.apply(images[index]), generator)
            batch, partners, share = cutmix(batch, generator, probability=0.5)
            logits, own = self._model(batch), labels[index]
            loss = share * F.cross_entropy(logits, own)
            loss = loss + (1 - share) * F.cross_entropy(logits, own[partners])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()

    def _test(self) -> float:
        self._model.eval()
        right = 0
        with torch.no_grad():
            for images, labels in zip(
                self._data.x_test.split(500), self._data.y_test.split(500), strict=True
            ):
                seen = self._normalization.apply(dequantise(images.to(self._device)))
                right += int((self._model(seen).argmax(1).cpu() == labels).sum())
        return 100 * right / len(self._data.y_test)
