"""The settings of a live module as plain data: numbers, text, tuples, dtype names. Arrays and modules are left out."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from typing import Any

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
        if name.startswith("_"):
            continue
        plain = simple(value)
        if plain is not SKIP:
            out[name] = plain
    return out


def bases(kind: type) -> tuple[str, ...]:
    """The qualified names of a class and its bases, in method resolution order."""
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__ if cls is not object)
