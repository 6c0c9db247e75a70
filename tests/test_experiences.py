import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from torch.utils.data import Dataset, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dc_replay import experiences
from dc_replay.errors import ArgumentError
from dc_replay.experiences import classes_of, find_normalize, gather
from dc_replay.pixels import Normalization

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZATION = Normalization(MEAN, STD)


class Pictures(Dataset):
    """Labelled images held in memory, the way torchvision's datasets are; counts its reads."""

    def __init__(self, images, targets, transform=None):
        self.images, self.targets, self.transform, self.reads = images, targets, transform, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.targets[index]


def pixels_of(count, *, seed=0, shape=(3, 8, 8)):
    return torch.randint(
        256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def experience_of(images, targets=None, *, evaluation=None, training=None):
    """One experience, its dataset made the way users make theirs."""
    targets = list(range(len(images))) if targets is None else targets
    dataset = as_classification_dataset(
        Pictures(images, targets), transform_groups={"train": training, "eval": evaluation}
    )
    return SimpleNamespace(dataset=dataset)


def gathered(experience, **options):
    options = {"device": "cpu", "generator": torch.Generator().manual_seed(0), **options}
    return gather(experience, **options)


def normalised(pixels):
    return NORMALIZATION.apply(pixels.float() / 255)


def test_images_come_back_as_the_bytes_they_were(device):
    pixels = pixels_of(300)
    images = [v1.functional.to_pil_image(image) for image in pixels]
    evaluation = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
    training = v1.Compose([v1.RandomHorizontalFlip(1.0), evaluation])
    found = gathered(experience_of(images, evaluation=evaluation, training=training), device=device)
    assert found.pixels.dtype == torch.uint8 and found.pixels.device.type == device.type
    assert torch.equal(found.pixels.cpu(), pixels)
    assert found.labels.dtype == torch.int64 and found.labels.tolist() == list(range(300))
    assert found.labels.device == found.pixels.device
    assert found.normalization == NORMALIZATION
    assert found.tasks is None and not found.items.tensor_labels


NORMALIZES = {
    "v1": v1.Normalize(MEAN, STD),
    "v2": v2.Normalize(MEAN, STD),
    "v1 compose": v1.Compose([v1.RandomHorizontalFlip(0.0), v1.Normalize(MEAN, STD)]),
    "v2 compose": v2.Compose([v2.Identity(), v2.Normalize(list(MEAN), list(STD))]),
    "nested": v1.Compose([v2.Compose([v2.Compose([v2.Normalize(MEAN, STD)])]), v2.Identity()]),
    "sequential": torch.nn.Sequential(v2.Identity(), v2.Normalize(MEAN, STD)),
    "tensors": v1.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
}


@pytest.mark.parametrize("evaluation", NORMALIZES.values(), ids=NORMALIZES)
def test_normalize_is_found_among_the_transforms(evaluation):
    pixels = pixels_of(4)
    for group in (evaluation, (evaluation, None), (evaluation, int)):
        found = gathered(experience_of(pixels / 255, evaluation=group))
        assert torch.equal(found.pixels, pixels)
        torch.testing.assert_close(torch.tensor(found.normalization.mean), torch.tensor(MEAN))
        torch.testing.assert_close(torch.tensor(found.normalization.std), torch.tensor(STD))


def test_classes_are_those_of_the_items():
    """Target transforms change them, and what Avalanche lists they do not."""
    data = Pictures(pixels_of(4) / 255, [0, 1, 1, 0])
    shifted = {group: (None, lambda label: label + 2) for group in ("train", "eval")}
    plain, moved = (
        class_incremental_benchmark(
            {"train": as_classification_dataset(data, transform_groups=groups)}, num_experiences=1
        ).train_stream[0]
        for groups in (None, shifted)
    )
    state = torch.get_rng_state()
    assert classes_of(plain) == {0, 1} and classes_of(moved) == {2, 3}
    assert set(moved.classes_in_this_experience) == {0, 1}
    assert torch.equal(torch.get_rng_state(), state)
    halved = {group: (None, lambda label: label // 2) for group in ("train", "eval")}
    data = Pictures(pixels_of(5) / 255, [0, 1, 2, 3, 4])  # of which the first stays 0
    dataset = as_classification_dataset(data, transform_groups=halved)
    assert classes_of(SimpleNamespace(dataset=dataset)) == {0, 1, 2}


def test_normalize_is_found_inside_the_dataset_itself():
    inner = Pictures(pixels_of(4) / 255, [0, 1, 2, 3], v2.Normalize(MEAN, STD))
    for dataset in (
        AvalancheDataset([inner]),
        AvalancheDataset([Subset(inner, [0, 2])]),
        AvalancheDataset([AvalancheDataset([inner]), AvalancheDataset([inner])]).subset([1, 3, 5]),
        AvalancheDataset([inner]).freeze_transforms(),
    ):
        assert find_normalize(dataset, 3) == NORMALIZATION


class Plain:
    """A dataset that is none of torch's."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(pixels_of(4)[index] / 255), index


def test_normalize_is_found_inside_a_dataset_that_is_none_of_torchs():
    inner = Plain(v2.Normalize(MEAN, STD))
    for dataset in (Subset(inner, [0, 2]), Subset(Subset(inner, [0, 1, 3]), [1])):
        assert find_normalize(AvalancheDataset([dataset]), 3) == NORMALIZATION


def test_normalize_is_found_when_frozen_and_after_concatenation():
    first = experience_of(pixels_of(4) / 255, evaluation=v2.Normalize(MEAN, STD)).dataset
    assert find_normalize(first.freeze_transforms(), 3) == NORMALIZATION
    assert find_normalize(first.concat(first).subset([0, 7]), 3) == NORMALIZATION


class Named(v1.Compose):
    """A composition of a user's own that does what others do."""


class Shuffled(v1.Compose):
    """One that does something else."""

    def __call__(self, image):
        for transform in reversed(self.transforms):
            image = transform(image)
        return image


def test_normalize_is_found_in_compositions_that_do_as_they_say():
    steps = [v1.Normalize([0.0] * 3, [1.0] * 3), v1.Normalize(MEAN, STD)]
    for kind, expected in ((Named, NORMALIZATION), (Shuffled, None)):
        inner = Pictures(pixels_of(4) / 255, [0, 1, 2, 3], kind(steps))
        assert find_normalize(AvalancheDataset([inner]), 3) == expected


def test_the_last_normalize_counts():
    stack = v1.Compose([v1.Normalize([0.0] * 3, [1.0] * 3), v1.Normalize(MEAN, STD)])
    pixels = pixels_of(4)
    found = gathered(experience_of(pixels / 255, evaluation=stack))
    assert found.normalization == NORMALIZATION
    assert torch.equal(found.pixels, pixels)


def test_a_normalize_of_one_value_is_for_every_channel():
    pixels = pixels_of(4)
    found = gathered(experience_of(pixels / 255, evaluation=v1.Normalize(0.5, 0.25)))
    assert found.normalization == Normalization((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(found.pixels, pixels)


def test_parts_normalised_differently_use_what_the_data_say():
    part = experience_of(pixels_of(4) / 255, evaluation=v2.Normalize(MEAN, STD)).dataset
    other = experience_of(pixels_of(4) / 255, evaluation=v2.Normalize(STD, MEAN)).dataset
    both = part.concat(other)
    assert find_normalize(both, 3) is None
    found = gathered(SimpleNamespace(dataset=both))
    seen = torch.stack([both.eval()[i][0] for i in range(8)])
    back = found.normalization.apply(found.pixels / 255)
    assert (back - seen).abs().max() <= 0.51 / 255 / min(found.normalization.std)


def test_a_normalize_that_does_not_lead_to_images_gives_way_to_the_range():
    """Without ToTensor's division by 255, the bytes themselves were normalised."""
    pixels = pixels_of(20)
    experience = experience_of(pixels.float(), evaluation=v2.Normalize([127.0] * 3, [60.0] * 3))
    found = gathered(experience)
    assert found.normalization != Normalization((127.0,) * 3, (60.0,) * 3)
    back = found.normalization.apply(found.pixels / 255)
    torch.testing.assert_close(back, (pixels.float() - 127) / 60, atol=0.01, rtol=0)


def test_images_in_0_1_without_normalize_stay_as_they_are():
    pixels = pixels_of(5)
    found = gathered(experience_of(pixels / 255))
    assert found.normalization == Normalization.identity(3)
    assert torch.equal(found.pixels, pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_images_are_images_too(dtype):
    pixels = pixels_of(5)
    found = gathered(experience_of((pixels / 255).to(dtype)))
    assert (found.pixels.int() - pixels.int()).abs().max() <= (1 if dtype.itemsize == 2 else 0)


def test_data_of_any_range_use_the_range_of_each_channel():
    images = normalised(pixels_of(50)) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    images[:, 2] = 7.0
    found = gathered(experience_of(images))
    low, high = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
    back = found.normalization.apply(found.pixels / 255)
    step = (high - low).view(1, 3, 1, 1) / 255
    assert ((back - images).abs() <= 0.51 * step + 1e-5).all()


def test_bytes_use_the_range_of_bytes():
    pixels = pixels_of(5).clamp(10, 200)
    found = gathered(experience_of(pixels))
    assert torch.equal(found.pixels, pixels)
    torch.testing.assert_close(found.normalization.apply(pixels / 255), pixels.float())


def test_a_given_normalization_is_used():
    pixels = pixels_of(5)
    found = gathered(experience_of(normalised(pixels)), normalization=NORMALIZATION)
    assert found.normalization == NORMALIZATION and torch.equal(found.pixels, pixels)


def test_a_few_values_out_of_range_are_clipped_with_a_warning():
    images = pixels_of(20) / 255
    images[3, 0, 0, 0] = 1.1
    with pytest.warns(UserWarning, match=r"0\.03% of .* lie outside .* 0 to 1\.1 .*from_range"):
        found = gathered(experience_of(images), normalization=Normalization.identity(3))
    assert found.pixels[3, 0, 0, 0] == 255


def test_the_range_is_that_of_all_images_however_many():
    images = torch.full((600, 3, 8, 8), 3.0)
    images[100, 0, 0, 0], images[599, 1, 0, 0], images[5, 2, 0, 0] = 9.0, -5.0, 4.0
    found = gathered(experience_of(images, [0] * 600))
    channels = zip(found.normalization.mean, found.normalization.std, strict=True)
    ends = [(float(-m / s), float((1 - m) / s)) for m, s in channels]
    for (low, high), expected in zip(ends, [(3, 9), (-5, 3), (3, 4)], strict=True):
        assert (low, high) == pytest.approx(expected, abs=1e-4)
    assert found.pixels[100, 0, 0, 0] == 255 and found.pixels[599, 1, 0, 0] == 0
    with pytest.raises(ArgumentError, match="leaves the images between -5 and 9 instead"):
        gathered(experience_of(images, [0] * 600), normalization=Normalization.identity(3))


@pytest.mark.parametrize(
    ("share", "value", "found"),
    [
        (0.04, 1.1, "clipped"),
        (0.06, 1.1, "refused"),
        (0.01, 1.49, "clipped"),
        (0.01, 1.51, "refused"),
        (0.01, -0.49, "clipped"),
        (0.01, -0.51, "refused"),
        # Nearer than half a step to the range, which rounding to bytes takes away in any case.
        (0.01, 1 + 0.4 / 255, "kept"),
        (0.01, 1 + 0.6 / 255, "clipped"),
        (0.01, -0.6 / 255, "clipped"),
    ],
)
def test_how_much_may_lie_out_of_the_range(share, value, found, recwarn):
    images = torch.full((1, 1, 50, 40), 0.5)
    images.view(-1)[: int(share * 2000)] = value
    options = {"normalization": Normalization.identity(1)}
    if found == "refused":
        with pytest.raises(ArgumentError, match="`normalization`, given or found"):
            gathered(experience_of(images), **options)
    else:
        gathered(experience_of(images), **options)
        assert any("clipped" in str(w.message) for w in recwarn) == (found == "clipped")


def test_without_normalize_nothing_is_clipped():
    images = pixels_of(20) / 255
    images[3, 0, 0, 0] = 1.1  # which a Normalize that is found would clip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gathered(experience_of(images))
    back = found.normalization.apply(found.pixels / 255)
    torch.testing.assert_close(back, images, atol=0.6 * 1.1 / 255, rtol=0)


def test_of_normalizes_inside_and_outside_the_last_counts():
    inner = Pictures(pixels_of(4) / 255, [0, 1, 2, 3], v2.Normalize([0.1] * 3, [0.5] * 3))
    dataset = as_classification_dataset(
        inner, transform_groups={group: v2.Normalize(MEAN, STD) for group in ("train", "eval")}
    )
    assert find_normalize(dataset, 3) == NORMALIZATION


def test_classes_are_read_when_evaluating_and_draw_nothing():
    def noisy(label):
        return label + 0 * int(torch.randint(5, ()))

    groups = {"train": (None, lambda label: label + 7), "eval": (None, noisy)}
    data = Pictures(pixels_of(3) / 255, [0, 1, 1])
    dataset = as_classification_dataset(data, transform_groups=groups)
    state = torch.get_rng_state()
    assert classes_of(SimpleNamespace(dataset=dataset)) == {0, 1}
    assert torch.equal(torch.get_rng_state(), state)


def test_where_there_is_room_is_asked_for_all_images(monkeypatch):
    asked = []

    def home(resident, count, *, device, **options):
        asked.append((resident, count))
        return device

    monkeypatch.setattr(experiences, "home", home)
    gathered(experience_of(pixels_of(7) / 255), resident="auto")
    assert asked == [("auto", 7 * 3 * 8 * 8)]


def test_each_image_is_read_once():
    for evaluation in (v2.Normalize(MEAN, STD), None):
        pictures = Pictures(pixels_of(300) / 255, [0] * 300)
        dataset = as_classification_dataset(
            pictures, transform_groups={"train": None, "eval": evaluation}
        )
        gathered(SimpleNamespace(dataset=dataset))
        assert pictures.reads == 300


def test_items_of_two_values():
    targets = [0, 0, 1, 1, 2, 2, 3, 3]
    data = {
        name: as_classification_dataset(Pictures(pixels_of(8) / 255, targets))
        for name in ("train", "test")
    }
    stream = class_incremental_benchmark(
        data, num_experiences=2, class_order=[3, 1, 0, 2]
    ).train_stream
    found = gathered(stream[0])
    assert found.tasks is None and not found.items.tensor_labels
    assert sorted(found.labels.tolist()) == [1, 1, 3, 3]


def test_items_of_three_values():
    pictures = Pictures(pixels_of(8) / 255, [0, 0, 1, 1, 2, 2, 3, 3])
    stream = nc_benchmark(
        pictures, pictures, 2, task_labels=True, fixed_class_order=[3, 1, 0, 2]
    ).train_stream
    found = gathered(stream[1])
    assert found.tasks == {0: 1, 2: 1} and found.labels.tolist() == [0, 0, 2, 2]


def test_labels_may_be_tensors():
    tensors = torch.utils.data.TensorDataset(pixels_of(3) / 255, torch.tensor([2, 0, 1]))
    tensors.targets = [2, 0, 1]
    found = gathered(SimpleNamespace(dataset=as_classification_dataset(tensors)))
    assert found.items.tensor_labels and found.labels.tolist() == [2, 0, 1]


def test_random_states_are_left_alone_and_do_not_matter():
    def noisy(image):
        random.random(), np.random.rand()  # noqa: NPY002
        return (image + 0.1 * torch.rand(3, 1, 1)).clamp(0, 1)

    experience = experience_of(pixels_of(5) / 255, evaluation=noisy)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
        results.append(gathered(experience).pixels)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert str(np.random.get_state()) == before[2]  # noqa: NPY002
    assert torch.equal(*results)


def some(**changed):
    """Images of which one, or one label, is out of order."""
    images, targets = list(pixels_of(4) / 255), [0, 0, 1, 1]
    if "image" in changed:
        images[2] = changed["image"]
    if "target" in changed:
        targets[2] = changed["target"]
    return SimpleNamespace(dataset=as_classification_dataset(Pictures(images, targets)))


BAD = {
    "NaN": ({"image": torch.full((3, 8, 8), torch.nan)}, "NaN or infinite pixels in image 2"),
    "inf": ({"image": torch.full((3, 8, 8), torch.inf)}, "NaN or infinite pixels in image 2"),
    "shape": (
        {"image": torch.zeros(3, 8, 9)},
        r"image 0 is torch\.float32 \[3, 8, 8\], image 2 is torch\.float32 \[3, 8, 9\]; resize",
    ),
    "type": ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "image 2 is torch.uint8"),
    "no image": ({"image": torch.zeros(7)}, r"tensor of shape \[7\] as image 2.*only images"),
    "integers": ({"image": torch.zeros(3, 8, 8).long()}, r"int64 tensor .*as image 2"),
    "empty": ({"image": torch.zeros(3, 0, 8)}, r"shape \[3, 0, 8\] as image 2"),
    "PIL": ({"image": v1.functional.to_pil_image(torch.zeros(3, 8, 8))}, r"ToTensor\(\)"),
    "text": ({"target": "cat"}, r"yields 'cat' \(str\) as the label of item 2.*single integer"),
    "fraction": ({"target": 1.5}, r"yields 1\.5 \(float\) as the label of item 2"),
    "soft label": ({"target": torch.rand(4)}, r"float32 tensor of shape \[4\] as the label"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_items_are_refused(changed, message):
    with pytest.raises(ArgumentError, match=message):
        gathered(some(**changed))


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (v2.Compose([v2.RandomCrop(8, padding=4), v2.Normalize([0.5], [0.2])]), "RandomCrop"),
        (v1.Compose([v1.ColorJitter(0.5), v1.RandomErasing()]), "ColorJitter, RandomErasing"),
        (v2.Resize(8), None),
    ],
)
def test_random_transforms_inside_of_a_dataset_are_told_of(transform, named):
    data = Pictures(torch.rand(2, 3, 8, 8), [0, 1], transform)
    experience = SimpleNamespace(dataset=as_classification_dataset(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gather(experience, device="cpu", generator=torch.Generator().manual_seed(0))
    said = [str(w.message) for w in caught if "own dataset applies" in str(w.message)]
    assert len(said) == (named is not None)
    assert named is None or f"applies {named} to every image" in said[0]


def test_an_experience_without_images_is_refused():
    dataset = some().dataset.subset([])
    with pytest.raises(ArgumentError, match="`experience` holds no images"):
        gathered(SimpleNamespace(dataset=dataset))


def test_something_else_than_an_experience_is_refused():
    with pytest.raises(ArgumentError, match="`experience` is a int without an Avalanche dataset"):
        gathered(3)


def test_further_values_in_items_are_refused():
    dataset = AvalancheDataset([Subset([(torch.zeros(3, 8, 8), 0, 1, 2)], [0])])
    with pytest.raises(ArgumentError, match="yields 4 values as item 0"):
        gathered(SimpleNamespace(dataset=dataset))


def test_a_class_with_two_task_labels_is_refused():
    tensors = torch.utils.data.TensorDataset(pixels_of(4) / 255, torch.tensor([0, 0, 1, 1]))
    tensors.targets = [0, 0, 1, 1]
    stream = nc_benchmark(
        tensors, tensors, 2, task_labels=True, class_ids_from_zero_in_each_exp=True
    ).train_stream
    both = SimpleNamespace(dataset=stream[0].dataset.concat(stream[1].dataset))
    with pytest.raises(
        ArgumentError, match="class 0 with task label 1, but .* task label 0 before"
    ):
        gathered(both)


def test_a_normalization_that_does_not_fit_is_refused():
    with pytest.raises(
        ArgumentError, match="`normalization`, given .* has mean .* between -.* Nor"
    ):
        gathered(experience_of(normalised(pixels_of(4))), normalization=Normalization.identity(3))
    with pytest.raises(ArgumentError, match="this normalization is for"):
        gathered(experience_of(pixels_of(4) / 255), normalization=Normalization.identity(1))
