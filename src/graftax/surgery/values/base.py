"""What the values of surgery (`ops.LeafValue`) share: arithmetic in float64, piece by piece, rounded once to nearest
even. NumPy is imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from graftax.errors import PlanError
from graftax.tree import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

PIECE = 1 << 20
"""Values in float64 at a time."""
NEAR = 1 << 16
"""Values that stay in a core's cache in float64: arithmetic on them takes a third of the time."""


def is_arraylike(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    from graftax.tree.dtypes import numpy_dtype

    return numpy_dtype(spec.dtype)


def refuse_packed(spec: TensorSpec, text: str) -> None:
    if spec.packed:
        raise PlanError(f"{text}: the leaf is {spec.dtype}, several codes to a byte, which move only as they are")


def require_floating(spec: TensorSpec, text: str) -> None:
    """PlanError for a leaf that is not floating."""
    refuse_packed(spec, text)
    if not spec.floating:
        raise PlanError(f"{text}: the leaf is {spec.dtype}, not floating", next="Select floating leaves only.")


def refuse_overflow(overflowed: int, spec: TensorSpec, text: str, dtype: str = "") -> None:
    if overflowed:
        raise PlanError(f"{text}: {overflowed} of {spec.size} values overflow {dtype or spec.dtype}")


def refuse_not_finite(old: Any, text: str, what: str) -> None:
    """PlanError for a leaf with NaN or infinity, which has no scale, mean or spread."""
    import numpy as np

    flat = np.asarray(old).reshape(-1)
    if not all(np.isfinite(flat[piece]).all() for piece in pieces(flat.size)):
        raise PlanError(f"{text}: the leaf has NaN or infinity, and so no {what}")


def pieces(size: int, most: int | None = None) -> Iterator[slice]:
    """Slices of at most PIECE values, or `most`, that cover a flat leaf."""
    most = most or PIECE
    for start in range(0, size, most):
        yield slice(start, min(size, start + most))


def in_pieces(spec: TensorSpec, text: str, olds: tuple[Any, ...], step: Callable[..., Array]) -> Array:
    """Apply step(count, *the values of each of `olds` in float64) to the flat leaf piece by piece, and round to its
    dtype. PlanError if a finite value overflows the dtype."""
    import numpy as np

    from graftax.ops.casting import cast_array

    require_floating(spec, text)
    out = np.empty(spec.shape, dtype_of(spec))
    flat = out.reshape(-1)
    before = [np.ascontiguousarray(old).reshape(-1) for old in olds]
    overflowed = 0
    for piece in pieces(spec.size, NEAR):
        wide = [old[piece].astype(np.float64) for old in before]
        with np.errstate(all="ignore"):
            new = step(piece.stop - piece.start, *wide)
        flat[piece], count = cast_array(new, spec.dtype, "propagate")
        overflowed += count.overflowed
        if wide:  # float64 itself overflowed
            finite = np.logical_and.reduce([np.isfinite(one) for one in wide])
            overflowed += int(np.count_nonzero(finite & ~np.isfinite(new)))
    refuse_overflow(overflowed, spec, text)
    return out


def traced(spec: TensorSpec, leaves: tuple[Any, ...], function: Callable[..., Any], tangent: Callable[..., Any]) -> Any:
    """`adapters.traced.computed` for a leaf of this spec."""
    from graftax.adapters.traced import computed
    from graftax.ops.floats import FLOATS

    if spec.dtype not in FLOATS:
        raise PlanError(f"a traced leaf of dtype {spec.dtype} takes no arithmetic", next="Call replace outside of jit.")
    return computed(leaves, function, tangent, FLOATS[spec.dtype])


# ---------------------------------------------------------------- sums


def total(xp: Any, wide: Any) -> Any:
    """The sums of a float64 array along its last axis, by adding its halves again and again: NumPy and jax give the
    same bits."""
    *lead, size = wide.shape
    width = 1 << max(size - 1, 0).bit_length()
    if width > size:
        wide = xp.concatenate([wide, xp.zeros((*lead, width - size), wide.dtype)], axis=-1)
    while width > 1:
        width //= 2
        wide = wide[..., :width] + wide[..., width:]
    return wide[..., 0]


def moments(old: Array, spread: bool) -> tuple[float, float]:
    """(the mean of all values, their standard deviation about it), in float64; 0 values have mean 0."""
    import numpy as np

    flat = np.ascontiguousarray(old).reshape(-1)
    if not flat.size:
        return 0.0, 0.0

    def summed(of: Callable[[Array], Array]) -> float:
        with np.errstate(over="ignore"):
            sums = [total(np, of(flat[piece].astype(np.float64))) for piece in pieces(flat.size)]
            return float(total(np, np.asarray(sums)))

    mean = summed(lambda wide: wide) / flat.size
    return mean, (summed(lambda wide: (wide - mean) ** 2) / flat.size) ** 0.5 if spread else 0.0
