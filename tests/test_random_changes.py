"""Random training transforms are found where exemplars can be given them, and else named."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import as_classification_dataset, concat_datasets
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from dc_replay.batch_changes import Crop, Flip, value_changes
from dc_replay.dataset_transforms import (
    is_random,
    name_of,
    parts_of,
    random_when_evaluating,
    training_paths,
)
from dc_replay.experiences import gather
from dc_replay.random_changes import random_changes

SIDE = 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.4)
NORMALIZE = v2.Normalize(MEAN, STD)
IMAGES = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


TO_FLOATS = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def as_floats(image):
    return image / 255 if image.dtype == torch.uint8 else image


class Listed(Dataset):
    """What a list holds."""

    def __init__(self, items):
        self.items, self.targets = items, [item[1] for item in items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Items(Dataset):
    """Images of one kind: floats, bytes, pictures or arrays."""

    def __init__(self, kind="floats", images=IMAGES):
        pixels = (images * 255).round().to(torch.uint8)
        make = {
            "floats": lambda image: image / 255,
            "bytes": lambda image: image,
            "pictures": v1.functional.to_pil_image,
            "arrays": lambda image: np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
            "tv images": tv_tensors.Image,
            "numbers": lambda image: image.flatten() / 255,
        }[kind]
        self.images = [make(image) for image in pixels]
        self.targets = torch.arange(4).repeat_interleave(10).tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def dataset_of(train, evaluation=NORMALIZE, kind="floats"):
    groups = [
        v2.Compose(parts) if isinstance(parts, list) and parts else parts or None
        for parts in (train, evaluation)
    ]
    return as_classification_dataset(
        Items(kind), transform_groups=dict(zip(("train", "eval"), groups, strict=True))
    ).train()


TO_SIZE = v2.Resize(SIDE)
FOUND = {
    "nothing": ([NORMALIZE], [NORMALIZE], (), ()),
    "flips": (
        [v1.RandomVerticalFlip(0.25), NORMALIZE, v2.RandomHorizontalFlip()],
        [NORMALIZE],
        (Flip(-2, 0.25), Flip(-1, 0.5)),
        (),
    ),
    "crop before": (
        [v2.RandomCrop(SIDE, padding=2), NORMALIZE],
        [NORMALIZE],
        (Crop((2, 2, 2, 2), (-2.5, -1.6, -0.75)),),
        (),
    ),
    "crop after": (
        [NORMALIZE, v2.RandomCrop(SIDE, padding=2)],
        [NORMALIZE],
        (Crop((2, 2, 2, 2), (0.0,)),),
        (),
    ),
    "shared": ([TO_SIZE, v2.RandomHorizontalFlip()], [TO_SIZE], (Flip(-1, 0.5),), ()),
    "others": (
        [v2.RandomErasing(), v2.RandomCrop(SIDE, padding=1, padding_mode="reflect")],
        [],
        (),
        ("RandomErasing", "RandomCrop"),
    ),
    "resized crop": ([v2.RandomResizedCrop(SIDE)], [TO_SIZE], (), ("RandomResizedCrop",)),
    "crop out of resized ones": (
        [v2.Resize(SIDE + 2), v2.RandomCrop(SIDE)],
        [TO_SIZE],
        (),
        ("RandomCrop",),
    ),
    "crop of resized ones": (
        [v2.Resize((SIDE, SIDE)), v2.RandomCrop(SIDE, padding=1)],
        [TO_SIZE],
        (Crop((1, 1, 1, 1), (0.0,)),),
        (),
    ),
    "pictures": (
        [v2.ToPILImage(), v2.RandomCrop(SIDE, padding=1, fill=51), v2.ToTensor()],
        [],
        (Crop((1, 1, 1, 1), (0.2,)),),
        (),
    ),
    "bytes": (
        [v2.ToDtype(torch.uint8, scale=True), v2.RandomCrop(SIDE, padding=1, fill=51)],
        [v2.ToDtype(torch.uint8, scale=True)],
        (Crop((1, 1, 1, 1), (51.0,)),),
        (),
    ),
}


@pytest.mark.parametrize(("train", "evaluation", "changes", "others"), FOUND.values(), ids=FOUND)
def test_random_changes_are_found(train, evaluation, changes, others):
    found, names = random_changes(dataset_of(train, evaluation), (SIDE, SIDE))
    assert names == others and len(found) == len(changes)
    for one, other in zip(found, changes, strict=True):
        if isinstance(one, Crop):
            assert one.padding == other.padding and one.fill == pytest.approx(
                other.fill * (3 // len(other.fill)), abs=1e-5
            )
        else:
            assert one == other


def test_a_crop_out_of_larger_images_cannot_be_done_again():
    train = v2.Compose([v2.RandomCrop(6), NORMALIZE])
    evaluation = v2.Compose([v2.CenterCrop(6), NORMALIZE])
    assert random_changes(dataset_of(train, evaluation), (6, 6)) == ((), ("RandomCrop",))


class Wrapped(Dataset):
    """Transforms what another dataset holds, as many datasets of users' own do."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform
        self.targets = torch.arange(4).repeat_interleave(10).tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(self.dataset[index][0]), self.targets[index]


class Held(Wrapped):
    """Holds something that is no dataset under the same name."""

    def __init__(self):
        super().__init__({"images": IMAGES}, None)

    def __getitem__(self, index):
        return self.dataset["images"][index], self.targets[index]


def test_what_a_dataset_does_always_is_not_done_twice():
    inner = TensorDataset(IMAGES)
    dataset = as_classification_dataset(Wrapped(inner, v2.RandomCrop(SIDE, padding=2)))
    assert random_changes(dataset, (SIDE, SIDE)) == ((), ())
    assert random_when_evaluating(dataset) == (("RandomCrop",), ())
    assert random_when_evaluating(as_classification_dataset(Held())) == ((), ())


RANDOM = (
    *(v1.ColorJitter(0.5), v1.GaussianBlur(3), v1.RandAugment(), v1.RandomErasing(), v1.AugMix()),
    *(v2.AutoAugment(), v2.ColorJitter(0.5), v2.ElasticTransform(), v2.GaussianBlur(3)),
    *(v2.GaussianNoise(), v2.JPEG((5, 50)), v2.RandAugment(), v2.RandomErasing(), v2.AugMix()),
    *(v2.ScaleJitter((8, 8)), v2.TrivialAugmentWide(), v2.RandomPhotometricDistort()),
)
CERTAIN = (v1.GaussianBlur(3, 1.0), v2.GaussianBlur(3, (1.0, 1.0)), v2.JPEG(50), v2.Resize(8))


@pytest.mark.parametrize("transform", [*RANDOM, *CERTAIN], ids=lambda t: type(t).__name__)
def test_random_transforms_are_known(transform):
    assert is_random(transform) == (transform in RANDOM)


def test_frozen_transforms_come_before_those_that_are_given_later():
    """So that they are tried in the order in which images go through them."""
    crop = v2.RandomCrop(SIDE, padding=1)
    frozen = as_classification_dataset(
        Items(), transform_groups={"train": crop, "eval": None}
    ).freeze_transforms()
    later = v2.Compose([FLIP, NORMALIZE])
    dataset = frozen.replace_current_transform_group(later).train()
    (path,) = training_paths(dataset)
    assert [name_of(part) for part in parts_of(*path.training)] == [
        *("RandomCrop", "RandomHorizontalFlip", "Normalize"),
    ]


def test_a_dataset_that_holds_something_else_is_trained_on():
    assert random_changes(as_classification_dataset(Held()), (SIDE, SIDE)) == ((), ())


def test_parts_that_are_changed_differently_are_told_of():
    flip, crop = v2.RandomHorizontalFlip(), v2.RandomCrop(SIDE, padding=1)
    parts = [dataset_of(t) for t in (flip, v2.Compose([flip, crop]))]
    found = random_changes(concat_datasets(parts), (SIDE, SIDE))
    assert found == ((), ("different flips and crops to its parts",))


def to_signed(image):
    return (image - 0.5) / 0.5


def turned(image):
    """Other places for the same values, as a fixed permutation has them."""
    return image.flip(-1).roll(1, -1)


def shaped(image):
    return image.view(3, SIDE, SIDE)


def darker_outside(image):
    inside = torch.zeros_like(image)
    inside[:, 4:-4, 4:-4] = 1
    return image * inside - 1


def unreadable(image):
    raise OSError


def standardised(image):
    return (image - image.mean()) / image.std()


CROP, PAD = v2.RandomCrop(SIDE, padding=2), v1.RandomCrop(SIDE, padding=(1, 0, 2, 1), fill=51)
FLIP = v2.RandomHorizontalFlip()
SCALED = v2.ToDtype(torch.float32, scale=True)
UNSCALED = [v2.ToDtype(torch.float32), v2.Normalize([127.5], [127.5])]
DIVIDED = [v2.Lambda(lambda image: image.float() / 255), NORMALIZE]
BY_KIND = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None})
SIGNED = [v1.ToTensor(), v1.Lambda(to_signed)]
SAME = {
    "as usual": ("pictures", [PAD, FLIP, v1.ToTensor(), NORMALIZE], [v1.ToTensor(), NORMALIZE]),
    "divided by a function": ("bytes", [CROP, *DIVIDED], DIVIDED),
    "not scaled": ("bytes", [PAD, *UNSCALED], UNSCALED),
    "by kind": (
        "pictures",
        [v2.ToImage(), CROP, BY_KIND, v2.Normalize([127.5], [127.5])],
        [v2.ToImage(), BY_KIND, v2.Normalize([127.5], [127.5])],
    ),
    "normalised by a function": ("pictures", [PAD, *SIGNED], SIGNED),
    "another function with the same code": (
        "floats",
        [PAD, v2.Lambda(lambda image: 3 * image)],
        [v2.Lambda(lambda image: 3 * image)],
    ),
    "in place": (
        "pictures",
        [v1.ToTensor(), FLIP, CROP, v1.Normalize(MEAN, STD, inplace=True)],
        [v1.ToTensor(), NORMALIZE],
    ),
    "arrays": ("arrays", [v1.ToTensor(), CROP, FLIP], [v1.ToTensor()]),
    "colours": ("bytes", [v2.RandomCrop(SIDE, 1, fill=(9, 80, 255)), SCALED], [SCALED]),
    "colours of pictures": (
        "pictures",
        [v2.RandomCrop(SIDE, 1, fill=(9, 80, 255)), v1.ToTensor(), v1.RandomCrop(SIDE, 1)],
        [v1.ToTensor()],
    ),
    "colours of pictures, first version": (
        "pictures",
        [v1.RandomCrop(SIDE, 1, fill=(9, 80, 255)), v1.ToTensor()],
        [v1.ToTensor()],
    ),
    "images of torchvision": (
        "tv images",
        [CROP, FLIP, BY_KIND, v2.Normalize([127.5], [127.5])],
        [BY_KIND, v2.Normalize([127.5], [127.5])],
    ),
    "arrays without form": (
        "numbers",
        [shaped, PAD, FLIP, v2.Lambda(to_signed)],
        [shaped, v2.Lambda(to_signed)],
    ),
    "both versions": ("floats", [v1.Resize(SIDE), CROP, v2.Identity()], [v2.Resize(SIDE)]),
    "what does nothing": ("floats", [v2.RandomVerticalFlip(0.0), FLIP, nn.Identity()], []),
    "bytes to the end": ("bytes", [PAD, FLIP], []),
    "inverted": ("floats", [v2.RandomInvert(1.0), CROP], [v2.RandomInvert(1.0)]),
}


def outcomes(images):
    return {tuple((image * 1e3).round().flatten().int().tolist()) for image in images}


@pytest.mark.filterwarnings("ignore:.*ToTensor.*deprecated", "ignore:the experience applies")
@pytest.mark.parametrize(("kind", "train", "evaluation"), SAME.values(), ids=SAME)
def test_exemplars_become_what_new_images_may_become(kind, train, evaluation):
    dataset = dataset_of(train, evaluation, kind)
    changes, others = random_changes(dataset, (SIDE, SIDE))
    assert changes and not others
    generator = torch.Generator().manual_seed(0)
    found = gather(SimpleNamespace(dataset=dataset), device="cpu", generator=generator)
    image = found.normalization.apply(found.pixels[:1].float() / 255)
    augment = value_changes(changes, channels=image.shape[1], device=torch.device("cpu"))
    ours = augment(image.expand(900, -1, -1, -1), generator)
    theirs = [dataset.train()[0][0].float() for _ in range(900)]
    assert outcomes(ours) == outcomes(theirs) and len(outcomes(ours)) > 1


OTHERS = {
    "a crop before other places": ([CROP, v2.Lambda(turned)], [v2.Lambda(turned)], "RandomCrop"),
    "a flip before other places": (
        [FLIP, v2.Lambda(turned)],
        [v2.Lambda(turned)],
        "RandomHorizontalFlip",
    ),
    "a crop before it is cut": (
        [v2.RandomCrop(SIDE, padding=2), v2.CenterCrop(6)],
        [v2.CenterCrop(6)],
        "RandomCrop",
    ),
    "a crop at one side": (
        [v1.RandomCrop(SIDE, padding=(0, 0, 2, 1)), v2.Lambda(turned)],
        [v2.Lambda(turned)],
        "RandomCrop",
    ),
    "a crop at the other side": (
        [v1.RandomCrop(SIDE, padding=(2, 1, 0, 0)), v2.Lambda(turned)],
        [v2.Lambda(turned)],
        "RandomCrop",
    ),
    "a crop that is not filled alike": (
        [v2.RandomCrop(SIDE, 1, fill=0.5), v2.Resize(8 * SIDE), v2.Lambda(darker_outside)],
        [v2.Resize(8 * SIDE), v2.Lambda(darker_outside)],
        "RandomCrop",
    ),
    "a padding that does not grow by whole pixels": (
        [v2.RandomCrop(SIDE, padding=1), v2.Resize(12)],
        [v2.Resize(12)],
        "RandomCrop",
    ),
    "a crop before a function of all values": (
        [CROP, v2.Lambda(standardised)],
        [v2.Lambda(standardised)],
        "RandomCrop",
    ),
    "another function": (
        [v2.Lambda(lambda image: image * 0)],
        [v2.Lambda(lambda image: image * 1)],
        "Lambda",
    ),
    "a plain function": ([turned], [to_signed], "turned"),
}


@pytest.mark.parametrize(("train", "evaluation", "name"), OTHERS.values(), ids=OTHERS)
def test_what_exemplars_cannot_be_given_is_named(train, evaluation, name):
    dataset = dataset_of(train, evaluation)
    size = tuple(dataset.eval()[0][0].shape[-2:])
    assert random_changes(dataset.train(), size) == ((), (name,))


@pytest.mark.parametrize("kind", ["floats", "pictures"])
def test_a_padding_grows_with_the_image(kind):
    resize = [v2.Resize(4 * SIDE), v1.ToTensor() if kind == "pictures" else v2.Identity()]
    crop = v2.RandomCrop(SIDE, padding=(2, 1))
    changes, others = random_changes(dataset_of([crop, FLIP, *resize], resize, kind), (32, 32))
    assert changes == (Crop((8, 4, 8, 4), (0.0, 0.0, 0.0)), Flip(-1, 0.5)) and not others


@pytest.mark.parametrize(("resized", "padding"), [((32, 16), (4, 4)), ((16, 32), (8, 2))])
def test_a_padding_grows_with_each_side_of_the_image(resized, padding):
    resize = [v2.Resize(resized)]  # images of 8 by 8 pixels
    crop = v2.RandomCrop(SIDE, padding=(2, 1))
    changes, others = random_changes(dataset_of([crop, *resize], resize), resized)
    assert changes == (Crop((*padding, *padding), (0.0, 0.0, 0.0)),) and not others


def test_normalising_that_is_done_when_training_alone_is_no_change():
    assert random_changes(dataset_of([FLIP, NORMALIZE], []), (SIDE, SIDE)) == (
        (Flip(-1, 0.5),),
        (),
    )


def test_functions_that_call_others_are_others():
    first, second = (lambda image: image.sin()), (lambda image: image.cos())
    dataset = dataset_of([FLIP, v2.Lambda(first)], [v2.Lambda(second)])
    assert random_changes(dataset, (SIDE, SIDE)) == ((Flip(-1, 0.5),), ("Lambda",))
    same = dataset_of([FLIP, v2.Lambda(first)], [v2.Lambda(lambda image: image.sin())])
    assert random_changes(same, (SIDE, SIDE)) == ((Flip(-1, 0.5),), ())


@pytest.mark.parametrize("train", [[CROP, FLIP], [v2.RandomCrop(SIDE, 2), v2.ColorJitter(0.5)]])
def test_what_evaluation_does_too_is_not_done_twice(train):
    evaluation = train if train[1] is FLIP else [v2.RandomCrop(SIDE, 2), v2.ColorJitter(0.5)]
    dataset = dataset_of(train, evaluation)
    assert random_changes(dataset, (SIDE, SIDE)) == ((), ())
    with pytest.warns(UserWarning, match="applies RandomCrop, .* when evaluating, too, so that"):
        gather(SimpleNamespace(dataset=dataset), device="cpu", generator=torch.Generator())


def test_a_crop_before_images_lose_their_colours_is_of_one_channel():
    dataset = dataset_of([CROP, NORMALIZE, v2.Grayscale(1)], [NORMALIZE, v2.Grayscale(1)])
    (crop,), others = random_changes(dataset, (SIDE, SIDE))
    grey = sum(w * -m / s for w, m, s in zip((0.2989, 0.587, 0.114), MEAN, STD, strict=True))
    assert crop.fill == (pytest.approx(grey, abs=1e-3),) and not others


def test_many_parts_of_one_kind_are_tried_once():
    calls = []

    def counted(image):
        calls.append(1)
        return image

    part = dataset_of([FLIP, counted], [counted])
    one, _ = random_changes(part, (SIDE, SIDE)), calls.clear()
    random_changes(part, (SIDE, SIDE))
    alone = len(calls)
    calls.clear()
    parts = concat_datasets([part, part.subset(range(5)), part.subset([7])]).train()
    assert random_changes(parts, (SIDE, SIDE)) == one and len(calls) == alone


IMAGENET = [v2.Resize(36), v2.CenterCrop(32)]
FLIPPED = {
    "a crop of any size": ([v2.RandomResizedCrop(32), FLIP], ("RandomResizedCrop",)),
    "a crop out of a larger image": (
        [v2.Resize(36), v2.RandomCrop(32), FLIP],
        ("RandomCrop",),
    ),
    "a centre that is off by one": ([FLIP, v2.Resize(40), v2.CenterCrop(33)], ()),
}


@pytest.mark.parametrize(("train", "others"), FLIPPED.values(), ids=FLIPPED)
@pytest.mark.parametrize("size", [(60, 80), (60, 79)])
def test_flips_stay_where_crops_cannot_be_done(size, train, others):
    images = [v1.functional.to_pil_image(torch.rand(3, *size)) for _ in range(2)]
    dataset = list(zip(images, [0, 1], strict=True))
    evaluation = train[1:] if train[0] is FLIP else IMAGENET
    groups = {
        "train": v2.Compose([*train, TO_FLOATS]),
        "eval": v2.Compose([*evaluation, TO_FLOATS]),
    }
    dataset = as_classification_dataset(Listed(dataset), transform_groups=groups).train()
    side = dataset[0][0].shape[-1]
    assert random_changes(dataset, (side, side)) == ((Flip(-1, 0.5),), others)


def test_a_crop_of_images_of_another_size_is_named():
    dataset = dataset_of([CROP, v2.RandomResizedCrop(6)], [v2.Resize(6)])
    assert random_changes(dataset, (6, 6)) == ((), ("RandomResizedCrop", "RandomCrop"))


def test_a_flip_that_never_happens_is_none():
    train = [v1.RandomHorizontalFlip(0.0), v2.RandomVerticalFlip(0), v2.Identity()]
    assert random_changes(dataset_of(train, []), (SIDE, SIDE)) == ((), ())
    never = [v2.RandomHorizontalFlip(0.0)]
    assert random_changes(dataset_of([FLIP], never), (SIDE, SIDE)) == ((Flip(-1, 0.5),), ())


def test_an_image_of_one_colour_shows_as_much():
    images = torch.zeros(40, 3, SIDE, SIDE)
    train, evaluation = [CROP, v2.CenterCrop(6)], [v2.CenterCrop(6)]
    for kind in ("floats", "pictures", "arrays"):
        first = [v1.ToTensor()] if kind != "floats" else []
        groups = {"train": v2.Compose([*first, *train]), "eval": v2.Compose([*first, *evaluation])}
        dataset = as_classification_dataset(Items(kind, images), transform_groups=groups)
        assert random_changes(dataset.train(), (6, 6)) == ((), ("RandomCrop",))


def test_an_image_that_is_its_own_mirror_image_shows_as_much():
    images = (IMAGES + IMAGES.flip(-1)) / 2
    places = torch.arange(SIDE).roll(1)
    groups = {
        "train": v2.Compose([FLIP, v2.Lambda(lambda image: image[..., places])]),
        "eval": v2.Lambda(lambda image: image[..., places]),
    }
    dataset = as_classification_dataset(Items("floats", images), transform_groups=groups)
    assert random_changes(dataset.train(), (SIDE, SIDE)) == ((), ("RandomHorizontalFlip",))


def test_what_comes_after_a_transform_that_fails_is_named():
    dataset = dataset_of([v2.Lambda(unreadable), FLIP, CROP], [v2.Lambda(unreadable)])
    assert random_changes(dataset, (SIDE, SIDE)) == ((), ("RandomHorizontalFlip", "RandomCrop"))


def test_a_flip_besides_that_of_the_dataset_is_done():
    dataset = as_classification_dataset(
        Wrapped(Items(), FLIP), transform_groups={"train": v2.RandomHorizontalFlip(), "eval": None}
    )
    assert random_changes(dataset.train(), (SIDE, SIDE)) == ((Flip(-1, 0.5),), ())


def test_parts_of_other_kinds_are_tried_apart():
    train = v2.Compose([v2.RandomCrop(SIDE, 1, fill=51), v2.Lambda(as_floats)])
    groups = {"train": train, "eval": v2.Lambda(as_floats)}
    parts = [
        as_classification_dataset(Items(kind), transform_groups=groups)
        for kind in ("bytes", "floats")
    ]
    found = random_changes(concat_datasets(parts).train(), (SIDE, SIDE))
    assert found == ((), ("different flips and crops to its parts",))
