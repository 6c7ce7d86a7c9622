"""The layout of one tensor on the other side: as the rule states it, else by the layer table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graftax.errors import LayoutError, escape
from graftax.layers.patterns import layout_ops, regroup, shape_after
from graftax.ops import Op, Rearrange, Specs
from graftax.rules.flatten import NO_TAIL, Shape, Tail, flatten_ops
from graftax.rules.model import Rule
from graftax.tree import Module, Side, TensorSpec


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor of each side. A shape is None if it is not known yet (the rules alone describe that side).

    roles     the last parts of the keys
    modules   the live modules that hold the leaves
    tail      the convolutions of that checkpoint, whose map a flatten may have flattened
    heads     how many heads the tensor has, if a rule states it
    """

    left: Shape | None
    right: Shape | None
    roles: tuple[str, str] = ("", "")
    sides: tuple[Side, Side] = ("torch", "flax")
    modules: tuple[Module | None, Module | None] = (None, None)
    tail: Tail = NO_TAIL
    heads: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape that is known."""
        return self.left if self.left is not None else self.right or ()


@dataclass(frozen=True, slots=True)
class Laid:
    """The ops from left to right (of a group: from source to like), the evidence for them besides the rule, and their
    assumptions. order: the stacked names of the unstacked side's keys, outermost first; the tensors of a list are
    innermost unless they are stacked themselves. given: the specs that come out."""

    ops: tuple[Op, ...]
    evidence: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    given: Specs = ()


def layout_of(rule: Rule, piece: TensorPair) -> Laid:
    """The layout ops of one tensor. LayoutError if the rule does not fit it, or states too little."""
    if rule.flatten:
        ops, assumes = flatten_ops(rule, piece.left, piece.right, piece.tail)
        return Laid(ops, (), assumes)
    if rule.ops is not None:
        return Laid(_written(rule, piece))
    alike = piece.sides[0] == piece.sides[1]
    if alike or piece.left is None or piece.right is None:
        layout = rule.layout or ("identity" if alike else _by_role(piece))
        ops = layout_ops(layout, len(piece.shape)) if layout else None
        if ops is None:
            what = f"layout {layout!r} is not defined for" if layout else "no convention says how to lay out"
            hint = "write layout = 'linear', 'conv' or 'identity', or ops" if not layout else "write ops"
            text = f"{what} a tensor of shape {piece.shape} named {escape(' -> '.join(piece.roles))}; {hint}"
            raise LayoutError(text)
        return Laid(ops)
    return _by_table(rule, piece.left, piece.right, piece)


def _by_role(piece: TensorPair) -> str:
    """The layout that roles and rank name by convention, if the shape of one side is not known; '' for none."""
    torch, flax = piece.roles if piece.sides[0] == "torch" else piece.roles[::-1]
    rank = len(piece.shape)
    if rank < 2 or flax == "embedding":
        return "identity"
    if flax != "kernel" or torch != "weight":
        return ""
    if rank == 2:
        return "linear"
    # Three axes may also be those of a Linear split into heads.
    return "conv" if rank > 3 or piece.left is not None else ""


# ---------------------------------------------------------------- the layer table


def role_of(key: str, side: Side) -> str:
    """The role of a leaf as the layer table names it: `in_proj_weight` is a weight."""
    last = key.rpartition("." if side == "torch" else "/")[2]
    if side == "torch":
        for role in ("weight", "bias"):
            if last.endswith(f"_{role}"):
                return role
    return last


def _by_table(rule: Rule, left: Shape, right: Shape, piece: TensorPair) -> Laid:
    from graftax.layers import leaf_connections, own_layout

    specs = TensorSpec(left, "float32"), TensorSpec(right, "float32")
    roles, modules = piece.roles, piece.modules
    found = leaf_connections(roles[0], specs[0], roles[1], specs[1], modules[0], modules[1], rule.layout)
    if not found and not rule.layout and max(len(left), len(right)) > 1 and any(map(own_layout, modules, piece.sides)):
        names = " and ".join(m.kind for m, side in zip(modules, piece.sides, strict=True) if m and own_layout(m, side))
        raise LayoutError(
            f"no convention says how {names} stores {left}; write layout, or ops such as 'a b c -> b c a'"
        )
    if not found and any(modules):
        live = leaf_connections(roles[0], specs[0], roles[1], specs[1], modules[0], modules[1]) if all(modules) else []
        if live and live[0].by == "modules":  # live modules outrank rules
            raise LayoutError(f"layout {rule.layout!r} contradicts the live modules: {', '.join(live[0].evidence)}")
        found = leaf_connections(roles[0], specs[0], roles[1], specs[1], layout=rule.layout)
    if not found:
        ops = layout_ops(rule.layout, len(left)) if rule.layout else None
        if ops is not None and shape_after(ops, left) == right:
            return Laid(ops)
        regrouped = regroup(left, right) if ops == () else None
        if regrouped is not None:
            return Laid(regrouped)
        raise LayoutError(_no_layout(rule, left, right, ops))
    best = [connection for connection in found if connection.by == found[0].by]
    if len(best) > 1:
        ways = " or ".join(dict.fromkeys(connection.rule or connection.variant for connection in best))
        raise LayoutError(f"{left} becomes {right} in {len(best)} ways; say which: {ways}")
    (entry,) = best[0].entries
    evidence = () if rule.layout else best[0].evidence
    return Laid(entry.ops, evidence, best[0].assumes)


def _no_layout(rule: Rule, left: Shape, right: Shape, ops: Sequence[Op] | None) -> str:
    if ops is not None:
        return f"as {rule.layout}, {left} becomes {shape_after(ops, left)}, not {right}"
    if rule.layout:
        return f"layout {rule.layout!r} does not turn {left} into {right}"
    if math.prod(left) != math.prod(right):
        return f"{left} has {math.prod(left)} values and {right} has {math.prod(right)}"
    return f"no layout of the layer table turns {left} into {right}; write ops, such as '(h d) i -> i h d'"


# ---------------------------------------------------------------- ops


def _written(rule: Rule, piece: TensorPair) -> tuple[Op, ...]:
    """The rule's `ops` with every size that the rule or the right side gives."""
    assert rule.ops is not None
    left = piece.left
    pattern = rule.ops.pattern(len(left) if left is not None else None, piece.sides[0])
    sizes = _grown(rule, piece.heads)
    op = Rearrange(pattern, tuple(sorted(sizes.items())))
    right = piece.right
    if right is not None:
        try:
            sizes = op.inverse.extents(right)
        except LayoutError:
            if left is None:
                raise
    elif left is not None:
        sizes = op.extents(left)
    op = Rearrange(pattern, tuple(sorted(sizes.items())))
    if left is not None:
        op.extents(left)
    return (op,)


def _grown(rule: Rule, heads: int | None) -> dict[str, int]:
    """The axis sizes that the rule states, after repeat and pad."""
    out = {name: size for name, size in rule.sizes.items() if name not in rule.parts[0]}
    if heads is not None and rule.ops is not None and "h" in rule.ops.axes:
        out.setdefault("h", heads)
    for name, size in tuple(out.items()):
        count, rows = rule.repeat.get(name, 1), rule.pad.get(name, (0, 0))
        if count is None or rows is None:
            del out[name]
        else:
            out[name] = size * count + sum(rows)
    return out
