"""graftax.examples: the founding exercise against its closed form, and the digits models' promises."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import graftax as gx
from graftax import examples


def closed_form(x: np.ndarray, bias: np.ndarray, value: float) -> np.ndarray:
    """y[n, j] = value * x[n, :].sum() + bias[j], in float64."""
    return float(value) * x.astype(np.float64).sum(axis=1, keepdims=True) + bias.astype(np.float64)[None, :]


SHAPES = [(4, 3, 5), (1, 1, 1), (7, 7, 7), (2, 31, 1), (0, 3, 2)]
"""(N, in_dim, features): distinct, all one, square, one feature, no rows."""
CASES = [(seed, *shape, np.float32) for shape in SHAPES for seed in (0, 2**31 - 1)]
CASES += [(1, 4, 3, 5, dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.int32, np.uint8)]


@pytest.mark.parametrize(("seed", "rows", "in_dim", "features", "dtype"), CASES)
def test_kernel_replace_is_its_closed_form(seed: int, rows: int, in_dim: int, features: int, dtype: type) -> None:
    x = np.random.default_rng(seed).integers(0, 9, (rows, in_dim)).astype(dtype)
    y = examples.kernel_replace(seed, x, features, 0.25)
    assert y.shape == (rows, features)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y), closed_form(x, np.zeros(features), 0.25), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-3, 1e6, 3, np.float32(0.1), np.float64(0.1), True])
def test_kernel_replace_takes_any_number(value: float) -> None:
    x = np.random.default_rng(5).normal(size=(6, 9)).astype(np.float32)
    y = np.asarray(examples.kernel_replace(3, x, 4, value))
    expected = closed_form(x, np.zeros(4), np.float32(value))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * max(1.0, abs(float(value))))


@pytest.mark.parametrize(
    "seed", [7, np.int64(7), np.uint8(7), 7.0, "7", jnp.asarray(7)], ids=lambda s: type(s).__name__
)
def test_kernel_replace_makes_an_int_of_the_seed(seed: object) -> None:
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(examples.kernel_replace(seed, x, 4, 0.5), examples.kernel_replace(7, x, 4, 0.5))


@pytest.mark.parametrize("features", [5.0, np.float32(5), np.int64(5), jnp.asarray(5), jnp.asarray(5.0)])
def test_kernel_replace_makes_an_int_of_features(features: object) -> None:
    x = np.ones((2, 3), np.float32)
    given = examples.kernel_replace(0.0, x, features, 0.5)
    np.testing.assert_array_equal(given, examples.kernel_replace(0, x, 5, 0.5))


@pytest.mark.parametrize(("seed", "features"), [(0, 5.5), (0.5, 5), (0, float("nan")), (float("inf"), 5), (0, "five")])
def test_kernel_replace_refuses_a_fraction(seed: object, features: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number, not"):
        examples.kernel_replace(seed, np.ones((2, 3), np.float32), features, 0.5)


@pytest.mark.parametrize(("seed", "features"), [(0, 0), (0, -3), (2**70, 5)])
def test_kernel_replace_refuses_what_is_out_of_range(seed: int, features: int) -> None:
    with pytest.raises(ValueError, match=r"(features|seed) is"):
        gx.examples.kernel_replace(seed, np.ones((2, 3), "f4"), features, 0.5)


def test_kernel_replace_works_inside_jit() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    y = jax.jit(lambda x: examples.kernel_replace(0, x, 5, 0.5))(x)
    np.testing.assert_allclose(y, examples.kernel_replace(0, x, 5, 0.5), rtol=1e-6)


def test_kernel_replace_leaves_the_bias_as_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense starts with a zero bias, so a lost bias would not show: give it one that depends on the seed."""
    dense = nn.Dense

    def with_bias(features: int) -> nn.Dense:
        return dense(features, bias_init=nn.initializers.normal(1.0))

    monkeypatch.setattr(nn, "Dense", with_bias)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    bias = {}
    for seed in (0, 11):
        bias[seed] = np.asarray(with_bias(4).init(jax.random.key(seed), x)["params"]["bias"])
        y = np.asarray(examples.kernel_replace(seed, x, 4, 0.5))
        np.testing.assert_allclose(y, closed_form(x, bias[seed], 0.5), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(bias[0], bias[11])


def test_kernel_replace_takes_lists_and_jax_arrays() -> None:
    x = [[1.0, 2.0], [3.0, 4.0]]
    for given in (x, np.array(x), jnp.asarray(x)):
        np.testing.assert_allclose(examples.kernel_replace(0, given, 3, 2.0), [[6.0] * 3, [14.0] * 3])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_kernel_replace_refuses_another_rank(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="in_dim"):
        examples.kernel_replace(0, np.ones(shape, np.float32), 2, 1.0)


def test_kernel_replace_is_reached_from_the_package() -> None:
    assert gx.examples.kernel_replace is examples.kernel_replace


def test_importing_the_examples_imports_no_framework() -> None:
    code = (
        "import sys, graftax.examples\nprint(sorted({'torch', 'jax', 'flax', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digits_models_are_one_network() -> None:
    """Same number of weights in all three; NNX takes its rngs and has a default for factories without arguments."""
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    counts = [sum(p.numel() for p in examples.digits_torch().parameters())]
    linen = jax.eval_shape(examples.digits_linen().init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    counts.append(sum(leaf.size for leaf in jax.tree.leaves(linen["params"])))
    state = nnx.state(nnx.eval_shape(examples.digits_nnx), nnx.Param)
    counts.append(sum(leaf.size for leaf in jax.tree.leaves(state)))
    assert counts == [8014] * 3
    assert not torch.equal(examples.digits_torch().fc1.weight, examples.digits_torch().fc1.weight)  # newly initialised
    kernels = [examples.digits_nnx(nnx.Rngs(seed)).linear1.kernel.get_value() for seed in (0, 1)]
    assert not np.array_equal(*kernels)
