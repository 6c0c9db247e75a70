"""Turns the roles of docstrings, such as ``:class:`~dc_replay.memory.ExemplarMemory` ``, to links.

Names are looked up where the docstring stands. One that has no place in the reference, of another
package for example, becomes code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|obj):`(?P<short>~)?(?P<name>[^`]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring of a package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite them when the whole package is known."""
        _rewrite(pkg)


def _rewrite(found: griffe.Object) -> None:
    if found.docstring is not None:
        found.docstring.value = _ROLE.sub(
            lambda match: _link(found, match["name"], bool(match["short"])), found.docstring.value
        )
    for member in found.members.values():
        if not member.is_alias:
            _rewrite(member)  # type: ignore[arg-type]


def _link(found: griffe.Object, name: str, short: bool) -> str:
    first, _, rest = name.lstrip(".").partition(".")
    if name.startswith("."):  # relative to the package
        path = f"{found.package.path}.{name[1:]}"
    else:
        try:
            path = found.resolve(first) + ("." + rest if rest else "")
        except griffe.NameResolutionError:
            path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
