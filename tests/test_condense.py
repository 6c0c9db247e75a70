import dataclasses
import io
import math
import random as python_random
import re
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dc_replay import condense, networks, pace, recipes
from dc_replay.apprentice import Apprentice
from dc_replay.augment import Augmentation, augmentation
from dc_replay.condense import Condensed, Condenser
from dc_replay.errors import ArgumentError, DivergedError
from dc_replay.formation import Formation
from dc_replay.multisize import Multisize, PrefixChoice
from dc_replay.networks import ConvNet, MatchingNetwork, convnet_for
from dc_replay.objectives import (
    BidirectionalMatching,
    FeatureMatching,
    GradientMatching,
    cosine_distance,
    matching_step,
)
from dc_replay.optimisation import OnReal, OnSynthetic, PixelStep
from dc_replay.pixels import Normalization, dequantise, quantise
from dc_replay.programs import Plan, _cached, programs
from dc_replay.sampling import RealImages, Representative, Uniform
from dc_replay.selection import RandomImages
from dc_replay.subsets import SubsetMatching
from dc_replay.training import NetworkTraining

CPU = torch.device("cpu")
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(counts=(12, 12), shape=(3, 8, 8), *, device="cpu", labels=None):
    """Noise about one coloured pattern for each class, classes interleaved."""
    names = torch.tensor(labels if labels is not None else range(len(counts)))
    patterns = torch.rand(len(counts), *shape, generator=seeded(1))
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.randperm(len(targets), generator=seeded(2))]
    noise = torch.rand(len(targets), *shape, generator=seeded(3))
    images = quantise(0.6 * patterns[targets] + 0.4 * noise)
    return images.to(device), names[targets].to(device)


def network(shape=(3, 8, 8)):
    return convnet_for(shape, width=8)


def small(name="dream_plus", *, shape=(3, 8, 8), outer=1, inner=2, **parts):
    """A recipe at a size that takes no time."""
    options = {"network": network(shape)}
    if "factor" in parts:
        options["factor"] = parts.pop("factor")
    condenser = replace(recipes.RECIPES[name](**options), precision="float32")
    if condenser.objective is not None:
        condenser = replace(condenser, outer=outer, inner=inner)
    if isinstance(condenser.sampler, Representative):
        parts.setdefault("sampler", Representative(4))
    return replace(condenser, **parts)


def run(condenser, images, labels, *, quotas=2, seed=0, **options):
    condensed = condenser.condense(images, labels, quotas=quotas, generator=seeded(seed), **options)
    assert isinstance(condensed, Condensed)
    return condensed


every_recipe = pytest.mark.parametrize("name", sorted(recipes.RECIPES))
optimising = pytest.mark.parametrize("name", ["dc", "dsa", "dm", "idc_i", "idc", "dream"])


@every_recipe
def test_it_yields_bytes_of_the_right_classes_and_a_history(name, device):
    images, labels = toy((9, 7, 8), device=device, labels=[40, 7, 12])
    condenser = small(name, outer=2, inner=3)
    condensed = run(condenser, images, labels, quotas=2, normalization=NORMALIZATION)
    exemplars = condensed.exemplars
    assert exemplars.pixels.shape == (6, 3, 8, 8) and exemplars.pixels.dtype == torch.uint8
    assert exemplars.labels.tolist() == [7, 7, 12, 12, 40, 40]
    assert exemplars.nbytes == 6 * 3 * 8 * 8
    assert exemplars.pixels.device == images.device == exemplars.labels.device
    if condenser.objective is None:
        assert condensed.history == {}
    else:
        distances = condensed.history["distance"]
        assert len(distances) == 6
        assert all(math.isfinite(d) and d > 0 for d in distances)


@every_recipe
def test_it_computes_outside_of_the_callers_autocast(name):
    """``precision`` says in what, and some of it, such as k-means, takes nothing else."""
    images, labels = toy()
    expected = run(small(name), images, labels).exemplars.pixels
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(small(name), images, labels).exemplars.pixels, expected)


def held_out_distance(objective, exemplars, formation, images, labels, seeds=3):
    """The mean distance of exemplars to all real images on networks that took no part."""
    matching = MatchingNetwork(network(), 2, torch.zeros(1, 3, 8, 8))
    total = 0.0
    for seed in range(seeds):
        torch.manual_seed(1000 + seed)
        parameters = matching.fresh()
        for label in exemplars.classes:
            real = NORMALIZATION.apply(dequantise(images[labels == label]))
            stored = dequantise(exemplars.of_class(label))
            synthetic = NORMALIZATION.apply(formation.decode(stored))
            target = torch.tensor(label)
            total += float(
                matching_step(objective, matching, parameters, real, synthetic, target).distance
            )
    return total / seeds


@pytest.mark.parametrize(
    ("objective", "factor", "lr"),
    [
        (GradientMatching(), 2, 0.05),
        (BidirectionalMatching(), 1, 0.02),
        (FeatureMatching(), 2, 0.02),
        (GradientMatching(cosine_distance, convolutions_only=False), 1, 0.02),
    ],
    ids=["gradient", "both", "features", "cosine"],
)
def test_the_matching_distance_falls(objective, factor, lr):
    images, labels = toy((30, 30))
    condenser = small(
        "idc",
        factor=factor,
        objective=objective,
        outer=4,
        inner=15,
        update=None,
        sampler=Uniform(30),
        augment=Augmentation(),
        pixels=PixelStep(lr=lr, reference=None),
    )
    options = {"normalization": NORMALIZATION, "quotas": 2}
    # The same seed selects the same images.
    before = run(replace(condenser, objective=None), images, labels, **options).exemplars
    after = run(condenser, images, labels, **options).exemplars
    formation = Formation(factor)
    first = held_out_distance(objective, before, formation, images, labels)
    last = held_out_distance(objective, after, formation, images, labels)
    assert last < 0.8 * first


@every_recipe
def test_a_seed_gives_the_same_bytes_with_a_cold_and_a_warm_cache(name):
    images, labels = toy()
    condenser = small(name)
    _cached.cache_clear()
    cold, warm = (run(condenser, images, labels, seed=5) for _ in range(2))
    torch.rand(7)  # and whatever the global generators are
    again = run(condenser, images, labels, seed=5)
    for other in (warm, again):
        assert torch.equal(cold.exemplars.pixels, other.exemplars.pixels)
        assert cold.history == other.history


@every_recipe
def test_different_seeds_give_different_bytes(name):
    images, labels = toy((40, 40))
    first, second = (run(small(name), images, labels, seed=s).exemplars.pixels for s in (1, 2))
    assert not torch.equal(first, second)


@every_recipe
def test_global_random_states_stay_as_they_were(name, device):
    images, labels = toy(device=device)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    python_state = python_random.getstate()
    device_state = torch.cuda.get_rng_state() if device.type == "cuda" else None
    _cached.cache_clear()
    run(small(name), images, labels)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert np.random.get_state()[2:] == numpy_state[2:]  # noqa: NPY002
    assert python_random.getstate() == python_state
    if device_state is not None:
        assert torch.equal(torch.cuda.get_rng_state(), device_state)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["dream_plus", "dsa", "herding", "dm", "forgetting"])
def test_it_works_where_gradients_are_off(name, context):
    images, labels = toy()
    expected = run(small(name), images, labels)
    with context():
        # Data that are themselves made inside are inference tensors.
        found = run(small(name), images.clone(), labels.clone())
        assert not torch.is_grad_enabled()
    assert torch.equal(found.exemplars.pixels, expected.exemplars.pixels)
    assert found.history == expected.history


@pytest.mark.parametrize(
    ("shape", "factor"),
    [((1, 8, 8), 2), ((5, 8, 8), 2), ((3, 8, 12), 2), ((3, 9, 7), 2), ((2, 10, 8), 3)],
    ids=str,
)
@pytest.mark.parametrize("name", ["idc", "dream_plus", "representative", "dc"])
def test_channels_sides_and_factors(name, shape, factor):
    images, labels = toy(shape=shape)
    exemplars = run(small(name, shape=shape, factor=factor), images, labels).exemplars
    assert exemplars.pixels.shape == (4, *shape)


def test_the_default_network_fits_the_images():
    images, labels = toy((3, 3), (2, 10, 8))
    condenser = replace(recipes.idc(outer=1, inner=1), sampler=Uniform(2), update=None)
    assert run(condenser, images, labels).exemplars.pixels.shape == (4, 2, 10, 8)


@pytest.mark.parametrize("name", ["random", "herding", "idc", "dream_plus", "dc"])
def test_quotas_may_differ_and_are_cut_to_the_images_there_are(name):
    images, labels = toy((9, 3, 1, 5), labels=[4, 5, 6, 7])
    quotas = {4: 1, 5: 8, 6: 3, 7: 2, 99: 4}
    exemplars = run(small(name), images, labels, quotas=quotas).exemplars
    assert exemplars.counts == {4: 1, 5: 3, 6: 1, 7: 2}


@pytest.mark.parametrize("name", ["random", "herding", "k_center", "forgetting"])
def test_real_images_are_not_stored_again_to_fill_a_quota(name):
    images, labels = toy((10, 4, 5), shape=(3, 16, 16))
    condenser = small(name, shape=(3, 16, 16))
    condenser = replace(condenser, formation=Formation(1, compression=4))
    exemplars = run(condenser, images, labels, quotas=6).exemplars
    assert exemplars.counts == {0: 3, 1: 1, 2: 2}
    shown = condenser.formation.decode(condenser.formation.open(exemplars.pixels))
    owner = exemplars.labels.repeat_interleave(4)
    for label in (0, 1, 2):
        mine = images[labels == label].flatten(1).float() / 255
        nearest = torch.cdist(shown[owner == label].flatten(1), mine).argmin(dim=1)
        # Each once, and then what the last stored image has room for.
        assert nearest.unique().tolist() == list(range(len(mine)))
        assert nearest[: len(mine)].unique().numel() == len(mine)


def most_stored(condenser, images):
    """Four real images fill one that packs them; what is not optimised has no use for copies."""
    holds = 1 if condenser.objective else condenser.formation.images_per_stored
    return math.ceil(images / holds)


@every_recipe
@pytest.mark.parametrize("kind", ["constant", "duplicates", "one-class", "one-image"])
def test_images_that_tell_nothing_apart_do_no_harm(name, kind):
    images, labels = toy((6, 6))
    if kind == "constant":
        images = torch.full_like(images, 77)
    elif kind == "duplicates":
        images = images[:1].expand_as(images).contiguous()
    elif kind == "one-class":
        labels = torch.zeros_like(labels)
    else:
        images, labels = images[:1], labels[:1]
    condenser = small(name, outer=2)
    condensed = run(condenser, images, labels, quotas=3)
    counts = {int(label): int((labels == label).sum()) for label in labels.unique()}
    expected = {label: min(3, most_stored(condenser, count)) for label, count in counts.items()}
    assert condensed.exemplars.counts == expected
    assert all(math.isfinite(d) for d in condensed.history.get("distance", []))


def deterministic(classes):
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return ConvNet(classes, size=(8, 8), width=4, depth=1)


@dataclass(frozen=True)
class Everything:
    """Samples all real images of a class in order."""

    def draw(self, real, previous, inner, embed, generator):
        return list(real.rows)


@dataclass(frozen=True)
class First:
    """Selects the first images of a class."""

    def choose(self, real, counts, learner, generator):
        return [rows[:count] for rows, count in zip(real.rows, counts, strict=True)]


@dataclass(frozen=True)
class Recorder:
    """Trains on all real images, and notes the pixels of each step."""

    seen: list = field(default_factory=list)

    def __call__(self, apprentice, pixels):
        self.seen.append([p.clone() for p in pixels])
        apprentice.train_on_real()


def hand_written(
    images,
    labels,
    counts,
    *,
    factor,
    training,
    step,
    outer,
    inner,
    sizes=(),
    parts=None,
):
    """IDC for deterministic samples and no augmentation, the plain way.

    With ``parts=(k, weight)`` image i is of part i % k. With ``sizes``, MDC for a period of one
    outer iteration: the prefix of the first two periods, then of one period each. The rates that
    such a choice would go by are noted in ``chosen``.
    """
    prefixes, chosen = bool(sizes), []
    formation = Formation(factor)
    real = [NORMALIZATION.apply(images[labels == c].float() / 255) for c in range(len(counts))]
    stored = []
    for c, count in enumerate(counts):
        first = images[labels == c][: count * factor**2].float() / 255
        stored.append(formation.pack(first).requires_grad_())
    optimizers = [
        torch.optim.SGD([p], lr=step.lr * len(p) / step.reference, momentum=step.momentum)
        for p in stored
    ]
    seen, distances = [], []
    size, frozen, before, each = 1, 0, None, factor**2
    for e in range(outer):
        module = deterministic(len(counts))
        apart = []
        learner = torch.optim.SGD(
            module.parameters(),
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        for t in range(inner):
            total = 0.0
            convolutions = [p for p in module.parameters() if p.ndim == 4]

            def gradients(batch, c, module=module, convolutions=convolutions):
                loss = F.cross_entropy(module(batch), torch.full((len(batch),), c))
                return torch.autograd.grad(loss, convolutions, create_graph=True)

            def apart_by(first, second, c, gradients=gradients):
                pairs = zip(gradients(first, c), gradients(second, c), strict=True)
                return sum(((a - b.detach()) ** 2).sum() for a, b in pairs)

            for c, pixels in enumerate(stored):
                synthetic = NORMALIZATION.apply(formation.decode(pixels))
                distance = apart_by(synthetic, real[c], c)
                if parts is not None:
                    k, weight = parts
                    weight *= 1 - (e * inner + t) / (outer * inner)
                    for part in range(k):
                        distance = distance + weight * apart_by(
                            synthetic[part::k], real[c][part::k], c
                        )
                if prefixes and len(pixels) > 1:
                    n = min(size, len(pixels) - 1)
                    distance = distance + apart_by(synthetic[: n * each], real[c], c)
                    with torch.no_grad():
                        middle = module.embed(real[c]).mean(0)
                        for n in range(1, len(pixels)):
                            near = module.embed(synthetic[: n * each]).mean(0)
                            apart.append((n, c, float(((near - middle) ** 2).sum())))
                optimizers[c].zero_grad()
                (pixels.grad,) = torch.autograd.grad(distance, pixels)
                pixels.grad[:frozen] = 0
                optimizers[c].step()
                total += float(distance.detach())
            distances.append(total / len(stored))
            seen.append([p.detach().clone() for p in stored])
            learner.zero_grad()
            everything = NORMALIZATION.apply(images.float() / 255)
            F.cross_entropy(module(everything), labels).backward()
            learner.step()
        with torch.no_grad():
            for pixels in stored:
                pixels.clamp_(0, 1)
        if prefixes:
            means = {}
            for n, c in sorted({(n, c) for n, c, _ in apart}):
                values = [value for m, d, value in apart if (m, d) == (n, c)]
                means[n, c] = sum(values) / len(values)
            former = size
            if before is not None:
                rates = {}
                for n in range(1, max(counts)):
                    changes = [abs(v - before[key]) for key, v in means.items() if key[0] == n]
                    rates[n] = sum(changes) / len(changes)
                chosen.append(list(rates.values()))
                size = sizes[len(chosen)] if len(chosen) < len(sizes) else 1
            before, frozen = means, former if size > former else 0
            if frozen:
                for optimizer in optimizers:
                    for state in optimizer.state.values():
                        state["momentum_buffer"][:frozen] = 0
    return seen, distances, [p.detach() for p in stored], chosen


SIZES = (1, 2, 3, 1)  # grows, so that images freeze, and shrinks
METHODS = {
    "plain": ({}, {}, [2, 1, 1]),
    "parts": ({"subsets": SubsetMatching(2, 0.7)}, {"parts": (2, 0.7)}, [3, 2, 2]),
    "prefixes": ({"multisize": Multisize(period=1)}, {"sizes": SIZES}, [4, 4, 4]),
    "both": (
        {"subsets": SubsetMatching(2, 0.7), "multisize": Multisize(period=1)},
        {"sizes": SIZES, "parts": (2, 0.7)},
        [4, 4, 4],
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1, 2])
def test_outer_iterations_equal_a_loop_written_by_hand(factor, method, monkeypatch):
    options, by_hand, counts = METHODS[method]
    outer = 5 if "sizes" in by_hand else 2
    rates = []

    def choose(self, found):
        rates.append(found.mean(dim=0).tolist())
        return [SIZES[len(rates)] if len(rates) < len(SIZES) else 1] * len(self.counts)

    monkeypatch.setattr(PrefixChoice, "_most_learnable", choose)
    monkeypatch.setattr(
        SubsetMatching, "divide", lambda self, count, *_: torch.arange(count) % self.parts
    )
    images, labels = toy((16, 17, 19))
    training = NetworkTraining(
        lr=0.05, batch=len(images), augment=Augmentation(), cutmix=0.0, weight_decay=0.01
    )
    step = PixelStep(lr=0.5, momentum=0.5, reference=10)
    recorder = Recorder()
    condenser = Condenser(
        name="by-hand",
        formation=Formation(factor),
        selection=First(),
        objective=GradientMatching(),
        sampler=Everything(),
        augment=Augmentation(),
        network=deterministic,
        training=training,
        update=recorder,
        pixels=step,
        outer=outer,
        inner=3,
        precision="float32",
        **options,
    )
    condensed = run(
        condenser,
        images,
        labels,
        quotas=dict(enumerate(counts)),
        normalization=NORMALIZATION,
    )
    seen, distances, stored, chosen = hand_written(
        images,
        labels,
        counts,
        factor=factor,
        training=training,
        step=step,
        outer=outer,
        inner=3,
        **by_hand,
    )
    assert len(recorder.seen) == len(seen) == 3 * outer
    for ours, theirs in zip(recorder.seen, seen, strict=True):
        for first, second in zip(ours, theirs, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=2e-6)
    assert len(rates) == len(chosen) == (4 if "sizes" in by_hand else 0)
    for ours, theirs in zip(rates, chosen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    moved = [(a - b).abs().max() for a, b in zip(seen[-1], seen[0], strict=True)]
    assert min(moved) > 1e-3  # far more than the tolerance
    assert condensed.history["distance"] == pytest.approx(distances, rel=1e-4)
    difference = condensed.exemplars.pixels.int() - quantise(torch.cat(stored)).int()
    assert difference.abs().max() <= 1


def test_pixels_may_leave_0_to_1_until_the_outer_iteration_ends():
    images, labels = toy()
    images = torch.where(images > 127, 255, 0).to(torch.uint8)
    recorder = Recorder()
    condenser = small(
        "idc_i", outer=2, inner=3, update=recorder, pixels=PixelStep(lr=5.0), selection=First()
    )
    run(condenser, images, labels)
    steps = [torch.cat(pixels) for pixels in recorder.seen]
    outside = [bool(((p < 0) | (p > 1)).any()) for p in steps]
    assert all(outside)
    # The fourth step starts from clamped pixels, so they are nearer to [0, 1] than after the third.
    excess = [float((p - p.clamp(0, 1)).abs().sum()) for p in steps]
    assert excess[2] > excess[1] > excess[0]
    assert excess[3] < excess[2]


@pytest.mark.parametrize(
    ("reference", "rates"), [(10, [0.1, 0.05]), (5, [0.2, 0.1]), (None, [0.5, 0.5])]
)
def test_the_learning_rate_grows_with_the_images_of_a_class(reference, rates):
    pixels = [torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)]
    optimizer = PixelStep(lr=0.5, momentum=0.3, reference=reference).optimizer(pixels)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    assert all(group["momentum"] == 0.3 for group in optimizer.param_groups)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("compression", [1, 3])
def test_a_rate_for_normalised_images_moves_them_as_if_they_were_optimised(compression):
    generator = seeded()
    images = torch.rand(2, 3 * compression, 4, 4, dtype=torch.float64, generator=generator)
    towards = torch.rand(2 * compression, 3, 4, 4, dtype=torch.float64, generator=generator)

    def distance(normalised):
        return ((normalised - towards) ** 4).sum()

    step = PixelStep(lr=0.1, momentum=0.5, reference=None, normalised=True)
    scale = NORMALIZATION.scale(CPU, torch.float64)
    ours = images.clone()
    optimizer = step.optimizer([ours], compression)
    # As published: the parameter is the normalised image.
    theirs = scale.normalise(images.view(-1, 3, 4, 4)).requires_grad_()
    published = torch.optim.SGD([theirs], lr=0.1, momentum=0.5)
    for _ in range(3):
        seen = ours.clone().requires_grad_()
        distance(scale.normalise(seen.view(-1, 3, 4, 4))).backward()
        ours.grad = step.gradient(seen.grad, scale.std)
        optimizer.step()
        published.zero_grad()
        distance(theirs).backward()
        published.step()
    there = scale.invert(theirs.detach()).view_as(ours)
    torch.testing.assert_close(ours, there, rtol=1e-12, atol=1e-12)
    assert (ours - images).abs().max() > 1e-3
    assert PixelStep().gradient(seen, scale.std) is seen


@pytest.mark.parametrize("channel", range(3))
def test_a_rate_for_normalised_images_is_used(channel):
    images, labels = toy((4, 4))
    dm = small("dm", outer=1, inner=1, selection=First())
    plain = replace(dm.pixels, normalised=False)

    def after(step):
        condenser = replace(dm, pixels=step)
        pixels = run(condenser, images, labels, normalization=NORMALIZATION).exemplars.pixels
        return pixels[:, channel].int()

    found = after(replace(dm.pixels, lr=3.0))
    expected = after(replace(plain, lr=3.0 * NORMALIZATION.std[channel] ** 2))
    assert (found - expected).abs().max() <= 1  # rounding
    assert (found - after(replace(plain, lr=1e-30))).abs().max() > 10


@pytest.mark.parametrize(
    ("final", "rates"),
    [(1.0, [0.4] * 4), (0.0, [0.4, 0.3, 0.2, 0.1]), (0.5, [0.4, 0.35, 0.3, 0.25])],
)
def test_the_learning_rate_may_fall_linearly(monkeypatch, final, rates):
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    pixels = PixelStep(lr=0.4, reference=None, final=final)
    condenser = replace(small("idc", outer=2, inner=2), pixels=pixels, update=None)
    condenser.condense(*toy(), quotas=1, generator=seeded())
    assert [rate for rate in seen if rate > 0.05] == pytest.approx(rates)


@dataclass(frozen=True)
class Sizes:
    """Feature matching that notes how many images it is given."""

    seen: list = field(default_factory=list, compare=False)

    def statistics(self, network, parameters, images, labels, shares):
        self.seen.append(len(images))
        return FeatureMatching().statistics(network, parameters, images, labels, shares)

    def distance(self, synthetic, real):
        return FeatureMatching().distance(synthetic, real)


def test_above_most_decoded_a_random_subset_is_matched():
    images, labels = toy((20, 20))
    objective = Sizes()
    condenser = small("idc", objective=objective, sampler=Uniform(6), most_decoded=5, inner=4)
    everywhere = replace(condenser, update=Recorder())
    run(everywhere, images, labels, quotas={0: 1, 1: 3})
    # Real, then synthetic images: 4 decoded ones are all used, of 12 only 5.
    assert objective.seen == [6, 4, 6, 5] * 4
    before = run(replace(condenser, objective=None), images, labels, quotas={0: 1, 1: 3})
    after = run(replace(everywhere, pixels=PixelStep(lr=50.0)), images, labels, quotas={0: 1, 1: 3})
    crops = (after.exemplars.of_class(1).int() - before.exemplars.of_class(1).int()).abs()
    moved = crops.view(3, 3, 2, 4, 2, 4).amax(dim=(1, 3, 5)) > 0
    assert moved.sum() > 5  # another subset in each step


@pytest.mark.parametrize("name", ["representative", "random", "herding"])
def test_without_an_objective_the_selection_is_packed_and_no_more(name):
    images, labels = toy((20, 20))
    chosen = []

    @dataclass(frozen=True)
    class Spied:
        inside: object

        def choose(self, real, counts, learner, generator):
            chosen.extend(self.inside.choose(real, counts, learner, generator))
            assert counts == [12, 4]
            return chosen

    condenser = small(name, factor=2)
    condenser = replace(condenser, selection=Spied(condenser.selection))
    exemplars = run(condenser, images, labels, quotas={0: 3, 1: 1}).exemplars
    packed = [Formation(2).pack(dequantise(images[index])) for index in chosen]
    assert torch.equal(exemplars.pixels, quantise(torch.cat(packed)))
    assert all((labels[index] == c).all() for c, index in enumerate(chosen))


def test_optimising_starts_from_the_selection():
    images, labels = toy((20, 20))
    dream = small("dream", pixels=PixelStep(lr=1e-12))
    start = run(replace(dream, objective=None), images, labels)
    assert torch.equal(run(dream, images, labels).exemplars.pixels, start.exemplars.pixels)
    assert torch.equal(
        start.exemplars.pixels, run(small("representative"), images, labels).exemplars.pixels
    )


@pytest.mark.parametrize("name", ["random", "herding", "k_center", "forgetting", "representative"])
def test_with_factor_1_raw_images_are_stored_byte_for_byte(name):
    images, labels = toy((11, 7))
    condenser = small(name, factor=1)
    assert condenser.stores_raw_images
    exemplars = run(condenser, images, labels, quotas=4, normalization=NORMALIZATION).exemplars
    for label in (0, 1):
        real = {image.numpy().tobytes() for image in images[labels == label]}
        stored = {image.numpy().tobytes() for image in exemplars.of_class(label)}
        assert len(stored) == 4 and stored <= real
    assert not replace(condenser, formation=Formation(2)).stores_raw_images


@optimising
def test_optimised_images_are_not_raw(name):
    assert not small(name).stores_raw_images


def test_without_a_selection_it_starts_from_noise(device):
    images, labels = toy((40, 40), device=device)
    condenser = Condenser(name="noise", selection=None, network=network())
    pixels = run(condenser, images, labels, quotas=20).exemplars.pixels.float()
    assert 120 < pixels.mean() < 135 and 68 < pixels.std() < 80
    assert pixels.device == images.device
    condensed = run(small("dc", selection=None), images, labels)
    assert condensed.exemplars.counts == {0: 2, 1: 2}


@dataclass
class Calls:
    """Stands in for an apprentice."""

    made: list = field(default_factory=list)

    def train_on_real(self, limit=None):
        self.made.append(("real", limit))

    def train_on_synthetic(self, pixels):
        self.made.append(("synthetic", len(pixels)))


def test_network_updates():
    calls = Calls()
    OnReal(300)(calls, [torch.zeros(1)])
    OnSynthetic(2)(calls, [torch.zeros(1)] * 3)
    assert calls.made == [("real", 300), ("synthetic", 3), ("synthetic", 3)]


def test_each_network_is_fresh_warmed_up_and_updated():
    images, labels = toy((5, 5))
    seen = []

    @dataclass(frozen=True)
    class Watch:
        def __call__(self, apprentice, pixels):
            seen.append({k: v.clone() for k, v in apprentice.parameters.items()})
            assert [len(p) for p in pixels] == [2, 2]
            assert not any(p.requires_grad for p in pixels)
            apprentice.train_on_synthetic(pixels)

    condenser = small("idc", network=deterministic, update=Watch(), outer=2, inner=2)
    run(condenser, images, labels)
    names = list(seen[0])
    assert all(torch.equal(seen[0][n], seen[2][n]) for n in names)  # restarted
    assert not torch.equal(seen[0][names[0]], seen[1][names[0]])  # updated
    seen.clear()
    run(replace(condenser, warm_up=1), images, labels)
    fresh = dict(deterministic(2).named_parameters())
    assert not any(torch.equal(seen[0][n], fresh[n]) for n in names if "head" in n)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_network_is_warmed_up_for_as_many_epochs(epochs, monkeypatch):
    asked = []
    monkeypatch.setattr(Apprentice, "train", lambda self, epochs: asked.append(epochs))
    run(small("idc", warm_up=epochs, outer=2), *toy())
    assert asked == [epochs, epochs]


def test_samplers_are_told_what_the_iteration_before_drew():
    @dataclass(frozen=True)
    class Noting:
        given: list = field(default_factory=list)

        def draw(self, real, previous, inner, embed, generator):
            drawn = [rows[inner : inner + 2] for rows in real.rows]
            self.given.append((previous, inner, drawn))
            return drawn

    sampler = Noting()
    run(small("idc", sampler=sampler, outer=2, inner=3), *toy())
    assert [inner for _, inner, _ in sampler.given] == [0, 1, 2] * 2
    before = None
    for previous, inner, drawn in sampler.given:
        if inner == 0:
            assert previous is None
        else:
            assert all(map(torch.equal, previous, before))
        before = drawn


def test_real_and_condensed_images_of_a_class_are_augmented_alike_and_classes_unlike():
    seen = []

    @dataclass(frozen=True)
    class Spy(FeatureMatching):
        def statistics(self, network, parameters, images, labels, shares):
            seen.append(images.detach().clone())
            return super().statistics(network, parameters, images, labels, shares)

    images, _ = toy((6,))
    # Both classes have the same images, and what is condensed begins with all of them.
    both = images.repeat(2, 1, 1, 1), torch.arange(2).repeat_interleave(6)
    parts = {"sampler": Everything(), "selection": First(), "augment": augmentation("color")}
    run(small("idc_i", objective=Spy(), inner=1, **parts), *both, quotas=6)
    real, condensed, others, _ = seen
    torch.testing.assert_close(real, condensed)
    assert not torch.allclose(real, others)


def test_forgetting_is_counted_between_epochs():
    images, labels = toy((3, 2))
    real = RealImages(images, labels, (0, 1), NORMALIZATION)
    right = torch.tensor(  # by epoch, for each image in the order given
        [[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]], dtype=torch.bool
    )
    position = {image.tobytes(): i for i, image in enumerate(images.numpy())}
    passes = []

    def forward(parameters, batch):
        pixels = quantise(NORMALIZATION.invert(batch))
        rows = torch.tensor([position[image.tobytes()] for image in pixels.numpy()])
        said = torch.where(right[len(passes) - 1, rows], labels[rows], 1 - labels[rows])
        return F.one_hot(said, 2).float(), None

    functions = programs(
        Plan(
            factory=network(),
            classes=2,
            shape=(3, 8, 8),
            device=CPU,
            objective=None,
            formation=Formation(1),
            augment=Augmentation(),
            training=NetworkTraining(),
            precision="float32",
            compile=False,
        )
    )
    apprentice = Apprentice(
        replace(functions, forward=forward),
        training=NetworkTraining(),
        formation=Formation(1),
        real=real,
        generator=seeded(),
    )
    apprentice.train_on_real = lambda limit=None: passes.append(limit)
    # The fourth image was never right, so it counts as forgotten in every epoch.
    assert apprentice.forgotten(4).tolist() == [1, 0, 2, 4, 1]
    assert passes == [None] * 4


def test_labels_and_normalization_reach_the_network():
    images, labels = toy((6, 6), labels=[3, 50])
    seen = []

    @dataclass(frozen=True)
    class Spy:
        def statistics(self, network, parameters, images, labels, shares):
            seen.append((images.detach().clone(), labels.tolist()))
            return FeatureMatching().statistics(network, parameters, images, labels, shares)

        def distance(self, synthetic, real):
            return FeatureMatching().distance(synthetic, real)

    condenser = small(
        "idc_i",
        objective=Spy(),
        sampler=Everything(),
        selection=First(),
        augment=Augmentation(),
        inner=1,
    )
    run(condenser, images, labels, quotas=2, normalization=NORMALIZATION)
    for c, label in enumerate((3, 50)):
        real = NORMALIZATION.apply(images[labels == label].float() / 255)
        torch.testing.assert_close(seen[2 * c][0], real)
        torch.testing.assert_close(seen[2 * c + 1][0], real[:2])
        assert seen[2 * c][1] == [c] * 6 and seen[2 * c + 1][1] == [c] * 2


def test_nothing_passed_in_is_changed():
    images, labels = toy()
    quotas = {0: 2, 1: 1}
    before = images.clone(), labels.clone(), dict(quotas)
    condenser = small("dream_plus")
    kept = dataclasses.asdict(replace(condenser, network=None))
    run(condenser, images, labels, quotas=quotas)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert quotas == before[2]
    assert dataclasses.asdict(replace(condenser, network=None)) == kept


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_is_shown_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    images, labels = toy((4, 4))
    run(small("idc", inner=3), images, labels)
    assert sys.stderr.getvalue() == ""
    run(small("idc", inner=3), images, labels, progress=True)
    assert "idc" in sys.stderr.getvalue()


@pytest.mark.parametrize("added", ["plain", "both"])
@pytest.mark.parametrize("name", ["dsa", "dm", "idc", "dream_plus"])
def test_several_classes_at_once_give_what_one_after_the_other_gives(name, added, device):
    images, labels = toy((12, 12, 12, 12, 9), device=device)
    condenser = small(name, outer=3, most_decoded=9, **METHODS[added][0])
    if condenser.multisize is not None:
        condenser = replace(condenser, multisize=Multisize(period=1, per_class=True))
    quotas = {0: 2, 1: 3, 2: 2, 3: 2, 4: 3}  # of two sizes, one above most_decoded at factor 2
    alone, pairs, all_of_them = (
        run(replace(condenser, classes_at_once=most), images, labels, quotas=quotas)
        for most in (1, 2, 5)
    )
    for together in (pairs, all_of_them):
        assert together.history["distance"] == pytest.approx(alone.history["distance"], rel=1e-3)
        assert together.history.get("prefix_sizes") == alone.history.get("prefix_sizes")
        difference = together.exemplars.pixels.int() - alone.exemplars.pixels.int()
        assert difference.abs().max() <= 1


class Clock:
    """Passes a second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1
        return self.now


def test_a_time_budget_takes_the_place_of_the_outer_iterations(monkeypatch):
    images, labels = toy()
    monkeypatch.setattr(pace, "time", Clock())
    warm_ups = []
    condenser = replace(small("idc", outer=1, inner=4), seconds=10.5, update=Recorder(warm_ups))
    found = run(condenser, images, labels)
    # Each iteration takes a second: ten are done, with three networks.
    assert found.iterations == len(found.history["distance"]) == len(warm_ups) == 10
    assert run(replace(condenser, seconds=0.1), images, labels).iterations == 1


def test_settings_that_fall_do_so_by_the_time_that_is_spent(monkeypatch):
    monkeypatch.setattr(pace, "time", Clock())
    rates, weights = [], []
    set_rate, weight_at = PixelStep.set_rate, SubsetMatching.weight_at

    def noted_rate(self, optimizer, share):
        set_rate(self, optimizer, share)
        rates.append(optimizer.param_groups[0]["lr"])

    def noted_weight(self, share):
        weights.append(weight_at(self, share))
        return weights[-1]

    monkeypatch.setattr(PixelStep, "set_rate", noted_rate)
    monkeypatch.setattr(SubsetMatching, "weight_at", noted_weight)
    condenser = replace(
        small("idc", inner=2),
        seconds=4,
        pixels=PixelStep(lr=0.4, reference=None, final=0.0),
        subsets=SubsetMatching(2, 1.0),
    )
    run(condenser, *toy((6,)))
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert weights == pytest.approx([1, 0.75, 0.5, 0.25])


def test_a_bar_over_seconds_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    images, labels = toy((4, 4))
    run(replace(small("idc"), seconds=0.3), images, labels, progress=True)
    assert "idc" in (shown := sys.stderr.getvalue()) and " s" in shown


def test_bfloat16_convolutions_give_nearly_the_same(monkeypatch):
    monkeypatch.setattr(networks, "has_bfloat16", lambda device: True)
    _cached.cache_clear()
    images, labels = toy()
    exact = run(small("idc"), images, labels)
    lower = run(small("idc", precision="bfloat16"), images, labels)
    assert lower.history["distance"] == pytest.approx(exact.history["distance"], rel=0.1)
    assert lower.history != exact.history
    assert run(small("idc", precision="auto"), images, labels).history == lower.history
    monkeypatch.setattr(networks, "has_bfloat16", lambda device: False)
    _cached.cache_clear()
    assert run(small("idc", precision="auto"), images, labels).history == exact.history


def test_a_rate_that_leaves_the_range_of_numbers_is_an_error():
    images, labels = toy(labels=[8, 9])
    before = torch.get_rng_state()
    condenser = small("idc", outer=3, inner=4, pixels=PixelStep(lr=1e35))
    message = "class [89].*became NaN.*outer iteration 0, inner iteration [01]; lower the pixels'"
    with pytest.raises(DivergedError, match=message) as caught:
        run(condenser, images, labels)
    assert not isinstance(caught.value, ArgumentError)
    assert torch.equal(torch.get_rng_state(), before)


class Late(PixelStep):
    """Moves as it should in the first half of the condensation."""

    def set_rate(self, optimizer, share):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] if share < 0.5 else 1e35


def test_what_was_reached_before_it_diverged_is_kept():
    images, labels = toy(labels=[8, 9])
    good = run(small("idc", outer=2, inner=3), images, labels)
    with pytest.raises(DivergedError, match="outer iteration 2, inner iteration [01]") as caught:
        run(small("idc", outer=4, inner=3, pixels=Late()), images, labels)
    kept = caught.value.condensed
    assert torch.equal(kept.exemplars.pixels, good.exemplars.pixels)
    assert torch.equal(kept.exemplars.labels, good.exemplars.labels)
    assert kept.history == good.history and kept.iterations == 6


@dataclass(frozen=True, eq=False)
class Spoilt(GradientMatching):
    """NaN for one class, from a number of its steps on."""

    position: int = 1
    good: int = 2
    steps: list = field(default_factory=list)

    def statistics(self, network, parameters, images, labels, shares):
        found, features = super().statistics(network, parameters, images, labels, shares)
        if int(labels[0]) == self.position:
            self.steps.append(None)
            if len(self.steps) > 2 * self.good:  # real and synthetic images of each step
                found = tuple(value * torch.nan for value in found)
        return found, features


def test_the_class_that_diverged_is_named():
    images, labels = toy((12, 12, 12), labels=[4, 8, 9])
    condenser = small("idc", outer=2, inner=4, objective=Spoilt())
    with pytest.raises(DivergedError, match="of class 8, .* outer iteration 0, inner iteration 2"):
        run(condenser, images, labels)


@pytest.mark.parametrize("training", [NetworkTraining(lr=1e30), NetworkTraining(lr=1e38)])
@pytest.mark.parametrize("name", ["idc", "dream"])
def test_a_matching_network_that_diverges_is_an_error(name, training):
    images, labels = toy()
    condenser = small(name, outer=1, inner=3, training=training)
    with pytest.raises(DivergedError, match="that of the matching network, now 1e\\+3[08]"):
        run(condenser, images, labels)


@pytest.mark.parametrize("name", ["idc", "dm"])
def test_what_is_advised_where_it_diverges_lowers_the_rate(name):
    condenser = small(name, outer=3, inner=4)
    condenser = replace(condenser, pixels=replace(condenser.pixels, lr=1e35))
    with pytest.raises(DivergedError) as raised:
        run(condenser, *toy())
    advised = re.search(r"replace\(condenser, pixels=(.*?\))\)", str(raised.value)).group(1)
    step = eval(advised.replace("...", "1e34"), {"replace": replace, "condenser": condenser})
    assert step == replace(condenser.pixels, lr=1e34)


def same(count):
    return torch.full((count, 3, 8, 8), 77, dtype=torch.uint8)


@every_recipe
@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(16, 3, 8, 8, dtype=torch.uint8),
        same(16),
        toy((2, 2))[0].repeat_interleave(4, dim=0),
        torch.cat([same(8), toy((4, 4))[0]]),
    ],
    ids=["black", "constant", "two distinct images", "one class constant"],
)
def test_images_that_hardly_differ(name, images):
    labels = torch.arange(2).repeat_interleave(8)
    condenser = small(name, inner=2)
    condensed = run(condenser, images, labels, quotas=3)
    count = min(3, most_stored(condenser, 8))
    assert condensed.exemplars.counts == {0: count, 1: count}
    assert all(np.isfinite(condensed.history.get("distance", [])))


@every_recipe
def test_a_single_class_is_matched_too(name):
    images, labels = toy((12,))
    condenser = small(name)
    if condenser.objective is None:
        assert run(condenser, images, labels).exemplars.counts == {0: 2}
    else:
        condensed = run(replace(condenser, pixels=PixelStep(lr=1.0)), images, labels)
        start = run(replace(condenser, pixels=PixelStep(lr=1e-30)), images, labels)
        assert not torch.equal(condensed.exemplars.pixels, start.exemplars.pixels)


@every_recipe
def test_a_class_of_one_image_beside_a_large_one(name):
    images, labels = toy((1, 100))
    condensed = run(small(name), images, labels, quotas=3)
    assert condensed.exemplars.counts == {0: 1, 1: 3}


IMAGES, LABELS = toy((3, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES.float()}, "`images` must be uint8 of shape .*float32.*quantise"),
        ({"images": IMAGES[0]}, "`images` must be uint8 of shape .*\\[3, 8, 8\\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "`images` holds no images"),
        ({"labels": LABELS[:4]}, "`labels` must be int64 of shape \\[6\\].*\\[4\\]"),
        ({"labels": LABELS.float()}, "`labels` must be int64 .*float32"),
        ({"labels": LABELS[:, None]}, "`labels` must be int64 .*\\[6, 1\\]"),
        ({"quotas": 0}, r"`quotas\[0\]` is 0; pass a whole number of at least 1"),
        ({"quotas": -2}, r"`quotas\[0\]` is -2"),
        ({"quotas": {0: 1, 1: 0}}, r"`quotas\[1\]` is 0"),
        ({"quotas": 1.5}, r"`quotas\[0\]` is 1.5"),
        ({"quotas": {0: 1}}, "`quotas` names no number .* classes \\[1\\]"),
        ({"quotas": {}}, "`quotas` names no number .* classes \\[0, 1\\]"),
        ({"normalization": Normalization((0.5,), (1.0,))}, "`images` has shape .*1, height"),
        ({"normalization": (0.5, 0.2)}, r"`normalization` is \(0.5, 0.2\); pass Normalization\("),
    ],
)
def test_unusable_data_are_refused(changed, message):
    arguments = {"images": IMAGES, "labels": LABELS, "quotas": 1, "normalization": None} | changed
    before = seeded().get_state()
    generator = seeded()
    with pytest.raises(ArgumentError, match=message):
        small("idc").condense(
            arguments.pop("images"), arguments.pop("labels"), generator=generator, **arguments
        )
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"outer": 0}, "`outer` is 0, but must be at least 1"),
        ({"inner": -1}, "`inner` is -1, but must be at least 1"),
        ({"most_decoded": 0}, "`most_decoded` is 0, but must be at least 1"),
        ({"warm_up": -1}, "`warm_up` is -1, but must be at least 0"),
        ({"classes_at_once": 0}, "`classes_at_once` is 0; pass a whole number of at least 1"),
        ({"seconds": 0}, "`seconds` is 0, but a time budget must be above 0"),
        ({"seconds": math.nan}, "`seconds` is nan, but a time budget must be above 0"),
        ({"seconds": math.inf}, "`seconds` is inf, but a time budget must be above 0"),
    ],
)
def test_unusable_numbers_are_refused(parts, message):
    with pytest.raises(ArgumentError, match=message):
        replace(recipes.idc(), **parts)


@pytest.mark.parametrize("lr", [0, -0.1, math.nan])
def test_a_learning_rate_must_be_above_0(lr):
    with pytest.raises(ArgumentError, match=f"`lr` is {lr}; pass a finite number above 0"):
        PixelStep(lr=lr)


@pytest.mark.parametrize("final", [-0.1, 1.1, math.nan])
def test_the_rate_that_is_left_must_be_a_share(final):
    with pytest.raises(ArgumentError, match=f"`final` is {final}; pass a number from 0 to 1"):
        PixelStep(final=final)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"formation": Formation(9)}, "`factor` is 9, .*8x8 pixels; .* such as 8"),
        ({"compile": "sometimes"}, "`compile` is 'sometimes', but must be True, False or 'auto'"),
        ({"precision": "int8"}, "`precision` is 'int8', but must be"),
        ({"network": convnet_for((1, 8, 8), width=2)}, "`network` does not accept images of shape"),
        (
            {"network": lambda classes: torch.nn.Sequential(torch.nn.Flatten())},
            "`network` has no usable features",
        ),
    ],
)
def test_parts_that_do_not_fit_the_images_are_refused(parts, message):
    with pytest.raises(ArgumentError, match=message):
        run(small("idc", **parts), IMAGES, LABELS)


def test_the_defaults_select_at_random():
    condenser = Condenser(name="plain")
    assert condenser.selection == RandomImages() and condenser.objective is None
    assert condenser.stores_raw_images


# Several images in the bytes of one


@pytest.mark.parametrize("name", ["random", "representative", "dc", "idc", "dream_plus"])
def test_compression_condenses_as_many_times_the_images(name, tmp_path):
    images, labels = toy((20, 20))
    condenser = small(name, outer=2, inner=2)
    # At 4, about half of the frequencies of an image of 8x8 pixels are stored.
    condenser = replace(condenser, formation=replace(condenser.formation, compression=4))
    found = run(condenser, images, labels, quotas=2, checkpoint=tmp_path / "state")
    assert found.exemplars.pixels.shape == (4, 3, 8, 8)
    decoded = condenser.formation.decode(condenser.formation.open(found.exemplars.pixels))
    assert len(decoded) == 4 * 4 * condenser.formation.factor**2
    if condenser.objective is not None:
        start = run(replace(condenser, objective=None), images, labels, quotas=2)
        assert not torch.equal(found.exemplars.pixels, start.exemplars.pixels)
        # What is finished is not compressed a second time.
        again = run(condenser, images, labels, quotas=2, checkpoint=tmp_path / "state")
        assert torch.equal(found.exemplars.pixels, again.exemplars.pixels)
    # All layers show images of the class.
    layers = decoded.view(4, 4, -1, 3, 8, 8).mean(dim=2)
    for label in (0, 1):
        mean = images[labels == label].float().mean(dim=0) / 255
        others = images[labels != label].float().mean(dim=0) / 255
        for shown in layers[found.exemplars.labels == label].flatten(0, 1):
            assert (shown - mean).norm() < (shown - others).norm()


def test_what_is_optimised_with_compression_is_what_can_be_stored(monkeypatch):
    images, labels = toy((20, 20))
    condenser = small("idc", outer=1, inner=3, pixels=PixelStep(lr=1e-2))
    code = Formation(2, compression=4)
    condenser = replace(condenser, formation=code)
    opened = []
    store = Formation.store

    def kept(self, images):
        opened.append(images.clone())
        return store(self, images)

    monkeypatch.setattr(Formation, "store", kept)
    run(condenser, images // 2 + 64, labels, quotas=1)  # nothing is clamped
    moved = torch.cat(opened)
    opened.clear()
    run(replace(condenser, objective=None), images // 2 + 64, labels, quotas=1)
    start = torch.cat(opened)
    assert (moved - start).abs().max() > 1e-3
    # Raw images are encoded as they are, and those that move held to what can be stored.
    assert (code.keep(start) - start).abs().max() > 0.01
    torch.testing.assert_close(code.keep(moved), moved, atol=1e-4, rtol=0)
    # All layers of a class move.
    assert (moved - code.keep(start)).view(2, 4, -1).norm(dim=2).min() > 1e-3


def test_what_is_optimised_with_compression_is_so_between_the_steps_too():
    recorder, code = Recorder(), Formation(2, compression=4)
    condenser = small("idc", selection=None, update=recorder, inner=3)
    run(replace(condenser, formation=code), *toy((20, 20)), quotas=1)
    assert len(recorder.seen) == 3
    for stored in (class_pixels for step in recorder.seen for class_pixels in step):
        torch.testing.assert_close(code.keep(stored), stored, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["idc", "dc"])
def test_what_is_optimised_stays_so_when_it_is_clamped_and_where_it_begins(name, monkeypatch):
    images, labels = toy((20, 20))
    condenser = small(name, outer=3, inner=2, pixels=PixelStep(lr=0.5), selection=None)
    code = Formation(condenser.formation.factor, compression=4)
    opened = []
    store = Formation.store
    monkeypatch.setattr(
        Formation,
        "store",
        lambda self, images: (opened.append(images.clone()), store(self, images))[1],
    )
    run(replace(condenser, formation=code), images, labels, quotas=1)
    for last in opened:
        torch.testing.assert_close(code.keep(last), last, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"selection": 5}, r"`selection` is 5, .* has choose, for example RandomImages\(\)"),
        ({"objective": "x"}, "`objective` is 'x', .* has statistics and distance"),
        ({"sampler": 5}, "`sampler` is 5, which is no such part"),
        ({"sampler": Uniform}, "`sampler` is <class .*, which is no such part"),
        ({"augment": None}, "`augment` is None, which is no such part"),
        ({"update": "x"}, "`update` is 'x', which is no such part"),
        ({"pixels": 0.1}, r"`pixels` is 0.1; pass PixelStep\("),
        ({"training": None}, "`training` is None, .* has optimizer and step_function and train"),
        ({"multisize": 5}, r"`multisize` is 5; pass Multisize\("),
        ({"subsets": SubsetMatching}, r"`subsets` is <class .*; pass SubsetMatching\("),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_part_is_refused_at_once(parts, message):
    with pytest.raises(ArgumentError, match=message):
        replace(recipes.idc(), **parts)


def test_the_defaults_are_idcs_loops_for_a_while():
    condenser = Condenser(name="x")
    assert (condenser.outer, condenser.inner, condenser.most_decoded) == (60, 100, 128)
    assert condenser.compile == condenser.precision == "auto"
    assert condenser.seconds is condenser.classes_at_once is None


@pytest.mark.parametrize(
    ("parts", "classes", "compiles"),
    [
        ({"inner": 100}, 9, False),
        ({"inner": 100}, 10, True),
        ({"inner": 100, "compile": True}, 1, True),
        ({"inner": 10_000, "compile": False}, 10, False),
        ({"inner": 10_000, "seconds": 60}, 10, False),
        ({"inner": 1, "seconds": 300}, 1, True),
        ({"inner": 10_000, "objective": None}, 10, False),
    ],
)
def test_its_steps_are_compiled_where_that_repays(parts, classes, compiles, monkeypatch):
    plans = []
    monkeypatch.setattr(condense, "programs", plans.append)
    augment, training = augmentation("flip"), NetworkTraining(batch=3)
    condenser = small("idc", classes_at_once=2, augment=augment, training=training)
    condenser = replace(condenser, **{"compile": "auto", "outer": 1, **parts})
    condenser.check((3, 8, 8), classes)
    (plan,) = plans
    assert plan.compile == compiles and plan.classes == max(2, classes)
    assert (plan.augment, plan.training, plan.classes_at_once) == (augment, training, 2)
    assert (plan.shape, plan.device, plan.precision) == ((3, 8, 8), CPU, "float32")


def test_raw_images_stay_raw_when_they_are_compressed():
    for compression in (1, 10):
        assert recipes.herding(compression=compression).stores_raw_images
    assert not recipes.herding(factor=2).stores_raw_images
    assert not recipes.dream_plus(factor=1).stores_raw_images


@pytest.mark.parametrize(
    ("outer", "parts", "warned"),
    [(2, {}, True), (3, {}, False), (2, {"seconds": 0.01}, False)],
    ids=["too few", "enough", "by the clock"],
)
def test_a_period_that_is_too_long_is_warned_of(outer, parts, warned, recwarn):
    condense._say_that_nothing_is_chosen.cache_clear()
    condenser = small("idc", outer=outer, inner=1, multisize=Multisize(period=1), **parts)
    run(condenser, *toy())
    assert any("`period` of Multisize is 1" in str(w.message) for w in recwarn) == warned


def test_what_was_checked_without_gradients_has_them_later():
    condenser = small("idc", network=convnet_for((3, 8, 8), width=7))
    _cached.cache_clear()
    with torch.inference_mode():
        condenser.check((3, 8, 8), 2)
    run(condenser, *toy())


def test_parts_that_nothing_uses_may_be_none():
    built = Condenser(name="first", sampler=None, augment=None, update=None)
    images = torch.zeros((4, 3, 8, 8), dtype=torch.uint8)
    condensed = built.condense(
        images, torch.tensor([0, 0, 1, 1]), quotas=1, generator=torch.Generator().manual_seed(0)
    )
    assert condensed.exemplars.counts == {0: 1, 1: 1}
