"""Recurrent layers with right weights and wrong outputs: find the cell that gives torch's outputs, and the cell that
gives Flax's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from graftax.parity.causes.activations import apply
from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.numbers import Array, Bar, relative

_EXAMPLES, _STEPS = 4, 64


@dataclass(frozen=True, slots=True)
class Cell:
    """The step of a cell.

    gate, act   the activations of gates and of candidates
    reset       GRU: the reset gate is applied 'after' the state's matrix (torch) or 'before' it
    swapped     GRU: the update gate keeps the candidate instead of the state
    forget      LSTM: a constant added to the forget gate
    """

    gate: str = "sigmoid"
    act: str = "tanh"
    reset: str = "after"
    swapped: bool = False
    forget: float = 0.0


NAMES: Mapping[str, tuple[str, str]] = {
    "gate": ("activation", "the activation of the gates"),
    "act": ("activation", "the activation of the candidate"),
    "reset": ("gru reset", "the reset gate acts on the state before or after its matrix"),
    "swapped": ("gru reset", "the update gate keeps the candidate and not the state"),
    "forget": ("lstm bias", "the constant that code adds to the forget gate"),
}
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "gate": ("sigmoid", "hard sigmoid", "tanh"),
    "act": ("tanh", "relu", "identity", "sigmoid", "gelu tanh", "silu"),
    "reset": ("after", "before"),
    "swapped": (False, True),
    "forget": (0.0, 1.0),
}


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """torch's weights: matrices (G H, I) and (G H, H), and two biases (G H)."""

    input: Array
    hidden: Array
    bias_i: Array
    bias_h: Array

    @property
    def size(self) -> int:
        return self.hidden.shape[1]

    @property
    def gates(self) -> int:
        return self.hidden.shape[0] // self.hidden.shape[1]


def run(x: Array, weights: Weights, cell: Cell) -> Array:
    """(B, T, I) -> (B, T, H) from a state of zeros, in float64."""
    steps = {4: _lstm, 3: _gru, 1: _plain}[weights.gates]
    state = (np.zeros((len(x), weights.size)), np.zeros((len(x), weights.size)))
    out: list[Array] = []
    for t in range(x.shape[1]):
        state = steps(x[:, t], state, weights, cell)
        out.append(state[0])
    return np.stack(out, axis=1)


_State = tuple[Array, Array]


def _lstm(x: Array, state: _State, w: Weights, cell: Cell) -> _State:
    h, c = state
    i, f, g, o = np.split(x @ w.input.T + w.bias_i + h @ w.hidden.T + w.bias_h, 4, axis=1)
    c = apply(cell.gate, f + cell.forget) * c + apply(cell.gate, i) * apply(cell.act, g)
    return apply(cell.gate, o) * apply(cell.act, c), c


def _gru(x: Array, state: _State, w: Weights, cell: Cell) -> _State:
    h, _ = state
    xr, xz, xn = np.split(x @ w.input.T + w.bias_i, 3, axis=1)
    hr, hz, hn = np.split(h @ w.hidden.T + w.bias_h, 3, axis=1)
    r, z = apply(cell.gate, xr + hr), apply(cell.gate, xz + hz)
    before = (r * h) @ w.hidden[2 * w.size :].T + w.bias_h[2 * w.size :]
    inner = before if cell.reset == "before" else r * hn
    n = apply(cell.act, xn + inner)
    return ((1 - z) * h + z * n if cell.swapped else (1 - z) * n + z * h), h


def _plain(x: Array, state: _State, w: Weights, cell: Cell) -> _State:
    h = apply(cell.act, x @ w.input.T + w.bias_i + state[0] @ w.hidden.T + w.bias_h)
    return h, h


def cell_difference(x: Array, want: Array, have: Array, weights: Weights, bar: Bar) -> list[Explanation]:
    """How Flax's cell differs from torch's; [] if either is not one of the known cells. Arrays (B, T, features)."""
    if x.ndim != 3 or want.ndim != 3 or want.shape != have.shape or want.shape[-1] != weights.size:
        return []
    if weights.gates not in (1, 3, 4) or x.shape[:2] != want.shape[:2] or x.shape[2] != weights.input.shape[1]:
        return []
    some = (slice(0, _EXAMPLES), slice(0, _STEPS))
    x, want, have = (array[some].astype(np.float64) for array in (x, want, have))
    right = next((cell for cell in _bases() if bar.fitted(relative(run(x, weights, cell), want))), None)
    if right is None:
        return []
    out: dict[str, Explanation] = {}
    for field, wrong in _changed(right, weights.gates):
        error = relative(run(x, weights, wrong), have)
        if bar.fitted(error):
            name, what = NAMES[field]
            a, b = getattr(right, field), getattr(wrong, field)
            text = f"{what}: {a} in torch, {b} in Flax"
            out.setdefault(name, Explanation(name, text, f"{field}: {a}", error))
    return list(out.values())


def _bases() -> Iterator[Cell]:
    for act in ("tanh", "relu"):
        yield Cell(act=act)


def _changed(cell: Cell, gates: int) -> Iterator[tuple[str, Cell]]:
    fields = {4: ("gate", "act", "forget"), 3: ("reset", "gate", "act", "swapped"), 1: ("act",)}[gates]
    for field in fields:
        for value in _CHOICES[field]:
            if getattr(cell, field) != value:
                plain = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
                yield field, Cell(**{**plain, field: value})
