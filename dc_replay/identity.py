"""What an object is, as a digest that is the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def identity(value: object) -> bytes:
    """A digest of all that tells a value from others.

    Tensors and arrays count with their bytes, functions with their code, their defaults and the
    values that they enclose, dataclasses with their fields, and other objects with their attributes
    where they do not describe themselves. The code of classes, and what a function calls or reads
    from its module, does not count. Neither do lists, sets and mappings that a function encloses or
    an object has as attributes, in which they often note what they have done. A device counts with
    its type.

    Args:
        value: Anything.
    """
    return _Digests().of(value)


class _Digests:
    """Digests of values and of what they consist of, each computed once."""

    def __init__(self) -> None:
        # With the values, whose ids would else be given away again.
        self._known: dict[int, tuple[object, bytes]] = {}

    def of(self, value: object) -> bytes:
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        self._known[id(value)] = value, b"itself"  # until it is known: it may refer to itself
        digest = hashlib.sha256(f"{type(value).__qualname__}\0".encode())
        for piece in self._pieces(value):
            digest.update(piece)
        self._known[id(value)] = value, digest.digest()
        return digest.digest()

    def _pieces(self, value: Any) -> Iterator[bytes | memoryview]:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            yield f"{data.dtype} {list(data.shape)}".encode()
            # Read where they are: there may be as many as the memory holds once.
            yield data.flatten().view(torch.uint8).numpy().data if data.numel() else b""
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            yield f"{value.dtype} {list(value.shape)}".encode()
            yield np.ascontiguousarray(value).tobytes()
        elif isinstance(value, torch.device):
            yield value.type.encode()
        elif isinstance(value, FunctionType):
            yield _name(value)
            enclosed = _values([_content(cell) for cell in value.__closure__ or ()])
            yield from self._all(value.__code__, value.__defaults__, value.__kwdefaults__)
            yield from self._all(*enclosed)
        elif isinstance(value, CodeType):
            yield value.co_code
            yield from self._all(value.co_names, value.co_consts)
        elif isinstance(value, MethodType):
            yield from self._all(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            yield from self._all(value.func, value.args, value.keywords)
        elif isinstance(value, type):
            yield _name(value)
        elif isinstance(value, (tuple, list)):
            yield from self._all(*value)
        elif isinstance(value, Mapping):
            yield from self._all(*(part for item in value.items() for part in item))
        elif isinstance(value, (set, frozenset)):
            yield from sorted(self.of(part) for part in value)
        elif isinstance(value, nn.Module):
            yield words(value).encode()
            yield from self._all(value.state_dict())
        elif dataclasses.is_dataclass(value):
            shown = [f.name for f in dataclasses.fields(value) if f.repr]
            yield from self._all(*(part for n in shown for part in (n, getattr(value, n))))
        elif getattr(type(value), "__repr__", None) is object.__repr__:
            has = getattr(value, "__dict__", {})
            kept = [name for name in has if _values([has[name]])]
            yield from self._all(*(part for name in kept for part in (name, has[name])))
        else:
            yield words(value).encode()

    def _all(self, *parts: object) -> Iterator[bytes]:
        for part in parts:
            yield self.of(part)


def words(value: object) -> str:
    """How a value describes itself, but for addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _values(parts: list[Any]) -> list[Any]:
    return [part for part in parts if not isinstance(part, (list, set, Mapping))]


def _name(value: Any) -> bytes:
    return f"{value.__module__}.{value.__qualname__}".encode()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
