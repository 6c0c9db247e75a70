import pytest
import torch
from torch.nn import functional as F

from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization
from dc_replay.sampling import RealImages, nearest_to_centres
from dc_replay.selection import ClusterCentres, Forgetting, Herding, KCenter, RandomImages

SELECTIONS = [RandomImages(), Herding(2), KCenter(2), Forgetting(3), ClusterCentres(2)]
every_selection = pytest.mark.parametrize(
    "selection", SELECTIONS, ids=[type(s).__name__ for s in SELECTIONS]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class FakeLearner:
    """Answers with features and counts that were made up, and notes what it was asked."""

    def __init__(self, real, features=None):
        self.asked = []
        self._real = real
        drawn = torch.randn(len(real.targets), 6, dtype=torch.float64, generator=seeded(5))
        self.values = (drawn if features is None else features).to(real.targets.device)
        counts = torch.randint(4, (len(real.targets),), generator=seeded(6))
        self.counts = counts.to(real.targets.device)

    def train(self, epochs):
        self.asked.append(("train", epochs))

    def features(self):
        self.asked.append(("features",))
        return [self.values[rows] for rows in self._real.rows]

    def forgotten(self, epochs):
        self.asked.append(("forgotten", epochs))
        return self.counts


def real_images(counts, device="cpu"):
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.randperm(len(targets), generator=seeded(1))].to(device)
    images = torch.zeros(len(targets), 1, 2, 2, dtype=torch.uint8, device=device)
    return RealImages(images, targets, tuple(range(len(counts))), Normalization.identity(1))


def slow_herding(features, count):
    """Greedily keep the mean of what is chosen near to the mean of all."""
    features = [row / row.norm() for row in features]
    mean = sum(features) / len(features)
    chosen = []
    for _ in range(count):
        free = [p for p in range(len(features)) if p not in chosen]
        chosen.append(
            min(
                free,
                key=lambda p: float(
                    (sum(features[q] for q in [*chosen, p]) / (len(chosen) + 1) - mean).norm()
                ),
            )
        )
    return chosen


def slow_k_center(features, count):
    """Greedily add what is farthest from all that is chosen."""
    mean = sum(features) / len(features)
    chosen = [min(range(len(features)), key=lambda p: float((features[p] - mean).norm()))]
    while len(chosen) < count:
        free = [p for p in range(len(features)) if p not in chosen]
        chosen.append(
            max(free, key=lambda p: min(float((features[p] - features[q]).norm()) for q in chosen))
        )
    return chosen


@pytest.mark.parametrize(
    ("selection", "slow"), [(Herding(3), slow_herding), (KCenter(3), slow_k_center)]
)
def test_greedy_choices_equal_a_loop(selection, slow, device):
    real = real_images([11, 6, 1], device)
    learner = FakeLearner(real)
    chosen = selection.choose(real, [7, 6, 1], learner, seeded())
    assert learner.asked == [("train", 3), ("features",)]
    for rows, index, count in zip(real.rows, chosen, [7, 6, 1], strict=True):
        expected = slow(list(learner.values[rows].cpu()), count)
        assert index.tolist() == rows[torch.tensor(expected, device=device)].tolist()


def test_herding_normalises_features():
    real = real_images([9])
    learner = FakeLearner(real)
    first = Herding().choose(real, [5], learner, seeded())
    learner.values = learner.values * torch.arange(1, 10, dtype=torch.float64)[:, None]
    assert torch.equal(Herding().choose(real, [5], learner, seeded())[0], first[0])
    torch.testing.assert_close(
        F.normalize(learner.values).norm(dim=1), torch.ones(9, dtype=torch.float64)
    )


def test_forgetting_takes_the_most_forgotten_and_leaves_ties_to_chance(device):
    real = real_images([12, 5], device)
    learner = FakeLearner(real)
    chosen = Forgetting(4).choose(real, [6, 5], learner, seeded())
    assert learner.asked == [("forgotten", 4)]
    for rows, index in zip(real.rows, chosen, strict=True):
        counts = learner.counts[index].tolist()
        assert counts == sorted(learner.counts[rows].tolist(), reverse=True)[: len(index)]
    learner.counts = torch.zeros_like(learner.counts)
    choices = {
        tuple(Forgetting(4).choose(real, [3, 3], learner, seeded(s))[0].tolist()) for s in range(6)
    }
    assert len(choices) > 1


def test_cluster_centres_are_as_many_clusters_as_images(device):
    real = real_images([14, 8], device)
    learner = FakeLearner(real)
    chosen = ClusterCentres(2).choose(real, [4, 3], learner, seeded(9))
    assert learner.asked == [("train", 2), ("features",)]
    generator = seeded(9)
    for rows, index, count in zip(real.rows, chosen, [4, 3], strict=True):
        centres = rows[nearest_to_centres(learner.values[rows], count, generator)]
        assert index[: len(centres)].tolist() == centres.tolist()


def test_random_images_ask_nothing_and_are_equally_likely():
    real = real_images([6])
    learner = FakeLearner(real)
    seen = torch.zeros(6)
    for seed in range(300):
        index = RandomImages().choose(real, [2], learner, seeded(seed))[0]
        seen += torch.bincount(torch.searchsorted(real.rows[0], index), minlength=6)
    assert seen.min() > 65 and seen.max() < 135
    assert not learner.asked


@every_selection
@pytest.mark.parametrize("counts", [[1, 1, 1], [9, 4, 1], [3, 2, 1], [12, 9, 5]])
def test_exactly_as_many_images_of_the_right_class_are_chosen(selection, counts, device):
    real = real_images([9, 4, 1], device)
    chosen = selection.choose(real, counts, FakeLearner(real), seeded())
    for label, (index, count, rows) in enumerate(zip(chosen, counts, real.rows, strict=True)):
        assert index.dtype == torch.int64 and index.device == real.images.device
        assert len(index) == count
        assert (real.targets[index] == label).all()
        # None twice while there is one that is not chosen yet.
        assert len(index.unique()) == min(count, len(rows))


@pytest.mark.parametrize(
    "selection", SELECTIONS[:4], ids=[type(s).__name__ for s in SELECTIONS[:4]]
)
def test_a_prefix_is_the_smaller_choice(selection):
    real = real_images([9, 7])
    whole = selection.choose(real, [7, 7], FakeLearner(real), seeded())
    for n in range(1, 7):
        fewer = selection.choose(real, [n, n], FakeLearner(real), seeded())
        assert all(torch.equal(a[:n], b) for a, b in zip(whole, fewer, strict=True))


@every_selection
def test_duplicates_do_not_lead_to_one_image_twice(selection):
    real = real_images([8, 6])
    features = torch.ones(14, 3, dtype=torch.float64)
    features[::2] = 2.5
    for seed in range(5):
        chosen = selection.choose(real, [5, 6], FakeLearner(real, features), seeded(seed))
        assert [len(index.unique()) for index in chosen] == [5, 6]


@every_selection
def test_features_of_zero_do_not_matter(selection):
    real = real_images([8, 6])
    chosen = selection.choose(
        real, [5, 6], FakeLearner(real, torch.zeros(14, 3, dtype=torch.float64)), seeded()
    )
    assert [len(index.unique()) for index in chosen] == [5, 6]


@every_selection
def test_a_seed_gives_one_choice_and_the_global_generator_is_left_alone(selection):
    real = real_images([9, 4])
    state = torch.get_rng_state()
    first, second = (
        selection.choose(real, [11, 3], FakeLearner(real), seeded(2)) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), state)


def test_images_that_complete_a_choice_are_drawn_at_random():
    real = real_images([8, 6])
    alike = torch.ones(14, 3, dtype=torch.float64)  # one cluster, so one image is chosen
    completed = [
        ClusterCentres(2).choose(real, [5, 6], FakeLearner(real, alike), seeded(seed))[0]
        for seed in range(6)
    ]
    assert all(len(rows.unique()) == 5 for rows in completed)
    assert len({tuple(rows.tolist()) for rows in completed}) > 1


@pytest.mark.parametrize("selection", [Herding, KCenter, ClusterCentres])
def test_negative_epochs_are_refused(selection):
    selection(0)
    with pytest.raises(ArgumentError, match="`epochs` is -1, but must be at least 0 epochs"):
        selection(-1)


def test_forgetting_needs_two_epochs():
    with pytest.raises(ArgumentError, match="`epochs` is 1, but an image can be forgotten only"):
        Forgetting(1)
