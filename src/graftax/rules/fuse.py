"""Several tensors in one: in blocks (q, then k, then v) or interleaved by heads, along the output axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftax.errors import LayoutError
from graftax.layers.fused import interleaving, split_groups
from graftax.ops import Op, Rearrange, Reorder, Split, invert_chain, parse_pattern
from graftax.rules.flatten import Shape
from graftax.rules.model import Rule
from graftax.tree import Side


def fused_axis(rule: Rule, rank: int, side: Side, role: str) -> int:
    """The axis of the left tensor along which the parts lie, which is the output axis. If `ops` names it (o, or h d),
    that axis; else it follows from the layout and the role: last in a Flax kernel and in a weight stored like one,
    second in a transposed convolution of torch, first in every other weight of torch."""
    if rule.ops is not None and rule.ops.left is not None:
        for axis, group in enumerate(rule.ops.left):
            if {"o", "h", "d"} & set(group):
                return axis
    if rule.layout == "identity" or (side == "flax" and role == "kernel"):
        return rank - 1
    return 1 if rank > 2 and (rule.layout or "").startswith("conv_transpose") else 0


Heads = tuple[int, int]
"""(how many heads, the rows of each)"""


def shown_heads(ops: Sequence[Op], axis: int) -> Heads | None:
    """The heads into which the layout of a part splits its rows on `axis`; None if it does not. The rank does not show
    heads: a convolution and the weights of experts have three axes too."""
    op = ops[0] if ops else None
    if not isinstance(op, Rearrange):
        return None
    group, sizes = parse_pattern(op.pattern)[0][axis], dict(op.sizes)
    if len(group) < 2 or any(name not in sizes for name in group):
        return None
    return math.prod(sizes[name] for name in group[:-1]), sizes[group[-1]]


def part_sizes(
    rule: Rule, rows: int, axis: int, rest: Shape, rights: Sequence[Shape] | None, count: int = 0
) -> tuple[int, ...]:
    """How many of `rows` each part has: by the shapes of the other side, else by heads, else equal parts.

    rest: the extents of the fused tensor's other axes. LayoutError if the rows do not fit.
    """
    count = count or len(rights or rule.right)
    if rights is not None:
        sizes = tuple(_rows_of(right, rest) for right in rights)
        if sum(sizes) != rows:
            raise LayoutError(f"axis {axis} has {rows} rows; {_needs(sizes, rights, rest)}")
        return sizes
    heads = head_counts(rule, count) or (1,) * count
    if rows % sum(heads):
        what = f"heads={' + '.join(map(str, heads))}" if rule.heads else f"{count} equal parts"
        raise LayoutError(f"axis {axis} has {rows} rows; {what} need a multiple of {sum(heads)}")
    return tuple(n * rows // sum(heads) for n in heads)


def head_counts(rule: Rule, count: int) -> tuple[int, ...] | None:
    """The heads of each part: `heads` for the first, `kv_heads` (or else as many) for the others."""
    if rule.heads is None:
        return None
    return (rule.heads, *((rule.kv_heads or rule.heads),) * (count - 1))


def _rows_of(right: Shape, rest: Shape) -> int:
    rows, left_over = divmod(math.prod(right), math.prod(rest)) if math.prod(rest) else (0, 0)
    if left_over:
        raise LayoutError(
            f"{right} has {math.prod(right)} values, which is no whole number of rows of {math.prod(rest)}"
        )
    return rows


def _needs(sizes: Sequence[int], rights: Sequence[Shape], rest: Shape) -> str:
    if all(len(right) == len(rest) + 2 for right in rights) and len({right[-1] for right in rights}) == 1:
        heads, dim = [right[-2] for right in rights], rights[0][-1]
        if len(set(heads)) == 1:
            return f"{len(heads)} x heads={heads[0]} x head_dim={dim} needs {sum(sizes)}"
        return f"heads=({' + '.join(map(str, heads))}) x head_dim={dim} needs {sum(sizes)}"
    return f"the targets need {' + '.join(map(str, sizes))} = {sum(sizes)}"


def check_heads(rule: Rule, sizes: Sequence[int], shown: Sequence[Heads | None]) -> None:
    """LayoutError if `heads` and `kv_heads` contradict the rows, or the heads that the layouts show."""
    if rule.heads is None:
        return
    largest = max(sizes)
    counts = {heads[0] for heads in shown if heads is not None}
    if counts and max(counts) != rule.heads:
        raise LayoutError(f"the targets have {max(counts)} heads, but the rule says heads={rule.heads}")
    if counts and rule.kv_heads is not None and min(counts) != rule.kv_heads:
        raise LayoutError(f"the targets have at least {min(counts)} heads, but the rule says kv_heads={rule.kv_heads}")
    dim, odd = divmod(largest, rule.heads)
    if odd:
        raise LayoutError(f"{largest} rows are no multiple of heads={rule.heads}")
    if rule.kv_heads is not None and (min(sizes) != rule.kv_heads * dim or {*sizes} - {largest, rule.kv_heads * dim}):
        raise LayoutError(f"{sizes} rows are not those of heads={rule.heads} and kv_heads={rule.kv_heads}")


# ---------------------------------------------------------------- ops


def take_apart(
    rule: Rule, axis: int, rank: int, sizes: tuple[int, ...], shown: Sequence[Heads | None]
) -> tuple[Op, ...]:
    """One tensor -> its parts of `sizes` rows, each with its rows in order. `shown`: the heads of each part."""
    if rule.fused != "interleaved":
        return (Split(axis, sizes),)
    return split_groups(axis, rank, *_interleaved(rule, sizes, shown))


def reordered(rule: Rule, axis: int, shape: Shape) -> tuple[Op, ...]:
    """A fused tensor whose parts lie in one order -> the same in the order of the other side. The parts are equal, or
    have the shares of the rows that the rule states."""
    left, right = rule.parts
    runs = rule.heads if rule.fused == "interleaved" and rule.heads else 1
    shares = [rule.sizes.get(name, 1) for name in left]
    unit, odd = divmod(shape[axis], runs * sum(shares))
    if odd:
        text = " + ".join(f"{name}={share}" for name, share in zip(left, shares, strict=True))
        raise LayoutError(
            f"axis {axis} has {shape[axis]} rows; {runs} x ({text}) needs a multiple of {runs * sum(shares)}"
        )
    order = tuple(left.index(name) for name in right)
    turned = [shares[place] for place in order]

    def apart(shares: Sequence[int]) -> tuple[Op, ...]:
        if runs > 1:
            return split_groups(axis, len(shape), runs, tuple(shares), unit)
        return (Split(axis, tuple(unit * share for share in shares)),)

    return (*apart(shares), Reorder(order), *invert_chain(apart(turned)))


def _interleaved(rule: Rule, sizes: tuple[int, ...], shown: Sequence[Heads | None]) -> tuple[int, tuple[int, ...], int]:
    """(groups, heads of each part in a group, head dim)."""
    dim = 0
    dims = {heads[1] if heads is not None else 0 for heads in shown}
    if rule.heads is not None:
        dim = max(sizes) // rule.heads
    elif len(dims) == 1:
        (dim,) = dims
    if not dim:
        raise LayoutError(
            "fused = 'interleaved' needs `heads`, the number of runs in which the rows of a part lie, "
            f"such as heads = {max(sizes)} if the parts alternate row by row"
        )
    runs = interleaving(sizes, dim)
    if runs is None:
        raise LayoutError(f"{sizes} rows do not interleave in groups of one key head of {dim} rows")
    return runs
