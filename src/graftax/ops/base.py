"""What every op provides, and the small checks that ops share."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol, runtime_checkable

from graftax.errors import LayoutError
from graftax.ops.floats import FLOATS
from graftax.tree import DTYPES, TensorSpec

Array = Any
"""A NumPy array; ml_dtypes for bfloat16, f8 and int4."""
Arrays = tuple[Any, ...]
Specs = tuple[TensorSpec, ...]


@runtime_checkable
class Op(Protocol):
    """One step of an entry. `exact`: the inverse gives back every bit, whatever the values."""

    name: ClassVar[str]

    @property
    def exact(self) -> bool: ...
    @property
    def inverse(self) -> Op: ...
    @property
    def text(self) -> str: ...
    def infer(self, specs: Specs) -> Specs: ...
    def apply(self, arrays: Arrays) -> Arrays: ...


def refuse_packed(specs: Specs, op: str) -> None:
    for spec in specs:
        if spec.packed:
            raise LayoutError(f"{op} would split the bytes of {spec}: packed types move only as they are")


def valid_axis(spec: TensorSpec, axis: int, op: str) -> int:
    if not 0 <= axis < len(spec.shape):
        raise LayoutError(f"{op}: {spec} has no axis {axis}")
    return axis


def with_axis(spec: TensorSpec, axis: int, extent: int) -> TensorSpec:
    return TensorSpec((*spec.shape[:axis], extent, *spec.shape[axis + 1 :]), spec.dtype)


def at_least(value: int, least: int, what: str) -> None:
    if value < least:
        raise LayoutError(f"{what}: {value} is less than {least}")


def holds(value: float, dtype: str, what: str) -> None:
    """LayoutError unless `dtype` can hold `value`: rounded if it is floating, else exactly."""
    bits, kind = DTYPES[dtype]
    if kind == "f":
        form = FLOATS.get(dtype)
        if form is None:  # packed codes: the values that all of them have
            fits = value in (0, 1)
        elif not form.mantissa:  # powers of two
            fits = math.isnan(value) or (0 < value <= form.top and math.frexp(value)[0] == 0.5)
        else:
            fits = abs(value) <= form.top or math.isnan(value) or (form.ieee and math.isinf(value))
        if not fits:
            raise LayoutError(f"{what}: {dtype} cannot hold {value:g}")
        return
    low, high = {
        "b": (0, 1),
        "u": (0, 2**bits - 1),
        "i": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
    }.get(kind, (-math.inf, math.inf))
    if kind != "c" and not (math.isfinite(value) and value == int(value) and low <= value <= high):
        raise LayoutError(f"{what}: {dtype} cannot hold {value:g}")


def count_groups(count: int, size: int, op: str) -> int:
    if size < 1 or count % size or not count:
        raise LayoutError(f"{op} takes a multiple of {size} tensors, got {count}")
    return count // size


def count_same_bits(a: Array, b: Array) -> int:
    """How many values of two arrays of one shape and dtype have the same bits."""
    import numpy as np

    x, y = (np.ascontiguousarray(v).reshape(-1).view(np.uint8).reshape(v.size, v.dtype.itemsize) for v in (a, b))
    return int(np.count_nonzero((x == y).all(axis=1)))
