"""Arrays with the same values in another order: a map flattened in another order, heads merged in another order, axes
swapped."""

from __future__ import annotations

from itertools import product

import numpy as np

from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.numbers import Array, Bar, relative
from graftax.parity.causes.reorder import Known, name_order

_ROWS = 64


def order_difference(want: Array, have: Array, known: Known, bar: Bar, maps_before: bool) -> Explanation | None:
    """'flatten order' or 'head order' if every row (the last axis) holds the same values in another order; None
    otherwise. `maps_before`: an earlier array is a map with as many values."""
    if want.shape != have.shape or want.ndim < 2:
        return None
    a, b = (x.astype(np.float64).reshape(-1, want.shape[-1])[:_ROWS] for x in (want, have))
    if want.shape[-1] > 1 and bar.fitted(relative(np.sort(b, axis=1), np.sort(a, axis=1))):
        order = _common_order(a, b, bar)
        if order is None or (order == np.arange(len(order))).all():
            return None
        named = name_order(order, known, reduced=True)
        name = "flatten order" if maps_before or named is None else named.name
        if name not in ("flatten order", "head order", "rotary interleave"):
            name = "flatten order" if want.ndim == 2 else "head order"
        if name == "head order" and not known.heads and want.ndim == 2:
            name = "flatten order"
        text = f"every row holds the right values in another order{f': {named.text}' if named else ''}"
        fix = "flatten in the order in which the plan reads the kernel: transpose the map before the flatten"
        if name == "head order":
            fix = "merge (heads, values) in this order before the projection"
        return Explanation(name, text, fix, relative(b, a[:, order]))
    return _whole(want, have, bar)


def _common_order(a: Array, b: Array, bar: Bar) -> Array | None:
    """`order` with b == a[:, order] for all rows at once; equal columns keep their order. None if there is none."""
    generator = np.random.Generator(np.random.Philox(11))
    weights = generator.normal(size=len(a))
    keys = [np.argsort(weights @ x, kind="stable") for x in (a, b)]
    order = np.empty(a.shape[1], dtype=np.int64)
    order[keys[1]] = keys[0]
    if not bar.fitted(relative(a[:, order], b)):
        return None
    return order


def _whole(want: Array, have: Array, bar: Bar) -> Explanation | None:
    """A map that is sampled at other places; or axes of equal size that are swapped: (T, T), (H, W) of a square map."""
    if want.ndim < 3 or want.size > 1 << 22:
        return None
    for shift in product((0, -1, 1, -2, 2), repeat=want.ndim - 2) if want.ndim > 3 else ():
        inside = tuple(slice(max(0, n), size + min(0, n)) for n, size in zip(shift, want.shape[1:-1], strict=True))
        moved = np.roll(have, shift, axis=tuple(range(1, want.ndim - 1)))
        cut = (slice(None), *inside)
        if any(shift) and all(s.stop > s.start for s in inside) and bar.fitted(relative(moved[cut], want[cut])):
            text = f"the map that arrives is shifted by {tuple(-n for n in shift)} places along its spatial axes"
            error = relative(moved[cut], want[cut])
            return Explanation("stride alignment", text, "sample the map where torch does: x[:, ::stride]", error)
    for first in range(1, want.ndim - 1):
        for second in range(first + 1, want.ndim):
            if want.shape[first] == want.shape[second]:
                error = relative(np.swapaxes(have, first, second), want)
                if bar.fitted(error):
                    text = f"axes {first} and {second} are swapped"
                    return Explanation("flatten order", text, f"swap axes {first} and {second} back", error)
    return None
