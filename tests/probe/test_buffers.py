"""Buffers of torch that Flax computes: running shows that no leaf holds them."""

from __future__ import annotations

import flax.linen as fn
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import graftax as gx

WAVES = np.sin(np.arange(18, dtype="float32")).reshape(3, 6)


class Torch(nn.Module):
    """`table` and `mask` are buffers; the Flax model writes them out."""

    def __init__(self, table: np.ndarray = WAVES) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(table))
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x + self.table)) * self.mask)


class Flax(fn.Module):
    @fn.compact
    def __call__(self, x):
        y = jnp.tanh(fn.Dense(6)(x + jnp.asarray(WAVES))) * jnp.array([1.0, 1, 0, 1, 0, 1])
        return fn.Dense(6)(y)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 6)).astype("float32")


def test_a_floating_buffer_that_flax_computes_is_dropped_as_proved(x: np.ndarray) -> None:
    torch.manual_seed(0)
    module, model = Torch(), Flax()
    plan = gx.plan(module, gx.linen(model, x), inputs=x)
    assert plan.complete, plan
    assert plan.proof is not None
    with torch.no_grad():
        want = module(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model.apply(plan.run(module), x), want, atol=1e-5)


def test_back_to_torch_it_stays_as_the_module_has_it(x: np.ndarray) -> None:
    torch.manual_seed(0)
    module, model = Torch(), Flax()
    variables = gx.port(module, gx.linen(model, x), inputs=x)
    bound, like = model.bind(variables), Torch()
    made = gx.load_into(like, variables, inputs=x, source_model=gx.linen(model, x))
    with torch.no_grad():
        np.testing.assert_allclose(made(torch.tensor(x)).numpy(), bound(x), atol=1e-5)


def test_a_buffer_with_other_values_is_not_dropped(x: np.ndarray) -> None:
    plan = gx.plan(Torch(WAVES + 0.5), gx.linen(Flax(), x), inputs=x)
    assert plan.proof is None
    assert not plan.complete


def test_a_file_whose_buffer_is_the_models_is_ported(x: np.ndarray) -> None:
    plan = gx.plan(Torch().state_dict(), gx.linen(Flax(), x), inputs=x, source_model=Torch())
    assert plan.complete, plan
    assert [entry.sources[0] for entry in plan.entries if not entry.targets] == ["table", "mask"]


def test_a_file_whose_buffer_is_not_the_models_is_asked_about(x: np.ndarray) -> None:
    """The run had the module's buffer, so it says nothing about another one."""
    state = Torch(WAVES + 0.5).state_dict()
    plan = gx.plan(state, gx.linen(Flax(), x), inputs=x, source_model=Torch())
    assert not plan.complete
    assert any("table" in question.text for question in plan.questions)
