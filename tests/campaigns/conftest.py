"""How many bad inputs the campaigns try, how they try one, and a count of them at the end.

By default they take seconds. With ``DC_REPLAY_LONG`` set they try many times as many, and write
the count as ``results.json`` into the folder that ``DC_REPLAY_LONG_OUT`` names. That needs the
folder of this file among pytest's arguments, where xdist distributes the tests.
"""

import os
import shlex
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from benchmarks.results import write_figures
from dc_replay.errors import DCReplayError

LONG = bool(os.environ.get("DC_REPLAY_LONG"))

# A fixture here is a counter, or a folder of which only one file is used: nothing to make anew.
_SHARED = hypothesis.settings(
    hypothesis.settings.get_profile("dc-replay"),
    stateful_step_count=50 if LONG else 30,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.register_profile("campaign", _SHARED, max_examples=400 if LONG else 40)
# Where each input is condensed, or goes through the command line.
hypothesis.settings.register_profile("slow campaign", _SHARED, max_examples=150 if LONG else 10)

_COUNTS: dict[str, Counter[str]] = defaultdict(Counter)


class Outcome(NamedTuple):
    """What came of one input: a value, or an error of the package's own."""

    value: Any
    error: DCReplayError | None


class Tally:
    """Tries inputs and counts them; an exception that is not the package's own goes through."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts

    def __call__(self, call: Any, *args: Any, **options: Any) -> Outcome:
        self._counts["tried"] += 1
        try:
            return Outcome(call(*args, **options), None)
        except DCReplayError as error:
            self._counts["refused"] += 1
            return Outcome(None, error)


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Tally:
    """Tries inputs; what it counts goes with the test's report, out of xdist's workers, too."""
    counts = {"tried": 0, "refused": 0}
    request.node.user_properties.append(("inputs", counts))
    return Tally(counts)


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether to try as many inputs as there are, where that is a finite number."""
    return LONG


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what a test has tried."""
    if report.when == "call":
        for name, counts in report.user_properties:
            if name == "inputs":
                campaign = _COUNTS[Path(report.nodeid.split("::")[0]).stem]
                campaign.update(counts, tests=1, failed=int(report.failed))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Print the count, and write it where a long run that came to its end is to leave it."""
    total = sum(_COUNTS.values(), Counter())
    if not total:
        return
    parts = ", ".join(f"{name} {counts['tried']:,}" for name, counts in sorted(_COUNTS.items()))
    terminalreporter.write_line(
        f"bad inputs: {total['tried']:,} tried, {total['refused']:,} refused by the package's own "
        f"errors ({parts})"
    )
    folder = os.environ.get("DC_REPLAY_LONG_OUT")
    if LONG and folder and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        rows = [{"campaign": name, **counts} for name, counts in sorted(_COUNTS.items())]
        write_figures(
            Path(folder),
            "bad_input",
            rows,
            command=f"DC_REPLAY_LONG=1 pytest {shlex.join(config.invocation_params.args)}",
            settings={
                "profiles": {
                    name: hypothesis.settings.get_profile(name).max_examples
                    for name in ("campaign", "slow campaign")
                },
                "steps": _SHARED.stateful_step_count,
                "workers": config.getoption("numprocesses", None) or 0,
                "hypothesis": hypothesis.__version__,
            },
            device="cpu",
        )
