"""The torch runner: what taps see, float64 as it should be, and errors that say whose code failed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graftax.errors import ModelError, ReplayError
from graftax.execute.opening import open_tree
from graftax.parity.records import Site
from graftax.parity.torch_runner import TorchRunner


class Tape:
    """Keeps events; may put values in."""

    def __init__(self, enter: Any = None, leave: Any = None) -> None:
        self.events: list[tuple[str, Site, Any]] = []
        self.put_in, self.put_out = enter or {}, leave or {}

    def enter(self, site: Site, args: Any, kwargs: Any) -> Any:
        self.events.append(("in", site, (args, kwargs)))
        return self.put_in.get(site)

    def leave(self, site: Site, output: Any) -> Any:
        self.events.append(("out", site, output))
        return self.put_out.get(site)

    def at(self, what: str, path: str, call: int = 0) -> Any:
        return next(value for kind, site, value in self.events if kind == what and site == Site(path, call))


class Net(nn.Module):
    """In-place activations, a module called twice and through forward, functional use, one never used, an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.act = nn.ReLU(inplace=True)
        self.b = nn.Linear(5, 5)
        self.c = nn.Linear(5, 3)
        self.d = nn.Linear(5, 3)
        self.alias = self.a

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        h = self.act(self.a(x))
        h = self.b.forward(h)
        h = self.b(h) * scale
        return {"o": F.linear(h, self.c.weight), "rest": (h, None)}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


def test_taps_see_every_call_and_in_place_ops_corrupt_nothing(net: Net):
    tape = Tape()
    runner = TorchRunner(net, "float64")
    out = runner.run((X,), {"scale": 2.0}, watch=["", "a", "act", "b", "alias", "c", "d"], tap=tape)
    sites = [(what, str(site)) for what, site, _ in tape.events]
    assert sites == [
        ("in", "(the model)"), ("in", "a"), ("out", "a"), ("in", "act"), ("out", "act"), ("in", "b"), ("out", "b"),
        ("in", "b (call 2)"), ("out", "b (call 2)"), ("out", "(the model)"),
    ]  # fmt: skip
    before = tape.at("out", "a")
    assert (before < 0).any(), "the ReLU that came after has changed what was recorded"
    assert (tape.at("out", "act") == np.maximum(before, 0)).all()
    (given,), kwargs = tape.at("in", "")
    assert (given == X).all()
    assert kwargs == {"scale": 2.0}
    assert out["o"].dtype == np.float32
    assert out["rest"][1] is None
    assert runner.not_traced() == {
        "c": "its weights are used outside its forward (functional use)",
        "d": "never called",
    }


def test_arrays_are_kept_once(net: Net):
    tape = Tape()
    TorchRunner(net, "float64").run((X,), {}, watch=["a", "act", "b"], tap=tape)
    assert tape.at("in", "act")[0][0] is tape.at("out", "a")
    assert tape.at("in", "b")[0][0] is tape.at("out", "act")
    assert tape.at("in", "b", 1)[0][0] is tape.at("out", "b")


def test_a_tap_may_put_other_values_in(net: Net):
    other = np.full((2, 5), 0.5, np.float32)
    given = Tape({Site("b"): ((other,), {})}, {Site("b", 1): other})
    out = TorchRunner(net).run((X,), {}, watch=["b"], tap=given)
    want = net.b(torch.from_numpy(other)).detach().numpy()
    assert np.allclose(given.at("out", "b"), want)
    assert (out["rest"][0] == other).all()
    wrong = Tape({Site("b"): ((other[:1],), {})})
    plain = TorchRunner(net).run((X,), {})
    assert (TorchRunner(net).run((X,), {}, watch=["b"], tap=wrong)["o"] == plain["o"]).all()


def test_the_model_is_as_before_also_when_it_raises(net: Net):
    class Mutable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net
            self.register_buffer("count", torch.zeros(1))
            self.cache: Any = None

        def forward(self, x: torch.Tensor, fail: bool) -> torch.Tensor:
            self.count += 1
            self.cache = x
            self.fresh = x
            out = self.inner(x)["o"]
            if fail:
                raise ValueError("out of coffee")
            return out

    module = Mutable().eval()
    state, attributes = copy.deepcopy(module.state_dict()), set(vars(module))
    random = torch.get_rng_state()
    for fail in (False, True):
        for dtype in ("float32", "float64"):
            runner = TorchRunner(module, dtype)
            if fail:
                with pytest.raises(ModelError, match="out of coffee"):
                    runner.run((X, True), {}, watch=["", "inner.a"], tap=Tape())
            else:
                runner.run((X, False), {}, watch=["", "inner.a"], tap=Tape())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert set(vars(module)) == attributes
    assert module.cache is None
    assert "forward" not in vars(net.a)
    assert not net.a._forward_hooks
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(torch.get_rng_state(), random)


# ---------------------------------------------------------------- float64


def first(value: Any) -> Any:
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value


LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), 1),
    "conv": (lambda: nn.Conv1d(7, 5, 3), 1),
    "batchnorm": (lambda: nn.BatchNorm1d(7), 1),
    "lstm": (lambda: nn.LSTM(16, 12, 2, bidirectional=True, batch_first=True), 1),
    "gru": (lambda: nn.GRU(16, 12), 1),
    "rnn": (lambda: nn.RNN(16, 12), 1),
    "mha": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), 3),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_float64_is_the_module_in_float64(name: str):
    torch.manual_seed(1)
    make, count = LAYERS[name]
    module = make().eval()
    x = torch.randn(3, 7, 16)
    got = first(TorchRunner(module, "float64").run((x.numpy(),) * count, {}))
    with torch.no_grad():
        want = first(copy.deepcopy(module).double()(*(x.double(),) * count)).float().numpy()
        low = first(module(*(x,) * count)).numpy()
    assert (got == want).mean() > 0.999, "rounded to float32 it is float64's result"
    assert (got != low).any(), "and not float32's"


class CastsInside(nn.Module):
    """What models do: cast to float32 by name, ask for dtypes, masks of finfo.min, a complex table made in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        angles = torch.rand(7, 8)
        self.register_buffer("table", torch.polar(torch.ones(7, 8), angles), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.softmax(self.linear(x).to(torch.float32), -1, dtype=torch.float32).type_as(x)
        h = torch.view_as_real(torch.view_as_complex(h.float().reshape(*h.shape[:-1], -1, 2)) * self.table).flatten(2)
        mask = torch.full((7, 7), torch.finfo(self.scale.dtype).min, dtype=self.scale.dtype).triu(1)
        q = h[:, None]
        h = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]
        out = torch.zeros(x.shape, dtype=torch.float32)
        out += h
        out[:, 0] = h[:, 1]
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale.to(out.dtype)
        return out.float()


def test_casts_inside_do_not_bring_float32_back():
    torch.manual_seed(2)
    module = CastsInside().eval()
    x = torch.randn(3, 7, 16)
    got = TorchRunner(module, "float64").run((x.numpy(),), {})

    class Wide(CastsInside):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.softmax(self.linear(x), -1)
            h = torch.view_as_real(torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2)) * self.table).flatten(2)
            mask = torch.full((7, 7), -1e300, dtype=torch.float64).triu(1)
            q = h[:, None]
            h = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]
            out = h.clone()
            out[:, 0] = h[:, 1]
            return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    wide = Wide().double().eval()
    wide.load_state_dict(module.state_dict())
    wide.table = module.table.to(torch.complex128)
    with torch.no_grad():
        want = wide(x.double()).numpy()
        low = module(x).numpy()
    assert (got == want.astype(np.float32)).mean() > 0.99
    assert (low == want.astype(np.float32)).mean() < 0.8, "the case must tell the two apart"


def test_half_precision_weights_are_run_in_float32():
    torch.manual_seed(3)
    module = nn.Linear(16, 8).bfloat16().eval()
    x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    got = TorchRunner(module, "float32").run((x,), {})
    weight, bias = module.weight.float(), module.bias.float()
    assert np.allclose(got, F.linear(torch.from_numpy(x), weight, bias).detach().numpy(), rtol=1e-6, atol=1e-6)
    assert module.weight.dtype is torch.bfloat16


def test_meta_weights_are_read_from_the_source_as_they_are_used(net: Net):
    with torch.device("meta"):
        empty = Net().eval()
    source = open_tree(net.state_dict())
    for dtype in ("float64", "float32"):
        got = TorchRunner(empty, dtype, source).run((X,), {})
        want = TorchRunner(net, dtype).run((X,), {})
        assert (got["o"] == want["o"]).all()
    assert all(p.is_meta for p in empty.parameters())
    with pytest.raises(ModelError, match=r"a\.weight has no values"):
        TorchRunner(empty, "float64").run((X,), {})


# ---------------------------------------------------------------- errors


def test_an_error_names_the_module_and_the_users_line(net: Net):
    with pytest.raises(ModelError) as caught:
        TorchRunner(net, "float64").run((X[:, :3],), {})
    text = str(caught.value)
    assert "torch model failed in Linear at a" in text
    assert "test_torch_runner.py:" in text
    assert "in forward" in text
    assert "float32[2, 3]" in text
    assert caught.value.exit_code == 70


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Dropout(0.1), "Dropout drops at random"),
        (lambda: nn.BatchNorm1d(4), "BatchNorm1d uses the batch's statistics"),
        (lambda: nn.LSTM(4, 4, 2, dropout=0.3), "LSTM drops at random"),
    ],
)
def test_a_layer_left_in_train_mode_is_named(make: Any, says: str):
    module = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ModelError, match="are in train mode") as caught:
        TorchRunner(module).run((X,), {})
    assert f"torch 1: {says}" in str(caught.value)
    assert ".eval()" in str(caught.value)
    TorchRunner(module.eval()).run((X,), {})


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.linear(x), 0.5, self.training)


def test_functional_dropout_in_train_mode_is_named():
    module = nn.Sequential(nn.Linear(4, 4), Functional())
    with pytest.raises(ModelError, match="torch 1: Functional draws random numbers"):
        TorchRunner(module, "float64").run((X,), {})
    runner = TorchRunner(module.eval(), "float64")
    runner.run((X,), {})
    assert runner.drawn == {}


def test_random_numbers_drawn_in_evaluation_are_noted():
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(x.shape)

    runner = TorchRunner(nn.Sequential(Noise()).eval(), "float64")
    runner.run((X,), {})
    assert runner.drawn == {"0": "randn"}


# ---------------------------------------------------------------- one module


def test_replay_with_other_settings_and_weights():
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval()
    runner = TorchRunner(module, "float64")
    plain = runner.replay("1", (X,), {})
    wide = runner.replay("1", (X,), {}, settings={"eps": 0.1})
    assert np.abs(plain - wide).max() > 1e-3
    weight = np.full(4, 2.0, np.float32)
    doubled = runner.replay("1", (X,), {}, leaves={"1.weight": weight})
    assert np.allclose(doubled, 2 * plain, atol=1e-6)
    assert module[1].eps == 1e-5
    assert (module[1].weight == 1).all()
    with pytest.raises(ReplayError, match="no module"):
        runner.replay("7", (X,), {})
    with pytest.raises(ReplayError, match="cannot be run alone"):
        runner.replay("0", (X[:, :2],), {})
