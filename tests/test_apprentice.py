"""What the network of a condensation is trained on, and what it is asked for."""

from types import SimpleNamespace

import pytest
import torch

from dc_replay.apprentice import Apprentice
from dc_replay.formation import Formation
from dc_replay.pixels import Normalization
from dc_replay.sampling import RealImages


class Training:
    """Notes what it is given to train on."""

    def __init__(self):
        self.calls = []

    def optimizer(self, parameters):
        return torch.optim.SGD(list(parameters.values()), lr=0.1)

    def train(self, step, parameters, optimizer, images, targets, **options):
        self.calls.append((images, targets, options))


@pytest.fixture
def real():
    images = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    return RealImages(images, targets, (5, 8), Normalization.identity(3))


def apprentice(real, **options):
    """With a network whose weights are noise, whose logits are zeros and whose features ones."""

    def forward(parameters, images):
        return torch.zeros(len(images), 2), torch.ones(len(images), 4)

    network = SimpleNamespace(fresh=lambda: {"weight": torch.rand(3, requires_grad=True)})
    functions = SimpleNamespace(network=network, forward=forward, step="the step")
    options = {"training": Training(), "formation": Formation(1)} | options
    return Apprentice(functions, real=real, generator=torch.Generator(), **options)


def test_it_trains_on_all_decoded_images_of_each_class(real):
    learner = apprentice(real, formation=Formation(2))
    pixels = [torch.rand(count, 3, 4, 4) for count in (2, 1)]
    learner.train_on_synthetic(pixels)
    ((images, targets, options),) = learner.training.calls
    assert torch.equal(images, torch.cat([learner.formation.decode(stored) for stored in pixels]))
    assert targets.tolist() == [0] * 8 + [1] * 4
    # There may be fewer of them than a mini-batch has.
    assert options["drop_last"] is False and options["generator"] is learner.generator


def test_it_trains_on_real_images_or_so_many_of_them(real):
    learner = apprentice(real)
    learner.train_on_real()
    learner.train_on_real(3)
    for images, targets, options in learner.training.calls:
        assert torch.equal(images, real.images) and torch.equal(targets, real.targets)
        assert options["scale"] is real.scale and "drop_last" not in options
    assert [options["limit"] for _, _, options in learner.training.calls] == [None, 3]


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_an_epoch_is_a_pass_over_the_real_images(real, epochs):
    learner = apprentice(real)
    learner.train(epochs)
    assert [options["limit"] for _, _, options in learner.training.calls] == [None] * epochs


def test_its_features_are_not_its_logits(real):
    found = apprentice(real).features()
    assert [features.shape for features in found] == [(4, 4), (3, 4)]
    assert all((features == 1).all() for features in found)


def test_a_restart_forgets_weights_and_momentum(real):
    learner = apprentice(real)
    weight = learner.parameters["weight"]
    learner.restart()
    assert not torch.equal(learner.parameters["weight"], weight)
    (group,) = learner._optimizer.param_groups
    assert group["params"][0] is learner.parameters["weight"]
