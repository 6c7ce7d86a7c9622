"""gx.check_parity end to end, torch against Linen and NNX."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen as fn
from flax import nnx
from torch import nn

import graftax as gx
from graftax.errors import ModelError, ParityError, PlanError, UsageError
from graftax.parity.records import Site
from graftax.plans import Question

WIDTH = 12
IDS = np.random.default_rng(0).integers(0, 17, (3, 5))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5)
        self.up = nn.Linear(WIDTH, 20)
        self.down = nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding, a layer called twice, another, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, WIDTH)
        self.shared = Layer()
        self.last = Layer()
        self.head = nn.Linear(WIDTH, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        x = self.shared(self.shared(self.embed(ids)))
        x = self.last(x)
        return {"logits": self.head(x), "states": (x, None)}


class LinenLayer(fn.Module):
    epsilon: float = 1e-5
    approximate: bool = False

    def setup(self):
        self.norm = fn.LayerNorm(epsilon=self.epsilon)
        self.up = fn.Dense(20)
        self.down = fn.Dense(WIDTH)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=self.approximate))


class LinenModel(fn.Module):
    epsilon: float = 1e-5
    approximate: bool = False

    def setup(self):
        self.embed = fn.Embed(17, WIDTH)
        self.shared = LinenLayer()
        self.last = LinenLayer(self.epsilon, self.approximate)

    def __call__(self, ids):
        x = self.last(self.shared(self.shared(self.embed(ids))))
        return {"logits": self.embed.attend(x), "states": (x, None)}


class NnxLayer(nnx.Module):
    def __init__(self, epsilon: float, approximate: bool, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 20, rngs=rngs)
        self.down = nnx.Linear(20, WIDTH, rngs=rngs)
        self.approximate = approximate

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=self.approximate))


class NnxModel(nnx.Module):
    def __init__(self, epsilon: float = 1e-5, approximate: bool = False, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(17, WIDTH, rngs=rngs)
        self.shared = NnxLayer(1e-5, False, rngs)
        self.last = NnxLayer(epsilon, approximate, rngs)

    def __call__(self, ids):
        x = self.last(self.shared(self.shared(self.embed(ids))))
        return {"logits": self.embed.attend(x), "states": (x, None)}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    made = Model().eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.ndim == 1:
                value.copy_(torch.randn(value.shape) * 0.3 + ("norm.weight" in name))
    return made


def linen(**changes: Any) -> Any:
    return gx.linen(LinenModel(**changes), jnp.asarray(IDS))


def flax_side(api: str, model: Model, **changes: Any) -> tuple[Any, Any]:
    """(flax_model, weights) of a port."""
    if api == "linen":
        like = linen(**changes)
        return like, gx.port(model, like)
    return gx.port(model, NnxModel(**changes, rngs=nnx.Rngs(1))), None


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_correct_port_holds(api: str, model: Model):
    report = gx.check_parity(model, *_with_inputs(flax_side(api, model)))
    assert report, str(report)
    assert report.first is None
    assert report.causes == report.weights == ()
    assert [row.path for row in report.outputs] == ["logits", "states/0"]
    assert report.outputs[0].metrics["top1"] == 1.0
    rows = {(row.site_torch, row.site_flax): row for row in report.layers}
    assert all(row.status == "ok" for row in report.layers), str(report)
    assert (Site("shared.up", 1), Site("shared/up", 1)) in rows, "a layer that is called twice has two rows"
    assert (Site("head"), Site("embed", 1)) in rows, "a tied head is the embedding's attend"
    assert report.paired[1:] == (8, 8)
    assert report.not_traced == {}
    assert "Parity holds" in str(report)
    json.dumps(report.as_json(), allow_nan=False)


def _with_inputs(side: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    return side[0], IDS, side[1]


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("changes", "path", "where", "cause"),
    [
        ({"approximate": True}, "last/down", "in", "activation"),
        ({"epsilon": 1e-2}, "last/norm", "out", "epsilon"),
    ],
)
def test_a_fault_is_located_and_named(api: str, changes: Any, path: str, where: str, cause: str, model: Model):
    report = gx.check_parity(model, *_with_inputs(flax_side(api, model, **changes)))
    assert not report
    assert report.first is not None
    assert (report.first.site_flax.path, report.where) == (path, where), str(report)
    assert [row.site_flax.path for row in report.layers if row.status == "diverges"] == [path], "and only there"
    assert report.causes[0].name == cause
    assert cause in str(report)
    with pytest.raises(ParityError, match=path):
        gx.assert_parity(model, *_with_inputs(flax_side(api, model, **changes)))


def test_weights_of_any_kind(model: Model, tmp_path: Any):
    good = gx.port(model, linen())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    gx.port_file(model, linen(), tmp_path / "w.safetensors")
    for weights in (None, good, good["params"], model, model.state_dict(), tmp_path / "w.pt",
                    tmp_path / "w.safetensors"):  # fmt: skip
        assert gx.check_parity(model, LinenModel(), IDS, weights)
    abstract = nnx.eval_shape(lambda: NnxModel(rngs=nnx.Rngs(0)))
    assert gx.check_parity(model, abstract, IDS)
    assert gx.check_parity(model, NnxModel(rngs=nnx.Rngs(3)), IDS, model.state_dict())
    assert not gx.check_parity(model, NnxModel(rngs=nnx.Rngs(3)), IDS, causes=False), "its own weights are judged"
    with pytest.raises(PlanError, match="do not fit"):
        gx.check_parity(model, linen(), IDS, {"params": {"embed": good["params"]["embed"]}})


def test_one_ulp_in_one_weight_is_found(model: Model):
    weights = jax.tree.map(np.array, gx.port(model, linen()))
    kernel = weights["params"]["last"]["up"]["kernel"]
    kernel[3, 4] = np.nextafter(kernel[3, 4], np.float32(9))
    report = gx.check_parity(model, linen(), IDS, weights)
    assert not report
    assert report.first is None, "no run can show it"
    (row,) = report.weights
    assert (row.path, row.differing, row.largest_ulp) == ("params/last/up/kernel", 1, 1.0)
    assert "params/last/up/kernel" in str(report)


def test_a_weight_fault_is_the_layers_own(model: Model):
    weights = jax.tree.map(np.array, gx.port(model, linen()))
    weights["params"]["last"]["up"]["kernel"][2] *= 1.02
    report = gx.check_parity(model, linen(), IDS, weights)
    assert report.first is not None
    assert (report.first.site_flax.path, report.where) == ("last/up", "out")
    assert [row.site_flax.path for row in report.layers if row.status == "diverges"] == ["last/up"]


def test_nan_is_an_alarm(model: Model):
    weights = jax.tree.map(np.array, gx.port(model, linen()))
    weights["params"]["last"]["up"]["bias"][0] = np.nan
    report = gx.check_parity(model, linen(), IDS, weights, causes=False)
    assert report.first is not None
    assert report.first.site_flax.path == "last/up"
    assert report.first.out_ratio == float("inf")
    json.dumps(report.as_json(), allow_nan=False)


def test_neither_model_is_changed(model: Model):
    flax_model, _ = flax_side("nnx", model)
    before = jax.tree.map(np.array, nnx.state(flax_model))
    torch_before = {name: value.clone() for name, value in model.state_dict().items()}
    call = nnx.Linear.__call__
    gx.check_parity(model, flax_model, IDS)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(flax_model)))
    assert all(torch.equal(value, torch_before[name]) for name, value in model.state_dict().items())
    assert nnx.Linear.__call__ is call
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_layers_only_outputs_are_judged(model: Model):
    report = gx.check_parity(model, linen(epsilon=1e-2), IDS, layers=False)
    assert not report
    assert report.layers == ()
    assert not report.outputs[0].ok


def test_tolerances_decide_the_outputs(model: Model):
    report = gx.check_parity(model, linen(epsilon=2e-5), IDS, layers=False, atol=1e-2)
    assert report
    assert report.outputs[0].metrics["outside"] == 0
    assert not gx.check_parity(model, linen(epsilon=2e-5), IDS, layers=False, atol=1e-9)


# ---------------------------------------------------------------- inputs and layouts


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(self.conv(x))
        return y, self.head(y.mean((2, 3)))


class LinenImage(fn.Module):
    @fn.compact
    def __call__(self, x, train: bool):
        y = fn.Conv(6, (3, 3), name="conv")(x)
        y = fn.BatchNorm(use_running_average=not train, epsilon=1e-5, momentum=0.9, name="norm")(y)
        return y, fn.Dense(4, name="head")(y.mean((1, 2)))


PICTURE = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def image() -> Image:
    torch.manual_seed(1)
    made = Image().eval()
    made.norm.running_mean.normal_()
    made.norm.running_var.uniform_(0.5, 1.5)
    return made


def test_images_by_declared_layout(image: Image):
    like = gx.linen(LinenImage(), jnp.ones((2, 8, 8, 3)), train=False)
    report = gx.check_parity(image, like, PICTURE, layout="NCHW -> NHWC", out_layout="N C H W -> N H W C")
    assert report, str(report)
    assert report.outputs[0].shape == (2, 8, 8, 6)
    undeclared = gx.check_parity(image, like, torch.from_numpy(PICTURE), layout="NCHW -> NHWC")
    assert undeclared, "an output of another shape is taken in the order that fits"
    assert "was compared as (2, 8, 8, 6)" in undeclared.outputs[0].text
    own = gx.Inputs(torch=PICTURE, flax=((jnp.asarray(PICTURE.transpose(0, 2, 3, 1)),), {"train": False}))
    assert gx.check_parity(image, LinenImage(), own)
    flags = gx.linen(LinenImage(), jnp.ones((2, 8, 8, 3)), True)
    trained = gx.check_parity(image, flags, PICTURE, layout="NCHW -> NHWC")
    assert trained.first is not None
    assert trained.first.site_flax.path == "norm"
    assert trained.causes[0].name == "train or eval statistics"


def test_a_missing_layout_is_asked_for(image: Image):
    with pytest.raises(ModelError, match="layout='NCHW -> NHWC'"):
        gx.check_parity(image, LinenImage(), gx.Inputs(torch=PICTURE, flax=((PICTURE,), {"train": False})),
                        gx.port(image, gx.linen(LinenImage(), jnp.ones((2, 8, 8, 3)), train=False)))  # fmt: skip
    with pytest.raises(UsageError, match="is not axes"):
        gx.check_parity(image, LinenImage(), PICTURE, layout="NCHW")


def test_calls_of_their_own(model: Model):
    """torch_call and flax_call pick outputs, flags and methods; inputs may be torch, jax or NumPy."""
    given = gx.Inputs(
        torch=torch.from_numpy(IDS),
        flax=jnp.asarray(IDS),
        torch_call=lambda module, ids: module(ids)["logits"].argmax(-1),
        flax_call=lambda module, ids: module(ids)["logits"].argmax(-1),
    )
    report = gx.check_parity(model, LinenModel(), given)
    assert report
    assert report.outputs[0].shape == (3, 5)
    assert report.outputs[0].path == ""


def test_what_torch_compile_gives_is_the_module_inside(model: Model):
    report = gx.check_parity(torch.compile(model), linen(), IDS)
    assert report
    assert report.not_traced == {}
    assert report.torch_name == "Model"


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5)

    def forward(self, x: torch.Tensor) -> Any:
        out, (h, c) = self.lstm(x)
        return out, h, c


class LinenLoop(fn.Module):
    @fn.compact
    def __call__(self, x):
        (c, h), out = fn.RNN(fn.OptimizedLSTMCell(5), name="lstm", return_carry=True)(x)
        return out, h, c


@pytest.mark.parametrize("length", [7, 2])
def test_a_layout_for_some_outputs(length: int):
    """torch's recurrent modules have time first, and a layer axis in the carry; with two steps all lengths are two."""
    torch.manual_seed(5)
    x = np.random.default_rng(5).normal(size=(length, 2, 6)).astype(np.float32)
    report = gx.check_parity(
        SequenceFirst().eval(), LinenLoop(), x, layout="TBC -> BTC", out_layout={"0": "TBC -> BTC"}
    )
    assert report, str(report)
    assert [row.status for row in report.layers] == ["ok", "ok"]


def test_outputs_that_do_not_match_are_said(model: Model):
    few = gx.Inputs(torch=IDS, flax=IDS, flax_call=lambda module, ids: module(ids)["logits"])
    report = gx.check_parity(model, LinenModel(), few)
    assert not report
    assert report.outputs[1].text == "Flax gives 1 array(s), torch 2"


# ---------------------------------------------------------------- whose code failed


def test_a_module_left_in_train_mode_is_an_error():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(4)(x)

    with pytest.raises(ModelError, match="are in train mode") as caught:
        gx.check_parity(module, Flax(), np.ones((2, 4), np.float32))
    assert "torch 1: Dropout" in str(caught.value)


def test_a_random_model_is_an_error():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + torch.randn(x.shape)

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            return fn.Dense(4, name="linear")(x)

    with pytest.raises(ModelError, match="draws random numbers"):
        gx.check_parity(Noisy().eval(), Flax(), np.ones((2, 4), np.float32))


def test_errors_of_either_model_name_whose_code_it_was(model: Model):
    with pytest.raises(ModelError, match="the torch model failed in Embedding at embed") as caught:
        gx.check_parity(model, linen(), gx.Inputs(torch=IDS + 100, flax=IDS))
    assert "test_check.py" in str(caught.value)
    assert caught.value.exit_code == 70

    class Broken(LinenModel):
        def __call__(self, ids):
            out = super().__call__(ids)
            if ids.shape[0] == 3:
                raise ValueError("out of coffee")
            return out

    with pytest.raises(ModelError, match="out of coffee") as caught:
        gx.check_parity(model, gx.linen(Broken(), jnp.asarray(IDS[:2])), IDS, gx.port(model, linen()))
    assert "Flax" in str(caught.value)
    assert "test_check.py" in str(caught.value)


def test_what_is_no_model_is_refused(model: Model):
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        gx.check_parity(model.state_dict(), linen(), IDS)
    with pytest.raises(UsageError, match="cannot be run"):
        gx.check_parity(model, gx.port(model, linen()), IDS)
    with pytest.raises(UsageError, match="no inputs"):
        gx.check_parity(model, linen(), gx.Inputs())


# ---------------------------------------------------------------- what is not traced


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.used = nn.Linear(5, 5)
        self.skipped = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, skip: bool = True) -> torch.Tensor:
        x = F.linear(self.first(x), self.used.weight, self.used.bias)
        return self.last(x if skip else self.skipped(x))


class LinenFunctional(fn.Module):
    def setup(self):
        self.first, self.used, self.skipped, self.last = fn.Dense(5), fn.Dense(5), fn.Dense(5), fn.Dense(3)

    def __call__(self, x, skip=True):
        x = self.used(self.first(x))
        if not skip or self.is_initializing():
            x = self.skipped(x)
        return self.last(x)


def test_functional_use_and_skipped_branches_are_named():
    torch.manual_seed(2)
    module = Functional().eval()
    x = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    report = gx.check_parity(module, LinenFunctional(), x)
    assert report, str(report)
    assert report.not_traced["torch:used"] == "its weights are used outside its forward (functional use)"
    assert report.not_traced["torch:skipped"] == "never called"
    assert {row.site_torch.path for row in report.layers} == {"", "first", "last"}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ScanLayer(fn.Module):
    @fn.compact
    def __call__(self, x, at):
        h = fn.LayerNorm(epsilon=1e-5, name="norm")(x)
        h = fn.Dense(20, name="up")(h)
        h = jnp.where(at == 1, jax.nn.gelu(h, approximate=True), jax.nn.gelu(h, approximate=False))
        return x + fn.Dense(WIDTH, name="down")(h), None


class Scanned(fn.Module):
    fault: bool = False

    @fn.compact
    def __call__(self, x):
        loop = fn.scan(ScanLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return loop(name="layers")(x, jnp.arange(3) if self.fault else jnp.zeros(3, jnp.int32))[0]


def test_the_steps_of_a_scan_are_layers():
    torch.manual_seed(3)
    module = Stack().eval()
    x = np.random.default_rng(3).normal(size=(2, 4, WIDTH)).astype(np.float32)
    report = gx.check_parity(module, Scanned(), x)
    assert report, str(report)
    assert report.paired[1:] == (9, 9)
    report = gx.check_parity(module, Scanned(fault=True), x)
    assert report.first is not None
    assert report.first.site_torch == Site("layers.1.down")
    assert report.first.site_flax == Site("layers/down", 1)
    assert report.where == "in"


def test_meta_weights_come_from_the_source(model: Model):
    with torch.device("meta"):
        empty = Model().eval()
    assert gx.check_parity(empty, linen(), IDS, source=model.state_dict())
    with pytest.raises(ModelError, match="has no values"):
        gx.check_parity(empty, linen(), IDS, gx.port(model, linen()))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_large_model_is_judged_block_by_block(api: str, model: Model, monkeypatch: Any):
    """Weights are lent to modules as they are called; faults are found as in a model that is held."""
    monkeypatch.setattr("graftax.parity.prepare.HELD", 100)
    with torch.device("meta"):
        empty = Model().eval()

    def abstract(**changes: Any) -> Any:
        return linen(**changes) if api == "linen" else nnx.eval_shape(lambda: NnxModel(**changes, rngs=nnx.Rngs(0)))

    report = gx.check_parity(empty, abstract(), IDS, source=model.state_dict())
    assert report, str(report)
    assert any("block by block" in note for note in report.notes)
    assert report.paired[1:] == (8, 8)
    wrong = gx.check_parity(empty, abstract(epsilon=1e-2), IDS, source=model.state_dict())
    assert wrong.first is not None
    assert wrong.first.site_flax.path == "last/norm"
    assert wrong.causes[0].name == "epsilon"
    other = {name: value + 1e-3 for name, value in model.state_dict().items()}
    assert gx.check_parity(empty, abstract(), IDS, other, source=model.state_dict(), causes=False).weights


def test_torch_weights_without_a_place_are_noted(model: Model):
    class Wider(Model):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(3, 5)

    wider = Wider().eval()
    report = gx.check_parity(wider, linen(), IDS, layers=False)
    assert report
    assert (
        report.notes[0]
        == "2 torch tensor(s) are unexpected keys, left out because no Flax leaf takes them: extra.weight, extra.bias"
    )


def test_a_search_that_fails_costs_the_cause_and_not_the_report(model: Model, monkeypatch: Any):
    def fail(divergence: Any) -> Any:
        raise RuntimeError("lost")

    monkeypatch.setattr("graftax.parity.causes.find_causes", fail)
    report = gx.check_parity(model, linen(epsilon=1e-2), IDS)
    assert not report
    assert report.first is not None
    assert report.causes == ()
    assert any("RuntimeError: lost" in note for note in report.notes)


def test_an_open_plan_with_weights_at_hand_judges_what_is_settled():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)
            self.fc = nn.Linear(4 * 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).flatten(1))

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x):
            x = fn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
            return fn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))

    torch.manual_seed(4)
    module, x = Flat().eval(), np.random.default_rng(4).normal(size=(2, 2, 4, 4)).astype(np.float32)
    like = gx.linen(Flax(), jnp.ones((2, 4, 4, 2)))
    rule = 'rules = [{ torch = "fc.weight", flax = "fc/kernel", flatten = "C=4 H=2 W=2" }]'
    full = gx.plan(module, like, rules=rule)
    left = tuple(entry for entry in full.entries if entry.sources != ("fc.weight",))
    asked = Question("flatten", "which order?", ("params/fc/kernel",), ("fc.weight",))
    unsettled = replace(full, entries=left, questions=(asked,))
    with pytest.raises(PlanError, match="which order"):
        gx.check_parity(module, like, x, plan=unsettled, layout="NCHW -> NHWC")
    weights = gx.port(module, like, rules=rule)
    report = gx.check_parity(module, like, x, weights, plan=unsettled, layout="NCHW -> NHWC")
    assert report, str(report)
    assert any("leaves 1 question(s) or misfit(s) open" in note for note in report.notes)
    assert "torch:fc" in report.not_traced
    settled = gx.check_parity(module, like, x, weights, plan=full, layout="NCHW -> NHWC")
    assert settled
    assert settled.notes == ()
    assert [row.site_torch.path for row in settled.layers] == ["", "conv", "fc"]
