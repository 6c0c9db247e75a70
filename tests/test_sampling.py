import fast_pytorch_kmeans
import pytest
import torch

from dc_replay.errors import ArgumentError
from dc_replay.pixels import Normalization, dequantise
from dc_replay.sampling import (
    RealImages,
    Representative,
    Uniform,
    _kmeans,
    fill,
    nearest_in_each,
    nearest_to_centres,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def real_images(counts, *, device="cpu", seed=0, normalization=None):
    """So many images [2, 3, 3] of each class, classes interleaved, each image unlike the others."""
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.randperm(len(targets), generator=seeded(seed))]
    shape = (len(targets), 2, 3, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=seeded(seed))
    return RealImages(
        images.to(device),
        targets.to(device),
        tuple(range(10, 10 + len(counts))),
        normalization or Normalization((0.4, 0.6), (0.5, 0.25)),
    )


def flat(images):
    return images.flatten(1)


def counter():
    """An embedding that counts its calls."""

    def embed(images):
        embed.calls += 1
        return flat(images)

    embed.calls = 0
    return embed


def test_real_images_are_grouped_by_class_and_normalised(device):
    real = real_images([4, 1, 3], device=device)
    assert [len(rows) for rows in real.rows] == [4, 1, 3]
    for label, rows in enumerate(real.rows):
        assert real.targets[rows].tolist() == [label] * len(rows)
        assert rows.tolist() == sorted(rows.tolist())
    index = torch.tensor([5, 0, 5], device=device)
    expected = real.normalization.apply(dequantise(real.images[index]))
    torch.testing.assert_close(real.normalised(index), expected)


def test_features_by_class_follow_the_rows_whatever_the_batches():
    real = real_images([4, 1, 3])
    weight = torch.randn(18, 5, generator=seeded(), requires_grad=True)

    def embed(images):
        return flat(images) @ weight

    for features, rows in zip(real.features_by_class(embed), real.rows, strict=True):
        torch.testing.assert_close(features, embed(real.normalised(rows)))
        assert not features.requires_grad
    small, large = real.outputs(embed, batch=3), real.outputs(embed)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(large, torch.cat(real.features_by_class(embed)))


def test_batches_have_one_size_for_all_classes_and_for_some():
    sizes = []

    def embed(images):
        sizes.append(len(images))
        return flat(images)

    real = real_images([4, 1, 3])
    real.outputs(embed, batch=3)
    real.outputs(embed, batch=3, classes=range(1, 2))
    assert sizes == [3] * 4


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20])
def test_fill_uses_every_row_before_any_again(count, device):
    rows = torch.tensor([3, 8, 9, 11, 20, 21], device=device)
    chosen = fill(rows, count, seeded())
    assert len(chosen) == count and chosen.device == rows.device
    times = [int((chosen == row).sum()) for row in rows]
    assert sum(times) == count and max(times) - min(times) <= 1


def test_fill_orders_each_pass_anew():
    rows = torch.arange(20)
    first, second = fill(rows, 40, seeded()).split(20)
    assert not torch.equal(first, second) and torch.equal(second.sort().values, rows)


def test_uniform_draws_without_replacement_and_fills(device):
    real = real_images([12, 3, 1], device=device)
    drawn = Uniform(8).draw(real, None, 0, flat, seeded())
    assert [len(index) for index in drawn] == [8, 8, 8]
    for label, index in enumerate(drawn):
        assert (real.targets[index] == label).all()
    assert len(drawn[0].unique()) == 8
    assert sorted(drawn[1].unique(return_counts=True)[1].tolist()) == [2, 3, 3]
    assert len(drawn[2].unique()) == 1


def test_uniform_draws_anew_each_time_and_evenly():
    real = real_images([10])
    generator = seeded()
    seen = torch.zeros(10)
    previous = None
    for inner in range(500):
        previous = Uniform(4).draw(real, previous, inner, flat, generator)
        seen += torch.bincount(torch.searchsorted(real.rows[0], previous[0]), minlength=10)
    assert seen.min() > 150 and seen.max() < 250


def test_uniform_asks_for_no_features():
    embed = counter()
    Uniform(2).draw(real_images([3, 3]), None, 0, embed, seeded())
    assert embed.calls == 0


def test_representative_clusters_anew_only_every_so_often(device):
    real = real_images([12, 9], device=device)
    embed = counter()
    sampler, generator = Representative(4, every=3), seeded()
    previous, drawn, calls = None, [], []
    for inner in range(8):
        previous = sampler.draw(real, previous, inner, embed, generator)
        drawn.append(previous)
        calls.append(embed.calls)
    assert calls == [1, 1, 1, 2, 2, 2, 3, 3]
    for inner in (1, 2, 4, 5, 7):
        assert all(map(torch.equal, drawn[inner], drawn[inner - 1]))
    # A fresh network has nothing previous, wherever it starts.
    sampler.draw(real, None, 5, embed, generator)
    assert embed.calls == 4


def test_representative_draws_distinct_images_of_the_class_and_fills(device):
    real = real_images([20, 6, 2], device=device)
    drawn = Representative(6).draw(real, None, 0, flat, seeded())
    for label, index in enumerate(drawn):
        assert len(index) == 6 and (real.targets[index] == label).all()
    assert len(drawn[0].unique()) == 6
    assert sorted(drawn[1].tolist()) == real.rows[1].tolist()
    assert sorted(drawn[2].tolist()) == sorted(real.rows[2].tolist() * 3)


def test_representative_chooses_what_is_nearest_to_the_centres():
    real = real_images([20, 15])
    expected = nearest_in_each(real.features_by_class(flat), [5, 5], seeded(3))
    drawn = Representative(5).draw(real, None, 0, flat, seeded(3))
    for rows, index, found in zip(real.rows, expected, drawn, strict=True):
        assert torch.equal(rows[index], found)


def slow_nearest(features, member, clusters):
    """The nearest image to the mean of each cluster, those of large clusters first."""
    found = []
    for cluster in range(clusters):
        own = [position for position in range(len(features)) if member[position] == cluster]
        if own:
            centre = sum(features[position] for position in own) / len(own)
            nearest = min(own, key=lambda p: float((features[p] - centre).square().sum()))
            found.append((-len(own), cluster, nearest))
    return [nearest for _, _, nearest in sorted(found)]


@pytest.mark.parametrize(("count", "clusters"), [(30, 5), (40, 12), (9, 8), (25, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_to_centres_equals_a_loop_over_the_same_clusters(
    count, clusters, seed, monkeypatch
):
    members = []

    class Recorded(fast_pytorch_kmeans.MultiKMeans):
        def fit_predict(self, *arguments, **keywords):
            members.append(super().fit_predict(*arguments, **keywords))
            return members[-1]

    monkeypatch.setattr(fast_pytorch_kmeans, "MultiKMeans", Recorded)
    sets = torch.randn(2, count, 4, dtype=torch.float64, generator=seeded(seed))
    for features, found, member in zip(
        sets, nearest_in_each(sets, [clusters] * 2, seeded(seed)), members[0], strict=True
    ):
        assert found.tolist() == slow_nearest(features, member.tolist(), clusters)
        assert len(set(found.tolist())) == len(found) <= clusters
        assert found.dtype == torch.int64


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_that_a_loop_comes_to_rest_at(seed):
    features = torch.randn(80, 3, dtype=torch.float64, generator=seeded(seed))
    centres = features[torch.randperm(80, generator=seeded(seed))[:6]]
    rounds, member, before = 0, None, None
    while before is None or not torch.equal(member, before):
        before = member
        member = torch.cdist(features, centres).argmin(dim=1)
        centres = torch.stack([features[member == number].mean(dim=0) for number in range(6)])
        rounds += 1
    assert 3 < rounds < 19
    found = nearest_to_centres(features, 6, seeded(seed))
    assert found.tolist() == slow_nearest(features, member.tolist(), 6)


def test_no_allocation_is_tried_and_the_clusters_are_the_librarys(monkeypatch):
    features = torch.randn(3, 40, 5, generator=seeded())
    centres = features[:, :6].clone()
    library = fast_pytorch_kmeans.MultiKMeans(n_clusters=6, max_iter=4)
    library.centroids = centres.clone()
    expected = library.fit_predict(features)
    # What tries whether thousands of times the memory would be there.
    monkeypatch.setitem(type(library).max_sim.__globals__, "find_optimal_splits", None)
    ours = _kmeans(centres.clone(), max_iter=4)
    assert torch.equal(ours.fit_predict(features), expected)
    assert torch.equal(ours.centroids, library.centroids)


def test_classes_of_one_size_are_clustered_together_and_others_apart(device):
    counts, clusters = [12, 9, 12, 3, 12], [4, 4, 4, 4, 2]
    features = [torch.randn(n, 3, generator=seeded(n)).to(device) for n in counts]
    found = nearest_in_each(features, clusters, seeded())
    # Each start is drawn for its group: first those of 12 images and 4 clusters.
    generator = seeded()
    first, third = (nearest_to_centres(features[n], 4, generator) for n in (0, 2))
    assert torch.equal(found[0], first) and torch.equal(found[2], third)
    assert torch.equal(found[1], nearest_to_centres(features[1], 4, generator))
    assert found[3].tolist() == [0, 1, 2]
    assert torch.equal(found[4], nearest_to_centres(features[4], 2, generator))


def test_well_separated_clusters_are_found(device):
    sizes = [2, 9, 5]
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    noise = torch.randn(16, 2, generator=seeded())
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    features = (centres[group] + noise).to(device)
    # Lloyd's iterations depend on the start; most starts find the three.
    starts = [group[nearest_to_centres(features, 3, seeded(s)).cpu()].tolist() for s in range(20)]
    assert [1, 2, 0] in starts


@pytest.mark.parametrize("count", [1, 3, 4])
def test_fewer_images_than_clusters_are_all_chosen(count, device):
    features = torch.randn(count, 4, generator=seeded()).to(device)
    found = nearest_to_centres(features, 4, seeded())
    assert found.tolist() == list(range(count)) and found.device == features.device


def test_duplicates_give_fewer_but_distinct_images():
    features = torch.randn(3, 4, generator=seeded()).repeat(7, 1)
    found = nearest_to_centres(features, 6, seeded())
    assert 1 <= len(found) <= 6
    assert len(set(found.tolist())) == len(found)
    assert len(features[found].unique(dim=0)) == len(found)


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_features_give_one_image(value):
    found = nearest_to_centres(torch.full((10, 4), value), 3, seeded())
    assert len(found) == 1
    real = real_images([10])
    drawn = Representative(3).draw(
        real, None, 0, lambda images: torch.full((len(images), 4), value), seeded()
    )
    assert len(drawn[0]) == 3


def test_global_generators_are_left_alone():
    state = torch.get_rng_state()
    real = real_images([30, 20])
    for sampler in (Uniform(5), Representative(5)):
        sampler.draw(real, None, 0, flat, seeded())
    nearest_to_centres(torch.randn(30, 3, generator=seeded()), 4, seeded())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", [Uniform(5), Representative(5)])
def test_a_seed_gives_one_draw(sampler):
    real = real_images([30, 20])
    first, second, other = (sampler.draw(real, None, 0, flat, seeded(s)) for s in (1, 1, 2))
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, other))


def test_unusable_numbers_are_refused():
    for sampler in (Uniform, Representative):
        for unusable in (0, 2.5, "all"):
            with pytest.raises(
                ArgumentError, match=f"`batch` is {unusable!r}; pass a whole number"
            ):
                sampler(unusable)
    with pytest.raises(ArgumentError, match="`every` is 0; pass a whole number of at least 1"):
        Representative(4, every=0)
