import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dc_replay.coding import transform_code
from dc_replay.errors import ArgumentError
from dc_replay.formation import Formation
from dc_replay.pixels import dequantise

CASES = [
    # factor, channels, height, width
    (1, 3, 8, 8),
    (2, 3, 8, 8),
    (2, 1, 7, 7),
    (2, 5, 8, 6),
    (3, 2, 9, 12),
    (3, 3, 8, 10),
    (4, 1, 7, 13),
]


def slow_decode(stored, factor):
    """Cut and enlarge one crop after the other."""
    decoded = []
    for image in stored:
        channels, height, width = image.shape
        high, wide = math.ceil(height / factor), math.ceil(width / factor)
        canvas = torch.full((channels, factor * high, factor * wide), 0.5, dtype=image.dtype)
        canvas[:, :height, :width] = image
        for row in range(factor):
            for column in range(factor):
                crop = canvas[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
                decoded.append(
                    F.interpolate(
                        crop[None], size=(height, width), mode="bilinear", align_corners=False
                    )[0]
                )
    return torch.stack(decoded)


@st.composite
def stored_images(draw):
    factor = draw(st.integers(1, 4))
    # The last crop must begin inside of the image.
    side = st.integers(1, 13).filter(lambda side: (factor - 1) * math.ceil(side / factor) < side)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(side), draw(side))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return factor, torch.rand(shape, dtype=torch.float64, generator=generator)


@given(stored_images())
def test_decode_equals_a_loop_over_crops_image_by_image(case):
    factor, stored = case
    decoded = Formation(factor).decode(stored)
    assert decoded.shape == (len(stored) * factor**2, *stored.shape[1:])
    torch.testing.assert_close(decoded, slow_decode(stored, factor) if factor > 1 else stored)


@given(stored_images(), st.data())
def test_decode_at_equals_indexing_what_decode_gives(case, data):
    factor, stored = case
    formation = Formation(factor)
    whole = len(stored) * formation.images_per_stored
    index = torch.tensor(data.draw(st.lists(st.integers(0, whole - 1), max_size=6)), dtype=int)
    torch.testing.assert_close(
        formation.decode_at(stored, index), formation.decode(stored)[index], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_decode_at_takes_bytes(device, generator, factor):
    pixels = torch.randint(256, (3, 2, 7, 8), dtype=torch.uint8, generator=generator).to(device)
    index = torch.tensor([3 * factor**2 - 1, 0, 0, factor], device=device) % (3 * factor**2)
    decoded = Formation(factor).decode_at(pixels, index)
    assert decoded.dtype == torch.float32 and decoded.device == pixels.device
    torch.testing.assert_close(decoded, Formation(factor).decode(dequantise(pixels))[index])


@pytest.mark.parametrize(("factor", "channels", "height", "width"), CASES)
def test_a_prefix_of_the_decoded_depends_on_a_prefix_of_the_stored_alone(
    factor, channels, height, width, generator
):
    formation = Formation(factor)
    stored = torch.rand(4, channels, height, width, generator=generator, requires_grad=True)
    decoded = formation.decode(stored)
    for n in range(1, 5):
        first = decoded[: n * formation.images_per_stored]
        assert torch.equal(first, formation.decode(stored[:n]))
        (slope,) = torch.autograd.grad(first.square().sum(), stored, retain_graph=True)
        assert slope[:n].flatten(1).any(dim=1).all()
        assert not slope[n:].any()


@pytest.mark.parametrize(("factor", "channels", "height", "width"), CASES)
def test_packing_then_decoding_gives_the_images_back_in_order_at_crop_resolution(
    factor, channels, height, width, generator
):
    formation = Formation(factor)
    count = 2 * formation.images_per_stored
    images = torch.rand(count, channels, height, width, generator=generator)
    packed = formation.pack(images)
    assert packed.shape == (2, channels, height, width)
    assert packed.is_contiguous()
    high, wide = math.ceil(height / factor), math.ceil(width / factor)
    small = F.interpolate(images, size=(high, wide), mode="area")
    for position, decoded in enumerate(formation.decode(packed)):
        row, column = divmod(position % formation.images_per_stored, factor)
        crop = torch.full((channels, high, wide), 0.5)
        # What reaches over the border of the stored image is lost to mid-grey.
        rows, columns = min(high, height - row * high), min(wide, width - column * wide)
        crop[:, :rows, :columns] = small[position, :, :rows, :columns]
        expected = F.interpolate(
            crop[None], size=(height, width), mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(decoded, expected[0])


def test_the_order_is_row_by_row(generator):
    shades = torch.linspace(0, 1, 8).view(8, 1, 1, 1).expand(8, 1, 6, 6)
    packed = Formation(2).pack(shades)
    corners = [packed[0, 0, 0, 0], packed[0, 0, 0, -1], packed[0, 0, -1, 0], packed[0, 0, -1, -1]]
    torch.testing.assert_close(torch.stack(corners), torch.linspace(0, 1, 8)[:4])
    torch.testing.assert_close(Formation(2).decode(packed), shades)


def test_factor_1_stores_images_as_they_are(generator):
    images = torch.rand(3, 3, 5, 4, generator=generator)
    assert torch.equal(Formation(1).pack(images), images)
    assert torch.equal(Formation(1).decode(images), images)


@pytest.mark.parametrize(("factor", "channels", "height", "width"), CASES)
def test_decode_is_differentiable(factor, channels, height, width, generator):
    stored = torch.rand(
        1, channels, height, width, dtype=torch.float64, generator=generator, requires_grad=True
    )
    index = torch.tensor([0, factor**2 - 1, 0])
    assert torch.autograd.gradcheck(Formation(factor).decode, (stored,), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda s: Formation(factor).decode_at(s, index), (stored,), fast_mode=True
    )


@pytest.mark.parametrize("factor", [0, -1, 1.5, 2.0, "2", True, None])
def test_only_whole_factors_of_at_least_1_are_taken(factor):
    with pytest.raises(ArgumentError, match="`factor` must be a whole number of at least 1, but"):
        Formation(factor)


@pytest.mark.parametrize(
    ("factor", "height", "width", "fits"),
    [(5, 9, 4, 2), (4, 6, 9, 3), (9, 32, 32, 8), (3, 4, 4, 2)],
)
def test_a_factor_with_crops_outside_of_the_image_is_refused(factor, height, width, fits):
    message = f"`factor` is {factor}.*{height}x{width} pixels; .* such as {fits}$"
    for use in (
        lambda: Formation(factor).check(1, height, width),
        lambda: Formation(factor).decode(torch.zeros(1, 1, height, width)),
    ):
        with pytest.raises(ArgumentError, match=message):
            use()
    Formation(fits).check(1, height, width)


def test_an_incomplete_group_cannot_be_packed():
    with pytest.raises(ArgumentError, match="`images` holds 6 images.*multiple of the 4.*factor 2"):
        Formation(2).pack(torch.zeros(6, 3, 8, 8))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_packing_leaves_of_new_images_what_it_leaves_of_exemplars(factor, generator):
    formation = Formation(factor)
    images = torch.rand(factor**2, 3, 8, 12, generator=generator, dtype=torch.float64)
    packed = formation.decode(formation.pack(images))
    torch.testing.assert_close(formation.as_stored(images), packed)


@pytest.mark.parametrize(("factor", "shape"), [(2, (1, 7, 5)), (3, (3, 8, 8)), (3, (2, 9, 8))])
def test_grey_borders_of_packed_images_are_those_of_new_ones(factor, shape, generator):
    formation = Formation(factor)
    images = torch.rand(2 * factor**2, *shape, generator=generator, dtype=torch.float64)
    packed = formation.decode(formation.pack(images))
    torch.testing.assert_close(formation.as_stored(images), packed)
    some = formation.as_stored(images[: factor**2 + 1])
    torch.testing.assert_close(some, packed[: factor**2 + 1])


@pytest.mark.parametrize("formation", [Formation(2), Formation(1, 4), Formation(3, 2)], ids=str)
def test_what_is_no_number_does_not_become_one(formation, generator):
    images = torch.rand(2, 3, 8, 8, generator=generator)
    images[1, 2, 3, 4] = torch.nan
    assert formation.as_stored(images)[1].isnan().any()


def same_but_for_rounding(a, b):
    """How many images there are decides, on some machines, in which order sums are made."""
    return a.shape == b.shape and (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_compression_leaves_of_new_images_what_it_leaves_of_exemplars(factor, generator):
    formation = Formation(factor, compression=4)
    images = torch.rand(2 * formation.images_per_stored, 3, 13, 16, generator=generator)
    stored = formation.store(formation.pack(images))
    shown = formation.as_stored(images)
    assert same_but_for_rounding(shown, formation.decode(formation.open(stored)))
    # The images of a last layer that is not full are what they would be beside any others.
    some = formation.as_stored(images[: factor**2 + 1])
    assert some.shape == (factor**2 + 1, 3, 13, 16)
    assert same_but_for_rounding(some[:-1], shown[: factor**2])
    assert formation.as_stored(images[:0]).shape == (0, 3, 13, 16)
    assert formation.as_stored(images.to(torch.bfloat16)).dtype == torch.bfloat16


# Several images in the bytes of one


def test_images_that_fill_up_a_layer_are_like_those_in_it(generator):
    """So that they add no edges, whose traces the others would show."""
    formation = Formation(2, compression=4)
    images = torch.rand(5, 3, 16, 16, generator=generator)
    filled = torch.cat([images, images[:1].expand(3, -1, -1, -1)])
    assert same_but_for_rounding(formation.as_stored(images), formation.as_stored(filled)[:5])


def compressed(formation, count, shape, generator):
    """Stored bytes, and each image that they hold, by its own code."""
    length = math.prod(shape) // formation.compression
    code = transform_code(*shape, length, torch.device("cpu"))
    layers = torch.rand(count * formation.compression, *shape, generator=generator)
    stored = torch.zeros(count, math.prod(shape), dtype=torch.uint8)
    coded = code.encode(layers)
    for place, data in enumerate(coded):
        image, layer = divmod(place, formation.compression)
        stored[image, layer * length : (layer + 1) * length] = data
    return layers, stored.view(count, *shape), code.decode(coded)


@pytest.mark.parametrize("compression", [2, 3, 7])
@pytest.mark.parametrize(("factor", "channels", "height", "width"), CASES)
def test_compression_puts_one_image_after_the_other(
    factor, channels, height, width, compression, generator
):
    formation = Formation(factor, compression)
    shape = channels, height, width
    if math.prod(shape) // compression < 3 * channels:
        with pytest.raises(ArgumentError, match="`compression`.*cannot be stored in .* bytes"):
            formation.check(*shape)
        return
    formation.check(*shape)
    layers, stored, expected = compressed(formation, 3, shape, generator)
    opened = layers.unflatten(0, (3, compression)).flatten(1, 2)
    assert opened.shape[1:] == formation.open_shape(*shape)
    assert torch.equal(formation.store(opened), stored)
    found = formation.open(stored)
    torch.testing.assert_close(found, expected.view(opened.shape))
    # As if each layer were a stored image of its own.
    decoded = formation.decode(found)
    assert formation.images_per_stored == compression * factor**2
    torch.testing.assert_close(decoded, Formation(factor).decode(expected))
    index = torch.randperm(len(decoded), generator=generator)
    torch.testing.assert_close(formation.decode_at(stored, index), decoded[index])
    first = formation.decode(formation.open(stored[:2]))
    torch.testing.assert_close(first, decoded[: 2 * formation.images_per_stored])


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_packing_fills_one_layer_after_the_other(factor, generator):
    formation = Formation(factor, compression=3)
    images = torch.rand(2 * formation.images_per_stored, 3, 6, 6, generator=generator)
    packed = formation.pack(images)
    assert packed.shape == (2, 9, 6, 6)
    plain = Formation(factor)
    layers = plain.pack(images).unflatten(0, (2, 3)).flatten(1, 2)
    assert torch.equal(packed, layers)
    with pytest.raises(ArgumentError, match="multiple of the .* at factor . and compression 3"):
        formation.pack(images[1:])


def test_changes_are_kept_where_they_can_be_stored(generator):
    changes = torch.randn(2, 18, 8, 8, generator=generator)
    assert Formation(2).keep(changes) is changes
    code = transform_code(3, 8, 8, 32, torch.device("cpu"))
    expected = code.keep(changes.view(12, 3, 8, 8)).view(2, 18, 8, 8)
    torch.testing.assert_close(Formation(2, compression=6).keep(changes), expected)
    assert (changes - expected).norm() > 0.1


@pytest.mark.parametrize("compression", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_are_opened_in_the_type_that_is_asked_for(compression, dtype):
    stored = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert Formation(2, compression).open(stored, dtype).dtype == dtype


def test_no_images_are_no_images():
    formation = Formation(2, compression=3)
    opened = formation.open(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
    assert opened.shape == (0, 9, 8, 8) and formation.decode(opened).shape == (0, 3, 8, 8)
    assert formation.store(opened).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("compression", [0, -1, 257, 2.0, "4", True, None])
def test_compression_is_a_whole_number(compression):
    with pytest.raises(ArgumentError, match="`compression` must be a whole number"):
        Formation(2, compression=compression)


def test_whole_numbers_of_numpy_are_whole_numbers():
    found = Formation(np.int64(2), np.uint8(3))
    assert found == Formation(2, 3)
    assert type(found.factor) is int and type(found.compression) is int
