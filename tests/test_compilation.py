import warnings
from dataclasses import replace

import pytest
import torch

from dc_replay import compilation
from dc_replay.augment import augmentation
from dc_replay.compilation import SECONDS_THAT_REPAY, STEPS_THAT_REPAY, compiled, wanted
from dc_replay.errors import ArgumentError
from dc_replay.formation import Formation
from dc_replay.matching import ClassBatch, match_function
from dc_replay.networks import convnet_for
from dc_replay.objectives import BidirectionalMatching, GradientMatching
from dc_replay.pixels import Normalization
from dc_replay.programs import Plan, _cached, programs
from dc_replay.terms import Sides, with_parts, with_prefix
from dc_replay.training import NetworkTraining, TrainingBatch

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
    assert wanted("auto", seconds=SECONDS_THAT_REPAY)
    assert not wanted("auto", seconds=SECONDS_THAT_REPAY - 1)
    # What preset fast does for an experience, and what the quick start does.
    assert wanted("auto", steps=160 * 20) and not wanted("auto", steps=10 * 2)
    assert wanted("auto", seconds=300) and not wanted("auto", seconds=60)


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


def test_the_first_of_two_failures_is_told(monkeypatch):
    def failing(function, *, mode=None, **options):
        def run(values):
            raise RuntimeError("with graphs" if mode else "without graphs")

        return run

    monkeypatch.setattr(compilation.torch, "compile", failing)
    run = compiled(double, True, graphs=True)
    with pytest.warns(RuntimeWarning, match="runs uncompiled, .* RuntimeError: with graphs"):
        assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))


def test_one_process_compiles_many_shapes():
    ran = []

    def backend(graph, example):
        def call(*arguments):
            ran.append(len(example))
            return graph.forward(*arguments)

        return call

    run = torch.compile(double, backend=backend, dynamic=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation.torch, "compile", lambda function, **options: run)
        several = compiled(double, True)
    for count in range(2, 14):  # more than torch compiles by default
        assert torch.equal(several(torch.ones(count)), torch.full((count,), 2.0))
    assert len(ran) == 12


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


def test_a_call_that_fails_either_way_leaves_it_compiled(monkeypatch):
    def picky(values):
        if not len(values):
            raise KeyError("mine")
        return 2 * values

    def fake(function, **options):
        return lambda values: function(values) + 1

    monkeypatch.setattr(compilation.torch, "compile", fake)
    run = compiled(picky, True)
    with pytest.raises(KeyError, match="mine"):
        run(torch.ones(0))
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 3.0))


def test_a_device_that_is_full_is_no_fault_of_the_compiler(monkeypatch):
    def full(values):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(compilation.torch, "compile", lambda function, **options: full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        compiled(double, True)(torch.ones(1))


def test_graphs_are_recorded_and_what_they_return_is_copied(monkeypatch):
    asked, result = [], {"found": (torch.ones(2), None, 3)}

    def fake(function, **options):
        asked.append(options)
        return lambda values: result

    monkeypatch.setattr(compilation.torch, "compile", fake)
    found = compiled(double, True, graphs=True)(torch.ones(2))
    assert asked == [{"dynamic": False}, {"dynamic": False, "mode": "reduce-overhead"}]
    (copy, none, number) = found["found"]
    assert torch.equal(copy, torch.ones(2)) and (none, number) == (None, 3)
    assert copy.data_ptr() != result["found"][0].data_ptr()


def test_where_recording_fails_it_stays_compiled(monkeypatch):
    def fake(function, mode=None, **options):
        if mode is None:
            return lambda values: function(values) + 1
        return lambda values: 1 / 0

    monkeypatch.setattr(compilation.torch, "compile", fake)
    run = compiled(double, True, graphs=True)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs, .* ZeroDivisionError: division"):
        assert torch.equal(run(torch.ones(2)), torch.full((2,), 3.0))
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 3.0))


def test_functions_that_are_recorded_compute_the_same():
    values = torch.arange(3.0)
    run = compiled(double, True, graphs=True)
    first = run(values)
    assert torch.equal(run(values + 1), 2 * values + 2)
    assert torch.equal(first, 2 * values)


TRAINING = NetworkTraining(batch=6, cutmix=1.0)
AUGMENT = augmentation("color", "crop", "cutout")
SCALE = Normalization((0.4,), (0.3,)).scale("cpu")


def program(objective=None, **changed):
    plan = Plan(
        factory=NETWORK,
        classes=2,
        shape=SHAPE,
        device=CPU,
        objective=objective,
        formation=Formation(2),
        augment=AUGMENT,
        training=TRAINING,
        precision="float32",
        compile=False,
    )
    return programs(replace(plan, **changed))


def class_batch(generator, terms=None):
    """Six real images and two stored ones, that is eight decoded ones."""
    real = torch.randint(256, (6, *SHAPE), dtype=torch.uint8, generator=generator)
    stored = torch.rand(2, *SHAPE, generator=generator)
    if terms is None:
        terms = Sides.even(8, 6, stored).whole()
    return ClassBatch(real, stored, None, AUGMENT.draw(generator, 1), torch.tensor(1), terms)


def terms_of_every_kind():
    parts = with_parts(
        Sides.even(8, 6, torch.ones(1)), torch.arange(8) % 2, torch.arange(6) % 2, 2, 0.5
    )
    return with_prefix(parts, torch.tensor([[0.25] * 4 + [0.0] * 4]), 1)


def test_programs_are_built_once_for_equal_arguments():
    first = program(GradientMatching())
    assert program(GradientMatching()) is first
    assert program(BidirectionalMatching()) is not first
    assert program(GradientMatching(), classes=3) is not first
    assert program(GradientMatching(), precision="auto") is not first


@pytest.mark.parametrize(
    "changed",
    [
        {"training": NetworkTraining(batch=3)},
        {"augment": augmentation("flip")},
        {"compile": True},
        {"classes_at_once": 2},
        {"formation": Formation(1)},
        {"classes": 4},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_programs_of_other_arguments_are_others(changed):
    assert program(GradientMatching(), **changed) is not program(GradientMatching())


def test_building_programs_draws_nothing():
    _cached.cache_clear()
    state = torch.get_rng_state()
    program(GradientMatching())
    assert torch.equal(torch.get_rng_state(), state)


def test_programs_are_the_functions_of_the_network(generator):
    found = program(BidirectionalMatching())
    parameters = found.network.fresh()
    batch = class_batch(generator)
    match = match_function(found.network, BidirectionalMatching(), Formation(2), AUGMENT)
    (ours,) = found.match(parameters, SCALE, [batch])
    for mine, theirs in zip(ours, match(parameters, SCALE, batch), strict=True):
        torch.testing.assert_close(mine, theirs)
    images = torch.rand(4, *SHAPE, generator=generator)
    for mine, theirs in zip(
        found.forward(parameters, images), found.network(parameters, images), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    batch = training_batch(generator)
    expected = TRAINING.step_function(found.network)(parameters, SCALE, batch)
    for name, value in found.step(parameters, SCALE, batch).items():
        torch.testing.assert_close(value, expected[name])


def test_without_an_objective_there_is_nothing_to_match():
    assert program().match is None


def test_a_matching_step_is_one_graph(generator):
    network = program(BidirectionalMatching()).network
    parameters = network.fresh()
    match = match_function(network, BidirectionalMatching(), Formation(2), AUGMENT)
    whole = torch.compile(match, backend="eager", fullgraph=True, dynamic=False)
    terms = terms_of_every_kind()
    batch = class_batch(generator, terms)
    for ours, theirs in zip(
        whole(parameters, SCALE, batch), match(parameters, SCALE, batch), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        whole(parameters, SCALE, batch._replace(terms=terms._replace(weights=terms.weights / 2)))


def training_batch(generator):
    return TrainingBatch(
        images=torch.randint(256, (6, *SHAPE), dtype=torch.uint8, generator=generator),
        labels=torch.tensor([0, 1, 1, 0, 1, 0]),
        partners=torch.randperm(6, generator=generator),
        changes=TRAINING.augment.draw(generator, 6),
        mix=torch.rand(4, generator=generator),
    )


def test_a_training_step_is_one_graph(generator):
    network = program().network
    parameters, batch = network.fresh(), training_batch(generator)
    step = TRAINING.step_function(network)
    whole = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    expected = step(parameters, SCALE, batch)
    for name, value in whole(parameters, SCALE, batch).items():
        torch.testing.assert_close(value, expected[name])
    with torch._dynamo.config.patch(error_on_recompile=True):
        whole(parameters, SCALE, training_batch(generator))


@pytest.mark.slow
def test_compiled_programs_yield_what_uncompiled_ones_do(generator):
    plain, fast = (program(BidirectionalMatching(), compile=mode) for mode in (False, True))
    parameters = plain.network.fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no compiler is no error
        for terms in (None, terms_of_every_kind()) * 2:
            batch = class_batch(generator, terms)
            (ours,) = fast.match(parameters, SCALE, [batch])
            (theirs,) = plain.match(parameters, SCALE, [batch])
            for first, second in zip(ours, theirs, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
        batch = training_batch(generator)
        expected = plain.step(parameters, SCALE, batch)
        for name, value in fast.step(parameters, SCALE, batch).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
