"""replace inside jit, grad and vmap: what needs no values works, gradients flow, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import graftax as gx
from graftax.errors import PlanError, UsageError
from graftax.ops import same_bits

TREE = {"params": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}}
KERNEL = "params/a/kernel"


def kernel(tree: Any) -> Any:
    return tree["params"]["a"]["kernel"]


@pytest.mark.parametrize(
    "value",
    [
        gx.constant(0.5),
        gx.zeros(),
        gx.normal(1.0, 0),
        gx.add_normal(0.1, 0),
        gx.scaled(0.1),
        jnp.ones((2, 3)),
        np.ones((2, 3), np.float32),
        lambda leaf: leaf * 2,
    ],
    ids=["constant", "zeros", "normal", "add_normal", "scaled", "jax array", "array", "function"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jit_gives_what_is_given_outside(value: Any, dtype: str) -> None:
    tree = jax.tree.map(lambda leaf: leaf.astype(dtype), TREE)
    value = value.astype(dtype) if hasattr(value, "astype") else value
    inside, outside = jax.jit(lambda tree: gx.replace(tree, KERNEL, value))(tree), gx.replace(tree, KERNEL, value)
    assert kernel(inside).dtype == dtype
    np.testing.assert_allclose(
        kernel(inside).astype(float), kernel(outside).astype(float), rtol=float(jnp.finfo(dtype).eps), atol=1e-7
    )


BITS = {
    "scaled": gx.scaled(0.1),
    "add_normal": gx.add_normal(0.1, 3),
    "relative": gx.add_normal(0.1, 3, relative=True),
    "mean": gx.mean(),
    "mix": gx.mix({"kernel": np.arange(60, dtype=np.float32).reshape(12, 5) / 7}, 0.3),
    "beyond": gx.mix(np.arange(60, dtype=np.float32).reshape(12, 5) / 7, -1.5),
    "float16": gx.rounded("float16"),
    "float8_e4m3fn": gx.rounded("float8_e4m3fn"),
    "float8_e5m2fnuz": gx.rounded("float8_e5m2fnuz"),
    "quantized": gx.quantized(4),
    "rows": gx.quantized(3, axis=0),
    "one scale": gx.quantized(8, axis=()),
    "groups": gx.quantized(2, group=4),
    "16 bits": gx.quantized(16),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_computed_from_a_traced_leaf_have_the_same_bits(dtype: str) -> None:
    """XLA fuses products into sums, and divides by multiplying: here neither shows."""
    rng = np.random.default_rng(0)
    old = (rng.standard_normal((12, 5)) * np.exp(rng.standard_normal((1, 5)))).astype(np.float32)
    old[:4, 0] = [381, 1.5, -1.5, 4.5]  # halves of a step
    old[:, 1] = 0
    values = {name: value for name, value in BITS.items() if dtype == "float32" or "mix" not in value.text}
    tree = {name: {"kernel": jnp.asarray(old).astype(dtype)} for name in values}
    edits = {f"{name}/kernel": value for name, value in values.items()}
    if dtype == "float32":
        edits["mix/kernel"] = gx.mix(gx.from_checkpoint(BITS["mix"].donor.source, "kernel"), 0.3)
    inside, outside = jax.jit(lambda tree: gx.replace(tree, edits))(tree), gx.replace(tree, edits)
    for name in values:
        found, wanted = (np.asarray(one[name]["kernel"]) for one in (inside, outside))
        assert found.dtype == wanted.dtype
        assert same_bits(found, wanted), name


def test_rounding_passes_gradients_straight_through() -> None:
    for value in (gx.quantized(4), gx.rounded("float16"), gx.add_normal(0.1, 0, relative=True)):
        gradient = jax.jit(jax.grad(lambda tree: jnp.sum(kernel(gx.replace(tree, KERNEL, value)) * 3)))(TREE)  # noqa: B023
        np.testing.assert_array_equal(kernel(gradient), np.full((2, 3), 3))
    donor = jnp.ones((2, 3))
    by_leaf, by_donor = jax.grad(
        lambda tree, donor: jnp.sum(kernel(gx.replace(tree, KERNEL, gx.mix(donor, 0.25))) * 4), argnums=(0, 1)
    )(TREE, donor)
    np.testing.assert_array_equal(kernel(by_leaf), np.full((2, 3), 3))
    np.testing.assert_array_equal(by_donor, np.ones((2, 3)))
    mean = jax.grad(lambda tree: kernel(gx.replace(tree, KERNEL, gx.mean()))[0, 0] * 6)(TREE)
    np.testing.assert_allclose(kernel(mean), np.ones((2, 3)), rtol=1e-6)


def test_a_checkpoint_is_a_constant_of_the_trace(tmp_path: Path) -> None:
    np.savez(tmp_path / "donor.npz", **{KERNEL: np.full((2, 3), 9, np.float32)})
    out = jax.jit(lambda tree: gx.replace(tree, KERNEL, gx.from_checkpoint(tmp_path / "donor.npz", KERNEL)))(TREE)
    assert np.all(kernel(out) == 9)


def test_leaves_that_are_not_selected_are_the_same_tracers() -> None:
    def check(tree: Any) -> Any:
        out = gx.replace(tree, KERNEL, gx.zeros())
        assert out["params"]["a"]["bias"] is tree["params"]["a"]["bias"]
        return out

    jax.jit(check)(TREE)


def test_gradients_flow() -> None:
    def loss(tree: Any, value: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gx.replace(tree, KERNEL, value)))

    base = TREE["params"]["a"]
    for value, wanted in ((gx.scaled(3), 18 * base["kernel"]), (gx.constant(3), 0 * base["kernel"])):
        gradient = jax.grad(loss)(TREE, value)["params"]["a"]
        np.testing.assert_allclose(gradient["kernel"], wanted)
        np.testing.assert_allclose(gradient["bias"], 2 * base["bias"])
    noise = kernel(gx.replace(TREE, KERNEL, gx.normal(0.1, 0)))
    np.testing.assert_allclose(
        kernel(jax.grad(loss)(TREE, gx.add_normal(0.1, 0))), 2 * (base["kernel"] + noise), rtol=1e-5
    )
    np.testing.assert_allclose(jax.grad(lambda new: loss(TREE, new))(base["kernel"]), 2 * base["kernel"])


def test_vmap_replaces_in_each() -> None:
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), TREE)
    assert kernel(jax.vmap(lambda tree: gx.replace(tree, "**/kernel", gx.constant(1)))(stacked)).shape == (4, 2, 3)


def test_nnx_inside_jit() -> None:
    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    y = nnx.jit(lambda net, x: gx.replace(net, "kernel", gx.constant(2))(x))(net, jnp.ones((1, 2)))
    assert y.tolist() == [[4, 4, 4]]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda tree: gx.replace(tree, "**/bias", gx.quantized(4)), PlanError, "no input channels"),
        (lambda tree: gx.replace(tree, KERNEL, kernel(tree).T), PlanError, "Its transpose would fit"),
        (lambda tree: gx.replace(tree, KERNEL, kernel(tree)[0, 0]), PlanError, "jnp.full_like"),
        (lambda tree: gx.replace(tree, KERNEL, gx.constant(kernel(tree)[0, 0])), UsageError, "jnp.full_like"),
        (lambda tree: gx.replace({"w": torch.ones(2, 3)}, "w", kernel(tree)), PlanError, "a traced value"),
    ],
)
def test_what_needs_values_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        jax.jit(make)(TREE)
    import re

    assert re.search(words, str(caught.value), re.DOTALL)


def test_scaled_is_for_floating_leaves() -> None:
    with pytest.raises(PlanError, match="int32, not floating"):
        jax.jit(lambda tree: gx.replace(tree, "n", gx.scaled(2)))({"n": jnp.arange(3)})
