from dataclasses import replace

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from torch.utils.data import TensorDataset

from dc_replay import placement, recipes
from dc_replay.budgets import ImagesPerClass
from dc_replay.buffer import CondensedBuffer
from dc_replay.errors import ArgumentError
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.memory import _brought_over, shown_at
from dc_replay.memory_only import MemoryOnlyPlugin
from dc_replay.multisize import Multisize
from dc_replay.networks import convnet_for
from dc_replay.placement import HostImages, home
from dc_replay.plugin import CondensedReplayPlugin
from dc_replay.sampling import Representative

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (3, 8, 8)


def small(name):
    built = recipes.RECIPES[name](network=convnet_for(SHAPE, width=4))
    if built.objective is not None:
        built = replace(built, outer=2, inner=2, precision="float32")
    if isinstance(built.sampler, Representative):
        built = replace(built, sampler=Representative(4))
    return built


def toy():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, *SHAPE), dtype=torch.uint8, generator=generator)
    return images, torch.arange(40) % 2


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_images_in_the_hosts_memory_condense_to_the_same_bytes(name):
    images, labels = toy()
    condenser = small(name)
    if name == "dream_plus":
        condenser = replace(condenser, outer=3, multisize=Multisize(period=1))
    found = [
        condenser.condense(
            images, labels, quotas=2, generator=torch.Generator().manual_seed(1), **options
        )
        for options in ({}, {"device": "cpu"})
    ]
    assert torch.equal(found[0].exemplars.pixels, found[1].exemplars.pixels)
    assert found[0].history == found[1].history


def test_only_what_is_asked_for_is_brought_over(monkeypatch):
    brought = []
    choose = HostImages.__getitem__

    def count(self, index):
        brought.append(len(index))
        return choose(self, index)

    monkeypatch.setattr(HostImages, "__getitem__", count)
    images, labels = toy()
    generator = torch.Generator().manual_seed(1)
    small("idc").condense(images, labels, quotas=2, generator=generator, device="cpu")
    assert brought and max(brought) <= 64


@pytest.mark.parametrize(
    "formation", [Formation(1), Formation(2), Formation(3, compression=2)], ids=str
)
def test_exemplars_that_are_brought_over_are_the_same(formation):
    pixels, labels = toy()
    stored = Exemplars(pixels[::2], labels[::2])
    index = torch.randperm(len(stored) * formation.images_per_stored)[:15]
    images, found = _brought_over(stored, formation, index)
    expected, same = shown_at(stored, formation, index)
    assert torch.equal(images, expected) and torch.equal(found, same)


@pytest.mark.parametrize(
    ("resident", "count", "device", "expected"),
    [
        (True, 10**9, GPU, GPU),
        (False, 1, GPU, CPU),
        ("auto", 250, GPU, GPU),
        ("auto", 251, GPU, CPU),
        ("auto", 10**12, CPU, CPU),
    ],
)
def test_images_stay_where_there_is_room(resident, count, device, expected, monkeypatch):
    # 400 of the 600 that torch holds are not in use.
    monkeypatch.setattr(placement.torch.cuda, "mem_get_info", lambda device: (600, 4000))
    monkeypatch.setattr(placement.torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(placement.torch.cuda, "memory_allocated", lambda device: 200)
    assert home(resident, count, device=device) == expected
    if resident == "auto":  # bytes that are there already are not in the way of themselves
        assert home("auto", 251, device=GPU, held=4) == GPU
        assert home("auto", 252, device=GPU, held=4) == CPU  # a quarter of 1004


def experiences(count=2):
    images, labels = toy()
    dataset = TensorDataset(images.float() / 255, labels)
    return nc_benchmark(dataset, dataset, count, task_labels=False, seed=0).train_stream


@pytest.mark.parametrize("make", [CondensedReplayPlugin, MemoryOnlyPlugin])
def test_a_plugin_whose_images_are_on_the_host_ends_with_the_same_memory(make, monkeypatch):
    used = []
    monkeypatch.setattr(
        HostImages,
        "__getitem__",
        lambda self, index: used.append(index) or self.pixels.index_select(0, index),
    )
    plugins = [
        make(condenser=small("idc"), budget=ImagesPerClass(2), progress=False, resident=resident)
        for resident in ("auto", False)
    ]
    for plugin, expected in zip(plugins, (False, True), strict=True):
        for experience in experiences():
            plugin.buffer.remember(experience, device="cpu")
        assert bool(used) == expected
    one, other = (plugin.memory.exemplars for plugin in plugins)
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_condenses_what_is_on_the_host():
    buffers = [
        CondensedBuffer(condenser=small("idc"), budget=ImagesPerClass(2), resident=resident)
        for resident in (True, False)
    ]
    for buffer, expected in zip(buffers, ("cuda", "cpu"), strict=True):
        buffer.remember(experiences(1)[0], device="cuda")
        assert buffer.memory.device.type == expected
        generator = torch.Generator(device="cuda").manual_seed(0)
        assert all(t.device.type == "cuda" for t in buffer.memory.sample(3, generator=generator))
    one, other = (buffer.memory.exemplars.pixels.cpu().int() for buffer in buffers)
    assert (one - other).abs().max() <= 1  # a GPU adds up in no fixed order


@pytest.mark.parametrize("resident", [None, 1, "yes"])
def test_another_resident_is_refused(resident):
    with pytest.raises(ArgumentError, match="`resident` is .*pass True to keep images on the dev"):
        CondensedBuffer(condenser=small("idc"), budget=ImagesPerClass(2), resident=resident)


def test_a_device_that_is_none_is_refused():
    images, labels = toy()
    generator = torch.Generator()
    with pytest.raises(ArgumentError, match="`device` is 'abacus', which names none"):
        small("idc").condense(images, labels, quotas=2, generator=generator, device="abacus")


def test_the_stand_in_has_the_shape_of_all():
    images = HostImages(torch.zeros(5, *SHAPE, dtype=torch.uint8), CPU)
    assert len(images) == 5 and images.shape == (5, *SHAPE) and images.device == CPU
