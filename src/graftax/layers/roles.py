"""The role of a leaf: which of its axes are outputs, inputs, heads, a stack, as the live module that holds it says, or
names that leave no doubt."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Literal

from graftax.layers.base import LeafAxes, Shape
from graftax.layers.connect import known_kind, overriding
from graftax.layers.leaf_axes import BY_NAME
from graftax.layers.patterns import regroup
from graftax.layers.table import LAYERS
from graftax.ops import Flip, Op, Rearrange, groups_text, parse_pattern
from graftax.tree import Checkpoint, Module, Side
from graftax.tree.sides import separator_of

AxisKind = Literal["stack", "out", "in", "k"]
"""stack: counts matrices; out: an output; in: summed over; k: the positions of a convolution, summed over too."""


@dataclass(frozen=True, slots=True)
class NamedAxis:
    name: str
    kind: AxisKind
    size: int


@dataclass(frozen=True, slots=True)
class LeafRole:
    """What the axes of a leaf are.

    axes    for each axis the named axes that it consists of, outermost first: one, or several that it merges
    inputs  the names of kind "in" in the order of the layer's flat input
    layer   the row of the layer table; '' where names alone tell
    leaf    the role of the leaf in its layer: 'kernel', 'out_proj.weight'
    by      the evidence, as text
    """

    axes: tuple[tuple[NamedAxis, ...], ...]
    inputs: tuple[str, ...]
    layer: str
    leaf: str
    by: str

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each axis: ("stack", "in", "heads", "head_dim"); "(groups in)" for one that merges two."""
        return tuple(one[0].name if len(one) == 1 else f"({' '.join(a.name for a in one)})" for one in self.axes)

    @property
    def parts(self) -> tuple[NamedAxis, ...]:
        """The named axes in the order of the leaf's memory."""
        return tuple(itertools.chain(*self.axes))

    def of_kind(self, kind: AxisKind) -> tuple[int, ...]:
        """The axes of the leaf that are of this kind throughout."""
        return tuple(n for n, one in enumerate(self.axes) if all(axis.kind == kind for axis in one))

    def in_order(self, kind: AxisKind) -> list[int]:
        """The places in `parts` of the axes of a kind; inputs in the order of the layer's flat input."""
        places = [n for n, axis in enumerate(self.parts) if axis.kind == kind]
        return sorted(places, key=lambda n: self.inputs.index(self.parts[n].name)) if kind == "in" else places

    def indexed(self, index: Sequence[int | slice | EllipsisType]) -> LeafRole | None:
        """The role of leaf[index], a basic index without new axes. None if a slice takes a part of an axis that merges
        several."""
        at = next((n for n, one in enumerate(index) if one is ...), len(index))
        rest = index[at + 1 :]
        index = [*index[:at], *[slice(None)] * (len(self.axes) - at - len(rest)), *rest]
        kept: list[tuple[NamedAxis, ...]] = []
        for axes, one in zip(self.axes, index, strict=True):
            if not isinstance(one, slice):
                continue
            size = math.prod(axis.size for axis in axes)
            taken = range(size)[one]
            if taken == range(size):
                kept.append(axes)
            elif len(axes) == 1:
                kept.append((NamedAxis(axes[0].name, axes[0].kind, len(taken)),))
            else:
                return None
        left = {axis.name for axes in kept for axis in axes}
        return LeafRole(tuple(kept), tuple(n for n in self.inputs if n in left), self.layer, self.leaf, self.by)


def role_of(tree: Checkpoint, path: str) -> LeafRole | None:
    """The role of a leaf, or None if nothing shows it. Where a tree has live modules, they alone decide: a class that
    the layer table does not list, or that computes with its weights itself, shows nothing, whatever the names are.
    Without modules, the name of a matrix may show it (`leaf_axes.BY_NAME`), unless the length of a bias beside it
    contradicts."""
    return _of_modules(tree, path) if tree.live.modules else _of_name(tree, path)


def _holders(tree: Checkpoint, path: str) -> Iterator[tuple[Module, str]]:
    """The live modules that hold a leaf, innermost first, each with the leaf's role in it."""
    sep = "." if tree.side == "torch" else "/"
    parts = path.split(sep)
    starts = (0, 1) if tree.side == "flax" else (0,)  # Linen's module paths have no collection
    for stop in range(len(parts) - 1, -1, -1) if tree.live.modules else ():
        for start in starts:
            module = tree.live.modules.get(sep.join(parts[start:stop]))
            if module is None or (start > stop):
                continue
            role = sep.join(parts[max(start, stop) :])
            if module.leaves.get(role) != path:
                role = next((role for role, leaf in module.leaves.items() if leaf == path), "")
            yield module, role
            break


def conversion(one: LeafRole, other: LeafRole) -> tuple[Op, ...] | None:
    """The ops from a leaf of one role to a leaf of another role of the same side, stacks left out; () if both lie
    alike, None if the roles do not show it. A transposed convolution that is stored (in, out) runs over its window the
    other way around than one that is stored (out, in)."""
    ends = (one, other)
    names = [{axis.name for axis in role.parts if axis.size > 1} for role in ends]
    if one.layer != other.layer and (names[0] != names[1] or "k" in names[0]):
        return None
    atoms: tuple[dict[int, list[str]], ...] = ({}, {})
    sizes: list[tuple[str, int]] = []
    for kind in ("out", "in", "k"):
        places = [role.in_order(kind) for role in ends]
        made = regroup(*(tuple(role.parts[n].size for n in some) for role, some in zip(ends, places, strict=True)))
        if made is None:
            return None
        for some, groups, end in zip(places, parse_pattern(made[0].pattern), atoms, strict=True):
            for n, group in zip(some, groups, strict=True):
                end[n] = [kind[0] + name[1:] for name in group if name != "1"]
        sizes += [(kind[0] + name[1:], size) for name, size in made[0].sizes]
    sides: list[list[list[str]]] = []
    for role, end in zip(ends, atoms, strict=True):
        at = itertools.count()
        found = [[name for _ in axes for name in end.get(next(at), ["stack"])] or ["1"] for axes in role.axes]
        sides.append([names for names in found if names[0] != "stack"])
    flat = [[name for group in side for name in group if name != "1"] for side in sides]
    turned = one.layer == "ConvTranspose" and [name[0] for name in flat[0]] != [name[0] for name in flat[1]]
    if flat[0] == flat[1] and not turned:
        return ()
    merged = {name for side in sides for group in side if len(group) > 1 for name in group}
    fixed = tuple(sorted((name, size) for name, size in sizes if name in merged))
    flip = (Flip(other.of_kind("k")),) if turned else ()
    return (Rearrange(" -> ".join(map(groups_text, sides)), fixed), *flip)


# ---------------------------------------------------------------- live modules


def _of_modules(tree: Checkpoint, path: str) -> LeafRole | None:
    """The innermost module that the table lists decides; a layer around it may know better names (heads)."""
    side: Side = tree.side or "flax"
    found: LeafRole | None = None
    for module, role in _holders(tree, path):
        if found is None and module.own_math and overriding(module, side):
            return None
        kind = known_kind(module, side)
        row = _row(kind, side, role) if kind and role else None
        if row is None:
            continue
        made = _placed(tree, module, role, row, side, path)
        if found is None:
            if made is None:
                return None
            found = made
        elif made is not None and _kinds(made) == _kinds(found):
            return made
    return found


def _kinds(role: LeafRole) -> tuple[tuple[AxisKind, ...], ...]:
    """The kinds of each axis, each once: better names differ in nothing else."""
    return tuple(tuple(dict.fromkeys(axis.kind for axis in axes)) for axes in role.axes)


def _row(kind: str, side: Side, role: str) -> tuple[str, LeafAxes] | None:
    for layer in LAYERS:
        if kind in (layer.torch if side == "torch" else layer.flax):
            for row in layer.axes:
                if row.side == side and (not row.kinds or kind in row.kinds) and re.fullmatch(row.roles, role):
                    return layer.name, row
    return None


def _placed(
    tree: Checkpoint, module: Module, role: str, row: tuple[str, LeafAxes], side: Side, path: str
) -> LeafRole | None:
    layer, axes = row
    shape = tree[path].shape
    shapes: Mapping[str, Shape] = module.settings.get("inner_shapes") or {}  # as a Linen module's own call sees them
    inner = shapes.get(role, axes.shape(module.settings))
    if inner is None or side == "torch" or len(inner) > len(shape):
        inner = shape
    given = axes.axes(module.settings, len(inner)) if callable(axes.axes) else (axes.axes, axes.inputs)
    if given is None:
        return None
    stacks = _stack_axes(tree, module, path, shape, inner)
    if stacks is None:
        return None
    rest = tuple(size for n, size in enumerate(shape) if n not in stacks)
    named = _named(given, rest)
    if named is None:
        return None
    every = list(named)
    for place in stacks:
        every.insert(place, (NamedAxis("stack", "stack", shape[place]),))
    inputs = tuple(given[1].split())
    return LeafRole(tuple(every), inputs, layer, role, f"the live module is {module.kind}")


def _named(given: tuple[str, str], shape: Shape) -> tuple[tuple[NamedAxis, ...], ...] | None:
    """The named axes of a shape; None if they do not fit it. `3:qkv` states a size."""
    text, inputs = given[0], set(given[1].split())
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", text)]
    many = next((n for n, group in enumerate(groups) if group[0].startswith("*")), None)
    if many is not None:
        extra = len(shape) - len(groups) + 1
        groups[many : many + 1] = [[groups[many][0][1:]]] * max(extra, 0)
    if len(groups) != len(shape):
        return None
    out: list[tuple[NamedAxis, ...]] = []
    for group, size in zip(groups, shape, strict=True):
        sizes = {name: int(stated) for stated, _, name in (item.rpartition(":") for item in group) if stated}
        names = [item.rpartition(":")[2] for item in group]
        known = math.prod(sizes.values())
        free = [name for name in names if name not in sizes]
        if len(free) > 1 or known < 1 or size % known or (not free and known != size):
            return None
        out.append(tuple(NamedAxis(name, _kind(name, inputs), sizes.get(name, size // known)) for name in names))
    return tuple(out)


def _kind(name: str, inputs: set[str]) -> AxisKind:
    return "in" if name in inputs else "stack" if name == "stack" else "k" if name == "k" else "out"


# ---------------------------------------------------------------- axes that a transform stacked


def _stack_axes(tree: Checkpoint, module: Module, path: str, shape: Shape, inner: Shape) -> tuple[int, ...] | None:
    """The axes of `shape` that `inner` lacks. None if they cannot be told. Where several places fit (as many layers as
    inputs), a traced call of a Linen model shows them; of an NNX module, the other leaves must leave one axis."""
    extra = len(shape) - len(inner)
    fits = [
        places
        for places in itertools.combinations(range(len(shape)), extra)
        if tuple(size for n, size in enumerate(shape) if n not in places) == inner
    ]
    if len(fits) < 2:
        return fits[0] if fits else None
    if tree.live.trace is not None:
        shown = tree.live.trace().stacked.get(path)
        return shown if shown in fits else None
    axes = {axis for places in fits for axis in (places[0], places[0] - len(shape))} if extra == 1 else set[int]()
    left = {
        axis % len(shape) for axis in axes if all(_without(full, axis) == part for full, part in _beside(tree, module))
    }
    return (left.pop(),) if len(left) == 1 else None


def _beside(tree: Checkpoint, module: Module) -> Iterator[tuple[Shape, Shape]]:
    """(shape, shape without stacked axes) of the leaves of an NNX module."""
    for role, path in module.leaves.items():
        row = _row(known_kind(module, "flax"), "flax", role)
        part = row[1].shape(module.settings) if row else None
        if part is not None:
            yield tree[path].shape, part


def _without(shape: Shape, axis: int) -> Shape | None:
    if not -len(shape) <= axis < len(shape):
        return None
    return tuple(size for n, size in enumerate(shape) if n != axis % len(shape))


# ---------------------------------------------------------------- names alone


def _of_name(tree: Checkpoint, path: str) -> LeafRole | None:
    shape = tree[path].shape
    cut = max(path.rfind("/"), path.rfind(".")) + 1
    leaf = path[cut:]
    by = f"its name is {leaf}"
    if len(shape) < 2:
        axes = tuple((NamedAxis("features", "out", size),) for size in shape)
        return LeafRole(axes, (), "", leaf, "it is no matrix")
    side = tree.side or separator_of(tree)
    row = next((row for row in BY_NAME if row.side == side and re.fullmatch(row.roles, leaf)), None)
    if row is None or len(shape) != 2 or not isinstance(row.axes, str):
        return None
    if _contradicted(tree, path[:cut], row.axes, shape):
        return None
    named = _named((row.axes, row.inputs), shape)
    return None if named is None else LeafRole(named, tuple(row.inputs.split()), "", leaf, by)


def _contradicted(tree: Checkpoint, prefix: str, axes: str, shape: Shape) -> bool:
    """True if the bias beside a matrix is not as long as the matrix has outputs. A square matrix shows nothing, so
    there the other matrices of the block speak."""
    bias = tree.get(f"{prefix}bias")
    if bias is None or "out" not in axes.split():
        return False
    out = axes.split().index("out")
    if bias.shape != (shape[out],):
        return True
    if shape[0] != shape[1]:
        return False
    sep = prefix[-1:]
    block = prefix[:-1].rpartition(sep)[0].rpartition(sep)[0] if sep else ""
    leaf = "weight" if axes.startswith("out") else "kernel"
    for other, spec in tree.items():
        if not (other.startswith(block) and other.endswith(f"{sep}{leaf}")) or len(spec.shape) != 2:
            continue
        beside = tree.get(f"{other[: -len(leaf)]}bias")
        if beside is not None and spec.shape[0] != spec.shape[1] and beside.shape == (spec.shape[1 - out],):
            return True
    return False
