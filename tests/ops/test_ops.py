"""Every op: real shapes are inferred ones, exact ops give back every bit, inverses of inverses and JSON round trips;
what does not fit is refused before anything moves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax import ops
from graftax.errors import GraftaxError, LayoutError, PlanError, RulesError
from graftax.ops import (
    OPS,
    Cast,
    Concat,
    Copy,
    Crop,
    Drop,
    Fill,
    Flip,
    FoldWeightNorm,
    Keep,
    Offset,
    Op,
    Pad,
    Rearrange,
    RearrangeEach,
    Reorder,
    Repeat,
    RequireZero,
    Same,
    Scale,
    SpectralSigma,
    SpectralVector,
    Split,
    Stack,
    Sum,
    UnfoldWeightNorm,
    Unrepeat,
    Unstack,
    Unsum,
    apply_chain,
    bind_chain,
    chain_text,
    infer_chain,
    invert_chain,
    op_from_json,
    op_to_json,
    parse_pattern,
    same_bits,
    transpose,
)
from graftax.tree import DTYPES, TensorSpec
from graftax.tree.dtypes import numpy_dtype, spec_of

WHOLE = [name for name, (bits, _) in DTYPES.items() if bits >= 8]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
PACKED = [name for name, (bits, _) in DTYPES.items() if bits < 8]


def bits(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Any bits at all: NaN payloads, subnormals, -0.0."""
    if dtype == "bool":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    size = math.prod(shape) * (DTYPES[dtype][0] // 8)
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return raw.view(numpy_dtype(dtype)).reshape(shape) if size else np.empty(shape, numpy_dtype(dtype))


def values(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(numpy_dtype(dtype))


def bound(op: Op, arrays: tuple[Any, ...]) -> Op:
    return bind_chain((op,), tuple(spec_of(a) for a in arrays))[0][0]


def check(op: Op, *arrays: np.ndarray, exact: bool | None = None) -> tuple[np.ndarray, ...]:
    """What holds for every op on arrays that it takes. Returns what it gives."""
    specs = tuple(spec_of(array) for array in arrays)
    before = [array.copy() for array in arrays]
    op = bound(op, arrays)
    inferred = op.infer(specs)
    out = op.apply(tuple(arrays))
    assert tuple(spec_of(array) for array in out) == inferred, op.text
    assert all(same_bits(a, b) for a, b in zip(arrays, before, strict=True)), "the input changed"
    assert op.inverse.inverse == op
    assert op.inverse.infer(inferred) == specs
    data = json.loads(json.dumps(op_to_json(op)))
    assert op_from_json(data) == op
    assert op.text
    if op.exact if exact is None else exact:
        back = op.inverse.apply(out)
        assert len(back) == len(arrays)
        assert all(same_bits(np.asarray(a), b) for a, b in zip(back, arrays, strict=True)), op.text
    return out


DTYPE = st.sampled_from(WHOLE)
SEED = st.integers(0, 2**32 - 1)
EXTENT = st.integers(0, 4)
SHAPE = st.lists(EXTENT, min_size=1, max_size=4).map(tuple)


# ---------------------------------------------------------------- index ops


@st.composite
def rearranged(draw: Any) -> tuple[Rearrange, tuple[int, ...]]:
    """A pattern with groups on both sides, the sizes it needs, and a shape that it takes."""
    count = draw(st.integers(1, 6))
    names = list("abcdef"[:count])
    sizes = dict(zip(names, draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)), strict=True))

    def grouped(order: list[str]) -> list[list[str]]:
        groups: list[list[str]] = []
        for name in order:
            if groups and len(groups[-1]) < 3 and draw(st.booleans()):
                groups[-1].append(name)
            else:
                groups.append([name])
            if draw(st.integers(0, 9)) == 0:
                groups.append(["1"])
        return groups

    left, right = grouped(names), grouped(draw(st.permutations(names)))
    text = [" ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in side) for side in (left, right)]
    shape = tuple(math.prod(sizes.get(name, 1) for name in group) for group in left)
    needed = tuple((name, sizes[name]) for group in left for name in group[1:] if name != "1")
    return Rearrange(f"{text[0]} -> {text[1]}", needed), shape


@settings(deadline=None)
@given(rearranged(), DTYPE, SEED)
def test_rearrange(case, dtype, seed):
    op, shape = case
    array = bits(shape, dtype, seed)
    check(op, array)


@settings(deadline=None, max_examples=50)
@given(rearranged(), SEED)
def test_rearrange_is_einops(case, seed):
    """Against torch.einops-like reference written out: every element is where its named indices say."""
    op, shape = case
    array = np.arange(math.prod(shape)).reshape(shape)
    sizes = bound(op, (array,)).extents(shape)  # type: ignore[attr-defined]
    left, right = parse_pattern(op.pattern)
    (out,) = op.apply((array,))
    names = list(sizes)
    for _ in range(5):
        seed = (seed * 6364136223846793005 + 1) % 2**63
        at = {name: seed // 7 ** (i + 1) % sizes[name] for i, name in enumerate(names)} | {"1": 0}
        place = [0, 0]
        spots: list[list[int]] = [[], []]
        for k, side in enumerate((left, right)):
            for group in side:
                place[k] = 0
                for name in group:
                    place[k] = place[k] * sizes.get(name, 1) + at[name]
                spots[k].append(place[k])
        assert array[tuple(spots[0])] == out[tuple(spots[1])]


def test_rearrange_of_tensors_that_differ_in_one_axis():
    """Grouped heads: h differs from one tensor to the next, d does not."""
    op = Rearrange("(h d) i -> i h d", (("d", 3),))
    out = check(op, bits((12, 5), "float32", 0), bits((6, 5), "float32", 1))
    assert [a.shape for a in out] == [(5, 4, 3), (5, 2, 3)]
    with pytest.raises(LayoutError, match="undecided"):
        Rearrange("i h d -> (h d) i").bind((TensorSpec((5, 4, 3), "int8"), TensorSpec((5, 2, 6), "int8")))


@pytest.mark.parametrize(
    ("pattern", "shape", "out"),
    [("1 -> ", (1,), ()), (" -> 1", (), (1,)), ("1 a 1 -> a", (1, 5, 1), (5,)), ("a -> () a", (5,), (1, 5)),
     ("o i->i o", (2, 3), (3, 2)), ("  o   i -> i   o ", (2, 3), (3, 2)), ("( h  d )i -> i h d", (6, 5), (5, 2, 3))],
)  # fmt: skip
def test_patterns_of_every_writing(pattern, shape, out):
    op = Rearrange(pattern, (("h", 2),) if "h" in pattern else ())
    assert check(op, bits(shape, "int64", 0))[0].shape == out
    assert "  " not in op.pattern.strip()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("o i", "axes -> axes"), ("o i -> i", "one side only"), ("o o -> o", "twice"), ("(o i -> i o", "not closed"),
     ("o i) -> i o", "not an axis name"), ("o -i -> o", "not an axis name"), ("((o) i) -> o i", "not an axis name")],
)  # fmt: skip
def test_what_is_no_pattern(pattern, said):
    with pytest.raises(RulesError, match=said.replace("(", r"\(")):
        Rearrange(pattern)


@pytest.mark.parametrize(
    ("op", "shape", "said"),
    [
        (Rearrange("o i -> i o"), (2, 3, 4), "has 3 axes, not 2"),
        (Rearrange("(h d) i -> i h d"), (6, 5), "needs the size of h"),
        (Rearrange("(h d) i -> i h d", (("h", 4),)), (6, 5), "axis 0 has 6 rows; h=4 x d needs a multiple of 4"),
        (Rearrange("(h d) i -> i h d", (("d", 4), ("h", 4))), (6, 5), "h=4 x d=4 needs a multiple of 16"),
        (Rearrange("1 i -> i"), (2, 5), "axis 0 has 2 rows"),
    ],
)
def test_what_a_pattern_does_not_fit(op, shape, said):
    with pytest.raises(LayoutError, match=said):
        op.infer((TensorSpec(shape, "float32"),))


def test_transpose_reads_as_numpys():
    array = bits((2, 3, 4), "float32", 0)
    for order in ((2, 0, 1), (1, 0, 2), (0, 1, 2)):
        assert np.array_equal(
            transpose(3, order).apply((array,))[0].view(np.uint32), array.transpose(order).view(np.uint32)
        )
    assert transpose(2, (1, 0), "o i").pattern == "o i -> i o"


@settings(deadline=None)
@given(rearranged(), rearranged(), DTYPE, SEED)
def test_rearrange_each(one, other, dtype, seed):
    steps, shapes = zip(one, other, strict=True)
    arrays = [bits(shape, dtype, seed + i) for i, shape in enumerate((*shapes, (2, 3)))]
    op = RearrangeEach((*(o.pattern for o in steps), ""), (*(o.sizes for o in steps), ()))
    out = check(op, *arrays)
    for single, array, made in zip(steps, arrays, out, strict=False):
        assert same_bits(made, single.apply((array,))[0])
    with pytest.raises(LayoutError, match="takes 3 tensors"):
        op.infer(tuple(spec_of(a) for a in arrays[:2]))


@settings(deadline=None)
@given(SHAPE, st.data(), DTYPE, SEED)
def test_split_and_concat(shape, data, dtype, seed):
    axis = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple))
    whole = tuple(sum(sizes) if i == axis else n for i, n in enumerate(shape))
    count = data.draw(st.integers(1, 3))
    arrays = [bits(whole, dtype, seed + i) for i in range(count)]
    parts = check(Split(axis, sizes), *arrays)
    for k, array in enumerate(arrays):
        assert same_bits(np.concatenate(parts[k * len(sizes) : (k + 1) * len(sizes)], axis), array)
    check(Concat(axis, sizes), *parts)


@settings(deadline=None)
@given(SHAPE, st.data(), DTYPE, SEED)
def test_stack_and_unstack(shape, data, dtype, seed):
    axis = data.draw(st.integers(0, len(shape)))
    count, inner = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    arrays = [bits(shape, dtype, seed + i) for i in range(count * inner)]
    out = check(Stack(axis, count), *arrays)
    assert len(out) == inner
    for j in range(inner):
        assert same_bits(out[j], np.stack(arrays[j::inner], axis))
    check(Unstack(axis, count), *out)


@settings(deadline=None)
@given(st.permutations(range(4)), st.integers(1, 2), DTYPE, SEED)
def test_reorder(order, groups, dtype, seed):
    arrays = [bits((2, n + 1), dtype, seed + n) for n in range(4 * groups)]
    out = check(Reorder(tuple(order)), *arrays)
    for place, array in enumerate(out):
        assert same_bits(array, arrays[place // 4 * 4 + order[place % 4]])


def test_unstack_gives_instance_by_instance():
    kernel, bias = bits((3, 4, 5), "float32", 0), bits((3, 5), "float32", 1)
    out = check(Unstack(0, 3), kernel, bias)
    assert [a.shape for a in out] == [(4, 5), (5,)] * 3


@settings(deadline=None)
@given(SHAPE, st.data(), DTYPE, SEED)
def test_flip(shape, data, dtype, seed):
    axes = tuple(data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True)))
    array = bits(shape, dtype, seed)
    (out,) = check(Flip(axes), array)
    assert same_bits(out, np.flip(array, axes))


@settings(deadline=None)
@given(SHAPE, st.data(), DTYPE, SEED)
def test_repeat(shape, data, dtype, seed):
    axis, count = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 4))
    array = bits(shape, dtype, seed)
    (out,) = check(Repeat(axis, count), array)
    assert same_bits(out, np.repeat(array, count, axis))
    check(Unrepeat(axis, count), out)
    if count > 1 and out.size:
        spoilt = out.copy()
        spoilt.reshape(-1).view(np.uint8)[0] ^= 1
        with pytest.raises(PlanError, match="do not repeat"):
            Unrepeat(axis, count).apply((spoilt,))


@settings(deadline=None)
@given(SHAPE, st.data(), DTYPE, SEED)
def test_pad_and_crop(shape, data, dtype, seed):
    axis = data.draw(st.integers(0, len(shape) - 1))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    fill = data.draw(st.sampled_from([0, 1] if dtype != "float8_e8m0fnu" else [1, 0.5]))
    array = bits(shape, dtype, seed)
    (out,) = check(Pad(axis, before, after, fill), array)
    lead = (slice(None),) * axis
    assert same_bits(out[(*lead, slice(before, before + shape[axis]))], array)
    rim = np.concatenate([out[(*lead, slice(0, before))], out[(*lead, slice(before + shape[axis], None))]], axis)
    assert np.array_equal(
        rim.astype(np.float64) if dtype not in ("complex64", "complex128") else rim, np.full(rim.shape, fill)
    )
    check(Crop(axis, before, after, fill), out)
    if before and out.size:
        out[(*lead, 0)] = 0 if fill == 1 and dtype != "float8_e8m0fnu" else 1 if fill == 0 else 2
        with pytest.raises(PlanError, match="would drop rows"):
            Crop(axis, before, after, fill).apply((out,))


def test_crop_does_not_take_minus_zero_for_zero():
    with pytest.raises(PlanError, match="would drop rows"):
        Crop(0, 0, 1).apply((np.array([1.0, -0.0], np.float32),))


@settings(deadline=None)
@given(SHAPE, st.integers(1, 4), DTYPE, SEED)
def test_same_and_copy(shape, count, dtype, seed):
    array = bits(shape, dtype, seed)
    check(Copy(count), array)
    check(Same(count), *[array.copy() for _ in range(count)])
    if count > 1 and array.size:
        other = array.copy()
        other.reshape(-1).view(np.uint8)[-1] ^= 1
        with pytest.raises(PlanError, match="as tied, but their values differ"):
            Same(count).apply((*[array] * (count - 1), other))


def test_require_zero():
    arrays = (bits((4,), "float32", 0), np.array([1, 0, -0.0, 2], np.float32))
    check(RequireZero(1, 0, 1, 3, "why"), *arrays)
    for value in (np.nan, 1e-45, np.inf):
        spoilt = arrays[1].copy()
        spoilt[1] = value
        with pytest.raises(PlanError, match="why"):
            RequireZero(1, 0, 1, 3, "why").apply((arrays[0], spoilt))
    with pytest.raises(PlanError, match="must be zero"):
        RequireZero(0, 0, 0, 1).apply((np.array([1j], np.complex64),))


# ---------------------------------------------------------------- value ops


@settings(deadline=None)
@given(SHAPE, st.sampled_from(FLOATS), SEED, st.integers(-6, 6))
def test_scale_by_a_power_of_two_is_exact_for_normal_values(shape, dtype, seed, power):
    array = values(shape, dtype, seed)
    array = np.where(np.abs(array.astype(np.float64)) < 2**-7, numpy_dtype(dtype).type(1), array)
    (out,) = check(Scale(2.0**power), array, exact=True)
    assert same_bits(out, (array.astype(np.float64) * 2.0**power).astype(numpy_dtype(dtype)))


@settings(deadline=None)
@given(SHAPE, st.sampled_from(FLOATS), SEED, st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3))
def test_scale_and_offset_round_once(shape, dtype, seed, number):
    array = values(shape, dtype, seed)
    wide = array.astype(np.float64)
    for op, want in (
        (Scale(number), wide * number),
        (Scale(number, True), wide / number),
        (Offset(number), wide + number),
    ):
        (out,) = check(op, array)
        nearest = want.astype(numpy_dtype(dtype)).astype(np.float64)
        assert np.abs(out.astype(np.float64) - want).max(initial=0) <= np.abs(nearest - want).max(initial=0)


def test_scale_there_and_back_is_not_always_exact():
    """The reason why value ops are measured: bfloat16 times 3, divided by 3."""
    array = values((1000,), "bfloat16", 0)
    (out,) = Scale(1 / 3).apply((array,))
    (back,) = Scale(1 / 3).inverse.apply((out,))
    assert not same_bits(back, array)
    assert not Scale(1 / 3).exact
    assert not Offset(1.0).exact


@pytest.mark.parametrize("op", [Scale(2.0), Scale(0.5, True), Offset(65000.0), Sum(((0, 1),))])
def test_values_that_overflow_are_an_error(op):
    arrays = (np.array([1, 60000], np.float16),) * (2 if isinstance(op, Sum) else 1)
    with pytest.raises(PlanError, match="do not fit float16"):
        op.apply(arrays)
    wide = (np.array([1e308, 1.0]),) * (2 if isinstance(op, Sum) else 1)
    op = {Scale: Scale(10.0, getattr(op, "divide", False)), Offset: Offset(1.7e308)}.get(type(op), op)
    if not getattr(op, "divide", False):
        with pytest.raises(PlanError, match="no longer finite"):
            op.apply(wide)


def test_infinities_and_nans_pass_value_ops():
    array = np.array([np.inf, -np.inf, np.nan, 1], np.float32)
    assert np.array_equal(Scale(2.0).apply((array,))[0], array * 2, equal_nan=True)


@settings(deadline=None)
@given(SHAPE, st.data(), st.sampled_from(FLOATS), SEED)
def test_sum_and_its_pseudo_inverse(shape, data, dtype, seed):
    order = data.draw(st.permutations(range(5)))
    groups = (tuple(order[:2]), tuple(order[2:3]), tuple(order[3:]))
    arrays = [values(shape, dtype, seed + i) for i in range(5)]
    out = check(Sum(groups), *arrays)
    for group, total in zip(groups, out, strict=True):
        want = sum((arrays[i].astype(np.float64) for i in group), np.zeros(shape))
        assert np.array_equal(total, want.astype(numpy_dtype(dtype)))
    spread = check(Unsum(groups), *out, exact=True)
    assert same_bits(spread[order[0]], out[0])
    assert not spread[order[1]].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weight_norm_is_torchs(axis):
    import torch

    v, g = values((3, 4, 5), "float64", 0), values((3, 4, 5), "float64", 1)
    g = np.abs(g).max(axis=tuple(i for i in range(3) if i != axis), keepdims=True)
    (out,) = check(FoldWeightNorm(axis), g, v)
    want = torch._weight_norm(torch.from_numpy(v), torch.from_numpy(g), axis)
    assert np.allclose(out, want.numpy(), rtol=1e-15, atol=1e-15)
    parts = check(UnfoldWeightNorm(axis), out)
    assert np.allclose(FoldWeightNorm(axis).apply(parts)[0], out, rtol=1e-14)
    assert np.allclose(parts[0], np.abs(g))


@pytest.mark.parametrize("axis", [0, 1])
def test_spectral_norm_of_a_converged_vector(axis):
    w = values((4, 3, 5), "float64", 0)
    flat = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    left, scale, right = np.linalg.svd(flat, full_matrices=False)
    u, v = left[:, 0].copy(), right[0].copy()
    _, _, sigma = check(SpectralSigma(axis), w, u, v)
    assert np.isclose(sigma, scale[0])
    _, _, again = check(SpectralVector(axis), w, u, sigma)
    assert np.allclose(again, v)


@settings(deadline=None)
@given(SHAPE, DTYPE, st.sampled_from([0, 1]))
def test_fill_drop_and_keep(shape, dtype, value):
    value = 1 if dtype == "float8_e8m0fnu" else value
    (out,) = check(Fill(value, shape, dtype, "why"))
    assert np.array_equal(out, np.full(shape, value, numpy_dtype(dtype)))
    check(Drop("gone", fill=value), out, exact=True)
    keep = Keep(shape, dtype)
    assert keep.infer(()) == (TensorSpec(shape, dtype),)
    assert keep.inverse.inverse == keep
    assert op_from_json(json.loads(json.dumps(op_to_json(keep.inverse)))) == keep.inverse
    with pytest.raises(PlanError, match="Give the same like again"):
        keep.apply(())


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_types_move_only_as_they_are(dtype):
    spec = TensorSpec((4, 6), dtype)
    for op in (
        Rearrange("o i -> i o"), Split(0, (2, 2)), Flip((0,)), Repeat(0, 2), Unrepeat(0, 2), Pad(0, 0, 1),
        Crop(0, 0, 1), Unstack(0, 4), RearrangeEach(("o i -> i o",)), Scale(2.0) if spec.floating else Flip((1,)),
        RequireZero(0, 0, 0, 1),
    ):  # fmt: skip
        with pytest.raises(LayoutError):
            op.infer((spec,))
    for op in (Concat(0, (4, 4)), Stack(0, 2)):
        with pytest.raises(LayoutError):
            op.infer((spec, spec))
    assert Copy(2).infer((spec,)) == (spec, spec)
    assert Same(2).infer((spec, spec)) == (spec,)
    (codes,) = Fill(0, (5, 3), dtype).apply(())
    assert codes.dtype == np.uint8
    assert codes.shape == (TensorSpec((5, 3), dtype).nbytes,)
    assert not codes.any()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.5, "int32"), (300, "uint8"), (-1, "uint8"), (2, "bool"), (math.nan, "int8"), (math.inf, "float8_e4m3fn"),
        (1e10, "float16"), (500, "float8_e4m3fn"), (3, "float8_e8m0fnu"), (0, "float8_e8m0fnu"), (1e39, "float32"),
        (2, "float4_e2m1fn"), (8, "int4"),
    ],
)  # fmt: skip
def test_a_fill_that_the_dtype_cannot_hold(value, dtype):
    with pytest.raises(LayoutError, match="cannot hold"):
        Fill(value, (2,), dtype).infer(())
    if DTYPES[dtype][0] >= 8:
        with pytest.raises(LayoutError, match="cannot hold"):
            Pad(0, 0, 1, value).infer((TensorSpec((2,), dtype),))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (math.inf, "float16"),
        (math.nan, "float8_e4m3fn"),
        (0.1, "float16"),
        (-128, "int8"),
        (2**63, "uint64"),
        (1, "bool"),
    ],
)
def test_a_fill_that_it_can(value, dtype):
    (out,) = Fill(value, (2,), dtype).apply(())
    assert Fill(value, (2,), dtype).infer(()) == (spec_of(out),)


# ---------------------------------------------------------------- what does not fit


F = TensorSpec((4, 6), "float32")
WRONG: list[tuple[Op, tuple[TensorSpec, ...]]] = [
    (Split(0, (2, 3)), (F,)), (Split(2, (4,)), (F,)), (Split(0, (5, -1)), (F,)), (Split(-1, (6,)), (F,)),
    (Split(0, ()), (F,)), (Concat(0, (4, 4)), (F,)), (Concat(0, (4, 3)), (F, F)), (Concat(0, ()), (F,)),
    (Concat(0, (4, 4)), (F, TensorSpec((4, 5), "float32"))), (Concat(0, (4, 4)), (F, TensorSpec((4, 6), "int8"))),
    (Concat(5, (4, 4)), (F, F)), (Stack(0, 2), (F,)), (Stack(0, 0), (F,)), (Stack(3, 2), (F, F)),
    (Stack(-1, 2), (F, F)), (Stack(0, 2), (F, TensorSpec((4, 5), "float32"))), (Unstack(0, 3), (F,)),
    (Unstack(2, 4), (F,)), (Flip((2,)), (F,)), (Flip((0, 0)), (F,)), (Repeat(0, 0), (F,)), (Repeat(2, 1), (F,)),
    (Unrepeat(0, 3), (F,)), (Unrepeat(0, 0), (F,)), (Unrepeat(0, -2), (F,)), (Pad(0, -1, 1), (F,)),
    (Pad(2, 0, 1), (F,)), (Reorder((0, 0)), (F, F)), (Reorder(()), (F,)), (Reorder((1, 0)), (F, F, F)),
    (Crop(0, 3, 2), (F,)), (Crop(0, -1, 0), (F,)), (Same(2), (F,)), (Same(2), (F, TensorSpec((4, 6), "int8"))),
    (Copy(2), (F, F)), (Copy(0), (F,)), (RequireZero(1, 0, 0, 1), (F,)), (RequireZero(0, 0, 0, 5), (F,)),
    (RequireZero(0, 0, 3, 2), (F,)), (RequireZero(-1, 0, 0, 1), (F,)), (RequireZero(0, 7, 0, 1), (F,)),
    (Scale(0.0), (F,)), (Scale(math.nan), (F,)), (Scale(2.0), (TensorSpec((2,), "int32"),)), (Offset(math.inf), (F,)),
    (Offset(1.0), (TensorSpec((2,), "int32"),)), (Sum(((0, 1),)), (F,)), (Sum(((0, 0),)), (F, F)),
    (Sum(((0,), ())), (F,)),
    (Sum(((0, 1),)), (F, TensorSpec((4, 6), "float16"))), (Unsum(((0, 1),)), (F, F)), (Unsum(((0, 5),)), (F,)),
    (Unsum(((0,), ())), (F, F)), (FoldWeightNorm(0), (F, F)), (FoldWeightNorm(0), (F,)), (FoldWeightNorm(5), (F, F)),
    (FoldWeightNorm(0), (TensorSpec((4, 1), "float16"), F)), (UnfoldWeightNorm(2), (F,)), (UnfoldWeightNorm(0), (F, F)),
    (SpectralSigma(0), (F, F, F)), (SpectralVector(0), (F, F, F)), (SpectralSigma(0), (F,)),
    (SpectralVector(3), (F, F, F)),
    (Fill(0, (2,), "float32"), (F,)), (Fill(0, (-2,), "float32"), ()), (Keep((2,), "float32"), (F,)), (Drop("x"), ()),
    (Cast("float32", "int8"), (F,)), (Cast("float32", "float9"), (F,)), (Cast("float32", "float16", "wrap"), (F,)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "specs"), WRONG, ids=lambda x: repr(x)[:60])
def test_misfits_are_refused_before_anything_moves(op, specs):
    with pytest.raises(LayoutError):
        op.infer(specs)


def test_an_op_that_is_not_bound_has_no_inverse():
    with pytest.raises(LayoutError, match="not bound"):
        _ = Drop("x").inverse


# ---------------------------------------------------------------- JSON


def test_every_op_is_covered_and_named_once():
    assert set(OPS) == {cls.name for cls in OPS.values()}
    assert set(OPS.values()) == {
        cls for cls in vars(ops).values() if isinstance(cls, type) and hasattr(cls, "inverse")
    } - {Op}


@pytest.mark.parametrize(
    "data",
    [
        {}, {"op": "exec"}, {"op": 3}, {"op": ["split"]}, {"op": "split"}, {"op": "split", "axis": "0", "sizes": [1]},
        {"op": "split", "axis": True, "sizes": [1]}, {"op": "split", "axis": 0, "sizes": 3},
        {"op": "split", "axis": 0, "sizes": [1.5]}, {"op": "split", "axis": 0, "sizes": [[1]]},
        {"op": "split", "axis": 0, "sizes": [1], "more": 2}, {"op": "rearrange", "pattern": 3},
        {"op": "rearrange", "pattern": "o -> i"}, {"op": "rearrange", "pattern": "o i -> i o", "sizes": [["o"]]},
        {"op": "rearrange", "pattern": "o i -> i o", "sizes": [["o", "2"]]}, {"op": "scale", "factor": "2"},
        {"op": "scale", "factor": 2.0, "divide": 1}, {"op": "sum", "groups": [0, 1]}, {"op": "drop", "reason": None},
        {"op": "drop", "reason": "x", "shape": "ab"}, {"op": "rearrange_each", "patterns": "o i -> i o"},
        {"op": "cast", "source": "float32", "target": None}, {"op": "fill", "value": [], "shape": [1], "dtype": "int8"},
    ],
)  # fmt: skip
def test_what_is_no_op(data):
    with pytest.raises(RulesError):
        op_from_json(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["o i -> i o", "int8"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(OPS)), st.data())
def test_hostile_fields_give_an_error_of_ours_or_an_op_that_works(name, data):
    """Whatever a plan file says: refused with a reason, or shapes that are the real ones."""
    import dataclasses

    fields = {f.name: data.draw(JSON) for f in dataclasses.fields(OPS[name])}
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for count in (0, 1, 2):
        try:
            op = op_from_json({"op": name, **fields})
            (op,), specs = bind_chain((op,), (spec_of(array),) * count)
            assert all(n >= 0 for spec in specs for n in spec.shape)
            if sum(spec.size for spec in specs) < 10**6:
                out = op.apply((array,) * count)
                assert [a.shape for a in out] == [s.shape for s in specs]
        except GraftaxError:
            pass


# ---------------------------------------------------------------- chains


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), DTYPE, SEED)
def test_a_chain_inverts(heads, dim, layers, dtype, seed):
    """layers x fused qkv -> three stacked kernels (i, layer, h, d), and back."""
    arrays = tuple(bits((3 * heads * dim, 5), dtype, seed + i) for i in range(layers))
    steps = (Split(0, (heads * dim,) * 3), Rearrange("(h d) i -> i h d", (("h", heads),)), Stack(1, layers))
    specs = tuple(spec_of(a) for a in arrays)
    chain, out = bind_chain(steps, specs)
    assert infer_chain(chain, specs) == out
    made = apply_chain(chain, arrays)
    assert [a.shape for a in made] == [(5, layers, heads, dim)] * 3
    inverse = invert_chain(chain)
    assert invert_chain(inverse) == chain
    assert infer_chain(inverse, out) == specs
    assert all(same_bits(a, b) for a, b in zip(apply_chain(inverse, made), arrays, strict=True))
    assert "then" in chain_text(chain)
    assert chain_text(()) == "as it is"


def test_same_bits():
    nan = np.array([np.nan], np.float32)
    other = nan.copy()
    other.view(np.uint32)[0] ^= 1
    assert same_bits(nan, nan.copy())
    assert not same_bits(nan, other)
    assert not same_bits(np.array([0.0]), np.array([-0.0]))
    assert not same_bits(np.zeros(2), np.zeros((2, 1)))
    assert not same_bits(np.zeros(2, np.float32), np.zeros(2, np.int32))
    turned = np.arange(6.0).reshape(2, 3).T
    assert same_bits(turned, np.ascontiguousarray(turned))
    assert same_bits(np.array(3 + 1j), np.array(3 + 1j))
    assert not same_bits(np.array([1 + 0j]), np.array([1 - 0j]).conj() * 1j)
