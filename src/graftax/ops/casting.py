"""Casts on the host with one rule: round to nearest even; overflow is an error unless saturation is requested.

A NaN keeps its sign and as much of its payload as fits, so that a cast to a wider type and back gives every bit.
Engines differ in all of this (torch saturates where ml_dtypes gives NaN; XLA flushes subnormals), so there is one rule
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.errors import PlanError, option
from graftax.ops.floats import FLOATS, widens
from graftax.tree.dtypes import dtype_name, numpy_dtype

Array = np.ndarray[Any, Any]
_POWERS = "float8_e8m0fnu"
"""The dtype of scales: powers of two without a sign. No value is rounded to it."""


@dataclass(frozen=True, slots=True)
class CastCount:
    """What a cast did to `total` values: rounded to a neighbour, flushed to zero, overflowed (then saturated).
    `change`: the largest relative change of a value, 1.0 for one that was flushed."""

    total: int = 0
    rounded: int = 0
    flushed: int = 0
    overflowed: int = 0
    change: float = 0.0

    def __add__(self, other: CastCount) -> CastCount:
        return CastCount(
            self.total + other.total,
            self.rounded + other.rounded,
            self.flushed + other.flushed,
            self.overflowed + other.overflowed,
            max(self.change, other.change),
        )


def cast_array(array: Array, target: str, overflow: str = "error") -> tuple[Array, CastCount]:
    """`array` as dtype `target`, and what was lost. A zero that loses its sign counts as rounded.

    overflow: "error" raises PlanError if a value (also an infinity) has no counterpart; "saturate" uses the largest
    finite value; "propagate" keeps what the dtype makes of it (infinity or NaN).
    """
    dtype = numpy_dtype(target)
    if array.dtype == dtype:
        return array, CastCount(total=array.size)
    source = dtype_name(array.dtype)
    with np.errstate(all="ignore"):
        out = _keep_nans(array, np.asarray(_nearest(array, dtype)), source, target)
        if widens(source, target):
            return out, CastCount(total=array.size)
        plain = _count_finite(array, out, source, target)
        if plain is not None:
            return out, plain
        wide, back = array.astype(np.float64), out.astype(np.float64)
        if target == _POWERS:
            _only_powers(wide, back)
        lost = np.isfinite(wide) & ~np.isfinite(back) | np.isinf(wide) & np.isnan(back)
        overflowed = int(np.count_nonzero(lost))
        if overflowed and overflow == "error":
            worst = float(np.max(np.abs(wide[lost])))
            raise PlanError(
                f"{overflowed} of {array.size} values do not fit {target} (largest magnitude {worst:g})",
                next=f"Choose a wider dtype, or {option('overflow', 'saturate')} to clip them.",
            )
        if overflowed and overflow == "saturate":
            import ml_dtypes

            top = float(ml_dtypes.finfo(dtype).max)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            out = np.where(lost, np.where(np.signbit(wide), -top, top).astype(dtype), out)
            back = out.astype(np.float64)
        flushed = int(np.count_nonzero((back == 0) & (wide != 0)))
        changed = (back != wide) & ~np.isnan(wide) | (np.signbit(back) != np.signbit(wide)) & (wide == 0)
        rounded = int(np.count_nonzero(changed)) - flushed - overflowed
        change = _largest(np.asarray(back - wide), wide)
    return out, CastCount(array.size, max(rounded, 0), flushed, overflowed, change)


def _count_finite(array: Array, out: Array, source: str, target: str) -> CastCount | None:
    """What was lost between IEEE types of at most 32 bits if all results are finite, as with weights: counted in a
    quarter of the time. None in other cases."""
    a, b = FLOATS.get(source), FLOATS.get(target)
    if a is None or b is None or not (a.ieee and b.ieee) or max(a.bits, b.bits) > 32:
        return None
    wide, back = array.astype(np.float32, copy=False), out.astype(np.float32, copy=False)
    if not np.isfinite(back).all():
        return None
    flushed = int(np.count_nonzero(back == 0)) - int(np.count_nonzero(wide == 0))
    off = np.asarray(back - wide)
    changed = int(np.count_nonzero(off))
    return CastCount(array.size, changed - flushed, flushed, change=_largest(off, wide) if changed else 0.0)


def _largest(off: Array, wide: Array) -> float:
    """The largest of the changes `off`, which it overwrites, relative to the original values. Zeros, NaNs and
    infinities do not count."""
    np.divide(off, wide, out=off)
    return float(np.fmax.reduce(np.abs(off, out=off), axis=None, initial=0.0))


def _nearest(array: Array, dtype: np.dtype[Any]) -> Array:
    """`array` rounded once to `dtype`, whatever intermediate type NumPy and ml_dtypes need."""
    if array.dtype.itemsize == 8 and dtype.itemsize < 4:
        array = _narrowed(array)
    elif array.dtype.itemsize == dtype.itemsize == 1:
        array = array.astype(np.float32)  # exact; some pairs of 8-bit types have no direct cast
    return array.astype(dtype)


def _narrowed(array: Array) -> Array:
    """float64 -> float32 rounded to odd, so that the next rounding gives the same result as from float64 directly."""
    near = array.astype(np.float32)
    bits = near.view(np.uint32) if near.ndim else near.reshape(1).view(np.uint32)
    wide = array.reshape(bits.shape)
    back = near.reshape(bits.shape).astype(np.float64)
    inexact = (back != wide) & np.isfinite(wide)
    # Toward zero first: step back where rounding went away from zero (also from infinity), then set the last bit.
    away = inexact & (np.abs(back) > np.abs(wide))
    bits = np.where(away, bits - np.uint32(1), bits)
    bits = np.where(inexact, bits | np.uint32(1), bits)
    return bits.astype(np.uint32).view(np.float32).reshape(array.shape)


def _keep_nans(array: Array, out: Array, source: str, target: str) -> Array:
    """Write the NaNs of `array` into `out`: the sign, and the payload from its high end. A payload that would vanish
    becomes the quiet bit. Types with a single NaN are not changed."""
    a, b = FLOATS.get(source), FLOATS.get(target)
    if a is None or b is None or not (a.ieee and b.ieee):
        return out
    nan = np.isnan(array)
    if not nan.any():
        return out
    codes = np.ascontiguousarray(array[nan]).view(f"u{a.bits // 8}").astype(np.uint64)
    payload = np.bitwise_and(codes, np.uint64((1 << a.mantissa) - 1))
    shift = b.mantissa - a.mantissa
    payload = np.left_shift(payload, np.uint64(shift)) if shift >= 0 else np.right_shift(payload, np.uint64(-shift))
    payload = np.where(payload == 0, np.uint64(1 << (b.mantissa - 1)), payload)
    sign = np.left_shift(np.right_shift(codes, np.uint64(a.bits - 1)), np.uint64(b.bits - 1))
    exponent = np.uint64(((1 << (b.bits - 1 - b.mantissa)) - 1) << b.mantissa)
    out[nan] = (sign | exponent | payload).astype(f"u{b.bits // 8}").view(out.dtype)
    return out


def _only_powers(wide: Array, back: Array) -> None:
    wrong = (wide != back) & ~np.isnan(wide)
    if wrong.any():
        raise PlanError(
            f"{int(np.count_nonzero(wrong))} of {wide.size} values are not powers of two, as {_POWERS} requires",
            next="Choose another dtype.",
        )
