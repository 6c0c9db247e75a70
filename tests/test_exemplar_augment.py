"""Exemplars are augmented as new images are."""

import warnings

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset, concat_datasets
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay import CondensedReplayPlugin, ImagesPerClass, MemoryOnlyPlugin, recipes
from dc_replay.exemplar_augment import augment_for
from dc_replay.training_transforms import random_changes, random_inside
from dc_replay.transforms import Crop, Flip

SIDE = 8
NORMALIZE = v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.4))
IMAGES = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
IMAGES = (IMAGES * 255).round() / 255  # so that storing as bytes loses nothing


def benchmark(train, evaluation=NORMALIZE):
    data = TensorDataset(IMAGES, torch.arange(4).repeat_interleave(10))
    return nc_benchmark(
        data,
        data,
        n_experiences=2,
        task_labels=False,
        shuffle=False,
        train_transform=train,
        eval_transform=evaluation,
    )


def shown(make, train, evaluation=NORMALIZE, **options):
    """What the network is shown of exemplars, and the exemplars as they are stored."""
    plugin = make(condenser=recipes.random(), budget=ImagesPerClass(10), progress=False, **options)
    batches = []

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * SIDE * SIDE, 4)

        def forward(self, images):
            batches.append(images.detach())
            return self.layer(images.flatten(1))

    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy = Naive(
        model=model, optimizer=optimizer, train_mb_size=20, plugins=[plugin], evaluator=None
    )
    stream = benchmark(train, evaluation).train_stream
    strategy.train(stream[0])
    stored = plugin.memory.decoded()[0]
    if make is CondensedReplayPlugin:
        batches.clear()
        strategy.train(stream[1])
        return torch.cat([batch[20:] for batch in batches]), stored
    return torch.cat(batches), stored


def is_one_of(image, images):
    return bool(torch.isclose(images, image, atol=1e-5).flatten(1).all(dim=1).any())


both_plugins = pytest.mark.parametrize("make", [CondensedReplayPlugin, MemoryOnlyPlugin])
both_versions = pytest.mark.parametrize("version", [v1, v2])


@both_plugins
@both_versions
def test_exemplars_are_mirrored_as_new_images_are(make, version):
    train = version.Compose([version.RandomHorizontalFlip(p=1.0), NORMALIZE])
    seen, stored = shown(make, train)
    assert all(is_one_of(image.flip(-1), stored) for image in seen)
    assert not any(is_one_of(image, stored) for image in seen)
    seen, stored = shown(make, train, augment=None)
    assert all(is_one_of(image, stored) for image in seen)


@both_plugins
@both_versions
def test_exemplars_are_cropped_as_new_images_are(make, version):
    train = version.Compose([version.RandomCrop(SIDE, padding=3, fill=1.0), NORMALIZE])
    seen, stored = shown(make, train)
    border = NORMALIZE(torch.ones(3, 1, 1))
    padded = border.expand(3, SIDE + 6, SIDE + 6).repeat(len(stored), 1, 1, 1).contiguous()
    padded[:, :, 3:-3, 3:-3] = stored
    windows = padded.unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    windows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIDE, SIDE)
    assert all(is_one_of(image, windows) for image in seen)
    assert sum(is_one_of(image, stored) for image in seen) < len(seen) / 2


@both_plugins
def test_nothing_is_drawn_where_training_transforms_draw_nothing(make):
    seen, stored = shown(make, NORMALIZE)
    again, _ = shown(make, NORMALIZE, augment=None)
    assert torch.equal(seen, again) and all(is_one_of(image, stored) for image in seen)


@both_plugins
def test_what_exemplars_do_not_get_is_named(make):
    train = v2.Compose([v2.ColorJitter(0.5), v2.RandomHorizontalFlip(p=1.0), NORMALIZE])
    with pytest.warns(UserWarning, match="applies ColorJitter when training, which exemplars"):
        seen, stored = shown(make, train)
    assert all(is_one_of(image.flip(-1), stored) for image in seen)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the experience applies")
        shown(make, train, augment=None)
        shown(make, train, augment=lambda images, generator: images)


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
    groups = [v2.Compose(parts) if parts else None for parts in (train, evaluation)]
    found, names = random_changes(benchmark(*groups).train_stream[0].dataset, (SIDE, SIDE))
    assert names == others and len(found) == len(changes)
    for one, other in zip(found, changes, strict=True):
        if isinstance(one, Crop):
            assert one.padding == other.padding and one.fill == pytest.approx(other.fill, abs=1e-5)
        else:
            assert one == other


def test_a_crop_out_of_larger_images_cannot_be_done_again():
    train = v2.Compose([v2.RandomCrop(6), NORMALIZE])
    evaluation = v2.Compose([v2.CenterCrop(6), NORMALIZE])
    dataset = benchmark(train, evaluation).train_stream[0].dataset
    assert random_changes(dataset, (6, 6)) == ((), ("RandomCrop",))


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
    assert random_inside(dataset) == ("RandomCrop",)
    assert random_inside(as_classification_dataset(Held())) == ()


def test_a_dataset_that_holds_something_else_is_trained_on():
    assert random_changes(as_classification_dataset(Held()), (SIDE, SIDE)) == ((), ())


def test_parts_that_are_changed_differently_are_told_of():
    flip, crop = v2.RandomHorizontalFlip(), v2.RandomCrop(SIDE, padding=1)
    parts = [benchmark(t).train_stream[0].dataset for t in (flip, v2.Compose([flip, crop]))]
    found = random_changes(concat_datasets(parts), (SIDE, SIDE))
    assert found == ((), ("different flips and crops to its parts",))


def test_crops_of_images_of_other_channels_are_told_of():
    train = v2.Compose([v2.RandomCrop(SIDE, padding=1), NORMALIZE, v2.Grayscale(1)])
    dataset = benchmark(train, v2.Compose([NORMALIZE, v2.Grayscale(1)])).train_stream[0].dataset
    options = {"device": torch.device("cpu"), "generator": torch.Generator().manual_seed(0)}
    with pytest.warns(UserWarning, match="applies RandomCrop when training, which exemplars"):
        augment = augment_for("training", dataset, (1, SIDE, SIDE), **options)
    images = torch.rand(3, 1, SIDE, SIDE)
    assert torch.equal(augment(images, options["generator"]), images)


def test_looking_for_transforms_draws_nothing_from_global_generators():
    dataset = benchmark(v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE])).train_stream[0].dataset
    before = torch.get_rng_state()
    augment_for(
        "training",
        dataset,
        (3, SIDE, SIDE),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(torch.get_rng_state(), before)
