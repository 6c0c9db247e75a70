from __future__ import annotations

import functools

import pytest
from torch import nn

from benchmarks.cost_model import (
    Rates,
    Work,
    fit_sentence,
    fit_table,
    fitted,
    forward_operations,
    prediction_table,
    work_of,
)
from dc_replay.networks import ConvNet


def test_operations_are_those_of_the_layers() -> None:
    network = functools.partial(ConvNet, 10, size=(8, 8), width=4, depth=1)
    convolution = 2 * 3 * 4 * 9 * 8 * 8
    linear = 2 * (4 * 4 * 4) * 10
    assert forward_operations(network, (3, 8, 8)) == convolution + linear
    assert forward_operations(lambda: nn.Conv2d(1, 1, 1), (1, 5, 5)) == 50


def test_a_step_takes_nine_passes_of_a_synthetic_image_and_three_of_a_real_one() -> None:
    sizes = {"classes": 4, "factor": 2, "real": 64, "network_images": 100, "images": 50}
    work = work_of(10.0, ipc=5, **sizes)
    assert work == Work(step=10 * (3 * 64 + 9 * 20), classes=4, training=3000, features=50)
    most = work_of(10.0, ipc=500, **sizes)
    assert most.step == 10 * (3 * 64 + 9 * 128)


def test_the_fit_finds_the_rates_that_made_the_seconds() -> None:
    rates = Rates(step=2e11, training=5e11, fixed=0.05)
    works = [
        Work(step=step, classes=classes, training=training)
        for step in (1e10, 5e10)
        for classes in (5, 40)
        for training in (2e10, 2e11)
    ]
    found = fitted(works, [rates.seconds(work) for work in works])
    assert found.step == pytest.approx(rates.step)
    assert found.training == pytest.approx(rates.training)
    assert found.fixed == pytest.approx(rates.fixed)


def test_only_pixel_steps_are_dealt_out() -> None:
    rates = Rates(step=1.0, training=1.0, fixed=0.5)
    work = Work(step=2.0, classes=10, training=3.0)
    assert rates.seconds(work) == 20 + 3.5
    assert rates.seconds(work, ranks=4) == 6 + 3.5  # three classes at most
    assert rates.seconds(work, ranks=100) == 2 + 3.5


def test_tables_have_a_line_for_each_size() -> None:
    rows = [
        {"classes": c, "ipc": 2, "side": 32, "seconds": [0.2 * c, 0.1 * c, 0.1 * c]}
        for c in (5, 10)
    ]
    found = {"rows": rows, "settings": {"preset": "smoke", "images": 10}, "device": "a device"}
    header, lines = fit_table(found)
    assert len(lines) == 2 and len(header) == len(lines[0])
    assert lines[1][4] == "1.00"
    assert fit_sentence(found).startswith("On a device: pixel steps at")
    predicted = prediction_table()[1]
    assert [line[0] for line in predicted] == ["1", "8", "64"]
    assert float(predicted[0][1]) > float(predicted[1][1]) > float(predicted[2][1])
