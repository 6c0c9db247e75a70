"""What only shows where there is a second device, on one that is simulated."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from simulated_device import CPU, GPU, SimulatedGenerator, simulated_gpu
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from dc_replay import recipes
from dc_replay.adjustment import LogitAdjustmentPlugin
from dc_replay.augment import augmentation
from dc_replay.budgets import ImagesPerClass
from dc_replay.buffer import CondensedBuffer
from dc_replay.distillation import DistillationPlugin
from dc_replay.exemplars import Exemplars
from dc_replay.formation import Formation
from dc_replay.match_storage import MatchStoragePlugin
from dc_replay.matching import ClassBatch, Launches
from dc_replay.memory import ExemplarMemory
from dc_replay.memory_only import MemoryOnlyPlugin
from dc_replay.multisize import Multisize
from dc_replay.networks import ConvNet, convnet_for
from dc_replay.objectives import Matched
from dc_replay.optimisation import OnSynthetic
from dc_replay.pixels import Normalization
from dc_replay.plugin import CondensedReplayPlugin
from dc_replay.resident import DeviceResident
from dc_replay.sampling import Representative
from dc_replay.subsets import SubsetMatching

SHAPE = (3, 8, 8)
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to test on")


@pytest.fixture
def waits(monkeypatch):
    with simulated_gpu(monkeypatch) as waits:
        yield waits


def seeded(device):
    return SimulatedGenerator(device).manual_seed(0)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: torch.stack([here, there]),
        lambda here, there: here[torch.arange(3, device="cuda")],
        lambda here, there: there.numpy(),
        lambda here, there: torch.func.grad(lambda x: (x * here).sum())(there),
        lambda here, there: torch.func.vmap(lambda x: x + torch.ones(1))(there),
        lambda here, there: torch.rand(3, device="cuda", generator=seeded("cpu")),
        lambda here, there: torch.randperm(3, generator=seeded("cuda")),
    ],
)
def test_the_simulated_gpu_refuses_what_a_gpu_refuses(mixed, waits):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|to numpy|Expected a .* gen"):
        mixed(torch.ones(3), torch.ones(3, device="cuda"))


def test_the_simulated_gpu_takes_what_a_gpu_takes(waits):
    there = nn.Linear(3, 3).to("cuda")(torch.ones(3, device="cuda")) * torch.tensor(2.0)
    there.sum().backward()
    assert there[torch.arange(2)].device == there.cpu().cuda().device == GPU
    assert there.detach().cpu().numpy().shape == (3,)
    assert torch.func.vmap(lambda x: x + torch.zeros_like(x))(there).is_cuda
    assert torch.zeros(3).device == torch.zeros(3, device="cuda").cpu().device == CPU


@pytest.mark.parametrize(
    "wait",
    [
        "x.item()",
        "x.tolist()",
        "bool(x)",
        "x.cpu()",
        "x[x > 0]",
        "x.new_tensor([1.0])",
        "x.nonzero()",
    ],
)
def test_what_the_cpu_waits_for_is_counted(wait, waits):
    there = torch.ones(1, device="cuda")
    (there + 1).sum()
    assert not waits
    # As of a line of the package, of which alone it is counted.
    exec(compile(wait, "/somewhere/dc_replay/module.py", "exec"), {"x": there})
    assert [where.split(":")[0] for where in waits] == ["module.py"]


def small(name, **parts):
    """A recipe at a size that takes no time, of every part that has tensors of its own."""
    condenser = recipes.RECIPES[name](network=convnet_for(SHAPE, width=4), **parts)
    if isinstance(condenser.sampler, Representative):
        condenser = replace(condenser, sampler=Representative(4))
    if isinstance(condenser.update, OnSynthetic):
        condenser = replace(condenser, update=OnSynthetic(1))
    if condenser.objective is not None:
        condenser = replace(condenser, outer=1, inner=2, precision="float32")
    return condenser


ALL_PARTS = {"outer": 3, "multisize": Multisize(period=1), "subsets": SubsetMatching()}


SOME = ("dream_plus", "dc", "forgetting")


@pytest.mark.parametrize(
    ("name", "images_on", "generator_on"),
    [(name, "cuda", "cuda") for name in sorted(recipes.RECIPES)]
    + [(name, *where) for name in SOME for where in (("cuda", "cpu"), ("cpu", "cuda"))],
)
def test_recipes_condense(name, images_on, generator_on, waits):
    condenser = small(name, **({"compression": 2} if generator_on == "cpu" else {}))
    if name == "dream_plus":
        condenser = replace(condenser, most_decoded=5, **ALL_PARTS)
    images = torch.randint(256, (21, *SHAPE), dtype=torch.uint8, device=images_on)
    labels = (torch.arange(21) % 2).to(images_on)
    found = condenser.condense(
        images, labels, quotas=2, generator=seeded(generator_on), device="cuda"
    )
    assert found.exemplars.pixels.device == found.exemplars.labels.device == GPU


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Until:
    """What a network learns, until the process is killed, so to say."""

    left: list = field(repr=False)  # and so no part of the recipe

    def __call__(self, apprentice, pixels):
        self.left[0] -= 1
        if not self.left[0]:
            raise Killed
        apprentice.train_on_real()


def test_an_interrupted_condensation_goes_on(waits, tmp_path, monkeypatch):
    monkeypatch.setattr("dc_replay.checkpoints.SHARE", float("inf"))  # after each network
    images = torch.randint(256, (20, *SHAPE), dtype=torch.uint8, device="cuda")
    labels = torch.arange(20, device="cuda") % 2
    left = [0]
    condenser = replace(small("idc"), **ALL_PARTS, update=Until(left))

    def condensed(**options):
        generator = seeded("cuda")
        return condenser.condense(images, labels, quotas=2, generator=generator, **options)

    expected, path = condensed(), tmp_path / "state"
    left[0] = 5  # of six steps, two with each network
    with pytest.raises(Killed):
        condensed(checkpoint=path)
    left[0] = 0
    found = condensed(checkpoint=path)
    assert left[0] == -2
    assert found.exemplars.pixels.device == GPU
    assert torch.equal(found.exemplars.pixels, expected.exemplars.pixels)


@pytest.mark.parametrize("formation", [Formation(1), Formation(2), Formation(3, 2)], ids=str)
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_memory_is_drawn_from(formation, home, waits, tmp_path):
    memory = ExemplarMemory(
        budget=ImagesPerClass(4), formation=formation, normalization=NORMALIZATION
    )
    pixels = torch.randint(256, (8, *SHAPE), dtype=torch.uint8, device="cuda")
    memory.add(Exemplars(pixels, torch.arange(8, device="cuda") // 4))
    memory.shrink(images_per_class=3)
    memory.save(tmp_path / "memory")
    memory = ExemplarMemory.load(tmp_path / "memory", device=home)
    for device in ("cpu", "cuda"):
        images, labels = memory.sample(5, generator=seeded(device))
        expected = GPU if "cuda" in (home, device) else CPU
        assert images.device == labels.device == memory.as_stored(images).device == expected
    assert memory.decoded()[0].device.type == home
    images, labels = pixels[:1].to(home), torch.ones(1, dtype=torch.int64, device=home)
    memory.add(Exemplars(images, labels))
    assert memory.device.type == home


def test_a_draw_from_a_memory_on_the_gpu_does_not_wait(waits):
    memory = ExemplarMemory(
        budget=ImagesPerClass(4), formation=Formation(2, 2), normalization=NORMALIZATION
    )
    pixels = torch.randint(256, (8, *SHAPE), dtype=torch.uint8, device="cuda")
    memory.add(Exemplars(pixels, torch.arange(8, device="cuda") // 4))
    generator = seeded("cuda")
    for _ in range(2):
        waits.clear()  # the first draw brings the code's tables and the normalization over
        memory.as_stored(memory.sample(5, generator=generator)[0])
    assert not waits


def test_compiling_is_not_taken_for_what_a_step_needs(waits, monkeypatch):
    needed, peak = iter([900, 100]), [0]

    def alone(parameters, scale, batch):
        peak[0] = max(peak[0], next(needed, 100))

    def several(parameters, scale, together):
        sizes.append(len(together.stored))
        return Matched(*[torch.zeros(len(together.stored))] * 3)

    sizes = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1600, 2000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.insert(0, 0))
    batch = ClassBatch(*[torch.zeros(2, 2, device="cuda")] * 2, None, *[torch.zeros(2)] * 3)
    Launches(alone, several)({}, None, [batch] * 8)
    assert sizes == [4, 4]


def experiences():
    images = torch.rand(24, *SHAPE, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(24) % 4)
    moved = Compose([RandomCrop(8, padding=1), RandomHorizontalFlip()])
    return nc_benchmark(data, data, 2, task_labels=False, seed=0, train_transform=moved)


def replay(make=CondensedReplayPlugin, name="random", resident=True, **parts):
    options = {"augment": parts.pop("augment", "training")}
    options |= {name: parts.pop(name) for name in ["match_condensing"] if name in parts}
    condenser, budget = small(name, **parts), ImagesPerClass(2)
    if make is CondensedBuffer:
        return make(condenser=condenser, budget=budget, with_task_labels=True)
    return make(condenser=condenser, budget=budget, progress=False, resident=resident, **options)


def through_a_buffer(**parts):
    buffer = replay(CondensedBuffer, **parts)
    storage = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)
    return [storage, MatchStoragePlugin(buffer, match_condensing=0.5)]


WAYS = {
    "replay": lambda: [replay(name="idc", factor=2, match_condensing=0.5)],
    "replay from the host": lambda: [replay(compression=2, resident=False)],
    "replay with everything": lambda: [
        DeviceResident(),
        replay(compression=2, augment=augmentation("color", "crop", "flip", "cutout")),
        LogitAdjustmentPlugin(),
        DistillationPlugin(),
    ],
    "memory alone": lambda: [replay(MemoryOnlyPlugin, compression=2)],
    "memory alone from the host": lambda: [replay(MemoryOnlyPlugin, resident=False)],
    "buffer": lambda: through_a_buffer(compression=2),
    "packed buffer": lambda: through_a_buffer(factor=2),
    "condensed buffer": lambda: through_a_buffer(name="idc", compression=2),
}


@pytest.mark.filterwarnings("ignore:.pin_memory:UserWarning", "ignore:the experience crops")
@pytest.mark.parametrize("way", WAYS)
def test_a_strategy_trains(way, waits):
    model = ConvNet(4, size=SHAPE[1:], width=4, depth=1)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        train_mb_size=8,
        device="cuda",
        plugins=WAYS[way](),
    )
    for experience in experiences().train_stream:
        strategy.train(experience)
    assert {weights.device for weights in model.parameters()} == {GPU}
