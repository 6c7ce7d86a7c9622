"""Rows for LSTM, GRU and plain RNN: torch's layers and cells to one or more Flax cells.

torch stores one matrix of all gates for every layer and direction (weight_ih_l0, weight_ih_l0_reverse, weight_ih_l1
...); Flax has one cell for each. The order is torch's: l0, l0 reverse, l1, l1 reverse ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from graftax.layers.base import By, Forms, Layer, LayerFacts, LayerForm, Makes, Refusal, Setting, Step
from graftax.layers.leaf_axes import CELL_AXES
from graftax.ops import Op, Rearrange, RequireZero, Split, Sum
from graftax.tree import natural_key


@dataclass(frozen=True, slots=True)
class CellKind:
    """A recurrent cell: torch's gates in order, and their names in Flax. `input` and `hidden` name Linen's dense
    layers; NNX may have one `dense_i` and one `dense_h`. `biased`: which of the two has the bias."""

    name: str
    input: tuple[str, ...]
    hidden: tuple[str, ...]
    biased: str


LSTM = CellKind("LSTM", ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho"), "hidden")
GRU = CellKind("GRU", ("ir", "iz", "in"), ("hr", "hz", "hn"), "input")
RNN = CellKind("RNN", ("i",), ("h",), "input")

_TORCH = re.compile(r"(weight|bias)_(ih|hh)(?:_l(\d+)(_reverse)?)?")
_FORWARD = frozenset({"forward", "fwd", "fw", "ltr"})
_BACKWARD = frozenset({"backward", "bwd", "bw", "reverse", "rev", "rtl"})
_NO_HIDDEN_BIAS = (
    "nnx.GRUCell has no bias b_hn, and this checkpoint's is not zero (the last third of bias_hh): port into Linen's "
    "GRUCell, or write an NNX cell with that bias"
)

Cell = Mapping[str, str]
"""'ii/kernel' -> its role in the part"""


def torch_cells(facts: LayerFacts) -> Mapping[tuple[int, bool], Cell] | None:
    """(layer, reverse) -> {'weight_ih': role}, in torch's order; None if there is any other leaf."""
    out: dict[tuple[int, bool], dict[str, str]] = {}
    for role in facts.torch:
        found = _TORCH.fullmatch(role)
        if found is None:
            return None
        what, which, layer, reverse = found.groups()
        out.setdefault((int(layer or 0), bool(reverse)), {})[f"{what}_{which}"] = role
    return dict(sorted(out.items()))


def flax_cells(facts: LayerFacts, kind: CellKind) -> Mapping[str, Cell] | None:
    """prefix -> the leaves of its cell under their plain names; None if there is any other leaf."""
    gates = {*kind.input, *kind.hidden, "dense_i", "dense_h"}
    out: dict[str, dict[str, str]] = {}
    for role in facts.flax:
        *prefix, gate, leaf = ("", *role.split("/"))
        gate = gate.removesuffix("_") if gate.removesuffix("_") in gates else gate  # nnx: `if_`
        if gate not in gates or leaf not in ("kernel", "bias"):
            return None
        out.setdefault("/".join(prefix), {})[f"{gate}/{leaf}"] = role
    return out


@dataclass(frozen=True, slots=True)
class CellOrder:
    """Prefixes of Flax cells in torch's order, and the evidence for it."""

    prefixes: tuple[str, ...]
    by: By
    why: str
    assumes: tuple[str, ...] = ()


def cell_orders(prefixes: Sequence[str], layers: int, directions: int) -> list[CellOrder]:
    """The orders in which the cells may be torch's l0, l0 reverse, l1 ...: by their numbers and by words for the
    direction. If the names show neither: both orders of two cells, no order of more."""
    if len(prefixes) != layers * directions:
        return []
    if len(prefixes) == 1:
        return [CellOrder(tuple(prefixes), "convention", "there is one cell")]
    keys = {prefix: _cell_key(prefix) for prefix in prefixes}
    if len({key[0] for key in keys.values()}) > 1 or len({key[1:] for key in keys.values()}) < len(prefixes):
        both = (tuple(prefixes), tuple(reversed(prefixes)))
        text = "the names of the cells show no order"
        return [CellOrder(order, "shapes", text) for order in both] if len(prefixes) == 2 else []
    ordered = tuple(sorted(prefixes, key=lambda prefix: keys[prefix][1:]))
    if any(key[2] for key in keys.values()):
        return [CellOrder(ordered, "convention", "the cells are ordered by number and direction")]
    said = "cells are numbered layer by layer" + (", forward before backward" if directions == 2 else "")
    # A number that is no counter belongs to the layer itself.
    told = directions == 1 and not any(_COUNTED.search(prefix) for prefix in prefixes)
    found = [CellOrder(ordered, "convention", "the cells are ordered by number", () if told else (said,))]
    if directions == 2 and layers > 1:
        turned = tuple(ordered[direction * layers + layer] for layer in range(layers) for direction in (0, 1))
        said = "cells are numbered direction by direction: all forward ones first"
        found.append(CellOrder(turned, "shapes", "the cells are ordered by direction, then by number", (said,)))
    return found


_COUNTED = re.compile(r"(?:^|[/.])[A-Z][A-Za-z0-9]*_\d+(?:$|[/.])")
"""An automatic Linen name: the class and a counter."""


def _cell_key(prefix: str) -> tuple[str, tuple[int | str, ...], bool]:
    """(the name without numbers and direction, its numbers, backward)."""
    words = [word for word in re.split(r"[/_.]+|(?<=[a-z])(?=[A-Z])|(\d+)", prefix) if word]
    backward = any(word.lower() in _BACKWARD for word in words)
    plain = [word for word in words if not word.isdigit() and word.lower() not in _BACKWARD | _FORWARD]
    return " ".join(plain), natural_key(" ".join(word for word in words if word.isdigit())), backward


# ---------------------------------------------------------------- forms


def recurrent_forms(facts: LayerFacts, kind: CellKind) -> Iterable[LayerForm]:
    torch, flax = torch_cells(facts), flax_cells(facts, kind)
    if not torch or not flax:
        return
    hidden = facts.torch.get(next(iter(torch.values())).get("weight_hh", ""), ())
    if len(hidden) != 2 or hidden[0] != len(kind.input) * hidden[1]:
        return
    layers, directions = len({layer for layer, _ in torch}), len({reverse for _, reverse in torch})
    if len(torch) != layers * directions:
        return
    variant = f"{layers} layers, {'bidirectional' if directions == 2 else 'one direction'}"
    for order in cell_orders(tuple(flax), layers, directions):
        steps: list[Step] = []
        for source, prefix in zip(torch.values(), order.prefixes, strict=True):
            steps += cell_steps(kind, source, flax[prefix], hidden[1])
        cells = "one cell" if len(torch) == 1 else variant
        settled = order.by == "convention" and not order.assumes
        yield LayerForm(cells, tuple(steps), by=order.by, why=order.why, settled=settled, assumes=order.assumes)


def cell_steps(kind: CellKind, source: Cell, target: Cell, hidden: int) -> list[Step]:
    """The steps of one layer and direction."""
    fused = any(name.startswith("dense_") for name in target)
    names = (("dense_i",), ("dense_h",)) if fused else (kind.input, kind.hidden)
    split: tuple[Op, ...] = () if len(names[0]) == 1 else (Split(0, (hidden,) * len(names[0])),)
    steps = [
        Step(
            source.get(weight, weight),
            tuple(target.get(f"{gate}/kernel", f"{gate}/kernel") for gate in gates),
            (*split, Rearrange("o i -> i o")),
        )
        for weight, gates in zip(("weight_ih", "weight_hh"), names, strict=True)
    ]
    biases = (source.get("bias_ih", "bias_ih"), source.get("bias_hh", "bias_hh"))
    gates, ops = _bias(kind, names, fused, hidden)
    targets = tuple(target.get(f"{gate}/bias", f"{gate}/bias") for gate in gates)
    return [*steps, Step(biases, targets, ops, optional=True)]


def _bias(
    kind: CellKind, names: tuple[tuple[str, ...], tuple[str, ...]], fused: bool, hidden: int
) -> tuple[tuple[str, ...], tuple[Op, ...]]:
    """Which dense layers have the bias, and the ops that make it from torch's two biases."""
    if kind.name == "GRU" and not fused:
        # r and z add both terms; n keeps its two terms apart, because b_hn is inside the reset gate.
        return ("ir", "iz", "in", "hn"), (Split(0, (hidden,) * 3), Sum(((0, 3), (1, 4), (2,), (5,))))
    gates = names[0] if kind.biased == "input" else names[1]
    guard = (RequireZero(1, 0, 2 * hidden, 3 * hidden, _NO_HIDDEN_BIAS),) if kind.name == "GRU" else ()
    split = () if len(gates) == 1 else (Split(0, (hidden,) * len(gates)),)
    return gates, (*guard, Sum(((0, 1),)), *split)


# ---------------------------------------------------------------- rows


def _forms(kind: CellKind, *lines: str) -> tuple[Forms, ...]:
    return (Makes(partial(recurrent_forms, kind=kind), lines),)


_WRAPPERS = ("RNN", "Bidirectional")
_HIDDEN = Setting(
    "hidden size",
    "hidden_size",
    "features, hidden_features",
    lambda t: t.get("hidden_size"),
    lambda f: f.get("features", f.get("hidden_features")),
)
_MEASURED = "kernels exact; biases measured (b_ih + b_hh: the function is kept, the bits of the two are not)"

RECURRENT_ROWS: tuple[Layer, ...] = (
    Layer(
        "LSTM",
        torch=("LSTM", "LSTMCell"),
        linen=("LSTMCell", "OptimizedLSTMCell", *_WRAPPERS),
        forms=_forms(
            LSTM,
            "weight_ih (4H, I) -> ii, if, ig, io (NNX: if_): split in 4, o i -> i o; weight_hh -> hi, hf, hg, ho",
            "NNX OptimizedLSTMCell: weight_ih -> dense_i, weight_hh -> dense_h, not split",
            "bias_ih + bias_hh -> the bias of the hidden side; layers and directions -> one cell each",
        ),
        settings=(_HIDDEN,),
        exactness=_MEASURED,
        refusals=(
            Refusal(
                lambda f: any(role.startswith("weight_hr") for role in f.torch) and bool(flax_cells(f, LSTM)),
                "LSTM(proj_size=...)",
                "weight_hr projects the hidden state, and Flax's cells have no such projection",
                "Write a cell that multiplies its output by a parameter: weight_hr transposed.",
            ),
        ),
        axes=CELL_AXES,
        note="Gates i, f, g, o. The carry is (c, h) in Flax, (h, c) in torch. In a compact parent the cells are named "
        "at the parent (OptimizedLSTMCell_0..3 for 2 layers, both directions), in the order of their calls.",
    ),
    Layer(
        "GRU",
        torch=("GRU", "GRUCell"),
        linen=("GRUCell", *_WRAPPERS),
        forms=_forms(
            GRU,
            "weight_ih (3H, I) -> ir, iz, in: split in 3, o i -> i o; weight_hh -> hr, hz, hn",
            "Linen: ir, iz bias = b_ih + b_hh; in bias = b_in; hn bias = b_hn",
            "NNX: dense_i, dense_h; bias_ih + bias_hh -> dense_i/bias where b_hn is zero",
        ),
        settings=(_HIDDEN,),
        exactness=_MEASURED,
        axes=CELL_AXES,
        note="Gates r, z, n. nnx.GRUCell has no b_hn (error 0.29 on unit inputs where it is dropped): refused while "
        "planning unless it is zero; Linen's GRUCell has it.",
    ),
    Layer(
        "RNN",
        torch=("RNN", "RNNCell"),
        linen=("SimpleCell", *_WRAPPERS),
        forms=_forms(RNN, "weight_ih -> i (NNX dense_i), weight_hh -> h (dense_h): o i -> i o; biases added"),
        settings=(
            _HIDDEN,
            Setting.same("nonlinearity", "activation_fn", "activation"),
        ),
        exactness=_MEASURED,
        axes=CELL_AXES,
        note="SimpleCell with residual=False.",
    ),
)
