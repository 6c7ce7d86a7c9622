"""Mistakes in the weights of recurrent cells: gates in another order, biases added wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from graftax.parity.causes.numbers import Array
from graftax.parity.causes.weights import WeightMistake, same

GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n")}
"""Number of gates -> torch's gates in torch's order."""


@dataclass(frozen=True, slots=True, eq=False)
class GateBlocks:
    """A matrix or bias of all gates of a cell, cut into one block per gate, in torch's order.

    name   its name in a message: 'the kernels of the input'
    have, want   a block for each gate
    biases   for biases: torch's b_ih and b_hh, by gate
    """

    name: str
    have: tuple[Array, ...]
    want: tuple[Array, ...]
    biases: tuple[tuple[Array, ...], tuple[Array, ...]] | None = None


def diagnose_gates(cell: GateBlocks) -> WeightMistake | None:
    """The order of gates, or the use of the biases, that gives exactly the cell's values."""
    if all(same(a, b) for a, b in zip(cell.have, cell.want, strict=True)):
        return None
    return _bias(cell) or _order(cell)


def _order(cell: GateBlocks, blocks: tuple[Array, ...] | None = None) -> WeightMistake | None:
    wanted = cell.want if blocks is None else blocks
    names = GATES.get(len(wanted), tuple(str(i) for i in range(len(wanted))))
    for order in permutations(range(len(wanted))):
        if order == tuple(range(len(wanted))):
            continue
        if all(same(have, wanted[source]) for have, source in zip(cell.have, order, strict=True)):
            found = " ".join(names[source] for source in order)
            text = f"{cell.name} hold the gates as {found}; torch's order is {' '.join(names)}"
            return WeightMistake("lstm gate order", text, f"split torch's rows as {', '.join(names)}")
    return None


def _bias(cell: GateBlocks) -> WeightMistake | None:
    if cell.biases is None:
        return None
    first, second = cell.biases
    variants: Mapping[str, tuple[Array, ...]] = {
        "are b_ih alone, without b_hh": first,
        "are b_hh alone, without b_ih": second,
        "are twice b_ih + b_hh": tuple(2 * (a + b) for a, b in zip(first, second, strict=True)),
        "are the mean of b_ih and b_hh": tuple((a + b) / 2 for a, b in zip(first, second, strict=True)),
        "are b_ih - b_hh": tuple(a - b for a, b in zip(first, second, strict=True)),
        "are zero": tuple(np.zeros_like(a) for a in first),
        "have 1 added to the forget gate": tuple(
            want + (1 if at == 1 and len(cell.want) == 4 else 0) for at, want in enumerate(cell.want)
        ),
    }
    for text, blocks in variants.items():
        if all(same(have, block) for have, block in zip(cell.have, blocks, strict=True)) and not all(
            same(want, block) for want, block in zip(cell.want, blocks, strict=True)
        ):
            return WeightMistake("lstm bias", f"{cell.name} {text}", "bias = bias_ih + bias_hh")
    summed = tuple(a + b for a, b in zip(first, second, strict=True))
    for blocks in (summed, first, second):
        found = _order(cell, blocks)
        if found is not None:
            return found
    return None


def diagnose_gru_bias(have: Mapping[str, Array], b_ih: Array, b_hh: Array) -> WeightMistake | None:
    """The mistake in the biases of a GRU with its own b_hn (Linen): `have` holds the biases ir, iz, in and hn. torch
    adds b_i and b_h for r and z, keeps b_in outside the reset gate and b_hn inside it."""
    i, h = np.split(b_ih, 3), np.split(b_hh, 3)
    zero = np.zeros_like(i[0])
    right = {"ir": i[0] + h[0], "iz": i[1] + h[1], "in": i[2], "hn": h[2]}
    variants = {
        "b_hn was added outside the reset gate": {**right, "in": i[2] + h[2], "hn": zero},
        "b_in and b_hn are swapped": {**right, "in": h[2], "hn": i[2]},
        "b_hn is missing": {**right, "hn": zero},
        "b_hh is missing": {"ir": i[0], "iz": i[1], "in": i[2], "hn": zero},
        "r and z lack b_hh": {**right, "ir": i[0], "iz": i[1]},
        "r and z lack b_ih": {**right, "ir": h[0], "iz": h[1]},
        "b_ih is missing": {"ir": h[0], "iz": h[1], "in": zero, "hn": h[2]},
        "hn holds b_in + b_hn": {**right, "hn": i[2] + h[2]},
    }
    names = [name for name in right if name in have]
    if all(same(have[name], right[name]) for name in names):
        return None
    for text, blocks in variants.items():
        if all(same(have[name], blocks[name]) for name in names):
            return WeightMistake("lstm bias", f"the biases of the GRU: {text}", "ir, iz: b_i + b_h; in: b_in; hn: b_hn")
    if set(names) >= {"ir", "iz"} and same(have["ir"], right["iz"]) and same(have["iz"], right["ir"]):
        return WeightMistake(
            "lstm gate order", "the biases of the gates r and z are swapped", "torch's order is r, z, n"
        )
    return None
