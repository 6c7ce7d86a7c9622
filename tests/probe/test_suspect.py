"""Where running shows that the models differ, parity is told before which layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as fn
from torch import nn

import graftax as gx


class Flax(fn.Module):
    epsilon: float

    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.relu(fn.Dense(8, name="first")(x))
        return fn.Dense(8, name="last")(fn.LayerNorm(epsilon=self.epsilon, name="norm")(x))


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return self.last(self.norm(torch.relu(self.first(x))))


def test_the_layer_before_which_models_part_is_parity_s_suspect() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    module, like = Torch().eval(), gx.linen(Flax(3e-3), jnp.zeros((4, 8)))
    plan = gx.plan(module, like, inputs=x)
    assert plan.complete, str(plan)
    assert plan.parted.rpartition("/")[0] in ("params/norm", "params/last")
    with pytest.raises(gx.errors.ParityError) as caught:
        gx.port(module, like, inputs=x)
    report = caught.value.report  # pyright: ignore[reportAttributeAccessIssue]
    assert report.suspect == plan.parted.removeprefix("params/").rpartition("/")[0]
    assert report.first.site_flax.path == "norm"
    assert f"both models part before {report.suspect}" in " ".join(str(report).split())


def test_models_that_agree_have_no_suspect() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    assert not gx.plan(Torch().eval(), gx.linen(Flax(1e-5), jnp.zeros((4, 8))), inputs=x).parted
