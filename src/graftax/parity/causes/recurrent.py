"""Explain recurrent modules: find their gates from the plan's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftax.ops import Sum
from graftax.parity.causes.cells import Weights, cell_difference
from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.gates import GateBlocks, diagnose_gates, diagnose_gru_bias
from graftax.parity.causes.numbers import Array, Bar
from graftax.parity.causes.weights import WeightMistake
from graftax.plans import Entry
from graftax.tree import whole_words

Tensors = Mapping[str, Any]


def recurrent_causes(entries: Sequence[Entry], torch: Tensors, flax: Tensors, expected: Tensors) -> list[WeightMistake]:
    """Mistakes in the gates of the cells that these entries fill; [] if they fill none, or no mistake is found."""
    found: list[WeightMistake] = []
    for entry in entries:
        if not _of_gates(entry, torch, flax, expected):
            continue
        cell = _gru_biases(entry, torch, flax) if _splits_gru(entry) else _cell(entry, torch, flax, expected)
        if cell is not None:
            found.append(cell)
    return found


def cell_causes(
    entries: Sequence[Entry], torch: Tensors, x: Array, want: Array, have: Array, bar: Bar
) -> list[Explanation]:
    """How the cell of a recurrent layer (one layer, one direction, right weights) differs from torch's."""
    names = {name.rpartition(".")[2].partition("_l")[0]: name for entry in entries for name in entry.sources}
    count = sum(len(entry.sources) for entry in entries)
    if (
        not {"weight_ih", "weight_hh"} <= names.keys()
        or count != len(names)
        or any(n not in torch for n in names.values())
    ):
        return []
    given = {name: np.asarray(torch[path]).astype(np.float64) for name, path in names.items()}
    none = np.zeros(len(given["weight_hh"]))
    biases = given.get("bias_ih", none), given.get("bias_hh", none)
    return cell_difference(x, want, have, Weights(given["weight_ih"], given["weight_hh"], *biases), bar)


def _of_gates(entry: Entry, torch: Tensors, flax: Tensors, expected: Tensors) -> bool:
    """Does the entry take torch's weight_ih or weight_hh (3H or 4H, I), or the two biases?"""
    names = {name.rpartition(".")[2].partition("_l")[0] for name in entry.sources}
    known = names <= {"weight_ih", "weight_hh"} or names == {"bias_ih", "bias_hh"}
    held = all(name in torch for name in entry.sources)
    return bool(names) and known and held and all(name in flax and name in expected for name in entry.targets)


def _gate_count(entry: Entry, torch: Tensors, expected: Tensors) -> int:
    """The number of gates: the number of targets; for one fused target, its rows over the hidden size."""
    if len(entry.targets) > 1:
        return len(entry.targets)
    first = hidden = entry.sources[0] if entry.sources else ""
    for name in ("bias_ih", "bias_hh", "weight_ih"):
        hidden = hidden.replace(name, "weight_hh")
    return torch[first].shape[0] // torch[hidden].shape[1] if hidden in torch else 0


def _blocks(entry: Entry, values: Tensors, count: int) -> tuple[Any, ...]:
    """A block for each gate, (I, H) or (H), in torch's order."""
    if len(entry.targets) > 1:
        return tuple(np.asarray(values[name]) for name in entry.targets)
    fused = next(iter(entry.targets))
    return tuple(np.split(np.asarray(values[fused]), count, axis=-1))


def _cell(entry: Entry, torch: Tensors, flax: Tensors, expected: Tensors) -> WeightMistake | None:
    count = _gate_count(entry, torch, expected)
    if count not in (3, 4) or any(np.asarray(flax[name]).shape != expected[name].shape for name in entry.targets):
        return None
    have, want = _blocks(entry, flax, count), _blocks(entry, expected, count)
    biases: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
    if len(entry.sources) == 2:
        first, second = (tuple(np.split(np.asarray(torch[name]), count)) for name in entry.sources)
        biases = (first, second)
    into = any("ih" in whole_words(name.rpartition(".")[2]) for name in entry.sources)
    what = "biases" if biases else f"kernels of the {'input' if into else 'state'}"
    return diagnose_gates(GateBlocks(f"the {what} ({', '.join(entry.targets)})", have, want, biases))


def _splits_gru(entry: Entry) -> bool:
    """Is it the bias entry of Linen's GRU? There r and z have one bias each, n has two."""
    groups = next((op.groups for op in entry.ops if isinstance(op, Sum)), ())
    return len(entry.targets) == 4 and [len(group) for group in groups] == [2, 2, 1, 1]


def _gru_biases(entry: Entry, torch: Tensors, flax: Tensors) -> WeightMistake | None:
    names: tuple[str, ...] = ("ir", "iz", "in", "hn")
    have = {name: np.asarray(flax[path]) for name, path in zip(names, entry.targets, strict=True)}
    first, second = (np.asarray(torch[name]) for name in entry.sources)
    return diagnose_gru_bias(have, first, second)
