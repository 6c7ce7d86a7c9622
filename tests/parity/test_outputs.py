"""Shapes of outputs: axes of length one are part of what a model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx

import graftax as gx

X = np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
Shape = Callable[[Any], Any]


class Torch(torch.nn.Module):
    def __init__(self, shaped: Shape, width: int) -> None:
        super().__init__()
        self.shaped, self.a = shaped, torch.nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> Any:
        return self.shaped(self.a(x))


class Linen(fn.Module):
    shaped: Shape
    width: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        return self.shaped(fn.Dense(self.width, name="a")(x))


class Nnx(nnx.Module):
    def __init__(self, shaped: Shape, width: int, rngs: nnx.Rngs) -> None:
        self.shaped, self.a = shaped, nnx.Linear(8, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.shaped(self.a(x))


def check(torch_shaped: Shape, flax_shaped: Shape, width: int = 1, api: str = "linen", **options: Any) -> Any:
    net = Torch(torch_shaped, width).eval()
    like = (
        gx.linen(Linen(flax_shaped, width), X)
        if api == "linen"
        else nnx.eval_shape(lambda: Nnx(flax_shaped, width, nnx.Rngs(0)))
    )
    return gx.check_parity(net, like, options.pop("inputs", X), gx.port(net, like), **options)


def same(y: Any) -> Any:
    return y


def flat(y: Any) -> Any:
    return y[..., 0]


OTHER: dict[str, tuple[Shape, Shape, str, str]] = {
    "column against vector": (same, flat, "(4, 1)", "(4,)"),
    "vector against column": (flat, same, "(4,)", "(4, 1)"),
    "row against vector": (lambda y: y.T, flat, "(1, 4)", "(4,)"),
    "column against row": (same, lambda y: y.T, "(4, 1)", "(1, 4)"),
    "map of one place": (lambda y: y[..., None], flat, "(4, 1, 1)", "(4,)"),
    "map of one place against column": (lambda y: y[..., None], same, "(4, 1, 1)", "(4, 1)"),
    "scalar": (lambda y: y.mean(), lambda y: y.mean()[None], "()", "(1,)"),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_axes_of_length_one_tell_outputs_apart(name: str, api: str) -> None:
    torch_shaped, flax_shaped, want, have = OTHER[name]
    report = check(torch_shaped, flax_shaped, api=api)
    assert not report
    assert report.outputs[0].text == f"shape mismatch: Flax gives {have}, torch {want}"
    assert report.outputs[0].text in " ".join(str(report).split())


def test_tolerances_do_not_hide_a_shape() -> None:
    assert not check(same, flat, atol=1e-3)


def test_other_orders_of_axes_hold_and_are_said() -> None:
    report = check(lambda y: y.reshape(4, 1, 2, 3), lambda y: y.reshape(4, 1, 2, 3).transpose(0, 2, 3, 1), 6)
    assert report
    assert "was compared as (4, 2, 3, 1)" in report.outputs[0].text
    declared = check(lambda y: y.reshape(4, 6, 1, 1), lambda y: y.reshape(4, 1, 1, 6), 6, out_layout="NCHW -> NHWC")
    assert declared


def test_a_call_settles_it() -> None:
    both = gx.Inputs(torch=((X,), {}), flax=((X,), {}), torch_call=lambda model, x: model(x)[..., 0])
    assert check(same, flat, inputs=both)


class Recurrent(torch.nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.gru = last, torch.nn.GRU(8, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        steps, state = self.gru(x)
        return state if self.last else steps


class Loop(fn.Module):
    last: bool

    @fn.compact
    def __call__(self, x: Any) -> Any:
        state, steps = fn.RNN(fn.GRUCell(5, name="cell"), return_carry=True, name="gru")(x)
        return state if self.last else steps[0]


@pytest.mark.parametrize("layers", [True, False])
def test_torch_has_an_axis_of_layers_before_a_state(layers: bool) -> None:
    x = np.random.default_rng(1).standard_normal((3, 4, 8)).astype("float32")
    net = Recurrent(True).eval()
    torch.nn.init.zeros_(net.gru.bias_hh_l0)
    report = gx.check_parity(net, gx.linen(Loop(True), x), x, layers=layers)
    assert report, str(report)
    assert report.outputs[0].text.startswith("torch's shape (1, 3, 5) was compared as (3, 5)")


def test_all_steps_of_one_sequence_are_no_state() -> None:
    x = np.random.default_rng(1).standard_normal((1, 4, 8)).astype("float32")
    net = Recurrent(False).eval()
    torch.nn.init.zeros_(net.gru.bias_hh_l0)
    assert not gx.check_parity(net, gx.linen(Loop(False), x), x)
