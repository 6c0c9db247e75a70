"""Which of Avalanche's strategies take a condensed memory, how, and on which streams.

``CASES`` is the table of the documentation: each row's line of code is run here as it stands.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import avalanche.training.plugins
import avalanche.training.supervised
import pytest
import torch
from avalanche.benchmarks import (
    OnlineCLScenario,
    benchmark_from_datasets,
    class_incremental_benchmark,
    nc_benchmark,
    ni_benchmark,
    split_continuous_linear_decay_stream,
    split_online_stream,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import (
    FeCAMClassifier,
    IncrementalClassifier,
    MultiHeadClassifier,
    MultiTaskModule,
    NCMClassifier,
    SCRModel,
    TrainEvalModel,
)
from avalanche.training.plugins import EvaluationPlugin, MemoryNCMUpdate, ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive, ar1, lamaml_v2
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dc_replay import LogitAdjustmentPlugin, recipes
from dc_replay.budgets import ImagesPerClass, TotalImages
from dc_replay.buffer import CondensedBuffer
from dc_replay.distillation import DistillationPlugin
from dc_replay.errors import ArgumentError
from dc_replay.formation import Formation
from dc_replay.match_storage import MatchStoragePlugin
from dc_replay.networks import convnet_for
from dc_replay.plugin import CondensedReplayPlugin

# Warnings that point into Avalanche are its own to mend.
pytestmark = pytest.mark.filterwarnings("ignore:::avalanche")

SIDE = 8
IMAGE_BYTES = 3 * SIDE * SIDE
CLASSES = 6
STORED = 2  # images of each class, with four in each
NETWORK = convnet_for((3, SIDE, SIDE), width=8)
NORMALIZE = v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
TRAIN = v2.Compose([v2.RandomHorizontalFlip(), NORMALIZE])
ORDER = [3, 1, 0, 5, 2, 4]


class Pictures(Dataset):
    """Some images of each class, brighter from class to class; a domain has its contrast."""

    def __init__(self, *, per_class=10, contrast=1.0):
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.arange(CLASSES).repeat_interleave(per_class).tolist()
        noise = torch.rand(len(self.targets), 3, SIDE, SIDE, generator=generator)
        level = torch.tensor(self.targets).view(-1, 1, 1, 1) / CLASSES
        self.images = contrast * (0.8 * level + 0.2 * noise)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def pictures(**options):
    return as_classification_dataset(
        Pictures(**options), transform_groups={"train": TRAIN, "eval": NORMALIZE}
    )


def classes_xy():
    data = {name: pictures() for name in ("train", "test")}
    return class_incremental_benchmark(data, num_experiences=3, class_order=ORDER)


def classes_xyt(*, experiences=3, task_labels=False):
    return nc_benchmark(
        Pictures(),
        Pictures(),
        experiences,
        task_labels=task_labels,
        fixed_class_order=ORDER,
        train_transform=TRAIN,
        eval_transform=NORMALIZE,
    )


def domains_xy():
    data = [pictures(per_class=4, contrast=contrast) for contrast in (1.0, 0.7, 0.4)]
    return benchmark_from_datasets(train=data, test=data)


def domains_xyt():
    return ni_benchmark(
        Pictures(),
        Pictures(),
        3,
        seed=0,
        balance_experiences=True,
        train_transform=TRAIN,
        eval_transform=NORMALIZE,
    )


def whole(benchmark):
    return list(benchmark.train_stream), benchmark.test_stream


def online(benchmark, **options):
    """Experiences of five images, so that a class comes in several of them."""
    stream = split_online_stream(benchmark.train_stream, experience_size=5, seed=1, **options)
    return list(stream), benchmark.test_stream


STREAMS = {
    "classes-xy": lambda: whole(classes_xy()),
    "classes-xyt": lambda: whole(classes_xyt()),
    "tasks": lambda: whole(classes_xyt(task_labels=True)),
    "domains-xy": lambda: whole(domains_xy()),
    "domains-xyt": lambda: whole(domains_xyt()),
    "online-xy": lambda: online(classes_xy()),
    "online-xyt": lambda: online(classes_xyt()),
}
"""Experiences and a test stream. Items are (x, y), or (x, y, t), as of ``tasks``."""

ALL = tuple(STREAMS)
XY = tuple(name for name in ALL if name.endswith("-xy"))
XYT = tuple(name for name in ALL if name not in XY)
ONE_HEAD = tuple(name for name in ALL if name != "tasks")
ONE_HEAD_XYT = tuple(name for name in ONE_HEAD if name not in XY)
LISTING_CLASSES = tuple(name for name in ALL if name != "domains-xy")
"""Streams whose experiences say which classes they hold."""


def features():
    # Positive everywhere, as FeCAM takes the root.
    return nn.Sequential(nn.Flatten(), nn.Linear(IMAGE_BYTES, 16), nn.Softplus())


def one_head():
    return nn.Sequential(OrderedDict(features=features(), classifier=nn.Linear(16, CLASSES)))


class HeadForEachTask(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.features = features()
        self.classifier = MultiHeadClassifier(16)

    def forward(self, x, task_labels):
        return self.classifier(self.features(x), task_labels)


def contrastive():
    return SCRModel(feature_extractor=features(), projection=nn.Linear(16, 8))


def evaluated_by(classifier):
    return TrainEvalModel(features(), nn.Linear(16, CLASSES), classifier())


class SmallLatentNetwork(nn.Module):
    """Stands in for the MobileNet whose weights AR1 downloads."""

    def __init__(self, pretrained, latent_layer_num):
        super().__init__()
        self.lat_features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        self.end_features = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4))
        self.output = nn.Linear(16, CLASSES, bias=False)

    def forward(self, x, latent_input=None, return_lat_acts=False):
        new = self.lat_features(x)
        every = new if latent_input is None else torch.cat([new.detach(), latent_input])
        logits = self.output(self.end_features(every).flatten(1))
        return (logits, new) if return_lat_acts else logits


@dataclass(frozen=True)
class Refusal:
    """What is raised when training or evaluating.

    Attributes:
        error: Its type.
        match: Its message.
        alone: Whether Avalanche raises the same without this package; None where it is not tried,
            as it raises something else or never ends.
    """

    error: type[Exception]
    match: str
    alone: bool | None = True


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: The strategy or plugin.
        attach: The code that attaches ``replay`` or ``buffer``: it makes a ``strategy``, or a
            ``plugin`` for Naive. An ellipsis stands for the model, the optimizer and so on.
        works: The streams on which it works.
        note: What to know, or why not.
        refused: The streams on which it is refused.
        network: Makes the model; None where the strategy makes its own.
        options: Of the strategy, beside those of every strategy.
        memory: Options of ``replay`` or ``buffer``.
    """

    name: str
    attach: str
    works: tuple[str, ...] = ALL
    note: str = "works"
    refused: dict[str, Refusal] = field(default_factory=dict)
    network: Callable[[], nn.Module] | None = one_head
    options: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self):
        """Which part of this package is attached."""
        return "buffer" if "policy" in self.attach or not self.attach else "plugin"


UNPACKS_THREE = Refusal(ValueError, "expected 3, got 2")
NO_TASK_LABEL = Refusal(AssertionError, "Task label not found")
NO_TASK_LABELS = Refusal(AttributeError, "has no attribute 'targets_task_labels'")
NO_SETTER = Refusal(AttributeError, "'dataset' of .* has no setter")
NEEDS_TASKS = "reads a task label from each item of the memory, so items must be (x, y, t)"
TASK_LABELS = {"with_task_labels": True}
WITH_TASKS = (
    "works; it reads a task label from each item of the memory: where items are (x, y), give "
    "`buffer` `with_task_labels=True`"
)
NO_POLICY = {
    "iCaRL": "supervised.icarl",
    "GEM": "plugins.gem",
    "A-GEM": "plugins.agem",
    "GSS": "plugins.gss_greedy",
}

CASES = (
    Case("Naive", "strategy = Naive(..., plugins=[replay])"),
    Case("Cumulative", "strategy = Cumulative(..., plugins=[replay])"),
    Case("FromScratchTraining", "strategy = FromScratchTraining(..., plugins=[replay])"),
    Case("EWC", "strategy = EWC(..., ewc_lambda=1.0, plugins=[replay])"),
    Case(
        "LwF",
        "strategy = LwF(..., alpha=1.0, temperature=2.0, plugins=[replay])",
        works=XYT,
        note="works; Avalanche's LwF needs items (x, y, t); `DistillationPlugin` does not",
        refused=dict.fromkeys(XY, NO_TASK_LABELS),
    ),
    Case(
        "Synaptic Intelligence",
        "strategy = SynapticIntelligence(..., si_lambda=0.1, plugins=[replay])",
    ),
    Case("MAS", "strategy = MAS(..., lambda_reg=1.0, plugins=[replay])"),
    Case(
        "CWR*",
        "strategy = CWRStar(..., cwr_layer_name='classifier', plugins=[replay])",
        works=ONE_HEAD,
        note="works; it is for one head, and consolidates the columns of the new classes only",
    ),
    Case(
        "CWR* and SI",
        "strategy = Naive(..., plugins=[CWRStarPlugin(model, freeze_remaining_model=False), "
        "SynapticIntelligencePlugin(0.1), replay])",
        works=ONE_HEAD,
        note="works; this is AR1 with condensed images in place of its latent replay",
    ),
    Case(
        "AR1",
        "strategy = AR1(..., plugins=[replay])",
        works=(),
        note="no: AR1 takes the appended exemplars for new images when it stores latent "
        "activations; attach CWR* and SI as above",
        refused={
            **dict.fromkeys(XY, NO_TASK_LABEL),
            **dict.fromkeys(
                XYT, Refusal(IndexError, "out of range for sequence of length", alone=False)
            ),
        },
        network=None,
        options={"rm_sz": 20, "freeze_below_layer": "lat_features.0", "latent_layer_num": 0},
    ),
    Case(
        "A-GEM",
        "strategy = AGEM(..., patterns_per_exp=4, sample_size=24, plugins=[replay])",
        note="works; it keeps raw images of its own besides",
    ),
    Case(
        "DER",
        "strategy = DER(..., mem_size=20, plugins=[replay])",
        works=ONE_HEAD_XYT,
        note="works; it keeps raw images of its own besides, is for one head and needs items "
        "(x, y, t)",
        refused=dict.fromkeys(XY, UNPACKS_THREE),
    ),
    Case(
        "GDumb",
        "strategy = GDumb(..., mem_size=12, plugins=[replay])",
        note="works; it keeps raw images of its own besides, unlike with `CondensedBuffer`",
    ),
    Case(
        "LRSchedulerPlugin",
        "strategy = Naive(..., plugins=[LRSchedulerPlugin(StepLR(optimizer, 1)), replay])",
    ),
    Case(
        "Logit adjustment and distillation",
        "strategy = Naive(..., plugins=[replay, LogitAdjustmentPlugin(), DistillationPlugin()])",
        works=ONE_HEAD,
        note="works; both need one column per class",
        refused={"tasks": Refusal(ArgumentError, "`model` is a MultiTaskModule", alone=None)},
    ),
    Case(
        "ReplayPlugin",
        "plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer)",
    ),
    Case(
        "ReplayPlugin, new images as stored",
        "replay = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer); "
        "strategy = Naive(..., plugins=[replay, MatchStoragePlugin(buffer)])",
    ),
    Case(
        "ReplayPlugin, balanced by task",
        "plugin = ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer, "
        "task_balanced_dataloader=True)",
        works=XYT,
        note="works; there must be task labels, so items must be (x, y, t)",
        refused=dict.fromkeys(XY, replace(NO_TASK_LABELS, alone=None)),
    ),
    Case("GDumb", "plugin = GDumbPlugin(); plugin.storage_policy = buffer"),
    Case(
        "RAR",
        "plugin = RARPlugin(batch_size_mem=4, mem_size=buffer.max_size, storage_policy=buffer)",
        works=ONE_HEAD,
        note="works; it is for one head, and clips the images that it attacks to 0..1 whatever "
        "their normalisation",
        refused={"tasks": Refusal(TypeError, "zeros")},
    ),
    Case(
        "MIR",
        "plugin = MIRPlugin(batch_size_mem=4); plugin.storage_policy = buffer",
        note=WITH_TASKS,
        memory=TASK_LABELS,
    ),
    Case(
        "CoPE",
        "plugin = CoPEPlugin(n_classes=6, p_size=6); plugin.storage_policy = buffer",
        works=ONE_HEAD,
        note="works; it is for one head",
    ),
    Case(
        "ER_ACE",
        "strategy = ER_ACE(...); strategy.storage_policy = buffer",
        note=WITH_TASKS,
        memory=TASK_LABELS,
    ),
    Case(
        "ER_AML",
        "strategy = ER_AML(..., feature_extractor=features); strategy.storage_policy = buffer",
        works=XYT,
        note="works where a class has at least `train_mb_size` decoded images; needs items "
        "(x, y, t)",
        refused=dict.fromkeys(XY, replace(UNPACKS_THREE, alone=None)),
    ),
    Case(
        "ER_AML, larger batches",
        "strategy = ER_AML(..., feature_extractor=features); strategy.storage_policy = buffer",
        works=(),
        note="no: with fewer decoded images of a class than `train_mb_size` ER_AML never ends, so "
        "an error says so",
        refused=dict.fromkeys(
            ALL,
            Refusal(ArgumentError, "`train_mb_size` of ER_AML is 9, but .* only [48]", alone=None),
        ),
        options={"train_mb_size": 9},
    ),
    Case(
        "SCR",
        "strategy = SCR(...); strategy.replay_plugin.storage_policy = buffer",
        works=XYT,
        note=f"works; it {NEEDS_TASKS}",
        refused=dict.fromkeys(XY, replace(UNPACKS_THREE, alone=None)),
        network=contrastive,
    ),
    Case(
        "MemoryNCMUpdate",
        "plugin = MemoryNCMUpdate(storage_policy=buffer)",
        works=LISTING_CLASSES,
        note=WITH_TASKS,
        memory=TASK_LABELS,
        network=partial(evaluated_by, NCMClassifier),
    ),
    Case(
        "MemoryFeCAMUpdate",
        "plugin = MemoryFeCAMUpdate(storage_policy=buffer)",
        works=LISTING_CLASSES,
        note=WITH_TASKS,
        memory=TASK_LABELS,
        network=partial(evaluated_by, FeCAMClassifier),
    ),
    Case(
        "MER",
        "strategy = MER(..., n_inner_steps=1); strategy.buffer.storage_policy = buffer",
        works=XYT,
        note="works; it needs items (x, y, t)",
        refused=dict.fromkeys(XY, NO_TASK_LABEL),
    ),
    Case(
        "LaMAML (lamaml_v2)",
        "strategy = LaMAML(..., n_inner_updates=2); strategy.buffer.storage_policy = buffer",
        works=("classes-xyt", "tasks", "domains-xyt"),
        note="works; it calls the model with task labels, which Avalanche's multi-head models do "
        "not allow online",
        refused={
            "classes-xy": Refusal(AttributeError, "no attribute 'task_labels'"),
            **dict.fromkeys(
                ("domains-xy", "online-xy", "online-xyt"),
                Refusal(AttributeError, "no attribute 'classes_in_this_experience'"),
            ),
        },
        network=HeadForEachTask,
    ),
    Case(
        "BiC",
        "plugin = BiCPlugin(mem_size=buffer.max_size, storage_policy=buffer)",
        works=(),
        note="no: Avalanche's BiC passes an argument that torch has dropped, and replaces the "
        "dataset of an experience, which only older generators allow",
        refused={
            **dict.fromkeys((*XY, "online-xyt"), NO_SETTER),
            **dict.fromkeys(("classes-xyt", "domains-xyt"), Refusal(TypeError, "'verbose'")),
        },
        memory={"max_size": 60},
    ),
    Case(
        "DER",
        "strategy = DER(...); strategy.storage_policy = buffer",
        works=(),
        note="no: it stores logits with its images; attach `CondensedReplayPlugin` besides",
        refused=dict.fromkeys(ONE_HEAD, Refusal(ValueError, "expected 4")),
    ),
    Case(
        "FeatureReplay",
        "strategy = FeatureReplay(...); strategy.storage_policy = buffer",
        works=(),
        note="no: it stores features, not images",
        refused=dict.fromkeys(
            ("classes-xyt", "domains-xyt"),
            Refusal(AttributeError, "no attribute 'update_from_dataset'", alone=False),
        ),
    ),
    Case(
        ", ".join(NO_POLICY),
        "",
        works=(),
        note="no: they have no place for a storage policy",
    ),
)


def rows(part):
    """The rows of the documentation's table for the plugin, or for the buffer."""
    names = {ALL: "all", ONE_HEAD: "all but tasks", XYT: "those with (x, y, t)"}
    names |= {ONE_HEAD_XYT: "those with (x, y, t), but tasks", (): "none"}
    names |= {LISTING_CLASSES: "all but domains-xy"}
    return [
        f"| {case.name} | {f'`{case.attach}`' if case.attach else 'none'} | "
        f"{names.get(case.works, ', '.join(case.works))} | {case.note} |"
        for case in CASES
        if case.part == part
    ]


def make_condenser(recipe=recipes.random, **options):
    return recipe(factor=2, network=NETWORK, **options)


def make_ours(case, **options):
    options = {
        "condenser": make_condenser(),
        "budget": ImagesPerClass(STORED),
        "progress": False,
        **case.memory,
        **options,
    }
    if case.part == "plugin":
        replay = CondensedReplayPlugin(**options)
        return {"replay": replay}, replay.buffer
    buffer = CondensedBuffer(**options)
    return {"buffer": buffer}, buffer


class Witness(SupervisedPlugin):
    """Notes the losses, and the classes in the mini-batches of each experience."""

    def __init__(self):
        super().__init__()
        self.losses = []
        self.classes = []

    def before_training_exp(self, strategy, **kwargs):
        self.classes.append(set())

    def after_training_iteration(self, strategy, **kwargs):
        self.losses.append(float(strategy.loss.detach()))
        self.classes[-1] |= set(strategy.mbatch[1].tolist())


def attached(case, stream, names):
    """The strategy that the code of a case makes."""
    options = {
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 4,
        "eval_mb_size": 20,
        "evaluator": EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
        **case.options,
    }
    names = {
        **vars(avalanche.training.plugins),
        **vars(avalanche.training.supervised),
        "LaMAML": lamaml_v2.LaMAML,
        "StepLR": torch.optim.lr_scheduler.StepLR,
        "options": options,
        "DistillationPlugin": DistillationPlugin,
        "LogitAdjustmentPlugin": LogitAdjustmentPlugin,
        "MatchStoragePlugin": MatchStoragePlugin,
        **names,
    }
    if case.network is not None:
        several = case.network is one_head and stream == "tasks"
        model = HeadForEachTask() if several else case.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options |= {"model": model, "optimizer": optimizer}
        names |= {"model": model, "optimizer": optimizer}
        names["features"] = getattr(model, "features", None)
    exec(case.attach.replace("...", "**options"), names)
    if "strategy" not in names:
        names["strategy"] = Naive(**options, plugins=[names["plugin"]])
    return names["strategy"]


class Run:
    """A strategy on a stream."""

    def __init__(self, case, stream, names):
        self.strategy = attached(case, stream, names)
        self.witness = Witness()
        self.strategy.plugins.append(self.witness)
        self.experiences, self.test = STREAMS[stream]()
        parameters = self.strategy.model.named_parameters()
        self.before = {name: value.detach().clone() for name, value in parameters}

    def train(self):
        """Train on one experience after the other, and yield each afterwards."""
        for experience in self.experiences:
            self.strategy.train(experience)
            yield experience

    def assert_learned(self):
        assert self.witness.losses and all(map(math.isfinite, self.witness.losses))
        after = dict(self.strategy.model.named_parameters())
        assert all(value.isfinite().all() for value in after.values())
        assert any(not torch.equal(value, after[name]) for name, value in self.before.items())

    def assert_evaluates(self):
        results = self.strategy.eval(self.test)
        values = [v for k, v in results.items() if k.startswith("Top1_Acc_Stream/eval_phase")]
        assert values and all(0 <= value <= 1 for value in values)


def labels_of(experience):
    return {int(label) for label in experience.dataset.targets}


def assert_mixes(experience, buffer):
    """An item of the memory and one of the experience make a batch."""
    dataset = experience.dataset
    joined = dataset.concat(buffer.buffer)
    assert len(joined) == len(dataset) + 4 * len(buffer.memory)
    batch = joined.collate_fn([joined[0], joined[len(joined) - 1]])
    assert len(batch) == len(dataset[0])
    assert batch[0].shape == (2, 3, SIDE, SIDE) and batch[0].dtype == torch.float32
    assert {len(part) for part in batch} == {2}


def outcomes(kind, *, only=lambda case, stream: True):
    """Each case with each of its streams of a kind."""
    return [
        pytest.param(case, stream, id=f"{case.part}-{case.name}-{stream}")
        for case in CASES
        for stream in getattr(case, kind)
        if only(case, stream)
    ]


@pytest.fixture(autouse=True)
def _small_network_of_ar1(monkeypatch):
    monkeypatch.setattr(ar1, "MobilenetV1", SmallLatentNetwork)


@pytest.fixture
def decoded(monkeypatch):
    """How many stored images were decoded, call by call."""
    counts, decode_at = [], Formation.decode_at

    def counting(self, stored, index):
        counts.append(len(index))
        return decode_at(self, stored, index)

    monkeypatch.setattr(Formation, "decode_at", counting)
    return counts


@pytest.mark.parametrize(("case", "stream"), outcomes("works"))
def test_it_trains_and_evaluates(case, stream, decoded):
    names, buffer = make_ours(case)
    run = Run(case, stream, names)
    last = run.experiences[-1]
    arrived = []
    for experience in run.train():
        arrived += sorted(labels_of(experience) - set(arrived))
        assert list(buffer.memory.counts) == arrived
        assert set(buffer.memory.counts.values()) <= {1, STORED}
        assert buffer.memory.nbytes <= len(arrived) * STORED * IMAGE_BYTES
        if experience is not last:
            decoded.clear()
    assert sum(decoded) > 0  # in the last experience
    assert buffer.memory.counts == dict.fromkeys(arrived, STORED) and len(arrived) == CLASSES
    run.assert_learned()
    if case.part == "plugin" and "domains" not in stream:
        assert run.witness.classes[-1] - labels_of(last)
    if not (case.memory == TASK_LABELS and stream in XY):
        assert_mixes(last, buffer)
    run.assert_evaluates()


@pytest.mark.parametrize(("case", "stream"), outcomes("refused"))
def test_it_is_refused(case, stream):
    run = Run(case, stream, make_ours(case)[0])
    refusal = case.refused[stream]
    with pytest.raises(refusal.error, match=refusal.match):
        list(run.train())


class Stock(ClassBalancedBuffer):
    """Without the warning that Avalanche's plugins still call update."""

    def update(self, strategy, **kwargs):
        self.post_adapt(strategy, strategy.experience)


def alone(case, stream):
    """Avalanche's strategy with a memory of its own, or with none."""
    return Run(case, stream, {"replay": Witness(), "buffer": Stock(max_size=48)})


@pytest.mark.parametrize(
    ("case", "stream"), outcomes("refused", only=lambda case, stream: case.refused[stream].alone)
)
def test_avalanche_refuses_it_alone(case, stream):
    run, refusal = alone(case, stream), case.refused[stream]
    with pytest.raises(refusal.error, match=refusal.match):
        list(run.train())


@pytest.mark.parametrize(
    ("case", "stream"),
    outcomes("refused", only=lambda case, stream: case.refused[stream].alone is False),
)
def test_avalanche_trains_and_evaluates_alone(case, stream):
    run = alone(case, stream)
    list(run.train())
    run.assert_learned()
    run.assert_evaluates()


@pytest.mark.parametrize("module", NO_POLICY.values(), ids=NO_POLICY)
def test_some_have_no_place_for_a_policy(module):
    assert "storage_policy" not in inspect.getsource(import_module(f"avalanche.training.{module}"))


def test_every_row_says_one_thing_of_a_stream():
    for case in CASES:
        told = [*case.works, *case.refused]
        assert len(told) == len(set(told)) and set(told) <= set(ALL), case.name
    assert len({(case.part, case.name) for case in CASES}) == len(CASES)
    assert len(rows("plugin")) + len(rows("buffer")) == len(CASES)
    assert not [row for row in rows("plugin") + rows("buffer") if row.count("|") != 5]


RECIPES = {
    "representative": make_condenser(recipes.representative),
    "idc": make_condenser(recipes.idc, outer=1, inner=1),
}


@pytest.mark.parametrize("stream", ALL)
@pytest.mark.parametrize("condenser", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("Naive", "ReplayPlugin")])
def test_recipes_on_every_stream(case, condenser, stream):
    names, buffer = make_ours(case, condenser=condenser)
    run = Run(case, stream, names)
    assert len(list(run.train())) == len(buffer.history)
    assert all(("distance" in seen) == (condenser.name == "idc") for seen in buffer.history)
    assert set(buffer.memory.counts.values()) == {STORED} and len(buffer.memory) == 2 * CLASSES
    if "domains" not in stream:
        levels = torch.stack([buffer.memory.of_class(n).float().mean() for n in range(CLASSES)])
        assert (levels.diff() > 0).all()
    run.assert_learned()
    assert_mixes(run.experiences[-1], buffer)
    run.assert_evaluates()


def naive(*plugins, network=None):
    network = network or one_head()
    return Naive(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.05),
        train_mb_size=4,
        plugins=list(plugins),
        evaluator=None,
    )


def make_replay(condenser=None):
    condenser = condenser or make_condenser()
    return CondensedReplayPlugin(condenser=condenser, budget=ImagesPerClass(STORED), progress=False)


ARRIVED = [1, 3, 0, 5, 2, 4]  # by label within an experience


def test_a_classifier_grows_online():
    network = nn.Sequential(features(), IncrementalClassifier(16, initial_out_features=1))
    replay = make_replay()
    strategy = naive(replay, network=network)
    for experience in online(classes_xyt(), access_task_boundaries=True)[0]:
        strategy.train(experience)
    assert network[-1].classifier.out_features == CLASSES
    assert replay.memory.counts == dict.fromkeys(ARRIVED, STORED)


@pytest.mark.filterwarnings("ignore:Deprecated:UserWarning")
def test_the_older_online_scenario():
    scenario = OnlineCLScenario(classes_xyt().streams.values(), experience_size=5)
    replay = make_replay()
    strategy = naive(replay)
    for experience in scenario.train_online_stream:
        strategy.train(experience)
    assert len(replay.history) == 12
    assert replay.memory.counts == dict.fromkeys(ARRIVED, STORED)


def test_boundaries_that_fade():
    replay = make_replay()
    strategy = naive(replay)
    stream = split_continuous_linear_decay_stream(
        classes_xyt().train_stream,
        experience_size=5,
        iters_per_virtual_epoch=4,
        beta=2,
        shuffle=True,
    )
    sizes = []
    for experience in stream:
        strategy.train(experience)
        sizes.append(len(replay.memory))
    assert len(sizes) == 12 and sizes == sorted(sizes)
    assert sizes[-1] == STORED * CLASSES == STORED * len(replay.memory.classes)


@pytest.mark.parametrize("condenser", RECIPES.values(), ids=RECIPES)
def test_one_class_in_each_experience(condenser):
    replay = make_replay(condenser)
    strategy = naive(replay)
    for experience in classes_xyt(experiences=CLASSES).train_stream:
        strategy.train(experience)
    assert replay.memory.counts == dict.fromkeys(ORDER, STORED)


def sharing():
    """The plugin replays from the memory, and classes are recognised by its means."""
    replay = make_replay()
    network = evaluated_by(NCMClassifier)
    strategy = naive(replay, MemoryNCMUpdate(storage_policy=replay.buffer), network=network)
    for experience in classes_xyt().train_stream:
        strategy.train(experience)
    return replay, network.eval_classifier


def test_plugins_share_a_memory():
    replay, classifier = sharing()
    assert replay.memory.counts == dict.fromkeys(ARRIVED, STORED)
    assert sorted(classifier.class_means_dict) == sorted(ARRIVED)


def test_plugins_that_share_a_memory_condense_once():
    assert len(sharing()[0].history) == 3


def test_an_experience_that_is_trained_again_is_condensed_again():
    replay = make_replay()
    strategy = naive(replay)
    experience = classes_xyt().train_stream[0]
    for _ in range(2):
        strategy.train(experience)
    assert len(replay.history) == 2


PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


@pytest.mark.parametrize("part", ["plugin", "buffer"])
def test_the_documentation_has_this_table(part):
    assert "\n".join(rows(part)) in PAGE.read_text(encoding="utf-8")


def shares(total, classes):
    share, rest = divmod(total, len(classes))
    return {label: share + (place < rest) for place, label in enumerate(classes)}


@pytest.mark.parametrize("stream", ALL)
def test_the_buffer_is_balanced_after_every_experience(stream):
    buffer = CondensedBuffer(condenser=make_condenser(), budget=TotalImages(9))
    arrived = []
    for number, experience in enumerate(STREAMS[stream]()[0]):
        buffer.post_adapt(SimpleNamespace(device="cpu"), experience)
        arrived += sorted(labels_of(experience) - set(arrived))
        counts, fair = buffer.memory.counts, shares(9, arrived)
        assert list(buffer.buffer_groups) == list(counts) == arrived
        assert all(1 <= counts[label] <= fair[label] for label in arrived)
        # At first there are ten images of two classes, or three or four of six, and four fit into
        # one; five are not always enough to fill it.
        assert sum(counts.values()) == (9 if number else 6) or "online" in stream
        lengths = [len(dataset) for dataset in buffer.buffer_datasets]
        assert lengths == [4 * count for count in counts.values()]
        assert len(buffer.buffer) == sum(lengths) <= buffer.max_size == 4 * 9
    assert list(counts.values()) == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("stream", ALL)
def test_a_buffer_that_was_resized_between_experiences_stays_so(stream):
    buffer = CondensedBuffer(condenser=make_condenser(), budget=TotalImages(12))
    strategy = naive(ReplayPlugin(mem_size=buffer.max_size, storage_policy=buffer))
    for n, experience in enumerate(STREAMS[stream]()[0]):
        if n == 1:
            buffer.resize(strategy, 4 * CLASSES)
            assert len(buffer.buffer) <= 4 * CLASSES
        strategy.train(experience)
        assert n == 0 or len(buffer.buffer) <= 4 * CLASSES
    assert buffer.memory.counts == dict.fromkeys(buffer.memory.classes, 1)
    assert len(buffer.memory) == CLASSES


def test_a_class_of_few_images_leaves_its_share_unused():
    """As in Avalanche's own buffers."""
    few = pictures().subset([0, *range(10, 20)])
    for buffer in (
        CondensedBuffer(condenser=recipes.random(network=NETWORK), budget=TotalImages(6)),
        ClassBalancedBuffer(max_size=6),
    ):
        buffer.post_adapt(SimpleNamespace(device="cpu"), SimpleNamespace(dataset=few))
        lengths = {label: len(group.buffer) for label, group in buffer.buffer_groups.items()}
        assert lengths == {0: 1, 1: 3}
