"""Value ops of a rule, applied to the left tensor before its layout: scale, offset, repeat, pad."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from graftax.errors import LayoutError, escape
from graftax.layers.patterns import opened, shape_after
from graftax.ops import Crop, Offset, Op, Pad, Rearrange, Repeat, Scale, Unrepeat, groups_text
from graftax.rules.axes import own_names
from graftax.rules.flatten import Shape
from graftax.rules.model import AxisName, Rule
from graftax.tree import Side, TensorSpec


def row_ops(rule: Rule, side: Side, lefts: Sequence[Shape] | None, rights: Sequence[Shape] | None) -> tuple[Op, ...]:
    """scale, then offset, then repeat, then pad. An amount that the rule leaves out follows from the two sizes.

    Raises LayoutError if an axis does not exist or an amount does not fit.
    """
    out: list[Op] = []
    if rule.scale is not None:
        out.append(Scale(rule.scale))
    if rule.offset is not None:
        out.append(Offset(rule.offset))
    if not rule.repeat and not rule.pad:
        return tuple(out)
    rank = _rank(rule, lefts)
    if lefts is not None and any(len(other) != rank for other in lefts):
        raise LayoutError("repeat and pad take tensors of one rank")
    open_ = [name for amounts in (rule.repeat, rule.pad) for name, amount in amounts.items() if amount is None]
    if len(open_) > 1:
        raise LayoutError(f"repeat and pad leave {len(open_)} amounts open; the sizes determine only one")
    one = lefts is not None and rights is not None and len(lefts) == len(rights) == 1
    sizes = (math.prod(lefts[0]), math.prod(rights[0])) if one and lefts and rights else (0, 0)
    shape = lefts[0] if lefts is not None else None
    steps: list[tuple[AxisName, Callable[[int, Shape | None], Op]]] = [
        *((name, partial(_repeat, sizes, count)) for name, count in rule.repeat.items()),
        *((name, partial(_pad, sizes, rows, rule.fill or 0.0)) for name, rows in rule.pad.items()),
    ]
    for name, make in steps:
        ops = _at(rule, name, rank, side, make, shape, rights)
        shape = _after(ops, shape)
        out += ops
    return tuple(out)


def _after(ops: Sequence[Op], shape: Shape | None) -> Shape | None:
    return None if shape is None else shape_after(ops, shape)


def _rank(rule: Rule, lefts: Sequence[Shape] | None) -> int:
    if lefts is not None:
        return len(lefts[0])
    if rule.ops is not None and rule.ops.left is not None:
        return len(rule.ops.left)
    raise LayoutError("repeat and pad need the torch tensor's shape: give a `like`, or write both sides of ops")


Sizes = tuple[int, int]
"""How many values the tensor has on the left and on the right; zeros if either is not known or not one tensor."""


def _known(sizes: Sizes, key: str) -> Sizes:
    if not all(sizes):
        raise LayoutError(f"{key} without an amount needs the sizes of both tensors, one each; write how many")
    return sizes


def _repeat(sizes: Sizes, count: int | None, axis: int, shape: Shape | None) -> Op:
    if count is not None:
        return Repeat(axis, count)
    left, right = _known(sizes, "repeat")
    big, small = max(left, right), min(left, right)
    if big % small:
        raise LayoutError(f"repeat: {right} values are no multiple of {left}")
    return Repeat(axis, big // small) if right >= left else Unrepeat(axis, big // small)


def _pad(sizes: Sizes, rows: tuple[int, int] | None, fill: float, axis: int, shape: Shape | None) -> Op:
    if rows is not None:
        return Pad(axis, *rows, fill)
    _, right = _known(sizes, "pad")
    assert shape is not None
    row = math.prod(shape) // max(shape[axis], 1)
    if not row or right % row:
        raise LayoutError(f"pad: {right} values do not divide into rows of {row}")
    more = right // row - shape[axis]
    return Pad(axis, 0, more, fill) if more >= 0 else Crop(axis, 0, -more, fill)


def _at(
    rule: Rule, name: AxisName, rank: int, side: Side, make: Callable[[int, Shape | None], Op],
    shape: Shape | None, rights: Sequence[Shape] | None,
) -> tuple[Op, ...]:  # fmt: skip
    """The op on the axis `name`: a number, one of the tensor's own names, or a name of `ops`. An axis inside brackets
    is split off for the op and merged back."""
    if isinstance(name, int):
        if not -rank <= name < rank:
            raise LayoutError(f"a tensor of {rank} axes has no axis {name}")
        return (make(name % rank, shape),)
    groups = rule.ops.left if rule.ops is not None else None
    if groups is None:
        own = own_names(rank, side)
        if name not in own:
            raise LayoutError(f"a tensor of {rank} axes ({' '.join(own)}) has no axis {escape(name)!r}")
        return (make(own.index(name), shape),)
    if len(groups) != rank:
        raise LayoutError(f"a tensor of {rank} axes does not fit `ops`, which has {len(groups)} on its left")
    axis = next((i for i, group in enumerate(groups) if name in group), None)
    if axis is None:
        raise LayoutError(f"`ops` has no axis {escape(name)!r} on its left side")
    group = groups[axis]
    if len(group) == 1:
        return (make(axis, shape),)
    names = [f"b{i}" for i in range(len(group))]
    apart, together = opened(axis, rank, " ".join(names))
    known = _sizes(rule, name, rights)
    sizes = {new: known[old] for new, old in zip(names, group, strict=True) if old in known}
    before = Rearrange(apart, tuple(sorted(sizes.items())))
    place = group.index(name)
    op = make(axis + place, _after((before,), shape))
    if shape is not None:  # bound, so that the inverse knows every size but the changed one
        before = before.bind((TensorSpec(shape, "float32"),))
    fixed = tuple((n, size) for n, size in before.sizes if n != names[place])
    return (before, op, Rearrange(together, fixed))


def _sizes(rule: Rule, changed: str, rights: Sequence[Shape] | None) -> dict[str, int]:
    """Axis sizes of `ops` before the op: those that the rule states, and those that the other side shows for the other
    axes."""
    assert rule.ops is not None
    out = dict(rule.sizes)
    if rule.heads is not None and "h" in rule.ops.axes:
        out.setdefault("h", rule.heads)
    if rights:
        pattern = f"{groups_text(rule.ops.right)} -> {groups_text(rule.ops.left or ())}"
        try:
            shown = Rearrange(pattern, tuple((n, s) for n, s in out.items() if n != changed)).extents(rights[0])
        except LayoutError:
            shown = {}
        out = {name: size for name, size in shown.items() if name != changed} | out
    return out
