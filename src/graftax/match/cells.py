"""Recurrent cells of two Flax sides: one dense layer per gate (Linen, NNX's LSTMCell) against one for all gates."""

from __future__ import annotations

from collections.abc import Set
from functools import partial

from graftax.layers.base import Connection, Part
from graftax.layers.recurrent import GRU, LSTM
from graftax.match.names import Lexicon
from graftax.match.recurrent import flax_cells
from graftax.match.units import Fit, assigned, likeness, proposal, question
from graftax.ops import Concat
from graftax.plans import Entry, Proposal
from graftax.rules.text import rule_line
from graftax.tree import Checkpoint, whole_words


def fused_cells(source: Checkpoint, like: Checkpoint, skip: Set[str], lex: Lexicon) -> Proposal:
    """Connect cells that have a layer per gate with cells that fuse the gates in `dense_i` and `dense_h`, in either
    direction. `skip`: settled leaves. If neither names nor shapes decide, the cell is asked about. A bias that only one
    end has is left over."""
    units = flax_cells(source, skip), flax_cells(like, skip)
    out = Proposal()
    for turned in (False, True):
        left, right = units[::-1] if turned else units
        pairs = [(a, b, found) for a in left for b in right if (found := _gates(a, b)) is not None]
        fits = [Fit(a, b, found, likeness(a, b, lex)) for a, b, found in pairs]
        taken = assigned(fits)
        out = out.joined(proposal(taken, turned))
        rest = [fit for fit in fits if fit.alike >= 0 and not any(fit.meets(other) for other in taken)]
        for part in dict.fromkeys(id(fit.torch) for fit in rest):
            some = [fit for fit in rest if id(fit.torch) == part]
            wholes = [name for fit in some for entry in fit.connection.entries for name in entry.targets]
            out = out.joined(question(some[0].torch, some, wholes, partial(_lines, turned=turned), turned))
    return out


def _gates(apart: Part, fused: Part) -> Connection | None:
    """The connection of a cell with a layer per gate and a cell with fused gates."""
    leaves = {role.replace("if_/", "if/"): path for role, path in apart.leaves.items()}
    kind = next((k for k in (LSTM, GRU) if all(f"{g}/kernel" in leaves for g in (*k.input, *k.hidden))), None)
    entries: list[Entry] = []
    for names, dense in ((kind.input, "dense_i"), (kind.hidden, "dense_h")) if kind is not None else ():
        for leaf in ("kernel", "bias"):
            gates = tuple(path for name in names if (path := leaves.get(f"{name}/{leaf}")) is not None)
            whole = fused.leaves.get(f"{dense}/{leaf}")
            if whole is None and leaf == "bias":
                continue  # the leaf of the other side is left over
            if whole is None or len(gates) != len(names):
                return None
            (*lead, width) = fused.specs[whole].shape
            if {apart.specs[name].shape for name in gates} != {(*lead, width // len(gates))} or width % len(gates):
                return None
            cut = Concat(len(lead), (width // len(gates),) * len(gates))
            entries.append(Entry(gates, (whole,), (cut,)))
    return Connection("the gates of one recurrent cell", tuple(entries), ()) if entries else None


def _lines(connection: Connection, turned: bool) -> str:
    """The rule lines for each half of a cell."""
    lines: list[str] = []
    for entry in connection.entries:
        gates, (whole,) = list(entry.sources), entry.targets
        layout = {"layout": "identity"} if "kernel" in whole_words(whole.rpartition("/")[2]) else {}
        ends = {"source": whole, "target": gates} if turned else {"source": gates, "target": whole}
        lines.append(rule_line(**ends, fused="block", **layout))
    return ", ".join(lines)
