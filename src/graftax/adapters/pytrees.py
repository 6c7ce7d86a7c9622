"""Trees of classes that jax knows: registered dataclasses, flax.struct, named tuples, equinox modules, a TrainState.

Their fields are named as `jax.tree_util.tree_flatten_with_path` names them. What no array is among their leaves (an
activation function, a number, None) stays as it is; metadata fields are part of the class.
"""

from __future__ import annotations

import sys
from typing import Any

from graftax.tree import Key

OPTIMIZER = frozenset({"opt_state", "opt_states", "optimizer_state", "optim_state", "optimizer_states"})
"""Fields of a class that hold what an optimizer keeps."""
_NESTS = frozenset({"inner_state", "inner_opt_state", "base_state", "opt_state"})
"""Fields of optax's states that hold another state."""
_NAMED_NESTS = frozenset({"inner_states"})
"""Fields of optax's states that hold a dict of states."""


def is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def is_class_node(node: Any) -> bool:
    """Is this an object of a class that is registered with jax, and no leaf? Containers of Python are none."""
    if node is None or isinstance(node, (dict, list, tuple, type)):
        return False
    util = _util()
    if util is None:
        return False
    return not util.treedef_is_leaf(util.tree_structure(node, is_leaf=lambda child: child is not node))


def children_of(node: Any) -> list[tuple[Key, Any]]:
    """(name, child) of a class node. A name is that of the attribute or the key; a child of a class that gives none is
    counted."""
    pairs, _ = _util().tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(_name(keys[0], index), child) for index, (keys, child) in enumerate(pairs)]


def with_children(node: Any, children: list[Any]) -> Any:
    """An object like `node` with other children."""
    util = _util()
    return util.tree_unflatten(util.tree_structure(node, is_leaf=lambda child: child is not node), children)


def _name(key: Any, index: int) -> Key:
    for attribute in ("name", "key", "idx"):  # GetAttrKey; DictKey, FlattenedIndexKey; SequenceKey
        found = getattr(key, attribute, None)
        if isinstance(found, (str, int)):
            return found
    return index


def _util() -> Any:
    """jax.tree_util, where jax is loaded: no object can be registered with it otherwise."""
    return sys.modules.get("jax.tree_util")


# ---------------------------------------------------------------- what an optimizer keeps


def is_optimizer_state(node: Any) -> bool:
    """A state of optax, or a named tuple of the two moments of Adam; the scale of flax's mixed precision."""
    if is_named_tuple(node):
        return type(node).__module__.partition(".")[0] == "optax" or {"mu", "nu"} <= set(node._fields)
    return type(node).__module__ == "flax.training.dynamic_scale"


def holds_optimizer(node: Any, children: list[tuple[Key, Any]]) -> bool:
    """A class with a field for the optimizer's state, as flax's TrainState; its `step` is not a weight either."""
    return not isinstance(node, (dict, list, tuple)) and any(key in OPTIMIZER for key, _ in children)


def own_parts(keys: tuple[Key, ...], start: int) -> int:
    """How many of the first keys of a leaf of an optimizer are the optimizer's own, the others being a weight's path:
    3 of (opt_state, 0, mu, Dense_0, kernel). start: what stands before its state."""
    index = start
    while index < len(keys):
        key = keys[index]
        index += 1
        if isinstance(key, int) or key in _NESTS or key in OPTIMIZER:
            continue
        if key in _NAMED_NESTS:
            index += 1
            continue
        break
    return min(index, len(keys))
