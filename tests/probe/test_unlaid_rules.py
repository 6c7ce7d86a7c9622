"""A rule that says which leaves are fused, and not how their axes lie: running shows it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as fn
from torch import nn

import graftax as gx
from graftax.errors import RulesError


class Gates(nn.Module):
    """Two square gates in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Any) -> Any:
        a, b = (x @ self.w.T).chunk(2, -1)
        return torch.sigmoid(a) * torch.tanh(b)


class FlaxGates(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        return fn.sigmoid(fn.Dense(6, use_bias=False, name="i")(x)) * jnp.tanh(fn.Dense(6, use_bias=False, name="g")(x))


def gates(*names: str) -> Any:
    leaves = ", ".join(f'"params/{name}/kernel"' for name in names)
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    rule = f'{{ torch = "w", flax = [{leaves}], fused = "block" }}'
    return gx.plan(Gates(), gx.linen(FlaxGates(), x), rules=rule, inputs=x)


def test_running_gives_a_fused_rule_the_layout_that_it_does_not_state() -> None:
    plan = gates("i", "g")
    assert plan.complete, str(plan)
    assert plan.proof is not None
    (entry,) = plan.entries
    assert entry.ops[-1].text == "a b -> b a"


def test_a_fused_rule_without_a_layout_is_refuted_too() -> None:
    with pytest.raises(RulesError, match="running both models refutes this rule"):
        gates("g", "i")
