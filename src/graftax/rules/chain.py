"""The ops of one group of keys, left (torch) to right (Flax): unstack, value ops, fuse, lay out, stack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graftax.errors import LayoutError
from graftax.layers.patterns import shape_after
from graftax.ops import Copy, Flip, Op, Rearrange, RearrangeEach, Same, Stack, Sum, Unstack, invert_chain
from graftax.rules.flatten import NO_TAIL, Shape, Tail
from graftax.rules.fuse import (
    check_heads,
    fused_axis,
    head_counts,
    part_sizes,
    reordered,
    shown_heads,
    take_apart,
)
from graftax.rules.layout import Laid, TensorPair, layout_of
from graftax.rules.model import LIST, Rule
from graftax.rules.rows import row_ops
from graftax.tree import Module, Side


@dataclass(frozen=True, slots=True)
class Case:
    """The case that ops are built for: one shape per template (None: not known yet), how many values each stacked index
    has and, for messages, which, and what else `TensorPair` needs."""

    left: tuple[Shape, ...] | None
    right: tuple[Shape, ...] | None
    counts: Mapping[str, int]
    left_roles: tuple[str, ...]
    right_roles: tuple[str, ...]
    sides: tuple[Side, Side] = ("torch", "flax")
    modules: tuple[Module | None, Module | None] = (None, None)
    tail: Tail = NO_TAIL
    spans: Mapping[str, str] = field(default_factory=dict[str, str])


def build_chain(rule: Rule, case: Case) -> Laid:
    """The chain for a case. LayoutError if the rule does not fit the shapes, or states too little."""
    names = tuple(case.counts)
    on_left = stacked_left(rule, names)
    stacked = case.left if on_left else case.right
    if stacked is not None:
        stacked = _without(rule, case, stacked)
        case = replace(case, left=stacked) if on_left else replace(case, right=stacked)
    laid = _core(rule, case)
    core = laid.ops
    if not names:
        return laid
    plain = case.right if on_left else case.left
    inner = stacked[0] if stacked else shape_after(invert_chain(core) if on_left else core, *plain or ())
    axes = positions(rule, names, len(inner) + len(names))
    order = tuple(sorted(names, key=lambda name: axes[name]))
    if on_left:
        ops: tuple[Op, ...] = tuple(Unstack(axes[name], case.counts[name]) for name in reversed(order)) + core
    else:
        ops = core + tuple(Stack(axes[name], case.counts[name]) for name in order)
    return replace(laid, ops=ops, order=order)


def stacked_left(rule: Rule, names: Sequence[str]) -> bool:
    """True if the stacked axes are axes of the left tensor: their names are in the right templates, or the list is."""
    if not names:
        return False
    if LIST in names:
        return len(rule.right) > 1
    return any(name in rule.right_indices for name in names)


def positions(rule: Rule, names: Sequence[str], rank: int) -> dict[str, int]:
    """The axis of every stacked name in a tensor of `rank` axes, counted from the front."""
    out: dict[str, int] = {}
    for name in names:
        axis = rule.ops.positions[name] if rule.ops is not None and name in rule.ops.positions else rule.stack[name]
        if not -rank <= axis < rank:
            raise LayoutError(f"stack: a tensor of {rank} axes has no axis {axis} for {name}")
        out[name] = axis % rank
    if len(set(out.values())) < len(out):
        raise LayoutError(f"stack puts {' and '.join(names)} on one axis")
    return out


def _without(rule: Rule, case: Case, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes without their stacked axes. The lengths of those axes are checked."""
    out: list[Shape] = []
    seen: list[dict[str, int]] = []
    for shape in shapes:
        axes = positions(rule, tuple(case.counts), len(shape))
        seen.append(axes)
        for name, axis in axes.items():
            if shape[axis] != case.counts[name]:
                what = "tensors in the list" if name == LIST else f"values of {name}"
                span = f", {case.spans[name]}" if name in case.spans else ""
                text = f"axis {axis} of {shape} has {shape[axis]} entries; there are {case.counts[name]} {what}{span}"
                raise LayoutError(text)
        out.append(tuple(n for i, n in enumerate(shape) if i not in axes.values()))
    if any(axes != seen[0] for axes in seen):
        raise LayoutError("stack names different axes of the list's tensors; write a rule for each")
    return tuple(out)


def _first(shapes: Sequence[Shape] | None) -> Shape | None:
    return None if shapes is None else shapes[0]


# ---------------------------------------------------------------- one instance


def _core(rule: Rule, case: Case) -> Laid:
    """The ops of one instance. If a list is stacked, its tensors are the instances."""
    if rule.heads is not None and rule.ops is None and case.right is None:
        raise LayoutError("`heads` without a `like` leaves open whether a kernel is (i, o) or (i, h, d); write ops")
    if LIST in case.counts:
        case = replace(case, left=case.left and case.left[:1], right=case.right and case.right[:1])
    rows = row_ops(rule, case.sides[0], case.left, case.right)
    if rows and case.left is not None:
        case = replace(case, left=tuple(shape_after(rows, shape) for shape in case.left))
    if rule.fused in ("tied", "sum") and case.left is not None and len(set(case.left)) > 1:
        shapes = " and ".join(map(str, case.left))
        raise LayoutError(f"fused = {rule.fused!r} is for tensors of one shape, not {shapes}")
    if LIST in case.counts or len(rule.left) == len(rule.right) == 1:
        laid = _alone(rule, case)
    elif rule.fused == "tied":
        laid = _tied(rule, case)
    elif rule.fused == "sum":
        laid = _summed(rule, case)
    else:
        laid = _split(rule, case) if len(rule.left) == 1 else _joined(rule, case)
    return replace(laid, ops=(*rows, *laid.ops))


def _axis(rule: Rule, case: Case, rank: int) -> int:
    return fused_axis(rule, rank, case.sides[0], case.left_roles[0])


def _alone(rule: Rule, case: Case) -> Laid:
    laid = _piece(rule, case, _first(case.left), _first(case.right))
    fault = heads_fault(rule, case.right[0], laid.ops) if case.right is not None and rule.ops is None else ""
    if fault:
        raise LayoutError(fault)
    if not rule.parts[0]:
        return laid
    shape = case.left[0] if case.left is not None else shape_after(invert_chain(laid.ops), *case.right or ())
    return replace(laid, ops=(*reordered(rule, _axis(rule, case, len(shape)), shape), *laid.ops))


def _summed(rule: Rule, case: Case) -> Laid:
    """Tensors added into one, or into several: an LSTM's two biases, whose sum Linen stores gate by gate."""
    many = len(rule.right) > 1
    laid = _split(rule, case) if many else _piece(rule, case, _first(case.left), _first(case.right))
    n = len(rule.left)
    groups = tuple(tuple(range(k * n, (k + 1) * n)) for k in range(math.prod(case.counts.values())))
    return replace(laid, ops=(Sum(groups), *laid.ops))


def _piece(rule: Rule, case: Case, left: Shape | None, right: Shape | None, part: int | None = None) -> Laid:
    """The layout of one tensor; `part`: its place in a list on the right."""
    roles = (case.left_roles[0], case.right_roles[part or 0])
    alone = len(rule.left) == len(rule.right) == 1
    heads = rule.heads if alone else None
    if part is not None and right is None:
        heads = (head_counts(rule, len(rule.right)) or (None,) * len(rule.right))[part]
    modules = case.modules if alone else (None, None)
    return layout_of(rule, TensorPair(left, right, roles, case.sides, modules, case.tail, heads))


def _tied(rule: Rule, case: Case) -> Laid:
    if case.counts:
        raise LayoutError("fused = 'tied' excludes a stacked index; write a rule for each")
    left, rights, count = _first(case.left), case.right, len(rule.right)
    if len(rule.left) > 1:
        laid = _piece(rule, case, left, _first(rights))
        return replace(laid, ops=(Same(len(rule.left)), *laid.ops))
    each = [_piece(rule, case, left, None if rights is None else rights[k], k) for k in range(count)]
    if all(laid.ops == each[0].ops for laid in each):
        return replace(each[0], ops=(*each[0].ops, Copy(count)))
    steps = [laid.ops[0] if laid.ops else None for laid in each]  # a table and a head: each has its own layout
    moves = [step for step in steps if isinstance(step, Rearrange)]
    if any(len(laid.ops) > 1 for laid in each) or len(moves) < sum(step is not None for step in steps):
        raise LayoutError("fused = 'tied' cannot flip one tensor and not another; write a rule for each")
    patterns = tuple(step.pattern if isinstance(step, Rearrange) else "" for step in steps)
    sizes = tuple(step.sizes if isinstance(step, Rearrange) else () for step in steps)
    evidence = tuple(dict.fromkeys(text for laid in each for text in laid.evidence))
    return replace(each[0], ops=(Copy(count), RearrangeEach(patterns, sizes)), evidence=evidence)


def _split(rule: Rule, case: Case) -> Laid:
    """One tensor on the left, several on the right."""
    left, rights = _first(case.left), case.right
    if left is not None:
        axis = _axis(rule, case, len(left))
        rest = left[:axis] + left[axis + 1 :]
        sizes = part_sizes(rule, left[axis], axis, rest, rights)
        pieces = [(*left[:axis], size, *left[axis + 1 :]) for size in sizes]
    else:
        assert rights is not None
        laid = [_piece(rule, case, None, right, k) for k, right in enumerate(rights)]
        pieces = [shape_after(invert_chain(one.ops), right) for one, right in zip(laid, rights, strict=True)]
        axis = _axis(rule, case, len(pieces[0]))
        sizes = tuple(piece[axis] for piece in pieces)
    each = [_piece(rule, case, piece, None if rights is None else rights[k], k) for k, piece in enumerate(pieces)]
    shown = [shown_heads(one.ops, axis) for one in each] if rights is not None else []
    check_heads(rule, sizes, shown)
    merged = _merge(each)
    return replace(merged, ops=take_apart(rule, axis, len(pieces[0]), sizes, shown) + merged.ops)


def _joined(rule: Rule, case: Case) -> Laid:
    """Several tensors on the left, one on the right."""
    lefts, right = case.left, _first(case.right)
    if lefts is not None:
        axis = _axis(rule, case, len(lefts[0]))
        if any(len(s) != len(lefts[0]) for s in lefts):
            raise LayoutError(f"tensors of different ranks do not join: {' and '.join(map(str, lefts))}")
        sizes = tuple(shape[axis] for shape in lefts)
        check_heads(rule, sizes, ())
        whole = (*lefts[0][:axis], sum(sizes), *lefts[0][axis + 1 :])
    else:
        assert right is not None
        whole = shape_after(invert_chain(_piece(rule, case, None, right).ops), right)
        axis = _axis(rule, case, len(whole))
        sizes = part_sizes(rule, whole[axis], axis, whole[:axis] + whole[axis + 1 :], None, len(rule.left))
    laid = _piece(rule, case, whole, right)
    return replace(laid, ops=invert_chain(take_apart(rule, axis, len(whole), sizes, ())) + laid.ops)


def _merge(each: Sequence[Laid]) -> Laid:
    """The layouts of several tensors as one that is mapped over them; sizes that differ are left open."""
    first = each[0]
    kinds = [[replace(op, sizes=()) if isinstance(op, Rearrange) else op for op in laid.ops] for laid in each]
    if any(ops != kinds[0] or not all(isinstance(op, (Rearrange, Flip)) for op in ops) for ops in kinds):
        raise LayoutError("the tensors of the list are laid out differently; write ops, or a rule for each")
    ops: list[Op] = []
    for alike in zip(*(laid.ops for laid in each), strict=True):
        sizes = [set(op.sizes) for op in alike if isinstance(op, Rearrange)]
        fixed = tuple(sorted(set[tuple[str, int]].intersection(*sizes))) if sizes else ()
        ops.append(replace(alike[0], sizes=fixed) if isinstance(alike[0], Rearrange) else alike[0])
    assumes = tuple(dict.fromkeys(text for laid in each for text in laid.assumes))
    return Laid(tuple(ops), first.evidence, assumes)


def heads_fault(rule: Rule, right: Shape, ops: Sequence[Op]) -> str:
    """Why `heads` of a rule for one tensor is no axis of the target that `ops` make, or leave as it is; '' if it is, or
    if the rule states no heads."""
    if rule.heads is None:
        return ""
    said = {rule.heads, rule.kv_heads or rule.heads}
    made = [op for op in ops if isinstance(op, Rearrange)]
    others = {dict(op.sizes).get("h", rule.heads) for op in made} - said
    if others:
        text = f"heads={rule.heads}, but in the usual order of its axes {right} has {others.pop()}"
        return f"{text}; write ops with the right order, such as '(h d) i -> i d h'"
    if len(right) > 2 and said.isdisjoint(right):
        return f"no axis of {right} has heads={rule.heads} entries"
    if len(right) > 2 and ops and not any("(" in op.pattern for op in made):
        return f"heads={rule.heads}, but the layout splits no axis into heads"
    if len(right) <= 2 and all(extent % rule.heads for extent in right):
        return f"no axis of {right} is a multiple of heads={rule.heads}"
    return ""
