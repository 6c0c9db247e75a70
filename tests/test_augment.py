import math

import pytest
import torch

from dc_replay.augment import (
    Augmentation,
    Color,
    Crop,
    CutMix,
    Cutout,
    Flip,
    Rotate,
    Scale,
    augmentation,
    cutmix,
)
from dc_replay.errors import ArgumentError

OPERATIONS = [Flip(), Color(), Crop(0.25), Scale(1.5), Rotate(40.0), Cutout()]
NAMES = ["flip", "color", "crop", "scale", "rotate", "cutout"]
SHAPES = [(4, 3, 8, 8), (3, 1, 6, 9), (2, 5, 7, 5)]

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(operation, count, seed=0):
    return torch.rand(count, operation.uniforms, generator=seeded(seed))


def pictures(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(99)).to(dtype)


def sample(image, matrix):
    """Read an image bilinearly where `matrix` sends each pixel, in pixels about the centre."""
    height, width = image.shape[-2:]
    (a, b), (c, d) = matrix
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row - (height - 1) / 2, column - (width - 1) / 2
            source_x = a * x + b * y + (width - 1) / 2
            source_y = c * x + d * y + (height - 1) / 2
            for near_y in (math.floor(source_y), math.floor(source_y) + 1):
                for near_x in (math.floor(source_x), math.floor(source_x) + 1):
                    if 0 <= near_y < height and 0 <= near_x < width:
                        share = (1 - abs(source_y - near_y)) * (1 - abs(source_x - near_x))
                        result[:, row, column] += share * image[:, near_y, near_x]
    return result


def slow_flip(operation, images, drawn):
    return [
        image.flip(-1) if u < operation.probability else image
        for image, (u,) in zip(images, drawn, strict=True)
    ]


def slow_color(operation, images, drawn):
    result = []
    for image, (added, saturated, contrasted) in zip(images, drawn, strict=True):
        image = image + (added - 0.5)
        grey = image.mean(dim=0)
        if len(image) > 1:
            image = torch.stack([(c - grey) * 2 * saturated + grey for c in image])
        result.append((image - image.mean()) * (contrasted + 0.5) + image.mean())
    return result


def slow_crop(operation, images, drawn):
    height, width = images.shape[-2:]
    result = []
    for image, (u, v) in zip(images, drawn, strict=True):
        reach_y, reach_x = round(height * operation.ratio), round(width * operation.ratio)
        down = math.floor(u * (2 * reach_y + 1)) - reach_y
        right = math.floor(v * (2 * reach_x + 1)) - reach_x
        shifted = torch.zeros_like(image)
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    shifted[:, y, x] = image[:, y + down, x + right]
        result.append(shifted)
    return result


def slow_scale(operation, images, drawn):
    least, most = 1 / operation.ratio, operation.ratio
    return [
        sample(image, ((least + u * (most - least), 0), (0, least + v * (most - least))))
        for image, (u, v) in zip(images, drawn, strict=True)
    ]


def slow_rotate(operation, images, drawn):
    result = []
    for image, (u,) in zip(images, drawn, strict=True):
        angle = math.radians((2 * u - 1) * operation.degrees)
        cosine, sine = math.cos(angle), math.sin(angle)
        result.append(sample(image, ((cosine, -sine), (sine, cosine))))
    return result


def slow_cutout(operation, images, drawn):
    height, width = images.shape[-2:]
    high, wide = round(height * operation.ratio), round(width * operation.ratio)
    result = []
    for image, (u, v) in zip(images, drawn, strict=True):
        # An even side is centred between pixels, so it has one more place to be.
        top = math.floor(u * (height + (high % 2 == 0))) - high // 2
        left = math.floor(v * (width + (wide % 2 == 0))) - wide // 2
        cut = image.clone()
        cut[:, max(top, 0) : max(top + high, 0), max(left, 0) : max(left + wide, 0)] = 0
        result.append(cut)
    return result


SLOW = [slow_flip, slow_color, slow_crop, slow_scale, slow_rotate, slow_cutout]


@every_shape
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize(("operation", "slow"), list(zip(OPERATIONS, SLOW, strict=True)), ids=NAMES)
def test_each_operation_equals_its_formula_image_by_image(operation, slow, shared, shape, device):
    images = pictures(shape)
    for seed in range(3):
        drawn = numbers(operation, 1 if shared else len(images), seed)
        each = drawn.double().expand(len(images), -1).tolist()
        expected = torch.stack(slow(operation, images, each))
        result = operation(images.to(device), drawn.to(device))
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-9)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_device_stay(operation, dtype, device):
    images = pictures((3, 3, 8, 6), dtype).to(device)
    result = operation(images, numbers(operation, 3).to(device))
    assert result.shape == images.shape
    assert result.dtype == dtype and result.device == images.device


@every_operation
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_each_operation_is_differentiable_in_the_images(operation, shared):
    images = pictures((2, 3, 5, 6)).requires_grad_()
    augment = Augmentation(always=(operation,))
    assert torch.autograd.gradcheck(lambda x: augment(x, seeded(1), shared=shared), (images,))


@every_operation
def test_one_shared_draw_changes_equal_images_alike_and_own_draws_do_not(operation):
    augment = Augmentation(always=(operation,))
    images = pictures((1, 3, 8, 8)).expand(16, 3, 8, 8)
    shared = augment(images, seeded(), shared=True)
    assert torch.equal(shared, shared[:1].expand_as(shared))
    each = augment(images, seeded())
    assert not torch.allclose(each, each[:1].expand_as(each))


@every_shape
@pytest.mark.parametrize("names", [("color", "crop", "cutout"), NAMES], ids=["matching", "all"])
def test_one_draw_gives_two_batches_the_same_change(names, shape):
    augment = augmentation(*names)
    images = pictures(shape)
    for seed in range(5):
        drawn = augment.draw(seeded(seed), 1)
        first, second = augment.apply(images, drawn), augment.apply(images[:2], drawn)
        torch.testing.assert_close(first[:2], second, rtol=0, atol=1e-12)
        torch.testing.assert_close(first, augment(images, seeded(seed), shared=True))


ONE_OF_SIX = Augmentation(one_of=tuple(OPERATIONS))


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize(
    "augment",
    [augmentation("color", "crop", "cutout"), augmentation(*NAMES), ONE_OF_SIX],
    ids=["matching", "all", "one-of-six"],
)
def test_numbers_drawn_before_give_what_drawing_at_once_gives(augment, shared, device):
    images = pictures((4, 3, 8, 8)).to(device)
    for seed in range(12):
        drawn = augment.draw(seeded(seed), 1 if shared else len(images))
        assert drawn.shape == (1 if shared else len(images), augment.uniforms)
        expected = augment(images, seeded(seed), shared=shared)
        assert torch.equal(augment.apply(images, drawn.to(device)), expected)


@pytest.mark.parametrize("names", [("color", "crop", "cutout"), NAMES], ids=["matching", "all"])
def test_many_batches_at_once_equal_one_after_the_other(names, device):
    augment = augmentation(*names)
    images = pictures((5, 4, 3, 8, 8)).to(device)
    drawn = augment.draw(seeded(), 5).to(device)[:, None]
    together = torch.func.vmap(augment.apply)(images, drawn)
    apart = torch.stack([augment.apply(*pair) for pair in zip(images, drawn, strict=True)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


@every_operation
def test_a_seed_gives_one_result_and_another_seed_another(operation):
    images = pictures((6, 3, 8, 8))
    augment = Augmentation(always=(operation,))
    assert torch.equal(augment(images, seeded(3)), augment(images, seeded(3)))
    assert not torch.equal(augment(images, seeded(3)), augment(images, seeded(4)))


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    images = pictures((4, 3, 8, 8))
    for seed in range(4):
        augmentation(*NAMES)(images, seeded(seed))
        cutmix(images, seeded(seed))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "operation",
    [
        Flip(0.0),
        Crop(0.0),
        Scale(1.0),
        Rotate(0.0),
        Cutout(0.0),
    ],
    ids=["flip", "crop", "scale", "rotate", "cutout"],
)
@every_shape
def test_a_strength_of_nothing_is_the_identity(operation, shape):
    images = pictures(shape)
    torch.testing.assert_close(operation(images, numbers(operation, len(images))), images)


@every_shape
def test_always_flipping_twice_is_the_identity(shape):
    images = pictures(shape)
    once = Flip(1.0)(images, numbers(Flip, 1))
    assert torch.equal(once, images.flip(-1))
    assert torch.equal(Flip(1.0)(once, numbers(Flip, 1)), images)


def test_about_half_the_images_are_flipped():
    images = pictures((1, 1, 2, 2)).expand(1000, 1, 2, 2)
    flipped = (Flip()(images, numbers(Flip, 1000)) != images).flatten(1).any(dim=1)
    assert 440 < flipped.sum() < 560


@every_shape
def test_colour_keeps_the_mean_but_for_brightness(shape):
    images = pictures(shape)
    drawn = numbers(Color, len(images))
    changed = Color()(images, drawn) - images
    added = drawn[:, 0].double() - 0.5
    torch.testing.assert_close(changed.mean(dim=(1, 2, 3)), added)
    assert not torch.allclose(changed, changed.mean(dim=(1, 2, 3), keepdim=True))


def test_colour_leaves_the_saturation_of_grey_images_alone():
    grey = pictures((4, 1, 6, 6)).expand(4, 3, 6, 6)
    changed = Color()(grey, numbers(Color, 4))
    torch.testing.assert_close(changed, changed[:, :1].expand_as(changed))


def test_crop_reaches_every_shift_and_fills_with_zeros():
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(400, 1, 8, 8)
    result = Crop(0.25)(images, numbers(Crop, 400))
    top_left = {int(image[0, 4, 4]) for image in result}
    assert top_left == {8 * (4 + y) + 5 + x for y in range(-2, 3) for x in range(-2, 3)}
    assert {int((image == 0).sum()) for image in result} == {
        64 - (8 - y) * (8 - x) for y in range(3) for x in range(3)
    }


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("side", [6, 7])
def test_rotation_by_a_right_angle_turns_a_square_image(turns, side):
    images = pictures((1, 2, side, side))
    drawn = 1 - numbers(Rotate, 1)
    turn = 2 * float(drawn.double()) - 1
    rotated = Rotate(90 * turns / turn)(images, drawn)
    torch.testing.assert_close(rotated, images.rot90(turns, dims=(-2, -1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(9, 5), (4, 11)])
def test_rotation_by_half_a_turn_mirrors_an_image_that_is_not_square(height, width):
    images = pictures((1, 2, height, width))
    drawn = 1 - numbers(Rotate, 1)
    turn = 2 * float(drawn.double()) - 1
    rotated = Rotate(180 / turn)(images, drawn)
    torch.testing.assert_close(rotated, images.flip(-1, -2), rtol=0, atol=1e-6)


def test_scale_keeps_the_centre():
    images = pictures((8, 2, 7, 9))
    scaled = Scale(1.2)(images, numbers(Scale, 8))
    torch.testing.assert_close(scaled[:, :, 3, 4], images[:, :, 3, 4])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (7, 5)])
def test_cutout_sets_a_rectangle_to_zero_and_nothing_else(height, width):
    images = torch.ones(300, 2, height, width)
    cut = Cutout()(images, numbers(Cutout, 300))[:, 0] == 0
    high, wide = round(height / 2), round(width / 2)
    for mask in cut:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns)
        for held, most in ((rows, high), (columns, wide)):
            where = held.nonzero().flatten()
            assert len(where) <= most
            assert not len(where) or int(where[-1] - where[0]) + 1 == len(where)
    assert int(cut.flatten(1).sum(dim=1).max()) == high * wide
    assert cut.any(dim=0).all()  # no pixel is spared for ever


class Note:
    """An operation that notes its name and its numbers, and changes nothing."""

    uniforms = 2

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def __call__(self, images, drawn):
        self.notes.append((self.name, drawn))
        return images


def test_all_that_always_applies_does_and_one_of_the_others_is_drawn():
    picked = set()
    for seed in range(30):
        notes = []
        a, b, c, d, e = (Note(name, notes) for name in "abcde")
        augment = Augmentation(always=(a, b), one_of=(c, d), last=(e,))
        augment(torch.zeros(5, 1, 2, 2), seeded(seed))
        assert [name for name, _ in notes][:2] == ["a", "b"]
        assert [name for name, _ in notes][3:] == ["e"]
        picked.add(notes[2][0])
        # Each has numbers of its own, whichever is picked, and none that pick.
        drawn = torch.rand(5, augment.uniforms, generator=seeded(seed))
        for name, found in notes:
            first = 1 + 2 * "abcde".index(name)
            assert torch.equal(found, drawn[:, first : first + 2])
        augment(torch.zeros(5, 1, 2, 2), seeded(seed), shared=True)
        assert {len(found) for _, found in notes[4:]} == {1}
    assert picked == {"c", "d"}


def test_no_operations_are_the_identity():
    images = pictures((2, 3, 4, 4))
    assert torch.equal(Augmentation()(images, seeded()), images)


def test_names_build_the_published_strategies():
    full = augmentation("scale", "rotate", "cutout", "flip", "color", "crop")
    assert full == Augmentation(
        always=(Flip(0.5), Color(1.0, 2.0, 1.0)),
        one_of=(Crop(0.125), Scale(1.2), Rotate(15.0)),
        last=(Cutout(0.5),),
    )
    assert augmentation("color", "crop") == Augmentation(always=(Color(),), one_of=(Crop(),))
    assert augmentation() == Augmentation()


def test_an_unknown_name_is_refused():
    with pytest.raises(ArgumentError, match="`names` holds \\['blur'\\], but the known ones are"):
        augmentation("color", "blur")


def test_a_single_image_is_refused():
    with pytest.raises(ArgumentError, match="`images` has shape \\[3, 8, 8\\], but must be"):
        augmentation("flip")(torch.zeros(3, 8, 8), seeded())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 12)])
def test_cutmix_keeps_the_share_that_it_says_and_pastes_the_partners(height, width, device):
    count = 7
    own = torch.arange(count, device=device)
    images = own.float().view(-1, 1, 1, 1).expand(count, 2, height, width)
    shares = []
    for seed in range(60):
        mixed, partners, share = cutmix(images, seeded(seed), probability=1.0)
        assert partners.dtype == torch.int64 and partners.device == images.device
        assert partners.sort().values.equal(own)
        pasted = mixed != images
        for position, partner in enumerate(partners.tolist()):
            assert set(mixed[position].unique().tolist()) <= {position, partner}
            if partner != position:
                torch.testing.assert_close(1 - pasted[position].float().mean(), share)
                mask = pasted[position, 0]
                assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0))
        shares.append(float(share))
    assert 0 <= min(shares) < 0.5 and 0.9 < max(shares) <= 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 12), (32, 32)])
def test_cutmix_pastes_the_published_rectangle(height, width):
    images = pictures((4, 3, height, width))
    partners = torch.tensor([2, 3, 1, 0])
    for seed in range(40):
        drawn = torch.rand(4, generator=seeded(seed))
        _, centre_y, centre_x, keep = drawn.tolist()
        sides = []
        for side, centre in ((height, centre_y), (width, centre_x)):
            cut, middle = int(side * math.sqrt(1 - keep)), int(side * centre)
            sides.append(slice(max(middle - cut // 2, 0), min(middle + cut // 2, side)))
        expected = images.clone()
        expected[:, :, sides[0], sides[1]] = images[partners][:, :, sides[0], sides[1]]
        mixed, share = CutMix(1.0).apply(images, partners, drawn)
        assert torch.equal(mixed, expected)
        area = math.prod(max(0, side.stop - side.start) for side in sides)
        assert float(share) == pytest.approx(1 - area / (height * width))


def test_cutmix_is_left_out_by_chance():
    images = pictures((6, 3, 8, 8))
    for seed in range(20):
        mixed, _, share = cutmix(images, seeded(seed), probability=0.0)
        assert torch.equal(mixed, images) and share == 1
    often = [cutmix(images, seeded(seed))[2] < 1 for seed in range(200)]
    assert 60 < sum(map(bool, often)) < 115


def test_cutmix_loss_weights_follow_from_a_seed_and_the_images_get_gradients():
    images = pictures((3, 1, 5, 5)).requires_grad_()
    first, second = (cutmix(images, seeded(2), probability=1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.autograd.gradcheck(lambda x: cutmix(x, seeded(2), probability=1.0)[0], (images,))


def test_cutmix_by_numbers_drawn_before_gives_what_drawing_at_once_gives(device):
    images = pictures((6, 3, 8, 8)).to(device)
    for seed in range(10):
        generator = seeded(seed)
        drawn = torch.rand(CutMix.uniforms, generator=generator).to(device)
        partners = torch.randperm(6, generator=generator).to(device)
        mixed, share = CutMix(0.5).apply(images, partners, drawn)
        expected, others, expected_share = cutmix(images, seeded(seed), probability=0.5)
        assert torch.equal(mixed, expected) and torch.equal(others, partners)
        assert share == expected_share


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: Flip(5), "`probability` is 5; pass a number from 0 to 1"),
        (lambda: Color(saturation=-1), "`saturation` is -1; pass a finite number of at least 0"),
        (lambda: Crop(1.5), "`ratio` is 1.5; pass a number from 0 to 1"),
        (lambda: Scale(0.5), "`ratio` is 0.5; pass a finite number of at least 1"),
        (lambda: Rotate("15"), "`degrees` is '15'; pass a finite number of at least 0"),
        (lambda: Cutout(-0.1), "`ratio` is -0.1; pass a number from 0 to 1"),
        (lambda: CutMix(float("nan")), "`probability` is nan; pass a number from 0 to 1"),
    ],
)
def test_strengths_out_of_range_are_refused(operation, message):
    with pytest.raises(ArgumentError, match=message):
        operation()
