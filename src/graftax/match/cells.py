"""Recurrent cells of two Flax sides: one dense layer per gate (Linen, NNX's LSTMCell) against one for all gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftax.layers.base import Part
from graftax.layers.recurrent import GRU, LSTM, CellKind
from graftax.match.names import Lexicon, concepts
from graftax.match.recurrent import Recurrent, flax_parts
from graftax.match.sides import tokens_of
from graftax.match.unlike import KINDS, unlike
from graftax.ops import Concat, Split
from graftax.plans import Candidate, Entry, Question
from graftax.rules.text import rule_line
from graftax.tree import Checkpoint, TensorSpec, whole_words

_HALVES = ("input", "dense_i"), ("hidden", "dense_h")
_MARGIN = 0.12


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """A cell with a layer per gate and a cell with fused gates. For each leaf: the leaves of the gates, and the fused
    leaf."""

    apart: Part
    fused: Part
    leaves: tuple[tuple[tuple[str, ...], str], ...]
    likeness: float


def fused_cells(source: Checkpoint, like: Checkpoint, skip: set[str], lex: Lexicon) -> Recurrent:
    """Connect cells that have a layer per gate with cells that fuse the gates in `dense_i` and `dense_h`, in either
    direction. `skip`: settled leaves. If neither names nor shapes decide, the cell is asked about. A bias that only one
    end has is left over."""
    out = Recurrent()
    left, right = flax_parts(source, skip), flax_parts(like, skip)
    fits = [
        fit
        for a in left
        for b in right
        for fit in (_fit(a, b, source.specs, like.specs, lex) or _fit(b, a, like.specs, source.specs, lex),)
        if fit is not None
    ]
    ours = {id(part) for part in left}
    while best := next((fit for fit in fits if _clear(fit, fits)), None):
        turned = id(best.fused) in ours
        for gates, whole in best.leaves:
            shape = (like if not turned else source).specs[whole].shape
            cut = (len(shape) - 1, (shape[-1] // len(gates),) * len(gates))
            ends = ((whole,), gates, (Split(*cut),)) if turned else (gates, (whole,), (Concat(*cut),))
            out.entries.append(Entry(*ends, ("they are the gates of one recurrent cell",)))
            out.torch |= set(ends[0])
            out.flax |= set(ends[1])
        fits = [fit for fit in fits if fit.apart is not best.apart and fit.fused is not best.fused]
    for part in {id(fit.apart): fit.apart for fit in fits}.values():
        _ask(out, [fit for fit in fits if fit.apart is part], ours)
    return out


def _fit(
    apart: Part, fused: Part, gates: Mapping[str, TensorSpec], wholes: Mapping[str, TensorSpec], lex: Lexicon
) -> _Fit | None:
    """None if a kernel is missing on either side, a shape does not fit, or the names exclude each other."""
    plain = {role.replace("if_/", "if/"): path for role, path in apart.leaves.items()}
    kind = next((k for k in (LSTM, GRU) if all(f"{g}/kernel" in plain for g in (*k.input, *k.hidden))), None)
    if kind is None or unlike(apart.path, fused.path, lex, torch=False):
        return None
    leaves: list[tuple[tuple[str, ...], str]] = []
    for half, dense in _HALVES:
        for leaf in ("kernel", "bias"):
            names = tuple(path for g in _gates(kind, half) if (path := plain.get(f"{g}/{leaf}")) is not None)
            whole = fused.leaves.get(f"{dense}/{leaf}")
            if whole is None and leaf == "bias":
                continue  # the leaf of the other side is left over
            if whole is None or len(names) != len(_gates(kind, half)):
                return None
            shapes = {gates[name].shape for name in names}
            (*lead, width) = wholes[whole].shape
            if shapes != {(*lead, width // len(names))} or width % len(names):
                return None
            leaves.append((names, whole))
    return _Fit(apart, fused, tuple(leaves), _likeness(apart, fused, lex))


def _gates(kind: CellKind, half: str) -> Sequence[str]:
    return kind.input if half == "input" else kind.hidden


def _likeness(a: Part, b: Part, lex: Lexicon) -> float:
    """2 if the paths are equal apart from words for recurrent layers; else the share of words that both have."""
    left, right = ([t for t in tokens_of(f"{p.path}/kernel", "flax") if t not in KINDS] for p in (a, b))
    if left and left == right:
        return 2.0
    first, second = set(concepts(left, lex)), set(concepts(right, lex))
    return len(first & second) / max(len(first | second), 1)


def _clear(fit: _Fit, fits: Sequence[_Fit]) -> bool:
    rivals = (o for o in fits if o is not fit and (o.apart is fit.apart or o.fused is fit.fused))
    return all(other.likeness < fit.likeness - _MARGIN for other in rivals)


def _ask(out: Recurrent, fits: Sequence[_Fit], ours: set[int]) -> None:
    """One question about a cell with a layer per gate; its candidates are all cells that fit."""
    turned = id(fits[0].fused) in ours
    found: list[Candidate] = []
    for fit in fits:
        lines = [_rule(gates, whole, turned) for gates, whole in fit.leaves]
        wholes = tuple(whole for _, whole in fit.leaves)
        gates = tuple(name for names, _ in fit.leaves for name in names)
        one, other = (fit.fused, fit.apart) if turned else (fit.apart, fit.fused)
        found.append(Candidate(", ".join(lines), wholes if turned else gates, f"it pairs {one.path} with {other.path}"))
    gates = tuple(name for names, _ in fits[0].leaves for name in names)
    wholes = tuple(dict.fromkeys(whole for fit in fits for _, whole in fit.leaves))
    text = f"{fits[0].apart.path}: {len(fits)} cells have the shapes of its gates, and names do not tell which is right"
    targets, sources = (gates, wholes) if turned else (wholes, gates)
    out.questions.append(Question("match", text, targets, sources, tuple(found)))
    out.torch |= set(sources)
    out.flax |= set(targets)


def _rule(gates: tuple[str, ...], whole: str, turned: bool) -> str:
    layout = {"layout": "identity"} if "kernel" in whole_words(whole.rpartition("/")[2]) else {}
    ends = {"source": whole, "target": list(gates)} if turned else {"source": list(gates), "target": whole}
    return rule_line(**ends, fused="block", **layout)
