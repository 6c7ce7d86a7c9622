"""gx.suggest: a proved plan as rules, which port a larger model of the same code from files."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as fn
from torch import nn

import graftax as gx
from graftax.rules.of_plan import rule_lines_of


class Torch(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            q, k, v = block(x).reshape(len(x), 3, self.heads, -1).unbind(1)
            x = x + (torch.tanh(q) * torch.sigmoid(k) + v).flatten(1)
        return x


class Flax(fn.Module):
    width: int
    heads: int
    layers: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.Dense(self.width, name="stem")(x)
        for n in range(self.layers):
            q, k, v = (
                fn.DenseGeneral((self.heads, self.width // self.heads), name=f"block_{n + 1}_{part}")(x)
                for part in "abc"
            )
            x = x + (jnp.tanh(q) * fn.sigmoid(k) + v).reshape(x.shape)
        return x


def ends(width: int, heads: int, layers: int) -> tuple[Any, Any]:
    return Torch(width, heads, layers).eval(), gx.linen(Flax(width, heads, layers), jnp.zeros((3, width)))


def test_a_small_model_gives_the_rules_for_a_large_one() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((3, 12)).astype("float32")
    plan = gx.plan(*ends(12, 3, 2), inputs=x)
    assert plan.complete
    assert plan.proof is not None
    text = gx.suggest(plan)
    assert "h = 3" not in text

    module, like = ends(40, 5, 2)
    large = gx.plan(module.state_dict(), like, rules=text)
    assert large.complete, str(large)
    wide = np.random.default_rng(0).standard_normal((3, 40)).astype("float32")
    made = like.module.apply(large.run(module.state_dict()), wide)
    with torch.no_grad():
        np.testing.assert_allclose(np.asarray(made), module(torch.from_numpy(wide)).numpy(), rtol=2e-4, atol=2e-5)


def test_parts_in_another_order_are_a_rule() -> None:
    source = {"fc.weight": np.arange(96, dtype="f4").reshape(12, 8)}
    like = {"params": {"fc": {"kernel": np.zeros((8, 12), "f4")}}}
    rule = '{ torch = "fc.weight", flax = "fc/kernel", parts = "q k v -> k q v", q = 4, k = 1, v = 1 }'
    plan = gx.plan(source, like, rules=rule, source_side="torch", to="flax")
    back = gx.plan(plan.run(source), source, rules=rule, source_side="flax", to="torch")
    for made in (plan, back):
        (line,) = rule_lines_of(made)
        assert 'parts = "' in line
        again = gx.plan(made.made_from.source, made.made_from.like, rules=line.strip().partition(",   #")[0])
        assert again.entries[0].ops == made.entries[0].ops


def test_what_no_rule_says_is_a_comment() -> None:
    class Cell(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            return fn.RNN(fn.OptimizedLSTMCell(4, name="cell"))(x)

    class Lstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    plan = gx.plan(Lstm(), gx.linen(Cell(), jnp.zeros((2, 3, 4))), inputs=np.ones((2, 3, 4), "f4"))
    assert plan.complete
    text = gx.suggest(plan)
    assert "# no rule says this: rnn.bias_ih_l0, rnn.bias_hh_l0" in text
    assert gx.plan(Lstm(), gx.linen(Cell(), jnp.zeros((2, 3, 4))), rules=text, inputs=False) is not None


def test_a_plan_without_proof_gives_its_questions_alone() -> None:
    module, like = ends(12, 3, 1)
    text = gx.suggest(gx.plan(module.state_dict(), like))
    assert not [line for line in text.splitlines() if line.lstrip().startswith("{")]
