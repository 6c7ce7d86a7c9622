"""One axis of a tensor in another order: find the order, and name it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from graftax.parity.causes.numbers import Array

_LARGEST = 1 << 20  # more rows than this are not compared
_ROTARY = 8  # smallest even part of a head that is rotated in a partial rotary embedding


@dataclass(frozen=True, slots=True)
class Known:
    """Facts about the axis: the numbers of heads that occur, and (C, H, W) of maps that may have been flattened.
    `stacked`: the axis counts layers."""

    heads: frozenset[int] = frozenset()
    maps: frozenset[tuple[int, ...]] = frozenset()
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class NamedOrder:
    """A name of `CAUSES` and a description of the order."""

    name: str
    text: str


def axis_order(have: Array, want: Array, axis: int) -> Array | None:
    """`order` with have[i] == want[order[i]] along `axis`, bit for bit. None if there is none, if it is the right
    order, or if equal rows leave it open."""
    count = have.shape[axis]
    if count < 2 or count > _LARGEST:
        return None
    rows = [np.ascontiguousarray(np.moveaxis(array, axis, 0)).reshape(count, -1) for array in (want, have)]
    place: dict[bytes, int] = {}
    for index in range(count):
        place.setdefault(rows[0][index].tobytes(), index)
    if len(place) < max(2, count // 2):
        return None
    found = np.array([place.get(rows[1][index].tobytes(), -1) for index in range(count)])
    if (found < 0).any() or (found == np.arange(count)).all() or len(set(found.tolist())) != len(place):
        return None
    return found


def name_order(order: Array, known: Known, reduced: bool) -> NamedOrder | None:
    """The name of an order of one axis; None if no pattern fits. `reduced`: the axis is summed over (inputs)."""
    count = len(order)
    if known.stacked:
        moved = [f"{i} holds {int(j)}" for i, j in enumerate(order) if i != j]
        return NamedOrder("swapped layers", f"of the stacked layers, {', '.join(moved[:4])}")
    if (order == np.arange(count)[::-1]).all():
        return NamedOrder("kernel flipped", "the axis is reversed")
    for channels in sorted(known.maps):
        for text, turned in _flattened(channels, count):
            if reduced and (order == turned).all():
                return NamedOrder("flatten order", f"rows run {text}")
    for heads in sorted(known.heads):
        if heads > 1 and count % heads == 0:
            if (order == _swap(1, heads, count // heads)).all():
                return NamedOrder("head order", f"{count // heads} values for each of {heads} heads, the heads last")
            if (order == _swap(1, count // heads, heads)).all():
                return NamedOrder("head order", f"{heads} heads of {count // heads} values, the values first")
    found = _rotary(order, known)
    return found or _factors(order, reduced)


def _swap(lead: int, a: int, b: int, tail: int = 1) -> Array:
    """The order of (lead, b, a, tail) when the rows are counted as (lead, a, b, tail)."""
    return np.arange(lead * a * b * tail).reshape(lead, a, b, tail).transpose(0, 2, 1, 3).reshape(-1)


def _flattened(sizes: tuple[int, ...], count: int) -> Iterator[tuple[str, Array]]:
    """Orders of a flattened map: channels first instead of channels last, the reverse, and swapped sides."""
    spatial = int(np.prod(sizes[1:]))
    if sizes[0] * spatial != count or spatial == 1:
        return
    yield "channels first where channels last is needed (C H W)", _swap(1, spatial, sizes[0])
    yield "channels last where channels first is needed (H W C)", _swap(1, sizes[0], spatial)
    if len(sizes) == 3:
        c, h, w = sizes
        rows = np.arange(count).reshape(h, w, c)
        yield "height and width swapped (W H C)", rows.transpose(1, 0, 2).reshape(-1)


def _rotary(order: Array, known: Known) -> NamedOrder | None:
    """Interleaved pairs instead of halves, or the reverse, in every head or in the first rows of every head."""
    count = len(order)
    # (n, 2) swapped as a whole may mean two heads or the pairs of one head: without evidence it counts as head order
    guesses = known.heads | {heads for heads in range(2, count // 4 + 1) if count % heads == 0}
    for heads in sorted(guesses, key=lambda heads: (heads not in known.heads, heads)):
        head = count // heads if heads and count % heads == 0 else 0
        if head < 4 or head % 2:
            continue
        inside = order.reshape(heads, head) - head * np.arange(heads)[:, None]
        if not (inside == inside[0]).all():
            continue
        moved = np.nonzero(inside[0] != np.arange(head))[0]
        for turned in (head, *range(2 * ((int(moved[-1]) + 2) // 2), min(head, int(moved[-1]) + 4), 2)):
            rest = np.arange(turned, head)
            for text, pattern in (
                ("halves where the pairs should be interleaved", _swap(1, turned // 2, 2)),
                ("interleaved pairs where the halves should be apart", _swap(1, 2, turned // 2)),
            ):
                if (inside[0] == np.concatenate([pattern, rest])).all() and (turned == head or turned >= _ROTARY // 2):
                    return NamedOrder("rotary interleave", f"in each of {heads} heads of {head}: {text}")
    return None


def _factors(order: Array, reduced: bool) -> NamedOrder | None:
    """Rows counted as (a, b, c) with axes swapped."""
    count = len(order)
    for a, b, c in _splits(count):
        grid = np.arange(count).reshape(a, b, c)
        for axes, text in (((1, 0, 2), "a and b"), ((0, 2, 1), "b and c"), ((2, 1, 0), "a and c"), ((1, 2, 0), "all"),
                           ((2, 0, 1), "all")):  # fmt: skip
            if (order == grid.transpose(axes).reshape(-1)).all():
                axis = "inputs" if reduced else "outputs"
                text = f"the {axis} as (a={a}, b={b}, c={c}), {text} swapped"
                return NamedOrder("head order", text)
    return None


def _splits(count: int) -> Iterable[tuple[int, int, int]]:
    divisors = [d for d in range(1, min(count, 4096) + 1) if count % d == 0]
    for a in divisors:
        for b in divisors:
            if b > 1 and (count // a) % b == 0 and (a > 1 or count // a // b > 1):
                yield a, b, count // a // b


def blocks_moved(order: Array) -> int:
    """How many rows are at wrong places."""
    return int(np.count_nonzero(order != np.arange(len(order))))
