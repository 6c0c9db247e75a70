import errno
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from dc_replay import _writing, checkpoints, programs, recipes
from dc_replay.budgets import ImagesPerClass
from dc_replay.checkpoints import Checkpoint, Snapshot, fingerprint, joined
from dc_replay.errors import ArgumentError, DivergedError
from dc_replay.multisize import Multisize
from dc_replay.networks import ConvNet, convnet_for
from dc_replay.optimisation import OnReal, PixelStep
from dc_replay.pixels import Normalization
from dc_replay.sampling import Representative
from dc_replay.subsets import SubsetMatching

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(seed=1):
    images = torch.randint(256, (30, *SHAPE), dtype=torch.uint8, generator=seeded(seed))
    return images, torch.arange(30) % 3


def condenser(name, **parts):
    built = recipes.RECIPES[name](network=convnet_for(SIZE_OF, width=4), outer=5, inner=2)
    if isinstance(built.sampler, Representative):
        built = replace(built, sampler=Representative(4))
    if isinstance(built.update, OnReal):
        built = replace(built, update=OnReal(20))
    return replace(built, precision="float32", **parts)


SIZE_OF = SHAPE
EVERYTHING = {
    "subsets": SubsetMatching(2, 0.5),
    "multisize": Multisize(period=1, per_class=True),
    "most_decoded": 7,
}
CASES = {
    "idc": ("idc", {}),
    "dc": ("dc", {}),
    "dream_plus": ("dream_plus", {}),
    "everything": ("dream_plus", EVERYTHING),
}
every_case = pytest.mark.parametrize(("name", "parts"), CASES.values(), ids=CASES)
QUOTAS = {0: 2, 1: 3, 2: 2}


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Until:
    """A network update that ends the process, so to say, after some iterations."""

    update: object
    left: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, apprentice, pixels):
        if self.left:
            self.left[0] -= 1
            if self.left[0] < 0:
                raise Killed
        self.update(apprentice, pixels)


def run(built, path=None, *, seed=5, data=None, quotas=None):
    generator = seeded(seed)
    images, labels = data or toy()
    quotas = quotas or QUOTAS
    return built.condense(images, labels, quotas=quotas, generator=generator, checkpoint=path)


@pytest.fixture
def at_once(monkeypatch):
    """Write after every network, whatever it costs."""
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


@pytest.mark.usefixtures("at_once")
@every_case
@pytest.mark.parametrize("after", [1, 3, 4, 9])
def test_an_interrupted_condensation_ends_with_the_same_bytes(name, parts, after, tmp_path):
    built = condenser(name, **parts)
    built = replace(built, update=Until(built.update))
    expected = run(built)
    path = tmp_path / "state.safetensors"
    before = torch.get_rng_state()
    built.update.left.append(after)
    with pytest.raises(Killed):
        run(built, path)
    assert path.exists() == (after >= 2)  # two iterations to a network
    built.update.left.clear()
    torch.manual_seed(99)
    found = run(built, path)
    torch.set_rng_state(before)
    assert torch.equal(found.exemplars.pixels, expected.exemplars.pixels)
    assert torch.equal(found.exemplars.labels, expected.exemplars.labels)
    assert found.history == expected.history and found.iterations == 10


@pytest.mark.usefixtures("at_once")
def test_it_may_be_interrupted_again_and_again(tmp_path):
    built = condenser("dream_plus", **EVERYTHING)
    built = replace(built, update=Until(built.update))
    expected = run(built)
    path, deaths = tmp_path / "state", 0
    while True:
        built.update.left[:] = [3]
        try:
            found = run(built, path)
            break
        except Killed:
            deaths += 1
    assert deaths >= 3
    assert torch.equal(found.exemplars.pixels, expected.exemplars.pixels)
    assert found.history == expected.history


def test_a_finished_condensation_is_not_done_again(tmp_path):
    built = condenser("idc")
    built = replace(built, update=Until(built.update))
    first = run(built, tmp_path / "state")
    built.update.left.append(0)  # would end with the first iteration
    again = run(built, tmp_path / "state")
    assert torch.equal(first.exemplars.pixels, again.exemplars.pixels)
    assert first.history == again.history


@every_case
def test_a_finished_condensation_leaves_no_more_than_its_bytes(name, parts, tmp_path):
    built = condenser(name, **parts)
    data = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8, generator=seeded(1))
    built = replace(built, network=convnet_for((3, 16, 16), width=4))
    found = run(built, tmp_path / "state", data=(data, torch.arange(30) % 3))
    again = run(built, tmp_path / "state", data=(data, torch.arange(30) % 3))
    assert torch.equal(found.exemplars.pixels, again.exemplars.pixels)
    # The generator's state takes 5 kB.
    assert (tmp_path / "state").stat().st_size < found.exemplars.pixels.nbytes + 9_000


@pytest.mark.usefixtures("at_once")
def test_the_time_of_interrupted_runs_counts(tmp_path):
    path = tmp_path / "state"
    built = condenser("idc")
    assert run(built, tmp_path / "whole").seconds_before == 0
    built = replace(built, update=Until(built.update))
    built.update.left.append(5)
    began = time.perf_counter()
    with pytest.raises(Killed):
        run(built, path)
    spent = time.perf_counter() - began
    time.sleep(0.5)  # between the two nobody works
    built.update.left[:] = [4]
    with pytest.raises(Killed):
        run(built, path)
    time.sleep(0.5)
    built.update.left.clear()
    found = run(built, path).seconds_before
    assert 0 < found < 2 * spent + 0.4
    # It is finished now, and reading it again and again is no work.
    whole = run(built, path).seconds_before
    assert found < whole < found + spent + 1
    assert run(built, path).seconds_before == whole


def test_a_time_budget_counts_what_was_spent_before(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))
    clock = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))  # each reading a second
    built = replace(condenser("idc"), seconds=100)
    built = replace(built, update=Until(built.update))
    expected = run(built, tmp_path / "whole").iterations
    built.update.left.append(expected // 2)
    with pytest.raises(Killed):
        run(built, tmp_path / "state")
    built.update.left.clear()
    # The time after the last state does not count; what was done in it is lost, too.
    found = run(built, tmp_path / "state").iterations
    assert expected // 2 < found < expected + expected // 4


@pytest.mark.parametrize(
    "change",
    [
        {"built": condenser("idc", outer=6)},
        {"built": condenser("dream_plus")},
        {"seed": 6},
        {"data": toy(2)},
        {"quotas": {0: 2, 1: 2, 2: 2}},
    ],
    ids=["setting", "recipe", "seed", "images", "quotas"],
)
def test_a_state_of_another_condensation_is_refused(change, tmp_path):
    path = tmp_path / "state"
    run(condenser("idc"), path)
    before = path.read_bytes()
    arguments = {"built": condenser("idc"), **change}
    with pytest.raises(ArgumentError, match="`checkpoint` is '.*state', which belongs to another"):
        run(arguments.pop("built"), path, **arguments)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "header", "tensor", "value", "empty", "other"])
def test_a_damaged_file_is_an_error_that_says_what_to_do(damage, tmp_path):
    path = tmp_path / "state"
    run(condenser("idc"), path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "header":
        data[3] ^= 0xFF
    elif damage == "tensor":
        data[-1] ^= 1
    elif damage == "value":
        at = data.index(b"seconds") + len(b"seconds")
        digit = next(i for i in range(at, len(data)) if data[i : i + 1].isdigit())
        data[digit] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        from safetensors.torch import save

        data = bytearray(save({"x": torch.zeros(2)}))
    path.write_bytes(data)
    with pytest.raises(ArgumentError, match="`checkpoint` is '.*delete it to start anew"):
        run(condenser("idc"), path)


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(checkpoints, "FORMAT_VERSION", "1")
        run(condenser("idc"), tmp_path / "state")
    with pytest.raises(ArgumentError, match="`checkpoint` is .*is of format .*'1'.*, not .*'2'"):
        run(condenser("idc"), tmp_path / "state")


def test_a_full_disk_stops_nothing_and_leaves_what_was_there(tmp_path, monkeypatch):
    built, path = condenser("idc"), tmp_path / "state"
    expected = run(built)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_writing.os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="condensation goes on.*No space left") as caught:
        found = run(built, path)
    assert len([w for w in caught if "goes on" in str(w.message)]) == 1
    assert torch.equal(found.exemplars.pixels, expected.exemplars.pixels)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_before_anything_is_computed(tmp_path):
    with pytest.raises(ArgumentError, match="`checkpoint` is .*whose folder does not exist"):
        run(condenser("idc"), tmp_path / "missing" / "state")


def test_recipes_that_optimise_nothing_write_nothing(tmp_path):
    recipes.random().condense(*toy(), quotas=1, generator=seeded(), checkpoint=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: now[0])
    written = []

    def write(path, data, *, name):
        now[0] += 0.5  # what it costs
        written.append(now[0])

    monkeypatch.setattr(checkpoints, "write_whole", write)
    checkpoint = Checkpoint(tmp_path / "state", "x")
    for _ in range(200):
        now[0] += 1
        checkpoint.save_if_due(Snapshot)
    assert len(written) == 4  # at first, and then every 50 seconds
    assert 0.5 * len(written) / now[0] <= 0.011

    def collected():
        now[0] += 1.5
        return Snapshot()

    began, written = now[0], []
    for _ in range(1000):
        now[0] += 1
        checkpoint.save_if_due(collected)
    assert len(written) == (now[0] - began) // 200  # what collecting it takes counts, too


def test_parts_of_a_snapshot_come_back():
    first = Snapshot({"t": torch.ones(1)}, {"v": [1]})
    both = joined({"a": first, "b": Snapshot({}, {"v": 2})})
    assert both.part("a").tensors.keys() == {"t"} and both.part("a").values == {"v": [1]}
    assert both.part("b") == Snapshot({}, {"v": 2})


def other_classes():
    images, labels = toy()
    return images, labels + 1


STRUCTURE = {"bias": True}


def by_a_global(classes):
    """Its own code does not tell what it builds."""
    layer = torch.nn.Linear(SHAPE[0] * SHAPE[1] * SHAPE[2], classes, bias=STRUCTURE["bias"])
    return torch.nn.Sequential(torch.nn.Flatten(), layer)


@pytest.mark.parametrize("change", ["classes", "normalization", "version", "network"])
def test_a_state_of_what_is_not_seen_in_the_recipe_is_refused_too(change, tmp_path, monkeypatch):
    built = condenser("dm", network=by_a_global)

    def condense(data, normalization=None):
        images, labels = data
        return built.condense(
            images,
            labels,
            quotas=1,
            generator=seeded(1),
            normalization=normalization,
            checkpoint=tmp_path / "state",
        )

    condense(toy())
    before = (tmp_path / "state").read_bytes()
    condense(toy(), Normalization.identity(SHAPE[0]))  # which is what none means
    assert (tmp_path / "state").read_bytes() == before
    given = [other_classes() if change == "classes" else toy()]
    if change == "normalization":
        given.append(Normalization([0.1] * SHAPE[0], [0.5] * SHAPE[0]))
    if change == "version":
        monkeypatch.setattr("dc_replay.condense.own_version", lambda: "another")
    if change == "network":
        monkeypatch.setitem(STRUCTURE, "bias", False)
        programs._cached.cache_clear()  # as in another process
    with pytest.raises(ArgumentError, match="which belongs to another recipe"):
        condense(*given)


def test_a_finished_state_is_not_written_again(tmp_path):
    path = tmp_path / "state"
    run(condenser("idc"), path)
    before = path.stat()
    run(condenser("idc"), path)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_fingerprints_tell_values_apart_and_not_addresses():
    def make():
        return lambda: None

    assert fingerprint([make()]) == fingerprint([make()])
    tensors = [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.ones(2)]
    assert len({fingerprint([tensor]) for tensor in tensors}) == 4
    assert fingerprint(["a", "b"]) != fingerprint(["ab"])
    assert fingerprint([torch.zeros(0)])


SCRIPT = textwrap.dedent("""
    import sys, torch
    from dc_replay import checkpoints, recipes
    from dc_replay.networks import convnet_for
    checkpoints.SHARE = float("inf")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    built = recipes.dream_plus(network=convnet_for((3, 8, 8), width=4), outer=40, inner=2)
    print("ready", flush=True)
    found = built.condense(
        images, torch.arange(60) % 3, quotas=2, generator=generator, checkpoint=sys.argv[1]
    )
    sys.stdout.write(found.exemplars.pixels.numpy().tobytes().hex())
""")


def start(path):
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_goes_on_where_it_was(tmp_path):
    began = time.perf_counter()
    expected = start(tmp_path / "undisturbed").communicate()[0]
    whole = time.perf_counter() - began
    chance, kills = random.Random(0), 0
    path = tmp_path / "killed"
    for _ in range(3):
        process = start(path)
        try:
            process.wait(timeout=chance.uniform(0.05, 0.3) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
    assert kills
    assert start(path).communicate()[0] == expected
    assert [file.name for file in tmp_path.iterdir() if file.name[0] != "."] != []


def test_a_buffer_keeps_a_file_for_each_experience(tmp_path):
    from types import SimpleNamespace

    from avalanche.benchmarks.utils import as_classification_dataset

    from dc_replay.buffer import CondensedBuffer

    class Data(torch.utils.data.Dataset):
        def __init__(self, first):
            self.images = toy(first)[0].float() / 255
            self.targets = [first + label for label in toy()[1].tolist()]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            return self.images[index], self.targets[index]

    def memories(folder):
        built = condenser("idc")
        built = replace(built, update=Until(built.update))
        buffer = CondensedBuffer(
            condenser=built, budget=ImagesPerClass(1), seed=3, checkpoint_dir=folder
        )
        for first in (0, 3):
            experience = SimpleNamespace(dataset=as_classification_dataset(Data(first)))
            if folder is not None and folder.exists() and len(list(folder.iterdir())) == 2:
                built.update.left[:] = [0]  # both are finished
            buffer.remember(experience, device="cpu")
        return buffer.memory.exemplars.pixels

    expected = memories(None)
    folder = tmp_path / "new" / "states"
    assert torch.equal(memories(folder), expected)
    names = sorted(path.name for path in folder.iterdir())
    starts = [re.fullmatch(r"(idc-3-\d)-[0-9a-f]{8}\.safetensors", name)[1] for name in names]
    assert starts == ["idc-3-0", "idc-3-1"]
    assert torch.equal(memories(folder), expected)


@pytest.mark.parametrize(
    "other",
    [
        {"first": 3},  # a memory file was loaded, and this is the first from then on
        {"built": condenser("idc", inner=3)},
        {"built": condenser("idc", network=partial(ConvNet, channels=3, size=(8, 8), width=6))},
        {"budget": 2},
        {"darker": 1},  # the same classes in another domain
    ],
    ids=["classes", "steps", "network", "budget", "images"],
)
def test_states_of_other_runs_in_the_folder_are_left_alone(other, tmp_path):
    """They would be refused, and that after training on the experience."""
    from types import SimpleNamespace

    from avalanche.benchmarks.utils import as_classification_dataset

    from dc_replay.buffer import CondensedBuffer

    def remember(*, built=None, first=0, budget=1, darker=0):
        images, labels = toy()
        data = TensorDataset(images.float().sub(darker).clamp(0) / 255, labels)
        data.targets = (labels + first).tolist()
        data.tensors = (data.tensors[0], labels + first)
        experience = SimpleNamespace(dataset=as_classification_dataset(data))
        buffer = CondensedBuffer(
            condenser=built or condenser("idc"),
            budget=ImagesPerClass(budget),
            checkpoint_dir=tmp_path / "states",
        )
        buffer.remember(experience, device="cpu")
        return buffer.memory.exemplars.pixels

    before = remember()
    (path,) = (tmp_path / "states").iterdir()
    state = path.read_bytes()
    remember(**other)
    assert len(list((tmp_path / "states").iterdir())) == 2 and path.read_bytes() == state
    assert torch.equal(remember(), before)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    left, other = tmp_path / ".run[1].0123abcd.tmp", tmp_path / ".run2.0123abcd.tmp"
    for path in (left, other):
        path.write_bytes(b"half")
    Checkpoint(tmp_path / "run[1]", "x")
    assert not left.exists() and other.exists()


@pytest.mark.usefixtures("at_once")
def test_a_message_counts_the_iterations_of_all_processes(tmp_path, monkeypatch):
    def late(self, optimizer, share):
        for group in optimizer.param_groups:
            group["lr"] = self.lr if share < 0.5 else 1e35

    monkeypatch.setattr(PixelStep, "set_rate", late)
    built = condenser("idc")
    built = replace(built, update=Until(built.update, [3]))
    with pytest.raises(Killed):
        run(built, tmp_path / "state")
    built.update.left.clear()
    messages = []
    for path in (None, tmp_path / "state"):
        with pytest.raises(DivergedError) as caught:
            run(built, path)
        messages.append(str(caught.value))
    assert "outer iteration 3" in messages[0] and messages[1] == messages[0]
