"""Where the benchmarks' images come from: the sources that a command line can name."""

from __future__ import annotations

import socket
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks.image_data import DataError, ImageData, class_order, hold_out, keep_classes, listed

__all__ = ["DataError", "ImageData", "class_order", "hold_out", "keep_classes", "load"]

DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer after which a server counts as out of reach."""


def load(name: str, *, root: Path | None = None) -> ImageData:
    """Load the images that ``name`` stands for.

    Args:
        name: One of

            - ``cifar10``, ``cifar100``, ``svhn``, ``mnist``, ``fashion``: by torchvision, which
              downloads what it does not find under ``root``;
            - ``digits``: the 1,797 handwritten 8x8 digits that ship with scikit-learn; the last
              fifth of each class is the test set;
            - ``npz:PATH``: a file with ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, if it
              likes, ``class_names``. Images are ``[N, H, W, C]`` or ``[N, H, W]``, uint8 or
              floating point in ``[0, 1]``; labels are integers from 0 without gaps;
            - ``folder:PATH``: images of one size as ``train/CLASS/*`` and ``test/CLASS/*``; the
              classes are numbered in the order of their names.
        root: Where torchvision keeps its files; ``data`` in the working directory by default.

    Raises:
        DataError: If the source is unknown, absent, out of reach or not as described.
    """
    kind, colon, location = name.partition(":")
    if kind in _TORCHVISION and not colon:
        return _from_torchvision(kind, Path("data") if root is None else Path(root).expanduser())
    if name == "digits":
        return _from_sklearn()
    if kind in ("npz", "folder") and colon:
        path = Path(location).expanduser()
        if not location or not path.exists():
            raise DataError(
                f"`data` is {name!r}, but {location!r} does not exist; "
                f"write {kind}:PATH with the path of an existing {_KINDS[kind]}"
            )
        return _from_npz(path) if kind == "npz" else _from_folder(path)
    raise DataError(
        f"`data` is {name!r}, which is no known source; choose one of "
        f"{', '.join((*_TORCHVISION, 'digits'))}, npz:PATH or folder:PATH"
    )


@dataclass(frozen=True)
class _TorchvisionSource:
    open: Callable[[Path, bool], Any]
    by_hand: str
    class_names: tuple[str, ...] | None = None


def _files_by_hand(dataset: type[datasets.MNIST]) -> str:
    files = ", ".join(file for file, _ in dataset.resources)
    return f"{files} into {{root}}/{dataset.__name__}/raw"


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_KINDS = {"npz": "file", "folder": "folder"}
_TORCHVISION = {
    "cifar10": _TorchvisionSource(
        lambda root, train: datasets.CIFAR10(root, train=train, download=True),
        "cifar-10-python.tar.gz, or its unpacked folder cifar-10-batches-py, into {root}",
    ),
    "cifar100": _TorchvisionSource(
        lambda root, train: datasets.CIFAR100(root, train=train, download=True),
        "cifar-100-python.tar.gz, or its unpacked folder cifar-100-python, into {root}",
    ),
    "svhn": _TorchvisionSource(
        lambda root, train: datasets.SVHN(root, split="train" if train else "test", download=True),
        "train_32x32.mat and test_32x32.mat into {root}",
        _DIGIT_NAMES,
    ),
    "mnist": _TorchvisionSource(
        lambda root, train: datasets.MNIST(root, train=train, download=True),
        _files_by_hand(datasets.MNIST),
        _DIGIT_NAMES,
    ),
    "fashion": _TorchvisionSource(
        lambda root, train: datasets.FashionMNIST(root, train=train, download=True),
        _files_by_hand(datasets.FashionMNIST),
    ),
}


def _from_torchvision(name: str, root: Path) -> ImageData:
    source = _TORCHVISION[name]
    try:
        with _impatient_sockets():
            train, test = source.open(root, True), source.open(root, False)
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        raise DataError(
            f"`data` is {name!r}, but its files under {str(root)!r} could be neither read nor "
            f"downloaded ({_reason(error)}). Put {source.by_hand.format(root=root)} and start "
            "again, or use a copy you have as npz:PATH or folder:PATH"
        ) from error

    def tensors(dataset: Any) -> tuple[Tensor, Tensor]:
        images = torch.as_tensor(dataset.data)
        labels = dataset.labels if name == "svhn" else dataset.targets
        # SVHN alone comes as [N, C, H, W].
        images = images.contiguous() if name == "svhn" else _channels_first(images)
        return images, torch.as_tensor(labels, dtype=torch.int64)

    x_train, y_train = tensors(train)
    x_test, y_test = tensors(test)
    names = source.class_names or tuple(train.classes)
    return ImageData(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        classes=len(names),
        class_names=names,
    )


@contextmanager
def _impatient_sockets() -> Iterator[None]:
    # torchvision sets no timeout, so behind a firewall a download would hang instead of failing.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _from_sklearn() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    images = _channels_first((torch.as_tensor(digits.images) * 255 / 16).round().to(torch.uint8))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        held_out[rows[len(rows) - len(rows) // 5 :]] = True
    return ImageData(
        name="digits",
        x_train=images[~held_out],
        y_train=labels[~held_out],
        x_test=images[held_out],
        y_test=labels[held_out],
        classes=10,
        class_names=_DIGIT_NAMES,
    )


def _from_npz(path: Path) -> ImageData:
    arrays = _read_npz(path)
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise DataError(
            f"{str(path)!r} has no {', '.join(f'`{key}`' for key in missing)}, only "
            f"{listed(sorted(arrays))}; save x_train, y_train, x_test and y_test"
        )
    y_train = _npz_labels(arrays["y_train"], "y_train", path)
    y_test = _npz_labels(arrays["y_test"], "y_test", path)
    classes = int(y_train.max()) + 1 if len(y_train) else 0
    names = tuple(str(name) for name in arrays.get("class_names", range(classes)))
    if len(names) < classes:
        raise DataError(
            f"`class_names` in {str(path)!r} holds {len(names)} names, but `y_train` has labels up "
            f"to {classes - 1}; give one name per class"
        )
    return ImageData(
        name=path.stem,
        x_train=_npz_images(arrays["x_train"], "x_train", path),
        y_train=y_train,
        x_test=_npz_images(arrays["x_test"], "x_test", path),
        y_test=y_test,
        classes=classes,
        class_names=names[:classes],
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{str(path)!r} cannot be read as an .npz of plain arrays ({_reason(error)}); "
            "write it with numpy.savez from arrays that are not of dtype object"
        ) from error


def _npz_images(array: np.ndarray, key: str, path: Path) -> Tensor:
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 2, 3, 4)):
        raise DataError(
            f"`{key}` in {str(path)!r} has shape {list(array.shape)}; expected [N, H, W, C] with 1 "
            "to 4 channels, or [N, H, W] (an array [N, C, H, W] needs transpose(0, 2, 3, 1))"
        )
    if np.issubdtype(array.dtype, np.floating):
        # Written so that NaN fails the comparison.
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"`{key}` in {str(path)!r} has floating-point values from {array.min():g} to "
                f"{array.max():g}; expected [0, 1], or uint8"
            )
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(
            f"`{key}` in {str(path)!r} is {array.dtype}; expected uint8, "
            "or floating point in [0, 1]"
        )
    return _channels_first(torch.from_numpy(array))


def _npz_labels(array: np.ndarray, key: str, path: Path) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        raise DataError(
            f"`{key}` in {str(path)!r} is {array.dtype} of shape {list(array.shape)}; "
            "expected integers [N], one label from 0 up per image"
        )
    return torch.from_numpy(array.astype(np.int64))


def _from_folder(path: Path) -> ImageData:
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise DataError(
                f"{str(path)!r} has no folder {part!r}; "
                "expected images as train/CLASS/* and test/CLASS/*"
            )
    names = _class_folders(path / "train")
    if not names:
        raise DataError(f"{str(path / 'train')!r} has no class folders; expected train/CLASS/*")
    foreign = sorted(set(_class_folders(path / "test")) - set(names))
    if foreign:
        raise DataError(
            f"{str(path / 'test')!r} has labels outside the benchmark: {listed(foreign)}; "
            "every class needs a folder of the same name under train"
        )
    arrays: list[np.ndarray] = []
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for part in ("train", "test"):
        for label, name in enumerate(names):
            files = _image_files(path / part / name)
            if not files:
                raise DataError(
                    f"{str(path / part / name)!r} has no images ({', '.join(IMG_EXTENSIONS)}); "
                    "every class needs training and test images"
                )
            for file in files:
                pixels = _read_image(file)
                if arrays and pixels.shape[:2] != arrays[0].shape[:2]:
                    raise DataError(
                        f"{str(file)!r} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but the "
                        f"images before it are {arrays[0].shape[1]}x{arrays[0].shape[0]}; "
                        "resize all of them to one size"
                    )
                arrays.append(pixels)
                labels[part].append(label)
    if any(pixels.ndim == 3 for pixels in arrays):
        arrays = [p if p.ndim == 3 else np.stack([p] * 3, axis=2) for p in arrays]
    images = _channels_first(torch.from_numpy(np.stack(arrays)))
    split = len(labels["train"])
    return ImageData(
        name=path.resolve().name,
        x_train=images[:split],
        y_train=torch.tensor(labels["train"]),
        x_test=images[split:],
        y_test=torch.tensor(labels["test"]),
        classes=len(names),
        class_names=tuple(names),
    )


def _class_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMG_EXTENSIONS and entry.name[0] != "."
    )


def _read_image(file: Path) -> np.ndarray:
    """Read ``[H, W]`` from a greyscale file and ``[H, W, 3]`` from any other."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise DataError(
                    f"{str(file)!r} has more than 8 bits per pixel (mode {image.mode}); "
                    "save it with 8 bits per channel"
                )
            return np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(
            f"{str(file)!r} cannot be read as an image ({_reason(error)}); replace it or remove it"
        ) from error


def _channels_first(images: Tensor) -> Tensor:
    """Turn ``[N, H, W]`` or ``[N, H, W, C]`` into ``[N, C, H, W]``."""
    if images.ndim == 3:
        return images.unsqueeze(1).contiguous()
    return images.permute(0, 3, 1, 2).contiguous()


def _reason(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= 200 else f"{reason[:199]}\u2026"
