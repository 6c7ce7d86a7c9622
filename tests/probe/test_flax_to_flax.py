"""Linen to NNX and back: the source's own steps are the record."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as fn
from flax import nnx

import graftax as gx

X = np.random.default_rng(0).standard_normal((2, 5, 5, 2)).astype("float32")


class Linen(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.BatchNorm(use_running_average=True)(fn.relu(fn.Conv(4, (3, 3), padding=1)(x)))
        h = fn.Dense(8)(x.mean((1, 2)))
        for n in range(2):
            h = h + fn.Dense(8, name=f"b{n}")(fn.LayerNorm(name=f"n{n}")(jnp.tanh(h)))
        return fn.Dense(3)(h)


class Nnx(nnx.Module):
    """The second block is constructed first, and no name is Linen's."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.p, self.q, self.r = (
            nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.Linear(4, 8, rngs=rngs),
        )
        self.s, self.t = nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.u, self.v = nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.w = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = self.r(self.q(jax.nn.relu(self.p(x))).mean((1, 2)))
        h = h + self.u(self.v(jnp.tanh(h)))
        return self.w(h + self.s(self.t(jnp.tanh(h))))


def variables(seed: int) -> Any:
    made = Linen().init(jax.random.key(seed), X)
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape) ** 2, made)


def test_linen_to_nnx() -> None:
    module, given = Nnx(nnx.Rngs(0)), variables(1)
    plan = gx.plan(given, module, source_model=gx.linen(Linen(), X), inputs=X)
    assert plan.complete, str(plan)
    assert plan.proof is not None
    assert plan.proof.leaves == 18
    made = plan.run(given)
    made.eval()
    np.testing.assert_allclose(made(X), Linen().apply(given, X), rtol=1e-5, atol=1e-5)


def test_nnx_to_linen() -> None:
    module = Nnx(nnx.Rngs(0))
    module.eval()
    plan = gx.plan(module, gx.linen(Linen(), X))
    assert plan.complete, str(plan)
    assert plan.proof is not None
    np.testing.assert_allclose(Linen().apply(plan.run(module), X), module(X), rtol=1e-5, atol=1e-5)
