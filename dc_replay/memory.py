"""A replay memory of uint8 exemplars that never outgrows its budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dc_replay import _files
from dc_replay._checks import integer, whole
from dc_replay.budgets import (
    Budget,
    ImagesPerClass,
    Smallest,
    TotalBytes,
    TotalImages,
    check_budget,
    shrunk,
)
from dc_replay.errors import ArgumentError, MemoryFileError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation, check_formation
from dc_replay.pixels import Normalization, Scale, check_normalization
from dc_replay.placement import HostImages
from dc_replay.randomness import check_generator

_AS_THEY_ARE = Formation(factor=1)
_CAPS: dict[str, type[ImagesPerClass | TotalImages | TotalBytes]] = {
    "images_per_class": ImagesPerClass,
    "total_images": TotalImages,
    "total_bytes": TotalBytes,
}


class ExemplarMemory:
    """Stored exemplars of all classes seen so far, within a budget.

    Images are kept as uint8 in ``[0, 1]`` image space, grouped by class in the order in which the
    classes arrived. When a budget leaves less room for a class, the class keeps its first images,
    so nothing is ever computed anew. Copying (:func:`copy.deepcopy`) and pickling work; files are
    read and written without pickle.

    It starts empty. The first :meth:`add` fixes the shape of the images, and the memory lives on
    the device of what was added last.

    Args:
        budget: How many images of each class may be stored.
        formation: How stored images become the images that a network sees.
        normalization: The map from ``[0, 1]`` to what a network sees; None leaves ``[0, 1]``.
        recipe: The name of the recipe whose exemplars it holds, for the record.

    Raises:
        ArgumentError: If ``budget`` is not a budget.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        formation: Formation = _AS_THEY_ARE,
        normalization: Normalization | None = None,
        recipe: str = "",
    ) -> None:
        check_budget(budget)
        check_formation(formation)
        check_normalization(normalization)
        if not isinstance(recipe, str):
            raise ArgumentError(f"`recipe` is {recipe!r}; pass its name")
        self._budget = budget
        self._formation = formation
        self._normalization = normalization
        self._exemplars: Exemplars | None = None
        self._counts: dict[int, int] = {}
        self._scale: Scale | None = None
        self.recipe = recipe

    @property
    def budget(self) -> Budget:
        """The bound that holds now; :meth:`shrink` lowers it."""
        return self._budget

    @property
    def formation(self) -> Formation:
        """How stored images become the images that a network sees."""
        return self._formation

    @property
    def normalization(self) -> Normalization | None:
        """The map from ``[0, 1]`` to what a network sees; can be set while the memory is empty."""
        return self._normalization

    @normalization.setter
    def normalization(self, normalization: Normalization | None) -> None:
        check_normalization(normalization)
        if self._exemplars is not None and normalization != self._normalization:
            raise ArgumentError(
                f"`normalization` is {normalization}, but the stored images are replayed with "
                f"{self._normalization}; set it before the first add, or start a new memory"
            )
        self._normalization, self._scale = normalization, None

    @property
    def exemplars(self) -> Exemplars | None:
        """Everything stored, not a copy; None while the memory is empty."""
        return self._exemplars

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes in order of arrival."""
        return tuple(self._counts)

    @property
    def counts(self) -> dict[int, int]:
        """Stored images of each class, in order of arrival."""
        return dict(self._counts)

    @property
    def labels(self) -> Tensor:
        """The class of each stored image, int64 ``[images]``."""
        if self._exemplars is None:
            return torch.empty(0, dtype=torch.int64)
        return self._exemplars.labels

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """``(channels, height, width)`` of a stored image; None while the memory is empty."""
        return None if self._exemplars is None else _shape_of(self._exemplars)

    @property
    def device(self) -> torch.device | None:
        """Where the images are; None while the memory is empty."""
        return None if self._exemplars is None else self._exemplars.pixels.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored pixels."""
        return 0 if self._exemplars is None else self._exemplars.nbytes

    @property
    def decoded_len(self) -> int:
        """How many images a network can be shown: stored images times those in each."""
        return len(self) * self._formation.images_per_stored

    def __len__(self) -> int:
        return 0 if self._exemplars is None else len(self._exemplars)

    def __repr__(self) -> str:
        return (
            f"ExemplarMemory({len(self)} images of {len(self.classes)} classes, {self.nbytes} "
            f"bytes, budget={self._budget}, {self._formation})"
        )

    def of_class(self, label: int) -> Tensor:
        """A copy of one class's stored images, uint8 ``[count, channels, height, width]``.

        Raises:
            ArgumentError: If there are none.
        """
        return self._filled().of_class(label)

    def quotas_with(
        self, new_classes: Sequence[int], image_shape: Sequence[int] | None = None
    ) -> dict[int, int]:
        """How many images each class may have once ``new_classes`` have arrived.

        Args:
            new_classes: The classes of an experience; those already stored keep their place.
            image_shape: ``(channels, height, width)``, which an empty memory does not know yet.

        Returns:
            A quota for every class, stored or new, in order of arrival.

        Raises:
            ArgumentError: If the budget is below one image per class, or ``image_shape`` is
                missing, malformed or another than that of the stored images.
        """
        shape: tuple[int, ...] | None = self.image_shape
        if image_shape is not None:
            try:
                shape = tuple(map(integer, image_shape))
            except TypeError:
                shape = ()
        if shape is None or len(shape) != 3 or min(shape) < 1:
            raise ArgumentError(
                f"`image_shape` is {image_shape}; while the memory is empty, pass the (channels, "
                f"height, width) of the images to come"
            )
        if self.image_shape not in (None, shape):
            raise ArgumentError(
                f"`image_shape` is {shape}, but the stored images are {self.image_shape}; use one "
                f"memory for each shape"
            )
        try:
            new = [int(label) for label in new_classes]
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(
                f"`new_classes` is {new_classes!r}; pass a sequence of class labels"
            ) from None
        classes = list(dict.fromkeys([*self.classes, *new]))
        return self._budget.quotas(classes, image_bytes=prod(shape))

    def add(self, exemplars: Exemplars) -> None:
        """Store new exemplars, cutting older classes to what the budget leaves them.

        A class that is stored already gets the new images in place of the old ones and keeps its
        place in the order. The pixels are copied. On an error the memory is as it was.

        Args:
            exemplars: At most ``quotas_with(exemplars.classes)`` images of each class, all of the
                shape that is stored. The memory moves to their device.

        Raises:
            ArgumentError: If there are no images, more of a class than its quota, images of
                another shape, a formation or normalization that does not fit them, or if the
                budget is below one image per class.
        """
        if not isinstance(exemplars, Exemplars):
            raise ArgumentError(
                f"`exemplars` is a {type(exemplars).__name__}, expected Exemplars; of the result "
                f"of condensing, pass the field `exemplars`"
            )
        self._check_images(exemplars)
        quotas = self.quotas_with(exemplars.classes, _shape_of(exemplars))
        arriving, held = _by_class(exemplars), _by_class(self._exemplars)
        for label, images in arriving.items():
            if len(images) > quotas[label]:
                raise ArgumentError(
                    f"`exemplars` holds {len(images)} images of class {label}, but {self._budget} "
                    f"leaves it {quotas[label]}; pass at most quotas_with(classes) images, for "
                    f"example exemplars.prefix(quotas)"
                )
        device = exemplars.pixels.device
        kept = {label: images[: quotas[label]].to(device) for label, images in held.items()}
        # An update keeps the place of a key that is there: a returning class stays where it was.
        self._keep(_join(kept | arriving))

    def shrink(
        self,
        *,
        images_per_class: int | None = None,
        total_images: int | None = None,
        total_bytes: int | None = None,
    ) -> None:
        """Cut every class to its first images, freeing the rest, and lower the budget to match.

        Totals are shared evenly, as by :class:`~dc_replay.budgets.TotalImages`; what a class with
        fewer images leaves unused stays unused. Classes that arrive later obey both the new bound
        and the one from before.

        Args:
            images_per_class: The most stored images that any class keeps.
            total_images: The most stored images of all classes together.
            total_bytes: The most pixel bytes of all classes together.

        Raises:
            ArgumentError: If not exactly one argument is given, it is below one image per class,
                it is above what is stored, or the memory is empty. The memory is as it was.
        """
        stored = self._filled()
        arguments = zip(_CAPS, (images_per_class, total_images, total_bytes), strict=True)
        given = {name: value for name, value in arguments if value is not None}
        if len(given) != 1:
            raise ArgumentError(
                f"`shrink` got {', '.join(given) or 'no argument'}; pass exactly one of "
                f"`images_per_class`, `total_images` and `total_bytes`"
            )
        [(name, value)] = given.items()
        counts, image_bytes = stored.counts, prod(_shape_of(stored))
        cap = _CAPS[name](whole(name, value))
        self._obey(shrunk(self._budget, counts, image_bytes=image_bytes, cap=cap, name=name))

    def limit(self, bound: Budget) -> None:
        """Obey a further bound from now on, cutting every class to its first images as needed.

        Unlike :meth:`shrink`, the bound may be above what is stored, or be set while nothing is.

        Raises:
            ArgumentError: If ``bound`` is no budget, or is below one image for each class that is
                stored. The memory is as it was.
        """
        check_budget(bound)
        self._obey(Smallest((self._budget, bound)))

    def sample(self, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw decoded images, each equally likely, with replacement.

        Args:
            count: How many, at least 1.
            generator: The source of randomness. One on the memory's device avoids a transfer.

        Returns:
            Normalised float32 images ``[count, channels, height, width]`` and int64 labels
            ``[count]``, on the memory's device; on the generator's, if that is a GPU and the memory
            in the host's memory.

        Raises:
            ArgumentError: If the memory is empty or ``count`` is below 1.
        """
        stored = self._filled()
        size = (whole("count", count),)
        check_generator(generator)
        device = generator.device
        index = torch.randint(self.decoded_len, size, generator=generator, device=device)
        images, labels = shown_at(stored, self._formation, index)
        return self._normalise(images), labels

    def decoded(self, *, normalised: bool = True) -> tuple[Tensor, Tensor]:
        """All decoded images at once, image-major within each class; 4 bytes per value.

        Args:
            normalised: Apply the normalization; False returns values in ``[0, 1]``.

        Returns:
            float32 images ``[decoded_len, channels, height, width]`` and int64 labels
            ``[decoded_len]``, on the memory's device.

        Raises:
            ArgumentError: If the memory is empty.
        """
        stored = self._filled()
        images = self._formation.decode(self._formation.open(stored.pixels))
        labels = stored.labels.repeat_interleave(self._formation.images_per_stored)
        return self._normalise(images) if normalised else images, labels

    def as_stored(self, images: Tensor) -> Tensor:
        """What storing would leave of images, such as of new ones that are replayed beside.

        A network that sees old classes only as they come out of the memory, and new ones only as
        they are, learns to tell them apart by that.

        Args:
            images: Floating-point images ``[batch, channels, height, width]``, normalised as those
                of :meth:`sample`. With compression, what lies outside of ``[0, 1]`` without the
                normalization is clamped.

        Returns:
            Images of the same shape and type; the same ones where images are stored as they are.

        Raises:
            ArgumentError: If images of this shape and type cannot be stored.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ArgumentError(
                f"`images` has shape {list(images.shape)} and type {images.dtype}, but must be "
                f"normalised images [batch, channels, height, width] of a floating-point type"
            )
        self._check_shape("images", images)
        if self._formation.images_per_stored == 1:
            return images
        scale = self._scale_at(images.device)
        plain = images.to(torch.promote_types(images.dtype, torch.float32))
        plain = self._formation.as_stored(plain if scale is None else scale.invert(plain))
        return (plain if scale is None else scale.normalise(plain)).to(images.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a safetensors file, replacing an older one in a single step.

        A budget of the user's own class is not written; such a file is loaded with ``budget=``.

        Raises:
            ArgumentError: If the memory is empty, or ``path`` is a folder or lies in none.
            DCReplayError: If it cannot be written, on a full disk for example; what ``path`` held
                before is then still there.
        """
        stored, scale = self._filled(), self._normalization
        contents = _files.MemoryFile(
            pixels=stored.pixels.cpu().numpy(),
            counts=stored.counts,
            factor=self._formation.factor,
            compression=self._formation.compression,
            normalization=None if scale is None else (scale.mean, scale.std),
            budget=self._budget,
            recipe=self.recipe,
            versions={"torch": str(torch.__version__)},
        )
        _files.write(path, contents)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        budget: Budget | None = None,
    ) -> ExemplarMemory:
        """Read a memory that :meth:`save` wrote.

        Args:
            path: The file.
            device: Where to put the images.
            budget: The budget to go on with; None takes the one in the file.

        Raises:
            MemoryFileError: If the file is missing, damaged, of another format or version,
                contradicts itself, or has no budget while none is given.
            ArgumentError: If ``budget`` is below what the file holds.
        """
        found = _files.read(path)
        chosen = found.budget if budget is None else budget
        if chosen is None:
            raise MemoryFileError(
                f"{os.fspath(path)}: the file was saved with a budget that it cannot describe; "
                f"pass `budget`"
            )
        scale = found.normalization
        memory = cls(
            budget=chosen,
            formation=Formation(found.factor, found.compression),
            normalization=None if scale is None else Normalization(*scale),
            recipe=found.recipe,
        )
        exemplars = Exemplars(torch.from_numpy(found.pixels), torch.from_numpy(found.labels))
        try:
            memory.add(exemplars.to(device))
        except ArgumentError as error:
            if budget is None:
                raise MemoryFileError(
                    f"{os.fspath(path)}: the file holds more than its own budget allows ({error}); "
                    f"pass a larger `budget`"
                ) from error
            raise ArgumentError(
                f"`budget` is {budget}, but {os.fspath(path)} holds more ({error}); load the file "
                f"without `budget` and call shrink"
            ) from error
        return memory

    def _obey(self, budget: Budget) -> None:
        """Take a lower budget, and cut what is stored to it; on an error nothing has changed."""
        stored = self._exemplars
        if stored is not None:
            quotas = budget.quotas(list(stored.counts), image_bytes=prod(_shape_of(stored)))
            if any(count > quotas[label] for label, count in stored.counts.items()):
                self._keep(stored.prefix(quotas))
        self._budget = budget

    def _keep(self, exemplars: Exemplars) -> None:
        self._exemplars = exemplars
        # Counting waits for the device, which each draw from the memory would then do.
        self._counts = exemplars.counts

    def _filled(self) -> Exemplars:
        if self._exemplars is None:
            raise ArgumentError(
                "the memory is empty; call `add` with exemplars first, or, if Avalanche has loaded "
                "a checkpoint, find the plugin with the one that it filled in strategy.plugins"
            )
        return self._exemplars

    def _normalise(self, images: Tensor) -> Tensor:
        scale = self._scale_at(images.device)
        return images if scale is None else scale.normalise(images)

    def _scale_at(self, device: torch.device) -> Scale | None:
        if self._normalization is None:
            return None
        if self._scale is None or self._scale.mean.device != device:
            self._scale = self._normalization.scale(device)
        return self._scale

    def _check_images(self, exemplars: Exemplars) -> None:
        if not exemplars.pixels.numel():
            raise ArgumentError(
                f"`exemplars` holds no images (shape {list(exemplars.pixels.shape)}); pass at "
                f"least one image of at least one class"
            )
        self._check_shape("exemplars", exemplars.pixels)

    def _check_shape(self, argument: str, images: Tensor) -> None:
        channels, height, width = images.shape[1:]
        if self.image_shape not in (None, (channels, height, width)):
            raise ArgumentError(
                f"`{argument}` holds images of shape {(channels, height, width)}, but the stored "
                f"ones are {self.image_shape}; use one memory for each shape"
            )
        self._formation.check(channels, height, width)
        if self._normalization is not None and self._normalization.channels != channels:
            raise ArgumentError(
                f"`{argument}` holds images of {channels} channels, but `normalization` is for "
                f"{self._normalization.channels}; pass one mean and std per channel"
            )


def shown_at(exemplars: Exemplars, formation: Formation, index: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the decoded images, and their labels.

    They are formed where the exemplars are. But of exemplars in the host's memory, only the bytes
    that are needed are brought to the GPU that the index is on, and formed there.

    Args:
        exemplars: What is stored.
        formation: How it becomes images.
        index: int64 positions ``[batch]`` among the decoded images.

    Returns:
        Floating-point images ``[batch, channels, height, width]`` in ``[0, 1]``, and int64 labels.
    """
    here = exemplars.pixels.device
    if here.type == "cpu" and index.device.type != "cpu":
        return _brought_over(exemplars, formation, index)
    index = index.to(here)
    labels = exemplars.labels[index // formation.images_per_stored]
    return formation.decode_at(exemplars.pixels, index), labels


def _brought_over(
    exemplars: Exemplars, formation: Formation, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, formed where the index is."""
    each = formation.images_per_stored
    image = index // each
    stored = HostImages(exemplars.pixels, index.device)[image]
    places = torch.arange(len(index), device=index.device) * each + index % each
    labels = exemplars.labels[image.to(exemplars.labels.device)].to(index.device)
    return formation.decode_at(stored, places), labels


def _shape_of(exemplars: Exemplars) -> tuple[int, int, int]:
    channels, height, width = exemplars.pixels.shape[1:]
    return channels, height, width


def _by_class(exemplars: Exemplars | None) -> dict[int, Tensor]:
    if exemplars is None:
        return {}
    counts = exemplars.counts
    return dict(zip(counts, torch.split(exemplars.pixels, list(counts.values())), strict=True))


def _join(images: dict[int, Tensor]) -> Exemplars:
    """Copy the images of each class into one allocation."""
    pixels = torch.cat(list(images.values())).contiguous()
    counts = torch.tensor([len(part) for part in images.values()])
    labels = torch.tensor(list(images)).repeat_interleave(counts)
    return Exemplars(pixels, labels.to(pixels.device))
