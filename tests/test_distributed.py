import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dc_replay import checkpoints, recipes
from dc_replay.distributed import SINGLE, Ranks, alone
from dc_replay.errors import DCReplayError, DivergedError
from dc_replay.formation import Formation
from dc_replay.multisize import Multisize
from dc_replay.networks import convnet_for
from dc_replay.optimisation import OnReal, OnSynthetic, PixelStep
from dc_replay.sampling import Representative, Uniform, nearest_in_each
from dc_replay.subsets import SubsetMatching

# This file is also what the processes run that it starts: `python test_distributed.py ROLE ...`.
ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 8, 8)
SIZES = [2, 4]
QUOTAS = {0: 2, 1: 3, 2: 2, 3: 1, 4: 4}
EVERYTHING = {
    "subsets": SubsetMatching(2, 0.5),
    "multisize": Multisize(period=2, per_class=True),
    "most_decoded": 7,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(counts=(9, 14, 6, 14, 20)):
    """Unequal classes, in the fourth of which only two images differ."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randint(256, (len(labels), *SHAPE), dtype=torch.uint8, generator=seeded(1))
    if len(counts) > 3:
        rows = (labels == 3).nonzero().flatten()
        images[rows] = images[rows[torch.arange(len(rows)) % 2]]
    return images, labels


def batch_normalised(classes):
    """A network whose features of an image depend on the others in its batch."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
    )


def small(name, **parts):
    parts.setdefault("network", convnet_for(SHAPE, width=4))
    built = recipes.RECIPES[name]()
    if isinstance(built.sampler, Representative):
        built = replace(built, sampler=Representative(4, every=2))
    elif built.objective is not None:
        built = replace(built, sampler=Uniform(5))
    if isinstance(built.update, OnReal):
        built = replace(built, update=OnReal(20))
    elif isinstance(built.update, OnSynthetic):
        built = replace(built, update=OnSynthetic(1))
    parts = {"outer": 5, "inner": 3, "warm_up": 1, "compile": False, **parts}
    return replace(built, precision="float32", **parts)


CASES = {
    "idc": lambda: small("idc"),
    "dc": lambda: small("dc"),
    "dm": lambda: small("dm"),
    "dream_plus with everything": lambda: small("dream_plus", **EVERYTHING),
    "batch normalisation": lambda: small("dream_plus", network=batch_normalised, outer=2),
    "herding": lambda: small("herding"),
    "compressed": lambda: small("dream_plus", outer=2, formation=Formation(1, compression=4)),
}
every_case = pytest.mark.parametrize("case", CASES)
every_size = pytest.mark.parametrize("size", SIZES)


def run(built, *, data=None, seed=5, quotas=QUOTAS, path=None):
    images, labels = data or toy()
    return built.condense(images, labels, quotas=quotas, generator=seeded(seed), checkpoint=path)


def plain(found):
    return {
        "pixels": found.exemplars.pixels,
        "labels": found.exemplars.labels,
        "history": found.history,
    }


class Interrupted(Exception):
    pass


@dataclass(frozen=True)
class Until:
    """A network update that ends the condensation, so to say, after some iterations."""

    update: object
    left: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, apprentice, pixels):
        if self.left:
            self.left[0] -= 1
            if self.left[0] < 0:
                raise Interrupted
        self.update(apprentice, pixels)


@dataclass(frozen=True)
class Slow:
    """A network update that takes long on one rank."""

    def __call__(self, apprentice, pixels):
        time.sleep(0.04 * Ranks.here().rank)


def attempt(*arguments, **options):
    try:
        return plain(run(*arguments, **options))
    except DCReplayError as error:
        found = {"error": f"{type(error).__name__}: {error}"}
        condensed = getattr(error, "condensed", None)
        return found if condensed is None else {**found, **plain(condensed)}


def going_on(path):
    """Condense, be interrupted in the third network, and go on."""
    built = small("dream_plus", **EVERYTHING)
    built = replace(built, update=Until(built.update, [7]))
    with pytest.raises(Interrupted):
        run(built, path=path)
    if not Ranks.here().rank:
        path.with_suffix(".interrupted").write_bytes(path.read_bytes())
    built.update.left.clear()
    return built, plain(run(built, path=path))


def clusters(share=None):
    """One set is large and takes long to come to rest; the others seem to rest at once."""
    scales = torch.tensor([1.0, 3e-3, 3e-3, 3e-3])
    features = torch.randn((4, 60, 3), generator=seeded(1)) * scales[:, None, None]
    return [index.tolist() for index in nearest_in_each(features, [6] * 4, seeded(), share=share)]


def everything(folder):
    """What each rank finds, by the name of the case."""
    rank = Ranks.here().rank
    found = {name: plain(run(make())) for name, make in CASES.items()}
    found["few classes"] = plain(run(small("dream_plus"), data=toy((6, 9)), quotas=2))
    found["diverging"] = attempt(small("idc", pixels=PixelStep(lr=1e30)))
    images, labels = toy()
    fewer = (images[rank:], labels[rank:])
    found["fewer images"] = attempt(small("idc"), data=fewer)
    found["another seed"] = attempt(small("idc"), seed=rank)
    found["another recipe"] = attempt(small("idc", inner=2 + rank))
    found["refused"] = attempt(small("idc"), data=(images.float(), labels) if rank else None)
    found["no folder"] = attempt(small("idc"), path=folder / "missing" / "state")
    found["seconds"] = plain(run(small("idc", seconds=0.6, update=Slow())))
    found["gone on"] = going_on(folder / "state")[1]
    found["clusters"] = clusters(Ranks.here().share(4))
    found["files"] = sorted(path.name for path in folder.glob("state*"))
    if not rank:
        with alone():
            found["alone"] = plain(run(small("idc")))
    return found


def join(folder, rank, size):
    torch.set_num_threads(1)
    checkpoints.SHARE = float("inf")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def started(folder, size, role):
    """What each of some processes saves, which were started together."""
    command = [sys.executable, __file__, role, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By the number of ranks what each of them found; they are started when first asked for."""
    found = {}

    def of(size):
        if size not in found:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            found[size] = started(folder, size, "everything"), folder
        return found[size]

    return of


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def single():
    """What one process finds, by the name of the case."""
    found = {}

    def of(case, make):
        if case not in found:
            found[case] = attempt(make())
        return found[case]

    return of


def same(one, other):
    assert one.keys() == other.keys()
    for name in {"pixels", "labels"} & one.keys():
        assert torch.equal(one[name], other[name])
    assert {n: v for n, v in one.items() if n not in ("pixels", "labels")} == {
        n: v for n, v in other.items() if n not in ("pixels", "labels")
    }
    return True


@every_size
@every_case
def test_the_number_of_ranks_does_not_change_a_byte(case, size, results, single):
    expected = single(case, CASES[case])
    for rank in results(size)[0]:
        assert same(rank[case], expected)


@every_size
def test_there_may_be_more_ranks_than_classes(size, results):
    expected = plain(run(small("dream_plus"), data=toy((6, 9)), quotas=2))
    for rank in results(size)[0]:
        assert same(rank["few classes"], expected)


@every_size
def test_clusters_end_together_wherever_they_are(size, results):
    expected = clusters()
    for rank, found in enumerate(results(size)[0]):
        own = Ranks(rank, size).share(4).own
        assert [found["clusters"][n] for n in own] == [expected[n] for n in own]


@every_size
def test_all_ranks_diverge_alike(size, results, single):
    expected = single("diverging", lambda: small("idc", pixels=PixelStep(lr=1e30)))
    assert expected["error"].startswith("DivergedError: the condensation diverged")
    for rank in results(size)[0]:
        assert same(rank["diverging"], expected)


@every_size
@pytest.mark.parametrize(
    ("case", "argument"),
    [("fewer images", "images"), ("another seed", "generator"), ("another recipe", "condenser")],
)
def test_what_differs_between_ranks_is_refused_by_all(case, argument, size, results):
    for rank in results(size)[0]:
        assert rank[case]["error"].startswith(
            f"ArgumentError: `{argument}` is not the same on all ranks of torch.distributed"
        )
    if case == "fewer images":
        assert "rank 0 has 63 of shape [3, 8, 8]" in rank[case]["error"]
        assert "rank 1 has 62 of shape" in rank[case]["error"]


@every_size
def test_what_one_rank_refuses_does_not_leave_the_others_waiting(size, results):
    first, *others = [rank["refused"]["error"] for rank in results(size)[0]]
    assert "because rank 1 of torch.distributed refused its arguments" in first
    assert all("`images` must be uint8" in error for error in others)


@every_size
def test_an_error_of_the_first_rank_alone_is_raised_on_all(size, results):
    for rank in results(size)[0]:
        assert "whose folder does not exist" in rank["no folder"]["error"]


@every_size
def test_a_time_budget_ends_on_all_ranks_together(size, results):
    first, *others = [rank["seconds"] for rank in results(size)[0]]
    assert 1 < len(first["history"]["distance"]) <= 0.6 / (0.04 * (size - 1)) + 1
    for other in others:
        assert same(other, first)


@every_size
def test_an_interrupted_condensation_goes_on_with_any_number_of_ranks(
    size, results, tmp_path, monkeypatch
):
    found, folder = results(size)
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))
    built, expected = going_on(tmp_path / "state")
    for rank in found:
        assert same(rank["gone on"], expected)
        assert rank["files"] == ["state", "state.interrupted"]
    path = tmp_path / "theirs"
    path.write_bytes((folder / "state.interrupted").read_bytes())
    assert same(plain(run(built, path=path)), expected)
    built.update.left[:] = [0]
    for whole in (path, folder / "state"):  # finished, so that nothing is done again
        assert same(plain(run(built, path=whole)), expected)


@every_size
def test_one_rank_may_condense_by_itself(size, results, single):
    assert same(results(size)[0][0]["alone"], single("idc", CASES["idc"]))


@pytest.mark.parametrize("classes", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 128])
def test_classes_are_dealt_evenly_and_in_order(classes, size):
    share = Ranks(0, size).share(classes)
    parts = [share.of(rank) for rank in range(size)]
    assert [position for part in parts for position in part] == list(range(classes))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_exchanges_nothing():
    assert Ranks.here() == SINGLE == Ranks(0, 1)
    tensors = [torch.ones(2), torch.zeros(3)]
    share = SINGLE.share(2)
    share.complete(tensors)
    SINGLE.take_from_first(tensors)
    assert [t.tolist() for t in tensors] == [[1, 1], [0, 0, 0]]
    assert share.own == range(2) and share.numbers([3, 4]) == [3, 4]
    assert SINGLE.largest([1.5]) == [1.5] and SINGLE.by_first(lambda: 7) == 7
    assert SINGLE.gather(tensors[0])[0] is tensors[0]
    with pytest.raises(DivergedError):
        SINGLE.by_first(fail)


def fail():
    raise DivergedError


def test_a_single_process_makes_no_call_of_torch_distributed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a collective")

    for name in ("all_gather", "all_gather_object", "all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, refuse)
    assert run(small("dream_plus", **EVERYTHING)).iterations == 15


def test_only_one_module_knows_torch_distributed():
    sources = (ROOT / "dc_replay").glob("*.py")
    using = [path.name for path in sources if "import torch.distributed" in path.read_text()]
    assert using == ["distributed.py"]


def torchrun(*arguments, ranks=2, restarts=2, **options):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "--max-restarts", str(restarts)),
            *map(str, arguments),
        ],
        # Else a restart meets the addresses of dead processes; see docs/distributed.md.
        env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


@dataclass(frozen=True)
class Dying:
    """A network update that kills one rank of the first attempt."""

    update: object
    calls: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, apprentice, pixels):
        self.calls.append(len(self.calls))
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and Ranks.here().rank == 1 and len(self.calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        self.update(apprentice, pixels)


def dying():
    built = small("dream_plus", **EVERYTHING)
    return replace(built, update=Dying(built.update))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_rank_is_recovered_by_torchrun(tmp_path):
    finished = torchrun(__file__, "dying", tmp_path)
    assert finished.returncode == 0, finished.stderr
    expected = plain(run(dying()))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found.pop("restarts") == "1"
        # Two networks of three iterations were saved, of five.
        assert found.pop("before") > 0 and found.pop("iterations") == 9
        assert same(found, expected)


@pytest.mark.slow
def test_the_benchmark_condenses_on_all_ranks(tmp_path):
    from benchmarks.class_incremental import Arguments
    from benchmarks.class_incremental import main as compare

    options = {"preset": "smoke", "classes": 4, "steps": 2, "ipc": 3, "shrink_at": "1:2"}
    options |= {"methods": "random,dream_plus+mdc", "protocol": "replay", "device": "cpu"}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    finished = torchrun(
        *("-m", "benchmarks.class_incremental", *given, "--quiet", "--out", tmp_path / "ranks")
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("plots and report") == 1
    compare(Arguments(**options, quiet=True, out=tmp_path / "alone"), "the command")
    for method in ("random", "dream_plus+mdc"):
        name = f"memories/{method}.safetensors"
        one, other = ((tmp_path / run / name).read_bytes() for run in ("ranks", "alone"))
        assert one == other
    assert len(list((tmp_path / "ranks" / "condensed").iterdir())) == 2


@pytest.mark.slow
def test_strategies_train_distributed(tmp_path):
    """Ranks see parts of the new images and draw exemplars of their own for one model."""
    one, other = started(tmp_path, 2, "training")
    for name in ("replay", "memory only"):
        first, second = one[name], other[name]
        assert first["supported"] and second["supported"]
        assert torch.equal(first["pixels"], second["pixels"])
        assert torch.equal(first["model"], second["model"])
        assert torch.isfinite(first["model"]).all()
        assert first["moved"] > 0.01
    first, second = one["replay"], other["replay"]
    # 32 images of an experience, 8 at a time from two ranks; in the second 8 exemplars besides.
    assert first["sizes"] == second["sizes"] == [8, 8, 16, 16]
    assert first["exemplars"] != second["exemplars"]
    assert len(set(first["images"][:16] + second["images"][:16])) == 32
    # Two classes of 2 stored images, then four; each decodes to 4, half of them for each rank.
    first, second = one["memory only"], other["memory only"]
    assert first["sizes"] == second["sizes"] == [8, 8, 8]
    shown = sorted(first["images"] + second["images"])
    assert len(shown) == 48 and len(set(shown)) == 32  # the first experience's are shown again


def training(folder):
    """What a rank sees of two experiences, with each of the plugins."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.supervised import Naive
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import TensorDataset

    from dc_replay import CondensedReplayPlugin, ImagesPerClass, MemoryOnlyPlugin

    def dataset():
        found = TensorDataset(
            torch.rand((64, *SHAPE), generator=seeded(1)), torch.arange(4).repeat_interleave(16)
        )
        found.targets = found.tensors[1].tolist()
        return found

    class Seen:
        """Notes each mini-batch as it is trained on."""

        supports_distributed = True

        def __init__(self):
            self.batches = []

        def before_forward(self, strategy, **kwargs):
            self.batches.append(strategy.mbatch[0].clone())

    found = {}
    options = {
        "condenser": small("idc", outer=1, inner=2),
        "budget": ImagesPerClass(2),
        "progress": False,
    }
    for name, plugin in {
        "replay": CondensedReplayPlugin(**options, match_storage=0),
        "memory only": MemoryOnlyPlugin(**options),
    }.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        seen = Seen()
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            train_mb_size=8,
            plugins=[plugin, seen],
            evaluator=None,
        )
        # Avalanche's loaders hand out parts where experiences have task labels.
        benchmark = nc_benchmark(dataset(), dataset(), 2, task_labels=False, seed=0)
        for experience in benchmark.train_stream:
            strategy.train(experience)
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        found[name] = {
            "supported": strategy._check_distributed_training_compatibility(),
            "pixels": plugin.memory.exemplars.pixels,
            "model": after,
            "moved": float((after - before).abs().max()),
            "sizes": [len(batch) for batch in seen.batches],
            "exemplars": [batch[8:].sum().item() for batch in seen.batches],
            "images": [image.numpy().tobytes() for batch in seen.batches for image in batch],
        }
    return found


def main(role, folder, *numbers):
    folder = Path(folder)
    if role == "dying":
        torch.set_num_threads(1)
        checkpoints.SHARE = float("inf")
        dist.init_process_group("gloo")
        built = dying()
        condensed = run(built, path=folder / "state")
        found = {
            **plain(condensed),
            "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"],
            "before": condensed.seconds_before,
            "iterations": len(built.update.calls),
        }
    else:
        if role == "training":  # Avalanche cannot be imported later: it makes a logger then
            import avalanche.training.supervised  # noqa: F401
        join(folder, *map(int, numbers))
        found = {"everything": everything, "training": training}[role](folder)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
