import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import safetensors

from dc_replay import _files
from dc_replay._files import MemoryFile
from dc_replay.budgets import ImagesPerClass, TotalBytes
from dc_replay.errors import ArgumentError, MemoryFileError

SCALE = ((0.5, 0.25, 0.1), (1.0, 0.5, 0.2))


def make_file(**changes):
    pixels = np.arange(6 * 3 * 4 * 5, dtype=np.uint8).reshape(6, 3, 4, 5)
    values = {
        "pixels": pixels,
        "counts": {7: 3, -2: 1, 4: 2},
        "factor": 2,
        "normalization": SCALE,
        "budget": ImagesPerClass(3),
        "recipe": "idc",
        "versions": {"torch": "2.99.0+cu999"},
    }
    return MemoryFile(**values | changes)


def own_version():
    try:
        return version("dc-replay")
    except PackageNotFoundError:
        return "unknown"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.safetensors"


def test_the_bytes_of_format_version_1(path):
    """Written out by hand: files of today are to be read by every later release."""
    memory = make_file()
    _files.write(path, memory)
    metadata = {
        "budget": '{"kind": "ImagesPerClass", "images": 3}',
        "classes": "[7, -2, 4]",
        "counts": "[3, 1, 2]",
        "created_by": "dc-replay",
        "dc_replay_version": own_version(),
        "factor": "2",
        "format": "dc-replay-memory",
        "format_version": "1",
        "normalization": '{"mean": [0.5, 0.25, 0.1], "std": [1.0, 0.5, 0.2]}',
        "recipe": "idc",
        "safetensors_version": safetensors.__version__,
        "torch_version": "2.99.0+cu999",
    }
    parts = {
        "__metadata__": metadata,
        "labels": {"data_offsets": [0, 48], "dtype": "I64", "shape": [6]},
        "pixels": {"data_offsets": [48, 408], "dtype": "U8", "shape": [6, 3, 4, 5]},
    }
    header = json.dumps(parts, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    labels = np.array([7, 7, 7, -2, 4, 4], "<i8").tobytes()
    whole = len(header).to_bytes(8, "little") + header + labels + memory.pixels.tobytes()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("changes", [{}, {"normalization": None, "budget": None, "recipe": ""}])
def test_what_was_written_is_read(path, changes):
    memory = make_file(**changes)
    _files.write(path, memory)
    found = _files.read(path)
    assert np.array_equal(found.pixels, memory.pixels) and found.pixels.dtype == np.uint8
    assert list(found.counts.items()) == [(7, 3), (-2, 1), (4, 2)]
    assert found.labels.tolist() == [7, 7, 7, -2, 4, 4] and found.labels.dtype == np.int64
    for name in ("factor", "normalization", "budget", "recipe"):
        assert getattr(found, name) == getattr(memory, name)
    assert found.versions == {
        "dc-replay": own_version(),
        "torch": "2.99.0+cu999",
        "safetensors": safetensors.__version__,
    }
    assert found.image_bytes == 60


def test_pixels_of_another_layout_are_written_in_order(path):
    memory = make_file()
    _files.write(path, make_file(pixels=np.asfortranarray(memory.pixels)))
    assert np.array_equal(_files.read(path).pixels, memory.pixels)


def test_what_was_read_does_not_depend_on_the_file(path):
    memory = make_file()
    _files.write(path, memory)
    found = _files.read(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert np.array_equal(found.pixels, memory.pixels)
    assert found.pixels.flags.writeable


def test_a_cut_file_holds_each_class_first_images():
    memory = make_file()
    budget = TotalBytes(4 * 60)
    cut = memory.cut(budget)
    assert list(cut.counts.items()) == [(7, 2), (-2, 1), (4, 1)]
    assert np.array_equal(cut.pixels, memory.pixels[[0, 1, 3, 4]])
    assert (cut.budget, cut.versions) == (budget, memory.versions)
    assert [len(images) for images in cut.by_class().values()] == [2, 1, 1]
    assert np.array_equal(cut.by_class()[4], memory.pixels[4:5])
    with pytest.raises(ArgumentError, match="below one image"):
        memory.cut(TotalBytes(2 * 60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 10**9}, r"`factor` is 1000000000, .* a factor that fits, such as 2"),
        ({"normalization": ((0, 0, 10**400), (1, 1, 1))}, r"cannot be used \(`mean` and"),
        ({"normalization": ((0, 0, 1e39), (1, 1, 1))}, r"`mean` and `std` must be finite"),
    ],
)
def test_numbers_beyond_measure_are_refused(path, changes, message):
    _files.write(path, make_file(**changes))
    with pytest.raises(MemoryFileError, match=message):
        _files.read(path)


def test_a_name_for_the_path_is_said(path):
    with pytest.raises(ArgumentError, match=r"`--output` is .*, which is a folder"):
        _files.write(path.parent, make_file(), name="--output")


def test_torch_is_not_needed():
    code = "import sys, dc_replay._files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
