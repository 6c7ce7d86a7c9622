"""What value ops share: the dtypes they take, and float64 arithmetic rounded once."""

from __future__ import annotations

from collections.abc import Callable

from graftax.errors import LayoutError, PlanError
from graftax.ops.base import Array, Specs


def floating(specs: Specs, op: str) -> None:
    """LayoutError unless every tensor has a floating dtype that is not packed."""
    for spec in specs:
        if not spec.floating or spec.packed:
            raise LayoutError(f"{op} takes floating tensors, got {spec}")


def one_dtype(specs: Specs, op: str) -> None:
    """LayoutError unless every tensor has the same floating dtype, not packed."""
    floating(specs, op)
    if len({spec.dtype for spec in specs}) > 1:
        raise LayoutError(f"{op} takes tensors of one dtype, got {', '.join(map(str, specs))}")


def rounded(function: Callable[..., Array], *arrays: Array) -> Array:
    """function(arrays in float64) -> the dtype of the last array, rounded once. PlanError if finite values give an
    infinity or NaN that the dtype, or float64, cannot represent otherwise."""
    import numpy as np

    from graftax.ops.casting import cast_array

    with np.errstate(all="ignore"):
        wide = [array.astype("float64") for array in arrays]
        value = np.asarray(function(*wide))
    if not np.isfinite(value).all() and all(np.isfinite(array).all() for array in wide):
        raise PlanError(f"{int(np.count_nonzero(~np.isfinite(value)))} of {value.size} values are no longer finite")
    return cast_array(value, str(arrays[-1].dtype))[0]
