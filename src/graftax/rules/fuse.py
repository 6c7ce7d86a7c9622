"""Several tensors in one: in blocks (q, then k, then v) or interleaved by heads, on the axis of outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftax.errors import LayoutError
from graftax.ops import Concat, Op, Rearrange, Split
from graftax.rules.flatten import Shape
from graftax.rules.model import Rule


def fused_axis(rule: Rule, rank: int) -> int:
    """The axis of the torch tensor along which the parts lie: the outputs. The first, unless the rule says that the
    weight is stored (in, out), or its `ops` names the outputs (o, or h d) elsewhere."""
    if rule.ops is not None and rule.ops.left is not None:
        for axis, group in enumerate(rule.ops.left):
            if {"o", "h", "d"} & set(group):
                return axis
    if rank == 2 and rule.layout == "identity":
        return 1
    return 0


def part_sizes(
    rule: Rule, rows: int, axis: int, rest: Shape, rights: Sequence[Shape] | None, count: int = 0
) -> tuple[int, ...]:
    """How many of `rows` each part has: as the other side's shapes say, else by heads, else equal parts.

    rest: the extents of the fused tensor's other axes. LayoutError where the rows do not come out.
    """
    count = count or len(rights or rule.right)
    if rights is not None:
        sizes = tuple(_rows_of(right, rest) for right in rights)
        if sum(sizes) != rows:
            raise LayoutError(f"axis {axis} has {rows} rows; {_needs(sizes, rights, rest)}")
        _check_heads(rule, sizes, rights)
        return sizes
    heads = head_counts(rule, count)
    if heads is None:
        heads = (1,) * count
    if rows % sum(heads):
        what = f"heads={' + '.join(map(str, heads))}" if rule.heads else f"{count} equal parts"
        raise LayoutError(f"axis {axis} has {rows} rows; {what} need a multiple of {sum(heads)}")
    return tuple(n * rows // sum(heads) for n in heads)


def head_counts(rule: Rule, count: int) -> tuple[int, ...] | None:
    """The heads of each part: `heads` of the first, `kv_heads` (or as many) of the others."""
    if rule.heads is None:
        return None
    return (rule.heads, *((rule.kv_heads or rule.heads),) * (count - 1))


def _rows_of(right: Shape, rest: Shape) -> int:
    rows, left_over = divmod(math.prod(right), math.prod(rest)) if math.prod(rest) else (0, 0)
    if left_over:
        raise LayoutError(f"{right} has {math.prod(right)} values: no whole number of rows of {math.prod(rest)}")
    return rows


def _needs(sizes: Sequence[int], rights: Sequence[Shape], rest: Shape) -> str:
    if all(len(right) == len(rest) + 2 for right in rights) and len({right[-1] for right in rights}) == 1:
        heads, dim = [right[-2] for right in rights], rights[0][-1]
        if len(set(heads)) == 1:
            return f"{len(heads)} x heads={heads[0]} x head_dim={dim} needs {sum(sizes)}"
        return f"heads=({' + '.join(map(str, heads))}) x head_dim={dim} needs {sum(sizes)}"
    return f"the targets need {' + '.join(map(str, sizes))} = {sum(sizes)}"


def _check_heads(rule: Rule, sizes: Sequence[int], rights: Sequence[Shape]) -> None:
    """`heads` and `kv_heads` must agree with the shapes, where the shapes show heads."""
    if rule.heads is None:
        return
    largest = max(range(len(sizes)), key=lambda k: sizes[k])
    shown = {right[-2] for right in rights if len(right) > 2}
    if shown and max(shown) != rule.heads:
        raise LayoutError(f"the targets have {max(shown)} heads, the rule says heads={rule.heads}")
    if shown and rule.kv_heads is not None and min(shown) != rule.kv_heads:
        raise LayoutError(f"the targets have {min(shown)} heads at least, the rule says kv_heads={rule.kv_heads}")
    if sizes[largest] % rule.heads:
        raise LayoutError(f"{sizes[largest]} rows are no multiple of heads={rule.heads}")


# ---------------------------------------------------------------- ops


def take_apart(
    rule: Rule, axis: int, rank: int, sizes: tuple[int, ...], rights: Sequence[Shape] | None
) -> tuple[Op, ...]:
    """One tensor -> its parts of `sizes` rows, each with its rows in order."""
    if rule.fused != "interleaved":
        return (Split(axis, sizes),)
    return split_groups(axis, rank, *_interleaved(rule, sizes, rights))


def join(rule: Rule, axis: int, rank: int, sizes: tuple[int, ...]) -> tuple[Op, ...]:
    """Parts -> one tensor; the way back of `take_apart`."""
    if rule.fused != "interleaved":
        return (Concat(axis, sizes),)
    return join_groups(axis, rank, *_interleaved(rule, sizes, None))


def split_groups(axis: int, rank: int, groups: int, parts: tuple[int, ...], dim: int) -> tuple[Op, ...]:
    """One tensor whose axis holds `groups` of `parts` heads of `dim` rows -> its parts, each with its rows in order."""
    apart, together = _patterns(axis, rank)
    return (
        Rearrange(apart.replace("r", "s"), (("d", dim), ("g", groups))),
        Split(axis + 1, parts),
        Rearrange(together, (("d", dim), ("g", groups))),
    )


def join_groups(axis: int, rank: int, groups: int, parts: tuple[int, ...], dim: int) -> tuple[Op, ...]:
    """The way back of `split_groups`."""
    apart, together = _patterns(axis, rank)
    return (
        Rearrange(apart, (("d", dim), ("g", groups))),
        Concat(axis + 1, parts),
        Rearrange(together.replace("r", "s"), (("d", dim), ("g", groups))),
    )


def _patterns(axis: int, rank: int) -> tuple[str, str]:
    """'(g r d) i -> g r d i' and back, for the axis that holds the parts."""
    rest = [f"a{i}" for i in range(rank)]
    wide, flat = [*rest], [*rest]
    wide[axis], flat[axis] = "g r d", "(g r d)"
    return f"{' '.join(flat)} -> {' '.join(wide)}", f"{' '.join(wide)} -> {' '.join(flat)}"


def _interleaved(
    rule: Rule, sizes: tuple[int, ...], rights: Sequence[Shape] | None
) -> tuple[int, tuple[int, ...], int]:
    """Groups, heads of each part in a group, head dim: (h 3 d) has h groups of 1 + 1 + 1; with grouped heads every
    group holds heads / kv_heads heads of q, one of k and one of v."""
    dim = 0
    if rule.heads is not None:
        dim, odd = divmod(max(sizes), rule.heads)
        if odd:
            raise LayoutError(f"{max(sizes)} rows are no multiple of heads={rule.heads}")
    elif rights is not None and all(len(r) > 2 for r in rights) and len({r[-1] for r in rights}) == 1:
        dim = rights[0][-1]
    if not dim or any(size % dim for size in sizes):
        raise LayoutError("fused = 'interleaved' needs `heads`" if not dim else f"{sizes} rows are no heads of {dim}")
    heads = [size // dim for size in sizes]
    groups = min(heads)
    if not groups or any(n % groups for n in heads):
        raise LayoutError(f"heads {', '.join(map(str, heads))} do not interleave in groups of one key head")
    if rule.kv_heads is not None and groups != rule.kv_heads:
        raise LayoutError(f"the parts have {groups} heads at least, the rule says kv_heads={rule.kv_heads}")
    return groups, tuple(n // groups for n in heads), dim
