"""The figures of the README and the documentation are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.readme import FILES, ROOT, updated
from benchmarks.results import write_figures

README = (ROOT / "README.md").read_text(encoding="utf-8")


def attach_example() -> str:
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Naive" in b)


def test_attach_example_is_short() -> None:
    assert len([line for line in attach_example().splitlines() if line.strip()]) <= 20


def test_figures_are_those_of_the_results() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert updated(text) == text, path
    assert "<!-- headline: sizes -->" in README and "<!-- headline: two -->" in README


def test_linked_files_exist() -> None:
    found = [
        (path.parent, link)
        for path in FILES
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8"))
    ]
    assert found
    for folder, link in found:
        assert (folder / link).exists(), link


def test_figures_of_time_become_a_table(tmp_path: Path) -> None:
    write_figures(
        tmp_path / "figures",
        "scaling",
        [{"classes": 5, "ipc": 10, "side": 32, "seconds": [0.2, 0.4, 0.3]}],
        command="the command",
        settings={},
        device="cpu",
    )
    text = "before\n<!-- results: figures -->\n<!-- end of results -->\nafter"
    found = updated(text, root=tmp_path)
    assert "| 5 | 10 | 32 | 0.300 |" in found and "the command" in found
    assert updated(found, root=tmp_path) == found
