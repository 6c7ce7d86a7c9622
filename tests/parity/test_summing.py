"""What a sum in a row loses in float32: the size is that of real sums, and it is the floor of a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flax import linen as fn

import graftax as gx
from graftax.parity.records import UNIT
from graftax.parity.summing import EACH, in_a_row
from graftax.parity.torch_runner import TorchRunner

ROWS, COLUMNS = 6, 16


def factors(terms: int, signs: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ROWS, terms), (terms, COLUMNS)."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((ROWS, terms)), rng.standard_normal((terms, COLUMNS))
    if signs != "random":
        a, b = np.abs(a), np.abs(b)
    if signs == "cancelling":
        b[terms // 2 :] *= -1
    return a.astype("float32"), b.astype("float32")


@pytest.mark.parametrize("signs", ["like", "random", "cancelling"])
@pytest.mark.parametrize("terms", [7, 100, 1000, 4000])
def test_the_size_is_that_of_sums_in_a_row(terms: int, signs: str) -> None:
    a, b = factors(terms, signs)
    total = np.zeros((ROWS, COLUMNS), np.float32)
    for k in range(terms):  # as a fused multiply-add does it: rounded once
        total = (total.astype("float64") + np.outer(a[:, k].astype("float64"), b[k])).astype("float32")
    off = np.linalg.norm(total - a.astype("float64") @ b.astype("float64"))
    expected = EACH * float(in_a_row(torch.from_numpy(a), torch.from_numpy(b)).sum().sqrt())
    assert 0.6 < off / expected < 1.6


LAYERS: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "linear": (torch.nn.Linear(600, 8), (3, 600)),
    "row": (torch.nn.Linear(600, 8, bias=False), (600,)),
    "conv": (torch.nn.Conv2d(20, 8, 3), (2, 20, 6, 6)),
    "grouped": (torch.nn.Conv1d(32, 8, 9, groups=2), (2, 32, 20)),
    "transposed": (torch.nn.ConvTranspose1d(32, 8, 9), (2, 32, 20)),
    "bilinear": (torch.nn.Bilinear(20, 30, 8), (3, 20)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_contraction_is_off_by_more_than_torch_is(name: str) -> None:
    module, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(np.abs(rng.standard_normal(tuple(parameter.shape))).astype("float32"))
    args = [np.abs(rng.standard_normal(shape)).astype("float32")]
    args += [np.abs(rng.standard_normal((3, 30))).astype("float32")] if name == "bilinear" else []
    want = TorchRunner(module, "float64").run(tuple(args), {}).astype("float64")
    off = TorchRunner(module).run(tuple(args), {}, in_a_row=0) - want
    error = np.linalg.norm(off) / np.linalg.norm(want)
    terms = {"linear": 600, "row": 600, "conv": 180, "grouped": 144, "transposed": 288, "bilinear": 600}[name]
    assert 0.5 < error / (0.245 * terms**0.5 * UNIT) < 1.5


def test_attention_and_lstm_are_taken_apart() -> None:
    class Attend(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    for module in (Attend().eval(), torch.nn.LSTM(16, 16).eval()):
        x = np.random.default_rng(0).standard_normal((1, 4, 16)).astype("float32")
        plain = TorchRunner(module)
        first = _arrays(plain.run((x,), {}))
        again = _arrays(plain.run((x,), {}))
        other = _arrays(plain.run((x,), {}, in_a_row=0))
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
        assert any((a != b).any() for a, b in zip(first, other, strict=True))
        assert all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(first, other, strict=True))


def _arrays(nest: Any) -> list[np.ndarray]:
    from graftax.adapters.nests import arrays

    return [array for _, array in arrays(nest)]


class Dense(fn.Module):
    features: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        return fn.Dense(self.features, name="down", use_bias=False)(x)


class Down(torch.nn.Module):
    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.down = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.down.weight.data = torch.from_numpy(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(x)


@pytest.mark.parametrize("signs", ["like", "cancelling"])
def test_one_row_of_a_wide_layer_raises_no_alarm_and_a_small_fault_does(signs: str) -> None:
    """XLA adds the terms of one row in a row, torch in lanes: correct ports were off by 9 to 17 x torch's own error."""
    a, b = factors(4096, signs)
    x, net = a[:1], Down(np.ascontiguousarray(b.T))
    like = gx.linen(Dense(COLUMNS), x)
    variables = gx.port(net, like)
    report = gx.check_parity(net, like, x, variables, causes=False)
    assert report, str(report)
    off = gx.replace(variables, {"params/down/kernel": lambda kernel: kernel * np.float32(1.0005)})
    assert not gx.check_parity(net, like, x, off, causes=False).outputs[0].ok
