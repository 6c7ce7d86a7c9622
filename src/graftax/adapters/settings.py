"""The settings of a live module as plain data: numbers, text, tuples, dtype names. Arrays and modules are left out."""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Iterable
from functools import cache
from types import CodeType
from typing import Any

from graftax.tree import whole_words

SKIP = object()
"""What is no setting."""
_DEPTH = 4


def simple(value: Any, depth: int = 0) -> Any:
    """`value` as plain data, or SKIP: dtypes by name, functions by their name, lists as tuples."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str, complex):
        return value
    if isinstance(value, (list, tuple)) and depth < _DEPTH:
        items = [simple(item, depth + 1) for item in value]
        return SKIP if any(item is SKIP for item in items) else tuple(items)
    if isinstance(value, dict) and depth < _DEPTH:
        pairs = {key: simple(item, depth + 1) for key, item in value.items() if isinstance(key, (str, int))}
        return SKIP if any(item is SKIP for item in pairs.values()) or len(pairs) < len(value) else pairs
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()  # pyright: ignore
    name = _dtype_name(value)
    if name is not None:
        return name
    if callable(value) and not isinstance(value, type) and not hasattr(value, "shape"):
        return getattr(value, "__name__", SKIP)
    return SKIP


def _dtype_name(value: Any) -> str | None:
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.dtype):
        return str(value)
    if isinstance(value, type):  # numpy.float32, ml_dtypes.bfloat16, jax.numpy.float32
        declared = getattr(value, "dtype", None)
        if isinstance(declared, numpy.dtype):
            return str(declared)
        return str(numpy.dtype(value)) if issubclass(value, numpy.generic) else None
    return None


def collect(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs whose value is a setting; names that begin with '_' are left out."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str) or name.startswith("_"):  # items of an nnx.List have numbers
            continue
        plain = simple(value)
        if plain is not SKIP:
            out[name] = plain
    return out


def bases(kind: type) -> tuple[str, ...]:
    """The qualified names of a class and its bases, in method resolution order."""
    return tuple(map(_qualified, kind.__mro__[:-1]))


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---------------------------------------------------------------- what a call runs

_FUNCTIONS = frozenset(("linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d", "_conv_forward"))
_FUNCTIONS |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_FUNCTIONS |= {"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"}
"""What the framework's layers hand their weights to, laid out as the layer keeps them."""
_MOVES = frozenset(("t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"))
_MOVES |= {"einsum", "matmul", "mm", "addmm", "bmm", "dot", "tensordot", "dot_general", "inner"}


@cache
def calls(kind: type) -> tuple[tuple[str, ...], bool]:
    """The classes that define what a call of the class runs, the one that runs first; and whether that one overrides
    another without handing its weights on to it, or to its function: then they may lie otherwise than the base's."""
    mro = kind.__mro__[:-1]
    found: list[tuple[type, list[Any]]] = []
    for place, cls in enumerate(mro):
        own = {name: value for name, value in vars(cls).items() if whole_words(name) & {"forward", "call"}}
        held = [value for name, value in own.items() if name in ("forward", "__call__")
                or any(name in vars(base) for base in mro[place + 1 :])]  # fmt: skip
        if held:
            found.append((cls, held))
    if not found:
        return (), False
    own_math = len(found) > 1 and not all(map(_hands_on, found[0][1]))
    return tuple(_qualified(cls) for cls, _ in found), own_math


def _hands_on(method: Any) -> bool:
    """Does a method call the one it overrides, or the layer's function, and move no axes itself?"""
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    if code is None:
        return True  # an attribute, or a compiled function: nothing to read
    names = _names_of(code)
    return not names & _MOVES and bool(names & _FUNCTIONS or "__class__" in names)


def _names_of(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*map(_names_of, inner))
