"""Recurrent cells that step in another way are told from the outputs; the base is torch's own cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from graftax.parity.causes.cells import Cell, Weights, _gru, cell_difference, run
from graftax.parity.causes.names import CAUSES
from graftax.parity.causes.numbers import Bar, relative
from graftax.parity.records import THRESHOLD, UNIT

BAR = THRESHOLD * UNIT
B, T, INPUTS, H = 3, 9, 4, 5


def weights(gates: int) -> Weights:
    rng = np.random.default_rng(gates)
    shapes = ((gates * H, INPUTS), (gates * H, H), (gates * H,), (gates * H,))
    return Weights(*(rng.normal(size=shape).astype(np.float32).astype(np.float64) for shape in shapes))


X = np.random.default_rng(1).normal(size=(B, T, INPUTS)).astype(np.float32)


@pytest.mark.parametrize(("gates", "kind"), [(4, "LSTM"), (3, "GRU"), (1, "RNN")])
def test_the_base_is_torch(gates: int, kind: str):
    import torch

    w = weights(gates)
    layer = getattr(torch.nn, kind)(INPUTS, H, batch_first=True).double()
    with torch.no_grad():
        given = (w.input, w.hidden, w.bias_i, w.bias_h)
        for name, value in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), given, strict=True):
            getattr(layer, name).copy_(torch.from_numpy(value))
        theirs = layer(torch.from_numpy(X).double())[0].numpy()
    assert relative(run(X.astype(np.float64), w, Cell()), theirs) < 1e-12


def test_a_reset_before_the_matrix():
    w, h = weights(3), np.random.default_rng(8).normal(size=(B, H))
    x = X[:, 0].astype(np.float64)
    rows = [slice(i * H, (i + 1) * H) for i in range(3)]

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    r, z = (
        sigmoid(x @ w.input[at].T + w.bias_i[at] + h @ w.hidden[at].T + w.bias_h[at]) for at in rows[:2]
    )  # fmt: skip
    n = np.tanh(x @ w.input[rows[2]].T + w.bias_i[rows[2]] + (r * h) @ w.hidden[rows[2]].T + w.bias_h[rows[2]])
    made, _ = _gru(x, (h, h), w, Cell(reset="before"))
    assert relative(made, (1 - z) * n + z * h) < 1e-12


CASES = [
    (3, {"reset": "before"}, "gru reset"),
    (3, {"swapped": True}, "gru reset"),
    (3, {"gate": "hard sigmoid"}, "activation"),
    (4, {"gate": "hard sigmoid"}, "activation"),
    (4, {"act": "relu"}, "activation"),
    (4, {"forget": 1.0}, "lstm bias"),
    (1, {"act": "relu"}, "activation"),
]


@pytest.mark.parametrize(("gates", "change", "name"), CASES)
def test_other_cells(gates: int, change: dict, name: str):
    w = weights(gates)
    want, have = (run(X.astype(np.float64), w, cell).astype(np.float32) for cell in (Cell(), replace(Cell(), **change)))
    bar = Bar(relative(have, want), BAR)
    found = cell_difference(X, want, have, w, bar)
    assert [item.name for item in found] == [name]
    assert name in CAUSES
    rough = (have * (1 + 1e-3 * np.random.default_rng(2).normal(size=have.shape))).astype(np.float32)
    assert cell_difference(X, want, rough, w, Bar(relative(rough, want), BAR)) == []
