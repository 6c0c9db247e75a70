import pytest
import torch
from torchvision.transforms import functional as F

from dc_replay.batch_changes import (
    BatchTransforms,
    Crop,
    Flip,
    TrainingTransforms,
    cropped,
    flipped,
    some_changed,
)
from dc_replay.pixels import Normalization

HEIGHT, WIDTH = 5, 7
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
BLACK = tuple(-m / s for m, s in zip(NORMALIZATION.mean, NORMALIZATION.std, strict=True))


def pixels_of(count, device="cpu"):
    drawn = torch.randint(
        256,
        (count, 3, HEIGHT, WIDTH),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    return drawn.to(device)


def generators(device="cpu"):
    """Two with the same state."""
    return [torch.Generator(device).manual_seed(3) for _ in range(2)]


def transforms(*changes, dtype=torch.float32):
    return TrainingTransforms(changes, dtype)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_flips_equal_one_image_at_a_time(axis, dtype, device):
    images = pixels_of(40, device).to(dtype)
    ours, theirs = generators(device)
    found = flipped(images, ours, axis=axis, probability=0.3)
    chosen = torch.rand(40, generator=theirs, device=device) < 0.3
    assert 0 < chosen.sum() < 40 and found.dtype == dtype and found.device.type == device.type
    for image, change, after in zip(images, chosen, found, strict=True):
        expected = (F.hflip if axis == -1 else F.vflip)(image) if change else image
        assert torch.equal(after, expected)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flips_that_are_certain(probability):
    images = pixels_of(20)
    found = flipped(images, generators()[0], axis=-1, probability=probability)
    assert torch.equal(found, images.flip(-1) if probability else images)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (3, 0, 0, 2), (0, 1, 2, 3), (0, 0, 4, 0)])
@pytest.mark.parametrize(("dtype", "fill"), [(torch.uint8, 0), (torch.uint8, 9), (None, -1.5)])
def test_crops_equal_one_image_at_a_time(padding, dtype, fill, device):
    images = pixels_of(60, device)
    images = images / 255 if dtype is None else images
    left, top, right, bottom = padding
    ours, theirs = generators(device)
    colour = torch.full((1, 3, 1, 1), fill, dtype=images.dtype, device=device)
    found = cropped(images, ours, padding=padding, fill=colour)
    rows, columns = (
        torch.randint(room + 1, (60,), generator=theirs, device=device).tolist()
        for room in (top + bottom, left + right)
    )
    assert set(rows) == set(range(top + bottom + 1))
    assert set(columns) == set(range(left + right + 1))
    for image, row, column, after in zip(images, rows, columns, found, strict=True):
        padded = F.pad(image, list(padding), fill)
        assert torch.equal(after, F.crop(padded, row, column, HEIGHT, WIDTH))


def test_each_channel_is_filled_with_its_own_value():
    fill = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1)
    white = torch.full_like(pixels_of(20), 255)
    found = cropped(white, generators()[0], padding=(1, 1, 1, 1), fill=fill)
    assert [channel.unique().tolist() for channel in found.unbind(1)] == [
        [1, 255],
        [2, 255],
        [3, 255],
    ]


def test_normalising_is_that_of_the_normalization():
    pixels = pixels_of(4)
    apply = BatchTransforms(transforms(), NORMALIZATION, pixels.device)
    assert torch.equal(apply(pixels, generators()[0]), NORMALIZATION.apply(pixels / 255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_images_have_the_type_that_is_asked_for(dtype):
    apply = BatchTransforms(
        transforms(Flip(-1, 0.5), Crop((1, 1, 1, 1), (0.3,)), dtype=dtype),
        NORMALIZATION,
        torch.device("cpu"),
    )
    assert apply(pixels_of(4), generators()[0]).dtype == dtype


@pytest.mark.parametrize("fill", [BLACK, (0.0,), (0.123,), (1.0, 2.0, 3.0)])
@pytest.mark.parametrize("after", [(), (Flip(-2, 0.5), Crop((1, 0, 0, 0), BLACK))])
def test_what_is_moved_as_bytes_is_what_would_be_moved_as_numbers(fill, after, tolerance):
    pixels = pixels_of(50)
    changes = (Flip(-1, 0.5), Crop((2, 1, 1, 3), fill), *after)
    ours, theirs = generators()
    found = BatchTransforms(transforms(*changes), NORMALIZATION, pixels.device)(pixels, ours)
    expected = NORMALIZATION.apply(pixels / 255)
    for change in changes:
        if isinstance(change, Flip):
            expected = flipped(expected, theirs, axis=change.axis, probability=change.probability)
        else:
            colour = torch.tensor(change.fill).expand(3).view(1, 3, 1, 1)
            expected = cropped(expected, theirs, padding=change.padding, fill=colour)
    torch.testing.assert_close(found, expected, **tolerance[torch.float32])


def test_black_is_a_byte_and_grey_between_two_is_none():
    def on_bytes(fill):
        made = BatchTransforms(
            transforms(Crop((1, 1, 1, 1), fill)), NORMALIZATION, torch.device("cpu")
        )
        return len(made._on_bytes)

    assert on_bytes(BLACK) == 1
    assert on_bytes((0.0,)) == 0


@pytest.mark.parametrize(("share", "least", "most"), [(0.25, 200, 300), (0.8, 750, 850)])
def test_a_share_of_the_images_is_changed(share, least, most):
    one, other = generators()
    images = torch.zeros(1000, 1, 1, 1)
    changed = some_changed(images, lambda images: images + 1, share=share, generator=one)
    assert least < int(changed.sum()) < most
    assert not torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("share", [0, 1])
def test_nothing_is_drawn_where_none_or_all_are_changed(share):
    one, other = generators()
    images = torch.zeros(20, 1, 1, 1)
    changed = some_changed(images, lambda images: images + 1, share=share, generator=one)
    assert changed.sum() == 20 * share
    assert torch.equal(one.get_state(), other.get_state())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    apply = BatchTransforms(
        transforms(Flip(-1, 0.5), Crop((1, 1, 1, 1), BLACK)), NORMALIZATION, torch.device("cpu")
    )
    apply(pixels_of(8), generators()[0])
    assert torch.equal(torch.get_rng_state(), before)
