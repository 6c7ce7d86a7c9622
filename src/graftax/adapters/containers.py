"""Nested containers of arrays: their leaves as flat paths, and the same containers with new leaves.

Supports dicts (also OrderedDict and other subclasses), FrozenDict, nnx.State, lists, tuples, named tuples, and the
classes that are registered with jax (`pytrees`); also the boxes around a leaf: `flax.core.meta.AxisMetadata` (Linen
`Partitioned`) and `nnx.Variable`. A box adds no part to a path. Nothing here imports a framework: a box exists only if
its framework is loaded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from graftax.adapters import pytrees
from graftax.errors import FormatError, UsageError, escape, with_article
from graftax.tree import Key, escape_part

DEPTH = 64
NOT_WEIGHTS = ("RngState", "Cache", "Intermediate")
"""Classes of `flax.nnx` whose variables are not weights. `flax.nnx.training.optimizer.OptState` is a fourth."""
LINEN_STATE = frozenset({"cache", "intermediates", "perturbations"})
"""Linen collections that are not weights, like Cache, Intermediate and Perturbation in NNX."""

Leaf = Any
Visit = Callable[[str, Leaf], Leaf]


@dataclass(frozen=True, slots=True)
class TreeArrays:
    """The arrays of a tree, each with its keys.

    weights    arrays that are weights
    optimizer  arrays of an optimizer, with the number of keys that belong to the optimizer: 3 of
               opt_state/0/mu/Dense_0/kernel
    """

    weights: list[tuple[tuple[Key, ...], Leaf]]
    optimizer: list[tuple[tuple[Key, ...], Leaf, int]]


def found_in(tree: Any) -> TreeArrays:
    """The arrays of `tree`, in the tree's own order, out of their boxes.

    Variables that are not weights, random keys and None are skipped. In classes that are registered with jax, values
    that are not arrays are skipped too. Raises UsageError for any other leaf that is not an array, and for a key that a
    path cannot hold.
    """
    linen = is_variables(tree)
    found = TreeArrays([], [])
    _ArrayWalk(found, lambda keys: linen and keys[0] in LINEN_STATE).visit(tree, (), False, None)
    return found


def leaves(tree: Any) -> Iterator[tuple[tuple[Key, ...], Leaf]]:
    """(keys, leaf) of every weight in `tree`; see `found_in`."""
    return iter(found_in(tree).weights)


@dataclass(frozen=True, slots=True)
class Kept:
    """The position inside an optimizer's state: `count` leading keys belong to the optimizer. `field`: the last of them
    names a field of a state (mu), after which the path of a weight begins."""

    count: int
    field: bool


@dataclass(frozen=True, slots=True)
class _ArrayWalk:
    found: TreeArrays
    aside: Callable[[tuple[Key, ...]], bool]

    def visit(self, node: Any, keys: tuple[Key, ...], loose: bool, kept: Kept | None) -> None:
        """loose: the node is inside a class that is registered with jax. kept: inside an optimizer's state, the keys
        that belong to the optimizer."""
        if len(keys) > DEPTH:
            raise FormatError(f"nested deeper than {DEPTH} levels at {escape(path_of(keys[:4]))}/...")
        if keys and self.aside(keys):
            return
        if is_plain_array(type(node)):
            self._take(keys, node, kept)
            return
        children = children_of(node)
        if children is not None:
            self._children(node, children, keys, loose, kept)
        elif is_variable(node):
            self._variable(node, keys, loose, kept)
        elif is_axis_box(node):
            self.visit(axis_value(node), keys, loose, kept)
        elif is_array(node):
            if not is_random_key(node):
                self._take(keys, node, kept)
        elif node is not None and not loose:
            raise UsageError(
                f"{escape(path_of(keys)) or 'the tree'} is {with_article(_type_name(node))}, not an array",
                next="Leaves are NumPy or jax arrays, or jax.ShapeDtypeStruct"
                + ("; make a number an array with numpy.asarray." if isinstance(node, (int, float, complex)) else "."),
            )

    def _children(
        self, node: Any, children: list[tuple[Key, Any]], keys: tuple[Key, ...], loose: bool, kept: Kept | None
    ) -> None:
        loose = loose or not isinstance(node, (Mapping, list, tuple))
        state = pytrees.is_optimizer_state(node)
        trained = kept is None and pytrees.holds_optimizer(node, children)
        moments = pytrees.own_moments(node, children) if loose and kept is None else ()
        for key, child in children:
            below = kept
            if state or key in moments or (trained and (key in pytrees.OPTIMIZER or key == "step")):
                below = Kept(len(keys) + 1, field=state or key in moments)
            self.visit(child, (*keys, _checked(key, keys)), loose, below)

    def _variable(self, node: Any, keys: tuple[Key, ...], loose: bool, kept: Kept | None) -> None:
        inner = variable_value(node)
        if not (is_array(inner) or children_of(inner) is not None or _must_hold_array(node)):
            return
        if is_optimizer_variable(node) and kept is None:
            start = next((i for i, key in enumerate(keys) if key in pytrees.OPTIMIZER), len(keys) - 1)
            kept = Kept(start + 1, field=False)
        if kept is not None or is_weight(node):
            self.visit(inner, keys, loose, kept)

    def _take(self, keys: tuple[Key, ...], leaf: Leaf, kept: Kept | None) -> None:
        if kept is None:
            self.found.weights.append((keys, leaf))
        else:
            own = kept.count if kept.field else pytrees.own_parts(keys, kept.count)
            self.found.optimizer.append((keys, leaf, own))


def remade(tree: Any, visit: Visit) -> Any:
    """A copy of `tree`: the same kinds of containers, boxes and key order, with every array replaced by `visit(path,
    leaf)`.

    Anything that is neither a weight nor optimizer state stays the same object. Boxes are new objects, so that a change
    of one tree does not change the other.
    """
    linen = is_variables(tree)
    return _remade(tree, (), visit, lambda keys: linen and keys[0] in LINEN_STATE)


def _remade(node: Any, keys: tuple[Key, ...], visit: Visit, aside: Callable[[tuple[Key, ...]], bool]) -> Any:
    if keys and aside(keys):
        return node
    if is_plain_array(type(node)):
        return visit(path_of(keys), node)
    children = children_of(node)
    if children is not None:
        return with_children(node, {key: _remade(child, (*keys, key), visit, aside) for key, child in children})
    if is_variable(node):
        inner = variable_value(node)
        kept = is_weight(node) or is_optimizer_variable(node)
        if not kept or not (is_array(inner) or children_of(inner) is not None):
            return node.copy() if hasattr(node, "copy") else copy.copy(node)
        return variable_with(node, _remade(inner, keys, visit, aside))
    if is_axis_box(node):
        return node.replace_boxed(_remade(axis_value(node), keys, visit, aside))
    if is_array(node) and not is_random_key(node):
        return visit(path_of(keys), node)
    return node


def path_of(keys: tuple[Key, ...]) -> str:
    return "/".join(map(escape_part, keys))


def shape_of_tree(tree: Any) -> tuple[dict[str, Key], dict[str, str]]:
    """(real_keys, containers) as `tree.Checkpoint` has them: keys that are not text, and containers that are not plain
    dicts. An nnx.State counts as a plain dict."""
    real_keys: dict[str, Key] = {}
    kinds: dict[str, str] = {}

    def visit(node: Any, keys: tuple[Key, ...]) -> None:
        children = children_of(node)
        if children is None:
            return
        prefix = path_of(keys)
        if isinstance(node, list):
            kinds[prefix] = "list"
        elif isinstance(node, tuple) and not pytrees.is_named_tuple(node):
            kinds[prefix] = "tuple"
        elif type(node).__name__ == "FrozenDict" and not kinds_above(prefix, kinds):
            kinds[prefix] = "FrozenDict"
        for key, child in children:
            if not isinstance(key, str):
                real_keys[path_of((*keys, key))] = key
            visit(child, (*keys, key))

    visit(tree, ())
    return real_keys, kinds


def kinds_above(prefix: str, kinds: Mapping[str, str]) -> bool:
    """True if a container above `prefix` is already a FrozenDict: it freezes everything in it."""
    return any(
        kind == "FrozenDict" and (not path or prefix.startswith(f"{path}/"))
        for path, kind in kinds.items()
        if path != prefix
    )


# ---------------------------------------------------------------- kinds of nodes


@lru_cache(maxsize=256)
def is_plain_array(kind: type) -> bool:
    """True for the usual leaf types, which need no further test: not a container, a box or a random key. This speeds up
    large trees."""
    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    return name in {"numpy.ndarray", "jaxlib.ArrayImpl"}


def children_of(node: Any) -> list[tuple[Key, Any]] | None:
    """The (key, child) pairs of a container in its own order, or None for anything else."""
    if type(node) is dict:
        return list(node.items())
    if isinstance(node, Mapping):
        mapping = cast("Mapping[Any, Any]", _raw(node))
        return list(mapping.items())
    if pytrees.is_named_tuple(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)) and not _is_partition_spec(node):
        return list(enumerate(cast("list[Any]", node)))
    if not (is_variable(node) or is_axis_box(node) or _is_module(node)) and pytrees.is_class_node(node):
        return pytrees.children_of(node)
    return None


def with_children(node: Any, children: dict[Key, Any]) -> Any:
    """A container like `node` that holds `children`: the same type and, for a dict's subclass, the same attributes."""
    kind: Any = type(node)
    if kind is dict:
        return children
    if isinstance(node, dict):
        new = copy.copy(node)
        for key, child in children.items():
            dict.__setitem__(new, key, child)
        return new
    if isinstance(node, Mapping):
        return kind(children)
    if pytrees.is_named_tuple(node):
        return kind(*children.values())
    if isinstance(node, (list, tuple)):
        return kind(children.values())
    return pytrees.with_children(node, list(children.values()))


def _raw(node: Any) -> Any:
    """The dict inside an nnx.State or a FrozenDict. Their own items would wrap (FrozenDict: copy) each value anew."""
    if type(node).__module__.startswith("flax.nnx"):
        return getattr(node, "raw_mapping", node)
    return getattr(node, "_dict", node) if type(node).__name__ == "FrozenDict" else node


def _is_partition_spec(node: Any) -> bool:
    return type(node).__name__ == "PartitionSpec"


def _checked(key: Any, keys: tuple[Key, ...]) -> Key:
    if isinstance(key, str) or type(key) is int:
        return key
    if isinstance(key, tuple) and all(isinstance(item, (str, int)) for item in cast("tuple[Any, ...]", key)):
        return cast("Key", key)
    raise UsageError(
        f"a key of type {_type_name(key)} below {escape(path_of(keys)) or 'the top'}: {escape(repr(key))}",
        next="Keys are text, whole numbers or tuples of these.",
    )


def is_variables(tree: Any) -> bool:
    """True if `tree` has Linen's collections at the top."""
    return isinstance(tree, Mapping) and "params" in tree and not type(tree).__module__.startswith("flax.nnx")


def is_array(node: Any) -> bool:
    """True for an array or a stand-in: anything with a shape and a dtype that is not a torch tensor."""
    return hasattr(node, "shape") and hasattr(node, "dtype") and not is_tensor(node)


def is_tensor(node: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(node, torch.Tensor)


def is_random_key(node: Any) -> bool:
    """True for a typed jax key: no NumPy dtype can hold it."""
    dtype = getattr(node, "dtype", None)
    return type(dtype).__module__.startswith("jax") and str(dtype).startswith("key<")


def is_axis_box(node: Any) -> bool:
    meta = sys.modules.get("flax.core.meta")
    return meta is not None and isinstance(node, meta.AxisMetadata)


def axis_value(box: Any) -> Any:
    """The content of a box, without the sharding constraint that `unbox` of a Partitioned applies under a mesh."""
    meta = sys.modules["flax.core.meta"]
    return box.unbox(apply_constraint=False) if isinstance(box, meta.Partitioned) else box.unbox()


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def is_variable(node: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(node, nnx.Variable)


def is_weight(variable: Any) -> bool:
    """True for Param, BatchStat and the user's own types; False for random, cache, intermediate and optimizer state."""
    nnx = _nnx()
    if isinstance(variable, tuple(getattr(nnx, name) for name in NOT_WEIGHTS)):
        return False
    return not is_optimizer_variable(variable)


def is_optimizer_variable(variable: Any) -> bool:
    """True for the moments and the step of an nnx.Optimizer."""
    optimizer = sys.modules.get("flax.nnx.training.optimizer")
    return optimizer is not None and isinstance(variable, optimizer.OptState)


def _is_module(node: Any) -> bool:
    """True for an nnx.Module. jax treats it as a tree too, but here it stays whole, because it may share Variables."""
    nnx = _nnx()
    return nnx is not None and isinstance(node, getattr(nnx, "Pytree", nnx.Module))


def _must_hold_array(variable: Any) -> bool:
    nnx = _nnx()
    return isinstance(variable, (nnx.Param, nnx.BatchStat))


def variable_value(variable: Any) -> Any:
    """The stored value of an nnx.Variable, without running hooks; for an array reference, its array."""
    value = variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value
    return value[...] if _is_ref(value) else value


def variable_with(variable: Any, value: Any) -> Any:
    """A new Variable of the same type and metadata that stores `value`."""
    new = variable.copy()
    set_variable(new, value)
    return new


def set_variable(variable: Any, value: Any) -> None:
    """Store `value` in a Variable, in place, without running hooks."""
    held = variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value
    if _is_ref(held):
        held[...] = value
    elif hasattr(variable, "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value


def _is_ref(value: Any) -> bool:
    jax = sys.modules.get("jax")
    kind = getattr(jax, "Ref", None)
    return kind is not None and isinstance(value, kind)


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
