"""What an object is, as bytes that are the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Piece = bytes | memoryview

_DEEPEST = 32


def identity(value: object) -> Iterator[Piece]:
    """All that tells a value from others, piece by piece.

    Tensors and arrays count with their bytes, functions with their code, their defaults and the
    values that they enclose, dataclasses with their fields, and other objects with their attributes
    where they do not describe themselves. The code of classes, and what a function calls or reads
    from its module, does not count. Neither do lists, sets and mappings that it encloses, in which
    functions often note what they have done.

    Args:
        value: Anything.
    """
    yield from _pieces(value, ())


def _pieces(value: Any, above: tuple[int, ...]) -> Iterator[Piece]:
    if id(value) in above or len(above) == _DEEPEST:  # an object may refer to itself
        yield b"<and so on>"
        return
    inside = (*above, id(value))
    yield f"\0{type(value).__qualname__}\0".encode()
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        yield f"{data.dtype} {list(data.shape)}".encode()
        # Read where they are: there may be as many as the memory holds once.
        yield data.view(torch.uint8).numpy().data if data.numel() else b""
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, FunctionType):
        yield _name(value)
        enclosed = [_content(cell) for cell in value.__closure__ or ()]
        plain = [v for v in enclosed if not isinstance(v, (list, set, Mapping))]
        yield from _all([value.__code__, value.__defaults__, value.__kwdefaults__, *plain], inside)
    elif isinstance(value, CodeType):
        yield value.co_code
        yield from _all([value.co_names, value.co_consts], inside)
    elif isinstance(value, MethodType):
        yield from _all([value.__func__, value.__self__], inside)
    elif isinstance(value, functools.partial):
        yield from _all([value.func, value.args, value.keywords], inside)
    elif isinstance(value, type):
        yield _name(value)
    elif isinstance(value, (tuple, list)):
        yield from _all(value, inside)
    elif isinstance(value, Mapping):
        yield from _all([part for item in value.items() for part in item], inside)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(b"".join(_pieces(part, inside)) for part in value)
    elif isinstance(value, nn.Module):
        yield _words(value)
        yield from _all([value.state_dict()], inside)
    elif dataclasses.is_dataclass(value):
        shown = [f.name for f in dataclasses.fields(value) if f.repr]
        yield from _all([part for n in shown for part in (n, getattr(value, n))], inside)
    elif getattr(type(value), "__repr__", None) is object.__repr__:
        yield from _all([getattr(value, "__dict__", {})], inside)
    else:
        yield _words(value)


def _all(parts: Any, above: tuple[int, ...]) -> Iterator[Piece]:
    for part in parts:
        yield from _pieces(part, above)
        yield b"\0"


def _name(value: Any) -> bytes:
    return f"{value.__module__}.{value.__qualname__}".encode()


def _words(value: object) -> bytes:
    """How a value describes itself, but for addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
