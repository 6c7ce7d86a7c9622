"""What a live tree says about the placement of its leaves: their shardings, and the axis names in the boxes around
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graftax.adapters import containers

Rules = tuple[tuple[str, Any], ...]
"""(name of a weight's axis, a mesh axis, several of them, or None); the first rule whose mesh axes are free applies."""


@dataclass(frozen=True, slots=True)
class Note:
    """What is known about the placement of one leaf.

    sharding  its own sharding: a jax Sharding, on real devices or on an AbstractMesh; None if it has none
    free      it is an array that jax may move to where it is used, so its sharding is not binding
    names     the names of its axes, from a box: mesh axes, or logical names that rules translate
    mesh      the mesh of the box
    rules     the rules of the box
    linen     the box is Linen's: of several rules for a name, the first whose mesh axes are free applies
    """

    sharding: Any = None
    free: bool = False
    names: tuple[Any, ...] | None = None
    mesh: Any = None
    rules: Rules = ()
    linen: bool = False


def notes_of(tree: Any) -> dict[str, Note]:
    """path -> Note of every leaf of a nested container, with the paths of `containers.leaves`."""
    found: dict[str, Note] = {}
    _walk(tree, (), Note(), found)
    return found


def note_of_leaf(leaf: Any, box: Note | None = None) -> Note:
    """The Note of a bare leaf, given the Note of its box."""
    own = getattr(leaf, "sharding", None)
    if own is None or not is_sharding(own):
        return box or Note()
    committed = getattr(leaf, "committed", True)
    return replace(box or Note(), sharding=own, free=not committed)


def is_sharding(obj: Any) -> bool:
    """True for a jax Sharding, on devices or on an AbstractMesh (whose properties mostly raise)."""
    return hasattr(type(obj), "shard_shape") and hasattr(type(obj), "device_set")


def _walk(node: Any, keys: tuple[Any, ...], box: Note, found: dict[str, Note]) -> None:
    children = None if containers.is_plain_array(type(node)) else containers.children_of(node)
    if children is not None:
        for key, child in children:
            _walk(child, (*keys, key), box, found)
    elif containers.is_variable(node):
        _walk(containers.variable_value(node), keys, _of_variable(node), found)
    elif containers.is_axis_box(node):
        _walk(containers.axis_value(node), keys, _of_box(node), found)
    elif containers.is_array(node) and not containers.is_random_key(node):
        found[containers.path_of(keys)] = note_of_leaf(node, box)


def _of_box(box: Any) -> Note:
    """The Note of Linen's Partitioned and LogicallyPartitioned."""
    names = getattr(box, "names", None)
    rules = getattr(box, "rules", None) or ()
    return Note(None, False, None if names is None else tuple(names), getattr(box, "mesh", None), tuple(rules), True)


def _of_variable(variable: Any) -> Note:
    """The Note of an nnx.Variable: its `out_sharding` (formerly `sharding_names`), mesh and rules."""
    known: Mapping[str, Any] = variable.get_metadata()
    said = next((known[name] for name in ("out_sharding", "sharding_names", "sharding") if known.get(name)), None)
    mesh, rules = known.get("mesh"), tuple(known.get("sharding_rules") or ())
    if said is None:
        return Note(mesh=mesh, rules=rules)
    if is_sharding(said):
        return Note(said, mesh=mesh, rules=rules)
    return Note(names=tuple(said), mesh=mesh, rules=rules)
