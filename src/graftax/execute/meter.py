"""Measure, tile by tile, what value ops lose: invert each tile and count the source values that a round trip
restores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from graftax.execute.pushdown import Apply, Const, SourceView, Value
from graftax.ops import Cast
from graftax.ops.base import count_same_bits
from graftax.ops.casting import CastCount, cast_array
from graftax.plans import Entry
from graftax.tree.dtypes import numpy_dtype

Array = np.ndarray[Any, Any]
View = Callable[[SourceView], Array]


def evaluate(value: Value, extents: tuple[int, ...], view: View) -> Array:
    """The array of a piece: `view` gives the source views, and the value ops run on top."""
    if isinstance(value, SourceView):
        return view(value)
    if isinstance(value, Const):
        return _constant(value, extents)
    return value.op.apply(tuple(evaluate(arg, extents, view) for arg in value.args))[0]


@dataclass(slots=True)
class Meter:
    """Evaluates the pieces of one entry and counts. A round trip restores `equal` of `total` source values bit for bit.
    It would restore `equal_in_float32` if the entry were held in float32 (16-bit sources only)."""

    exact: bool
    equal: int = 0
    total: int = 0
    equal_in_float32: int = 0
    narrow: bool = True
    casts: CastCount = field(default_factory=CastCount)

    def __call__(self, value: Value, extents: tuple[int, ...], view: View) -> Array:
        seen: dict[SourceView, Array] = {}

        def once(leaf: SourceView) -> Array:
            if leaf not in seen:
                seen[leaf] = view(leaf)
            return seen[leaf]

        made = self._forward(value, extents, once)
        if not self.exact:
            self._back(value, made, once)
            self.narrow = self.narrow and all(array.dtype.itemsize == 2 for array in seen.values())
            if self.narrow:
                self._back32(value, self._forward32(value, extents, once), once)
        return made

    def add(self, other: Meter) -> None:
        """Add the counts of another meter of the same entry."""
        self.equal += other.equal
        self.total += other.total
        self.equal_in_float32 += other.equal_in_float32
        self.narrow = self.narrow and other.narrow
        self.casts += other.casts

    def as_json(self) -> list[Any]:
        """The counts, for `from_json`."""
        casts = [getattr(self.casts, field.name) for field in fields(self.casts)]
        return [self.equal, self.total, self.equal_in_float32, self.narrow, casts]

    @staticmethod
    def from_json(exact: bool, counts: list[Any]) -> Meter:
        equal, total, wide, narrow, casts = counts
        return Meter(exact, equal, total, wide, narrow, CastCount(*casts))

    def _forward(self, value: Value, extents: tuple[int, ...], view: View) -> Array:
        if not isinstance(value, Apply):
            return evaluate(value, extents, view)
        given = tuple(self._forward(arg, extents, view) for arg in value.args)
        if isinstance(value.op, Cast):
            made, count = cast_array(given[0], value.op.target, value.op.overflow)
            self.casts += count
            return made
        return value.op.apply(given)[0]

    def _back(self, value: Value, made: Array, view: View) -> None:
        if isinstance(value, SourceView):
            given = view(value)
            self.total += given.size
            self.equal += count_same_bits(given, made)
        elif isinstance(value, Apply):
            for arg, array in zip(value.args, value.op.inverse.apply((made,)), strict=True):
                self._back(arg, array, view)

    def _forward32(self, value: Value, extents: tuple[int, ...], view: View) -> Array:
        if not isinstance(value, Apply):
            return evaluate(value, extents, view).astype(np.float32)
        given = tuple(self._forward32(arg, extents, view) for arg in value.args)
        return given[0] if isinstance(value.op, Cast) else value.op.apply(given)[0]

    def _back32(self, value: Value, made: Array, view: View) -> None:
        if isinstance(value, SourceView):
            given = view(value)
            self.equal_in_float32 += count_same_bits(given, made.astype(given.dtype))
        elif isinstance(value, Apply):
            ahead = (made,) if isinstance(value.op, Cast) else value.op.inverse.apply((made,))
            for arg, array in zip(value.args, ahead, strict=True):
                self._back32(arg, array, view)


def meter_for(entry: Entry) -> Meter | None:
    """A meter for the pieces of an entry, or for all of it; None if there is nothing to measure (surgery has no way
    back) and no cast to count."""
    if entry.replaced:
        return None
    casts = any(isinstance(op, Cast) for op in entry.ops)
    return None if entry.exact and not casts else Meter(entry.exact)


def _constant(value: Const, extents: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.full((), value.value, numpy_dtype(value.dtype)), extents)
