"""Rules on live models: the outputs of torch and Flax agree, and the weights come back bit for bit."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import graftax as gx
from graftax.errors import PlanError

HEADS, DIM, WIDTH = 3, 4, 12


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def error(want: torch.Tensor, got: Any) -> float:
    wide = want.detach().double().numpy()
    return float(np.linalg.norm(np.asarray(got, np.float64) - wide) / np.linalg.norm(wide))


def there_and_back(module: torch.nn.Module, like: Any, rules: Any) -> Any:
    """The ported variables; the way back is compared here."""
    plan = gx.plan(module, like, rules=rules)
    assert plan.complete, str(plan)
    made = plan.run(module)
    back = plan.inverse.run(made)
    for name, tensor in module.state_dict().items():
        assert torch.equal(back[name], tensor), name
    return made


class Attention(torch.nn.Module):
    """qkv fused in one Linear: one after the other, or head by head."""

    def __init__(self, fused: str) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = torch.nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.proj = torch.nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        form = (n, t, 3, HEADS, DIM) if self.fused == "block" else (n, t, HEADS, 3, DIM)
        wide = self.qkv(x).reshape(form)
        q, k, v = (wide.select(2 if self.fused == "block" else 3, i).transpose(1, 2) for i in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, t, HEADS * DIM))


@pytest.mark.parametrize("fused", ["block", "interleaved"])
def test_a_fused_attention_in_linen(fused):
    """Every dimension of the kernels is 12 = 3 x 4: no shape tells the two ways apart."""
    torch.manual_seed(0)
    module = Attention(fused)
    names = ("query", "key", "value")
    rules = [
        {"torch": "qkv.weight", "flax": [f"params/{n}/kernel" for n in names], "fused": fused, "heads": HEADS},
        {"torch": "qkv.bias", "flax": [f"params/{n}/bias" for n in names], "fused": fused, "heads": HEADS},
        {"torch": "proj.weight", "flax": "params/out/kernel"},
        {"torch": "proj.bias", "flax": "params/out/bias"},
    ]
    x = torch.randn(2, 5, WIDTH)
    model = linen.MultiHeadDotProductAttention(num_heads=HEADS)
    made = there_and_back(module, gx.linen(model, jnp.zeros((2, 5, WIDTH))), rules)
    assert error(module(x), model.apply(made, jnp.asarray(x.numpy()))) < 1e-6
    other = "interleaved" if fused == "block" else "block"
    wrong = gx.port(
        module,
        gx.linen(model, jnp.zeros((2, 5, WIDTH))),
        rules=[{**rule, "fused": other} if "fused" in rule else rule for rule in rules],
        inputs=False,
    )
    assert error(module(x), model.apply(wrong, jnp.asarray(x.numpy()))) > 0.1, "the other reading fits and is wrong"


class Picture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(4, 6, 3, padding=1)
        self.fc = torch.nn.Linear(6 * 4 * 4, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(torch.relu(self.conv1(x))).flatten(1))


class LinenPicture(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Conv(4, (3, 3), padding=1, name="conv1")(x))
        x = linen.Conv(6, (3, 3), padding=1, name="conv2")(x)
        return linen.Dense(96, name="fc")(x.reshape(x.shape[0], -1))


class NnxPicture(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 4, (3, 3), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), padding=1, rngs=rngs)
        self.fc = nnx.Linear(96, 96, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv2(nnx.relu(self.conv1(x)))
        return self.fc(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("flatten", ["C H W", "C=6 H W", "6 4 4"])
def test_a_flatten_before_a_square_linear(flatten):
    torch.manual_seed(0)
    module = Picture()
    x = torch.randn(2, 1, 4, 4)
    turned = jnp.asarray(x.numpy()).transpose(0, 2, 3, 1)
    model = LinenPicture()
    made = there_and_back(
        module, gx.linen(model, turned), [{"torch": "fc.weight", "flax": "fc/kernel", "flatten": flatten}]
    )
    assert error(module(x), model.apply(made, turned)) < 1e-6
    network = nnx.eval_shape(lambda: NnxPicture(nnx.Rngs(0)))
    network = gx.port(module, network, rules=[{"torch": "fc.weight", "flax": "fc/kernel", "flatten": flatten}])
    assert error(module(x), network(turned)) < 1e-6


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Scanned(linen.Module):
    axis: int = 0

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def body(dense: linen.Dense, carry: jax.Array) -> tuple[jax.Array, None]:
            return linen.tanh(dense(carry)), None

        scan = linen.scan(body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=4)
        return scan(linen.Dense(4, name="layer"), x)[0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scan_over_as_many_layers_as_the_width(axis):
    """4 layers of 4 x 4: the stack axis cannot be seen in the shapes."""
    torch.manual_seed(0)
    module, model = Layers(), Scanned(axis)
    x = torch.randn(3, 4)
    rules = [
        {"torch": "layers.{l}.weight", "flax": "layer/kernel", "stack": {"l": axis}},
        {"torch": "layers.{l}.bias", "flax": "layer/bias", "stack": {"l": axis}},
    ]
    made = there_and_back(module, gx.linen(model, jnp.zeros((3, 4))), rules)
    assert error(module(x), model.apply(made, jnp.asarray(x.numpy()))) < 1e-6


def test_a_rule_does_not_overrule_two_live_modules():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Dense(4)(x)

    rules = [{"torch": "0.weight", "flax": "Dense_0/kernel", "layout": "identity"}]
    plan = gx.plan(module, gx.linen(Model(), jnp.zeros((1, 4))), rules=rules)
    assert not plan.complete
    with pytest.raises(PlanError, match="contradicts the live modules"):
        plan.require_complete()
