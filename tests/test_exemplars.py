import pytest
import torch

from dc_replay.errors import ArgumentError
from dc_replay.exemplars import Exemplars


@pytest.fixture
def exemplars(device):
    """Three images of class 7, then one of class 2, then two of class 5; each of its own shade."""
    shades = torch.arange(6, dtype=torch.uint8, device=device)
    labels = torch.tensor([7, 7, 7, 2, 5, 5], device=device)
    return Exemplars(shades.view(6, 1, 1, 1).expand(6, 3, 4, 5).contiguous(), labels)


def shades(exemplars):
    return exemplars.pixels[:, 0, 0, 0].tolist()


def test_it_tells_what_it_holds(exemplars):
    assert len(exemplars) == 6
    assert exemplars.counts == {7: 3, 2: 1, 5: 2}
    assert exemplars.classes == (7, 2, 5)
    assert exemplars.nbytes == 6 * 3 * 4 * 5
    assert exemplars.of_class(5)[:, 0, 0, 0].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("quotas", "kept"),
    [
        ({7: 2, 2: 1, 5: 1}, [0, 1, 3, 4]),
        ({7: 9, 2: 9, 5: 9}, [0, 1, 2, 3, 4, 5]),
        ({5: 1}, [4]),
        ({7: 0, 2: 1}, [3]),
        ({}, []),
        ({99: 3}, []),
    ],
)
def test_a_prefix_keeps_the_first_images_of_each_class(exemplars, quotas, kept):
    prefix = exemplars.prefix(quotas)
    assert shades(prefix) == kept
    assert prefix.labels.tolist() == [[7, 7, 7, 2, 5, 5][shade] for shade in kept]
    assert prefix.pixels.device == exemplars.pixels.device


def test_a_prefix_is_a_new_allocation(exemplars):
    prefix = exemplars.prefix({7: 1})
    assert prefix.pixels.untyped_storage().nbytes() == prefix.nbytes
    prefix.pixels.fill_(255)
    assert shades(exemplars) == [0, 1, 2, 3, 4, 5]


def test_none_at_all_can_be_held():
    empty = Exemplars(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    assert len(empty) == empty.nbytes == 0
    assert empty.classes == ()
    assert len(empty.prefix({1: 1})) == 0


@pytest.mark.parametrize("quota", [-1, 1.5, "x"])
def test_a_quota_that_counts_nothing_is_refused(exemplars, quota):
    with pytest.raises(ArgumentError, match=rf"`quotas\[2\]` is {quota!r}; pass a whole number"):
        exemplars.prefix({7: 1, 2: quota})


def test_it_moves_between_devices(exemplars, device):
    moved = exemplars.to("cpu").to(device)
    assert moved.pixels.device == exemplars.pixels.device
    assert torch.equal(moved.pixels, exemplars.pixels)
    assert torch.equal(moved.labels, exemplars.labels)


@pytest.mark.parametrize("label", [5.5, 5.0, "5"])
def test_a_class_is_a_whole_number(exemplars, label):
    with pytest.raises(ArgumentError, match=f"`label` is {label}, but the classes held are"):
        exemplars.of_class(label)


def test_a_class_that_is_not_held_is_an_error(exemplars):
    with pytest.raises(ArgumentError, match="`label` is 3, but the classes held are \\(7, 2, 5\\)"):
        exemplars.of_class(3)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=int), "`pixels` must be uint8.*float32"),
        (torch.zeros(3, 4, 4).byte(), torch.zeros(3, dtype=int), "`pixels` must be uint8 of shape"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), "`labels` must be int64.*float32"),
        (
            torch.zeros(2, 3, 4, 4).byte(),
            torch.zeros(3, dtype=int),
            "`labels` must be int64 of shape \\[2\\].*\\[3\\]",
        ),
        (
            torch.zeros(3, 3, 4, 4).byte(),
            torch.tensor([1, 2, 1]),
            "`labels` must hold each class's images in one run",
        ),
        (
            torch.zeros(2, 3, 4, 4).byte(),
            torch.zeros(2, dtype=int, device="meta"),
            "`labels` is on meta and `pixels` on cpu",
        ),
    ],
)
def test_other_shapes_types_devices_and_orders_are_refused(pixels, labels, message):
    with pytest.raises(ArgumentError, match=message):
        Exemplars(pixels, labels)
