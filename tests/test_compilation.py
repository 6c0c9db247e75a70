import warnings

import pytest
import torch

from dc_replay import compilation
from dc_replay.compilation import STEPS_THAT_REPAY, compiled, wanted
from dc_replay.errors import ArgumentError
from dc_replay.networks import convnet_for
from dc_replay.objectives import BidirectionalMatching, GradientMatching, matching_step
from dc_replay.programs import _cached, programs
from dc_replay.terms import Sides, with_parts, with_prefix
from dc_replay.training import step_function

SHAPE = (1, 8, 8)
NETWORK = convnet_for(SHAPE, width=4)
CPU = torch.device("cpu")


def double(values):
    return 2 * values


def test_modes():
    assert wanted(True, steps=0)
    assert not wanted(False, steps=10**9)
    assert not wanted("auto", steps=STEPS_THAT_REPAY - 1)
    assert wanted("auto", steps=STEPS_THAT_REPAY)


@pytest.mark.parametrize("mode", ["yes", None, 2])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ArgumentError, match=f"`compile` is {mode!r}, but must be True, False or"):
        wanted(mode, steps=1)


def test_uncompiled_functions_are_left_as_they_are():
    assert compiled(double, False) is double


def test_compiling_asks_for_one_static_graph(monkeypatch):
    asked = []

    def fake(function, **options):
        asked.append((function, options))
        return lambda values: function(values) + 0

    monkeypatch.setattr(compilation.torch, "compile", fake)
    run = compiled(double, True)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))
    assert asked == [(double, {"dynamic": False})]


def test_where_compiling_fails_a_warning_says_why_once_and_it_runs_uncompiled(monkeypatch):
    tries = []

    def fake(function, **options):
        def fail(values):
            tries.append(values)
            raise RuntimeError("no compiler found\nlong trace")

        return fail

    monkeypatch.setattr(compilation.torch, "compile", fake)
    run = compiled(double, True)
    with pytest.warns(RuntimeWarning, match="uncompiled.*: RuntimeError: no compiler found$"):
        assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    assert len(tries) == 1


def test_compiling_may_fail_for_a_later_shape(monkeypatch):
    def fake(function, **options):
        def picky(values):
            if len(values) == 3:
                raise RuntimeError("no such shape")
            return function(values)

        return picky

    monkeypatch.setattr(compilation.torch, "compile", fake)
    run = compiled(double, True)
    run(torch.ones(2))
    with pytest.warns(RuntimeWarning, match="no such shape"):
        assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))


def test_a_function_that_itself_fails_raises_its_own_error(monkeypatch):
    def broken(values):
        raise KeyError("mine")

    monkeypatch.setattr(compilation.torch, "compile", lambda function, **options: function)
    with pytest.raises(KeyError, match="mine"):
        compiled(broken, True)(torch.ones(1))


def program(objective=None, *, classes=2, shape=SHAPE, precision="float32", compile=False):
    return programs(NETWORK, classes, shape, CPU, objective, precision, compile)


def test_programs_are_built_once_for_equal_arguments():
    first = program(GradientMatching())
    assert program(GradientMatching()) is first
    assert program(BidirectionalMatching()) is not first
    assert program(GradientMatching(), classes=3) is not first
    assert program(GradientMatching(), precision="bfloat16") is not first


def test_building_programs_draws_nothing():
    _cached.cache_clear()
    state = torch.get_rng_state()
    program(GradientMatching())
    assert torch.equal(torch.get_rng_state(), state)


def test_programs_are_the_functions_of_the_network(generator):
    images = torch.rand(4, *SHAPE, generator=generator)
    labels, share = torch.tensor([0, 1, 1, 0]), torch.tensor(0.6)
    found = program(BidirectionalMatching())
    parameters = found.network.fresh()
    label = torch.tensor(1)
    for ours, theirs in zip(
        found.match(parameters, images, images[:1], label, Sides.even(1, 4, images).whole()),
        matching_step(
            BidirectionalMatching(), found.network, parameters, images, images[:1], label
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        found.forward(parameters, images), found.network(parameters, images), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    arguments = (parameters, images, labels, labels.flip(0), share)
    expected = step_function(found.network)(*arguments)
    for name, value in found.step(*arguments).items():
        torch.testing.assert_close(value, expected[name])


def test_without_an_objective_there_is_nothing_to_match():
    assert program().match is None


def test_a_matching_step_is_one_graph(generator):
    real, synthetic = torch.rand(2, 6, *SHAPE, generator=generator).unbind()
    network = program(BidirectionalMatching()).network
    parameters, sides = network.fresh(), Sides.even(2, 6, real)
    objective, label = BidirectionalMatching(), torch.tensor(1)

    def step(terms):
        return matching_step(objective, network, parameters, real, synthetic[:2], label, terms)

    whole = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    parts = with_parts(sides, torch.arange(2), torch.arange(6) % 2, 2, 0.5)
    terms = with_prefix(parts, torch.tensor([[1.0, 0.0]]), 1)
    for ours, theirs in zip(whole(terms), step(terms), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        whole(terms._replace(weights=terms.weights / 2))


@pytest.mark.slow
def test_compiled_programs_yield_what_uncompiled_ones_do(generator):
    real, synthetic = torch.rand(2, 6, *SHAPE, generator=generator).unbind()
    plain, fast = (program(BidirectionalMatching(), compile=mode) for mode in (False, True))
    parameters = plain.network.fresh()
    sides = Sides.even(2, 6, real)
    parts = with_parts(sides, torch.arange(2), torch.arange(6) % 2, 2, 0.5)
    for terms in (sides.whole(), with_prefix(parts, torch.tensor([[1.0, 0.0]]), 1)) * 2:
        arguments = (parameters, real, synthetic[:2], torch.tensor(1), terms)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no compiler is no error
            for ours, theirs in zip(fast.match(*arguments), plain.match(*arguments), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
