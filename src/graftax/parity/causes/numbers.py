"""Judge explanations: relative errors, the bar to reach, samples, a time budget. NumPy only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from graftax.parity.records import THRESHOLD, UNIT

Array = np.ndarray[Any, Any]

SAMPLES = 4096
"""How many values of an array an elementwise fit samples."""


def relative(have: Any, want: Any) -> float:
    """Relative L2 of `have` against `want`; infinite if the shapes differ or a value is not finite."""
    a, b = np.asarray(have, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if a.shape != b.shape:
        return float("inf")
    if not a.size:
        return 0.0
    with np.errstate(all="ignore"):
        size = float(np.sqrt(np.mean(b * b)))
        off = float(np.sqrt(np.mean((a - b) ** 2)))
    if not np.isfinite(off) or not np.isfinite(size):
        return float("inf")
    return off / size if size else (0.0 if off == 0.0 else float("inf"))


@dataclass(frozen=True, slots=True)
class Bar:
    """The error that an explanation must reach.

    before  the error without the explanation
    bar     the alarm threshold times float32's own error here
    """

    before: float
    bar: float

    @classmethod
    def of(cls, before: float | None, floor: float, threshold: float = THRESHOLD) -> Bar:
        return cls(float("inf") if before is None or before != before else before, threshold * max(floor, UNIT))

    @property
    def fit(self) -> float:
        """The bar for a formula computed in float64 from inputs rounded to float32: up to four times the alarm's bar,
        but at most a twentieth of the error to explain."""
        return max(self.bar, min(4 * self.bar, self.before / 20))

    def replayed(self, error: float) -> bool:
        """Does a replay with this error clearly remove the alarm?"""
        return error <= self.bar and error < self.before / 1.5

    def fitted(self, error: float) -> bool:
        """Does a formula with this error explain an array?"""
        return error <= self.fit and error < self.before / 3


class Budget:
    """A time limit in seconds. `left()` is False once they are spent."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> bool:
        return time.monotonic() < self._end


def arrays(values: Any, path: str = "") -> Iterator[tuple[str, Array]]:
    """(path, array) of every array in a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(values, np.ndarray):
        yield path, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from arrays(value, f"{path}/{key}" if path else str(key))
    elif isinstance(values, (tuple, list)):
        for index, value in enumerate(values):
            yield from arrays(value, f"{path}/{index}" if path else str(index))
    elif is_dataclass(values) and not isinstance(values, type):
        for item in fields(values):
            yield from arrays(getattr(values, item.name), f"{path}/{item.name}" if path else item.name)


def is_number(array: Array) -> bool:
    """Is the array floating? bfloat16 and float8 of ml_dtypes count."""
    return np.issubdtype(array.dtype, np.floating) or array.dtype.name.startswith(("bfloat", "float"))


def positions(shape: tuple[int, ...], count: int = SAMPLES) -> tuple[Array, ...]:
    """Indices of at most `count` values spread over an array, the same in every call."""
    total = int(np.prod(shape))
    if total <= count:
        flat = np.arange(total)
    else:
        flat = np.sort(np.random.Generator(np.random.Philox(7)).choice(total, count, replace=False))
    return np.unravel_index(flat, shape) if shape else ()


def in_bfloat16(array: Array) -> bool:
    """Is every value a bfloat16 value? Arrays of few different values, such as zeros and ones, do not count."""
    if array.dtype.name == "bfloat16":
        return True
    if array.dtype != np.float32 or not array.size:
        return False
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    return not (bits & 0xFFFF).any() and len(np.unique(bits[: 4 * SAMPLES])) > 8


def nice(value: float) -> str:
    """A number as a person would write it: 8, 0.125, sqrt(768)."""
    for power in (1, 2):
        whole = round(abs(value) ** power)
        if whole and abs(abs(value) ** power / whole - 1) < 2e-6:
            text = str(whole) if power == 1 else f"sqrt({whole})"
            return text if value > 0 else f"-{text}"
    for power in (1, 2):
        whole = round(1 / abs(value) ** power) if value else 0
        if whole and abs(whole * abs(value) ** power - 1) < 2e-6:
            text = f"1 / {whole}" if power == 1 else f"1 / sqrt({whole})"
            return text if value > 0 else f"-{text}"
    return f"{value:.6g}"
