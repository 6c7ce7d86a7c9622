"""torch's recurrent layers, step by step in plain ops, so that a record sees what each step and each gate makes.

torch runs a whole sequence in one op, or multiplies all time steps at once; Flax runs cell by cell. The formulas are
those of the documentation of torch.nn.LSTM, GRU, RNN and their cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def _summed(x: Any, h: Any, wi: Any, wh: Any, bi: Any, bh: Any, gates: int) -> list[Any]:
    """x @ wi + h @ wh + (bi + bh), a gate at a time; also the whole, which a fused cell makes."""
    a, b = x @ wi.t(), h @ wh.t()
    parts = [one + other for one, other in zip(a.chunk(gates, -1), b.chunk(gates, -1), strict=True)]
    if bi is None:
        return parts
    bias = bi + bh
    torch.add(a + b, bias)  # for the record
    return [part + one for part, one in zip(parts, bias.chunk(gates), strict=True)]


def _lstm(x: Any, h: Any, c: Any, wi: Any, wh: Any, bi: Any, bh: Any) -> tuple[Any, Any]:
    i, f, g, o = _summed(x, h, wi, wh, bi, bh, 4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Any, h: Any, wi: Any, wh: Any, bi: Any, bh: Any) -> Any:
    """The third gate's two biases stay apart, so nothing is made of their sum, nor of the other gates' single ones."""
    wi, wh = wi.chunk(3), wh.chunk(3)
    r, z = (x @ wi[n].t() + h @ wh[n].t() for n in range(2))
    if bi is not None:
        sums, bi, bh = (bi + bh).chunk(3), bi.chunk(3)[2], bh.chunk(3)[2]
        r, z = r + sums[0], z + sums[1]
    r, z = torch.sigmoid(r), torch.sigmoid(z)
    n = torch.tanh(functional.linear(x, wi[2], bi) + r * functional.linear(h, wh[2], bh))
    return n + z * (h - n)


def _rnn(x: Any, h: Any, wi: Any, wh: Any, bi: Any, bh: Any, act: Any) -> Any:
    (total,) = _summed(x, h, wi, wh, bi, bh, 1)
    return act(total)


def _act(kind: Any) -> Any:
    return torch.relu if "relu" in str(kind).lower() else torch.tanh


def _layer(module: Any, kind: str, x: Any, state: Any, layer: int, reverse: bool) -> tuple[Any, Any]:
    """(outputs over time, last state) of one direction of one layer; x is (time, batch, features)."""
    suffix = f"_l{layer}{'_reverse' if reverse else ''}"
    wi, wh = getattr(module, f"weight_ih{suffix}"), getattr(module, f"weight_hh{suffix}")
    bi, bh = (getattr(module, f"bias_{part}{suffix}") if module.bias else None for part in ("ih", "hh"))
    made: list[Any] = []
    for t in range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0]):
        if kind == "LSTM":
            h, c = _lstm(x[t], state[0], state[1], wi, wh, bi, bh)
            if module.proj_size:
                h = h @ getattr(module, f"weight_hr{suffix}").t()
            state = (h, c)
        elif kind == "GRU":
            state = h = _gru(x[t], state, wi, wh, bi, bh)
        else:
            state = h = _rnn(x[t], state, wi, wh, bi, bh, _act(module.mode))
        made.append(h)
    return torch.stack(made[::-1] if reverse else made), state


def _forward(module: Any, kind: str, x: Any, given: Any = None) -> Any:
    flat = x.dim() == 2
    if flat:
        x = x.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    ways = 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    states: list[Any] = []
    for layer in range(module.num_layers):
        outs: list[Any] = []
        for way in range(ways):
            n = layer * ways + way
            if given is None:
                h = x.new_zeros(x.shape[1], width)
                state = (h, x.new_zeros(x.shape[1], module.hidden_size)) if kind == "LSTM" else h
            elif kind == "LSTM":
                state = tuple(part[n] if not flat else part[n].unsqueeze(0) for part in given)
            else:
                state = given[n] if not flat else given[n].unsqueeze(0)
            out, state = _layer(module, kind, x, state, layer, bool(way))
            outs.append(out)
            states.append(state)
        x = torch.cat(outs, -1) if ways > 1 else outs[0]
    if kind == "LSTM":
        last: Any = tuple(torch.stack([state[i] for state in states]) for i in range(2))
        last = tuple(part.squeeze(1) for part in last) if flat else last
    else:
        last = torch.stack(states)
        last = last.squeeze(1) if flat else last
    return (x.squeeze(1) if flat else x.transpose(0, 1) if module.batch_first else x), last


def _cell(module: Any, kind: str, x: Any, given: Any = None) -> Any:
    wi, wh, bi, bh = module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh
    flat = x.dim() == 1
    x = x.unsqueeze(0) if flat else x
    if given is None:
        zero = x.new_zeros(x.shape[0], module.hidden_size)
        given = (zero, zero) if kind == "LSTMCell" else zero
    elif flat:
        given = tuple(part.unsqueeze(0) for part in given) if kind == "LSTMCell" else given.unsqueeze(0)
    if kind == "LSTMCell":
        made = _lstm(x, given[0], given[1], wi, wh, bi, bh)
        return tuple(part.squeeze(0) for part in made) if flat else made
    if kind == "GRUCell":
        out = _gru(x, given, wi, wh, bi, bh)
    else:
        out = _rnn(x, given, wi, wh, bi, bh, _act(module.nonlinearity))
    return out.squeeze(0) if flat else out


_LAYERS = {nn.LSTM: "LSTM", nn.GRU: "GRU", nn.RNN: "RNN"}
_CELLS = {nn.LSTMCell: "LSTMCell", nn.GRUCell: "GRUCell", nn.RNNCell: "RNNCell"}


@contextlib.contextmanager
def stepwise(module: nn.Module) -> Iterator[None]:
    """Inside this context torch's own recurrent layers in `module` run step by step. A layer that gets a PackedSequence
    runs as it is."""
    covered: list[nn.Module] = []
    for item in module.modules():
        if "forward" in item.__dict__:
            continue
        base = next((base for base in (*_LAYERS, *_CELLS) if isinstance(item, base)), None)
        if base is None or type(item).forward is not base.forward:  # a forward of the user's own runs as it is
            continue
        kind, run = (_LAYERS[base], _forward) if base in _LAYERS else (_CELLS[base], _cell)
        plain = item.forward

        def forward(
            x: Any, given: Any = None, *, item: Any = item, kind: str = kind, run: Any = run, plain: Any = plain
        ) -> Any:
            if not isinstance(x, torch.Tensor):
                return plain(x, given)
            return run(item, kind, x, given)

        item.__dict__["forward"] = forward
        covered.append(item)
    try:
        yield
    finally:
        for item in covered:
            del item.__dict__["forward"]
