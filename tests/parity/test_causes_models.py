"""Causes that only the whole model shows: a fused tensor read in another order, a norm in another place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx

import graftax as gx

# ---------------------------------------------------------------- the order of a fused tensor


HEADS, WIDE = 4, 32
FUSED = np.random.default_rng(0).standard_normal((3, 6, WIDE)).astype("float32")
ORDERS = {"interleaved": 'fused = "interleaved", heads = 4', "block": 'fused = "block"'}


class FusedTorch(torch.nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.attn = order, torch.nn.Module()
        self.norm = torch.nn.LayerNorm(WIDE, eps=1e-6)
        self.attn.qkv, self.attn.proj = torch.nn.Linear(WIDE, 3 * WIDE), torch.nn.Linear(WIDE, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        y = self.attn.qkv(self.norm(x))
        by_heads = self.order == "interleaved"
        cut = y.view(n, t, HEADS, 3, -1).unbind(3) if by_heads else y.view(n, t, 3, HEADS, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in cut)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.attn.proj(mixed.transpose(1, 2).reshape(n, t, WIDE))


class FusedLinen(fn.Module):
    @fn.compact
    def __call__(self, x):
        y = fn.LayerNorm(epsilon=1e-6, name="norm")(x)
        return x + fn.MultiHeadDotProductAttention(num_heads=HEADS, name="attn")(y)


class FusedNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDE, epsilon=1e-6, rngs=rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(WIDE, WIDE, rngs=rngs) for _ in range(4))

    def __call__(self, x):
        y = self.norm(x)
        q, k, v = (part(y).reshape(*x.shape[:2], HEADS, -1) for part in (self.query, self.key, self.value))
        return x + self.out(nnx.dot_product_attention(q, k, v).reshape(x.shape))


def fused_rules(api: str, order: str) -> list[str]:
    paths = [f"params/attn/{n}/kernel" if api == "linen" else f"{n}/kernel" for n in ("query", "key", "value")]
    out = '{ torch = "attn.proj.weight", flax = "out/kernel", layout = "linear" }'
    listed = ", ".join(f'"{path}"' for path in paths)
    return [f'{{ torch = "attn.qkv.weight", flax = [{listed}], {ORDERS[order]} }}', *[out] * (api == "nnx")]


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrong", ["port and check", "port", "check"])
def test_a_fused_order_that_a_rule_chose_is_named(api: str, order: str, wrong: str) -> None:
    other = next(name for name in ORDERS if name != order)
    torch.manual_seed(0)
    net = FusedTorch(order).eval()
    like = gx.linen(FusedLinen(), FUSED) if api == "linen" else nnx.eval_shape(lambda: FusedNnx(nnx.Rngs(0)))
    right_rules, wrong_rules = fused_rules(api, order), fused_rules(api, other)
    weights = gx.port(net, like, rules=wrong_rules if "port" in wrong else right_rules, inputs=False)
    report = gx.check_parity(net, like, FUSED, weights, rules=wrong_rules if "check" in wrong else right_rules)
    assert not report
    cause = report.causes[0]
    assert cause.name == "fused order", str(report)
    assert "rules item 1" in cause.detail
    assert "initialis" not in str(report)
    if wrong != "port":  # the rule that the check was given is the wrong one
        assert ORDERS[order] in cause.fix
    assert "fused order" in str(report)


# ---------------------------------------------------------------- a norm that is not where torch has it


class NormTorch(torch.nn.Module):
    def __init__(self, post: bool, final: bool) -> None:
        super().__init__()
        self.post, self.ln = post, torch.nn.LayerNorm(WIDE, eps=1e-6)
        self.up, self.down = torch.nn.Linear(WIDE, 40), torch.nn.Linear(40, WIDE)
        if final:
            self.last = torch.nn.LayerNorm(WIDE, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def mlp(y: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(y)))

        x = self.ln(x + mlp(x)) if self.post else x + mlp(self.ln(x))
        return self.last(x) if hasattr(self, "last") else x


class NormLinen(fn.Module):
    slip: str
    final: bool

    @fn.compact
    def __call__(self, x):
        ln, up, down = fn.LayerNorm(epsilon=1e-6, name="ln"), fn.Dense(40, name="up"), fn.Dense(WIDE, name="down")

        def mlp(y):
            return down(fn.relu(up(y)))

        if self.slip == "missing":
            ln(x)
            x = x + mlp(x)
        elif self.slip == "residual":
            y = ln(x)
            x = y + mlp(y)
        else:
            x = ln(x + mlp(x)) if self.slip == "post" else x + mlp(ln(x))
        if not self.final:
            return x
        y = fn.LayerNorm(epsilon=1e-6, name="last")(x)
        return x if self.slip == "no final" else y


@pytest.mark.parametrize(
    ("post", "slip", "name", "norm"),
    [
        (False, "missing", "norm not applied", "ln"),
        (False, "post", "norm order", "ln"),
        (True, "pre", "norm order", "ln"),
        (False, "residual", "norm order", "ln"),
        (False, "no final", "norm not applied", "last"),
    ],
)
def test_a_norm_that_is_not_where_torch_has_it_is_named(post: bool, slip: str, name: str, norm: str) -> None:
    torch.manual_seed(0)
    net = NormTorch(post, slip == "no final").eval()
    for parameter in (net.ln.weight, net.ln.bias):
        parameter.data.uniform_(0.5, 2)
    if slip == "no final":
        net.last.weight.data.uniform_(0.5, 2)
    x = FUSED * 3 + 1
    report = gx.check_parity(net, gx.linen(NormLinen(slip, slip == "no final"), x), x)
    assert not report
    assert report.causes[0].name == name, str(report)
    assert norm in report.causes[0].detail
