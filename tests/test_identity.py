"""What tells an object from others, in every process alike."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dc_replay import dream_plus
from dc_replay.identity import identity
from dc_replay.networks import ConvNet

of = identity


class Nth:
    """A part of a user's, which does not describe itself."""

    def __init__(self, n):
        self.n = n

    def choose(self, real, counts, learner, generator):
        return [rows[self.n : self.n + 1] for rows in real.rows]


class Bound:
    def __init__(self, scale):
        self.scale = scale

    def build(self, classes):
        return nn.Linear(classes, classes)

    def other(self, classes):
        return nn.Linear(classes, classes)


@dataclass(frozen=True)
class Part:
    inner: object


def scaled(factor):
    return lambda images: images * factor


def shifted(images):
    return images + 1


def shifted_less(images):
    return images + 0.5


def by_keyword(factor):
    def function(images, *, factor=factor):
        return images * factor

    return function


def by_position(factor):
    def function(images, factor=factor):
        return images * factor

    return function


def _named(name):
    """A function of one name, wherever it comes from, that calls another."""
    found = {}
    exec(f"def function(images):\n    return {name}(images)\n", found)
    return found["function"]


calls_one, calls_other = _named("mirrored"), _named("turned")


def layer(width):
    made = nn.Linear(2, 2)
    nn.init.constant_(made.weight, width)
    nn.init.zeros_(made.bias)
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(scaled(1), scaled(2), id="enclosed value"),
        pytest.param(shifted, shifted_less, id="another function"),
        pytest.param(partial(shifted, 1), partial(shifted, 2), id="partial"),
        pytest.param(Nth(0), Nth(5), id="attributes"),
        pytest.param(Part(Nth(0)), Part(Nth(5)), id="attributes inside of a dataclass"),
        pytest.param(Bound(1).build, Bound(2).build, id="method"),
        pytest.param(partial(shifted), partial(shifted_less), id="function of a partial"),
        pytest.param(Bound(1).build, Bound(1).other, id="method of an object"),
        pytest.param(by_keyword(1), by_keyword(2), id="default of a keyword"),
        pytest.param(by_position(1), by_position(2), id="default"),
        pytest.param(calls_one, calls_other, id="what is called"),
        pytest.param(nn.ReLU(), nn.Sigmoid(), id="module without weights"),
        pytest.param(
            nn.Sequential(nn.ReLU(), nn.Flatten()),
            nn.Sequential(nn.Sigmoid(), nn.Flatten()),
            id="structure of a module",
        ),
        pytest.param(torch.zeros(2), torch.zeros(2, dtype=torch.int32), id="dtype"),
        pytest.param(np.zeros(2000), np.eye(1, 2000, 1000)[0], id="array too long to be shown"),
        pytest.param(torch.zeros(2), torch.zeros(2, 1), id="shape"),
        pytest.param(layer(0.0), layer(1.0), id="weights"),
        pytest.param({"a": 1}, {"a": 2}, id="mapping"),
        pytest.param({1, 2}, {1, 3}, id="set"),
        pytest.param(("a", "b"), ("ab",), id="borders"),
        pytest.param(1, 1.0, id="type"),
        pytest.param(
            dream_plus(network=partial(ConvNet, channels=1, size=(8, 8), width=8)),
            dream_plus(network=partial(ConvNet, channels=1, size=(8, 8), width=16)),
            id="recipe",
        ),
        pytest.param(
            replace(dream_plus(), selection=Nth(0)),
            replace(dream_plus(), selection=Nth(1)),
            id="part of a recipe",
        ),
    ],
)
def test_what_differs_is_told_apart(one, other):
    assert of(one) != of(other)
    assert of(one) == of(one)


def test_edited_code_is_another_function():
    def named(source):
        found = {}
        exec(source, found)
        return found["network"]

    before = "def network(classes):\n    return build(classes, width=8)\n"
    assert of(named(before)) == of(named("\n\n" + before))  # moved
    assert of(named(before)) != of(named(before.replace("8", "64")))


def test_what_a_function_notes_does_not_count():
    built = []

    def network(classes):
        built.append(classes)

    before = of(network)
    network(3)
    assert of(network) == before


def test_what_an_object_notes_does_not_count():
    one, other = Nth(0), Nth(0)
    one.seen, other.seen = [1], {}
    assert of(one) == of(other)


def test_which_device_of_a_kind_does_not_count():
    assert of(torch.device("cuda", 0)) == of(torch.device("cuda", 1)) != of(torch.device("cpu"))
    generators = [Nth(np.random.default_rng(seed)) for seed in range(4)]
    assert len({of(one) for one in generators}) == 1


def test_tensors_of_any_shape_count():
    assert of(torch.tensor(2.0)) != of(torch.tensor(3.0))
    assert of(nn.BatchNorm2d(3)) == of(nn.BatchNorm2d(3))


def test_objects_that_share_others_are_gone_through_once():
    one = Nth(0)
    for _ in range(24):
        one = Part((one, one))
    assert of(one)


def test_objects_that_refer_to_themselves_end():
    one = Nth(0)
    one.itself = one
    assert of(one)


def test_it_is_the_same_in_every_process():
    script = (
        "import hashlib, torch\n"
        "from dc_replay import dream_plus\n"
        "from dc_replay.identity import identity\n"
        "from dataclasses import replace\n"
        "class Nth:\n"
        "    def choose(self, real, counts, learner, generator): pass\n"
        "    def __init__(self): self.names = ({'b', 'a', 'c'}, 1)\n"
        "scale = 3.0\n"
        "parts = [replace(dream_plus(), selection=Nth()), lambda x: x + 1, torch.nn.Linear]\n"
        "print(hashlib.sha256(b''.join(identity(v) for v in parts)).hexdigest())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop()) == 65
