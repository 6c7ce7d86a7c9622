"""What users call to make a value, with its arguments checked."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING, Any

from graftax.errors import UsageError, escape, option
from graftax.surgery.values.base import is_arraylike
from graftax.surgery.values.computed import AddNormal, Mean, Mix, Rounded, Scaled
from graftax.surgery.values.fills import Constant, Normal, Number, Zeros
from graftax.surgery.values.quantize import BITS, Quantized, axes_of

if TYPE_CHECKING:
    from graftax.plans import Plan
    from graftax.surgery.donors import FromCheckpoint

_COMPUTED = (AddNormal, Constant, Mean, Mix, Normal, Quantized, Rounded, Scaled, Zeros)


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


def add_normal(stddev: float, seed: int, relative: bool = False) -> AddNormal:
    """The leaf plus the numbers that `normal(stddev, seed)` would give it. Floating leaves only.

    relative  stddev counts in standard deviations of the leaf, all its values about their mean; a leaf whose values are
              all equal has 0 and stays as it is
    """
    return AddNormal(_stddev(stddev, "add_normal"), _seed(seed, "add_normal"), bool(relative))


def scaled(factor: float) -> Scaled:
    """The leaf times `factor`. Floating leaves only."""
    number = _real(factor, "scaled")
    if not math.isfinite(number):
        raise UsageError(f"scaled({factor!r}): the factor must be finite")
    return Scaled(number)


def mean() -> Mean:
    """Fill with the mean of the leaf's own values. Floating leaves only."""
    return Mean()


def mix(donor: Any, t: float) -> Mix:
    """old + t (donor - old): the leaf at t = 0 and the donor at t = 1, bit for bit; t outside of 0 to 1 goes beyond
    them. Floating leaves only.

    donor   an array of the leaf's shape and dtype; a checkpoint or a tree, from which each leaf takes the tensor of its
            own path; or from_checkpoint(...), which takes another key, lays it out or casts it
    """
    from graftax.surgery.donors import FromCheckpoint

    if donor is None or isinstance(donor, (bool, int, float, complex, *_COMPUTED)):
        raise UsageError(
            f"mix: {escape(repr(donor), 60)} is no donor",
            next="Give an array, a checkpoint, a tree, or gx.from_checkpoint(path, key).",
        )
    number = _real(t, "mix")
    if not math.isfinite(number):
        raise UsageError(f"mix: t must be finite, not {t!r}")
    taken = donor if isinstance(donor, FromCheckpoint) or is_arraylike(donor) else FromCheckpoint(donor)
    return Mix(taken, number)


def rounded(dtype: Any) -> Rounded:
    """The leaf rounded to a narrower floating dtype and back; its own dtype stays. Floating leaves only.

    dtype: "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2" ..., or the dtype of NumPy, jax or torch.
    """
    from graftax.ops.floats import FLOATS

    name = dtype if isinstance(dtype, str) else str(getattr(dtype, "dtype", dtype)).removeprefix("torch.")
    name = getattr(dtype, "__name__", name) if isinstance(dtype, type) else name
    known = [one for one in FLOATS if one not in ("float64", "float8_e8m0fnu")]
    if name not in known:
        raise UsageError(f"rounded({escape(repr(dtype), 60)}): not one of {', '.join(known)}")
    return Rounded(name)


def quantized(bits: int, axis: int | tuple[int, ...] | None = None, group: int | None = None) -> Quantized:
    """Symmetric fake quantization to `bits` (2 to 16); the dtype stays. See `Quantized` for the formula.

    axis    the axes that keep their own scale: -1 for a kernel (in, out), (1, 2) for (in, heads, head_dim), () for one
            scale in all. None: one scale for each output channel, and for each matrix of a stack, as the live module
            says (`like=` of replace), or a name that leaves no doubt; else `replace` raises PlanError
    group   one scale for each `group` input channels of an output channel; it must divide their number
    """
    for name, number in (("bits", bits), *((("group", group),) if group is not None else ())):
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise UsageError(f"quantized: {name} must be a whole number, not {number!r}")
    if not BITS[0] <= bits <= BITS[1]:
        raise UsageError(f"quantized({bits}): bits must be {BITS[0]} to {BITS[1]}")
    if group is not None and group < 1:
        raise UsageError(f"quantized: group must be 1 or more, not {group!r}")
    return Quantized(int(bits), axes_of(axis), None if group is None else int(group))


def from_checkpoint(
    path: str | PathLike[str] | Any,
    key: str | None = None,
    layout: str | None = None,
    plan: Plan | None = None,
    *,
    cast: bool = False,
) -> FromCheckpoint:
    """A tensor of another checkpoint, laid out for the leaf it goes into: a torch Linear weight arrives transposed.

    path     a file or folder, an opened checkpoint, or a live tree (a live module knows its layouts)
    key      the tensor's name there; None: the leaf's own path, or the only tensor there is
    layout   how the donor is stored, if its shape does not tell: "linear", "conv" or "identity" (`graftax layers`)
    plan     a plan that ports the donor to a tree with these leaves (`gx.plan(donor, like)`): it tells key and layout
    cast     round a floating donor to the leaf's dtype; otherwise another dtype is an error

    Without a plan one tensor shows nothing of the model around it: the weight behind a flatten of NCHW keeps torch's
    column order, and fused projections are not split. A plan handles both.
    """
    from graftax.plans import Plan
    from graftax.surgery.donors import LAYOUTS, FromCheckpoint

    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"{option('layout', escape(layout))} is not one of {', '.join(LAYOUTS)}")
    if key is not None and not isinstance(key, str):
        raise UsageError(f"key={escape(repr(key))} is not text; in a list or a dict, name it by its path ('layers/0')")
    if plan is not None:
        if not isinstance(plan, Plan):
            raise UsageError(f"plan={escape(repr(plan), 60)} is no plan", next="Give gx.plan(donor, like).")
        if key is not None or layout is not None:
            raise UsageError("the plan tells key and layout: leave them out")
        plan.require_complete()
    return FromCheckpoint(path, key, layout, bool(cast), plan=plan)


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
                next="Give a function of the old leaf: lambda leaf: "
                + ("jnp.full_like(leaf, number)." if name == "constant" else "..., which may use traced numbers."),
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
