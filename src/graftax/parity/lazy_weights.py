"""Weights that are read when a module is called and released afterwards, for models larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from graftax.adapters import containers, jax_arrays
from graftax.errors import ModelError, escape
from graftax.tree import Module

Supply = Callable[[str], Mapping[str, Any]]
"""module path -> the arrays of the leaves that the module owns itself, by their full path or by their role in it."""
Keys = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class LazyLeaves:
    """The leaves without values, the modules that own them, and the supply of their values.

    modules   path -> Module: roles of leaves
    owned     module path -> {keys of a leaf in the tree: its abstract value}
    """

    supply: Supply | None
    modules: Mapping[str, Module] = field(default_factory=dict[str, Module])
    owned: dict[str, dict[Keys, Any]] = field(default_factory=dict[str, dict[Keys, Any]])

    def values(self, path: str) -> dict[Keys, Any]:
        """The leaves of a module, read now. ModelError if one is missing."""
        wanted = self.owned.get(path)
        if not wanted:
            return {}
        given = self.supply(path) if self.supply is not None else {}
        roles = {full: role for role, full in self.modules[path].leaves.items()} if path in self.modules else {}
        out: dict[Keys, Any] = {}
        for keys, spec in wanted.items():
            full = containers.path_of(keys)
            array = given.get(full)
            if array is None and full in roles:
                array = given.get(roles[full])
            if array is None:
                raise ModelError(
                    f"Flax: {escape(full)} has a shape and a dtype, but no values",
                    next="Pass weights that hold it."
                    if self.supply is None
                    else "The supply returned no array for it.",
                )
            if tuple(array.shape) != tuple(spec.shape):
                raise ModelError(f"Flax: {escape(full)} has shape {tuple(spec.shape)}, its supply {tuple(array.shape)}")
            out[keys] = jax.numpy.asarray(array)
        return out


def abstract_leaves(tree: Any) -> dict[Keys, Any]:
    """keys -> leaf of every leaf without values."""
    return {keys: leaf for keys, leaf in containers.leaves(tree) if jax_arrays.is_abstract(leaf)}


def by_owner(leaves: Mapping[Keys, Any], paths: Any, collection: bool) -> dict[str, dict[Keys, Any]]:
    """Group leaves by the innermost of the modules `paths` that holds them. `collection`: the first key of each leaf
    names a collection, not a module."""
    known = set(paths)
    out: dict[str, dict[Keys, Any]] = {}
    for keys, leaf in leaves.items():
        inside = keys[1:] if collection else keys
        for end in range(len(inside) - 1, -1, -1):
            path = containers.path_of(inside[:end])
            if path in known or not end:
                out.setdefault(path, {})[keys] = leaf
                break
    return out


def filled(tree: Any, arrays: Mapping[Keys, Any]) -> Any:
    """The tree with these leaves filled in."""
    named = {containers.path_of(keys): array for keys, array in arrays.items()}
    return containers.remade(tree, lambda path, leaf: named.get(path, leaf)) if named else tree
