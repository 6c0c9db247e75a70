"""New images get noise as strong as the traces of condensing, and nothing else changes."""

import math

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torchvision.transforms import v2

from dc_replay import recipes
from dc_replay.budgets import ImagesPerClass
from dc_replay.buffer import CondensedBuffer
from dc_replay.errors import ArgumentError
from dc_replay.exemplars import Exemplars
from dc_replay.match_storage import MatchStoragePlugin
from dc_replay.memory import ExemplarMemory
from dc_replay.networks import convnet_for
from dc_replay.pixels import Normalization
from dc_replay.plugin import CondensedReplayPlugin
from dc_replay.traces import excess, frequencies

SIDE = 8
NETWORK = convnet_for((3, SIDE, SIDE), width=8)
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
PLANES = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
).double()


def coefficients_slowly(images):
    """The cosine transform, sum by sum, of brightness and colour differences (JPEG's)."""
    _, channels, height, width = images.shape
    images = images.double() - 0.5
    planes = torch.zeros_like(images)
    for plane in range(channels):
        for channel in range(channels):
            weight = PLANES[plane, channel] if channels == 3 else float(plane == channel)
            planes[:, plane] += weight * images[:, channel]
    found = torch.zeros_like(planes)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for down in range(height):
        for right in range(width):
            wave = torch.outer(
                torch.cos(math.pi * down * rows / height),
                torch.cos(math.pi * right * columns / width),
            ).double()
            found[..., down, right] = (planes * wave).sum(dim=(-2, -1)) / wave.norm()
    return found


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9), (4, 5, 5)], ids=str)
def test_power_is_the_mean_square_of_the_cosine_transform(shape):
    images = torch.rand(7, *shape, generator=torch.Generator().manual_seed(0))
    found = frequencies(*shape, torch.device("cpu")).power(images)
    expected = coefficients_slowly(images).square().mean(dim=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 9)], ids=str)
def test_noise_has_the_power_that_is_asked_for(shape):
    generator = torch.Generator().manual_seed(0)
    power = 0.01 * torch.rand(shape, generator=generator)
    power[0, 1] = 0
    noise = frequencies(*shape, torch.device("cpu")).noise(power, 20_000, generator)
    found = coefficients_slowly(noise + 0.5).square().mean(dim=0).float()
    torch.testing.assert_close(found, power, rtol=0.06, atol=1e-9)  # 6 deviations of the estimate
    assert noise.mean().abs() < 1e-3


def test_excess_is_what_is_above_the_lowest_frequencies_and_not_negative():
    exemplars, images = torch.full((3, 6, 7), 5.0), torch.full((3, 6, 7), 3.0)
    images[1, 4, 4] = 9.0
    found = excess(exemplars, images)
    expected = torch.full((3, 6, 7), 2.0)
    expected[1, 4, 4] = 0
    expected[:, :3, :3] = 0
    assert torch.equal(found, expected)
    assert bool((exemplars == 5).all())


OLD = 7


class Own:
    """A condenser of somebody's own."""

    def __init__(self, wrapped):
        self.name, self.formation, self.condense = "own", wrapped.formation, wrapped.condense


class Pairs(list):
    """Images and labels as a dataset."""

    @property
    def targets(self):
        return [label for _, label in self]


class Shown(SupervisedPlugin):
    """Keeps new images, or exemplars, as they are when it comes to them."""

    def __init__(self, exemplars=False):
        super().__init__()
        self.exemplars = exemplars
        self.batches = []

    def before_training_iteration(self, strategy, **kwargs):
        images, labels = strategy.mbatch[:2]
        self.batches.append(images[(labels == OLD) == self.exemplars].clone())


def replaying(condenser, batch, seed, match_condensing=0.0):
    """A plugin that draws exemplars and gives noise, and its buffer."""
    plugin = CondensedReplayPlugin(
        condenser=condenser,
        budget=ImagesPerClass(40),
        augment=None,
        progress=False,
        batch_size_mem=batch,
        seed=seed,
        match_condensing=match_condensing,
    )
    return [plugin], plugin.buffer


def beside_avalanche(condenser, batch, seed, match_condensing=0.0):
    """Avalanche's replay, a plugin that gives noise beside it, and the buffer."""
    buffer = CondensedBuffer(
        condenser=condenser,
        budget=ImagesPerClass(40),
        augment=None,
        progress=False,
        max_size=40 * condenser.formation.images_per_stored,
        seed=seed,
    )
    replay = ReplayPlugin(mem_size=buffer.max_size, batch_size_mem=batch, storage_policy=buffer)
    return [replay, MatchStoragePlugin(buffer, match_condensing=match_condensing)], buffer


WAYS = pytest.mark.parametrize("way", [replaying, beside_avalanche])


def shown(condenser=None, *, way=replaying, batch=32, epochs=4, seed=0, **options):
    """New images as they came and as they are shown, in ``[0, 1]``, beside noisy exemplars."""
    generator = torch.Generator().manual_seed(5)
    condenser = condenser or recipes.idc(factor=1, network=NETWORK, outer=1, inner=1)
    plugins, buffer = way(condenser, batch, seed, **options)
    formation = condenser.formation
    memory = ExemplarMemory(
        budget=ImagesPerClass(40), formation=formation, normalization=NORMALIZATION
    )
    count = 40 * formation.images_per_stored
    noisy = 0.5 + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    memory.add(Exemplars(formation.store(formation.pack(noisy)), torch.full((40,), OLD)))
    buffer.memory = memory
    smooth = 0.5 + 0.01 * torch.randn(64, 3, SIDE, SIDE, generator=generator)
    pairs = Pairs(zip(smooth, [0, 1] * 32, strict=True))
    normalise = v2.Normalize(NORMALIZATION.mean, NORMALIZATION.std)
    data = as_classification_dataset(
        pairs, transform_groups={"train": normalise, "eval": normalise}
    )
    stream = class_incremental_benchmark(
        {"train": data, "test": data}, num_experiences=1, class_order=[0, 1]
    ).train_stream
    before, after, exemplars = Shown(), Shown(), Shown(exemplars=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 10))
    torch.manual_seed(0)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=batch,
        train_epochs=epochs,
        plugins=[*plugins[:-1], before, plugins[-1], after, exemplars],
        evaluator=None,
    )
    strategy.train(stream[0])
    seen = (torch.cat(some.batches) for some in (before, after, exemplars))
    came, changed, replayed = (NORMALIZATION.invert(images) for images in seen)
    assert len(came) == len(changed) == 64 * epochs and len(replayed) > 0
    decoded = NORMALIZATION.invert(memory.decoded()[0])
    for image in replayed[:5]:
        assert (decoded - image).abs().flatten(1).amax(dim=1).min() < 1e-5
    return came, changed


@WAYS
def test_new_images_get_the_power_that_exemplars_have_more(way):
    came, changed = shown(way=way, match_condensing=1.0, epochs=50)
    power = coefficients_slowly(changed).square().mean(dim=0)
    expected = coefficients_slowly(came).square().mean(dim=0)
    more = (0.05**2 - 0.01**2) * PLANES.square().sum(dim=1)  # independent values of each channel
    expected[:] += more[:, None, None]
    # Forty exemplars tell the power of each frequency to 22 %, and all of a plane to 3 %.
    above = torch.ones(SIDE, SIDE, dtype=torch.bool)
    above[:3, :3] = False
    ratio = power[:, above].mean(dim=1) / expected[:, above].mean(dim=1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.1, atol=0)
    low = coefficients_slowly(changed - came + 0.5)[..., :3, :3]
    assert low.abs().max() < 1e-5


@WAYS
def test_the_strength_multiplies_the_noise(way):
    came, whole = shown(way=way, match_condensing=1.0)
    _, half = shown(way=way, match_condensing=0.5)
    torch.testing.assert_close(half - came, (whole - came) / 2, rtol=1e-4, atol=1e-6)
    assert (whole - came).std() > 0.03


@pytest.mark.parametrize("strength", [0.0, 1.0])
@WAYS
def test_nothing_changes_without_strength_or_beside_real_exemplars(way, strength):
    chosen = recipes.random(factor=1, network=NETWORK)
    came, changed = shown(chosen if strength else None, way=way, match_condensing=strength)
    assert torch.equal(came, changed)


@WAYS
def test_compressed_exemplars_get_half_of_the_noise_by_default(way):
    packed = recipes.idc(factor=2, network=NETWORK, outer=1, inner=1)
    coded = recipes.idc(factor=1, compression=2, network=NETWORK, outer=1, inner=1)
    own = Own(recipes.random(factor=1, compression=2, network=NETWORK))  # these may be real
    for condenser, strength in ((coded, 0.5), (None, 0.0), (packed, 0.0), (own, 0.0)):
        _, default = shown(condenser, way=way, match_condensing=None)
        _, same = shown(condenser, way=way, match_condensing=strength)
        assert torch.equal(default, same)


@WAYS
def test_noisy_images_go_through_the_code_of_compressed_exemplars(way):
    condenser = recipes.idc(factor=1, compression=2, network=NETWORK, outer=1, inner=1)
    came, changed = shown(condenser, way=way, match_condensing=1.0)
    again = condenser.formation.as_stored(changed)
    # What comes out of the code hardly changes in it.
    assert (again - changed).std() < 0.2 * (changed - came).std()
    assert (changed - came).std() > 0.03


@WAYS
def test_what_is_measured_costs_nothing_after_a_hundred_mini_batches(way, monkeypatch):
    coded = []
    as_stored = ExemplarMemory.as_stored
    monkeypatch.setattr(
        ExemplarMemory, "as_stored", lambda self, x: coded.append(len(x)) or as_stored(self, x)
    )
    condenser = recipes.idc(factor=1, compression=2, network=NETWORK, outer=1, inner=1)
    shown(condenser, way=way, match_condensing=1.0, epochs=60)  # of two mini-batches each
    assert len(coded) == 2 * 100 + 20


@WAYS
def test_the_seed_decides(way):
    first, again, other = (shown(way=way, match_condensing=1.0, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "much"])
@WAYS
def test_strength_is_checked(way, strength):
    with pytest.raises(ArgumentError, match="`match_condensing` is .*; pass a finite number"):
        way(recipes.idc(), 5, 0, match_condensing=strength)
