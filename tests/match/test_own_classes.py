"""Classes of a user's own: no convention says how they store a matrix. What their products sum over does."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import graftax as gx

torch = pytest.importorskip("torch")


class Product(torch.nn.Module):
    """x @ weight, or x @ weight.T"""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 6))
        self.turned = turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.T if self.turned else self.weight)


class Looped(Product):
    """fx cannot follow it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Turned(nn.Module):
    """x @ kernel.T"""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("kernel", nn.initializers.normal(), (6, 6)).T


@pytest.mark.parametrize("turned", [False, True])
def test_the_product_tells_which_axis_it_sums_over(turned: bool) -> None:
    source = torch.nn.Sequential(Product(turned), torch.nn.Linear(6, 5))
    like = {"0": {"kernel": np.zeros((6, 6), "f4")}, "1": {"kernel": np.zeros((6, 5), "f4"), "bias": np.zeros(5, "f4")}}
    out = gx.port(source, like)
    weight = source[0].weight.detach().numpy()
    assert np.array_equal(out["0"]["kernel"], weight.T if turned else weight)


@pytest.mark.parametrize("turned", [False, True])
def test_own_classes_on_both_sides(turned: bool) -> None:
    source = Product(turned)
    out = gx.port(source, gx.linen(Turned(), jnp.zeros((1, 6))))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("f4")
    with jax.default_matmul_precision("highest"):
        got = Turned().apply(out, x)
    assert np.allclose(got, source(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_a_class_whose_use_is_unknown_is_asked_about() -> None:
    plan = gx.plan(Looped(False), {"kernel": np.zeros((6, 6), "f4")})
    assert [len(question.candidates) for question in plan.questions] == [2]
