"""Take nests of jax arrays apart and put them together: a Flax module's arguments and outputs as Values.

A nest is spread into its arrays and a Node that remembers the containers. Values are plain (`plain`): lists, tuples,
dicts; a named tuple is a tuple, a dataclass or a FrozenDict is a dict, any other jax pytree the tuple of its children.
`refill` restores the original containers, which the module's caller expects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.core import Tracer

from graftax.adapters import containers, nests
from graftax.errors import GraftaxError, escape

_DEPTH = 32


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A nest without its arrays: kind 'array' (number `index`), 'key' (a random key of the kind `value`, whose data are
    array number `index`), 'leaf' (`value` itself) or a container."""

    kind: str
    value: Any = None
    index: int = 0
    keys: tuple[Any, ...] = ()
    children: tuple[Node, ...] = ()


def is_array(value: Any) -> bool:
    """A NumPy or jax array (a tracer too), or an nnx.Variable that holds one; not a random key."""
    if isinstance(value, nnx.Variable):
        return is_array(containers.variable_value(value))
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return not containers.is_random_key(value)
    return False


def spread(nest: Any, keys: bool = False) -> tuple[list[Any], Node]:
    """(the arrays of a nest in order, the rest). keys: the data of random keys are arrays too; otherwise keys are part
    of the rest."""
    arrays: list[Any] = []
    return arrays, _spread(nest, arrays, keys, 0)


def _spread(value: Any, arrays: list[Any], with_keys: bool, depth: int) -> Node:
    if is_array(value):
        arrays.append(containers.variable_value(value) if isinstance(value, nnx.Variable) else value)
        return Node("array", index=len(arrays) - 1)
    if with_keys and containers.is_random_key(value):
        arrays.append(jax.random.key_data(value))
        return Node("key", jax.random.key_impl(value), len(arrays) - 1)
    parts = _children(value) if depth < _DEPTH else None
    if parts is None:
        return Node("leaf", value)
    kind, keys, items = parts
    return Node(kind, value, 0, keys, tuple(_spread(item, arrays, with_keys, depth + 1) for item in items))


def _children(value: Any) -> tuple[str, tuple[Any, ...], Sequence[Any]] | None:
    """(kind, keys, children) of a container; None for a leaf. Modules are leaves."""
    if value is None or isinstance(value, (str, bytes, int, float, complex, type, nn.Module, nnx.Module, jax.Array)):
        return None
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        return "mapping", tuple(mapping), list(mapping.values())
    if isinstance(value, (list, tuple)):
        sequence = cast("Sequence[Any]", value)
        return "list" if isinstance(value, list) else "tuple", tuple(range(len(sequence))), sequence
    if is_dataclass(value):
        names = tuple(f.name for f in fields(value) if hasattr(value, f.name))
        return "dataclass", names, [getattr(value, name) for name in names]
    items, structure = jax.tree.flatten(value, is_leaf=lambda item: item is not value)
    if jax.tree.structure(0) == structure:
        return None
    return "pytree", (structure,), items


def plain(node: Node, arrays: Sequence[Any]) -> Any:
    """The nest as Values, with these arrays."""
    if node.kind == "array":
        return arrays[node.index]
    if node.kind == "leaf":
        return str(node.value) if isinstance(node.value, jax.Array) else node.value  # a random key
    items = [plain(child, arrays) for child in node.children]
    if node.kind in ("mapping", "dataclass"):
        return dict(zip(node.keys, items, strict=True))
    return items if node.kind == "list" else tuple(items)


def refill(node: Node, arrays: Sequence[Any]) -> Any:
    """The nest again, in containers of its own kinds, with these arrays."""
    if node.kind == "array":
        return arrays[node.index]
    if node.kind == "key":
        return jax.random.wrap_key_data(arrays[node.index], impl=node.value)
    if node.kind == "leaf":
        return node.value
    items = [refill(child, arrays) for child in node.children]
    if node.kind == "pytree":
        return node.keys[0].unflatten(items)
    if node.kind == "dataclass":
        again = copy.copy(node.value)
        for name, item in zip(node.keys, items, strict=True):
            object.__setattr__(again, name, item)
        return again
    again = containers.with_children(node.value, dict(zip(node.keys, items, strict=True)))
    if node.kind == "mapping" and is_dataclass(again):  # Hugging Face outputs are both
        for name, item in zip(node.keys, items, strict=True):
            if isinstance(name, str):
                object.__setattr__(again, name, item)
    return again


def fingerprint(node: Node) -> Any:
    """A hashable key that differs for nests with other containers or other leaves. It is for a cache whose entries keep
    their node: a leaf that has no hash counts by identity."""
    if node.kind == "array":
        return "array"
    if node.kind == "leaf":
        try:
            hash(node.value)
        except TypeError:
            return "leaf", id(node.value)
        return "leaf", type(node.value), node.value
    keys = node.keys if node.kind != "pytree" else (str(node.keys[0]),)
    return node.kind, type(node.value), keys, tuple(map(fingerprint, node.children))


# ---------------------------------------------------------------- between host and device


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """The values of a jax array, waited for; no copy on the CPU."""
    return np.asarray(array)


def values_of(nest: Any) -> Any:
    """A module's output as Values on the host."""
    arrays, node = spread(nest)
    return plain(node, [to_host(array) for array in arrays])


def waited(nest: Any) -> Any:
    """The nest after its arrays are computed, so that their inputs can be released."""
    for array in spread(nest)[0]:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            array.block_until_ready()
    return nest


def to_device(nest: Any) -> Any:
    """The nest with its arrays as jax arrays (jax narrows float64 and int64)."""
    arrays, node = spread(nest)
    return refill(node, [jax.numpy.asarray(array) for array in arrays]) if arrays else nest


def replaced(old: Any, arrays: Sequence[np.ndarray[Any, Any]], new: Any, where: str) -> list[np.ndarray[Any, Any]]:
    """`arrays` (those of the Values `old`), each replaced by the array of `new` at the same place, in the old dtype. If
    `new` has no array at a place, the old array stays.

    Raises GraftaxError for an array at a place that had none, and for a shape mismatch.
    """
    out = list(arrays)
    places = {path: i for i, (path, _) in enumerate(_arrays_of(old))}
    for path, array in _arrays_of(new):
        if path not in places:
            raise GraftaxError(f"{escape(where)}: there is no array at {escape(path) or 'the top'} to replace")
        i = places[path]
        if tuple(array.shape) != tuple(out[i].shape):
            raise GraftaxError(
                f"{escape(where)}: the array at {escape(path) or 'the top'} has shape {tuple(out[i].shape)}, "
                f"its replacement has {tuple(array.shape)}"
            )
        out[i] = np.asarray(array, dtype=out[i].dtype)
    return out


def _arrays_of(nest: Any) -> Iterator[tuple[str, Any]]:
    is_leaf: Callable[[Any], bool] = lambda item: isinstance(item, (np.ndarray, np.generic, jax.Array))  # noqa: E731
    return nests.leaves(nest, is_leaf)


def kept(arrays: list[Any], made: list[Any], changed: list[bool]) -> list[Any]:
    """`made` where it changed, else the arrays themselves. What replaces a weakly typed array is weakly typed too: the
    model's next op would promote it differently otherwise."""
    return [
        old if not change else old.at[...].set(new) if getattr(old, "weak_type", False) else new
        for old, new, change in zip(arrays, made, changed, strict=True)
    ]
