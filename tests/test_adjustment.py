import copy
import math
from functools import partial

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, split_online_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import DER, ER_ACE, EWC, MER, SCR, Naive
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dc_replay import LogitAdjustmentPlugin
from dc_replay.adjustment import log_prior
from dc_replay.distillation import DistillationPlugin
from dc_replay.errors import ArgumentError


def stream(counts, *, experiences=1, spread=1.0):
    """Points of each class around a corner of its own, so many of each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    points = torch.randn(len(labels), len(counts), generator=generator) * spread
    points += F.one_hot(labels, len(counts))
    data = TensorDataset(points, labels)
    data.targets = labels.tolist()
    sets = {name: as_classification_dataset(data) for name in ("train", "test")}
    order = list(range(len(counts)))
    return class_incremental_benchmark(sets, num_experiences=experiences, class_order=order)


def strategy_of(
    model, plugins, *, kind=Naive, criterion=F.cross_entropy, epochs=1, batch=8, lr=0.1
):
    return kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        criterion=criterion,
        train_mb_size=batch,
        train_epochs=epochs,
        eval_mb_size=64,
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[]),
    )


class Watch(SupervisedPlugin):
    """Notes labels, losses, and the logits that metrics see."""

    def __init__(self):
        super().__init__()
        self.labels, self.metrics, self.loss = [], [], []

    def before_forward(self, strategy, **kwargs):
        self.labels.append(strategy.mb_y.clone())

    def after_training_iteration(self, strategy, **kwargs):
        self.metrics.append(strategy.mb_output.detach().clone())
        self.loss.append(strategy.loss.detach().clone())


class Raw(nn.Linear):
    """Keeps what it has returned."""

    def forward(self, points):
        output = super().forward(points)
        self.returned = [*getattr(self, "returned", []), output.detach().clone()]
        return output


def test_classes_that_have_not_occurred_count_as_the_most_frequent():
    found = log_prior(torch.tensor([6.0, 0.0, 2.0])).exp()
    torch.testing.assert_close(found, torch.tensor([0.75, 0.75, 0.25]))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_definition(weight):
    torch.manual_seed(0)
    model, watch = Raw(3, 3), Watch()
    strategy = strategy_of(model, [LogitAdjustmentPlugin(weight=weight), watch])
    strategy.train(stream([20, 9, 3]).train_stream[0])
    seen = []
    assert len(watch.loss) == 4
    for labels, logits, shown, loss in zip(
        watch.labels, model.returned, watch.metrics, watch.loss, strict=True
    ):
        seen += labels.tolist()
        prior = prior_of(seen, 3).double().tolist()
        expected = 0.0
        for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
            scores = [z + weight * p for z, p in zip(row, prior, strict=True)]
            expected += math.log(sum(map(math.exp, scores))) - scores[label]
        assert float(loss) == pytest.approx(expected / len(labels), rel=1e-5)
        assert torch.equal(shown, logits)  # metrics see them as they are


def balanced_accuracy(weight):
    torch.manual_seed(0)
    data = stream([400, 40, 40], spread=0.8)
    model = nn.Linear(3, 3)
    strategy = strategy_of(model, [LogitAdjustmentPlugin(weight=weight)], epochs=20, batch=32)
    strategy.train(data.train_stream[0])
    points, labels = zip(*data.test_stream[0].dataset, strict=True)
    with torch.no_grad():
        right = model(torch.stack(points)).argmax(1) == torch.tensor(labels)
    return sum(right[torch.tensor(labels) == c].float().mean().item() for c in range(3)) / 3


def test_rare_classes_are_found_as_often():
    assert balanced_accuracy(1.0) > balanced_accuracy(0.0) + 0.1


def test_exemplars_are_counted_whoever_replays_them():
    plugin = LogitAdjustmentPlugin()
    counts = []

    class Count(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            counts.append(plugin._counts.tolist())

    strategy = strategy_of(nn.Linear(4, 4), [ReplayPlugin(4, batch_size=8), plugin, Count()])
    for experience in stream([16] * 4, experiences=2).train_stream:
        strategy.train(experience)
    assert counts[0] == [16, 16, 0, 0]
    assert min(counts[1][:2]) > 0 and counts[1][2:] == [16, 16]
    assert plugin._counts is None  # nothing for a checkpoint


def prior_of(labels, columns):
    share = [labels.count(c) / len(labels) for c in range(columns)]
    return torch.tensor([math.log(s if s else max(share)) for s in share])


def test_a_head_that_grows():
    model = nn.Sequential(IncrementalClassifier(6, initial_out_features=2, masking=False))
    seen = []

    class Check(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            with torch.no_grad():
                added = strategy.mb_output - model(strategy.mb_x)
            seen.extend(strategy.mb_y.tolist())
            torch.testing.assert_close(added, prior_of(seen, added.shape[1]).expand_as(added))

        def after_training_exp(self, strategy, **kwargs):
            seen.clear()

    strategy = strategy_of(model, [LogitAdjustmentPlugin(), Check()])
    for experience in stream([8] * 6, experiences=3).train_stream:
        strategy.train(experience)


@pytest.mark.parametrize(
    ("told", "head", "expected"),
    [
        (True, IncrementalClassifier(4, initial_out_features=2, masking=False), [4, 8, 12] * 2),
        (True, nn.Linear(4, 4), [4, 8, 12] * 2),
        (False, nn.Linear(4, 4), [4, 8, 12, 16, 20, 24]),
    ],
    ids=["growing head", "boundaries", "boundless"],
)
def test_counts_go_on_over_the_parts_of_an_experience(told, head, expected):
    data = stream([6, 6, 6, 6], experiences=2)
    online = split_online_stream(data.train_stream, experience_size=4, access_task_boundaries=told)
    plugin, totals = LogitAdjustmentPlugin(), []

    class Count(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            totals.append(int(plugin._counts.sum()))

    strategy = strategy_of(nn.Sequential(head), [plugin, Count()])
    for experience in online:
        strategy.train(experience)
    assert totals == expected


def test_a_class_that_is_not_shown_is_held_down_as_without_it():
    model = nn.Linear(3, 3)
    data = stream([30, 30, 0])
    twin = copy.deepcopy(model)
    for weight, network in ((0.0, model), (1.0, twin)):
        torch.manual_seed(0)
        strategy = strategy_of(network, [LogitAdjustmentPlugin(weight=weight)], epochs=3)
        strategy.train(data.train_stream[0])
    plain, adjusted = model.bias.detach(), twin.bias.detach()
    assert float(adjusted[2]) == pytest.approx(float(plain[2]), abs=0.02)
    assert float(adjusted[2]) < float(adjusted[:2].min())


def test_distillation_that_comes_after_it_sees_the_logits_as_they_are():
    found = {}

    class Spy(DistillationPlugin):
        def before_backward(self, strategy, *args, **kwargs):
            found.setdefault("seen", strategy.mb_output.detach().clone())

    model = Raw(3, 3)
    strategy = strategy_of(model, [LogitAdjustmentPlugin(), Spy()])
    strategy.train(stream([20, 9, 3]).train_stream[0])
    assert torch.equal(found["seen"], model.returned[0])


def test_half_precision_stays():
    model = nn.Linear(3, 3).bfloat16()
    seen = []

    def criterion(logits, labels):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    class Half(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            strategy.mbatch[0] = strategy.mbatch[0].bfloat16()

    strategy_of(model, [Half(), LogitAdjustmentPlugin()], criterion=criterion).train(
        stream([8, 8, 8]).train_stream[0]
    )
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ArgumentError, match="`weight` is .*; pass a finite number of at least 0"):
        LogitAdjustmentPlugin(weight=weight)


def test_a_head_for_each_task_is_refused():
    strategy = strategy_of(MultiHeadClassifier(3), [LogitAdjustmentPlugin()])
    with pytest.raises(ArgumentError, match="`model` is a MultiTaskModule"):
        strategy.train(stream([8, 8, 8]).train_stream[0])


@pytest.mark.parametrize(
    "soften", [lambda labels: F.one_hot(labels, 3).float(), lambda labels: labels.float()]
)
def test_labels_that_are_no_classes_are_refused(soften):
    plugin, mixed = LogitAdjustmentPlugin(), Watch()

    def change(strategy, **kwargs):
        strategy.mbatch[1] = soften(strategy.mbatch[1])

    mixed.before_forward = change
    strategy = strategy_of(nn.Linear(3, 3), [mixed, plugin])
    with pytest.raises(ArgumentError, match="`mbatch` holds labels of shape .* counts integer"):
        strategy.train(stream([8, 8, 8]).train_stream[0])


def test_nothing_is_drawn_from_global_generators():
    def weights(plugins):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        strategy_of(model, plugins).train(stream([8, 8, 8]).train_stream[0])
        return torch.rand(1)

    assert torch.equal(weights([]), weights([LogitAdjustmentPlugin()]))


@pytest.mark.parametrize("ignored", [-100, 255])
def test_labels_that_the_loss_ignores_are_not_counted(ignored):
    plugin = LogitAdjustmentPlugin()
    model, watch = Raw(3, 3), Watch()

    def ignore(strategy, **kwargs):
        strategy.mbatch[1][::2] = ignored

    watch.before_forward = ignore
    criterion = partial(F.cross_entropy, ignore_index=ignored)
    strategy = strategy_of(model, [watch, plugin], criterion=criterion)
    seen = []
    watch.after_training_epoch = lambda strategy, **kwargs: seen.append(plugin._counts.sum())
    strategy.train(stream([8, 8, 8]).train_stream[0])
    assert seen == [12]
    assert torch.equal(log_prior(torch.zeros(3)), torch.zeros(3))


def test_plugins_that_add_to_the_loss_come_later():
    model = nn.Linear(3, 3)
    experience = stream([8, 8, 8]).train_stream[0]
    strategy = strategy_of(model, [DistillationPlugin(), LogitAdjustmentPlugin()])
    with pytest.raises(ArgumentError, match="`plugins` has DistillationPlugin, .* before Logit"):
        strategy.train(experience)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = EWC(
        model=model,
        optimizer=optimizer,
        criterion=F.cross_entropy,
        ewc_lambda=1.0,
        plugins=[LogitAdjustmentPlugin()],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    strategy.train(experience)


@pytest.mark.parametrize("kind", [DER, ER_ACE, SCR, MER])
def test_strategies_with_a_loss_of_their_own_are_refused(kind):
    strategy = object.__new__(kind)
    strategy.model, strategy.plugins = nn.Linear(3, 3), []
    with pytest.raises(ArgumentError, match=f"`strategy` is {kind.__name__}, whose loss is not"):
        LogitAdjustmentPlugin().before_training(strategy)


def test_a_users_own_criterion_is_trusted():
    class Twice(Naive):
        def criterion(self):
            return 2 * super().criterion()

    found = []
    for kind in (Naive, Twice):
        torch.manual_seed(0)
        model, watch = nn.Linear(3, 3), Watch()
        plugins = [LogitAdjustmentPlugin(), watch]
        strategy = strategy_of(model, plugins, kind=kind, batch=24, lr=0.0)
        strategy.train(stream([16, 4, 4]).train_stream[0])
        found += watch.loss
    torch.testing.assert_close(found[1], 2 * found[0])


class Timed(Naive):
    """A loop of a user's own."""

    def training_epoch(self, **kwargs):
        super().training_epoch(**kwargs)


def test_a_loop_of_ones_own_is_trusted_to_call_the_criterion():
    strategy = strategy_of(nn.Linear(2, 2), [LogitAdjustmentPlugin()], kind=Timed)
    strategy.train(stream([8, 8]).train_stream[0])
    assert strategy.clock.train_iterations == 2
