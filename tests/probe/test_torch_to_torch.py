"""torch to torch: both modules are run, and no name decides."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graftax as gx
from graftax.probe.limits import Limits
from graftax.probe.values import Values


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


class Chain(nn.Module):
    """Four layers of equal shapes under four names; another activation before the last."""

    def __init__(self, names: str, act: Any) -> None:
        super().__init__()
        self.names, self.act = names, act
        for name in names:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Any) -> Any:
        *first, last = (getattr(self, name) for name in self.names)
        for n, layer in enumerate(first, 1):
            x = self.act(layer(x)) if n == len(first) else torch.relu(layer(x))
        return last(x)


def found_of(plan: Any) -> dict[str, str]:
    """source -> target of the weights that running found."""
    return {e.sources[0]: e.targets[0] for e in plan.entries if "found by running" in e.evidence[0]}


def test_what_is_found_before_models_part_is_kept() -> None:
    plan = gx.plan(Chain("abcd", torch.relu), Chain("dacb", torch.tanh), inputs=noise(2, 8))
    assert plan.proof is None
    crossed = dict(zip("abc", "dac", strict=True))
    assert found_of(plan) == {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in crossed.items() for leaf in ("weight", "bias")}
    assert "6 of 8 leaves were found before" in str(plan)
    assert "the models part at dot_general at b" in str(plan)
    assert not plan.complete


@pytest.mark.parametrize("most", [12, 24, 36])
def test_what_is_found_within_the_budget_is_kept(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftax.probe.both.GIVEN", Limits(seconds=60.0, evaluations=most))
    plan = gx.plan(Chain("abcd", torch.relu), Chain("dacb", torch.relu), inputs=noise(2, 8))
    found = found_of(plan)
    true = dict(zip("abcd", "dacb", strict=True))
    assert found
    assert all(target[0] == true[source[0]] for source, target in found.items())
    assert not plan.complete
    assert f"within 60 s and {most} trials" in str(plan)


class Branches(nn.Module):
    """Two layers that take one value: which is which shows only later."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.q, self.k, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), last

    def forward(self, x: Any) -> Any:
        return self.last(torch.sigmoid(self.q(x)) * self.k(x))


def test_what_had_an_alternative_is_not_kept() -> None:
    plan = gx.plan(Branches(torch.relu), Branches(torch.tanh), inputs=noise(2, 8))
    assert not found_of(plan)


class Maps(nn.Module):
    """Two outputs by name; one as (N, C, L), or as (N, L, C)."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv1d(6, 6, 1), nn.Linear(6, 6), last

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return {"logits": self.fc(y), "map": y.transpose(1, 2) if self.last else y}


@pytest.mark.parametrize(("layout", "proved"), [(None, False), ({"map": "NCL -> NLC"}, True), ("NCL -> NLC", False)])
def test_the_layout_of_each_output_is_obeyed(layout: Any, proved: bool) -> None:
    plan = gx.plan(Maps(False), Maps(True), inputs=gx.Inputs(noise(2, 6, 6), out_layout=layout))
    assert (plan.proof is not None) is proved


def test_what_no_op_writes_is_asked_with_what_running_found() -> None:
    source = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))
    like = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = gx.plan(source.eval(), like.eval(), inputs=noise(2, 8))
    (question,) = plan.questions
    assert question.targets == ("0.weight",)
    assert "running both models finds 0.weight in 0.parametrizations.weight.original" in question.text
    assert "graftax has no op for w / (u W v)" in question.text
    assert {entry.targets[0] for entry in plan.entries} == {"0.bias", "2.weight", "2.bias"}


def test_leaves_that_may_be_exchanged_are_said() -> None:
    source = Tied().eval()
    plan = gx.plan(source, blank(source), inputs=tokens())
    assert plan.proof is not None
    (fact,) = plan.proof.facts
    assert fact.startswith("lstm.bias_ih_l0 and lstm.bias_hh_l0 are interchangeable")
    assert fact in str(plan)
    assert gx.plan(Fused().eval(), Separate().eval(), inputs=noise(2, 5, 8)).proof.facts == ()  # pyright: ignore


def normed(epsilon: float) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, eps=epsilon), nn.Linear(8, 8))


def test_a_port_gives_nothing_if_the_outputs_differ_on_the_real_weights(tmp_path: Path) -> None:
    source, out = normed(1e-5), tmp_path / "out.safetensors"
    assert gx.plan(source, normed(3e-3), inputs=noise(2, 8)).complete
    with pytest.raises(gx.errors.ParityError, match="Sequential and Sequential differ on the real weights") as caught:
        gx.port_file(source, normed(3e-3), out, inputs=noise(2, 8))
    assert not caught.value.report  # pyright: ignore[reportAttributeAccessIssue]
    assert not out.exists()
    gx.port_file(source, normed(1e-5), out, inputs=noise(2, 8))
    assert "proved by running both models" in str(gx.inspect(out))


@pytest.mark.parametrize("epsilon", [1e-5, 3e-3])
def test_a_port_whose_values_are_too_many_to_search_is_still_proved_on_the_real_weights(
    epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the outputs are held then."""
    monkeypatch.setattr("graftax.probe.torch_origin.Values", lambda: Values(most=100))
    source, like = normed(1e-5), normed(epsilon)
    assert "take more than" in str(gx.plan(source, like, inputs=noise(2, 8)))
    with contextlib.nullcontext() if epsilon == 1e-5 else pytest.raises(gx.errors.ParityError, match="real weights"):
        gx.port(source, like, inputs=noise(2, 8))
