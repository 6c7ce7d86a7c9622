"""Trees of classes that are registered with jax: dataclasses, flax.struct, named tuples, equinox modules, a TrainState.

Fields have the names that `jax.tree_util.tree_flatten_with_path` gives. A leaf that is not an array (an activation
function, a number, None) stays as it is; metadata fields are part of the class.
"""

from __future__ import annotations

import sys
from typing import Any

from graftax.tree import Key
from graftax.tree.training_state import MOMENTS_OF_ADAM, is_count

OPTIMIZER = frozenset({"opt_state", "opt_states", "optimizer_state", "optim_state", "optimizer_states"})
"""Fields of a class that hold optimizer state."""
_NESTS = frozenset({"inner_state", "inner_opt_state", "base_state", "opt_state"})
"""Fields of optax's states that hold another state."""
_NAMED_NESTS = frozenset({"inner_states"})
"""Fields of optax's states that hold a dict of states."""


def is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def is_class_node(node: Any) -> bool:
    """True for an object of a class that is registered with jax and is not a leaf. Python's own containers do not
    count."""
    if node is None or isinstance(node, (dict, list, tuple, type)):
        return False
    util = _util()
    if util is None:
        return False
    return not util.treedef_is_leaf(util.tree_structure(node, is_leaf=lambda child: child is not node))


def children_of(node: Any) -> list[tuple[Key, Any]]:
    """(name, child) of a class node. A name is that of the attribute or the key; if the class gives no names, children
    are numbered."""
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
    """jax.tree_util if jax is loaded; without jax no object can be registered with it."""
    return sys.modules.get("jax.tree_util")


# ---------------------------------------------------------------- optimizer state


def is_optimizer_state(node: Any) -> bool:
    """True for a state of optax, a named tuple of Adam's two moments, or the scale of flax's mixed precision. optax's
    LookaheadParams are weights."""
    if type(node).__name__ == "LookaheadParams":
        return False
    if is_named_tuple(node):
        return type(node).__module__.partition(".")[0] == "optax" or {"mu", "nu"} <= set(node._fields)
    return type(node).__module__ == "flax.training.dynamic_scale"


def holds_optimizer(node: Any, children: list[tuple[Key, Any]]) -> bool:
    """True for a class with a field for the optimizer's state, as flax's TrainState; its `step` is not a weight
    either."""
    return not isinstance(node, (dict, list, tuple)) and any(key in OPTIMIZER for key, _ in children)


def own_moments(node: Any, children: list[tuple[Key, Any]]) -> frozenset[Key]:
    """The fields of a class that hold an optimizer's moments beside `params`, each with the structure of `params`, and
    its counter. Empty if there is no counter."""
    fields = dict(children)
    counters = [name for name in fields if is_count(name) or name == "count"]
    if isinstance(node, (dict, list, tuple)) or "params" not in fields or not counters:
        return frozenset()
    like = _util().tree_structure(fields["params"])
    found = [
        pair for pair in MOMENTS_OF_ADAM if all(n in fields and _util().tree_structure(fields[n]) == like for n in pair)
    ]
    return frozenset([*(name for pair in found for name in pair), *counters]) if found else frozenset()


def own_parts(keys: tuple[Key, ...], start: int) -> int:
    """The number of leading keys of an optimizer's leaf that belong to the optimizer; the rest is the path of a weight:
    3 of (opt_state, 0, mu, Dense_0, kernel). start: the number of keys before the optimizer's state."""
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
