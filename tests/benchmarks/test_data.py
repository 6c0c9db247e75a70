"""The benchmarks' data: every source, every way it can be wrong, and the order of its classes."""

from __future__ import annotations

import pickle
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from benchmarks.class_orders import IDC_CIFAR100
from benchmarks.data import DataError, ImageData, class_order, keep_classes, load
from dc_replay.errors import ArgumentError

Arrays = dict[str, Any]


def arrays(classes: int = 3, shape: tuple[int, ...] = (4, 5, 3)) -> Arrays:
    """Two training images and one test image per class."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (2 * classes, *shape), dtype=np.uint8),
        "y_train": np.repeat(np.arange(classes), 2),
        "x_test": rng.integers(0, 256, (classes, *shape), dtype=np.uint8),
        "y_test": np.arange(classes),
    }


def image_data(classes: int) -> ImageData:
    """A set in which every pixel of an image is its label."""
    y_train, y_test = torch.arange(classes).repeat_interleave(2), torch.arange(classes)
    return ImageData(
        name="toy",
        x_train=y_train.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        y_train=y_train,
        x_test=y_test.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        y_test=y_test,
        classes=classes,
        class_names=tuple(f"name {label}" for label in range(classes)),
    )


def save(path: Path, content: Arrays) -> str:
    np.savez(path, **content)
    return f"npz:{path}"


def save_image(path: Path, *, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 7 if mode != "RGB" else (1, 2, 3)).save(path)


def save_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for name in classes:
        save_image(root / "train" / name / "0.png")
        save_image(root / "train" / name / "1.png")
        save_image(root / "test" / name / "0.png")


# --- digits


def test_digits_are_split_by_class() -> None:
    data = load("digits")
    assert len(data.x_train) + len(data.x_test) == 1797
    assert data.image_shape == (1, 8, 8)
    assert data.x_train.dtype == torch.uint8 and data.x_train.max() == 255
    totals = torch.bincount(torch.cat([data.y_train, data.y_test]))
    assert torch.equal(torch.bincount(data.y_test), totals // 5)
    # The last fifth of each digit, in the order of the data set.
    images, labels = load_digits(return_X_y=True)
    last = images[labels == 3][-(len(images[labels == 3]) // 5) :].reshape(-1, 1, 8, 8)
    found = data.x_test[data.y_test == 3].numpy()
    assert np.array_equal(found, np.rint(last * 255 / 16))


# --- npz


def test_npz_images_come_channels_first(tmp_path: Path) -> None:
    content = arrays()
    data = load(save(tmp_path / "toy.npz", content))
    assert (data.name, data.classes, data.class_names) == ("toy", 3, ("0", "1", "2"))
    assert data.image_shape == (3, 4, 5)
    assert data.x_train.is_contiguous()
    assert np.array_equal(data.x_train[1, 2].numpy(), content["x_train"][1, :, :, 2])
    assert data.y_train.tolist() == [0, 0, 1, 1, 2, 2] and data.y_train.dtype == torch.int64


def test_npz_takes_grey_images_floats_and_names(tmp_path: Path) -> None:
    content = arrays(shape=(4, 5))
    floats = {
        **content,
        "x_train": content["x_train"] / np.float32(255),
        "x_test": content["x_test"] / 255,
        "class_names": np.array(["ant", "bee", "cow", "a class without images"]),
    }
    grey = load(save(tmp_path / "grey.npz", content))
    data = load(save(tmp_path / "floats.npz", floats))
    assert data.image_shape == (1, 4, 5)
    assert data.class_names == ("ant", "bee", "cow")
    assert torch.equal(data.x_train, grey.x_train) and torch.equal(data.x_test, grey.x_test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": None}, "has no `x_test`, only x_train, y_test, y_train"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, r"\[6, 3, 8, 8\]; expected \[N, H, W, C\]"),
        ({"x_train": np.zeros((6, 4), np.uint8)}, r"shape \[6, 4\]; expected \[N, H, W, C\]"),
        ({"x_train": np.full((6, 4, 5, 3), 2.0)}, r"from 2 to 2; expected \[0, 1\], or uint8"),
        ({"x_train": np.full((6, 4, 5, 3), np.nan)}, "from nan to nan; expected"),
        ({"x_train": np.zeros((6, 4, 5, 3), np.int32)}, "is int32; expected uint8"),
        ({"x_train": np.zeros((6, 4, 4, 3), np.uint8)}, r"`x_test` .* \[3, 4, 5\], but `x_train`"),
        ({"x_train": np.zeros((0, 4, 5, 3), np.uint8)}, "with at least one image"),
        ({"y_train": np.zeros(6)}, r"`y_train` .* is float64 of shape \[6\]; expected integers"),
        ({"y_train": np.zeros((6, 1), int)}, r"shape \[6, 1\]; expected integers \[N\]"),
        ({"y_train": np.zeros(5, int)}, r"expected int64 \[6\], one label per image of `x_train`"),
        ({"y_train": np.array([0, 0, 1, 1, 2, -1])}, "`y_train` .* outside the benchmark: -1;"),
        ({"y_test": np.array([0, 1, 7])}, "`y_test` of toy has labels outside the benchmark: 7;"),
        ({"y_train": np.array([0, 0, 2, 2, 2, 2])}, r"`y_train` of toy has no image of 1 among"),
        ({"y_test": np.array([0, 1, 1])}, "`y_test` of toy has no image of 2 among"),
        ({"class_names": np.array(["ant"])}, "holds 1 names, but `y_train` has labels up to 2"),
        ({"y_train": np.array([object()] * 6)}, "cannot be read as an .npz of plain arrays"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, change: Arrays, message: str) -> None:
    content = {key: value for key, value in {**arrays(), **change}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        load(save(tmp_path / "toy.npz", content))


def test_npz_that_is_no_archive(tmp_path: Path) -> None:
    text, array = tmp_path / "text.npz", tmp_path / "array.npz"
    text.write_text("hello")
    with open(array, "wb") as file:
        np.save(file, np.zeros(3))
    for path in (text, array, tmp_path):
        with pytest.raises(DataError, match="cannot be read as an .npz"):
            load(f"npz:{path}")


# --- folder


def test_folder_classes_are_numbered_by_name(tmp_path: Path) -> None:
    save_folder(tmp_path / "pets", ("dog", "cat"))
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / "train" / ".hidden").mkdir()
    data = load(f"folder:{tmp_path / 'pets'}")
    assert (data.name, data.class_names) == ("pets", ("cat", "dog"))
    assert data.image_shape == (3, 4, 5)
    assert data.y_train.tolist() == [0, 0, 1, 1] and data.y_test.tolist() == [0, 1]
    assert data.x_test[0, :, 0, 0].tolist() == [1, 2, 3]


def test_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save_image(tmp_path / part / "cat" / "0.png", mode="L")
    assert load(f"folder:{tmp_path}").image_shape == (1, 4, 5)
    save_image(tmp_path / "train" / "cat" / "1.png")
    mixed = load(f"folder:{tmp_path}")
    assert mixed.image_shape == (3, 4, 5)
    assert mixed.x_test.unique().tolist() == [7]


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    def reject(message: str) -> None:
        with pytest.raises(DataError, match=message):
            load(f"folder:{tmp_path}")

    reject("has no folder 'train'; expected images as train/CLASS/")
    (tmp_path / "train").mkdir()
    reject("has no folder 'test'")
    (tmp_path / "test").mkdir()
    reject("has no class folders; expected train/CLASS/")
    save_folder(tmp_path)
    (tmp_path / "test" / "fox").mkdir()
    reject("labels outside the benchmark: fox; every class needs a folder")
    (tmp_path / "train" / "fox").mkdir()
    reject(r"fox' has no images \(\.jpg")
    (tmp_path / "train" / "fox" / "0.png").write_text("hello")
    reject(r"fox/0.png' cannot be read as an image .* replace it or remove it")
    save_image(tmp_path / "train" / "fox" / "0.png", mode="I;16")
    reject("has more than 8 bits per pixel")
    save_image(tmp_path / "train" / "fox" / "0.png", size=(6, 4))
    reject("fox/0.png' is 6x4 pixels, but the images before it are 5x4; resize all of them")
    save_image(tmp_path / "train" / "fox" / "0.png")
    reject("test/fox' has no images")


# --- torchvision


def pickled_cifar(root: Path, classes: int, key: str, names_key: str, files: list[str]) -> None:
    root.mkdir()
    rows = 2 * classes
    for file in files:
        first = 7 if "test" in file else 0
        content = {
            "data": (first + np.arange(rows * 3072)).reshape(rows, 3072).astype(np.uint8),
            key: [*range(classes)] * 2,
        }
        (root / file).write_bytes(pickle.dumps(content))
    names = {names_key: [f"name {label}" for label in range(classes)]}
    meta = "batches.meta" if classes == 10 else "meta"
    (root / meta).write_bytes(pickle.dumps(names))


def test_cifar_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    ten = [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]
    pickled_cifar(tmp_path / "cifar-10-batches-py", 10, "labels", "label_names", ten)
    pickled_cifar(
        tmp_path / "cifar-100-python", 100, "fine_labels", "fine_label_names", ["train", "test"]
    )
    data = load("cifar10", root=tmp_path)
    assert (data.name, data.classes, data.class_names[3]) == ("cifar10", 10, "name 3")
    assert data.x_train.shape == (100, 3, 32, 32) and data.x_test.shape == (20, 3, 32, 32)
    assert data.x_train[0].flatten().tolist() == [value % 256 for value in range(3072)]
    assert data.x_test[0, 0, 0, 0] == 7
    data = load("cifar100", root=tmp_path)
    assert data.classes == 100 and data.x_train.shape == (200, 3, 32, 32)
    assert (data.x_train[0, 0, 0, 0], data.x_test[0, 0, 0, 0]) == (0, 7)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist_files_are_read(name: str, folder: str, tmp_path: Path) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        header = np.array([0x0803, count, 28, 28], dtype=">i4").tobytes()
        pixels = (count + np.arange(count * 784)).astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        header = np.array([0x0801, count], dtype=">i4").tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)
    data = load(name, root=tmp_path)
    assert data.x_train.shape == (20, 1, 28, 28) and data.classes == 10
    assert (data.x_train[0, 0, 0, 0], data.x_test[0, 0, 0, 0]) == (20, 10)
    assert data.y_test.tolist() == list(range(10))
    assert data.class_names[1] == ("1" if name == "mnist" else "Trouser")


def test_svhn_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", lambda *_: None)
    images = np.arange(10, dtype=np.uint8) * np.ones((32, 32, 3, 1), dtype=np.uint8)
    for part in ("train", "test"):
        labels = np.arange(1, 11).reshape(-1, 1)
        shown = images + 100 * np.uint8(part == "test")
        savemat(tmp_path / f"{part}_32x32.mat", {"X": shown, "y": labels})
    data = load("svhn", root=tmp_path)
    assert data.x_train.shape == (10, 3, 32, 32)
    assert data.y_train.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert data.x_train[:, 0, 0, 0].tolist() == list(range(10))
    assert data.x_test[:, 0, 0, 0].tolist() == list(range(100, 110))


@pytest.mark.parametrize(
    ("name", "dataset", "by_hand"),
    [
        ("cifar10", datasets.CIFAR10, "Put cifar-10-python.tar.gz, or .* into {root} and"),
        ("cifar100", datasets.CIFAR100, "Put cifar-100-python.tar.gz, or .* into {root} and"),
        ("svhn", datasets.SVHN, "Put train_32x32.mat and test_32x32.mat into {root} and"),
        ("mnist", datasets.MNIST, "t10k-labels-idx1-ubyte.gz into {root}/MNIST/raw and"),
        ("fashion", datasets.FashionMNIST, "idx1-ubyte.gz into {root}/FashionMNIST/raw and"),
    ],
)
def test_failed_download_says_what_to_do(
    name: str, dataset: type, by_hand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: object) -> None:
        assert socket.getdefaulttimeout() is not None
        raise URLError("no route to host")

    monkeypatch.setattr(dataset, "download", unreachable)
    with pytest.raises(DataError) as caught:
        load(name, root=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"`data` is '{name}', but its files under '{tmp_path}'")
    assert "no route to host" in message and "npz:PATH or folder:PATH" in message
    assert re.search(by_hand.format(root=re.escape(str(tmp_path))), message)
    assert socket.getdefaulttimeout() is None


def test_truncated_files_are_reported(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(np.array([0x0803, 9, 28, 28], dtype=">i4").tobytes())
    with pytest.raises(DataError, match="could be neither read nor downloaded"):
        load("mnist", root=tmp_path)


# --- names


@pytest.mark.parametrize("name", ["imagenet", "", "cifar10:here", "digits:", "zip:x", "npz"])
def test_unknown_source(name: str) -> None:
    known = "cifar10, cifar100, svhn, mnist, fashion, digits, npz:PATH or folder:PATH"
    with pytest.raises(ArgumentError, match=f"`data` is '{name}', .* choose one of {known}"):
        load(name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("npz:/no/where.npz", "file"),
        ("npz:", "file"),
        ("folder:/no", "folder"),
        ("folder:", "fold"),
    ],
)
def test_missing_path(name: str, kind: str) -> None:
    path = name.partition(":")[2]
    with pytest.raises(DataError, match=f"'{path}' does not exist; .* path of an existing {kind}"):
        load(name)


# --- the value


def test_normalization_is_mean_and_deviation_of_the_training_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    data = image_data(3)
    pixels = torch.randint(256, (6, 2, 5, 7), generator=generator, dtype=torch.uint8)
    pixels[:, 1] = 51
    data = replace(data, x_train=pixels, x_test=pixels[:3])
    normalization = data.normalization()
    scaled = pixels[:, 0].double() / 255
    assert normalization.mean == pytest.approx((scaled.mean().item(), 0.2))
    assert normalization.std == pytest.approx((scaled.std(correction=0).item(), 1.0))


def test_image_data_names_every_class() -> None:
    with pytest.raises(DataError, match="`class_names` of toy holds 1 names for 3 classes"):
        replace(image_data(3), class_names=("one",))


def test_image_data_holds_uint8() -> None:
    data = image_data(3)
    with pytest.raises(DataError, match="`x_test` of toy is torch.float32 of shape"):
        replace(data, x_test=data.x_test.float())


# --- class orders


def test_idc_order_is_a_permutation_in_the_published_order() -> None:
    assert sorted(IDC_CIFAR100) == list(range(100))
    assert IDC_CIFAR100[:3] + IDC_CIFAR100[-3:] == (2, 7, 8, 87, 88, 96)
    assert class_order(image_data(100), "idc", seed=5) == list(IDC_CIFAR100)
    assert class_order(image_data(100), "idc", classes=20) == list(IDC_CIFAR100[:20])


def test_shuffled_order_follows_the_seed() -> None:
    data = image_data(20)
    before = torch.random.get_rng_state()
    first = class_order(data, "shuffled", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(first) == list(range(20))
    assert first == class_order(data, "shuffled", seed=1)
    assert first != class_order(data, "shuffled", seed=2)
    assert class_order(data, "shuffled", seed=1, classes=4) == first[:4]


@pytest.mark.parametrize(
    ("order", "classes", "message"),
    [
        ("sorted", None, "`order` is 'sorted'; choose one of shuffled, idc"),
        ("idc", None, "CIFAR-100's 100 classes, but toy has 3; use 'shuffled'"),
        ("shuffled", 0, "`classes` is 0, but toy has 3 classes; ask for 1 to 3"),
        ("shuffled", 4, "`classes` is 4, but toy has 3 classes"),
    ],
)
def test_class_order_that_cannot_be(order: str, classes: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_order(image_data(3), order, classes=classes)


def test_kept_classes_are_renumbered_by_position() -> None:
    kept = keep_classes(image_data(5), [3, 0, 4])
    assert (kept.classes, kept.class_names) == (3, ("name 3", "name 0", "name 4"))
    for images, labels in ((kept.x_train, kept.y_train), (kept.x_test, kept.y_test)):
        original = torch.tensor([3, 0, 4])[labels]
        assert torch.equal(images[:, 0, 0, 0].long(), original)
    assert sorted(kept.y_train.tolist()) == [0, 0, 1, 1, 2, 2]
    assert sorted(kept.y_test.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("order", "shown"), [([], "nothing"), ([0, 0], "0, 0"), ([0, 3], "0, 3"), ([-1], "-1")]
)
def test_keep_classes_needs_different_classes_of_the_data(order: list[int], shown: str) -> None:
    with pytest.raises(DataError, match=f"`order` is {shown}; expected different classes of toy"):
        keep_classes(image_data(3), order)
