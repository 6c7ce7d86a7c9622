"""Readings: every way in which a Flax leaf may hold a torch tensor, as ops that print as rules.

The conventions of the layer table come first ((out, in, ...) stored as (..., in, out)), then every order of the axes
that the shapes allow: axes of either side that are a product of the other's (heads, flattened maps) are taken apart
first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence

from graftax.ops import Flip, Op, Rearrange

MOST = 64
"""Most readings of one pair of shapes."""
_LETTERS = "abcdefghijklmnop"

Shape = tuple[int, ...]


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
    return Rearrange(f"{' '.join(map(_group, left))} -> {' '.join(map(_group, right))}", tuple(sizes.items()))


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


def _group(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})"
