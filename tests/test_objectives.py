from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dc_replay.errors import ArgumentError
from dc_replay.formation import Formation
from dc_replay.networks import ConvNet, MatchingNetwork
from dc_replay.objectives import (
    BidirectionalMatching,
    FeatureMatching,
    GradientMatching,
    absolute_error,
    cosine_distance,
    matching_step,
    squared_error,
)
from dc_replay.terms import Sides, with_parts, with_prefix

GOLDEN = Path(__file__).parent / "data" / "matching.npz"
CLASSES = 3


def slow_squared(first, second):
    return sum((a - b) ** 2 for a, b in zip(first.flatten(), second.flatten(), strict=True))


def slow_absolute(first, second):
    return sum(abs(a - b) for a, b in zip(first.flatten(), second.flatten(), strict=True))


def slow_cosine(first, second):
    total = 0.0
    for a, b in zip(first, second, strict=True):
        a, b = a.flatten(), b.flatten()
        total = total + 1 - (a @ b) / (a.norm() * b.norm() + 1e-6)
    return total


def slow_gradients(module, images, label, convolutions_only, create_graph):
    least = 3 if convolutions_only else 2
    weights = [p for p in module.parameters() if p.ndim >= least]
    labels = torch.full((len(images),), label, device=images.device)
    loss = F.cross_entropy(module(images), labels)
    return torch.autograd.grad(loss, weights, create_graph=create_graph)


def slow_distance(objective, module, real, synthetic, label):
    """The distance for one class, weight by weight and number by number."""
    total = torch.zeros((), dtype=real.dtype, device=real.device)
    gradient = getattr(objective, "gradient", objective)
    if isinstance(gradient, GradientMatching):
        error = {
            squared_error: slow_squared,
            absolute_error: slow_absolute,
            cosine_distance: slow_cosine,
        }[gradient.error]
        only = gradient.convolutions_only
        targets = slow_gradients(module, real, label, only, False)
        found = slow_gradients(module, synthetic, label, only, True)
        assert len(found) == (2 if only else 3)
        for first, second in zip(found, targets, strict=True):
            total = total + error(first, second)
    if isinstance(objective, FeatureMatching | BidirectionalMatching):
        target = sum(module.embed(image[None])[0] for image in real).detach() / len(real)
        mean = sum(module.embed(image[None])[0] for image in synthetic) / len(synthetic)
        total = total + getattr(objective, "weight", 1.0) * slow_squared(mean, target)
    return total


OBJECTIVES = {
    "squared": GradientMatching(),
    "squared-all": GradientMatching(convolutions_only=False),
    "absolute": GradientMatching(absolute_error),
    "absolute-all": GradientMatching(absolute_error, convolutions_only=False),
    "cosine": GradientMatching(cosine_distance),
    "cosine-all": GradientMatching(cosine_distance, convolutions_only=False),
    "features": FeatureMatching(),
    "both": BidirectionalMatching(),
    "both-weighted": BidirectionalMatching(
        GradientMatching(cosine_distance, convolutions_only=False), weight=0.3
    ),
}

every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def build(classes, side=8):
    network = ConvNet(classes, channels=2, size=(side, side), width=3, depth=2)
    for name, parameter in network.named_parameters():
        if name.startswith("layers"):  # normalisation starts from 1 and 0 otherwise
            nn.init.normal_(parameter, std=0.5)
    return network.double()


@pytest.fixture
def images(generator, device):
    """Real [5, 2, 8, 8] and stored [2, 2, 8, 8] images, normalised, in float64."""
    real = torch.randn(5, 2, 8, 8, dtype=torch.float64, generator=generator)
    stored = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=generator)
    return real.to(device), stored.to(device)


@pytest.fixture
def network(images):
    return MatchingNetwork(build, CLASSES, images[0])


@pytest.fixture
def parameters(network):
    return network.fresh()


@every_objective
def test_it_equals_a_loop_with_autograd_class_by_class(objective, network, parameters, images):
    real, synthetic = images
    module = build(CLASSES).to(real.device)
    module.load_state_dict(parameters)
    for label in range(CLASSES):
        pixels = synthetic.clone().requires_grad_()
        expected = slow_distance(objective, module, real, pixels, label)
        (slope,) = torch.autograd.grad(expected, pixels)
        gradient, value, _ = matching_step(
            objective, network, parameters, real, synthetic, torch.tensor(label).to(real.device)
        )
        torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


class Matching(torch.autograd.Function):
    """The distance, with the gradient that `matching_step` yields."""

    @staticmethod
    def forward(ctx, synthetic, *arguments):
        gradient, value, _ = matching_step(*arguments[:-1], synthetic, arguments[-1])
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0], *[None] * 5


@every_objective
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_gradients_reach_the_stored_pixels_through_the_formation(
    objective, factor, network, parameters, images
):
    real, stored = images[0], images[1][:1].clone().requires_grad_()
    label = torch.tensor(1, device=real.device)

    def distance(stored):
        decoded = Formation(factor).decode(stored)
        return Matching.apply(decoded, objective, network, parameters, real, label)

    assert torch.autograd.gradcheck(distance, (stored,), fast_mode=True)


@every_objective
def test_statistics_are_differentiable_by_any_autograd(objective, network, parameters, images):
    real, synthetic = images[0], images[1].clone().requires_grad_()

    def describe(images):
        labels = torch.full((len(images),), 2, device=images.device)
        shares = images.new_full((1, len(images)), 1 / len(images))
        found, _ = objective.statistics(network, parameters, images, labels, shares)
        return tuple(statistic[0] for statistic in found)

    target = tuple(statistic.detach() for statistic in describe(real))

    def distance(synthetic):
        return objective.distance(describe(synthetic), target)

    assert torch.autograd.gradcheck(distance, (synthetic,), fast_mode=True)
    (slope,) = torch.autograd.grad(distance(synthetic), synthetic)
    gradient = matching_step(
        objective, network, parameters, real, synthetic.detach(), torch.tensor(2).to(real.device)
    ).slope
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


@every_objective
def test_equal_sets_have_no_distance_and_order_and_repetition_do_not_matter(
    objective, network, parameters, images
):
    real, synthetic = images
    label = torch.tensor(0, device=real.device)
    same = matching_step(objective, network, parameters, real, real.flip(0), label).distance
    if objective in (OBJECTIVES["squared"], OBJECTIVES["absolute"], OBJECTIVES["both"]):
        assert float(same) < 1e-9  # a channel without gradient has a cosine distance of 1
    gradient, value, _ = matching_step(objective, network, parameters, real, synthetic, label)
    assert value > same
    assert not gradient.requires_grad and not value.requires_grad
    twice = torch.cat([synthetic, synthetic])
    slopes, repeated, _ = matching_step(objective, network, parameters, real, twice, label)
    torch.testing.assert_close(repeated, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes[:2] + slopes[2:], gradient, rtol=1e-9, atol=1e-12)


@every_objective
def test_nothing_that_goes_in_is_changed(objective, network, parameters, images):
    real, synthetic = images
    kept = {name: value.clone() for name, value in parameters.items()}
    label = torch.tensor(0, device=real.device)
    with torch.no_grad():
        gradient = matching_step(objective, network, parameters, real, synthetic, label).slope
    assert gradient.any()
    assert all(torch.equal(parameters[name], kept[name]) for name in kept)
    assert not any(value.requires_grad or value.grad is not None for value in parameters.values())


@pytest.mark.parametrize(
    ("error", "slow"),
    [
        (squared_error, slow_squared),
        (absolute_error, slow_absolute),
        (cosine_distance, slow_cosine),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3, 3), (2, 1, 2)])
def test_errors_are_sums_over_numbers_or_output_channels(error, slow, shape, generator):
    first, second = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    torch.testing.assert_close(error(first, second), slow(first, second), rtol=1e-9, atol=1e-12)
    assert error(first, second).ndim == 0


def test_a_channel_without_gradient_has_a_finite_cosine_distance():
    first = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    distance = cosine_distance(first, torch.ones(2, 3, dtype=torch.float64))
    assert float(distance.detach()) == 2
    (slope,) = torch.autograd.grad(distance, first)
    assert torch.isfinite(slope).all()


def test_bidirectional_matching_is_the_sum_of_its_two_parts(network, parameters, images):
    real, synthetic = images
    label = torch.tensor(2, device=real.device)

    def match(objective):
        return matching_step(objective, network, parameters, real, synthetic, label)[:2]

    together, gradients, features = map(
        match, (BidirectionalMatching(weight=0.7), GradientMatching(), FeatureMatching())
    )
    for whole, first, second in zip(together, gradients, features, strict=True):
        torch.testing.assert_close(whole, first + 0.7 * second, rtol=1e-9, atol=1e-12)


def test_a_network_without_convolutions_needs_another_objective():
    example = torch.zeros(1, 1, 4, 4)
    network = MatchingNetwork(
        lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(16, classes)), 2, example
    )
    arguments = (network, network.fresh(), torch.ones(2, 1, 4, 4), example, torch.tensor(0))
    for objective in (GradientMatching(), BidirectionalMatching()):
        with pytest.raises(ArgumentError, match="`network` has no convolution weights to match"):
            matching_step(objective, *arguments)
    for objective in (GradientMatching(convolutions_only=False), FeatureMatching()):
        assert matching_step(objective, *arguments).slope.shape == example.shape


def test_objectives_are_values():
    assert GradientMatching() == GradientMatching(squared_error)
    assert hash(BidirectionalMatching()) == hash(BidirectionalMatching(weight=1.0))
    assert GradientMatching() != GradientMatching(absolute_error)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {key: torch.tensor(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def published(golden):
    """The network of the reference values as a function, and its weights."""
    network = MatchingNetwork(lambda c: ConvNet(c, width=8).double(), 3, golden["real"])
    parameters = {}
    for layer in range(3):
        for part, position in (("conv", 4 * layer), ("norm", 4 * layer + 1)):
            for kind in ("weight", "bias"):
                parameters[f"layers.{position}.{kind}"] = golden[f"{part}{layer}_{kind}"]
    for kind in ("weight", "bias"):
        parameters[f"head.{kind}"] = golden[f"fc_{kind}"]
    assert parameters.keys() == network.fresh().keys()
    return network, parameters


def agree(value, gradient, golden, key):
    torch.testing.assert_close(value, golden[key], rtol=1e-9, atol=0)
    expected = golden[f"{key}_grad"]
    assert float((gradient - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize(
    ("key", "objective"),
    [
        ("idc_mse", GradientMatching()),
        ("idc_l1", GradientMatching(absolute_error)),
        ("feature_mse", FeatureMatching()),
        ("dream_plus_mse", BidirectionalMatching()),
        ("dc_cosine", GradientMatching(cosine_distance, convolutions_only=False)),
    ],
)
def test_it_agrees_with_the_published_implementations(key, objective, golden, published):
    stored = golden["stored"].clone().requires_grad_()
    decoded = Formation(2).decode(stored)
    torch.testing.assert_close(
        decoded.detach(), golden["decoded_image_major"], rtol=1e-9, atol=1e-12
    )
    gradient, value, _ = matching_step(
        objective, *published, golden["real"], decoded.detach(), golden["label"]
    )
    decoded.backward(gradient)
    agree(value, stored.grad, golden, key)


def by_terms(golden, published, terms):
    """Distance, gradient in the stored pixels, and prefix distances of the reference case."""
    stored = golden["stored"].clone().requires_grad_()
    decoded = Formation(2).decode(stored)
    found = matching_step(
        GradientMatching(), *published, golden["real"], decoded.detach(), golden["label"], terms
    )
    decoded.backward(found.slope)
    return found.distance, stored.grad, found.prefixes


def prefix_shares(stored, each, like):
    shares = like.new_zeros(stored - 1, stored * each)
    for size in range(1, stored):
        shares[size - 1, : size * each] = 1 / (size * each)
    return shares


@pytest.fixture(scope="module")
def whole(golden):
    return Sides.even(16, 12, golden["real"])


def test_multisize_agrees_with_the_published_implementation(golden, published, whole):
    terms = with_prefix(whole.whole(), prefix_shares(4, 4, golden["real"]), 2)
    value, gradient, distances = by_terms(golden, published, terms)
    agree(value, gradient, golden, "mdc_mls2")
    torch.testing.assert_close(distances, golden["mdc_feature_distances"], rtol=1e-9, atol=0)


def test_subset_matching_agrees_with_the_published_implementation(golden, published, whole):
    halves = [torch.arange(count) // (count // 2) for count in (16, 12)]
    value, gradient, distances = by_terms(golden, published, with_parts(whole, *halves, 2, 0.5))
    agree(value, gradient, golden, "subset_matching_weight_half")
    assert not len(distances)


@every_objective
@pytest.mark.parametrize("kind", ["parts", "prefix", "both"])
def test_terms_equal_distances_computed_one_by_one(
    objective, kind, network, parameters, generator, device
):
    real, synthetic = (
        torch.randn(count, 2, 8, 8, dtype=torch.float64, generator=generator).to(device)
        for count in (7, 6)
    )
    label = torch.tensor(1, device=device)
    synthetic_part = torch.tensor([2, 0, 1, 0, 0, 2], device=device)
    real_part = torch.tensor([0, 2, 2, 0, 1, 1, 0], device=device)
    sides = Sides.even(6, 7, real)
    terms, expected = sides.whole(), [(1.0, slice(None), slice(None))]
    if kind != "prefix":
        terms = with_parts(sides, synthetic_part, real_part, 3, 0.3)
        expected += [(0.3, real_part == k, synthetic_part == k) for k in range(3)]
    if kind != "parts":
        terms = with_prefix(terms, prefix_shares(3, 2, real), 2)
        expected += [(1.0, slice(None), slice(4))]
    slope, value = torch.zeros_like(synthetic), torch.zeros((), device=device).double()
    for weight, some, others in expected:
        part = matching_step(objective, network, parameters, real[some], synthetic[others], label)
        value += weight * part.distance
        slope[others] += weight * part.slope
    found = matching_step(objective, network, parameters, real, synthetic, label, terms)
    torch.testing.assert_close(found.distance, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.slope, slope, rtol=1e-9, atol=1e-12)
    for size, distance in enumerate(found.prefixes, start=1):
        prefix = matching_step(
            FeatureMatching(), network, parameters, real, synthetic[: 2 * size], label
        )
        torch.testing.assert_close(distance, prefix.distance, rtol=1e-9, atol=1e-12)
    assert len(found.prefixes) == (0 if kind == "parts" else 2)


@pytest.mark.parametrize(
    ("synthetic_parts", "real_parts"), [([0, 1], [1, 1, 1, 1, 1]), ([1, 1], [0, 1, 1, 1, 1])]
)
def test_a_part_without_images_on_one_side_is_left_out(
    synthetic_parts, real_parts, network, parameters, images
):
    real, synthetic = images
    sides = Sides.even(2, 5, real)
    label = torch.tensor(0, device=real.device)
    own, others = (
        torch.tensor(parts, device=real.device) for parts in (synthetic_parts, real_parts)
    )
    with_empty = with_parts(sides, own, others, 2, 0.5)
    found = matching_step(
        GradientMatching(), network, parameters, real, synthetic, label, with_empty
    )
    everything = matching_step(GradientMatching(), network, parameters, real, synthetic, label)
    second = matching_step(
        GradientMatching(), network, parameters, real[others == 1], synthetic[own == 1], label
    )
    torch.testing.assert_close(found.distance, everything.distance + 0.5 * second.distance)
    assert torch.isfinite(found.slope).all()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: GradientMatching(error="mse"), "`error` is 'mse'; pass a distance such as"),
        (lambda: BidirectionalMatching("gradient"), "`gradient` is 'gradient'; pass GradientM"),
        (lambda: BidirectionalMatching(weight=-1), "`weight` is -1; pass a finite number of at"),
    ],
)
def test_unusable_objectives_are_refused(objective, message):
    with pytest.raises(ArgumentError, match=message):
        objective()
