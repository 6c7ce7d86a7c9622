"""Audit the weights: compare Flax's leaves bit for bit with those that the plan makes from torch's. It finds a change
of one ulp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from graftax.errors import GraftaxError, escape
from graftax.ops import Cast
from graftax.ops.base import count_same_bits
from graftax.ops.casting import cast_array
from graftax.parity.report.model import WeightRow
from graftax.plans import Entry, Plan
from graftax.tree import Checkpoint
from graftax.tree.dtypes import same_bits

UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class Expected(Mapping[str, Any]):
    """Flax path -> the leaf that the plan makes from torch's weights, one entry at a time, made when it is
    requested."""

    def __init__(self, plan: Plan, source: Checkpoint) -> None:
        self.source = source
        filled = [entry for entry in plan.entries if entry.dropped is None and not entry.unfilled]
        self.entries = {name: entry for entry in filled for name in entry.targets}
        self._last: tuple[Entry, tuple[Any, ...]] | None = None

    def __getitem__(self, path: str) -> Any:
        entry = self.entries[path]
        if self._last is None or self._last[0] is not entry:
            self._last = entry, entry_arrays(entry, self.source)
        return self._last[1][entry.targets.index(path)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def entry_arrays(entry: Entry, source: Checkpoint) -> tuple[Any, ...]:
    """The targets of one entry. PlanError if an op's condition does not hold."""
    return made_of(entry, tuple(source.read(name) for name in entry.sources))


def made_of(entry: Entry, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The targets of one entry, made from these sources. PlanError if an op's condition does not hold."""
    for op in entry.ops:
        if isinstance(op, Cast):
            arrays = tuple(cast_array(array, op.target, op.overflow)[0] for array in arrays)
        else:
            arrays = op.apply(arrays)
    return arrays


def audit(expected: Expected, weights: Mapping[str, Any]) -> tuple[WeightRow, ...]:
    """A row for every Flax leaf whose bits differ from those that the plan makes from torch's, in the plan's order. One
    leaf is in memory at a time."""
    rows: list[WeightRow] = []
    for path, entry in expected.entries.items():
        if path not in weights:
            continue
        origin = f"from {', '.join(escape(name) for name in entry.sources[:3])}{' ...' * (len(entry.sources) > 3)}"
        try:
            want = np.asarray(expected[path])
        except GraftaxError as error:
            rows.append(WeightRow(path, 0, 0, None, f"could not be made {origin}: {escape(error, 300)}"))
            continue
        row = compared(path, np.asarray(weights[path]), want, origin)
        if row is not None:
            rows.append(row)
    return tuple(rows)


def compared(path: str, have: Any, want: Any, origin: str = "") -> WeightRow | None:
    """The row of a leaf that differs from `want`; None if every bit is the same."""
    if same_bits(have, want):
        return None
    if have.shape != want.shape:
        text = f"shape mismatch: {tuple(have.shape)}, the plan makes {tuple(want.shape)} {origin}"
        return WeightRow(path, want.size, want.size, None, text)
    if have.dtype != want.dtype:
        text = f"is held in {have.dtype}, the plan makes {want.dtype} {origin}"
        with np.errstate(all="ignore"):
            differing = int(np.count_nonzero(have.astype(np.float64) != want.astype(np.float64)))
        return WeightRow(path, differing, want.size, None, text)
    return WeightRow(path, want.size - count_same_bits(have, want), want.size, largest_ulp(have, want), origin)


def largest_ulp(a: Any, b: Any) -> float | None:
    """The largest distance of two floating arrays of one dtype in units of the last place: the number of representable
    steps between them. None for other dtypes, and if there is a NaN."""
    kind = np.uint16 if a.dtype.name == "bfloat16" else UNSIGNED.get(a.dtype.itemsize)
    if kind is None or (a.dtype.kind != "f" and a.dtype.name != "bfloat16"):
        return None
    if np.isnan(a.astype(np.float64)).any() or np.isnan(b.astype(np.float64)).any():
        return None
    places = [_place(np.ascontiguousarray(array).view(kind).reshape(-1), kind) for array in (a, b)]
    return float(np.max(np.where(places[0] > places[1], places[0] - places[1], places[1] - places[0])))


def _place(bits: Any, kind: Any) -> Any:
    """The rank of a number among all numbers of its dtype; the bits of negative numbers count backwards."""
    sign = kind(1 << (8 * np.dtype(kind).itemsize - 1))
    return np.where(bits & sign, sign - (bits & ~sign), sign + bits)
