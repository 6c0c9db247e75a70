import io
import sys
import time

from tqdm.auto import tqdm

from dc_replay import _progress
from dc_replay._progress import Lines, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def log_of(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(_progress, "LOG_SECONDS", 0.1)
    return sys.stderr


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    log = log_of(monkeypatch)
    with progress(total=8, desc="idc", unit="step") as bar:
        for _ in range(8):
            time.sleep(0.05)
            bar.update()
    text = log.getvalue()
    lines = text.splitlines()
    assert "\r" not in text and 2 <= len(lines) <= 6
    assert all(line.startswith("idc:") and "/8 [" in line for line in lines)
    assert "8/8" in lines[-1] and len(set(lines)) == len(lines)


def test_bars_inside_of_bars_are_lines_as_well(monkeypatch):
    log = log_of(monkeypatch)
    with progress(total=2, desc="all") as outer:
        for _ in range(2):
            for _ in progress(range(4), desc="train", leave=False):
                time.sleep(0.06)
            outer.update()
    lines = log.getvalue().splitlines()
    assert {line.partition(":")[0] for line in lines} == {"all", "train"}
    assert all(line.isprintable() and line.strip() for line in lines)


def test_what_is_over_soon_writes_nothing_into_a_log(monkeypatch):
    log = log_of(monkeypatch)
    for _ in progress(range(5), leave=False):
        pass
    assert log.getvalue() == ""


def test_a_bar_that_was_turned_off_is_silent(monkeypatch):
    log = log_of(monkeypatch)
    for _ in progress(range(3), disable=True):
        time.sleep(0.1)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(total=3, disable=None) as bar:
        bar.update()
        assert isinstance(bar, tqdm) and not isinstance(bar, Lines)
    assert "\r" in sys.stderr.getvalue()
