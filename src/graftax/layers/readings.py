"""Readings: every way in which Flax leaves may hold torch tensors, as ops that print as rules. Matching, rules and
surgery ask here for layouts.

`named` gives the ways that the field knows, by label. `readings` gives every order of the axes that the shapes allow,
for where running decides: the conventions come first ((out, in, ...) stored as (..., in, out)), and axes of either side
that are a product of the other's (heads, flattened maps) are taken apart.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from graftax.layers.conv import block_diagonal_ops
from graftax.layers.patterns import (
    EACH_LAST,
    FLIPPED,
    FUSED,
    FUSED_ROWS,
    LAST,
    PADDED,
    SPLIT_IN,
    SPLIT_OUT,
    Readings,
    Shape,
    as_it_is,
    fitted,
)
from graftax.ops import Crop, Flip, Op, Pad, Rearrange, Stack, groups_text

Kind = Literal["kernel", "embedding", "norm", "free", "raw"]
"""What the name of a leaf shows. kernel: a Flax Dense or Conv stores it; embedding: nn.Embed stores it; norm: a scale;
free: a weight of unknown layout; raw: a bare parameter, whose name is the module's."""

# ---------------------------------------------------------------- the ways that the field knows


@dataclass(frozen=True, slots=True)
class LeafKinds:
    """What a reading may depend on besides shapes: the role, and the kinds of both leaves. `same`: both ends are one
    side. `rows`: names say that it is a vocabulary, to which a side may have added rows of zeros."""

    role: str
    torch: Kind
    flax: Kind
    same: bool = False
    rows: bool = False


@functools.lru_cache(maxsize=65536)
def named(source: Shape, target: Shape, kinds: LeafKinds) -> Readings:
    """Every way that the field knows from a torch leaf of shape `source` to a Flax leaf of shape `target`, or between
    leaves of one side."""
    if math.prod(source) != math.prod(target):
        if kinds.rows:
            return _padded(source, target, kinds)
        return {} if kinds.same or kinds.role != "weight" or kinds.torch == "raw" else _of_groups(source, target)
    plain = as_it_is(source, target)
    if kinds.same:
        return plain
    if kinds.role in ("bias", "mean", "var", "counter"):
        return (_fused(source, target) if len(source) == 1 else {}) or {**plain, **_map_last(source, target)}
    if kinds.role in ("g", "v"):
        linear = ("linear",) if kinds.role == "v" and kinds.flax == "kernel" else ()
        return {**plain, **fitted(source, target, "conv", FLIPPED, *linear)}
    if "norm" in (kinds.torch, kinds.flax):
        return {**plain, **_map_last(source, target)}
    if kinds.flax == "embedding":
        return plain
    wide = [sum(extent != 1 for extent in shape) for shape in (source, target)]
    if wide[0] != wide[1] and min(wide) < 2:
        return {}  # a vector is no table
    return _of_weight(source, target, kinds, plain)


def _padded(source: Shape, target: Shape, kinds: LeafKinds) -> Readings:
    """A vocabulary (rows, ...) that one side rounds up with rows of zeros."""
    out: Readings = {}
    step = 8 if kinds.flax == "embedding" else 64  # a head may also have other classes
    for rows in {target[0], target[-1]} if source and len(source) == len(target) else ():
        more, full = rows - source[0], (rows, *source[1:])
        if max(rows, source[0]) < 2 * min(rows, source[0]) and max(rows, source[0]) % step == 0:
            ops = Pad(0, 0, more) if more > 0 else Crop(0, 0, -more)
            out |= {f"{label}{PADDED}": (ops, *way) for label, way in named(full, target, kinds).items()}
    return out


def _of_groups(source: Shape, target: Shape) -> Readings:
    """A transposed convolution in groups, (I, O / groups, *k), whose kernel has all outputs: zeros outside a group."""
    groups, odd = divmod(math.prod(target), math.prod(source) or 1)
    if odd or groups < 2 or not 3 <= len(source) <= 5 or source[0] % groups:
        return {}
    ways = fitted((source[0], source[1] * groups, *source[2:]), target, "conv_transpose", FLIPPED)
    return {label: (*block_diagonal_ops(source, groups), *ops) for label, ops in ways.items()}


def _map_last(source: Shape, target: Shape) -> Readings:
    """A map (C, *spatial) that the other side stores channels last."""
    moves = source[:1] > (1,) and math.prod(source[1:]) > 1
    return fitted(source, target, LAST) if moves else {}


def _of_weight(source: Shape, target: Shape, kinds: LeafKinds, plain: Readings) -> Readings:
    """The readings of a matrix, of a kernel with more axes, or of a bare parameter."""
    ranks = len(source), len(target)
    equal: Readings = {"identity": ()} if source == target else {}
    free = plain if kinds.flax != "kernel" or ranks[0] == 1 else {}
    if ranks == (2, 2):
        bare = kinds.torch == "raw" and kinds.flax in ("raw", "free")
        return {**equal, **fitted(source, target, "linear")} or (plain if bare else {})
    if ranks[0] == ranks[1] > 2 and kinds.torch == "raw":
        if ranks[0] == 3:
            return {**({**equal, **fitted(source, target, "swap")} or plain), **_map_last(source, target)}
        maps = ranks[0] == 4 and _map_last(source[1:], target[1:])
        return {**(equal or plain), **(fitted(source, target, EACH_LAST) if maps else {})}
    if ranks[0] == ranks[1] > 2:
        return {**fitted(source, target, "conv", FLIPPED), **(equal if kinds.flax != "kernel" else {})}
    if ranks[0] > ranks[1] == 2 and kinds.torch != "raw":
        orders = ("window last", "window first")[: 1 if source[1] == 1 else 2]  # one channel has one order
        return fitted(source, target, "conv 1x1") or fitted(source, target, *orders)
    if ranks[1] > ranks[0] == 2 and target[:-2] == (1,) * (ranks[1] - 2):
        return {**fitted(source, target, "conv 1x1"), **(free if target[-2:] == source else {})}
    if ranks == (2, 3):
        return _heads(source, target, kinds.flax == "kernel", free)
    if ranks == (2, 4):
        return _fused(source, target) or free
    return free


def _heads(source: Shape, target: Shape, kernel: bool, free: Readings) -> Readings:
    """A Linear (o, i) whose outputs or inputs the other side stores as (heads, head_dim), in any order of its axes; or
    whose rows lie part by part and are stored head by head, (heads, parts x head_dim)."""
    if 1 in target:
        return {**free, **fitted(source, target, SPLIT_OUT[0])}
    out = fitted(source, target, *SPLIT_OUT, *SPLIT_IN)
    for pattern, ops in tuple(out.items()) if not kernel else ():
        into, order = pattern.split(" -> ")
        turned = fitted(source, target, f"{into} -> {order.translate(_TURNED)}")
        out |= {p: way for p, way in turned.items() if _sizes(way) == _sizes(ops)}  # as many heads as features
    for label, parts in ((FUSED_ROWS["qkv"], 3), (FUSED_ROWS["kv"], 2)):
        out |= fitted(source, target, label, t=parts)
    return out or free


def _fused(source: Shape, target: Shape) -> Readings:
    """Rows that the other side stores as (parts, heads, head_dim), behind the inputs or before them."""
    if 1 in target:
        return {}
    if len(source) == 1:
        return fitted(source, target, *(f"{rows} -> t h d" for rows in FUSED))
    orders = ["i t h d", *(order for axis, order in enumerate(("t h d i", "h t d i")) if 2 <= target[axis] <= 3)]
    ways = [fitted(source, target, *(f"{rows} i -> {order}" for rows in FUSED)) for order in orders]
    return next((found for found in ways if found), ways[0])


_TURNED = str.maketrans("hd", "dh")


def _sizes(ops: tuple[Op, ...]) -> list[object]:
    return [op.sizes for op in ops if isinstance(op, Rearrange)]


def stacked(source: Shape, target: Shape, counts: tuple[int, ...], axes: tuple[int, ...], kinds: LeafKinds) -> Readings:
    """Readings of leaves shaped `source`, stacked `counts` times (outermost first) on `axes` of the target (negative
    ones count from its end)."""
    rank = len(target)
    places = [axis if axis >= 0 else rank + axis for axis in axes]
    if any(not 0 <= p < rank for p in places) or len(set(places)) != len(places):
        return {}
    if any(target[p] != n for p, n in zip(places, counts, strict=True)):
        return {}
    inner = tuple(n for axis, n in enumerate(target) if axis not in places)
    ops: list[Op] = []
    for n, place in enumerate(places):
        later = sum(other < place for other in places[n + 1 :])
        ops.append(Stack(place - later, counts[n]))
    return {label: (*chain, *ops) for label, chain in named(source, inner, kinds).items()}


def axis_choices(depth: int, rank: int) -> list[tuple[int, ...]]:
    """Axes on which `depth` stacked numbers can lie in a leaf of `rank` axes: from the front, or from the end."""
    front = itertools.permutations(range(min(rank, 4)), depth)
    back = itertools.permutations(range(-min(rank, 4), 0), depth)
    return [*front, *back]


# ---------------------------------------------------------------- every order of the axes

MOST = 64
"""Most readings of one pair of shapes."""
_LETTERS = "abcdefghijklmnop"


def readings(source: Shape, target: Shape, maps: Collection[Shape] = ()) -> tuple[tuple[Op, ...], ...]:
    """Every reading of a tensor of shape `source` as a leaf of shape `target`, the usual ones first.

    maps: shapes, such as (C, H, W), whose product may be one axis of the source: a map that was flattened.
    """
    fit = tuple(shape for shape in maps if math.prod(shape) in source)
    return _readings(tuple(source), tuple(target), fit)


@functools.lru_cache(4096)
def _readings(source: Shape, target: Shape, maps: tuple[Shape, ...]) -> tuple[tuple[Op, ...], ...]:
    return tuple(_found(source, target, maps))


def _found(source: Shape, target: Shape, maps: Collection[Shape]) -> Iterator[tuple[Op, ...]]:
    if math.prod(source) != math.prod(target):
        return
    flattened = any(math.prod(shape) in source for shape in maps)
    if source == target and len([size for size in source if size > 1]) < 2 and not flattened:
        yield ()
        return
    found: dict[str, tuple[tuple[int, ...], Rearrange | None]] = {}
    for atoms in _cuttings(source, target, maps):
        for rank, op in _orders(atoms, target):
            text = "" if op is None else op.text
            if text not in found or rank < found[text][0]:
                found[text] = rank, op
    ranked = [op for _, op in sorted(found.values(), key=lambda pair: pair[0])][:MOST]
    for op in ranked:
        yield () if op is None else (op,)
    if len(target) >= 3 and len(source) == len(target):  # a transposed convolution without transpose_kernel
        spatial = tuple(range(len(target) - 2))
        for _, op in sorted(_orders([[size] for size in source], target), key=lambda pair: pair[0])[:4]:
            if op is not None:
                yield (op, Flip(spatial))


def _cuttings(source: Shape, target: Shape, maps: Collection[Shape]) -> Iterator[list[list[int]]]:
    """The source's axes, each as the sizes it is taken apart into: as few cuts as possible first."""
    known = {size for size in (*source, *target) if size > 1}
    ways: list[list[list[int]]] = []
    for size in source:
        mine: list[list[int]] = [[size]]
        if size not in target or sorted(source) != sorted(target):
            mine += [[a, size // a] for a in sorted(known) if size % a == 0 and 1 < a < size]
            mine += [[size // a, a] for a in sorted(known) if size % a == 0 and 1 < a < size]
            mine += [
                [a, b, size // a // b]
                for a in sorted(known)
                for b in sorted(known)
                if a > 1 and b > 1 and size % (a * b) == 0 and size // (a * b) > 1
            ]
        mine += [list(shape) for shape in maps if math.prod(shape) == size and len(shape) > 1]
        ways.append([list(way) for way in dict.fromkeys(map(tuple, mine))])
    whole = [[size] for size in source]
    single = [[*whole[:axis], way, *whole[axis + 1 :]] for axis, mine in enumerate(ways) for way in mine]
    several = (list(cut) for cut in itertools.islice(itertools.product(*ways), 512))
    yield from sorted((*single, *several), key=lambda cut: sum(map(len, cut)))


def _orders(atoms: Sequence[Sequence[int]], target: Shape) -> Iterator[tuple[tuple[int, ...], Rearrange | None]]:
    """Every order of the atoms whose boundaries contain the target's, with its rank; None for the tensor as it is."""
    flat = [(axis, size) for axis, sizes in enumerate(atoms) for size in sizes if size > 1]
    found: list[tuple[int, ...]] = []
    _grouped([size for _, size in flat], target, 0, 1, (), found)
    for order in found:
        yield _unusual(order, [axis for axis, _ in flat]), _rearranged(order, flat, len(atoms), target)


def _rearranged(order: Sequence[int], flat: Sequence[tuple[int, int]], rank: int, target: Shape) -> Rearrange | None:
    """The op of an order. Atoms that stay neighbours within one axis on both sides are written as one."""
    groups = _groups(order, [size for _, size in flat], target)
    of = {i: n for n, group in enumerate(groups) for i in group}
    after = dict(itertools.pairwise(order))
    head = list(range(len(flat)))
    for i in range(len(flat) - 1):
        if flat[i][0] == flat[i + 1][0] and after.get(i) == i + 1 and of[i] == of[i + 1]:
            head[i + 1] = head[i]
    names = {i: _LETTERS[n] for n, i in enumerate(dict.fromkeys(head))}
    left = [[names[i] for i in dict.fromkeys(head) if flat[i][0] == axis] for axis in range(rank)]
    right = [[names[i] for i in group if i in names] for group in groups]
    if left == right:
        return None
    sizes = {names[i]: math.prod(flat[j][1] for j in range(len(flat)) if head[j] == i) for i in names}
    return Rearrange(f"{groups_text(left)} -> {groups_text(right)}", tuple(sizes.items()))


def _grouped(
    sizes: Sequence[int], target: Shape, axis: int, filled: int, taken: tuple[int, ...], out: list[tuple[int, ...]]
) -> None:
    """Every order of `sizes` whose running products reach each boundary of the target."""
    while axis < len(target) and filled == target[axis]:
        axis, filled = axis + 1, 1
    if len(taken) == len(sizes):
        if axis == len(target):
            out.append(taken)
        return
    if axis == len(target) or len(out) >= 720:
        return
    for i, size in enumerate(sizes):
        if i not in taken and target[axis] % (filled * size) == 0:
            _grouped(sizes, target, axis, filled * size, (*taken, i), out)


def _unusual(order: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """How unusual an order is: first torch's (out, in, ...) as (..., in, out), then no change, then (in, out, ...) as
    (..., in, out), then by the number of places where neighbours part."""
    first, second = ([i for i, axis in enumerate(axes) if axis == n] for n in (0, 1))
    rest = [i for i, axis in enumerate(axes) if axis > 1]
    same = list(range(len(order)))
    usual = [[*rest, *second, *first], same, [*rest, *first, *second]] if first else [same]
    if len(first) == 3:  # heads whose halves are rotated, as heads whose pairs are
        a, b, c = first
        usual += [[*rest, *second, a, c, b], [a, c, b, *second, *rest]]
    kind = next((n for n, known in enumerate(usual) if list(order) == known), len(usual))
    return kind, len(order), sum(1 for a, b in itertools.pairwise(order) if b != a + 1)


def _groups(order: Sequence[int], sizes: Sequence[int], target: Shape) -> list[list[int]]:
    """The atoms of each axis of the target."""
    out: list[list[int]] = []
    rest = list(order)
    for size in target:
        group: list[int] = []
        filled = 1
        while filled < size:
            i = rest.pop(0)
            filled *= sizes[i]
            group.append(i)
        out.append(group)
    return out
