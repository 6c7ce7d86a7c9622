"""Casts against exact rational rounding, ml_dtypes and torch; what is lost is counted; wider and back is exact."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax.errors import LayoutError, PlanError
from graftax.ops import Cast, widens
from graftax.ops.casting import CastCount, cast_array
from graftax.ops.floats import FLOATS
from graftax.tree import DTYPES, TensorSpec
from graftax.tree.dtypes import numpy_dtype

ALL = [name for name, (bits, kind) in DTYPES.items() if kind == "f" and bits >= 8]
POWERS = "float8_e8m0fnu"
NARROW = [name for name in ALL if DTYPES[name][0] <= 16 and name != POWERS]
BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def codes(name: str) -> np.ndarray:
    """Every value of a type of 16 bits at most; for wider ones a sample of bit patterns with all kinds of NaN."""
    bits = DTYPES[name][0]
    if bits <= 16:
        raw = np.arange(1 << bits, dtype=BITS[bits])
    else:
        rng = np.random.default_rng(0)
        raw = rng.integers(0, np.iinfo(BITS[bits]).max, 20_000, BITS[bits], endpoint=True)
        spec = FLOATS[name]
        inf = ((1 << (bits - 1 - spec.mantissa)) - 1) << spec.mantissa
        quiet = 1 << (spec.mantissa - 1)
        special = [0, inf, inf | 1, inf | quiet, inf | quiet | 1, inf | (quiet - 1)]
        raw = np.concatenate([raw, np.array(special + [s | 1 << (bits - 1) for s in special], BITS[bits])])
    return raw.view(numpy_dtype(name))


def wide(array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(np.float64)


@cache
def grid(name: str) -> tuple[list[Fraction], list[int]]:
    """The finite values of a type in order, and their codes; 0 once."""
    array = codes(name)
    values = wide(array)
    found = {
        Fraction(float(v)): int(c)
        for c, v in zip(array.view(BITS[DTYPES[name][0]]), values, strict=True)
        if np.isfinite(v) and not (v == 0 and np.signbit(v))
    }
    return sorted(found), [found[v] for v in sorted(found)]


def rounded(value: float, name: str) -> Fraction | None:
    """The nearest value, ties to the even code; None where that is beyond the largest."""
    values, names = grid(name)
    exact = Fraction(value)
    k = bisect_left(values, exact)
    if k < len(values) and values[k] == exact:
        return exact
    if k in (0, len(values)):
        end, inner = (values[0], values[1]) if k == 0 else (values[-1], values[-2])
        half = abs(end - inner) / 2
        beyond = abs(exact) - abs(end)
        even = names[0 if k == 0 else -1] % 2 == 0
        return end if beyond < half or (beyond == half and even) else None
    low, high = values[k - 1], values[k]
    if exact - low != high - exact:
        return low if exact - low < high - exact else high
    return low if names[k - 1] % 2 == 0 else high


def check(array: np.ndarray, target: str) -> None:
    out, count = cast_array(array, target, "propagate")
    assert out.dtype == numpy_dtype(target)
    assert out.shape == array.shape
    lost = changed = zero = 0
    for value, got in zip(wide(array).ravel().tolist(), wide(out).ravel().tolist(), strict=True):
        want = rounded(value, target)
        if want is None:
            assert not np.isfinite(got), (value, got)
            lost += 1
        else:
            assert Fraction(got) == want, (value, got, want)
            zero += got == 0 and value != 0
            changed += got != 0 and got != value
    assert (count.overflowed, count.flushed) == (lost, zero)
    assert changed <= count.rounded <= changed + int(np.count_nonzero(wide(array) == 0))
    assert count.total == array.size


@pytest.mark.parametrize("target", NARROW)
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
def test_every_value_and_every_tie_is_rounded_as_rationals_say(source, target):
    """All values of the target, the points half way between neighbours, and the nearest floats beside those."""
    values = np.array([float(v) for v in grid(target)[0]])
    if len(values) > 4000:
        values = np.concatenate(
            [values[:500], values[-500:], values[len(values) // 2 - 1000 : len(values) // 2 + 1000]]
        )
    middle = (values[1:] + values[:-1]) / 2
    beyond = [values[-1] * 1.01, values[-1] + (values[-1] - values[-2]) / 2, values[-1] * 2, values[0] * 2]
    points = np.concatenate(
        [values, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), np.array(beyond)]
    )
    with np.errstate(all="ignore"):
        array = points.astype(numpy_dtype(source))
    check(array[np.isfinite(wide(array))], target)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8), st.sampled_from(NARROW))
def test_float64_is_rounded_once(values, target):
    check(np.array(values), target)


def test_float64_to_float32_is_numpys():
    array = codes("float64")
    out, count = cast_array(array, "float32", "propagate")
    with np.errstate(all="ignore"):
        want = array.astype(np.float32)
    finite = ~np.isnan(array)
    assert np.array_equal(out[finite].view(np.uint32), want[finite].view(np.uint32))
    assert np.isnan(out[~finite]).all()
    assert count.overflowed == np.count_nonzero(np.isfinite(array) & np.isinf(want))


@pytest.mark.parametrize(
    ("source", "target"), [(s, t) for s in ("float32", "float16", "bfloat16") for t in NARROW if s != t]
)
def test_agrees_with_ml_dtypes(source, target):
    array = codes(source)
    with np.errstate(all="ignore"):
        want = array.astype(numpy_dtype(target))
    out, _ = cast_array(array, target, "propagate")
    same = ~np.isnan(wide(array))
    raw = BITS[DTYPES[target][0]]
    assert np.array_equal(out[same].view(raw), want[same].view(raw))
    assert np.isnan(wide(out[~same])).all()


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"])
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
def test_agrees_with_torch_in_range(source, target):
    array = codes(source)
    values = wide(array)
    top = float(ml_dtypes.finfo(numpy_dtype(target)).max)
    array = array[np.isfinite(values) & (np.abs(values) <= top)]
    if source == "float64" and target not in ("float32",):
        # torch rounds float64 to float32 first; values that float32 holds agree.
        array = array.astype(np.float32).astype(np.float64)
        array = array[np.abs(array) <= top]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[array.dtype.itemsize]
    raw = array.view({2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize])
    tensor = torch.from_numpy(raw.copy()).to(bits).view(getattr(torch, source))
    want = tensor.to(getattr(torch, target))
    back = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[numpy_dtype(target).itemsize]
    out, _ = cast_array(array, target)
    assert np.array_equal(
        out.view({1: np.uint8, 2: np.int16, 4: np.int32}[out.dtype.itemsize]), want.view(back).numpy()
    )


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", ALL)
def test_wider_and_back_keeps_every_bit(source, target):
    """`widens` says yes exactly where it does, over every value of the type (a sample for the wide ones)."""
    array = codes(source)
    if target == POWERS and source != POWERS:
        with pytest.raises(PlanError, match="not powers of two"):
            cast_array(array, target)
        assert not widens(source, target)
        return
    out, count = cast_array(array, target, "propagate")
    back, _ = cast_array(out, source, "propagate") if source != POWERS or target == source else (None, None)
    if source == POWERS and target != source:
        values = wide(out)
        fits = np.array_equal(values, wide(array), equal_nan=True)
        assert widens(source, target) == fits
        return
    raw = BITS[DTYPES[source][0]]
    same = np.array_equal(back.view(raw), array.view(raw))
    assert widens(source, target) == same
    if same:
        assert count == CastCount(total=array.size)


def test_powers_of_two_cast_to_the_type_of_scales_and_back():
    array = codes(POWERS)
    for name in ("float32", "bfloat16", "float64"):
        out, _ = cast_array(array, name)
        back, count = cast_array(out, POWERS)
        assert np.array_equal(back.view(np.uint8), array.view(np.uint8))
        assert count.rounded == count.flushed == count.overflowed == 0
    for value in (0.0, -1.0, 3.0, np.inf, 2.0**128):
        with pytest.raises(PlanError, match="not powers of two"):
            cast_array(np.array([1.0, value]), POWERS, "saturate")


def test_overflow_is_an_error_unless_it_is_to_saturate():
    array = np.array([1.0, 500.0, -500.0, 448.0, 464.0, np.inf, np.nan, 1e-9], np.float32)
    with pytest.raises(PlanError, match="3 of 8 values do not fit float8_e4m3fn") as error:
        cast_array(array, "float8_e4m3fn")
    assert "saturate" in str(error.value)
    out, count = cast_array(array, "float8_e4m3fn", "saturate")
    assert wide(out)[:6].tolist() == [1, 448, -448, 448, 448, 448]
    assert np.isnan(wide(out)[6])
    assert count == CastCount(total=8, rounded=1, flushed=1, overflowed=3, change=1.0)
    out, count = cast_array(array, "float8_e4m3fn", "propagate")
    assert np.isnan(wide(out)[[1, 2, 5]]).all()
    out, count = cast_array(array[:6], "float16")
    assert np.isinf(out[5])
    assert count.overflowed == 0


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "bfloat16"), ("float16", "float8_e5m2"), ("float64", "float16")]
)
@given(values=st.lists(st.floats(-60_000, 60_000, allow_subnormal=True), max_size=40))
def test_the_largest_change_is_relative_to_each_value(source, target, values):
    array = np.array([*values, 0.0, -0.0, np.nan, 1.25], source)
    out, count = cast_array(array, target, "saturate")
    old, new = wide(array), wide(out)
    told = [abs(b - a) / abs(a) for a, b in zip(old, new, strict=True) if a != 0 and np.isfinite(a)]
    assert count.change == pytest.approx(max(told), rel=1e-5)
    assert (count.change == 0) == (count.rounded == count.flushed == count.overflowed == 0)
    assert (cast_array(array, source)[1] + count).change == count.change
    assert cast_array(array[:0], target)[1].change == 0


def test_a_zero_that_loses_its_sign_counts():
    out, count = cast_array(np.array([-0.0, 0.0], np.float32), "float8_e4m3fnuz")
    assert wide(out).tolist() == [0, 0]
    assert count.rounded == 1
    assert cast_array(np.array([-0.0], np.float32), "float16")[1].rounded == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
@pytest.mark.parametrize(
    ("source", "target"), [("float64", "bfloat16"), ("float32", "float16"), ("float16", "float32")]
)
def test_shapes_and_strides(shape, source, target):
    array = np.full(shape, np.nan, numpy_dtype(source))
    out, count = cast_array(array, target)
    assert out.shape == shape
    assert count.total == array.size
    turned = np.arange(24, dtype=numpy_dtype(source)).reshape(2, 3, 4).T[::-1]
    assert np.array_equal(wide(cast_array(turned, target)[0]), wide(turned))


def test_the_op_refuses_what_is_no_cast():
    for source, target, spec in (
        ("int64", "float32", TensorSpec((2,), "int64")),
        ("float32", "int8", TensorSpec((2,), "float32")),
        ("float32", "float4_e2m1fn", TensorSpec((2,), "float32")),
        ("float32", "float16", TensorSpec((2,), "float64")),
    ):
        with pytest.raises(LayoutError):
            Cast(source, target).infer((spec,))
    op = Cast("float32", "float16")
    assert op.infer((TensorSpec((2, 3), "float32"),)) == (TensorSpec((2, 3), "float16"),)
    assert op.inverse.inverse == op
    assert not op.exact
    assert op.inverse.exact
