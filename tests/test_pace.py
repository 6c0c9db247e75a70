import math

import pytest
import torch

from dc_replay import pace
from dc_replay.errors import ArgumentError
from dc_replay.pace import ByClock, BySteps

CPU = torch.device("cpu")


def test_steps_are_counted():
    steps = BySteps(4)
    shares = []
    while not steps.over:
        shares.append(steps.share)
        steps.advance()
    assert shares == [0, 0.25, 0.5, 0.75] and steps.share == 1
    assert (steps.total, steps.unit) == (4, "step")


def readings(monkeypatch, *seconds):
    left = list(seconds)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: left.pop(0))


def test_the_clock_stops_before_an_iteration_that_would_be_late(monkeypatch):
    # A slow first iteration, which compiles, then some of 2, 3 and 2 seconds.
    readings(monkeypatch, 100, 110, 112, 115, 117)
    clock = ByClock(20, CPU)
    assert clock.share == 0 and not clock.over
    states = []
    for _ in range(4):
        clock.advance()
        states.append((clock.share, clock.over))
    assert states == [(0.5, False), (0.6, False), (0.75, False), (0.85, False)]
    readings(monkeypatch, 118)
    clock.advance()
    assert clock.over  # three more seconds would end at 21


def test_the_clock_goes_on_from_a_state(monkeypatch):
    readings(monkeypatch, 100, 110, 113)
    clock = ByClock(20, CPU)
    for _ in range(2):
        clock.advance()
    state = clock.state()
    # Another process: it has begun, compiled for a while, and takes 2 seconds for an iteration.
    readings(monkeypatch, 500, 540, 540, 542)
    clock = ByClock(20, CPU)
    clock.restore(state)
    assert clock.share == 13 / 20 and not clock.over
    clock.advance()
    assert clock.share == 15 / 20 and not clock.over  # the longest of 3 seconds still fits
    readings(monkeypatch, 543, 545)
    clock.advance()
    assert not clock.over
    clock.advance()
    assert clock.over  # 18 and 3


def test_one_iteration_always_fits(monkeypatch):
    readings(monkeypatch, 0, 50)
    clock = ByClock(20, CPU)
    assert not clock.over
    clock.advance()
    assert clock.over and clock.share == 1
    assert (clock.total, clock.unit) == (20, "s")


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_budget_must_be_above_0(seconds):
    with pytest.raises(ArgumentError, match=f"`seconds` is {seconds}, but a time budget must be"):
        ByClock(seconds, CPU)
