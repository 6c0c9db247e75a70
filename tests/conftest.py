"""What every test may ask for."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

# The first call of a torch function can take seconds, and what failed has to fail again.
hypothesis.settings.register_profile("dc-replay", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dc-replay")


def pytest_configure() -> None:
    """Share the cores between xdist's workers, and with the processes that tests start."""
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is not None:
        share = max(1, (os.cpu_count() or 1) // int(workers))
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(share))))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device that this machine has."""
    return torch.device(request.param)


@pytest.fixture
def seed() -> int:
    return 0


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A seeded generator on the CPU, whose draws are the same on every machine."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Tests that build networks draw from the global generator, whatever ran before them."""
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def tolerance() -> dict[torch.dtype, dict[str, float]]:
    """How near is equal: ``torch.testing.assert_close(a, b, **tolerance[a.dtype])``."""
    return {
        torch.float64: {"rtol": 1e-9, "atol": 1e-12},
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.float16: {"rtol": 1e-2, "atol": 1e-3},
        torch.bfloat16: {"rtol": 5e-2, "atol": 1e-2},
    }


@pytest.fixture(scope="session")
def cifar100_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ten classes of CIFAR-100, 100 training and 20 test images of each.

    ``x_train`` and ``x_test`` are uint8 ``[images, 32, 32, 3]`` in class order, ``y_train`` and
    ``y_test`` int64 ``[images]``.
    """
    folder = Path(os.environ.get("DC_REPLAY_DATA", ROOT.parent / "shared" / "data"))
    script = folder / "unpack_cifar100.py"
    if not script.is_file():
        pytest.skip(
            f"no real CIFAR-100: {script} is absent; set DC_REPLAY_DATA to the folder that has it"
        )
    path = tmp_path_factory.mktemp("cifar100") / "cifar100.npz"
    few = ["--classes", "0-9", "--train-per-class", "100", "--test-per-class", "20"]
    subprocess.run([sys.executable, script, path, *few], check=True, capture_output=True)
    return path
