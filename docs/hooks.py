"""Takes into the site what its pages link to outside of ``docs/``, so that nothing is kept twice.

Pages link to pictures, reports and READMEs as they do in the repository. Each that is linked to
becomes a file of the site under ``repository/``, and the links are made to fit. Links to anything
else in the repository, such as a folder, become plain text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
"""Pages outside of ``docs/`` that the navigation names."""

_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(
    r"(!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\])\((?P<path>[^)\s#]+)(?P<at>#[^)\s]*)?\)"
)
_SHOWN = (".md", ".png")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to, and what that links to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    waiting += [ROOT / name for name in ALWAYS]
    known: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in known:
            continue
        known.add(path)
        if not path.is_relative_to(DOCS):
            files.append(File.generated(config, _place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting += [target for target in _targets(path) if target.suffix in _SHOWN]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make a page's links fit the site."""
    here = page.file.src_uri
    outside = here.startswith("repository/")
    path = ROOT / here.removeprefix("repository/") if outside else DOCS / here

    def link(match: re.Match[str]) -> str:
        target = _target(path, match["path"])
        if target is None:
            return match[0]
        if target.suffix not in _SHOWN and not target.is_relative_to(DOCS):
            return match["text"]
        place = posixpath.relpath(_place(target), posixpath.dirname(here) or ".")
        return f"{match[1]}({place}{match['at'] or ''})"

    return _outside_of_code(markdown, lambda text: _LINK.sub(link, text))


def _outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    # A link's text may be code, so only what lies within a single fence or span stays as it is.
    parts = _CODE.split(markdown)
    held = parts[1::2]
    marked = "".join(
        part if number % 2 == 0 else f"\0{number // 2}\0" for number, part in enumerate(parts)
    )
    return re.sub(r"\0(\d+)\0", lambda match: held[int(match[1])], change(marked))


def _targets(path: Path) -> Iterator[Path]:
    text = _CODE.sub("", path.read_text(encoding="utf-8"))
    for match in _LINK.finditer(text):
        target = _target(path, match["path"])
        if target is not None:
            yield target


def _target(page: Path, link: str) -> Path | None:
    """The file or folder of the repository that a page links to, if it is one."""
    if ":" in link:
        return None
    target = Path(posixpath.normpath(page.parent / link))
    return target if target.is_relative_to(ROOT) and target.exists() else None


def _place(path: Path) -> str:
    """Where a file of the repository is among the site's sources."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"
