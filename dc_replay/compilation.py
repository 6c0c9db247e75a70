"""Compiling a step function where that is wanted and works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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


def compiled(
    function: Callable[..., Any], compile: bool, *, graphs: bool = False
) -> Callable[..., Any]:
    """Compile a pure function of tensors as one static graph, or leave it as it is.

    Where that fails a warning says why, and from then on the function runs without CUDA graphs, or,
    if that was not the reason, as it is.

    Args:
        function: A pure function of tensors and containers of tensors.
        compile: Whether to compile.
        graphs: Whether a compiled function is recorded as a CUDA graph, which spares a GPU the
            wait for each of its kernels. What it returns is copied out of the graph's memory.
    """
    return _Compiled(function, graphs) if compile else function


class _Compiled:
    def __init__(self, function: Callable[..., Any], graphs: bool) -> None:
        self._ways: list[tuple[str, Callable[..., Any]]] = [("uncompiled", function)]
        self._ways.append(("without CUDA graphs", torch.compile(function, dynamic=False)))
        if graphs:
            recorded = torch.compile(function, dynamic=False, mode="reduce-overhead")
            self._ways.append(("with CUDA graphs", _copied(recorded)))

    def __call__(self, *arguments: Any) -> Any:
        failure: Exception | None = None
        for number in reversed(range(len(self._ways))):
            name, run = self._ways[number]
            try:
                # Each new shape of the arguments compiles anew, so any call may be the one that
                # fails. All condensations of a process share the limit, whose default torch keeps
                # by running uncompiled without a word.
                with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                    result = run(*arguments)
            except torch.OutOfMemoryError:  # no fault of the compiler's
                raise
            except Exception as error:  # compilers fail in many ways, and none should stop the run
                if not number:
                    raise
                failure = failure or error
                continue
            if failure is not None:
                del self._ways[number + 1 :]
                _warn(name, failure)
            return result
        raise AssertionError("the function itself returns or raises")


def _warn(way: str, error: Exception) -> None:
    first = str(error).strip().splitlines()
    warnings.warn(
        f"the matching step runs {way}, and so more slowly, because compiling it failed: "
        f"{type(error).__name__}: {first[0] if first else 'no message'}",
        RuntimeWarning,
        stacklevel=3,
    )


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose results are not overwritten by the next call, as those of a graph are."""

    def run(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return pytree.tree_map_only(Tensor, Tensor.clone, function(*arguments))

    return run
