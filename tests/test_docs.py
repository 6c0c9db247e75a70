"""The documentation builds without a warning or a network, and what its pages show is run."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import avalanche.benchmarks
import pytest
import torch
import tyro
from torch.utils.data import Dataset

import dc_replay
from benchmarks import class_incremental
from benchmarks.choice import choice_caption, choice_table, what_is_stored
from benchmarks.methods import method as named_method
from benchmarks.presets import PRESETS, network_factory
from dc_replay import (
    CondensedReplayPlugin,
    Condenser,
    ExemplarMemory,
    Exemplars,
    ImagesPerClass,
    PixelStep,
    cli,
    dream_plus,
)
from dc_replay.networks import ConvNet
from strategies import WITHOUT_RECIPE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES_WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
VERBS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
IMAGES = 6  # of each class

_BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, kind: str) -> list[str]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match["text"] for match in found if match["kind"] == kind]


def commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES_WITH_COMMANDS:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield page, line.strip()


class Images(Dataset):
    """Some images of ten classes in the place of those that would be downloaded."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(10).repeat_interleave(IMAGES).tolist()
        self.data = torch.rand(len(self.targets), 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data[index], self.targets[index]


def split(n_experiences: int, **options: Any) -> Any:
    return avalanche.benchmarks.nc_benchmark(
        Images(), Images(), n_experiences, task_labels=False, **options
    )


def brief(condense: Callable[..., Any]) -> Callable[..., Any]:
    """Condensing by the same parts, but for a few steps and in a small network."""

    def run(self: Condenser, images: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        outer = 1 if self.multisize is None else 2 * self.multisize.period + 1
        changes: dict[str, Any] = {"outer": min(self.outer, outer), "inner": 1, "seconds": None}
        if self.network is None and min(images.shape[-2:]) >= 8:
            size = tuple(images.shape[-2:])
            changes["network"] = partial(ConvNet, channels=images.shape[1], size=size, width=4)
        return condense(dataclasses.replace(self, **changes), images, *arguments, **options)

    return run


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lets pages run on small data, with small networks and few steps, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("SplitCIFAR10", "SplitCIFAR100"):
        monkeypatch.setattr(avalanche.benchmarks, name, split)
    monkeypatch.setattr(Condenser, "condense", brief(Condenser.condense))
    # What pages change for everybody is undone.
    monkeypatch.setitem(WITHOUT_RECIPE, "first_images", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**group, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in list(sys.modules):
        package, _, last = name.rpartition(".")
        if package == "torch.optim" and not hasattr(torch.optim, last):
            monkeypatch.setattr(torch.optim, last, sys.modules[name], raising=False)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(page: Path, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a page's blocks in order, as one program."""
    for number, block in enumerate(blocks(page, "python"), start=1):
        text = re.sub(r"^# \.\.\. train\b.*$", "_train(replay)", block, flags=re.MULTILINE)
        text = text.replace(", ..., ", ", **_usual, ")
        code = compile(text, f"{name_of(page)}, block {number}", "exec", dont_inherit=True)
        exec(code, namespace)
    return namespace


def train(replay: CondensedReplayPlugin) -> None:
    replay.buffer.remember(split(5, seed=0).train_stream[0], device="cpu")


def program(page: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "page", "_train": train}
    if page.name in ("compatibility.md", "distributed.md"):  # which leave out what others show
        namespace |= {name: getattr(dc_replay, name) for name in dc_replay.__all__}
        exec(OTHERS_SHOW, namespace)
    return run(page, namespace)


OTHERS_SHOW = """
import torch
from avalanche.models import SimpleCNN
from avalanche.training.supervised import Naive
from torch.nn.parallel import DistributedDataParallel

model = SimpleCNN(num_classes=100)
_usual = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.01)}
"""


WITH_CODE = [page for page in PAGES[1:] if blocks(page, "python")]
COMMANDS = sorted({line for _, line in commands()})


@pytest.mark.filterwarnings("ignore:::avalanche")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs(page: Path, small: Path) -> None:
    assert program(page)


@pytest.mark.filterwarnings("ignore:::avalanche")
def test_code_of_the_readme_runs_and_leaves_what_it_says(small: Path) -> None:
    replay = program(ROOT / "README.md")["replay"]
    memory = ExemplarMemory.load("memory.safetensors")
    assert memory.recipe == "herding" and len(memory.classes) == 10
    # A class stores no more than hold all its images, of which ten take the bytes of one.
    assert set(memory.counts.values()) == {math.ceil(IMAGES / 10)}
    assert isinstance(replay, CondensedReplayPlugin)
    assert replay.history[0]["prefix_sizes"][0] == [1, 1]
    assert set(replay.memory.counts.values()) == {5}


@pytest.mark.filterwarnings("ignore:::avalanche")
def test_quick_start_leaves_what_it_says(small: Path) -> None:
    memory = program(DOCS / "quickstart.md")["replay"].memory
    assert len(ExemplarMemory.load("memory.safetensors")) == 50
    assert memory.nbytes == 1280 and set(memory.counts.values()) == {2}


def test_memory_file_is_what_the_page_says(small: Path) -> None:
    found = program(DOCS / "file-format.md")
    assert found["stored"].shape == (6, 3, 32, 32) and found["counts"] == {7: 4, 2: 2}
    page = (DOCS / "file-format.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in found["metadata"])
    for key in ("classes", "counts", "normalization", "budget"):
        json.loads(found["metadata"][key])


def test_parts_of_ones_own_do_what_the_page_says(small: Path) -> None:
    found = program(DOCS / "extending.md")
    images, labels = found["images"], found["labels"]
    objective, features = found["MomentMatching"](weight=2.0), torch.rand(5, 3)
    shares = torch.tensor([[0.2] * 5, [0.5, 0.5, 0, 0, 0]])
    sets, _ = objective.statistics(lambda *_: (None, features), {}, None, None, shares)
    for number, chosen in enumerate((features, features[:2])):
        torch.testing.assert_close(sets[0][number], chosen.mean(dim=0))
        torch.testing.assert_close(sets[1][number], (chosen**2).mean(dim=0))
    first, second = ([part[number] for part in sets] for number in (0, 1))
    expected = ((first[0] - second[0]) ** 2).sum() + 2 * ((first[1] - second[1]) ** 2).sum()
    torch.testing.assert_close(objective.distance(first, second), expected)
    # The parts that need nothing else of an objective.
    whole = dataclasses.replace(
        found["condenser"],
        outer=3,
        subsets=dc_replay.SubsetMatching(),
        multisize=dc_replay.Multisize(period=1),
    )
    for condenser in (whole, found["optimised"], found["louder"]):
        condensed = condenser.condense(
            images, labels, quotas=2, generator=torch.Generator().manual_seed(0)
        )
        assert torch.tensor(condensed.history["distance"]).isfinite().all()
    stored = found["brightest"].exemplars.of_class(1).float().mean(dim=(1, 2, 3))
    real = images[labels == 1].float().mean(dim=(1, 2, 3)).sort(descending=True).values
    torch.testing.assert_close(stored, real[:3])


@pytest.mark.filterwarnings("ignore:::avalanche")
def test_strategy_of_ones_own_is_compared(small: Path) -> None:
    program(DOCS / "extending.md")
    arguments = class_incremental.Arguments(
        preset="smoke",
        protocol="replay",
        methods="first_images,random",
        ipc=2,
        classes=4,
        steps=2,
        out=small / "out",
        quiet=True,
    )
    class_incremental.main(arguments, "the command")
    rows = [json.loads(line) for line in (small / "out" / "results.jsonl").open()]
    assert [row["stored_bytes"] for row in rows] == 2 * [4 * 64, 8 * 64]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_can_be_given(line: str) -> None:
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case ["python", "-m", module, *arguments] if module.startswith("benchmarks."):
            parse(importlib.import_module(module), arguments)
        case ["python", script, *_] if script.startswith("examples/"):
            assert (ROOT / script).exists()
        case ["make", verb, *_]:
            assert verb in VERBS
        case ["dc-replay", verb, *_]:
            assert verb in ("inspect", "shrink", "export")
        case ["pytest", *arguments]:
            assert all((ROOT / path).exists() for path in arguments if path.startswith("tests"))
        case ["export", *settings]:
            assert all(re.match(r"[A-Z_]+=", setting) for setting in settings)
        case ["torchrun", *_] | ["pip", "install", *_]:
            pass
        case _:
            pytest.fail("nobody knows whether this command works")


def parse(module: ModuleType, arguments: list[str]) -> None:
    """Read arguments as the module does, without running it."""
    options: Any = getattr(module, "Arguments", None)
    if options is None:
        options = functools.wraps(module.main)(lambda *args, **kwargs: None)
    tyro.cli(options, args=arguments)


def test_unknown_option_is_noticed() -> None:
    with pytest.raises(SystemExit):
        test_command_can_be_given("python -m benchmarks.shrink --no-such-option 1")


def test_verbs_in_the_text_exist() -> None:
    for page in PAGES_WITH_COMMANDS:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"`make ([a-z][\w-]*)", text)) <= VERBS, page
        assert set(re.findall(r"`dc-replay (\w+)", text)) <= {"inspect", "shrink", "export"}, page


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any("dc-replay " in block for block in blocks(page, "sh"))],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore:::avalanche")
def test_memory_file_commands_run(page: Path, small: Path) -> None:
    if not blocks(page, "python") or not program(page) or not Path("memory.safetensors").exists():
        memory = ExemplarMemory(budget=ImagesPerClass(20))
        pixels = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
        memory.add(Exemplars(pixels, torch.arange(2).repeat_interleave(20)))
        memory.save("memory.safetensors")
    for line in (line for where, line in commands() if where == page):
        if line.startswith("dc-replay "):
            assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line


def test_choice_is_the_most_accurate_first() -> None:
    folder = ROOT / "benchmarks" / "results" / "fast" / "memory_only"
    header, lines = choice_table(folder)
    column = header.index("average accuracy")
    averages = [float(line[column].split(" ± ")[0]) for line in lines]
    assert averages == sorted(averages, reverse=True) and len(lines) >= 3
    assert "cifar100 in 5 steps" in choice_caption(folder)
    page = (DOCS / "choose.md").read_text(encoding="utf-8")
    assert all(" | ".join(line) in page for line in lines)


def test_what_a_page_calls_measured_is_what_the_benchmarks_measure() -> None:
    code = next(block for block in blocks(DOCS / "choose.md", "python") if "measured" in block)
    shown: dict[str, Any] = {
        "replace": dataclasses.replace,
        "dream_plus": dream_plus,
        "PixelStep": PixelStep,
    }
    exec(code, shown)
    benchmark = named_method("dream_plus+factor=1+compress=8+outer=20").condenser(
        PRESETS["fast"],
        factor=2,
        ipc=2,
        network=network_factory("convnet3", channels=3, size=(32, 32), width=64),
    )
    both = (shown["measured"], benchmark)
    page, measured = (dataclasses.replace(built, name="same", network=None) for built in both)
    assert page == measured
    assert str(shown["measured"].network(20)) == str(benchmark.network(20))


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        ("random", "raw images"),
        ("stock_replay", "raw images"),
        ("representative", "real images, packed"),
        ("dream_plus+mdc", "synthetic images, packed"),
        ("idc_i", "synthetic images"),
    ],
)
def test_choice_says_what_is_stored(method: str, stored: str) -> None:
    assert what_is_stored(method) == stored


def test_site_builds_without_a_warning_and_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"{module} builds the documentation; install .[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def refused(*_: object) -> None:
        raise OSError("the site is built without a network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    finally:
        config.plugins.on_shutdown()

    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for path, text in pages.items():
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text)
        fetched = re.findall(r"\b(?:src|href)=[\"']?([^\"' >]+)", " ".join(tags))
        assert not [link for link in fetched if re.match(r"(?:https?:)?//", link)], path
        pictures = re.findall(r"<img\b[^>]*?\bsrc=[\"']?([^\"' >]+)", text)
        assert all((path.parent / picture).is_file() for picture in pictures if ":" not in picture)
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8"))
    assert "results/fast/memory_only/accuracy.png" in pages[tmp_path / "index.html"]
    assert not list(tmp_path.rglob("*.py"))

    reference = "".join(text for path, text in pages.items() if path.parent.name == "reference")
    assert not re.search(r":(?:attr|class|data|func|meth|mod|obj):", reference)
    for name in dc_replay.__all__:
        module = getattr(getattr(dc_replay, name), "__module__", "dc_replay.recipes")
        assert f'id="{module}.{name}"' in reference, name
