"""Walk and rebuild Values: the nests of NumPy arrays that runs take and return. Works for any leaf type; imports no
framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from graftax.tree import escape_part


def children(value: Any) -> list[tuple[Any, Any]] | None:
    """(key, child) of every child of a mapping, list, tuple or dataclass; None for a leaf."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    return None


def leaves(value: Any, is_leaf: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every object for which `is_leaf` is true, in order; '' is the path of a lone leaf. A nest that
    contains itself, or is deeper than 32, is cut there."""
    return _leaves(value, is_leaf, "", 0)


def _leaves(value: Any, is_leaf: Callable[[Any], bool], path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if is_leaf(value):
        yield path, value
        return
    if depth > 32:
        return
    for key, child in children(value) or ():
        yield from _leaves(child, is_leaf, f"{path}/{escape_part(key)}" if path else escape_part(key), depth + 1)


def is_array(value: Any) -> bool:
    """True for an array of any framework, and for its shape and dtype alone."""
    return not isinstance(value, type) and hasattr(value, "shape") and hasattr(value, "dtype")


def arrays(value: Any) -> list[tuple[str, Any]]:
    """(path, array) of the NumPy arrays of a nest."""
    import numpy as np

    return list(leaves(value, lambda item: isinstance(item, np.ndarray)))


def mapped(value: Any, is_leaf: Callable[[Any], bool], change: Callable[[Any], Any], depth: int = 0) -> Any:
    """The nest with changed leaves, in plain dicts, lists and tuples: a named tuple becomes a tuple, a dataclass a
    dict. Other leaves stay the same objects."""
    if is_leaf(value):
        return change(value)
    if depth > 32:
        return value
    if isinstance(value, (list, tuple)):
        made = [mapped(item, is_leaf, change, depth + 1) for item in value]
        return made if isinstance(value, list) else tuple(made)
    nodes = children(value)
    if nodes is None:
        return value
    return {key: mapped(child, is_leaf, change, depth + 1) for key, child in nodes}


def rebuilt(value: Any, is_leaf: Callable[[Any], bool], new: list[Any]) -> Any:
    """The nest with its leaves replaced by `new`, in order, in containers of the same types, so that a caller can use
    it like the original. A node in which nothing changes stays the same object."""
    rest = iter(new)
    return _rebuilt(value, is_leaf, rest, 0)


def _rebuilt(value: Any, is_leaf: Callable[[Any], bool], rest: Iterator[Any], depth: int) -> Any:
    if is_leaf(value):
        return next(rest)
    nodes = children(value) if depth <= 32 else None
    if not nodes:
        return value
    made = [(key, _rebuilt(child, is_leaf, rest, depth + 1)) for key, child in nodes]
    if all(now is old for (_, now), (_, old) in zip(made, nodes, strict=True)):
        return value
    items = [item for _, item in made]
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return type(value)(items)
    import copy

    again = copy.copy(value)
    for key, item in made:
        if isinstance(value, Mapping):
            again[key] = item  # pyright: ignore
        else:
            object.__setattr__(again, key, item)
    return again
