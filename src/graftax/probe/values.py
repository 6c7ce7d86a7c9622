"""Values that a model makes, found again by what is in them and not by how they are laid out.

Two arrays are the same value if their sorted entries agree: NCHW and NHWC, heads apart or joined, flattened or not,
time first or batch first are then all alike. Moments find the candidates; only these are sorted and compared in full.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.errors import counted

TOLERANCE = 2e-6
"""Largest difference of two sorted arrays, as a part of the largest entry: float32 constants (an epsilon) inside a
float64 run cause about 1e-7."""
_FAR = 1e7
"""Entries beyond are masks (-inf, -1e9, the dtype's least value): they count as equal."""

Array = Any


class OutOfBudget(Exception):
    """A limit of the probe was reached: what is decided by then is kept."""


@dataclass(slots=True)
class Value:
    """One value: its entries in the layout of the first array that had it, and every shape that it was seen in."""

    array: Array
    moments: tuple[float, float, float]
    shapes: set[tuple[int, ...]]
    _sorted: Array = None

    @property
    def sorted(self) -> Array:
        if self._sorted is None:
            self._sorted = np.sort(self.array, axis=None)
        return self._sorted


@dataclass(slots=True)
class Values:
    """The values of a run. tolerance: as TOLERANCE; most: bytes that may be held (OutOfBudget beyond)."""

    tolerance: float = TOLERANCE
    most: int = 4 << 30
    items: list[Value] = field(default_factory=list[Value])
    held: int = 0
    _by_size: dict[int, list[tuple[float, int]]] = field(default_factory=dict[int, "list[tuple[float, int]]"])

    def add(self, array: Array) -> int | None:
        """The number of the value; None for a constant, which tells nothing."""
        clipped, moments = _clipped(np.asarray(array, np.float64))
        if moments is None:
            return None
        found = self._find(clipped, moments)
        if found:
            self.items[found[0]].shapes.add(clipped.shape)
            return found[0]
        number = len(self.items)
        held = np.array(clipped, order="C")
        self.items.append(Value(held, moments, {clipped.shape}))
        self.held += held.nbytes
        if self.held > self.most:
            raise OutOfBudget(
                f"the values of one run take more than {self.most >> 20} MiB ({counted(number, 'value')} so far): pass "
                "smaller inputs= (one item, fewer tokens), or prove a small configuration of the same code"
            )
        bisect.insort(self._by_size.setdefault(clipped.size, []), (moments[0], number))
        return number

    def find(self, array: Array) -> list[int]:
        """Every value that the array is, the first made first."""
        if np.size(array) not in self._by_size:
            return []
        clipped, moments = _clipped(array)
        return [] if moments is None else self._find(clipped, moments)

    def of_size(self, size: int) -> list[int]:
        """The values with so many entries."""
        return [number for _, number in self._by_size.get(size, ())]

    def factors(self, array: Array) -> list[float]:
        """Simple factors (2, 1/8, a root of a small number) by which the array would be a value of this run."""
        _, moments = _clipped(array)
        out: dict[float, None] = {}
        for number in self.of_size(array.size) if moments is not None else ():
            theirs = self.items[number].moments
            assert moments is not None
            factor = theirs[2] / moments[2]
            if abs(factor - 1) > 1e-6 and all(
                abs(a * factor - b) <= 1e-5 * theirs[2] for a, b in zip(moments, theirs, strict=True)
            ):
                simple = _simple(factor)
                if simple is not None:
                    out[simple] = None
        return list(out)

    def _find(self, clipped: Array, moments: tuple[float, float, float]) -> list[int]:
        row = self._by_size.get(clipped.size)
        if not row:
            return []
        square, mean, top = moments
        slack = 4 * self.tolerance * top
        low = bisect.bisect_left(row, (square - slack, -1))
        out: list[int] = []
        ordered: Array = None
        for other, number in row[low:]:
            if other > square + slack:
                break
            value = self.items[number]
            if abs(value.moments[1] - mean) > slack or abs(value.moments[2] - top) > slack:
                continue
            if ordered is None:
                ordered = np.sort(clipped, axis=None)
            if np.max(np.abs(value.sorted - ordered)) <= self.tolerance * top:
                out.append(number)
        return sorted(out)

    def snapped(self, array: Array, number: int) -> Array:
        """`array` with the entries of the value by rank, so that no drift adds up from layer to layer."""
        value = self.items[number]
        if array.size == value.array.size and np.max(np.abs(value.array.ravel() - array.ravel())) <= (
            self.tolerance * value.moments[2]
        ):
            return value.array.reshape(array.shape)
        out = np.empty(array.size)
        out[np.argsort(array, axis=None)] = self.items[number].sorted
        return out.reshape(array.shape)

    def same_layout(self, array: Array, number: int) -> bool:
        """True if the array is the value without a permutation, or with its axis 1 moved last (channels last)."""
        theirs = self.items[number].array
        slack = self.tolerance * max(self.items[number].moments[2], 1e-300)
        return any(np.max(np.abs(turned - array.ravel())) <= slack for turned in _turned(theirs))


def _turned(theirs: Array) -> Iterable[Array]:
    yield theirs.ravel()
    if theirs.ndim > 2:
        yield np.moveaxis(theirs, 1, -1).ravel()


def _clipped(array: Array) -> tuple[Array, tuple[float, float, float] | None]:
    """The array without the entries that are masks, and (root mean square, mean, max |x|); None for a constant."""
    if array.size < 2:
        return array, None
    low, high = float(array.min()), float(array.max())
    if not (low >= -_FAR and high <= _FAR):
        array = np.clip(array, -_FAR, _FAR)
        low, high = float(array.min()), float(array.max())
    top = max(abs(low), abs(high))
    if not np.isfinite(top) or high - low <= 1e-9 * top:
        return array, None
    flat = array.ravel()
    square = float(np.einsum("i,i", flat, flat))  # np.dot starts threads, which costs more than it saves
    return array, ((square / flat.size) ** 0.5, float(flat.mean()), top)


def _simple(factor: float) -> float | None:
    """The factor as a whole number to the power of 1, 1/2 or 1/4, or one over it; None if it is none."""
    for power in (1, 2, 4):
        for turned in (False, True):
            raised = (1 / factor if turned else factor) ** power
            whole = round(raised)
            if 1 < whole < 1 << 20 and abs(raised - whole) <= 1e-4 * whole:
                return (1 / whole if turned else whole) ** (1 / power)
    return None
