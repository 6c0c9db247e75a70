"""Images in transform code, against readers that go bit by bit and number by number."""

import hashlib
import heapq
import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from sklearn.datasets import load_sample_image

from dc_replay import _layout
from dc_replay._layout import _errors, layout, levels, read_layers
from dc_replay.coding import transform_code
from dc_replay.errors import ArgumentError

CPU = torch.device("cpu")
CASES = [(3, 32, 32, 307), (3, 32, 32, 1536), (1, 28, 28, 78), (3, 7, 5, 26), (2, 9, 16, 40)]


def code(channels, height, width, length):
    return transform_code(channels, height, width, length, CPU)


def photographs(count=64, side=32):
    """Pieces of a photograph, shrunk to a few pixels."""
    whole = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1).float() / 255
    generator = torch.Generator().manual_seed(0)
    top = torch.randint(whole.shape[1] - 128, (count,), generator=generator)
    left = torch.randint(whole.shape[2] - 128, (count,), generator=generator)
    pieces = [whole[:, t : t + 128, x : x + 128] for t, x in zip(top, left, strict=True)]
    return torch.nn.functional.interpolate(torch.stack(pieces), size=(side, side), mode="area")


def level(bits, number):
    return levels()[2**bits - 2 + number]


def read_slowly(stored, channels, height, width):
    """One image from its bytes, bit by bit, by scipy's transform and JPEG's formulas."""
    found = layout(channels, height, width, len(stored))
    stream = "".join(f"{byte:08b}" for byte in stored.tolist())
    numbers = [int(stream[8 * place : 8 * place + 8], 2) for place in range(2 * channels)]
    at = 16 * channels
    grid = np.zeros((channels, height, width))
    for place, bits in zip(found.place, found.bits, strict=True):
        plane, row, column = np.unravel_index(place, grid.shape)
        side = math.sqrt(height * width)
        frequency = math.hypot(row * side / height, column * side / width)
        deviation = (1 + frequency**2) ** -0.75
        number = int(stream[at : at + bits], 2)
        at += bits
        scale = 2 ** ((numbers[channels + plane] - 128) / 8)
        grid[plane, row, column] = level(bits, number) * deviation * scale
    assert at <= len(stream)
    for plane in range(channels):
        middle = 128 if channels == 3 and plane else 127.5
        grid[plane, 0, 0] = (numbers[plane] - middle) / 255 * math.sqrt(height * width)
    planes = idctn(grid, axes=(1, 2), norm="ortho")
    if channels == 3:
        y, cb, cr = planes
        green = y - 0.344136 * cb - 0.714136 * cr
        planes = np.stack([y + 1.402 * cr, green, y + 1.772 * cb])
    return (planes + 0.5).clip(0, 1)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_bytes_are_read_as_they_are_documented(shape):
    *image, length = shape
    generator = torch.Generator().manual_seed(0)
    # Of any bytes, and of those that an image gives, which use the scales that occur.
    stored = torch.randint(256, (3, length), dtype=torch.uint8, generator=generator)
    stored[:, : 2 * image[0]] = stored[:, : 2 * image[0]] // 4 + 80
    stored = torch.cat([stored, code(*shape).encode(torch.rand(3, *image, generator=generator))])
    decoded = code(*shape).decode(stored)
    assert decoded.dtype == torch.float32 and decoded.shape == (6, *image)
    for one, found in zip(stored, decoded, strict=True):
        expected = torch.from_numpy(read_slowly(one, *image)).float()
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    # Without torch, as the command line does.
    shown = layout(*shape).read(stored.numpy()).astype(int)
    assert np.abs(shown - (decoded * 255).numpy()).max() <= 0.51


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_the_best_for_a_laplacian(bits):
    found = np.array([level(bits, number) for number in range(2**bits)])
    assert np.all(np.diff(found) > 0) and np.allclose(found, -found[::-1])
    # Lloyd's two conditions: thresholds halfway, and each level the mean of its cell.
    ends = np.concatenate([[-40.0], (found[1:] + found[:-1]) / 2, [40.0]])
    error = 0.0
    for low, high, value in zip(ends[:-1], ends[1:], found, strict=True):
        x = np.linspace(low, high, 20001)
        density = np.exp(-math.sqrt(2) * np.abs(x)) / math.sqrt(2)
        mean = np.trapezoid(x * density, x) / np.trapezoid(density, x)
        assert abs(mean - value) < 1e-3
        error += np.trapezoid((x - value) ** 2 * density, x)
    assert error == pytest.approx(_errors()[bits], rel=1e-2)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_bits_go_where_the_next_one_is_worth_most(shape):
    channels, height, width, length = shape
    side, errors, heap = math.sqrt(height * width), _errors(), []
    for place in range(channels * height * width):
        plane, row, column = np.unravel_index(place, (channels, height, width))
        if row or column:
            frequency = math.hypot(row * side / height, column * side / width)
            share = 0.06 if channels == 3 and plane else 1.0
            variance = share * (1 + frequency**2) ** -1.5
            heap.append((-variance * (errors[0] - errors[1]), place, 0, variance))
    heapq.heapify(heap)
    bits, worst = np.zeros(channels * height * width, int), 0.0
    for _ in range(8 * length - 16 * channels):
        if not heap:
            break
        worth, place, given, variance = heapq.heappop(heap)
        bits[place], worst = given + 1, worth
        if given < 7:
            gain = variance * (errors[given + 1] - errors[given + 2])
            heapq.heappush(heap, (-gain, place, given + 1, variance))
    found = layout(*shape)
    ours = np.zeros_like(bits)
    ours[found.place] = found.bits
    assert ours.sum() == bits.sum() <= 8 * length - 16 * channels
    # Coefficients of equal worth may be served in another order, once there is not enough for all.
    for place in np.flatnonzero(ours != bits):
        plane, row, column = np.unravel_index(place, (channels, height, width))
        frequency = math.hypot(row * side / height, column * side / width)
        share = 0.06 if channels == 3 and plane else 1.0
        least = min(ours[place], bits[place])
        gain = share * (1 + frequency**2) ** -1.5 * (errors[least] - errors[least + 1])
        assert gain == pytest.approx(-worst, rel=1e-5)


def test_encoding_takes_the_nearest_levels():
    images = photographs(4)
    found = layout(3, 32, 32, 307)
    stored = code(3, 32, 32, 307).encode(images)
    matrix = np.array(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    )
    for image, data in zip(images.double().numpy(), stored, strict=True):
        planes = np.einsum("pc,chw->phw", matrix, image - 0.5)
        grid = dctn(planes, axes=(1, 2), norm="ortho")
        values = grid.ravel()[found.place] / found.deviation
        stream = "".join(f"{byte:08b}" for byte in data.tolist())
        at = 48
        for value, plane, bits in zip(values, found.plane, found.bits, strict=True):
            scale = 2 ** ((int(data[3 + plane]) - 128) / 8)
            number = int(stream[at : at + bits], 2)
            at += bits
            choices = levels()[2**bits - 2 : 2 ** (bits + 1) - 2] * scale
            assert abs(choices[number] - value) <= np.abs(choices - value).min() + 1e-4
        for plane in range(3):
            of_plane = values[found.plane == plane]
            expected = 8 * math.log2(math.sqrt((of_plane**2).mean())) + 128
            assert abs(int(data[3 + plane]) - expected) <= 0.501
            middle = 128 if plane else 127.5
            assert abs(int(data[plane]) - 255 * planes[plane].mean() - middle) <= 0.501


def test_photographs_survive_and_more_bytes_leave_more():
    images = photographs()
    errors = []
    for compression in (2, 4, 8, 10, 16):
        one = code(3, 32, 32, 3072 // compression)
        error = (one.decode(one.encode(images)) - images).square().mean(dim=(1, 2, 3))
        errors.append(float((-10 * error.log10()).mean()))
    assert errors == sorted(errors, reverse=True)
    # What halving and enlarging leaves at 4, and rounding to 16 values at 2, is far below.
    half = torch.nn.functional.interpolate(images, size=(16, 16), mode="area")
    whole = torch.nn.functional.interpolate(half, size=(32, 32), mode="bilinear")
    packed = float((-10 * (whole - images).square().mean(dim=(1, 2, 3)).log10()).mean())
    rounded = ((images * 15).round() / 15 - images).square().mean(dim=(1, 2, 3))
    assert errors[1] > packed + 8 and errors[0] > float((-10 * rounded.log10()).mean()) + 5


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0, 0.3])
def test_an_even_image_stays_even(shape, grey):
    *image, _ = shape
    even = torch.full((1, *image), grey)
    decoded = code(*shape).decode(code(*shape).encode(even))
    assert (decoded - grey).abs().max() <= 0.5 / 255 + 1e-4


def test_values_beyond_the_range_are_clamped():
    wild = 4 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 2
    one = code(3, 32, 32, 307)
    assert torch.equal(one.encode(wild), one.encode(wild.clamp(0, 1)))
    decoded = one.decode(one.encode(wild))
    assert decoded.min() >= 0 and decoded.max() <= 1


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_what_is_kept_is_what_has_bits(shape):
    *image, _ = shape
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(2, *image, generator=generator, dtype=torch.float64)
    one, found = code(*shape), layout(*shape)
    kept = one.keep(changes)
    planes = torch.from_numpy(found.planes)
    grid = dctn(torch.einsum("pc,nchw->nphw", planes, changes).numpy(), axes=(2, 3), norm="ortho")
    mask = np.zeros(grid[0].size, bool)
    mask[found.place] = True
    mask = mask.reshape(grid[0].shape)
    mask[:, 0, 0] = True
    back = idctn(grid * mask, axes=(2, 3), norm="ortho")
    expected = torch.einsum("cp,nphw->nchw", torch.linalg.inv(planes), torch.from_numpy(back))
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.keep(kept), kept, atol=1e-5, rtol=0)


def test_too_few_bytes_are_refused():
    with pytest.raises(ArgumentError, match="`compression`.*3x32x32 cannot be stored in 8 bytes"):
        layout(3, 32, 32, 8)
    assert layout(3, 32, 32, 9).bits.sum() == 24
    with pytest.raises(ArgumentError, match="1x4x4 cannot be stored in 2 bytes"):
        read_layers(np.zeros((1, 1, 4, 4), np.uint8), 8)


@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        ((3, 32, 32, 307), "a2b5b0710d325e80"),
        ((1, 28, 28, 78), "43680e5afe4116f1"),
        ((3, 224, 224, 15052), "ab9e42d4b821cf2e"),
    ],
)
def test_the_layout_stays_what_it_is(shape, digest):
    """Files that were written stay readable: this digest does not change."""
    found = layout(*shape)
    content = np.concatenate([found.place, found.bits, found.byte, found.shift]).astype("<i8")
    assert hashlib.sha256(content.tobytes()).hexdigest()[:16] == digest


def test_what_bytes_stand_for_stays_what_it_is():
    ramp = (np.arange(307) * 37 % 256).astype(np.uint8)[None]
    ramp[:, :6] = [120, 131, 126, 140, 133, 129]
    pixels = layout(3, 32, 32, 307).read(ramp)[0]
    assert pixels[:, 3, ::8].tolist() == [[208, 255, 119, 0], [211, 202, 122, 0], [210, 236, 95, 0]]
    assert [round(float(level(3, number)), 5) for number in range(4, 8)] == [
        0.2334,
        0.83296,
        1.67247,
        3.08669,
    ]


@pytest.mark.parametrize("shape", [(3, 2049, 2), (5, 1024, 1024)])
def test_images_that_would_take_too_much_memory_are_refused(shape):
    with pytest.raises(ArgumentError, match="too large for transform code.*`compression` 1"):
        layout(*shape, math.prod(shape) // 2)


def test_many_images_are_read_in_parts(monkeypatch):
    stored = torch.randint(256, (7, 307), dtype=torch.uint8).numpy()
    whole = layout(3, 32, 32, 307).read(stored)
    monkeypatch.setattr(_layout, "_MOST_VALUES", 2 * 3072)
    assert np.array_equal(layout(3, 32, 32, 307).read(stored), whole)
    shown = np.zeros((2, 3, 8, 8), np.uint8)
    assert read_layers(shown, 4).shape == (8, 3, 8, 8) and read_layers(shown, 4, 3).shape[0] == 3


def test_autocast_and_inference_mode_around_it_change_nothing():
    images = photographs(4, side=24)
    transform_code.cache_clear()
    with torch.inference_mode():  # the first use makes what is kept for later ones
        stored = code(3, 24, 24, 200).encode(images)
    moving = images.clone().requires_grad_()
    code(3, 24, 24, 200).keep(moving).sum().backward()
    assert moving.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code(3, 24, 24, 200).encode(images), stored)
        decoded = code(3, 24, 24, 200).decode(stored)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, code(3, 24, 24, 200).decode(stored))
