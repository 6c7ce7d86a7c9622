"""Take a leaf from another checkpoint (the donor): find it, lay it out by the layer table for its new place, check it.

A donor from the leaf's own side is taken unchanged. A donor from the other side goes through the layer table, which
must leave one reading: a square matrix of unknown kind, or a shape that only an unusual layout explains, needs
`layout`. A plan that ports the donor tells key and layout for every leaf.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, ClassVar

from graftax.errors import LayoutError, PlanError, UsageError, escape, option, worded
from graftax.layers import Connection, layouts, leaf_connections
from graftax.ops import Cast, Op, apply_chain, chain_text, invert_chain
from graftax.ops.replace_op import not_data
from graftax.plans import Plan
from graftax.surgery.array_parts import as_codes
from graftax.tree import Checkpoint, LeafIndex, Module, Side, TensorSpec, nearest
from graftax.tree.sides import FLAX_LEAVES, OTHER, side_of_names

LAYOUTS: tuple[str, ...] = layouts()
"""The values of `layout`: the names of the layer table."""


@dataclass(frozen=True, slots=True)
class Target:
    """The leaf that a donor goes into: its side (None: unknown), and the live module that it belongs to, if there is
    one."""

    side: Side | None
    module: Module | None = None
    role: str = ""
    by_names: bool = False
    """Did names alone tell the side?"""


@dataclass(frozen=True, slots=True, eq=False)
class FromCheckpoint:
    """Tensor `key` of the checkpoint or live tree `source`; see `surgery.values.from_checkpoint`.

    Surgery fills in `target` for each leaf; without it only the leaf's own name tells its side.
    """

    reads: ClassVar[bool] = False
    source: str | PathLike[str] | Any
    key: str | None = None
    layout: str | None = None
    cast: bool = False
    target: Target | None = None
    plan: Plan | None = None

    @property
    def text(self) -> str:
        label = self.source.label if isinstance(self.source, Checkpoint) else self.source
        shown = escape(label) if isinstance(label, (str, PathLike)) or isinstance(self.source, Checkpoint) else "..."
        by = ", plan" if self.plan is not None else f", {escape(self.key)}" if self.key is not None else ""
        return f"from_checkpoint({shown}{by})"

    def as_data(self) -> dict[str, Any]:
        """What it takes and from where, as JSON data. PlanError for a live tree."""
        if isinstance(self.source, Checkpoint):
            label, live = self.source.label, not self.source.storage.files
        else:
            label, live = str(self.source), not isinstance(self.source, (str, PathLike))
        if live:
            raise not_data("a live tree")
        plan = None if self.plan is None else self.plan.as_json(candidates=None)
        fields = {"key": self.key, "layout": self.layout, "cast": self.cast, "plan": plan}
        return {"kind": "from_checkpoint", "source": label, **fields}

    def opened(self) -> FromCheckpoint:
        """The same value with its checkpoint open, so that many leaves open it once.

        Raises StorageError, FormatError, UnsafeInputError; PlanError for a quantized checkpoint or one without values.
        """
        from graftax.execute.opening import open_tree
        from graftax.match.quantized import refuse_quantized

        if isinstance(self.source, Checkpoint) and self.target is not None:
            return self
        side = None if self.plan is None else self.plan.source.side
        donor = self.source if isinstance(self.source, Checkpoint) else open_tree(self.source, side=side)
        refuse_quantized(donor)
        if not donor.has_values:
            raise PlanError(f"the donor {escape(donor.label)} has names, shapes and dtypes, but no values")
        return replace(self, source=donor)

    def way(self, path: str, spec: TensorSpec) -> tuple[Checkpoint, str, tuple[Op, ...]]:
        """(the donor, its tensor, the ops that make the leaf of it). PlanError if it does not fit, or if its layout is
        unknown; what opening it raises."""
        donor: Any = self.opened().source
        target = self.target or Target(side_of_names((path,)), by_names=True)
        key = donor_key(donor, self.key, path)
        ops = layout_ops(donor, key, path, spec, target, self.layout)
        return donor, key, (*ops, *_cast_ops(donor, donor.label, key, spec, self.cast))

    def check(self, path: str, spec: TensorSpec) -> None:
        if self.plan is None:
            self.way(path, spec)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any:
        if self.plan is not None:
            opened: Any = self.opened().source
            return _ported(opened, self.plan, path, spec, self.cast)
        donor, key, ops = self.way(path, spec)
        (out,) = apply_chain(ops, (donor.read(key),))
        return out


@dataclass(frozen=True, slots=True, eq=False)
class PartOfDonor:
    """The part at `index` of what the donor gives for the whole leaf at `leaf`, which has `spec`."""

    reads: ClassVar[bool] = False
    donor: FromCheckpoint
    leaf: str
    spec: TensorSpec
    index: LeafIndex

    @property
    def text(self) -> str:
        return f"{self.donor.text}{self.index.text}"

    def check(self, path: str, spec: TensorSpec) -> None:
        self.donor.check(self.leaf, self.spec)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any:
        whole = self.donor.apply(self.leaf, self.spec, None)
        return as_codes(whole, self.spec)[self.index.key]


def _ported(donor: Checkpoint, plan: Plan, path: str, spec: TensorSpec, cast: bool) -> Any:
    """The leaf that the plan makes of the donor. PlanError if it makes none, or if the donor is another checkpoint."""
    name = same_leaf(plan.like.specs, path)
    entry = next((entry for entry in plan.entries if name in entry.targets), None)
    if name is None or entry is None:
        turned = path in plan.source.specs
        near = nearest(path, plan.like.specs)
        raise PlanError(
            f"the plan for {escape(plan.source.label)} -> {escape(plan.like.label)} makes no {escape(path)!r}",
            next="It is the plan of the other direction: give plan.inverse." if turned else near and f"Near: {near}",
        )
    if entry.unfilled:
        raise PlanError(f"no tensor of {escape(donor.label)} fills this leaf in the plan: {escape(entry.text, 120)}")
    for key in entry.sources:
        if donor.get(key) != plan.source.specs[key]:
            raise PlanError(
                f"the plan takes {escape(key)} {plan.source.specs[key]}, and {escape(donor.label)} has "
                f"{donor.get(key, 'no such tensor')}",
                next="Make the plan for this checkpoint: gx.plan(donor, like).",
            )
    made = apply_chain(entry.ops, tuple(donor.read(key) for key in entry.sources))[entry.targets.index(name)]
    have = plan.like.specs[name]
    if have.shape != spec.shape:
        raise PlanError(f"the plan makes {have} of the donor, and the leaf is {spec}")
    if have.dtype == spec.dtype:
        return made
    (made,) = apply_chain(_cast_ops({name: have}, donor.label, name, spec, cast), (made,))
    return made


def same_leaf(names: Container[str], path: str) -> str | None:
    """The name of a leaf in another tree, where that one or this one has its collection `params` in front."""
    inside = path.removeprefix("params/")
    return next((name for name in (path, f"params/{path}", inside) if name in names), None)


def donor_key(donor: Checkpoint, key: str | None, path: str) -> str:
    if key is not None:
        if key in donor:
            return key
        near = nearest(key, donor)
        raise PlanError(f"{escape(donor.label)} has no tensor {escape(key)!r}", next=f"Near: {near}" if near else "")
    same = same_leaf(donor, path)
    if same is not None:
        return same
    if len(donor) == 1:
        return next(iter(donor))
    near = nearest(path, donor)
    raise PlanError(
        f"{escape(donor.label)} has {len(donor)} tensors, none of them named {escape(path)!r}",
        next=f"Name one with {option('key')}." + (f" Near: {near}" if near else ""),
    )


def _cast_ops(donor: Mapping[str, TensorSpec], label: str, key: str, spec: TensorSpec, cast: bool) -> tuple[Op, ...]:
    """The op that rounds the donor to the leaf's dtype. Another dtype is an error unless a floating one may be cast."""
    have = donor[key].dtype
    if have == spec.dtype:
        return ()
    floating = donor[key].floating and spec.floating and not donor[key].packed and not spec.packed
    if not (cast and floating):
        raise PlanError(
            f"the donor {escape(key)} of {escape(label)} is {have}, the leaf is {spec.dtype}",
            next=f"Nothing is cast unasked: {worded('--cast', 'cast=True')} rounds it to {spec.dtype}."
            if floating
            else "A cast touches floating leaves only: give an array of the leaf's dtype.",
        )
    return (Cast(have, spec.dtype),)


# ---------------------------------------------------------------- layout


def layout_ops(
    donor: Checkpoint, key: str, path: str, spec: TensorSpec, target: Target, layout: str | None
) -> tuple[Op, ...]:
    """The ops that turn the donor's tensor into the leaf's layout. PlanError if none fit, or if more than one way
    fits."""
    have = donor[key]
    if layout == "identity":
        return _identity(donor, key, spec, f"{option('layout', 'identity')} takes it unchanged")
    side = donor.side
    guessed = side is not None and side == target.side and _guessed(donor, key, path, target)
    if side is not None and side == target.side and (layout is None or not guessed):
        if layout is not None:
            raise UsageError(
                f"{option('layout', layout)}: the donor {escape(donor.label)} and the tree are both {side}",
                next="No layout is needed: leave it out, or give 'identity'.",
            )
        names = " by their names" if guessed else ""
        ops = _identity(donor, key, spec, f"both are {side}{names}, so it is taken unchanged")
        if not guessed or not _alike_moved(spec.shape):
            return ops
    if have.packed:
        raise PlanError(
            f"{escape(key)} is {have.dtype}: packed types move unchanged, and need {option('layout', 'identity')}"
        )
    sure = side is not None and target.side is not None and not guessed
    if target.side is None:  # take the other side, or (below) the leaf's own
        target = replace(target, side="torch" if side == "flax" else "flax")
    elif guessed and side is not None:  # the end that does not declare its side may be of the other side
        other = side if donor.side_by == "names" else OTHER[side]
        target = replace(target, side=other, role=target.role or _role(path, None))
    ways = _connections(donor, key, path, spec, target, layout)
    if not sure and layout is None:
        return _sideless(donor, key, path, spec, target, ways)
    if not ways:
        raise _misfit(donor, key, spec, layout)
    why = _doubt(donor, key, path, spec, target, ways, layout)
    if why:
        raise _needs_layout(donor, key, path, spec, target, why)
    return _ops_of(ways[0], target.side)


def _doubt(
    donor: Checkpoint,
    key: str,
    path: str,
    spec: TensorSpec,
    target: Target,
    ways: Sequence[Connection],
    layout: str | None,
) -> str:
    """Why the first way is not the only reading; '' if it is."""
    if ways[0].by == "modules" or layout is not None:
        return "it fits in more than one way" if sum(way.by == ways[0].by for way in ways) > 1 else ""
    if len(ways) > 1:
        return "it fits in more than one way"
    torch = donor[key].shape if target.side == "flax" else spec.shape
    if len(torch) == 2 and torch[0] == torch[1] and ways[0].entries[0].ops:
        return "it is square, so (out, in) and (in, out) look alike"
    if ways[0].by == "shapes" and _against_convention(donor, key, path, spec, target):
        return "it fits in an unusual way only"
    return ""


_MATRICES = frozenset({"weight", "kernel"})
"""Leaves that torch stores as (out, in) and Flax as (in, out)."""


def _guessed(donor: Checkpoint, key: str, path: str, target: Target) -> bool:
    """Do only names tell that the donor and the leaf are of one side? The names of Flax's own leaves are proof
    enough."""
    own = _role(key, None) in FLAX_LEAVES and _role(path, None) in FLAX_LEAVES
    return (donor.side_by == "names" or target.by_names) and not own


def _alike_moved(shape: Sequence[int]) -> bool:
    """Has a matrix, or a convolution's weight, the same shape in torch's layout as in Flax's?"""
    return len(shape) > 1 and (*shape[2:], shape[1], shape[0]) == tuple(shape)


def _identity(donor: Checkpoint, key: str, spec: TensorSpec, why: str) -> tuple[Op, ...]:
    if donor[key].shape != spec.shape:
        raise PlanError(
            f"the donor {escape(key)} {donor[key]} of {escape(donor.label)} does not fit {spec}; {why}",
            next=misfit_hint(donor[key].shape, spec.shape, "identity"),
        )
    return ()


def _connections(
    donor: Checkpoint, key: str, path: str, spec: TensorSpec, target: Target, layout: str | None
) -> list[Connection]:
    """Every way of the layer table between the two leaves, in either direction."""
    module, role = owner(donor, key)
    role = role or _role(key, donor.side)
    leaf_role = target.role or _role(path, target.side)
    # The table compares shapes; dtypes are looked at afterwards.
    have, want = TensorSpec(donor[key].shape, "float32"), TensorSpec(spec.shape, "float32")
    try:
        if target.side == "flax":
            return leaf_connections(role, have, leaf_role, want, module, target.module, layout or "")
        return leaf_connections(leaf_role, want, role, have, target.module, module, layout or "")
    except LayoutError as error:
        raise PlanError(str(error)) from error


def owner(checkpoint: Checkpoint, path: str) -> tuple[Module | None, str]:
    """The innermost live module that holds a leaf, and the leaf's role in it."""
    sep = "." if checkpoint.side == "torch" else "/"
    parts = path.split(sep)
    if not checkpoint.live.modules:
        return None, ""
    starts = (0, 1) if checkpoint.side == "flax" else (0,)  # Linen's module paths have no collection
    for stop in range(len(parts) - 1, -1, -1):
        for start in starts:
            module = checkpoint.live.modules.get(sep.join(parts[start:stop]))
            if module is not None:
                return next(((module, role) for role, leaf in module.leaves.items() if leaf == path), (None, ""))
    return None, ""


def _role(path: str, side: Side | None) -> str:
    """The last part of a name, on which conventions rest: 'weight', 'kernel'."""
    if side is None:
        return path[max(path.rfind("/"), path.rfind(".")) + 1 :]
    return path.rpartition("." if side == "torch" else "/")[2]


def _ops_of(way: Connection, side: Side | None) -> tuple[Op, ...]:
    ops = way.entries[0].ops
    return ops if side == "flax" else invert_chain(ops)


def _sideless(
    donor: Checkpoint, key: str, path: str, spec: TensorSpec, target: Target, ways: Sequence[Connection]
) -> tuple[Op, ...]:
    """The ops if the side of the donor or of the leaf is unknown: unchanged, or as the other side stores it, if only
    one fits."""
    moved = [way for way in ways if way.entries[0].ops]
    as_it_is = donor[key].shape == spec.shape
    named = {_role(key, None), _role(path, None)}
    matrix = len(named) > 1 and bool(named & _MATRICES) and "embedding" not in named
    if as_it_is and (len(spec.shape) < 2 or not (moved or (matrix and _alike_moved(spec.shape)))):
        return ()
    if not as_it_is and not moved:
        raise _misfit(donor, key, spec, None)
    why = "it fits in more than one way" if as_it_is else _doubt(donor, key, path, spec, target, moved, None)
    if why:
        raise _needs_layout(donor, key, path, spec, target, why)
    return _ops_of(moved[0], target.side)


def _against_convention(donor: Checkpoint, key: str, path: str, spec: TensorSpec, target: Target) -> bool:
    """Do these leaves have a usual layout in which this donor would have another shape?"""
    shape = donor[key].shape
    if len(shape) < 2:
        return False
    usual = (*shape[2:], shape[1], shape[0]) if target.side == "flax" else (shape[-1], shape[-2], *shape[:-2])
    ways = _connections(donor, key, path, TensorSpec(usual, spec.dtype), target, None)
    return any(way.by == "convention" for way in ways)


def _misfit(donor: Checkpoint, key: str, spec: TensorSpec, layout: str | None) -> PlanError:
    return PlanError(
        f"the donor {escape(key)} {donor[key]} of {escape(donor.label)} does not fit {spec}",
        next=misfit_hint(donor[key].shape, spec.shape, layout),
    )


def _needs_layout(donor: Checkpoint, key: str, path: str, spec: TensorSpec, target: Target, why: str) -> PlanError:
    """The error that lists every reading, and the option that chooses it."""
    readings = readings_of(donor, key, path, spec, target)
    return PlanError(
        f"the layout of the donor {escape(key)} {donor[key]} of {escape(donor.label)} is unknown: {why}",
        next=f"Give {' or '.join(readings)}." if readings else "Transpose or reshape it yourself, and give the array.",
    )


def readings_of(donor: Checkpoint, key: str, path: str, spec: TensorSpec, target: Target) -> list[str]:
    """The layouts in which the donor's tensor gets the leaf's shape, as `layout=` takes them, with what each one
    does."""
    readings: list[str] = []
    for name in LAYOUTS:
        if name == "identity":
            fits = donor[key].shape == spec.shape
            how = "unchanged"
        else:
            ways = _connections(donor, key, path, spec, target, name)
            fits = bool(ways) and not _doubt(donor, key, path, spec, target, ways, name)
            how = chain_text(ways[0].entries[0].ops) if fits else ""
        if fits:
            readings.append(f"{option('layout', name)} ({how})")
    return readings


def misfit_hint(have: Sequence[int], want: Sequence[int], layout: str | None) -> str:
    """A hint: what would make the shape fit."""
    have, want = tuple(have), tuple(want)
    if len(have) > 1 and have != want and have[::-1] == want:
        return "Its transpose would fit."
    if len(have) > 2 and (*have[2:], have[1], have[0]) == want:
        return "Laid out from torch's convolution (o i k.. -> k.. i o) it would fit."
    if len(have) > 2 and (have[-1], have[-2], *have[:-2]) == want:
        return "Laid out from Flax's convolution (k.. i o -> o i k..) it would fit."
    if have == want and layout not in (None, "identity"):
        return f"Unchanged ({option('layout', 'identity')}) it would fit."
    if sorted(have) == sorted(want) and have != want:
        return "It has the same axis sizes in another order: check the layout."
    return ""
