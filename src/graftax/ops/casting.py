"""Casts on the host with one rule: round to nearest even, and overflow is an error unless it is asked to saturate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.dtypes import numpy_dtype
from graftax.errors import PlanError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class CastCount:
    """What a cast did to `total` values: rounded to a neighbour, flushed to zero, overflowed (then saturated)."""

    total: int = 0
    rounded: int = 0
    flushed: int = 0
    overflowed: int = 0

    def __add__(self, other: CastCount) -> CastCount:
        return CastCount(
            self.total + other.total,
            self.rounded + other.rounded,
            self.flushed + other.flushed,
            self.overflowed + other.overflowed,
        )


def cast_array(array: Array, target: str, overflow: str = "error") -> tuple[Array, CastCount]:
    """`array` as dtype `target`, and what was lost.

    overflow: "error" raises PlanError where a finite value has no finite counterpart; "saturate" takes the largest
    finite one; "propagate" leaves what the dtype makes of it (infinity or NaN).
    """
    dtype = numpy_dtype(target)
    if array.dtype == dtype:
        return array, CastCount(total=array.size)
    with np.errstate(all="ignore"):
        out = np.asarray(
            _narrowed(array).astype(dtype) if array.dtype.itemsize == 8 and dtype.itemsize < 4 else array.astype(dtype)
        )
        wide = array.astype(np.float64)
        back = out.astype(np.float64)
        lost = np.isfinite(wide) & ~np.isfinite(back) | np.isinf(wide) & np.isnan(back)
        overflowed = int(np.count_nonzero(lost))
        if overflowed and overflow == "error":
            worst = float(np.max(np.abs(wide[lost])))
            raise PlanError(
                f"{overflowed} of {array.size} values do not fit {target} (largest magnitude {worst:g})",
                next="Choose a wider dtype, or overflow='saturate' to clip them.",
            )
        if overflowed and overflow == "saturate":
            import ml_dtypes

            top = float(ml_dtypes.finfo(dtype).max)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            out = np.where(lost, np.where(np.signbit(wide), -top, top).astype(dtype), out)
            back = out.astype(np.float64)
        flushed = int(np.count_nonzero((back == 0) & (wide != 0)))
        rounded = int(np.count_nonzero((back != wide) & ~np.isnan(wide))) - flushed - overflowed
    return out, CastCount(array.size, max(rounded, 0), flushed, overflowed)


def _narrowed(array: Array) -> Array:
    """float64 -> float32 rounded to odd, so that the next rounding is as if from float64 at once."""
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
