"""The memory file: safetensors, read with suspicion and written in one piece, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from dc_replay._checks import check_compression, check_crops, check_factor, checked_scale, path_of
from dc_replay._layout import layout_of, read_layers
from dc_replay._writing import write_whole
from dc_replay.budgets import Budget, ImagesPerClass, Smallest, TotalBytes, TotalImages
from dc_replay.errors import MemoryFileError

FORMAT = "dc-replay-memory"
FORMAT_VERSION = "1"
COMPRESSED = "2"
"""The version of files whose images are compressed; others stay at the first."""
_BUDGETS = (ImagesPerClass, TotalImages, TotalBytes)
_VERSIONS = {
    "dc-replay": "dc_replay_version",
    "torch": "torch_version",
    "safetensors": "safetensors_version",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class MemoryFile:
    """What a memory file holds.

    Attributes:
        pixels: uint8 ``[images, channels, height, width]``, those of each class together.
        counts: Stored images of each class, in order of arrival.
        factor: Crops along each side of a stored image.
        compression: Images that share the bytes of one; see
            :class:`~dc_replay.formation.Formation`.
        normalization: The mean and the standard deviation of each channel; None leaves ``[0, 1]``.
        budget: The bound they obey; None if it is of a kind that a file cannot describe.
        recipe: The name of the recipe that made them, possibly empty.
        versions: Those of dc-replay, torch and safetensors that wrote it, as far as it says.
            Writing takes torch's from here, because it does without torch.
    """

    pixels: NDArray[np.uint8]
    counts: Mapping[int, int]
    factor: int
    compression: int = 1
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None
    budget: Budget | None
    recipe: str
    versions: Mapping[str, str]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, int64 ``[images]``."""
        return np.repeat(np.array(list(self.counts), np.int64), list(self.counts.values()))

    @property
    def images_per_stored(self) -> int:
        """How many images a network sees of each that is stored."""
        return self.compression * self.factor**2

    @property
    def image_bytes(self) -> int:
        """Bytes of one stored image."""
        return prod(self.pixels.shape[1:])

    def by_class(self) -> dict[int, NDArray[np.uint8]]:
        """Views of each class's images, uint8 ``[count, channels, height, width]``."""
        ends = np.cumsum(list(self.counts.values()))
        return dict(zip(self.counts, np.split(self.pixels, ends[:-1]), strict=True))

    def layers(self, stored: NDArray[np.uint8], most: int | None = None) -> NDArray[np.uint8]:
        """What there is to look at: stored images, or with compression those that they hold.

        Args:
            stored: Some of the stored images, uint8 ``[count, channels, height, width]``.
            most: Decode no more than so many.

        Returns:
            uint8 ``[images, channels, height, width]``.
        """
        if self.compression == 1:
            return stored[:most]
        return read_layers(stored, self.compression, most)

    def quotas(self, budget: Budget) -> dict[int, int]:
        """What a budget leaves each class; see :meth:`~dc_replay.budgets.Budget.quotas`."""
        return budget.quotas(list(self.counts), image_bytes=self.image_bytes)

    def cut(self, budget: Budget) -> MemoryFile:
        """The first images of each class, at most what ``budget`` leaves it.

        Raises:
            ArgumentError: If the budget is below one image per class.
        """
        quotas = self.quotas(budget)
        kept = {label: images[: quotas[label]] for label, images in self.by_class().items()}
        return replace(
            self,
            pixels=np.concatenate(list(kept.values())),
            counts={label: len(images) for label, images in kept.items()},
            budget=budget,
        )


def write(path: str | os.PathLike[str], memory: MemoryFile, *, name: str = "path") -> None:
    """Write a memory file; a reader sees the old file or the whole new one, never a part.

    The same memory gives the same bytes.

    Args:
        path: The file.
        memory: What to write.
        name: What the message of an error calls the path.

    Raises:
        ArgumentError: If the folder does not exist, or ``path`` is a folder or no path.
        DCReplayError: If writing fails, on a full disk for example.
    """
    write_whole(path, _serialise(memory), name=name)


def read(path: str | os.PathLike[str]) -> MemoryFile:
    """Read a memory file, believing nothing in it that has not been checked.

    Raises:
        ArgumentError: If ``path`` is no path.
        MemoryFileError: If the file is missing, damaged, of another format or version, or
            contradicts itself.
    """
    path = path_of("path", path)
    if os.path.isdir(path):
        raise MemoryFileError(f"{path}: this is a folder; name the file that was saved into it")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_format(metadata)
            names = list(file.keys())
            parts = [file.get_slice(name) for name in names]
            kinds = ((part.get_dtype(), part.get_shape()) for part in parts)
            _check_tensors(dict(zip(names, kinds, strict=True)))
            # Copies: what the library returns may be a window into the mapped file.
            pixels = file.get_tensor("pixels").copy()
            labels = file.get_tensor("labels").copy()
        return _interpret(metadata, pixels, labels)
    except FileNotFoundError:
        raise MemoryFileError(f"{path}: there is no such file; check the path") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise MemoryFileError(
            f"{path}: this is not a whole safetensors file ({error}); it may be cut short or of "
            f"another kind, so save the memory again"
        ) from error
    except _Fault as fault:
        raise MemoryFileError(f"{path}: {fault}") from fault.__cause__


class _Fault(Exception):
    """What is wrong with the file, not yet saying which file."""


def _serialise(memory: MemoryFile) -> bytes:
    counts, scale = memory.counts, memory.normalization
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "factor": str(memory.factor),
        "classes": json.dumps(list(counts)),
        "counts": json.dumps(list(counts.values())),
        "normalization": json.dumps(None if scale is None else {"mean": scale[0], "std": scale[1]}),
        "recipe": memory.recipe,
        "budget": json.dumps(_describe(memory.budget)),
        "created_by": "dc-replay",
        "dc_replay_version": own_version(),
        "torch_version": memory.versions.get("torch", "unknown"),
        "safetensors_version": safetensors.__version__,
    }
    if memory.compression != 1:  # what knows nothing of it must not take bytes for pixels
        compression = {"compression": str(memory.compression)}
        metadata |= {"format_version": COMPRESSED, **compression}
    tensors: dict[str, NDArray[Any]] = {
        "pixels": np.ascontiguousarray(memory.pixels),
        "labels": memory.labels,
    }
    data = save(tensors, metadata)
    # The library orders metadata differently in every process; sort it, padded to 8 as the format
    # asks, so that equal memories are equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise _Fault(
            f"the metadata `format` is {metadata.get('format')!r}, expected {FORMAT!r}; this is a "
            f"safetensors file, but not one that ExemplarMemory.save wrote"
        )
    if metadata.get("format_version") not in (FORMAT_VERSION, COMPRESSED):
        raise _Fault(
            f"the metadata `format_version` is {metadata.get('format_version')!r}, but this "
            f"release reads {FORMAT_VERSION!r} and {COMPRESSED!r}; install the dc-replay that "
            f"wrote it"
        )


def _check_tensors(found: Mapping[str, tuple[str, list[int]]]) -> None:
    if set(found) != {"pixels", "labels"}:
        raise _Fault(f"the tensors are {sorted(found)}, expected ['labels', 'pixels']; {_AGAIN}")
    (pixel_type, pixel_shape), (label_type, label_shape) = found["pixels"], found["labels"]
    if pixel_type != "U8" or len(pixel_shape) != 4 or 0 in pixel_shape:
        raise _Fault(
            f"`pixels` is {pixel_type} of shape {pixel_shape}, expected U8 of shape "
            f"[images, channels, height, width] with no side 0; {_AGAIN}"
        )
    if label_type != "I64" or label_shape != pixel_shape[:1]:
        raise _Fault(
            f"`labels` is {label_type} of shape {label_shape}, expected I64 of shape "
            f"{pixel_shape[:1]}; {_AGAIN}"
        )


def _interpret(
    metadata: Mapping[str, str], pixels: NDArray[np.uint8], labels: NDArray[np.int64]
) -> MemoryFile:
    classes, counts = _integers(metadata, "classes"), _integers(metadata, "counts")
    if len(classes) != len(counts) or len(set(classes)) != len(classes) or min(counts) < 1:
        raise _Fault(
            f"the metadata names classes {classes} with counts {counts}, expected distinct classes "
            f"and one count of at least 1 for each; {_AGAIN}"
        )
    if sum(counts) != len(pixels):
        raise _Fault(
            f"the metadata `counts` add up to {sum(counts)}, but `pixels` holds {len(pixels)} "
            f"images; {_AGAIN}"
        )
    if not np.array_equal(labels, np.repeat(np.array(classes, np.int64), counts)):
        raise _Fault(
            f"`labels` disagrees with the metadata `classes` and `counts`, which promise {counts} "
            f"images of {classes} in this order; {_AGAIN}"
        )
    scale = _json(metadata, "normalization")
    try:
        factor = int(_text(metadata, "factor"))
        check_factor(factor)
        compressed = metadata["format_version"] == COMPRESSED
        compression = int(_text(metadata, "compression")) if compressed else 1
        check_compression(compression)
        if compressed and compression == 1:
            raise ValueError("`compression` is 1, which is of the other version")
        check_crops(factor, *pixels.shape[2:])
        if compressed:
            layout_of(pixels.shape[1:], compression)
        scale = None if scale is None else checked_scale(**scale)
        budget = _restore(_json(metadata, "budget"))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise _Fault(
            f"the metadata `factor`, `compression`, `normalization` or `budget` cannot be used "
            f"({error}); {_AGAIN}"
        ) from error
    if scale is not None and len(scale[0]) != pixels.shape[1]:
        raise _Fault(
            f"the metadata `normalization` is for {len(scale[0])} channels, but `pixels` has "
            f"{pixels.shape[1]}; {_AGAIN}"
        )
    return MemoryFile(
        pixels=pixels,
        counts=dict(zip(classes, counts, strict=True)),
        factor=factor,
        compression=compression,
        normalization=scale,
        budget=budget,
        recipe=_text(metadata, "recipe"),
        versions={name: metadata[key] for name, key in _VERSIONS.items() if key in metadata},
    )


def _text(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise _Fault(f"the metadata has no `{key}`; {_AGAIN}")
    return metadata[key]


def _json(metadata: Mapping[str, str], key: str) -> Any:
    text = _text(metadata, key)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"the metadata `{key}` is {text[:60]!r}, expected JSON; {_AGAIN}") from error


def _integers(metadata: Mapping[str, str], key: str) -> list[int]:
    found = _json(metadata, key)
    # type() rather than isinstance(): true and false are no numbers here.
    right = isinstance(found, list) and all(type(item) is int for item in found)
    if not right or not found or not all(-(2**63) <= item < 2**63 for item in found):
        raise _Fault(
            f"the metadata `{key}` is {str(found)[:60]}, expected a list of whole numbers, not "
            f"empty; {_AGAIN}"
        )
    return list(found)


def _describe(budget: Budget | None) -> dict[str, Any] | None:
    """JSON for the budgets of this package; None for others, whose code a file cannot hold."""
    if isinstance(budget, Smallest):
        parts = [_describe(part) for part in budget.budgets]
        return None if None in parts else {"kind": "Smallest", "budgets": parts}
    if isinstance(budget, _BUDGETS) and type(budget) in _BUDGETS:
        return {"kind": type(budget).__name__, **asdict(budget)}
    return None


def _restore(found: Any) -> Budget | None:
    if found is None:
        return None
    if found["kind"] == "Smallest":
        return Smallest(tuple(_restore_one(part) for part in found["budgets"]))
    return _restore_one(found)


def _restore_one(found: Any) -> Budget:
    fields = {key: value for key, value in found.items() if key != "kind"}
    return {kind.__name__: kind for kind in _BUDGETS}[found["kind"]](**fields)


def own_version() -> str:
    try:
        return version("dc-replay")
    except PackageNotFoundError:
        return "unknown"


_AGAIN = "the file is damaged or was edited, so save the memory again"
