"""Surgery values: each against its definition, in the leaf's own dtype, or an error that says why not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import graftax as gx
from graftax.errors import PlanError, UsageError
from graftax.ops import same_bits
from graftax.surgery.values import random_key
from graftax.tree import DTYPES, TensorSpec
from graftax.tree.dtypes import numpy_dtype, spec_of

FLOATS = [name for name, (bits, kind) in DTYPES.items() if kind == "f" and bits >= 8 and name != "float8_e8m0fnu"]
INTS = [name for name, (bits, kind) in DTYPES.items() if kind in "iu" and bits >= 8]


def array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(numpy_dtype(dtype))


def put(value, old: np.ndarray, path: str = "params/Dense_0/kernel") -> np.ndarray:
    before = old.copy()
    out = value.apply(path, spec_of(old), old)
    assert spec_of(out) == spec_of(old)
    assert same_bits(old, before)
    assert not np.shares_memory(out, old)
    return out


# ---------------------------------------------------------------- constant


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [0.5, -2, 0.1, True, 0.0, -0.0])
def test_constant_rounds_to_a_floating_leaf(dtype: str, number: float) -> None:
    out = put(gx.constant(number), array((3, 5), dtype))
    assert same_bits(out, np.full((3, 5), np.asarray(float(number)).astype(numpy_dtype(dtype))))


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (1e39, "float32"),
        (70000, "float16"),
        (-1e39, "bfloat16"),
        (500, "float8_e4m3fn"),
        (float("inf"), "float8_e4m3fn"),
        (1e-50, "float32"),
        (1e-9, "float16"),
        (10**400, "float64"),
        (0, "float8_e8m0fnu"),
        (-1, "float8_e8m0fnu"),
        (0.5, "int32"),
        (float("nan"), "int32"),
        (128, "int8"),
        (-1, "uint8"),
        (2**31, "int32"),
        (2**64, "uint64"),
        (-(2**63) - 1, "int64"),
        (2, "bool"),
        (0.5, "bool"),
        (1 + 2j, "float32"),
        (1e39, "complex64"),
        (1j, "int32"),
    ],
)
def test_constant_refuses_what_the_dtype_does_not_have(number, dtype: str) -> None:
    with pytest.raises(
        PlanError, match="boolean" if dtype == "bool" else "overflows" if dtype == "complex64" else dtype
    ) as caught:
        gx.constant(number).apply("p", TensorSpec((2,), dtype), None)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("number", "dtype", "expected"),
    [
        (2**63 - 1, "int64", 2**63 - 1),
        (-(2**63), "int64", -(2**63)),
        (2**64 - 1, "uint64", 2**64 - 1),
        (3.0, "int8", 3),
        (True, "int32", 1),
        (1, "bool", True),
        (0.0, "bool", False),
        (1 + 2j, "complex64", 1 + 2j),
        (2, "complex128", 2),
        (2 + 0j, "float32", 2),
        (float("inf"), "float32", np.inf),
        (448, "float8_e4m3fn", 448),
        (4, "float8_e8m0fnu", 4),
    ],
)
def test_constant_is_exact_where_it_can_be(number, dtype: str, expected) -> None:
    out = gx.constant(number).apply("p", TensorSpec((2, 1), dtype), None)
    assert out.dtype == numpy_dtype(dtype)
    assert out.shape == (2, 1)
    assert out[0, 0] == expected
    assert out[1, 0] == expected


def test_constant_nan_is_nan() -> None:
    for dtype in FLOATS:
        assert np.isnan(gx.constant(float("nan")).apply("p", TensorSpec((2,), dtype), None).astype(float)).all()


@pytest.mark.parametrize(
    "number",
    [0.25, np.float32(0.25), np.float64(0.25), ml_dtypes.bfloat16(0.25), np.array(0.25), np.array(0.25, "float16")],
    ids=lambda n: type(n).__name__,
)
def test_constant_takes_any_kind_of_number(number) -> None:
    assert gx.constant(number) == gx.constant(0.25)


def test_constant_takes_framework_scalars() -> None:
    import jax.numpy as jnp
    import torch

    assert gx.constant(jnp.float32(0.25)) == gx.constant(0.25)
    assert gx.constant(jnp.bfloat16(0.25)) == gx.constant(0.25)
    assert gx.constant(torch.tensor(0.25, requires_grad=True)) == gx.constant(0.25)
    assert gx.constant(np.int64(2**63 - 1)).value == 2**63 - 1


@pytest.mark.parametrize("number", ["0.5", None, [1.0], np.ones(1), np.ones((2, 2)), object()])
def test_constant_takes_one_number_only(number) -> None:
    with pytest.raises(UsageError, match="one number"):
        gx.constant(number)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, "bool", "complex64"])
def test_zeros(dtype: str) -> None:
    assert same_bits(put(gx.zeros(), array((2, 3), "float32").astype(numpy_dtype(dtype))), np.zeros((2, 3), dtype))


@pytest.mark.parametrize("value", [gx.constant(1), gx.zeros(), gx.normal(1, 0), gx.scaled(2), gx.quantized(4)], ids=str)
def test_packed_leaves_move_only_as_they_are(value) -> None:
    with pytest.raises(PlanError, match="int4"):
        value.apply("p", TensorSpec((4,), "int4"), np.zeros(2, np.uint8))


# ---------------------------------------------------------------- normal


def test_normal_is_standard_and_deterministic() -> None:
    old = array((400, 300), "float32")
    out = put(gx.normal(0.02, 7), old)
    assert abs(out.mean()) < 3 * 0.02 / np.sqrt(out.size)
    assert abs(out.std() / 0.02 - 1) < 0.01
    assert same_bits(out, put(gx.normal(0.02, 7), old * 0))
    assert not same_bits(out, put(gx.normal(0.02, 8), old))
    assert not same_bits(out, put(gx.normal(0.02, 7), old, "params/Dense_1/kernel"))


def test_normal_numbers_of_one_leaf_are_these() -> None:
    """Pinned: the key derivation, Philox and the ziggurat of NumPy's Generator. A change of one breaks other people's
    experiments and must be noticed."""
    assert random_key(7, "params/Dense_0/kernel") == PINNED_KEY
    out = gx.normal(1.0, 7).apply("params/Dense_0/kernel", TensorSpec((4,), "float64"), None)
    np.testing.assert_array_equal(out, PINNED)


PINNED_KEY = 336151618335855295668652244708414978783
PINNED = [-2.1996363133028587, -0.037169621184212714, -0.7010501823468637, -0.8637794624664348]


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_is_drawn_in_float64_and_rounded_once(dtype: str) -> None:
    wide = put(gx.normal(0.5, 3), array((40, 30), "float64"))
    out = put(gx.normal(0.5, 3), array((40, 30), dtype))
    error = np.abs(out.astype(np.float64) - wide)
    step = np.maximum(np.abs(wide) * 2.0 ** -(ml_dtypes.finfo(numpy_dtype(dtype)).nmant + 1), 0)
    tiny = float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_subnormal) / 2
    assert (error <= np.maximum(step, tiny) * (1 + 1e-12)).all()


def test_normal_does_not_depend_on_the_size_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = put(gx.normal(1, 1), array((50, 3), "float32"))
    monkeypatch.setattr("graftax.surgery.values.base.NEAR", 7)
    assert same_bits(whole, put(gx.normal(1, 1), array((50, 3), "float32")))
    assert same_bits(whole[:10], put(gx.normal(1, 1), array((10, 3), "float32")))  # one stream, cut sooner


def test_normal_of_zero_stddev_is_zero() -> None:
    assert not put(gx.normal(0, 1), array((5,), "bfloat16")).astype(float).any()


def test_add_normal_adds_what_normal_draws() -> None:
    old = array((20, 30), "float32")
    noise = put(gx.normal(0.1, 5), old.astype(np.float64))
    assert same_bits(put(gx.add_normal(0.1, 5), old), (old.astype(np.float64) + noise).astype(np.float32))
    assert same_bits(put(gx.add_normal(0.0, 5), old), old)


def test_values_of_the_old_leaf_take_any_strides() -> None:
    old = array((6, 8), "float32").T[::2]
    for value in (gx.add_normal(0.1, 0), gx.scaled(3), gx.quantized(4), gx.quantized(4, axis=0)):
        assert same_bits(put(value, old), put(value, np.ascontiguousarray(old)))


# ---------------------------------------------------------------- scaled


def test_scaled() -> None:
    old = array((20, 30), "bfloat16")
    assert same_bits(put(gx.scaled(0.1), old), (old.astype(np.float64) * 0.1).astype(np.float32).astype(old.dtype))
    assert same_bits(put(gx.scaled(1), old), old)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_side=5), elements=st.floats(width=32)),
    st.integers(-20, 20),
)
def test_scaled_by_a_power_of_two_comes_back(old: np.ndarray, power: int) -> None:
    kept = (np.abs(old) > 1e-30) & (np.abs(old) < 1e30) | (old == 0) | ~np.isfinite(old)
    old = np.where(kept, old, np.float32(1))
    there = put(gx.scaled(2.0**power), old)
    np.testing.assert_array_equal(put(gx.scaled(2.0**-power), there), old)


@pytest.mark.parametrize("value", [gx.scaled(1e10), gx.add_normal(1e38, 0), gx.normal(1e39, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overflow_is_an_error(value, dtype: str) -> None:
    with pytest.raises(PlanError, match=f"overflow {dtype}"):
        value.apply("p", TensorSpec((1000,), dtype), np.full(1000, 3e38).astype(numpy_dtype(dtype)))


def test_overflow_of_float64_itself_is_an_error() -> None:
    with pytest.raises(PlanError, match="1 of 2 values overflow float64"):
        gx.scaled(10).apply("p", TensorSpec((2,), "float64"), np.array([1e308, 1.0]))


def test_nan_and_infinity_stay() -> None:
    old = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    for value in (gx.scaled(2), gx.add_normal(0.1, 0)):
        np.testing.assert_array_equal(put(value, old)[:3], old[:3])


# ---------------------------------------------------------------- quantized


def reference(old: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The textbook: a scale per channel, codes, and back."""
    wide = old.astype(np.float64)
    axes = tuple(a for a in range(old.ndim) if a != axis % old.ndim)
    scale = np.abs(wide).max(axis=axes, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(wide / np.where(scale, scale, 1)) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_quantized_is_the_textbook(bits: int, axis: int, dtype: str) -> None:
    old = array((4, 5, 6), dtype)
    out = put(gx.quantized(bits, axis), old)
    expected = reference(old, bits, axis)
    eps = float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=eps, atol=1e-14)
    channels = np.moveaxis(out, axis, 0)
    assert max(len(np.unique(np.abs(c.astype(np.float64)))) for c in channels) <= 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_float64_keeps_its_scale(bits: int) -> None:
    """The largest value stays bit for bit, so a second time changes nothing."""
    old = np.random.default_rng(0).normal(size=(12, 40))
    once = put(gx.quantized(bits), old)
    np.testing.assert_array_equal(np.abs(once).max(0), np.abs(old).max(0))
    np.testing.assert_array_equal(put(gx.quantized(bits), once), once)


def test_quantized_rounds_halves_to_even() -> None:
    old = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]], np.float32)
    np.testing.assert_array_equal(put(gx.quantized(8, axis=0), old), [[0, 2, 2, -0.0, -2, 127]])


def test_quantized_keeps_zero_channels_and_the_largest_value() -> None:
    old = array((7, 5), "float32")
    old[:, 2] = 0
    out = put(gx.quantized(4), old)
    assert not out[:, 2].any()
    top = np.abs(old).argmax(axis=0)
    np.testing.assert_array_equal(out[top, range(5)], old[top, range(5)])


@pytest.mark.parametrize("scale", [1e-300, 5e-324, 1e300, 1.7e308])
def test_quantized_keeps_its_head_at_the_ends_of_float64(scale: float) -> None:
    old = np.array([[1.0, 0.5, 0.25, -1.0]]) * scale
    out = put(gx.quantized(8, axis=0), old)
    assert out[0, 0] == old[0, 0]
    assert out[0, 3] == old[0, 3]
    np.testing.assert_allclose(out, old, atol=scale / 100 if scale > 1e-320 else 5e-324)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.integers(2, 8),
    st.data(),
)
def test_quantized_twice_is_quantized_once(old: np.ndarray, bits: int, data: st.DataObject) -> None:
    old[np.abs(old) < 1e-30] = 0
    axis = data.draw(st.integers(-old.ndim, old.ndim - 1))
    once = put(gx.quantized(bits, axis), old)
    np.testing.assert_array_equal(put(gx.quantized(bits, axis), once), once)
    half_step = np.abs(old.astype(np.float64)).max(initial=0) / (2 ** (bits - 1) - 1) / 2
    assert (np.abs(once.astype(np.float64) - old) <= half_step * (1 + 1e-6)).all()


def test_quantized_does_not_depend_on_the_size_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    old = array((13, 4, 3), "float32")
    whole = [put(gx.quantized(4, axis), old) for axis in range(3)]
    monkeypatch.setattr("graftax.surgery.values.base.NEAR", 25)
    assert all(same_bits(a, put(gx.quantized(4, axis), old)) for axis, a in enumerate(whole))


@pytest.mark.parametrize(
    ("old", "axis", "message"),
    [
        (np.array([[1, np.nan]], np.float32), -1, "NaN or infinity"),
        (np.array([[1, np.inf]], np.float32), 0, "NaN or infinity"),
        (np.ones((), np.float32), -1, "no axis -1"),
        (np.ones((2, 2), np.float32), 2, "no axis 2"),
    ],
)
def test_quantized_refuses(old: np.ndarray, axis: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gx.quantized(8, axis).apply("p", spec_of(old), old)


def test_quantized_takes_an_empty_leaf() -> None:
    for shape in [(0, 3), (3, 0), (0,)]:
        assert put(gx.quantized(8), np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 3, 2), r"axis=0, 4 scales .*axis=-1, 2 scales"),  # a torch Conv1d, a stack of layers
        ((1, 3, 3, 7), r"axis=0, 1 scale .*axis=-1, 7 scales"),
        ((5,), "each of its 5 values, which changes nothing"),
    ],
)
def test_quantized_asks_for_the_axis_of_what_is_no_matrix(shape: tuple[int, ...], words: str) -> None:
    old = array(shape, "float32")
    with pytest.raises(PlanError, match=words):
        put(gx.quantized(4), old)
    assert same_bits(
        put(gx.quantized(4), old.reshape(-1, shape[-1])), put(gx.quantized(4, -1), old).reshape(-1, shape[-1])
    )
    for axis in range(len(shape)):
        assert put(gx.quantized(4, axis=axis), old).shape == shape


@pytest.mark.parametrize("dtype", [*INTS, "bool", "complex64"])
@pytest.mark.parametrize("value", [gx.normal(1, 0), gx.add_normal(1, 0), gx.scaled(2), gx.quantized(8)], ids=str)
def test_arithmetic_is_for_floating_leaves(value, dtype: str) -> None:
    with pytest.raises(PlanError, match=f"{dtype}, not floating"):
        value.apply("p", TensorSpec((3,), dtype), np.ones(3, dtype))


@pytest.mark.parametrize(
    "make",
    [
        lambda: gx.normal(-1, 0),
        lambda: gx.normal(float("nan"), 0),
        lambda: gx.normal("1", 0),
        lambda: gx.normal(1, 0.5),
        lambda: gx.normal(1, True),
        lambda: gx.add_normal(1, None),
        lambda: gx.scaled(float("inf")),
        lambda: gx.scaled(1j),
        lambda: gx.scaled(np.ones(2)),
        lambda: gx.quantized(1),
        lambda: gx.quantized(17),
        lambda: gx.quantized(4.0),
        lambda: gx.quantized(8, axis="o"),
        lambda: gx.from_checkpoint("a.pt", "w", "diagonal"),
        lambda: gx.from_checkpoint("a.pt", 3),
    ],
)
def test_arguments_are_checked_when_the_value_is_made(make) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.exit_code == 2


def test_values_are_data() -> None:
    assert gx.normal(0.02, 7) == gx.normal(0.02, 7)
    assert hash(gx.quantized(4, axis=(-1,))) == hash(gx.quantized(4, axis=-1))
    assert gx.normal(np.float32(0.5), np.int64(7)).text == "normal(0.5, seed=7)"
    with pytest.raises(AttributeError):
        gx.scaled(2).factor = 3


# ---------------------------------------------------------------- mean, mix, rounded, relative noise


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_mean_is_the_exact_mean_rounded_once(dtype: str) -> None:
    old = array((7, 11), dtype)
    exact = float(sum(Fraction(float(v)) for v in old.reshape(-1)) / old.size)
    out = put(gx.mean(), old)
    assert np.unique(out.astype(np.float64)).size == 1
    wanted = np.asarray(exact).astype(numpy_dtype(dtype)).astype(np.float64)
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=1e-14 if dtype == "float64" else 0)


def test_mean_does_not_depend_on_the_size_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    old = array((64, 33), "float32")
    whole = [put(value, old) for value in (gx.mean(), gx.add_normal(0.1, 0, relative=True))]
    monkeypatch.setattr("graftax.surgery.values.base.PIECE", 256)
    assert all(same_bits(a, put(v, old)) for a, v in zip(whole, (gx.mean(), gx.add_normal(0.1, 0, True)), strict=True))


def test_relative_noise_counts_in_standard_deviations() -> None:
    old = array((20, 30), "float32") * np.float32(7) + np.float32(100)
    spread = old.astype(np.float64).std()
    relative, absolute = put(gx.add_normal(0.1, 5, relative=True), old), put(gx.add_normal(0.1 * spread, 5), old)
    np.testing.assert_allclose(relative, absolute, rtol=1e-6)
    np.testing.assert_allclose(put(gx.add_normal(0.1, 5, relative=True), old * 4), relative * 4, rtol=1e-6)
    flat = np.full(5, 3, np.float32)
    assert same_bits(put(gx.add_normal(0.1, 5, relative=True), flat), flat)
    assert gx.add_normal(0.1, 5, relative=True).text == "add_normal(0.1, seed=5, relative=True)"


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(width=32)),
    st.one_of(st.just(0.0), st.just(1.0), st.floats(-3, 3)),
)
def test_mix_is_exact_at_its_ends_and_linear_between(both: np.ndarray, t: float) -> None:
    old, donor = both
    if t in (0, 1) or same_bits(old, donor):
        assert same_bits(put(gx.mix(donor, t), old), donor if t == 1 else old)
        return
    small = np.isfinite(both).all(0) & (np.abs(both) < 1e30).all(0)
    old, donor = np.where(small, both, np.float32(1))
    wide = old.astype(np.float64)
    np.testing.assert_array_equal(
        put(gx.mix(donor, t), old), (wide + t * (donor.astype(np.float64) - wide)).astype(np.float32)
    )
    assert same_bits(put(gx.mix(old, t), old), old)


def test_mix_takes_a_tree_a_file_or_a_laid_out_donor(tmp_path: Path) -> None:
    import torch

    tree = {"fc": {"kernel": array((2, 3), "float32"), "bias": array((3,), "float32", 1)}}
    other = {"fc": {"kernel": array((2, 3), "float32", 2), "bias": array((3,), "float32", 3)}}
    np.savez(tmp_path / "other.npz", **{f"fc/{name}": value for name, value in other["fc"].items()})
    for donor in (other, tmp_path / "other.npz", gx.from_checkpoint(other)):
        out = gx.replace(tree, "fc/*", gx.mix(donor, 1))
        assert all(same_bits(out["fc"][name], other["fc"][name]) for name in other["fc"])
    laid = gx.from_checkpoint({"w.weight": torch.tensor(other["fc"]["kernel"].T.copy())}, "w.weight")
    assert same_bits(gx.replace(tree, "fc/kernel", gx.mix(laid, 1))["fc"]["kernel"], other["fc"]["kernel"])
    for donor, words in (
        (np.ones((3, 2), "f4"), "shape"),
        (np.ones((2, 3)), "dtype"),
        ({"a": np.ones(2), "b": np.ones(2)}, "none"),
    ):
        with pytest.raises(PlanError, match=words):
            gx.replace(tree, "fc/kernel", gx.mix(donor, 0))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_rounded_is_there_and_back(dtype: str) -> None:
    old = array((20, 30), "float32")
    out = put(gx.rounded(dtype), old)
    assert same_bits(out, old.astype(numpy_dtype(dtype)).astype(np.float32))
    assert same_bits(put(gx.rounded(dtype), out), out)


@pytest.mark.parametrize("given_as", ["bfloat16", ml_dtypes.bfloat16, np.dtype("bfloat16"), "jax", "torch"])
def test_rounded_takes_any_name_of_a_dtype(given_as) -> None:
    import jax.numpy as jnp
    import torch

    named = {"jax": jnp.bfloat16, "torch": torch.bfloat16}
    assert gx.rounded(named.get(given_as, given_as) if isinstance(given_as, str) else given_as) == gx.rounded(
        "bfloat16"
    )


@pytest.mark.parametrize(
    ("value", "old", "words"),
    [
        (gx.rounded("float16"), np.array([1, 70000], "f4"), "1 of 2 values overflow float16"),
        (gx.rounded("float8_e4m3fn"), np.array([1, np.inf], "f4"), "1 of 2 values overflow float8_e4m3fn"),
        (gx.rounded("float32"), np.ones(2, "f4"), "nothing would change"),
        (gx.rounded("float32"), np.ones(2, ml_dtypes.bfloat16), "nothing would change"),
        (gx.mean(), np.array([1, np.nan], "f4"), "no mean"),
        (gx.mean(), np.array([1.5e308, 1.5e308]), "overflows float64"),
        (gx.mean(), np.ones(2, "i4"), "int32, not floating"),
        (gx.mix(np.ones(2, "i4"), 1), np.ones(2, "i4"), "int32, not floating"),
        (gx.rounded("float16"), np.ones(2, "i4"), "int32, not floating"),
        (gx.add_normal(1, 0, relative=True), np.array([1, np.inf], "f4"), "no standard deviation"),
        (gx.mix(np.full(2, -3e38, "f4"), 2.0), np.full(2, 3e38, "f4"), "2 of 2 values overflow float32"),
    ],
)
def test_new_values_refuse(value, old: np.ndarray, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        value.apply("p", spec_of(old), old)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gx.rounded("float32x"),
        lambda: gx.rounded("int8"),
        lambda: gx.rounded("float64"),
        lambda: gx.mix(None, 1),
        lambda: gx.mix(3.0, 1),
        lambda: gx.mix(gx.zeros(), 1),
        lambda: gx.mix(np.ones(2), float("nan")),
    ],
)
def test_arguments_of_new_values_are_checked(make) -> None:
    with pytest.raises(UsageError):
        make()


def test_a_function_of_path_and_leaf() -> None:
    tree = {"a": {"kernel": np.ones(2, "f4")}, "b": {"kernel": np.ones(2, "f4")}}
    out = gx.replace(tree, "**/kernel", lambda path, leaf: leaf * np.float32(ord(path[0])))
    assert (out["a"]["kernel"][0], out["b"]["kernel"][0]) == (97, 98)
    k = np.float32(3)
    assert gx.replace(tree, "a/kernel", lambda old, k=k: old * k)["a"]["kernel"][0] == 3
    with pytest.raises(UsageError, match=r"takes neither \(leaf\) nor \(path, leaf\)"):
        gx.replace(tree, "a/kernel", lambda a, b, c: a)
    with pytest.raises(ZeroDivisionError) as caught:
        gx.replace(tree, "a/kernel", lambda path, leaf: 1 / 0)
    assert any("a/kernel" in note for note in caught.value.__notes__)


# ---------------------------------------------------------------- closed forms of a linear net


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(-4, 4), st.integers(1, 6), st.integers(1, 6))
def test_what_edits_do_to_a_linear_net(seed: int, c: float, into: int, out: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, into))
    tree = {"kernel": np.random.default_rng(seed + 1).standard_normal((into, out))}
    run = lambda value: x @ gx.replace(tree, "kernel", value)["kernel"]  # noqa: E731
    base = x @ tree["kernel"]
    filled = run(gx.constant(c if abs(c) > 1e-300 else 0.0))
    np.testing.assert_allclose(filled, np.broadcast_to(filled[:, :1], filled.shape), atol=1e-12)  # columns alike
    np.testing.assert_allclose(filled[:, 0], c * x.sum(1), atol=1e-12)
    for own in (gx.mix(tree, c), gx.scaled(1), gx.add_normal(0, 0), lambda leaf: leaf, tree["kernel"]):
        np.testing.assert_array_equal(run(own), base)  # its own value shifts nothing
    once, thrice = (run(gx.add_normal(stddev, 7)) - base for stddev in (0.5, 1.5))
    np.testing.assert_allclose(thrice, 3 * once, atol=1e-10)  # noise scales linearly
    np.testing.assert_allclose(run(gx.mix({"kernel": tree["kernel"] * 2}, c)), (1 + c) * base, atol=1e-10)
