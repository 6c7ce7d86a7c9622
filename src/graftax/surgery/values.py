"""The values that surgery puts into a leaf: constant, zeros, normal, add_normal, scaled, quantized, from_checkpoint.

A value is data (`ops.LeafValue`). `apply(path, spec, old)` returns a new NumPy array of the old leaf's shape and dtype,
or raises PlanError; the dtype never changes unasked. Arithmetic is in float64, piece by piece, and is rounded once, to
nearest even.
NumPy is imported on first use.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

from graftax.errors import PlanError, UsageError, escape, option, worded
from graftax.tree import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from graftax.surgery.donors import FromCheckpoint

    Array = np.ndarray[Any, Any]

_PIECE = 1 << 20  # values in float64 at a time
BITS = (2, 16)  # of quantized: least, most
Number = bool | int | float | complex


# ---------------------------------------------------------------- fills


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

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        _refuse_packed(spec, self.text)
        return np.full(spec.shape, _scalar(self.value, spec), dtype=_dtype(spec))


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zero everywhere; False in a boolean leaf."""

    reads: ClassVar[bool] = False
    local: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return "zeros()"

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


def _draws(seed: int, path: str) -> Callable[[int], Array]:
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
    stddev: float
    seed: int

    @property
    def text(self) -> str:
        return f"normal({self.stddev:.12g}, seed={self.seed})"

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        draw = _draws(self.seed, path)
        return _in_pieces(spec, self.text, None, lambda count, _: draw(count) * self.stddev)


@dataclass(frozen=True, slots=True)
class AddNormal:
    """The leaf plus the numbers that `Normal` would give it, added in float64, rounded once. NaN and infinity stay."""

    reads: ClassVar[bool] = True
    stddev: float
    seed: int

    @property
    def text(self) -> str:
        return f"add_normal({self.stddev:.12g}, seed={self.seed})"

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        draw = _draws(self.seed, path)
        return _in_pieces(spec, self.text, old, lambda count, wide: wide + draw(count) * self.stddev)


# ---------------------------------------------------------------- computed from the old value


@dataclass(frozen=True, slots=True)
class Scaled:
    """The leaf times `factor`, multiplied in float64 and rounded once. NaN and infinity stay (infinity x 0 is NaN)."""

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = True
    factor: float

    @property
    def text(self) -> str:
        return f"scaled({self.factor:.12g})"

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        return _in_pieces(spec, self.text, old, lambda _, wide: wide * self.factor)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Symmetric fake quantization, a scale per index of `axis`: with m the largest magnitude over the other axes and
    n = 2^(bits-1) - 1, w becomes round(w n / m) m / n, halves to even. The dtype stays; a channel of zeros stays zero.

    A leaf with NaN or infinity has no scale and is refused. A leaf of rank 0 and one that is not floating are refused
    too. If `axis` is not `stated` it is the last, and only a matrix is accepted: in other leaves the output channels
    may lie on any axis.
    """

    reads: ClassVar[bool] = True
    bits: int
    axis: int = -1
    stated: bool = field(default=True, compare=False)

    @property
    def text(self) -> str:
        return f"quantized({self.bits}, axis={self.axis})"

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        from graftax.ops.casting import cast_array

        require_floating(spec, self.text)
        rank = len(spec.shape)
        if not -rank <= self.axis < rank:
            raise PlanError(f"{self.text}: {spec} has no axis {self.axis}")
        if not self.stated and rank != 2 and spec.size:
            raise _no_axis(self.bits, spec) if np.isfinite(old).all() else self._not_finite()
        out = np.empty(spec.shape, old.dtype)
        channels, result = np.moveaxis(old, self.axis, 0), np.moveaxis(out, self.axis, 0)
        step = max(1, _PIECE // max(1, spec.size // max(1, channels.shape[0])))
        overflowed = 0
        for start in range(0, channels.shape[0], step):
            piece = slice(start, start + step)
            wide = self._channels(channels[piece].astype(np.float64))
            result[piece], count = cast_array(wide, spec.dtype, "propagate")
            overflowed += count.overflowed
        _refuse_overflow(overflowed, spec, self.text)
        return out

    def _not_finite(self) -> PlanError:
        return PlanError(f"{self.text}: the leaf has NaN or infinity, and so no scale")

    def _channels(self, wide: Array) -> Array:
        """Quantize channels (on the first axis, in float64). A power of two is factored out first, so that nothing
        overflows and every step is exact but the last quotient."""
        import numpy as np

        if not np.isfinite(wide).all():
            raise self._not_finite()
        levels = float(2 ** (self.bits - 1) - 1)
        most = np.abs(wide).max(axis=tuple(range(1, wide.ndim)), keepdims=True, initial=0.0)
        most, exponent = np.frexp(most)
        unit = np.where(most > 0, most, 1.0)
        codes = np.rint(np.ldexp(wide, -exponent) * levels / unit)
        return np.ldexp(codes * unit / levels, exponent)


def _no_axis(bits: int, spec: TensorSpec) -> PlanError:
    """The error for a leaf that is not a matrix: it shows both axes that may hold the channels."""
    first, last = worded("--axis=0", "axis=0"), worded("--axis=-1", "axis=-1")
    if len(spec.shape) == 1:
        ways = f"{first} is a scale for each of its {spec.size} values, which changes nothing: select matrices only."
    else:
        ways = (
            f"Say {first}, {_scales(spec.shape[0])} (a torch weight: its output channels come first; a stack of "
            f"layers), or {last}, {_scales(spec.shape[-1])} (a Flax kernel: they come last)."
        )
    return PlanError(f"quantized({bits}): {spec} is not a matrix, and no axis of its channels is given", next=ways)


def _scales(count: int) -> str:
    return "1 scale" if count == 1 else f"{count} scales"


# ---------------------------------------------------------------- shared


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    from graftax.tree.dtypes import numpy_dtype

    return numpy_dtype(spec.dtype)


def _refuse_packed(spec: TensorSpec, text: str) -> None:
    if spec.packed:
        raise PlanError(f"{text}: the leaf is {spec.dtype}, several codes to a byte, which move only as they are")


def require_floating(spec: TensorSpec, text: str) -> None:
    """PlanError for a leaf that is not floating."""
    _refuse_packed(spec, text)
    if not spec.floating:
        raise PlanError(f"{text}: the leaf is {spec.dtype}, not floating", next="Select floating leaves only.")


def _in_pieces(spec: TensorSpec, text: str, old: Any, step: Callable[[int, Any], Array]) -> Array:
    """Apply step(count, the old values of a piece in float64) to the flat leaf piece by piece, and round to its dtype.
    PlanError if a finite value overflows the dtype."""
    import numpy as np

    from graftax.ops.casting import cast_array

    require_floating(spec, text)
    out = np.empty(spec.shape, _dtype(spec))
    flat = out.reshape(-1)
    before = None if old is None else np.ascontiguousarray(old).reshape(-1)
    overflowed = 0
    for piece in _pieces(spec.size):
        wide = None if before is None else before[piece].astype(np.float64)
        with np.errstate(all="ignore"):
            new = step(piece.stop - piece.start, wide)
        flat[piece], count = cast_array(new, spec.dtype, "propagate")
        overflowed += count.overflowed
        if wide is not None:  # float64 itself overflowed
            overflowed += int(np.count_nonzero(np.isfinite(wide) & ~np.isfinite(new)))
    _refuse_overflow(overflowed, spec, text)
    return out


def _refuse_overflow(overflowed: int, spec: TensorSpec, text: str) -> None:
    if overflowed:
        raise PlanError(f"{text}: {overflowed} of {spec.size} values overflow {spec.dtype}")


def _pieces(size: int) -> Iterator[slice]:
    for start in range(0, size, _PIECE):
        yield slice(start, min(size, start + _PIECE))


# ---------------------------------------------------------------- what users call


def constant(value: Any) -> Constant:
    """Fill with one number, in the leaf's own dtype. `value`: a Python, NumPy, JAX or torch number.

    UsageError for anything else. A number that a selected leaf cannot hold is a PlanError of `replace`.
    """
    return Constant(_number(value, "constant"))


def zeros() -> Zeros:
    """Fill with zero."""
    return Zeros()


def normal(stddev: float, seed: int) -> Normal:
    """Normal numbers of mean 0, drawn per leaf from (seed, path): see `Normal`. Floating leaves only.

    NumPy promises that Philox gives the same bits in every version, but not that it turns them into the same normal
    numbers.
    """
    return Normal(_stddev(stddev, "normal"), _seed(seed, "normal"))


def add_normal(stddev: float, seed: int) -> AddNormal:
    """The leaf plus the numbers that `normal(stddev, seed)` would give it. Floating leaves only."""
    return AddNormal(_stddev(stddev, "add_normal"), _seed(seed, "add_normal"))


def scaled(factor: float) -> Scaled:
    """The leaf times `factor`. Floating leaves only."""
    number = _real(factor, "scaled")
    if not math.isfinite(number):
        raise UsageError(f"scaled({factor!r}): the factor must be finite")
    return Scaled(number)


def quantized(bits: int, axis: int | None = None) -> Quantized:
    """Symmetric per-channel fake quantization to `bits` (2 to 16), a scale per index of `axis`; the dtype stays.

    `axis` is the axis of the output channels, each of which keeps its own scale: -1 for a Flax kernel, 0 for a torch
    weight. None: -1 for a matrix; any other leaf is a PlanError of `replace`.
    """
    for name, number in (("bits", bits), ("axis", -1 if axis is None else axis)):
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise UsageError(f"quantized: {name} must be a whole number, not {number!r}")
    if not BITS[0] <= bits <= BITS[1]:
        raise UsageError(f"quantized({bits}): bits must be {BITS[0]} to {BITS[1]}")
    return Quantized(int(bits), -1 if axis is None else int(axis), stated=axis is not None)


def from_checkpoint(
    path: str | PathLike[str] | Any, key: str | None = None, layout: str | None = None, *, cast: bool = False
) -> FromCheckpoint:
    """A tensor of another checkpoint, laid out for the leaf it goes into: a torch Linear weight arrives transposed.

    path     a file or folder, an opened checkpoint, or a live tree (a live module knows its layouts)
    key      the tensor's name there; None: the leaf's own path, or the only tensor there is
    layout   how the donor is stored, if its shape does not tell: "linear", "conv" or "identity" (`graftax layers`)
    cast     round a floating donor to the leaf's dtype; otherwise another dtype is an error

    One tensor shows nothing of the model around it: the weight behind a flatten of NCHW keeps torch's column order, and
    fused projections are not split. `gx.port` with rules handles both.
    """
    from graftax.surgery.donors import LAYOUTS, FromCheckpoint

    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"{option('layout', escape(layout))} is not one of {', '.join(LAYOUTS)}")
    if key is not None and not isinstance(key, str):
        raise UsageError(f"key={escape(repr(key))} is not text; in a list or a dict, name it by its path ('layers/0')")
    return FromCheckpoint(path, key, layout, bool(cast))


def _number(value: Any, name: str) -> Number:
    """The Python number in `value`: a number, a NumPy scalar, an array or tensor of shape ()."""
    shape = getattr(value, "shape", None)
    if shape is None:
        found: Any = value
    elif tuple(shape) == () and hasattr(value, "item"):
        try:
            found = value.item()
        except TypeError as error:  # raised by jax for a traced number
            raise UsageError(
                f"{name}: the number is traced ({type(value).__name__}), and has no value yet",
                next="Give a function of the old leaf: lambda leaf: jnp.full_like(leaf, number).",
            ) from error
        found = float(found) if hasattr(found, "dtype") and hasattr(found, "__float__") else found  # ml_dtypes' scalars
    else:
        raise UsageError(
            f"{name} takes one number, not an array of shape {tuple(shape)}", next="Give the array itself as the value."
        )
    for kind in (bool, int, float, complex):
        if isinstance(found, kind):
            return kind(found)  # pyright: ignore
    raise UsageError(f"{name} takes one number, not {escape(repr(value), 60)}")


def _real(value: Any, name: str) -> float:
    number = _number(value, name)
    if isinstance(number, complex):
        raise UsageError(f"{name} takes a real number, not {number!r}")
    return float(number)


def _stddev(value: Any, name: str) -> float:
    number = _real(value, name)
    if not (math.isfinite(number) and number >= 0):
        raise UsageError(f"{name}: stddev must be finite and 0 or more, not {value!r}")
    return number


def _seed(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name}: seed must be a whole number, not {escape(repr(value), 60)}")
    return int(value.__index__())
