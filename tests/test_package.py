import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dc_replay

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    report = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import dc_replay",
        "from dc_replay import ExemplarMemory, ImagesPerClass, dream_plus",
        "import dc_replay; dir(dc_replay)",
    ],
)
def test_avalanche_is_not_imported_before_it_is_needed(code):
    loaded = loaded_after(code)
    assert "dc_replay" in loaded
    assert "avalanche" not in loaded


@pytest.mark.parametrize(
    "code",
    ["import dc_replay; dir(dc_replay)", "from dc_replay import TotalBytes, MemoryFileError"],
)
def test_torch_is_not_imported_before_it_is_needed(code):
    loaded = loaded_after(code)
    assert "dc_replay" in loaded
    assert "torch" not in loaded


def test_modules_are_attributes_without_being_imported():
    loaded_after("import dc_replay; assert dc_replay.budgets.TotalImages(3).images == 3")
    assert dc_replay.recipes.idc is dc_replay.idc


def test_a_public_name_is_looked_up_once():
    found = dc_replay.TotalBytes
    assert vars(dc_replay)["TotalBytes"] is found


def test_public_names_each_have_a_home():
    assert sorted(dc_replay._MODULE_OF) == sorted(dc_replay.__all__)
    assert len(set(dc_replay.__all__)) == len(dc_replay.__all__)


def test_a_plugin_is_a_public_name_although_it_needs_avalanche():
    assert "avalanche" in loaded_after("from dc_replay import CondensedReplayPlugin")


@pytest.mark.parametrize("name", dc_replay.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dc_replay, name) is not None
    assert name in dir(dc_replay)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        dc_replay.no_such_name  # noqa: B018


def test_the_package_says_the_declared_version():
    assert dc_replay.__version__ == PROJECT["version"]


def test_the_installed_version_is_the_declared_one():
    try:
        installed = importlib.metadata.version("dc-replay")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dc-replay is not installed here, only on the path")
    assert installed == PROJECT["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by the backend alone: no network, nothing installed."""
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_ships_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dc_replay").rglob("*.py")}
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == sources | {"dc_replay/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in information)


def test_the_wheel_says_what_it_is_and_needs(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(path).decode())
    assert metadata["Name"] == "dc-replay"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    needs = {need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need}
    assert len(needs) == len(PROJECT["dependencies"])


def test_contributors_are_told_what_each_module_is_for():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = text[text.index("## Where things are") : text.index("## What the checks")]
    named = set(re.findall(r"`(\w+)`", places))
    modules = {path.stem for path in (ROOT / "dc_replay").glob("*.py")} - {"__init__"}
    assert modules <= named
    assert named - modules == {"benchmarks", "strategies", "dc_replay"}
