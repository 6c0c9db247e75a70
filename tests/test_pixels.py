import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization, dequantise, in_type, quantise


def test_apply_is_the_affine_map_of_each_channel(device, generator):
    images = torch.rand(3, 2, 4, 5, generator=generator).to(device)
    seen = Normalization((0.1, 0.5), (0.2, 0.4)).apply(images)
    for image, result in zip(images, seen, strict=True):
        torch.testing.assert_close(result[0], (image[0] - 0.1) / 0.2)
        torch.testing.assert_close(result[1], (image[1] - 0.5) / 0.4)
    assert seen.device == images.device


@given(
    channels=st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 5)), min_size=1, max_size=5),
    double=st.booleans(),
)
def test_invert_undoes_apply(channels, double):
    dtype = torch.float64 if double else torch.float32
    normalization = Normalization(*zip(*channels, strict=True))
    images = torch.linspace(0, 1, len(channels) * 6, dtype=dtype).view(1, -1, 2, 3)
    seen = normalization.apply(images)
    assert seen.dtype == dtype
    torch.testing.assert_close(
        normalization.invert(seen), images, rtol=0, atol=1e-11 if double else 1e-5
    )


def test_identity_changes_nothing(generator):
    images = torch.rand(2, 5, 3, 3, generator=generator)
    assert torch.equal(Normalization.identity(5).apply(images), images)
    assert Normalization.identity(5).channels == 5


def test_from_range_sends_the_ends_to_0_and_1():
    normalization = Normalization.from_range([-2.0, 3.0, 7.0], [4.0, 3.5, 7.0])
    low = torch.tensor([-2.0, 3.0, 7.0]).view(1, 3, 1, 1)
    high = torch.tensor([4.0, 3.5, 8.0]).view(1, 3, 1, 1)  # a constant channel gets length 1
    torch.testing.assert_close(normalization.invert(low), torch.zeros_like(low))
    torch.testing.assert_close(normalization.invert(high), torch.ones_like(high))


def test_it_is_a_value_that_takes_any_sequence():
    assert Normalization([0, 1], [1, 2]) == Normalization((0.0, 1.0), (1.0, 2.0))
    assert hash(Normalization([0], [1])) == hash(Normalization((0.0,), (1.0,)))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((), (), "`mean` and `std` must hold one value per channel each.*0 and 0"),
        ((0.5,), (0.5, 0.5), "one value per channel each, but they hold 1 and 2"),
        ((0.5,), (0.0,), "`std` positive.*std \\(0.0,\\)"),
        ((0.5,), (-1.0,), "`std` positive"),
        ((math.nan,), (1.0,), "must be finite"),
        ((0.0,), (math.inf,), "must be finite"),
    ],
)
def test_unusable_values_are_refused(mean, std, message):
    with pytest.raises(ArgumentError, match=message):
        Normalization(mean, std)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4)])
@pytest.mark.parametrize("method", ["apply", "invert"])
def test_other_shapes_are_refused(method, shape):
    normalization = Normalization.identity(3)
    with pytest.raises(ArgumentError, match="`images` has shape .* for \\[batch, 3, height, width"):
        getattr(normalization, method)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_survives_a_round_trip(device, dtype):
    pixels = torch.arange(256, dtype=torch.uint8, device=device)
    images = dequantise(pixels, dtype)
    assert images.dtype == dtype
    assert images[0] == 0 and images[-1] == 1
    assert torch.equal(quantise(images), pixels)


def test_quantise_rounds_clamps_and_detaches():
    images = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 9.0], requires_grad=True)
    pixels = quantise(images)
    assert pixels.dtype == torch.uint8
    assert pixels.tolist() == [0, 0, 0, 1, 255, 255]
    assert not pixels.requires_grad


def test_images_of_a_dataset_of_bytes_are_rounded_and_held_in_range():
    images = torch.tensor([-3.0, 0.4, 0.6, 254.5, 254.6, 300.0])
    assert in_type(images, torch.uint8).tolist() == [0, 0, 1, 254, 255, 255]
    assert in_type(images, torch.float64).dtype == torch.float64
    assert in_type(images, torch.int64) is images


def test_a_range_has_two_ends_for_each_channel():
    for lows, highs in (([0.0], [1.0, 1.0]), ([], [])):
        with pytest.raises(ArgumentError):
            Normalization.from_range(lows, highs)
