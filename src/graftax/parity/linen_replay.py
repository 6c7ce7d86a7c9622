"""Take one Linen module out of a model and run it alone: an unbound copy, with its variables collected from the
tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
from flax import linen as nn

from graftax.adapters import containers, jax_arrays
from graftax.errors import ReplayError, escape
from graftax.tree import join_path

Keys = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Surveyed:
    """One module as an abstract run saw it: the object, whether jax or a lifted transformation traces its call
    separately, and the shapes of its leaves (by collection and keys) inside that call."""

    module: nn.Module
    nested: bool
    inner: dict[Keys, tuple[int, ...]]


def alone(
    seen: Surveyed,
    variables: Any,
    settings: Mapping[str, Any],
    leaves: Mapping[str, Any],
    call: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """(an unbound copy of the module with other settings, its variables with other leaves).

    leaves   full path in `variables` -> array, stacked or not
    call     the slice of stacked leaves
    Raises ReplayError for a setting that the module lacks, a path outside it, or a leaf without values.
    """
    module = seen.module
    path = join_path(module.path)
    known = {f.name for f in fields(type(module)) if f.name not in ("parent", "name")}  # pyright: ignore
    strange = sorted(settings.keys() - known)
    if strange:
        raise ReplayError(
            f"{type(module).__name__} at {escape(path)} has no setting {', '.join(map(escape, strange))}",
            next=f"It has {', '.join(sorted(known))}.",
        )
    made = module.copy(parent=None, name=None, **settings)
    places = dict(_places(module, made.bind({"params": {}})))
    out: dict[str, Any] = {}
    used: set[str] = set()
    for keys, leaf in containers.leaves(variables):
        full = containers.path_of(keys)
        spot = _spot(tuple(keys[1:]), places)
        if spot is None:
            continue
        used.add(full)
        value = leaves.get(full, leaf)
        if jax_arrays.is_abstract(value):
            raise ReplayError(f"{escape(full)} has a shape and a dtype, but no values: pass it in `leaves`")
        inner = seen.inner.get((keys[0], *keys[1 + len(module.path) :]))
        node = out.setdefault(str(keys[0]), {})
        for key in spot[:-1]:
            node = node.setdefault(key, {})
        node[spot[-1]] = jax.numpy.asarray(sliced(value, inner, call, full))
    outside = sorted(leaves.keys() - used)
    if outside:
        raise ReplayError(f"{escape(outside[0])} is no leaf of {escape(path) or 'the model'}")
    return made, out


def variables_of(module: nn.Module) -> dict[str, Any]:
    """The variables of a bound module as plain dicts, which later writes do not change."""
    return {name: _plain(tree) for name, tree in module.variables.items() if name not in _MADE}


def _plain(tree: Any) -> Any:
    return {key: _plain(child) for key, child in tree.items()} if isinstance(tree, Mapping) else tree


def unbound(module: nn.Module) -> nn.Module:
    """A copy of a bound module that can be run alone. ReplayError if modules that are its attributes stand beside it in
    the model, so that their weights are not below its path."""
    beside = [path for path, _ in _places(module, module.copy(parent=None, name=None).bind({"params": {}}))]
    outside = [path for path in beside if path[: len(module.path)] != tuple(module.path)]
    if outside:
        names = ", ".join(escape(join_path(path)) for path in outside[:4]) + (", ..." if len(outside) > 4 else "")
        above = join_path(module.path[:-1])
        raise ReplayError(
            f"the modules that this {type(module).__name__} calls stand beside it, not below its path: {names}",
            next=f"Take one of these, or the module above: {escape(repr(above))}{'' if above else ' (the model)'}.",
        )
    return module.copy(parent=None, name=None)


_MADE = frozenset({"intermediates", "perturbations"})
"""Collections that a call only writes."""


def _places(old: nn.Module, new: nn.Module) -> Iterator[tuple[Keys, Keys]]:
    """(path in the model, path below the copy) of the module and of the modules that are its attributes. An attribute
    module may stand beside it in the model (the cell of an nn.RNN); in the copy it lies below."""
    yield tuple(old.path), tuple(new.path)
    for f in fields(type(old)):  # pyright: ignore
        if f.name in ("parent", "name"):
            continue
        pairs = zip(_modules(getattr(old, f.name, None)), _modules(getattr(new, f.name, None)), strict=False)
        for theirs, ours in pairs:
            if theirs.scope is not None and ours.scope is not None:
                yield from _places(theirs, ours)


def _modules(value: Any) -> list[Any]:
    found = jax.tree.leaves(value, is_leaf=lambda item: isinstance(item, nn.Module))
    return [item for item in found if isinstance(item, nn.Module)]


def _spot(keys: Keys, places: Mapping[Keys, Keys]) -> Keys | None:
    """The path of a model's leaf in the copy; None: not in it. The longest matching path decides."""
    for end in range(len(keys) - 1, -1, -1):
        if keys[:end] in places:
            return places[keys[:end]] + keys[end:]
    return None


def sliced(array: Any, inner: tuple[int, ...] | None, call: int, name: str) -> Any:
    """Slice number `call` of a leaf that a scan or vmap has stacked; a leaf that has the inner shape unchanged."""
    shape = tuple(array.shape)
    if inner is None or shape == inner:
        return array
    for axis in range(len(shape)):
        if shape[:axis] + shape[axis + 1 :] == inner:
            return jax.numpy.take(jax.numpy.asarray(array), call % shape[axis], axis=axis)
    raise ReplayError(f"{escape(name)} has shape {shape}, the module alone takes {inner}")
