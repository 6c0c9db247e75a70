from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dc_replay.distillation import distillation_loss
from dc_replay.errors import ArgumentError

GOLDEN = Path(__file__).parent / "data" / "matching.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {key: torch.tensor(file[key]) for key in file.files if key.startswith("kd")}


def test_it_agrees_with_the_published_implementation(golden):
    new = golden["kd_new"].requires_grad_()
    loss = distillation_loss(new, golden["kd_old"], temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(loss, golden["kd"], rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, golden["kd_grad"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_mean_over_elements_times_their_number(generator, temperature):
    new = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    old = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    p, q = (old / temperature).softmax(1), (new[:, :4] / temperature).softmax(1)
    elements = p * (p.log() - q.log())
    expected = temperature**2 * 4 * elements.mean()
    torch.testing.assert_close(distillation_loss(new, old, temperature=temperature), expected)


def test_only_the_chosen_columns_count(generator):
    new = torch.randn(5, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    old = torch.randn(5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    loss = distillation_loss(new, old, columns=[7, 2, 4])
    loss.backward()
    assert new.grad.abs().sum(0).nonzero().flatten().tolist() == [2, 4, 7]
    assert old.grad is None
    picked = distillation_loss(new[:, [2, 4, 7]], old[:, [2, 4, 7]])
    torch.testing.assert_close(loss, picked)


def test_models_that_agree_lose_nothing(generator):
    logits = torch.randn(5, 3, generator=generator)
    shifted = F.pad(logits + 3, (0, 2))
    torch.testing.assert_close(distillation_loss(shifted, logits), torch.tensor(0.0))


def test_gradients_are_right(generator):
    new = torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    old = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, old), new)


BAD = {
    "batch": ((torch.zeros(2, 3), torch.zeros(4, 3)), {}, r"shape \[2, 3\] and `old_logits`"),
    "shape": ((torch.zeros(3), torch.zeros(3)), {}, r"expected \[batch, classes\]"),
    "temperature": ((torch.zeros(2, 3),) * 2, {"temperature": 0}, "`temperature` is 0; pass"),
    "shrunk": ((torch.zeros(2, 3), torch.zeros(2, 4)), {}, r"name one or more of the 3 columns"),
    "no columns": ((torch.zeros(2, 3),) * 2, {"columns": []}, r"`columns` is \[\], but must"),
    "unknown": ((torch.zeros(2, 3),) * 2, {"columns": [3]}, r"`columns` is \[3\], but must"),
}


@pytest.mark.parametrize(("logits", "options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(logits, options, message):
    with pytest.raises(ArgumentError, match=message):
        distillation_loss(*logits, **options)
