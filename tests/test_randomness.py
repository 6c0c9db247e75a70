import random

import numpy as np
import pytest
import torch

from dc_replay.randomness import Purpose, isolated, stream

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(device):
    return (
        torch.rand(3),
        torch.rand(3, device=device).cpu(),
        torch.tensor(np.random.rand(3)),  # noqa: NPY002
        torch.tensor([random.random()]),
    )


def states(device):
    found = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]  # noqa: NPY002
    found.append(torch.tensor(random.getstate()[1]))
    if device.type == "cuda":
        found.append(torch.cuda.get_rng_state(device))
    return found


def same(first, second):
    return all(map(torch.equal, first, second))


def test_streams_follow_from_all_that_they_are_for(device):
    purposes = Purpose.__members__  # with those that share a number
    assert len({int(purpose) for purpose in purposes.values()}) == len(purposes)
    paths = [(), (1,), (2,), (1, 1), (1, 2), (2, 1)]
    every = [(seed, purpose, *path) for seed in (0, 1) for purpose in Purpose for path in paths]
    found = {
        tuple(torch.rand(4, generator=stream(*key, device=device), device=device).tolist())
        for key in every
    }
    assert len(found) == len(every)
    once, again = (stream(3, Purpose.CHECKING, 7, device=device) for _ in range(2))
    assert torch.equal(once.get_state(), again.get_state())


def test_each_draw_of_a_generator_gives_another_seed():
    found = set()
    generator = seeded()
    for _ in range(300):
        with isolated(generator, CPU):
            found.add(float(torch.rand((), dtype=torch.float64)))
    assert len(found) == 300


def test_inside_draws_follow_from_the_generator_alone(device):
    with isolated(seeded(1), device):
        first = draws(device)
    draws(device)
    with isolated(seeded(1), device):
        second = draws(device)
    with isolated(seeded(2), device):
        third = draws(device)
    assert same(first, second)
    assert not any(map(torch.equal, first, third))


def test_afterwards_the_global_states_are_as_they_were(device):
    before = states(device)
    with isolated(seeded(), device):
        draws(device)
        torch.manual_seed(5)
    assert same(states(device), before)


def test_an_error_inside_restores_them_too(device):
    before = states(device)

    def fail():
        with isolated(seeded(), device):
            draws(device)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert same(states(device), before)


def test_the_generator_moves_on():
    generator = seeded()
    with isolated(generator, CPU):
        first = torch.rand(3)
    with isolated(generator, CPU):
        second = torch.rand(3)
    assert not torch.equal(first, second)


def test_the_global_generator_itself_can_be_passed():
    torch.manual_seed(3)
    with isolated(torch.default_generator, CPU):
        first = torch.rand(3)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with isolated(torch.default_generator, CPU):
        second = torch.rand(3)
        torch.rand(100)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), after)


def test_devices_that_are_not_used_are_not_seeded(monkeypatch):
    """Their states are not restored either, so seeding them would leave a trace."""
    seeded_all = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_all.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded_all.append)
    with isolated(seeded(), CPU):
        torch.rand(1)
    assert not seeded_all
