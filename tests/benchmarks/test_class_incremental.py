from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from PIL import Image

from benchmarks.class_incremental import Arguments, Run, State, _stream, cli, main
from benchmarks.compiled import CompiledLayers
from benchmarks.data import load
from benchmarks.presets import PRESETS, condenser, network_factory
from dc_replay import (
    RECIPES,
    ArgumentError,
    CondensedReplayPlugin,
    DistillationPlugin,
    ExemplarMemory,
    LogitAdjustmentPlugin,
)
from dc_replay.checkpoints import Checkpoint
from dc_replay.networks import ConvNet
from dc_replay.optimisation import Optimisation
from dc_replay.pixels import quantise
from strategies import WITHOUT_RECIPE
from strategies.common import AugmentBatch
from strategies.training_state import TrainingState

FIELDS = {
    "method", "protocol", "seed", "step", "classes_seen", "accuracy", "forgetting", "stored_bytes",
    "images_per_class", "condense_seconds", "train_seconds", "network", "data", "preset", "device",
    "commit", "versions",
}  # fmt: skip


def smoke(out: Path, **changes: object) -> Arguments:
    small = Arguments(
        preset="smoke", methods="random,idc", ipc=2, classes=4, steps=2, out=out, quiet=True
    )
    return replace(small, **changes)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("protocol", ["memory-only", "gdumb", "replay"])
def test_every_protocol_writes_all_outputs(protocol: str, tmp_path: Path) -> None:
    methods = "random,idc"
    if protocol == "replay":
        methods += "," + ",".join(name for name in WITHOUT_RECIPE if name != "stock_reservoir")
    table = main(smoke(tmp_path, protocol=protocol, methods=methods), "the command")
    found = rows(tmp_path)
    assert [(r["method"], r["step"]) for r in found] == [
        (m, s) for m in methods.split(",") for s in (0, 1)
    ]
    for row in found:
        assert set(row) >= FIELDS
        assert 0 <= row["accuracy"] <= 100 and row["classes_seen"] == 2 * (row["step"] + 1)
        assert (row["forgetting"] is None) == (row["step"] == 0)
        expected = {"naive": 0, "cumulative": None}.get(row["method"], 2 * row["classes_seen"] * 64)
        assert expected is None or row["stored_bytes"] == expected
    for name in ("accuracy.png", "exemplars.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 50
    assert "the command" in (tmp_path / "report.md").read_text()
    assert "idc" in table
    for logs in ("*.csv", "tensorboard/*"):
        assert list((tmp_path / "logs" / "idc-0").glob(logs))


def test_same_command_again_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(smoke(tmp_path), "x")
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(Run, "contest", lambda *_: pytest.fail("computed again"))
    main(smoke(tmp_path), "x")
    assert (tmp_path / "results.jsonl").read_bytes() == before


def check_same(whole: Path, parted: Path, method: str = "idc") -> None:
    same = ("step", "accuracy", "forgetting", "stored_bytes")
    assert [[r[k] for k in same] for r in rows(parted)] == [
        [r[k] for k in same] for r in rows(whole)
    ]
    first, second = (
        ExemplarMemory.load(out / "memories" / f"{method}.safetensors") for out in (whole, parted)
    )
    assert torch.equal(first.exemplars.pixels, second.exemplars.pixels)
    assert not list((parted / "state").iterdir())


def weights_after(last: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """A list to which every run adds its network's weights after the last step."""
    save, trained = State.save, []

    def keep(self: State, contender, steps):
        if steps == last:
            trained.append(copy.deepcopy(contender.strategy.model.state_dict()))
        save(self, contender, steps)

    monkeypatch.setattr(State, "save", keep)
    return trained


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "memory-only"},
        {"protocol": "gdumb"},
        {"protocol": "replay"},
        {"protocol": "replay", "logit_adjustment": 1.0, "distillation": 1.0},
    ],
)
def test_stopped_run_continues_to_the_same_results(
    options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    trained = weights_after(4, monkeypatch)
    main(smoke(whole, methods="idc", steps=4, **options), "x")
    step = Run._step

    def stop(self: Run, contender, method, seed, number, data, stream):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, contender, method, seed, number, data, stream)

    monkeypatch.setattr(Run, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        main(smoke(parted, methods="idc", steps=4, **options), "x")
    steps = []

    def count(self: Run, contender, method, seed, number, data, stream):
        steps.append(number)
        return step(self, contender, method, seed, number, data, stream)

    monkeypatch.setattr(Run, "_step", count)
    main(smoke(parted, methods="idc", steps=4, **options), "x")
    assert steps == [2, 3]
    check_same(whole, parted)
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("step", [0, 2])
def test_run_stopped_in_a_condensation_continues_in_it(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    main(smoke(whole, methods="idc", steps=4), "x")
    saves = []

    def stop(self: Checkpoint, state) -> None:
        self.save(state())
        saves.append(self.path)
        if len(saves) == 2 * step + 1:  # after the first of the step's networks
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save_if_due", stop)
    with pytest.raises(KeyboardInterrupt):
        main(smoke(parted, methods="idc", steps=4), "x")
    restored = []
    restore = Optimisation.restore
    monkeypatch.setattr(Optimisation, "restore", lambda *a: restored.append(restore(*a)))
    main(smoke(parted, methods="idc", steps=4), "x")
    assert len(restored) == 1 and len(rows(parted)) == 4
    check_same(whole, parted)


@pytest.mark.parametrize(
    ("stopped_after", "options"),
    [
        ((0, 1), {"protocol": "memory-only"}),
        ((2, 5), {"protocol": "memory-only"}),
        ((1, 3), {"protocol": "gdumb", "methods": "random"}),
        ((1, 3), {"protocol": "replay", "logit_adjustment": 1.0, "distillation": 1.0}),
        ((1, 3), {"protocol": "replay", "match_condensing": 1.0}),
        (
            (2, 5),
            {"protocol": "replay", "augmentation": "training", "methods": "random+compress=2"},
        ),
    ],
)
def test_run_stopped_in_training_continues_in_it(
    stopped_after: tuple[int, int], options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"methods": "idc", "classes": 6, "steps": 3, "epochs": 5} | options
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    write = TrainingState.after_training_epoch
    epochs, end = [], (0, 0)

    def stop(self: TrainingState, strategy: Any, **kwargs: object) -> None:
        self.seconds = 0
        write(self, strategy, **kwargs)
        epochs.append((strategy.experience.current_experience, strategy.clock.train_exp_epochs))
        if epochs[-1] == end:
            written.append(torch.load(self.path)["seconds"])
            raise KeyboardInterrupt

    begin, before, written = TrainingState.before_training_exp, [], []

    def note(self: TrainingState, strategy: Any, **kwargs: object) -> None:
        begin(self, strategy, **kwargs)
        before.append(self.seconds_before)

    monkeypatch.setattr(TrainingState, "before_training_exp", note)
    trained = weights_after(3, monkeypatch)
    monkeypatch.setattr(TrainingState, "after_training_epoch", stop)
    main(smoke(whole, **changes), "x")
    every = list(epochs)
    assert every == [(step, epoch) for step in range(3) for epoch in range(1, 6)]
    epochs, end = [], stopped_after
    with pytest.raises(KeyboardInterrupt):
        main(smoke(parted, **changes), "x")
    end = (0, 0)
    main(smoke(parted, **changes), "x")
    assert epochs == every  # none twice
    assert [seconds for seconds in before if seconds] == written
    check_same(whole, parted, changes["methods"])
    assert [r["iterations"] for r in rows(parted)] == [r["iterations"] for r in rows(whole)]
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_a_state_of_training_with_other_settings_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_forgetting", stop)
        with pytest.raises(KeyboardInterrupt):
            main(smoke(tmp_path / "one", methods="random", epochs=3), "x")
    (tmp_path / "one" / "settings.json").unlink()
    main(smoke(tmp_path / "one", methods="random", epochs=2), "x")
    main(smoke(tmp_path / "other", methods="random", epochs=2), "x")
    found, expected = rows(tmp_path / "one"), rows(tmp_path / "other")
    assert [r["iterations"] for r in found] == [r["iterations"] for r in expected]
    assert [r["accuracy"] for r in found] == [r["accuracy"] for r in expected]


def test_a_state_of_training_on_another_device_is_not_used(tmp_path: Path) -> None:
    on_cpu, on_gpu = (
        State(tmp_path).training({"epochs": 3}, torch.device(name)) for name in ("cpu", "cuda")
    )
    assert on_cpu != on_gpu


def test_seconds_of_training_are_those_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = TrainingState.before_training_exp

    def slow(self: TrainingState, strategy: Any, **kwargs: object) -> None:
        begin(self, strategy, **kwargs)
        self.seconds_before += 1000

    monkeypatch.setattr(TrainingState, "before_training_exp", slow)
    main(smoke(tmp_path, methods="random"), "x")
    assert all(1000 < row["train_seconds"] < 1900 for row in rows(tmp_path))


@pytest.mark.parametrize("left", [0, 2])
def test_a_state_without_its_rows_is_not_used(left: int, tmp_path: Path) -> None:
    main(smoke(tmp_path, methods="idc", steps=4), "x")
    found = rows(tmp_path)
    stale = tmp_path / "state" / "idc-0" / "after-3"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").touch()
    written = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(written[:left]))
    main(smoke(tmp_path, methods="idc", steps=4), "x")
    same = ("step", "accuracy", "stored_bytes")
    assert [[r[k] for k in same] for r in rows(tmp_path)] == [[r[k] for k in same] for r in found]
    assert not stale.exists()


def test_all_methods_get_the_same_bytes_and_gradient_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[str, list[int]] = {}
    step = Run._step

    def counted(self: Run, contender, method, seed, number, data, stream):
        result = step(self, contender, method, seed, number, data, stream)
        batches.setdefault(method, []).append(contender.strategy.clock.train_iterations)
        return result

    monkeypatch.setattr(Run, "_step", counted)
    main(smoke(tmp_path, methods="random,herding,representative,idc"), "x")
    assert len({tuple(counts) for counts in batches.values()}) == 1
    assert len({(r["step"], r["stored_bytes"]) for r in rows(tmp_path)}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "idc,best"}, "`methods` names 'best'.*dream_plus"),
        ({"methods": ""}, "`methods` is ''; name at least one"),
        ({"methods": "naive"}, "`methods` names 'naive', .* compare it with protocol replay"),
        ({"methods": "idc+mcd"}, r"`methods` names 'idc\+mcd', .*'mcd'; add .*\+mdc"),
        ({"budget": "total-bytes:0"}, "`budget` is 'total-bytes:0', but must be total-bytes:N"),
        ({"budget": "bytes:900"}, "`budget` is 'bytes:900', but must be total-bytes:N"),
        ({"budget": "total-images:3"}, "3, which is below one image for each of 4 classes"),
        ({"shrink_at": "0:1"}, "`shrink_at` is '0:1', but must be STEP:IPC with a step from 1 to"),
        ({"shrink_at": "2:1"}, "`shrink_at` is '2:1', .* 1 to 1 and from 1 to 2 images"),
        ({"shrink_at": "1:3"}, "`shrink_at` is '1:3'"),
        ({"shrink_at": "1"}, "`shrink_at` is '1'"),
        ({"shrink_at": "1:1", "budget": "total-images:8"}, "`shrink_at` and `budget` both bound"),
        ({"preset": "slow"}, "`preset` is 'slow'.*smoke, fast, paper"),
        ({"data": "imagenet"}, "imagenet.*cifar100"),
        ({"data": "npz:/not/there.npz"}, "/not/there.npz"),
        ({"network": "vgg"}, "`network` is 'vgg'.*resnet10"),
        ({"ipc": 0}, "`ipc` is 0"),
        ({"factor": 0}, "`factor` is 0"),
        ({"factor": 9}, "`factor` is 9.*8x8"),
        ({"steps": 3}, "`steps` is 3.*4 classes"),
        ({"seeds": "0,x"}, "`seeds` is '0,x'"),
        ({"epochs": 0}, "`epochs` is 0"),
        ({"classes": 11}, "11"),
        ({"order": "idc"}, "100"),
        ({"device": "cuda:77"}, "`device` is 'cuda:77'"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    arguments = {"methods": "idc", **changes}
    with pytest.raises(ArgumentError, match=message):
        main(smoke(tmp_path, **arguments), "x")


@pytest.mark.filterwarnings("ignore:multisize condensation does nothing:UserWarning")
@pytest.mark.parametrize("protocol", ["memory-only", "replay"])
@pytest.mark.parametrize(("kind", "each"), [("bytes", 64), ("images", 1)])
def test_a_total_budget_is_never_exceeded(
    kind: str, each: int, protocol: str, tmp_path: Path
) -> None:
    methods = ["random", "dream_plus+mdc"]
    if protocol == "replay":
        methods += ["stock_replay", "stock_herding"]
    options = {"budget": f"total-{kind}:{5 * each}", "ipc": 2, "steps": 2, "protocol": protocol}
    main(smoke(tmp_path, methods=",".join(methods), **options), "x")
    found = {(row["method"], row["step"]): row["stored_bytes"] // 64 for row in rows(tmp_path)}
    # Two images for each of two classes, then five for four.
    assert found == {(name, step): 4 + step for name in methods for step in (0, 1)}


def test_a_reservoir_is_always_full_and_needs_a_total(tmp_path: Path) -> None:
    options = {"methods": "stock_reservoir", "ipc": 3, "steps": 2, "protocol": "replay"}
    main(smoke(tmp_path / "some", budget="total-images:6", **options), "x")
    assert [row["stored_bytes"] // 64 for row in rows(tmp_path / "some")] == [6, 6]
    with pytest.raises(ArgumentError, match="'stock_reservoir'.* give a `budget`, such as"):
        main(smoke(tmp_path / "none", **options), "x")
    with pytest.raises(ArgumentError, match="`ipc` is 3.*other methods store 6.*at least 4,"):
        main(smoke(tmp_path / "more", budget="total-images:8", **options), "x")


def test_all_images_in_the_bytes_of_one_are_drawn(tmp_path: Path) -> None:
    from benchmarks import class_incremental

    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            class_incremental, "exemplar_sheet", lambda sheet, *args, **options: drawn.update(sheet)
        )
        main(smoke(tmp_path, methods="random"), "x")
        drawn.clear()
        main(smoke(tmp_path, methods="random+compress=3"), "x")
    assert drawn["random"].shape[1] == 2 and drawn["random+compress=3"].shape[1] == 6
    memory = ExemplarMemory.load(tmp_path / "memories" / "random+compress=3.safetensors")
    expected = quantise(memory.decoded(normalised=False)[0])
    assert torch.equal(drawn["random+compress=3"].flatten(0, 1), expected[: 6 * 10])


@pytest.mark.filterwarnings("ignore:multisize condensation does nothing:UserWarning")
@pytest.mark.parametrize("protocol", ["memory-only", "gdumb", "replay"])
def test_memories_are_cut_in_mid_stream(protocol: str, tmp_path: Path) -> None:
    methods = ["random", "dream_plus+sm+mdc"]
    if protocol == "replay":
        methods += ["stock_replay", "stock_herding"]
    main(
        smoke(
            tmp_path, methods=",".join(methods), protocol=protocol, ipc=3, steps=4, shrink_at="2:1"
        ),
        "x",
    )
    for name in methods:
        stored = [row["images_per_class"] for row in rows(tmp_path) if row["method"] == name]
        assert stored == [3, 3, 1, 1]
    assert "| `shrink_at` | `2:1` |" in (tmp_path / "report.md").read_text()
    assert "every method stores" in (tmp_path / "report.md").read_text()


def test_other_settings_in_the_same_folder(tmp_path: Path) -> None:
    main(smoke(tmp_path, methods="random"), "x")
    with pytest.raises(ArgumentError, match="ipc was 2 and is now 3"):
        main(smoke(tmp_path, methods="random", ipc=3), "x")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--preset", "smoke", "--classes", "2", "--steps", "1", "--ipc", "1", "--quiet"]
    assert cli([*asked, "--methods", "random", "--out", str(tmp_path)]) == 0
    assert "random" in capsys.readouterr().out
    assert cli([*asked, "--methods", "nothing", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: `methods`")


def test_copy_of_compiled_layers_runs_on_its_own_weights() -> None:
    layers = CompiledLayers(torch.nn.Linear(3, 3), batch=4, mode=False, steps=1)
    images = torch.rand(4, 3)
    before = layers(images)
    other = copy.deepcopy(layers)
    with torch.no_grad():
        other.layers.weight += 1
    assert torch.equal(layers(images), before)
    assert not torch.equal(other(images), before)


def test_layers_run_compiled_on_whole_batches_alone() -> None:
    layers = CompiledLayers(torch.nn.Linear(3, 3), batch=4, mode=False, steps=1)
    ran: list[int] = []
    layers._run = lambda images: ran.append(len(images)) or layers.layers(images)
    frozen = copy.deepcopy(layers).eval().requires_grad_(False)
    frozen._run = lambda images: ran.append(10 * len(images)) or frozen.layers(images)
    for count in (4, 3, 500):
        images = torch.rand(count, 3)
        with torch.no_grad():
            assert torch.equal(frozen(images), layers(images))
    assert ran == [40, 4]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_every_recipe(preset: str) -> None:
    factory = network_factory("convnet3", channels=3, size=(32, 32), width=8)
    built = {
        name: condenser(name, PRESETS[preset], factor=2, ipc=20, network=factory)
        for name in RECIPES
    }
    assert built["idc"].formation.factor == built["representative"].formation.factor == 2
    assert built["herding"].formation.factor == built["dm"].formation.factor == 1
    if preset == "paper":
        assert (built["idc"].outer, built["idc"].inner, built["idc"].pixels.lr) == (2000, 100, 5e-3)
        assert (built["dream_plus"].outer, built["dream_plus"].sampler.batch) == (1200, 128)
        assert (built["dm"].outer, built["dm"].inner) == (20_000, 1)
        assert (built["dc"].outer, built["dc"].inner, built["dc"].update.epochs) == (1000, 20, 25)
        assert isinstance(factory(2), ConvNet)


def test_real_images_from_an_npz_file(cifar100_npz: Path, tmp_path: Path) -> None:
    real = smoke(tmp_path, data=f"npz:{cifar100_npz}", methods="random,dream_plus")
    main(real, "x")
    assert {row["stored_bytes"] for row in rows(tmp_path)} == {2 * 2 * 3072, 4 * 2 * 3072}
    stored = ExemplarMemory.load(tmp_path / "memories" / "random.safetensors")
    raw = load(real.data).x_train
    for image in stored.exemplars.pixels:
        assert (raw == image).flatten(1).all(dim=1).any()
    condensed = ExemplarMemory.load(tmp_path / "memories" / "dream_plus.safetensors")
    assert not (raw == condensed.exemplars.pixels[0]).flatten(1).all(dim=1).any()


def test_exemplars_come_with_images_of_their_resolution(tmp_path: Path) -> None:
    run = Run(smoke(tmp_path, protocol="replay", match_storage=0.75, match_condensing=0.5))
    contender = run._contender("idc", 0, run.arguments.in_order(run.data, seed=0), tmp_path)
    [replay] = [p for p in contender.strategy.plugins if isinstance(p, CondensedReplayPlugin)]
    assert (replay.match_storage, replay.match_condensing) == (0.75, 0.5)
    assert run.protocol == "replay, match condensing 0.5"


def test_a_share_outside_of_0_to_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`match_storage` is 2.0, but is a share"):
        Run(replace(smoke(tmp_path), match_storage=2.0))


class Seen(SupervisedPlugin):
    """The images that the network is shown, and their labels."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.images.append(strategy.mbatch[0].flatten(1).clone())
        self.labels.append(strategy.mbatch[1].clone())


@pytest.mark.parametrize("method", ["herding", "naive", "stock_replay"])
@pytest.mark.parametrize("augmentation", ["batch", "training"])
def test_images_are_augmented_as_a_batch_or_by_the_training_transforms(
    augmentation: str, method: str, tmp_path: Path
) -> None:
    arguments = smoke(tmp_path, protocol="replay", methods=method, augmentation=augmentation)
    run = Run(arguments)
    data = arguments.in_order(run.data, seed=0)
    contender = run._contender(method, 0, data, tmp_path)
    batches = augmentation == "batch"
    plugins = contender.strategy.plugins
    assert any(isinstance(plugin, AugmentBatch) for plugin in plugins) == batches
    # The last that sees images before whole mini-batches are augmented.
    plugins.insert(0, seen := Seen())
    stream = _stream(data, arguments.steps, augmentation).train_stream
    for experience in stream:
        contender.strategy.train(experience)
    images, labels = torch.cat(seen.images), torch.cat(seen.labels)
    plain = torch.stack([item[0] for step in stream for item in step.dataset.eval()]).flatten(1)
    known = torch.stack([(plain - image).abs().amax(dim=1).min() < 1e-4 for image in images])
    first = sum(len(part) for part in seen.labels[: len(seen.labels) // 2])
    exemplars = torch.arange(len(labels)).ge(first) & labels.lt(2)
    assert bool(exemplars.any()) == (method != "naive")
    for part in (~exemplars, exemplars):
        if part.any():
            share = known[part].float().mean()
            assert share == 1 if batches else share < 0.7
    assert ("training transforms" in run.protocol) != batches
    assert ("augmentation" in run.settings()) != batches


def test_training_transforms_are_for_replay_beside_new_data(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`augmentation` is training, but `protocol` is memory"):
        Run(smoke(tmp_path, augmentation="training"))


@pytest.mark.parametrize("method", ["idc", "naive", "stock_replay"])
def test_every_memory_is_trained_with_the_same_losses(method: str, tmp_path: Path) -> None:
    weights = {"logit_adjustment": 0.5, "distillation": 2.0}
    run = Run(smoke(tmp_path, protocol="replay", methods=method, **weights))
    contender = run._contender(method, 0, run.arguments.in_order(run.data, seed=0), tmp_path)
    found = [
        (type(plugin), plugin.weight)
        for plugin in contender.strategy.plugins
        if isinstance(plugin, LogitAdjustmentPlugin | DistillationPlugin)
    ]
    assert found == [(LogitAdjustmentPlugin, 0.5), (DistillationPlugin, 2.0)]
    assert run.settings()["distillation"] == 2.0
    assert run.protocol == "replay, logit adjustment 0.5, distillation 2"
    # Results from before there were these losses stay comparable with those without them.
    assert not weights.keys() & Run(smoke(tmp_path, protocol="replay")).settings().keys()


@pytest.mark.parametrize("name", ["logit_adjustment", "distillation", "match_condensing"])
def test_losses_beside_new_data_are_checked(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"`{name}` is -1.0, but must be at least 0"):
        Run(smoke(tmp_path, protocol="replay", **{name: -1.0}))
    with pytest.raises(ArgumentError, match=f"`{name}` is 1.0, but `protocol` is gdumb"):
        Run(smoke(tmp_path, protocol="gdumb", **{name: 1.0}))
