"""One head at a time: a zeroed head of the output projection is that head's activations zeroed before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import graftax as gx
from graftax.errors import PlanError

HEADS, DIM = 4, 3
X = np.random.default_rng(0).normal(size=(2, 5, HEADS * DIM)).astype("f4")
Mix = Callable[..., jax.Array]


def mixed(keep: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """Attention (..., heads, head_dim), of which only the heads in `keep` are left."""
    return nn.dot_product_attention(*args, **kwargs) * jnp.asarray(keep, "float32")[:, None]


class Split(nn.Module):
    """The framework's attention: a projection (heads, head_dim, out)."""

    keep: Any = (1,) * HEADS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mix = partial(mixed, self.keep)
        return nn.MultiHeadDotProductAttention(HEADS, out_features=7, attention_fn=mix, name="attention")(x)


class Grouped(nn.Module):
    """A user's own attention with fewer key heads, and a projection (heads head_dim, out) beside a gate."""

    num_heads: int = HEADS
    num_kv_heads: int = 2
    keep: Any = (1,) * HEADS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query = nn.Dense(HEADS * DIM, name="q_proj")(x).reshape(*x.shape[:2], HEADS, DIM)
        key, value = (nn.Dense(2 * DIM, name=f"{n}_proj")(x).reshape(*x.shape[:2], 2, DIM) for n in "kv")
        key, value = (jnp.repeat(part, 2, axis=2) for part in (key, value))
        out = mixed(self.keep, query, key, value).reshape(x.shape)
        return nn.Dense(7, name="o_proj")(out) * nn.sigmoid(nn.Dense(7, name="gate")(x))


class Fused(nn.Module):
    """One projection to query, key and value."""

    heads: int = HEADS
    keep: Any = (1,) * HEADS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = jnp.split(nn.Dense(3 * x.shape[-1], name="qkv")(x), 3, -1)
        heads = (part.reshape(*x.shape[:2], HEADS, DIM) for part in parts)
        return nn.Dense(7, name="proj")(mixed(self.keep, *heads).reshape(x.shape))


class Around(nn.Module):
    """An attention inside a model, named `block`."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(self.inner.copy(name="block")(x))


def drawn(model: nn.Module) -> Any:
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), shapes)


def rows(
    like: Any, params: Any, selector: Any, value: Any = None, **options: Any
) -> tuple[list[Any], list[np.ndarray]]:
    """(the rows without the baseline, the outputs of each)."""
    seen: list[np.ndarray] = []

    def keep(out: Any) -> float:
        seen.append(np.array(out))
        return 0.0

    study = gx.ablate(like, params, selector, value or gx.zeros(), each="head", metric=keep, **options)
    return list(study)[1:], seen[2:]


@pytest.mark.parametrize(
    ("inner", "selector", "leaf"),
    [
        (Split(), "**/attention", "block/attention/out/kernel[{h}]"),
        (Grouped(), "block", "block/o_proj/kernel[{start}:{stop}]"),
        (Fused(), "block/proj", "block/proj/kernel[{start}:{stop}]"),
    ],
    ids=["split", "grouped", "fused, by its projection"],
)
def test_a_zeroed_head_is_its_activations_zeroed(inner: nn.Module, selector: str, leaf: str):
    params = drawn(Around(inner))
    found, outputs = rows(gx.linen(Around(inner), X), params, selector)
    assert [row.head for row in found] == list(range(HEADS))
    by_hand = jax.jit(lambda weights, x, keep: Around(inner.copy(keep=keep)).apply(weights, x))
    for h, (row, out) in enumerate(zip(found, outputs, strict=True)):
        assert row.leaves == (f"params/{leaf.format(h=h, start=DIM * h, stop=DIM * (h + 1))}",)
        np.testing.assert_array_equal(out, np.asarray(by_hand(params, X, np.arange(HEADS) != h)))


def test_a_scanned_attention_has_a_head_of_each_layer():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=HEADS)
            return layers(name="layers")(x, None)[0]

    params = drawn(Scanned())
    found, outputs = rows(gx.linen(Scanned(), X), params["params"], "layers/attention", gx.scaled(0.5))
    assert [row.path for row in found] == [f"layers/attention[{n // HEADS}]" for n in range(HEADS * HEADS)]
    for n, row in enumerate(found):
        layer, head = divmod(n, HEADS)
        assert row.leaves == (f"layers/attention/out/kernel[{head}, {layer}]",)
    out = params["params"]["layers"]["attention"]["out"]  # the row of layer 1, head 2
    out["kernel"] = out["kernel"].at[2, 1].multiply(0.5)
    np.testing.assert_array_equal(outputs[HEADS + 2], np.asarray(jax.jit(Scanned().apply)(params, X)))


def test_an_nnx_attention():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attention = nnx.MultiHeadAttention(HEADS, HEADS * DIM, decode=False, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.attention.out.kernel[...].sum((1, 2))

    net = Net(nnx.Rngs(0))
    found, outputs = rows(net, net, "attention", inputs=X)
    assert [row.leaves for row in found] == [(f"attention/out/kernel[{h}]",) for h in range(HEADS)]
    for h, out in enumerate(outputs):
        np.testing.assert_array_equal(out == 0, np.arange(HEADS) == h)
    study = gx.ablate(net, net, "attention", gx.zeros(), each="head", inputs=X)
    assert str(study).startswith("Net: 4 runs, one head at a time (its part of out/kernel)\n")


def test_a_function_of_the_weights_shows_heads_that_have_an_axis():
    params = drawn(Around(Split()))

    def total(weights: Any) -> jax.Array:
        return weights["params"]["block"]["attention"]["out"]["kernel"].sum()

    found, _ = rows(total, params, "**/attention")
    assert [row.leaves for row in found] == [(f"params/block/attention/out/kernel[{h}]",) for h in range(HEADS)]


class Unnumbered(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query, key = nn.Dense(12, name="query")(x), nn.Dense(12, name="key")(x)
        return nn.Dense(12, name="out")(query * key)


class Twice(nn.Module):
    num_heads: int = HEADS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(12, name="query")(x)
        return nn.Dense(12, name="first")(x) + nn.Dense(12, name="second")(x)


@pytest.mark.parametrize(
    ("inner", "selector", "words"),
    [
        (Unnumbered(), "block", "number of heads of block is not known"),
        (Twice(), "block", "several output projections of heads: params/block/first/kernel, params/block/second"),
        (Split(), "**/query", "has no output projection of heads"),
        (Grouped(), "block/q_proj", "has no output projection of heads"),
        (Split(), "**/kernel", "selects leaves, not modules"),
        (Grouped(num_heads=5), "block", "has no output projection of heads"),
    ],
)
def test_heads_that_are_not_sure_are_refused(inner: nn.Module, selector: str, words: str):
    model = Around(inner)
    with pytest.raises(PlanError, match=words):
        gx.ablate(gx.linen(model, X), drawn(model), selector, gx.zeros(), each="head")


def test_merged_heads_need_the_model():
    params = drawn(Around(Grouped()))
    with pytest.raises(PlanError, match=r"not known[^\n]*\n[^\n]*Give the model itself"):
        gx.ablate(lambda weights: 0.0, params, "block", gx.zeros(), each="head")


def test_an_excluded_projection_is_left_out():
    model = Around(Split())
    with pytest.raises(PlanError, match="is excluded"):
        gx.ablate(gx.linen(model, X), drawn(model), "**/attention", gx.zeros(), each="head", exclude="**/out/*")
