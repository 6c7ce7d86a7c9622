"""Values that do not look at the old leaf: constant, zeros, normal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graftax.errors import PlanError
from graftax.surgery.values.base import dtype_of, in_pieces, refuse_packed, require_floating
from graftax.tree import TensorSpec

if TYPE_CHECKING:
    from graftax.surgery.values.base import Array

Number = bool | int | float | complex


@dataclass(frozen=True, slots=True)
class Constant:
    """One number everywhere, in the leaf's own dtype. The number may be rounded (0.1 in bfloat16). A number that the
    dtype cannot approximate is refused: overflow, underflow to zero, a fraction or NaN in an integer leaf."""

    reads: ClassVar[bool] = False
    local: ClassVar[bool] = True
    value: Number

    @property
    def text(self) -> str:
        return f"constant({self.value!r})"

    def check(self, path: str, spec: TensorSpec) -> None:
        refuse_packed(spec, self.text)
        _scalar(self.value, spec)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        refuse_packed(spec, self.text)
        return np.full(spec.shape, _scalar(self.value, spec), dtype=dtype_of(spec))


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zero everywhere; False in a boolean leaf."""

    reads: ClassVar[bool] = False
    local: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return "zeros()"

    def check(self, path: str, spec: TensorSpec) -> None:
        refuse_packed(spec, self.text)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        return Constant(0).apply(path, spec, old)


def _scalar(value: Number, spec: TensorSpec) -> Any:
    """`value` as one number of the leaf's dtype, or PlanError."""
    kind = spec.kind
    if isinstance(value, complex):
        if kind != "c" and value.imag:
            raise PlanError(f"{value} has an imaginary part and the leaf is {spec.dtype}")
        return _complex(value, spec) if kind == "c" else _scalar(value.real, spec)
    if kind == "c":
        return _complex(complex(_as_float(value, spec)), spec)
    if kind == "b":
        if value not in (0, 1):
            raise PlanError(f"a boolean leaf takes True or False, not {value!r}")
        return bool(value)
    return _floating(_as_float(value, spec), spec) if kind == "f" else _integer(value, spec)


def _as_float(value: bool | int | float, spec: TensorSpec) -> float:
    try:
        return float(value)
    except OverflowError:
        raise PlanError(f"an integer of {value.bit_length()} bits overflows {spec.dtype}") from None  # type: ignore[union-attr]


def _integer(value: bool | int | float, spec: TensorSpec) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise PlanError(
            f"{value!r} is not a whole number and the leaf is {spec.dtype}", next="Select floating leaves only."
        )
    low = -(1 << (spec.bits - 1)) if spec.kind == "i" else 0
    high = (1 << (spec.bits - 1 if spec.kind == "i" else spec.bits)) - 1
    if not low <= int(value) <= high:
        raise PlanError(f"{value!r} overflows {spec.dtype}, which holds {low} to {high}")
    return int(value)


def _floating(value: float, spec: TensorSpec) -> Any:
    import numpy as np

    from graftax.ops.casting import cast_array

    out, count = cast_array(np.asarray(value, np.float64), spec.dtype, "propagate")
    back = float(out)
    if count.overflowed or math.isnan(back) != math.isnan(value) or (value < 0 < back) or (value == 0 != back):
        raise PlanError(f"{value!r} overflows {spec.dtype}: it has no such value", next="Take a wider dtype first.")
    if back == 0 != value:
        raise PlanError(f"{value!r} underflows {spec.dtype}: it would become 0", next="Write zeros() if that is meant.")
    return out


def _complex(value: complex, spec: TensorSpec) -> complex:
    part = TensorSpec((), "float32" if spec.bits == 64 else "float64")
    return complex(float(_floating(value.real, part)), float(_floating(value.imag, part)))


# ---------------------------------------------------------------- random


def random_key(seed: int, path: str) -> int:
    """The 128-bit Philox key of one leaf: the first 16 bytes of SHA-256 of `graftax normal`, the seed in decimal and
    the path, joined by NUL, as UTF-8; little end first."""
    text = f"graftax normal\0{seed}\0{path}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")


def draws(seed: int, path: str) -> Callable[[int], Array]:
    """count -> the next `count` standard normal numbers of this leaf, in float64. The size of the pieces does not
    change the stream."""
    import numpy as np

    generator = np.random.Generator(np.random.Philox(key=random_key(seed, path)))
    return lambda count: generator.standard_normal(count)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal numbers of mean 0, drawn in float64 from (seed, path of the leaf) by NumPy's Philox and rounded to the
    leaf's dtype. They do not depend on which other leaves are selected, nor on the order."""

    reads: ClassVar[bool] = False
    local: ClassVar[bool] = False
    stddev: float
    seed: int

    @property
    def text(self) -> str:
        return f"normal({self.stddev:.12g}, seed={self.seed})"

    def check(self, path: str, spec: TensorSpec) -> None:
        require_floating(spec, self.text)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        return self.in_order(path)(spec, old)

    def in_order(self, path: str) -> Callable[[TensorSpec, Any], Array]:
        draw = draws(self.seed, path)
        return lambda spec, _: in_pieces(spec, self.text, (), lambda count: draw(count) * self.stddev)
