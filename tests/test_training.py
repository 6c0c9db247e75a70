import copy

import pytest
import torch
from torch.nn import functional as F

from dc_replay.augment import Augmentation, CutMix, augmentation
from dc_replay.errors import ArgumentError
from dc_replay.networks import ConvNet, MatchingNetwork
from dc_replay.pixels import Normalization, dequantise
from dc_replay.training import NetworkTraining, TrainingBatch, step_function

CLASSES = 3
NORMALIZATION = Normalization((0.3, 0.5), (0.2, 0.4))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scale(images):
    return NORMALIZATION.scale(images.device, images.dtype)


def build(classes):
    return ConvNet(classes, channels=2, size=(8, 8), width=3, depth=1).double()


@pytest.fixture
def network(device):
    return MatchingNetwork(build, CLASSES, torch.zeros(1, 2, 8, 8).double().to(device))


@pytest.fixture
def data(device):
    pixels = torch.randint(256, (10, 2, 8, 8), dtype=torch.uint8, generator=seeded())
    labels = torch.randint(CLASSES, (10,), generator=seeded())
    return dequantise(pixels, torch.float64).to(device), labels.to(device)


def test_the_step_is_the_gradient_of_the_mixed_cross_entropy(network, data):
    images, labels = data
    partners = torch.arange(len(images), device=images.device).flip(0)
    augment, mix = augmentation("color", "crop"), CutMix(1.0)
    changes = augment.draw(seeded(1), len(images)).to(images.device)
    numbers = torch.tensor([0.3, 0.4, 0.6, 0.5]).to(images.device)
    batch = TrainingBatch(images, labels, partners, changes, numbers)
    parameters = network.fresh()
    found = step_function(network, augment, mix)(parameters, scale(images), batch)

    module = build(CLASSES).to(images.device)
    module.load_state_dict(parameters)
    seen = augment.apply(NORMALIZATION.apply(images), changes)
    seen, share = mix.apply(seen, partners, numbers)
    assert 0.2 < share < 0.9
    logits = module(seen)
    loss = share * F.cross_entropy(logits, labels)
    loss = loss + (1 - share) * F.cross_entropy(logits, labels[partners])
    loss.backward()
    assert set(found) == set(parameters)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def slow_training(training, parameters, images, labels, seed, limit, passes):
    """The same, with a module, autograd and the optimiser of the library."""
    module = build(CLASSES).to(images.device)
    module.load_state_dict(parameters)
    optimizer = torch.optim.SGD(
        module.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    generator = seeded(seed)
    for _ in range(passes):
        order = torch.randperm(len(images), generator=generator)[:limit]
        steps = max(1, len(order) // training.batch)
        size = min(training.batch, len(order))
        chances = torch.rand(steps, size, generator=generator)
        changes = training.augment.draw(generator, steps * size)
        mixes = torch.rand(steps, 4, generator=generator)
        for step in range(steps):
            index = order[step * size : (step + 1) * size]
            change = changes[step * size : (step + 1) * size].to(images.device)
            batch = training.augment.apply(NORMALIZATION.apply(images[index]), change)
            partners = torch.tensor(sorted(range(size), key=chances[step].tolist().__getitem__))
            mix = CutMix(training.cutmix)
            batch, share = mix.apply(batch, partners, mixes[step].to(images.device))
            own = labels[index]
            optimizer.zero_grad()
            logits = module(batch)
            loss = share * F.cross_entropy(logits, own)
            loss = loss + (1 - share) * F.cross_entropy(logits, own[partners])
            loss.backward()
            optimizer.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize("limit", [None, 7, 2])
@pytest.mark.parametrize(
    "training",
    [
        NetworkTraining(batch=4, lr=0.1, cutmix=1.0),
        NetworkTraining(batch=4, lr=0.1, cutmix=0.0, augment=Augmentation(), weight_decay=0.1),
        NetworkTraining(batch=64, lr=0.1, momentum=0.0),
    ],
    ids=["mixed", "plain", "one-batch"],
)
def test_training_equals_an_ordinary_loop(training, limit, network, data):
    images, labels = data
    parameters = network.fresh()
    expected = slow_training(training, copy.deepcopy(parameters), images, labels, 4, limit, 3)
    optimizer, generator = training.optimizer(parameters), seeded(4)
    for _ in range(3):
        training.train(
            training.step_function(network),
            parameters,
            optimizer,
            images,
            labels,
            scale=scale(images),
            generator=generator,
            limit=limit,
        )
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-9, atol=1e-11)
        assert value.grad is None


def labels_of_a_pass(count, batch, **options):
    """The labels of each batch, of images that are numbered by theirs."""
    seen = []

    def step(parameters, scale, batch):
        seen.append(batch.labels.tolist())
        assert {len(part) for part in batch[:4]} == {len(batch.labels)}
        assert batch.partners.sort().values.equal(torch.arange(len(batch.labels)))
        return {name: torch.zeros_like(value) for name, value in parameters.items()}

    parameters = {"weight": torch.ones(2)}
    training = NetworkTraining(batch=batch)
    training.train(
        step,
        parameters,
        training.optimizer(parameters),
        torch.zeros(count, 2, 8, 8),
        torch.arange(count),
        scale=NORMALIZATION.scale("cpu"),
        generator=seeded(),
        **options,
    )
    return seen


@pytest.mark.parametrize(
    ("count", "batch", "limit", "sizes"),
    [
        (10, 4, None, [4, 4]),  # the last two wait for another pass
        (10, 10, None, [10]),
        (10, 64, None, [10]),
        (10, 4, 6, [4]),
        (10, 4, 3, [3]),
        (10, 1, 2, [1, 1]),
        (10, 5, 99, [5, 5]),
        (1, 4, None, [1]),
    ],
)
def test_batches_are_whole_where_there_is_one(count, batch, limit, sizes):
    seen = labels_of_a_pass(count, batch, limit=limit)
    assert [len(labels) for labels in seen] == sizes
    flat = [label for labels in seen for label in labels]
    assert len(set(flat)) == len(flat)  # no image twice in a pass


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [(10, 4, [4, 4, 4]), (10, 10, [10]), (10, 64, [10]), (9, 8, [5, 5]), (8, 4, [4, 4])],
)
def test_a_pass_may_take_all_images_in_batches_of_one_size(count, batch, sizes):
    seen = labels_of_a_pass(count, batch, drop_last=False)
    assert [len(labels) for labels in seen] == sizes
    flat = [label for labels in seen for label in labels]
    assert sorted(flat[:count]) == list(range(count))  # each once, before any comes again
    assert flat[count:] == flat[: len(flat) - count]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "`lr` is 0; pass a finite number above 0"),
        ({"lr": float("inf")}, "`lr` is inf; pass a finite number above 0"),
        ({"momentum": -1}, "`momentum` is -1; pass a finite number of at least 0"),
        ({"weight_decay": "x"}, "`weight_decay` is 'x'; pass a finite number of at least 0"),
        ({"batch": 2.5}, "`batch` is 2.5; pass a whole number of at least 1"),
        ({"cutmix": 7}, "`cutmix` is 7; pass a number from 0 to 1"),
    ],
)
def test_unusable_settings_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        NetworkTraining(**options)


def test_bytes_and_floats_train_alike(network):
    pixels = torch.randint(256, (6, 2, 8, 8), dtype=torch.uint8, generator=seeded())
    before, trained = network.fresh(), []
    for images in (pixels, dequantise(pixels, torch.float64)):
        parameters = copy.deepcopy(before)
        training = NetworkTraining(batch=6, lr=0.1)
        training.train(
            training.step_function(network),
            parameters,
            training.optimizer(parameters),
            images.to(network.device),
            torch.zeros(6, dtype=torch.int64, device=network.device),
            scale=NORMALIZATION.scale(network.device, torch.float64),
            generator=seeded(),
        )
        trained.append(parameters)
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]) and not torch.equal(value, before[name])


def test_the_defaults_are_the_published_settings():
    training = NetworkTraining()
    assert training == NetworkTraining(
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        batch=64,
        augment=augmentation("color", "crop"),
        cutmix=0.5,
    )
    group = training.optimizer({"weight": torch.zeros(2)}).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert not group["nesterov"] and group["dampening"] == 0


def test_it_learns():
    """Two classes that differ in brightness are told apart after a few passes."""
    labels = torch.arange(2).repeat(20)
    images = (0.3 + 0.4 * labels.view(-1, 1, 1, 1)).expand(40, 2, 8, 8)
    images = images + 0.1 * torch.rand(images.shape, generator=seeded())
    network = MatchingNetwork(
        lambda classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, classes)),
        2,
        images,
    )
    parameters = network.fresh()
    training = NetworkTraining(lr=0.01, batch=10, augment=Augmentation(), cutmix=0.0)
    optimizer, generator = training.optimizer(parameters), seeded()
    for _ in range(5):
        training.train(
            training.step_function(network),
            parameters,
            optimizer,
            images,
            labels,
            scale=scale(images),
            generator=generator,
        )
    logits, _ = network(parameters, NORMALIZATION.apply(images))
    assert (logits.argmax(dim=1) == labels).all()
