"""Compiling a step function where that is wanted and works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from dc_replay.errors import ArgumentError

CompileMode = bool | Literal["auto"]
"""True, False, or ``"auto"``: only where the planned steps repay it."""

# Compiling both step functions takes about half a minute, and a compiled step of an ordinary
# matching network saves tens of milliseconds on a CPU.
STEPS_THAT_REPAY = 1000
SECONDS_THAT_REPAY = 120

RECOMPILE_LIMIT = 256
"""Different shapes, networks and objectives that one process may compile."""


def wanted(mode: CompileMode, *, steps: int = 0, seconds: float = 0) -> bool:
    """Whether to compile functions that are called so many times, or for so long.

    Raises:
        ArgumentError: If the mode is unknown.
    """
    if mode not in (True, False, "auto"):
        raise ArgumentError(f"`compile` is {mode!r}, but must be True, False or 'auto'")
    if mode != "auto":
        return bool(mode)
    return steps >= STEPS_THAT_REPAY or seconds >= SECONDS_THAT_REPAY


def compiled(function: Callable[..., Any], compile: bool) -> Callable[..., Any]:
    """Compile a pure function of tensors as one static graph, or leave it as it is.

    Where compiling fails a warning says why, and the function runs as it is from then on.

    Args:
        function: A pure function of tensors and containers of tensors.
        compile: Whether to compile.
    """
    return _Compiled(function) if compile else function


class _Compiled:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._run: Callable[..., Any] = torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        try:
            # Each new shape of the arguments compiles anew, so any call may be the one that fails.
            # All condensations of a process share the limit, whose default torch keeps by running
            # uncompiled without a word.
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return self._run(*arguments)
        except torch.OutOfMemoryError:  # no fault of the compiler's
            raise
        except Exception as error:  # compilers fail in many ways, and none should stop the run
            if self._run is self._plain:
                raise
            result = self._plain(*arguments)
            first = str(error).strip().splitlines()
            warnings.warn(
                f"the matching step runs uncompiled, and so more slowly, because compiling it "
                f"failed: {type(error).__name__}: {first[0] if first else 'no message'}",
                RuntimeWarning,
                stacklevel=2,
            )
            self._run = self._plain
            return result
