"""torch to torch: both modules are run, and no name decides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graftax as gx


class Turned(nn.Module):
    """A Linear that keeps its weight (in, out)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


def heads(x: Any) -> Any:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Turned(8, 24), Turned(8, 8)

    def forward(self, x: Any) -> Any:
        q, k, v = map(heads, self.c_attn(x).split(8, -1))
        return self.c_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Separate(nn.Module):
    """The same, under names that say nothing, and with the scores written out."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.c, self.b, self.a = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Any) -> Any:
        q, k, v = heads(self.a(x)), heads(self.c(x)), heads(self.b(x))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.d((weights @ v).transpose(1, 2).flatten(-2))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        y = self.q(x)
        y[:, 0] = 0
        view = y.view(-1, 8)
        view[:, :4] += 1
        return self.o(y.relu_())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 9)
        self.head.weight = self.table.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.lstm(self.table(ids))[0])


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        self.batch, self.group, self.layer = nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.LayerNorm(6)

    def forward(self, x: Any) -> Any:
        return self.layer(self.group(self.batch(self.conv(x))))


def blank(module: Any) -> Any:
    """A copy with other weights."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0.5)
    return made


def tokens() -> Any:
    return torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def squares(turned: bool) -> nn.Sequential:
    return nn.Sequential(*((Turned if turned else nn.Linear)(8, 8) for _ in range(3)))


PAIRS = {
    "(in, out) into Linear": lambda: (squares(True), squares(False), noise(2, 8)),
    "Linear into (in, out)": lambda: (squares(False), squares(True), noise(2, 8)),
    "fused into separate": lambda: (Fused(), Separate(), noise(2, 5, 8)),
    "separate into fused": lambda: (Separate(), Fused(), noise(2, 5, 8)),
    "in place": lambda: (made := InPlace(), blank(made), noise(2, 5, 8)),
    "recurrent, tied": lambda: (made := Tied(), blank(made), tokens()),
    "norms": lambda: (made := Norms(), blank(made), noise(2, 4, 8)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_leaf_is_proved(name: str) -> None:
    source, like, x = PAIRS[name]()
    source, like = source.eval(), like.eval()
    plan = gx.plan(source, like, inputs=x)
    assert plan.complete, str(plan)
    assert plan.proof is not None
    assert not plan.proof.open
    like.load_state_dict(plan.run(source))
    torch.testing.assert_close(like(x), source(x), atol=1e-5, rtol=1e-5)


def test_linear_into_linear_is_a_copy() -> None:
    plan = gx.plan(squares(False), squares(False), inputs=noise(2, 8))
    assert [(entry.sources, entry.ops) for entry in plan.entries] == [(entry.targets, ()) for entry in plan.entries]


def test_meta_modules_are_ported_too() -> None:
    with torch.device("meta"):
        like = squares(False)
    source = squares(True)
    made = gx.port(source, like, inputs=noise(2, 8))
    torch.testing.assert_close(made["0.weight"], source.state_dict()["0.weight"].T)


def test_a_rule_that_running_refutes_is_an_error() -> None:
    rule = '{ source = "1.weight", target = "1.weight", layout = "identity" }'
    with pytest.raises(gx.errors.RulesError, match=r'"a b -> b a"'):
        gx.plan(squares(True), squares(False), rules=rule, inputs=noise(2, 8))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        return y if y.sum() > 0 else -y


class Random(Branching):
    def forward(self, x: Any) -> Any:
        return functional.dropout(self.fc(x), 0.5)


@pytest.mark.parametrize(("kind", "said"), [(Branching, "depends on data"), (Random, "draws random numbers")])
def test_what_cannot_be_followed_is_refused_by_name(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(gx.errors.ModelError, match=said):
        gx.plan(kind(), kind(), inputs=noise(2, 8))


def test_models_that_differ_are_not_proved() -> None:
    """Another activation: the plan is what names say, and where the models part is said."""
    like = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    plan = gx.plan(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), like, inputs=noise(2, 8))
    assert plan.proof is None
    assert "the models part at dot_general at 2" in str(plan)
