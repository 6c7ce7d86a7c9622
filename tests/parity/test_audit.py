"""The bitwise audit of Flax weights."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen as fn
from torch import nn

import graftax as gx
from graftax.adapters import live_leaves
from graftax.execute.opening import open_tree
from graftax.parity.audit import Expected, audit, compared, largest_ulp


def ported():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(3, name="l1")(fn.Dense(5, name="l0")(x))

    rules = 'rules = [{ torch = "{i}.weight", flax = "l{i}/kernel" }, { torch = "{i}.bias", flax = "l{i}/bias" }]'
    like = gx.linen(Flax(), jnp.ones((1, 4)))
    plan = gx.plan(module, like, rules=rules)
    weights = {path: np.array(leaf) for path, leaf in live_leaves(plan.run(module)).items()}
    return Expected(plan, open_tree(module)), weights


def test_a_port_is_exact_and_one_ulp_is_found():
    expected, weights = ported()
    assert audit(expected, weights) == ()
    kernel = weights["params/l1/kernel"]
    kernel[2, 1] = np.nextafter(kernel[2, 1], np.float32(9))
    (row,) = audit(expected, weights)
    assert (row.path, row.differing, row.total, row.largest_ulp) == ("params/l1/kernel", 1, 15, 1.0)
    assert "1.weight" in row.text


def test_a_sign_of_zero_is_a_bit():
    have, want = np.array([0.0, 1.0], np.float32), np.array([-0.0, 1.0], np.float32)
    row = compared("x", have, want)
    assert row is not None
    assert (row.differing, row.largest_ulp) == (1, 0.0)


def test_other_shapes_and_dtypes_are_said():
    want = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    row = compared("k", want.T, want, "from w")
    assert row is not None
    assert row.text == "shape mismatch: (3, 2), the plan makes (2, 3) from w"
    row = compared("k", want.astype(ml_dtypes.bfloat16), want, "from w")
    assert row is not None
    assert row.text.startswith("is held in bfloat16, the plan makes float32")
    assert row.differing == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_distance_in_units_of_the_last_place(dtype):
    a = np.array([1.0, -1.0, 0.0], dtype)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
    b = (a.view(bits) + np.array([3, 2, 1], bits)).view(dtype)
    assert largest_ulp(a, b) == 3.0
    tiny = np.array([1], bits).view(dtype)
    assert largest_ulp(tiny, -tiny) == 2.0, "across zero"
    assert largest_ulp(np.array([np.nan], dtype), a[:1]) is None
    assert largest_ulp(np.array([1]), np.array([2])) is None
