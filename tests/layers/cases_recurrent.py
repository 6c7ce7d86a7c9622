"""Parity cases of LSTM, GRU and RNN."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from .harness import Case

_LINEN_CELLS = {
    "LSTM": fn.LSTMCell, "optimized LSTM": fn.OptimizedLSTMCell, "GRU": fn.GRUCell, "RNN": fn.SimpleCell,
}  # fmt: skip
_NNX_CELLS = {
    "LSTM": nnx.LSTMCell, "optimized LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell, "RNN": nnx.SimpleCell,
}  # fmt: skip


class LinenStack(fn.Module):
    """Layers of cells, one or both directions, made in the order of their calls."""

    cell: Any
    layers: int
    directions: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.layers):
            if self.directions == 2:
                x = fn.Bidirectional(fn.RNN(self.cell()), fn.RNN(self.cell()))(x)
            else:
                x = fn.RNN(self.cell())(x)
        return x


class NnxStack(nnx.Module):
    def __init__(self, cell: Any, i: int, hidden: int, layers: int, directions: int, rngs: nnx.Rngs) -> None:
        made = []
        for layer in range(layers):
            width = i if layer == 0 else hidden * directions
            rnns = [nnx.RNN(cell(width, hidden, rngs=rngs), rngs=rngs) for _ in range(directions)]
            made.append(nnx.Bidirectional(*rnns, rngs=rngs) if directions == 2 else rnns[0])
        self.layers = nnx.List(made)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def recurrent(cell: str, i: int, hidden: int, layers: int = 1, directions: int = 1, **more: Any) -> Case:
    torch_kind = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[cell.rpartition(" ")[2]]
    relu = {"nonlinearity": "relu"} if more.pop("relu", False) else {}
    flax_relu = {"activation_fn": fn.relu} if relu else {}
    plain = layers == directions == 1
    return Case(
        f"{cell} {i} to {hidden}, {layers} x {directions}{', relu' if relu else ''}", cell.rpartition(" ")[2],
        lambda: torch_kind(i, hidden, layers, bidirectional=directions == 2, batch_first=True, **relu),
        lambda: LinenStack(lambda: _LINEN_CELLS[cell](hidden, **flax_relu), layers, directions),
        lambda r: NnxStack(
            lambda a, b, rngs: _NNX_CELLS[cell](a, b, rngs=rngs, **flax_relu), i, hidden, layers, directions, r
        ),
        (2, 5, i), on_torch=lambda m, x: m(x)[0], exact=False,
        variant="one cell" if plain else f"{layers} layers, {'bidirectional' if directions == 2 else 'one direction'}",
        by="modules" if plain else "convention", **more,
    )  # fmt: skip


def without_hidden_bias(module: Any) -> None:
    """Zero b_hn of every layer: what nnx.GRUCell can represent."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "bias_hh" in name:
                tensor[2 * tensor.shape[0] // 3 :] = 0


def cell(name: str, layer: str, torch_kind: Any, linen: Any, nnx_: Any, i: int, hidden: int, **more: Any) -> Case:
    """One step of a torch cell against one Flax cell; the state is the first columns of the input."""
    pair = layer == "LSTM"

    def on_torch(m: Any, x: Any) -> Any:
        h, c = x[:, i : i + hidden], x[:, i + hidden :]
        return torch.cat(m(x[:, :i], (h, c)), 1) if pair else m(x[:, :i], h)

    def on_flax(m: Any, x: Any) -> Any:
        h, c = x[:, i : i + hidden], x[:, i + hidden :]
        carry, out = m((c, h) if pair else h, x[:, :i])
        return jnp.concatenate([out, carry[0]], 1) if pair else out

    return Case(
        name, layer, lambda: torch_kind(i, hidden), lambda: linen(hidden), lambda r: nnx_(i, hidden, rngs=r),
        (3, i + 2 * hidden), on_torch=on_torch, on_flax=on_flax, exact=False, variant="one cell", **more,
    )  # fmt: skip


RECURRENT = [
    recurrent("LSTM", 5, 3),
    recurrent("LSTM", 4, 4, 2),
    recurrent("optimized LSTM", 5, 3, 2, 2),
    recurrent("optimized LSTM", 4, 2, 2, 2, file="first"),
    recurrent("optimized LSTM", 3, 1),
    recurrent("GRU", 5, 3, prepare=without_hidden_bias, blind=("hn/bias",)),
    recurrent("GRU", 3, 3, 2, 2, prepare=without_hidden_bias, blind=("hn/bias",)),
    recurrent("RNN", 5, 3),
    recurrent("RNN", 3, 3, 2, 2),
    recurrent("RNN", 5, 3, relu=True),
    cell("LSTM cell", "LSTM", nn.LSTMCell, fn.LSTMCell, nnx.LSTMCell, 5, 3),
    cell("LSTM cell, optimized", "LSTM", nn.LSTMCell, fn.OptimizedLSTMCell, nnx.OptimizedLSTMCell, 3, 3),
    cell("GRU cell", "GRU", nn.GRUCell, fn.GRUCell, nnx.GRUCell, 5, 3, prepare=without_hidden_bias, blind=("hn/bias",)),
    Case(
        "GRU with b_hn", "GRU", lambda: nn.GRU(5, 3, batch_first=True), lambda: fn.RNN(fn.GRUCell(3)), None, (2, 4, 5),
        on_torch=lambda m, x: m(x)[0], exact=False, variant="one cell",
    ),
    cell("RNN cell", "RNN", nn.RNNCell, fn.SimpleCell, nnx.SimpleCell, 5, 3),
]  # fmt: skip
