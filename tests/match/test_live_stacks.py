"""A live Linen model shows on which axis it stacks its layers, where there are as many as each is wide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.execute.opening import open_tree

jnp = pytest.importorskip("jax.numpy")
fn = pytest.importorskip("flax.linen")

WIDTH = 6


class Block(fn.Module):
    @fn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return x + fn.Dense(WIDTH, name="fc")(x), None


class Mapped(fn.Module):
    axis: int

    @fn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        how: Any = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return fn.vmap(Block, in_axes=0, axis_size=WIDTH, **how)(name="e")(x)


class Stacked(fn.Module):
    axis: int
    kind: str

    @fn.compact
    def __call__(self, x: Any) -> Any:
        how: Any = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        if self.kind == "vmap":
            return fn.vmap(Block, in_axes=None, axis_size=WIDTH, **how)(name="layers")(x)[0]
        if self.kind == "vmap in scan":
            return fn.scan(Mapped, length=WIDTH, **how)(self.axis, name="layers")(jnp.stack([x] * WIDTH))[0]
        block = fn.remat(Block) if self.kind == "remat" else Block
        return fn.scan(block, length=WIDTH, **how)(name="layers")(x)[0]


def like(axis: int, kind: str) -> Any:
    return gx.linen(Stacked(axis, kind), jnp.zeros((2, WIDTH)))


def stacked(model: Any) -> Any:
    trace = open_tree(model).live.trace
    assert trace is not None
    return dict(trace().stacked)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", ["scan", "remat", "vmap"])
def test_the_stacked_axis_of_a_live_model_is_known(kind: str, axis: int) -> None:
    rng = np.random.default_rng(0)
    layers = [{"kernel": rng.standard_normal((WIDTH, WIDTH)), "bias": rng.standard_normal(WIDTH)} for _ in range(WIDTH)]
    layers = [{name: leaf.astype(np.float32) for name, leaf in layer.items()} for layer in layers]
    source = {"params": {f"layers_{i}": {"fc": layer} for i, layer in enumerate(layers)}}
    plan = gx.plan(source, like(axis, kind))
    assert plan.complete, str(plan)
    made = plan.run(source)["params"]["layers"]["fc"]
    for name, leaf in made.items():
        place = axis if axis >= 0 else leaf.ndim + axis
        np.testing.assert_array_equal(leaf, np.stack([layer[name] for layer in layers], place))


def test_the_axes_of_loops_inside_loops_are_known() -> None:
    assert stacked(like(-1, "vmap in scan")) == {"params/layers/e/fc/bias": (1, 2), "params/layers/e/fc/kernel": (2, 3)}


def test_what_is_not_stacked_says_so() -> None:
    assert stacked(gx.linen(Block(), jnp.zeros((2, WIDTH)))) == {"params/fc/bias": (), "params/fc/kernel": ()}


def test_an_axis_counted_from_either_end_is_one_order() -> None:
    """Only one order of the axes of stacked matrices fits, so nothing is asked."""

    class MoE(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            scores = fn.Dense(3, use_bias=False, name="router")(x)
            up, down = (
                self.param(name, fn.initializers.ones, s) for name, s in (("up", (3, 8, 6)), ("down", (3, 6, 8)))
            )
            return jnp.einsum("bd,edf,efo,be->bo", x, up, down, scores)

    class Model(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            return MoE(name="moe")(fn.LayerNorm(name="norm")(x))

    rng = np.random.default_rng(0)
    shapes = {"up": (6, 8), "down": (8, 6)}
    source = {f"moe.experts.{e}.{name}.weight": rng.standard_normal(shape).astype("f4")
              for name, shape in shapes.items() for e in range(3)}  # fmt: skip
    source |= {"moe.gate.weight": rng.standard_normal((3, 8)).astype("f4")}
    source |= {f"norm.{leaf}": rng.standard_normal(8).astype("f4") for leaf in ("weight", "bias")}
    plan = gx.plan(source, gx.linen(Model(), jnp.zeros((2, 8))), source_side="torch")
    assert plan.complete, str(plan)
    made = plan.run(source)["params"]["moe"]
    for name in shapes:
        assert np.array_equal(made[name], np.stack([source[f"moe.experts.{e}.{name}.weight"].T for e in range(3)]))
