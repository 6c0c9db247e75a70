from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay.batch_changes import BatchTransforms, Crop, Flip
from dc_replay.errors import ArgumentError
from dc_replay.experiences import gather
from dc_replay.random_changes import torchvision_transform
from dc_replay.resident_transforms import training_transforms

SIZE = (3, 4)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
V1, V2 = v1.Normalize(MEAN, STD), v2.Normalize(MEAN, STD)
SCALED = v2.ToDtype(torch.float32, scale=True)


class Pictures(Dataset):
    """Images of one kind; a transform of its own, as torchvision's datasets have."""

    def __init__(self, kind="bytes", transform=None):
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(256, (4, 3, *SIZE), dtype=torch.uint8, generator=generator)
        make = {
            "bytes": lambda image: image,
            "floats": lambda image: image / 255,
            "PIL": v1.functional.to_pil_image,
            "array": lambda image: np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
        }[kind]
        self.images = [make(image) for image in pixels]
        self.targets, self.transform = [0, 0, 1, 1], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.targets[index]


def dataset_of(training=None, evaluation=None, *, kind="bytes", inside=None):
    return as_classification_dataset(
        Pictures(kind, inside), transform_groups={"train": training, "eval": evaluation}
    )


def outcomes(images):
    """What the images are, to 4 decimals, each once."""
    return {tuple((image * 1e4).round().flatten().int().tolist()) for image in images}


def assert_same_outcomes(dataset, *, draws, several=True):
    """What batches may become is what single images may become, and nothing else."""
    transforms = training_transforms(dataset.train())
    found = gather(
        SimpleNamespace(dataset=dataset),
        device="cpu",
        generator=torch.Generator().manual_seed(0),
    )
    apply = BatchTransforms(transforms, found.normalization, torch.device("cpu"))
    batch = found.pixels[:1].expand(draws, -1, -1, -1)
    ours = apply(batch, torch.Generator().manual_seed(5))
    theirs = [dataset.train()[0][0] for _ in range(draws)]
    assert ours.dtype == theirs[0].dtype
    assert outcomes(ours) == outcomes(theirs)
    assert (len(outcomes(ours)) > 1) == several


FLIP = v1.RandomHorizontalFlip()
COLOUR = (77, np.float64(255), np.int64(0))
GREY = v1.Normalize(0.5, 0.2)
CASES = {
    "none": ("floats", [V2], [V2]),
    "PIL as usual": (
        "PIL",
        [v1.RandomCrop(SIZE, padding=1), FLIP, v1.ToTensor(), V1],
        [v1.ToTensor(), V1],
    ),
    "PIL, second version": (
        "PIL",
        [v2.RandomCrop(SIZE, padding=1), v2.ToImage(), v2.RandomHorizontalFlip(), SCALED, V2],
        [v2.ToImage(), SCALED, V2],
    ),
    "PIL filled": ("PIL", [v1.RandomCrop(SIZE, 1, fill=77), v1.ToTensor()], [v1.ToTensor()]),
    "bytes filled": ("bytes", [v2.RandomCrop(SIZE, 1, fill=77), SCALED, V2], [SCALED, V2]),
    "array": ("array", [v1.ToTensor(), FLIP, V1], [v1.ToTensor(), V1]),
    "colours before": ("bytes", [v2.RandomCrop(SIZE, 1, fill=COLOUR), SCALED, V2], [SCALED, V2]),
    "colours after": ("floats", [V2, v2.RandomCrop(SIZE, 1, fill=[0.5, -1.0, 0.2])], [V2]),
    "colours, one scale": ("floats", [v2.RandomCrop(SIZE, 1, fill=[0.1, 1.0, 0.0]), GREY], [GREY]),
    "filled before": ("bytes", [SCALED, v2.RandomCrop(SIZE, 1, fill=0.3), V2], [SCALED, V2]),
    "filled after": ("bytes", [SCALED, V2, v1.RandomCrop(SIZE, 1, fill=0.3)], [SCALED, V2]),
    "black after": ("bytes", [SCALED, V2, v1.RandomCrop(SIZE, 1), FLIP], [SCALED, V2]),
    "no normalize": ("floats", [v1.RandomCrop(SIZE, 1, fill=1)], []),
    "not by channel": ("floats", [v1.RandomCrop(SIZE, 1), GREY], None),
    "two borders": ("floats", [v1.RandomCrop(SIZE, (2, 1)), V1], [V1]),
    "two borders again": ("floats", [v2.RandomCrop(SIZE, (2, 1)), V1], [V1]),
    "four borders": ("floats", [v1.RandomCrop(SIZE, (2, 0, 0, 1)), V1], [V1]),
    "four borders again": ("floats", [v2.RandomCrop(SIZE, [2, 0, 0, 1]), V1], [V1]),
    "both flips": ("floats", [v2.RandomVerticalFlip(), FLIP, V1], [V1]),
    "certain": ("floats", [v1.RandomVerticalFlip(1.0), V1], [V1]),
    "crops of crops": ("floats", [v1.RandomCrop(SIZE, 1), V1, v1.RandomCrop(SIZE, (1, 0))], [V1]),
    "double": (
        "bytes",
        [v2.ToDtype(torch.float64, scale=True), FLIP, V2],
        [v2.ToDtype(torch.float64, scale=True), V2],
    ),
    "converted": ("bytes", [v1.ConvertImageDtype(torch.float32), FLIP, V1], [SCALED, V1]),
    "wrapped": (
        "PIL",
        [
            nn.Sequential(v2.Identity(), nn.Identity(), v1.RandomVerticalFlip(0.0)),
            v2.Compose([v2.PILToTensor(), v2.Compose([FLIP]), SCALED]),
            V1,
        ],
        [v1.Compose([v1.PILToTensor(), SCALED, V1])],
    ),
}


@pytest.mark.filterwarnings("ignore:.*ToTensor.*deprecated")
@pytest.mark.parametrize(("kind", "training", "evaluation"), CASES.values(), ids=CASES)
def test_batches_become_what_single_images_may_become(kind, training, evaluation):
    if evaluation is None:
        evaluation = training[-1:]
    compose = v1.Compose if kind == "PIL" else v2.Compose
    dataset = dataset_of(compose(training), compose(evaluation or [v2.Identity()]), kind=kind)
    draws = 3000 if training == CASES["crops of crops"][1] else 500
    certain = training in (CASES["none"][1], CASES["certain"][1])
    assert_same_outcomes(dataset, draws=draws, several=not certain)


def test_transforms_are_found_wherever_avalanche_keeps_them():
    training, evaluation = v2.Compose([FLIP, V2]), V2
    plain = dataset_of(training, evaluation, kind="floats")
    outer = AvalancheDataset(
        [dataset_of(None, None, kind="floats")],
        transform_groups={"train": (training, None), "eval": (evaluation, None)},
    )
    inner = AvalancheDataset(
        [Subset(ConcatDataset([Pictures("floats", V2)] * 2), [1, 5])],
        transform_groups={"train": FLIP, "eval": None},
    )
    for dataset in (
        plain,
        plain.freeze_transforms(),
        plain.concat(plain).subset([0, 7]),
        outer,
        outer.freeze_transforms(),
        inner,
    ):
        assert training_transforms(dataset.train()).changes == (Flip(-1, 0.5),)
        assert training_transforms(dataset.eval()).changes == ()
        assert_same_outcomes(dataset, draws=60)


def test_padding_is_in_values_that_the_network_sees():
    def only(dataset):
        (change,) = training_transforms(dataset).changes
        return change

    evaluation = v2.Compose([SCALED, V2])
    crop = v2.RandomCrop(SIZE, 1)
    black = tuple(-m / s for m, s in zip(MEAN, STD, strict=True))
    before = only(dataset_of(v2.Compose([SCALED, crop, V2]), evaluation))
    assert before == Crop((1, 1, 1, 1), pytest.approx(black))
    assert only(dataset_of(v2.Compose([crop, SCALED, V2]), evaluation)) == before
    assert only(dataset_of(v2.Compose([SCALED, V2, crop]), evaluation)).fill == (0.0,)


@pytest.mark.parametrize(
    "changes",
    [
        (Flip(-1, 1.0), Flip(-2, 0.5)),
        (Crop((2, 0, 1, 1), (0.5, -1.0, 0.2)), Flip(-1, 0.5)),
        (Crop((1, 1, 1, 1), (0.0,)), Crop((0, 1, 0, 0), (2.0, 1.0, 3.0))),
    ],
)
def test_changes_become_the_transform_that_they_are_found_in(changes):
    transform = torchvision_transform(changes, SIZE)
    dataset = dataset_of(transform, v2.Identity(), kind="floats")
    assert training_transforms(dataset.train()).changes == changes
    assert_same_outcomes(dataset, draws=500, several=True)


def test_a_crop_that_cannot_move_changes_nothing():
    training = v2.Compose([v1.RandomCrop(SIZE), v2.RandomCrop(SIZE, padding=0), V2])
    assert training_transforms(dataset_of(training, V2, kind="floats")).changes == ()


def twice(image):
    return 2 * image


class Noisy(v2.RandomHorizontalFlip):
    pass


JITTER = v2.ColorJitter(0.1)
BAD = {
    "other": (V2, [JITTER, V2], "applies ColorJitter when training.*pass `augment`.*leave"),
    "a function": (V2, [twice, V2], "applies twice when training"),
    "a subclass": (V2, [Noisy(), V2], "applies Noisy when training"),
    "chosen": (V2, [v2.RandomApply([FLIP]), V2], "applies RandomApply when training"),
    "evaluation": (v2.Compose([v2.Resize(SIZE), V2]), [V2], "applies Resize when evaluating"),
    "random evaluation": (v2.Compose([FLIP, V2]), [V2], "RandomHorizontalFlip when evaluating"),
    "other scale": (V2, [v2.Normalize(STD, MEAN)], r"Normalize\(\(0\.2.* but Normalize\(\(0\.5"),
    "no scale": (V2, [FLIP], r"no Normalize when training, but Normalize\(\(0\.5"),
    "two scales": (v2.Compose([V2, V2]), [V2, V2], "applies Normalize twice when evaluating"),
    "smaller": (V2, [v1.RandomCrop((2, 2)), V2], r"size \(2, 2\) to images of size \(3, 4\)"),
    "padding": (
        V2,
        [v2.RandomCrop(SIZE, 1, padding_mode="reflect"), V2],
        "RandomCrop with reflect padding",
    ),
    "negative": (V2, [v1.RandomCrop(SIZE, -1), V2], "RandomCrop with a negative padding"),
    "by kind": (V2, [v2.RandomCrop(SIZE, 1, fill={torch.Tensor: 1}), V2], r"`fill` {.*}, which is"),
    "by type": (V2, [v2.ToDtype({torch.Tensor: torch.float32}), V2], "converts .* to {.*without"),
    "to bytes": (V2, [v2.ToDtype(torch.uint8, scale=True), SCALED, V2], "float32 images to .*int8"),
}


@pytest.mark.parametrize(("evaluation", "training", "message"), BAD.values(), ids=BAD)
def test_other_transforms_are_refused(evaluation, training, message):
    dataset = dataset_of(v2.Compose(training), evaluation, kind="floats")
    with pytest.raises(ArgumentError, match="`experience` .*" + message):
        training_transforms(dataset.train())


def test_bytes_are_not_served():
    with pytest.raises(ArgumentError, match=r"a torch\.uint8 tensor when evaluating.*ToDtype\("):
        training_transforms(dataset_of(FLIP, None))
    with pytest.raises(ArgumentError, match=r"a torch\.uint8 tensor when training"):
        training_transforms(dataset_of(FLIP, SCALED))
    with pytest.raises(ArgumentError, match=r"yields a picture when evaluating.*ToTensor\(\)"):
        training_transforms(dataset_of(FLIP, None, kind="PIL"))
    unscaled = v2.ToDtype(torch.float32)
    with pytest.raises(ArgumentError, match="uint8 images to torch.float32 without scaling"):
        training_transforms(dataset_of(unscaled, unscaled))


def test_labels_must_be_the_same_when_training_and_evaluating():
    dataset = dataset_of((V2, int), (V2, None), kind="floats")
    with pytest.raises(ArgumentError, match="`experience` changes labels in another way when tr"):
        training_transforms(dataset.train())
    dataset = dataset_of((V2, int), (V2, int), kind="floats")
    assert training_transforms(dataset.train()).changes == ()


def test_random_transforms_of_the_inner_dataset_are_refused():
    dataset = dataset_of(None, None, kind="floats", inside=v2.Compose([FLIP, V2]))
    with pytest.raises(ArgumentError, match="RandomHorizontalFlip inside of its own dataset"):
        training_transforms(dataset)


def test_normalising_inside_and_outside_is_refused():
    dataset = dataset_of(v2.Compose([FLIP, V2]), V2, kind="floats", inside=V2)
    with pytest.raises(ArgumentError, match="`experience` applies Normalize twice"):
        training_transforms(dataset)


def test_parts_with_other_transforms_are_refused():
    first = dataset_of(v2.Compose([FLIP, V2]), V2, kind="floats")
    other = dataset_of(V2, V2, kind="floats")
    with pytest.raises(ArgumentError, match="joins images that are transformed in different ways"):
        training_transforms(first.concat(other))
    assert training_transforms(first.concat(first)).changes == (Flip(-1, 0.5),)
