import errno
import io
import os

import pytest
import torch

from dc_replay import _writing
from dc_replay.budgets import ImagesPerClass
from dc_replay.errors import DCReplayError
from dc_replay.exemplars import Exemplars
from dc_replay.memory import ExemplarMemory

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file on a disk that takes some bytes and no more."""

    def write(self, data):
        super().write(data[:100])
        raise FULL


def refuse(*arguments):
    raise FULL


def fill_up(monkeypatch, where):
    if where == "write":
        monkeypatch.setattr(_writing, "open", FullDisk, raising=False)
    elif where == "open":
        monkeypatch.setattr(_writing, "open", refuse, raising=False)
    else:
        monkeypatch.setattr(_writing.os, where, refuse)


places = pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])


def memory(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    made = ExemplarMemory(budget=ImagesPerClass(2))
    made.add(Exemplars(pixels, torch.tensor([0, 0, 1, 1])))
    return made


@places
def test_a_full_disk_leaves_the_file_and_nothing_else(where, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with monkeypatch.context() as patch:
        fill_up(patch, where)
        with pytest.raises(
            DCReplayError, match="`it`: .*file could not be written: No space left on device; what"
        ):
            _writing.write_whole(path, bytes(1000), name="it")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@places
def test_a_memory_on_a_full_disk_is_the_one_from_before(where, tmp_path, monkeypatch):
    path = tmp_path / "memory.safetensors"
    old, new = memory(1), memory(2)
    old.save(path)
    with monkeypatch.context() as patch:
        fill_up(patch, where)
        with pytest.raises(DCReplayError, match="`path`: .*safetensors could not be written"):
            new.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(ExemplarMemory.load(path).of_class(1), old.of_class(1))
    new.save(path)  # when there is room again
    assert torch.equal(ExemplarMemory.load(path).of_class(1), new.of_class(1))


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_a_file_that_the_system_cuts_short_is_not_left(size, tmp_path):
    """The system itself refuses to write further, after some bytes."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "file"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(DCReplayError, match="could not be written: File too large"):
            _writing.write_whole(path, bytes(size), name="it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
