"""Units: leaves that are connected as a whole (a layer with a weight norm, the cells of a recurrent layer). Each kind
of unit has a generator; this module fits units, takes the pairs that names or shapes settle, and asks about others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace

from graftax.errors import Failure, LayoutError, escape
from graftax.layers.base import Connection, Part
from graftax.layers.connect import connect, settled
from graftax.match.names import Lexicon, concepts, contradicts
from graftax.match.sides import tokens_of
from graftax.ops import invert_chain
from graftax.plans import PARITY, Assumption, Candidate, Entry, Proposal, Question
from graftax.tree import Checkpoint

BARE = "Bare parameter"
EQUAL = 2.0
"""How alike two names are that say the same."""
_MARGIN = 0.12
_KINDS = frozenset(
    ["lstm", "gru", "rnn", "cell", "cells", "recurrent", "optimized", "simple", "bi", "bidirectional", "bilstm"]
)
"""Words for recurrent layers: on both sides they say only what the shapes show."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Two units that connect; `alike`: how alike their names are."""

    torch: Part
    flax: Part
    connection: Connection
    alike: float = 0.0

    def meets(self, other: Fit) -> bool:
        """True if both fits need one of the leaves."""
        ends = (self.torch, other.torch), (self.flax, other.flax)
        return any(not set(a.leaves.values()).isdisjoint(b.leaves.values()) for a, b in ends)


def plain(path: str) -> str:
    """A Flax path without its collection."""
    head, slash, rest = path.partition("/")
    return rest if slash and head in ("params", "batch_stats") else path


def torch_layers(end: Checkpoint, shows: Callable[[str], object], said: Set[str], only: bool = False) -> list[Part]:
    """The torch modules of a kind, of which rules leave something: some leaf shows it by its role. `only`: without
    their other leaves; `said`: the leaves that rules settle."""
    layers: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in end:
        path, between, role = f".{name}".partition(".parametrizations.")
        path, role = (path, between[1:] + role) if between else (path.rpartition(".")[0], path.rpartition(".")[2])
        layers[path[1:]][role] = name
    told = {role for role in {role for roles in layers.values() for role in roles} if shows(role)}
    found = [(path, roles) for path, roles in layers.items() if not told.isdisjoint(roles)]
    made = [(path, {r: leaf for r, leaf in roles.items() if r in told or not only}) for path, roles in found]
    left = [(path, roles) for path, roles in made if not said >= set(roles.values())]
    return [Part(path, "torch", roles, end.specs, end.live.modules.get(path)) for path, roles in left]


def connected(torch: Part, flax: Part) -> Connection | Failure | None:
    """The only connection of the two that has evidence; a Failure if the layer table refuses; None if neither."""
    try:
        best = settled(connect(torch, flax))
    except LayoutError as error:
        return error.failures[0] if error.failures else Failure(str(error), key=torch.path)
    # A bare parameter is no layer, so the table does not judge its name.
    return None if best is None or best.layer == BARE else best


def fits_of(
    left: Iterable[Part], right: Sequence[Part], ruled: Sequence[Entry], lex: Lexicon
) -> tuple[list[Fit], list[tuple[Failure, Part, Part]]]:
    """The pairs that the layer table connects, without the leaves that rules settle in the same way; and its refusals.
    A pair that rules contradict is none, and one of which they settle a part is preferred."""
    pairings = {frozenset((entry.sources, entry.targets)) for entry in ruled}
    spoken = {name for pairing in pairings for names in pairing for name in names}
    fits: list[Fit] = []
    refused: list[tuple[Failure, Part, Part]] = []
    for part in left:
        for other in right:
            found = connected(part, other)
            if isinstance(found, Failure):
                refused.append((found, part, other))
            elif found is not None:
                said = [e for e in found.entries if not spoken.isdisjoint((*e.sources, *e.targets))]
                if all(frozenset((entry.sources, entry.targets)) in pairings for entry in said):
                    rest = tuple(entry for entry in found.entries if entry not in said)
                    alike = EQUAL * 2 if said else likeness(part, other, lex)
                    fits.append(Fit(part, other, replace(found, entries=rest), alike))
    return fits, refused


def likeness(one: Part, other: Part, lex: Lexicon) -> float:
    """How alike the names of two units are, without words for recurrent layers: EQUAL, or the share of the words that
    both have. Below 0 if they name parts that exclude each other (encoder and decoder), or if each has a word that the
    other lacks and they share no telling word."""
    leaves = [f"{part.path}.weight" if part.side == "torch" else f"{part.path}/kernel" for part in (one, other)]
    tokens = [
        [token for token in tokens_of(leaf, part.side) if re.sub(r"\d+$", "", str(token)) not in _KINDS]
        for leaf, part in zip(leaves, (one, other), strict=True)
    ]
    a, b = (frozenset(concepts(some, lex)) for some in tokens)
    telling = [{word for word in words if lex.weight(word) >= 1} for words in (a, b)]
    if contradicts(a, b, lex) or (all(telling) and not telling[0] & telling[1]):
        return -1.0
    return EQUAL if tokens[0] == tokens[1] != [] else len(a & b) / max(len(a | b), 1)


def assigned(fits: Iterable[Fit]) -> list[Fit]:
    """The fits whose names are more alike than those of every rival, one after the other; each leaf is used once."""
    out: list[Fit] = []
    rest = list(fits)
    while best := next((fit for fit in rest if _clear(fit, rest)), None):
        out.append(best)
        rest = [fit for fit in rest if not fit.meets(best)]
    return out


def _clear(fit: Fit, fits: Iterable[Fit]) -> bool:
    return fit.alike >= 0 and all(
        other.alike < fit.alike - _MARGIN for other in fits if other is not fit and other.meets(fit)
    )


def proposal(found: Iterable[Fit], turned: bool) -> Proposal:
    """The entries of these fits, and what they assume. `turned`: the plan runs from the second unit to the first."""
    entries: list[Entry] = []
    assumptions: list[Assumption] = []
    for fit in found:
        why = (f"the layer table connects them as {fit.connection.layer}", *fit.connection.evidence)
        for entry in fit.connection.entries:
            ends = (entry.targets, entry.sources) if turned else (entry.sources, entry.targets)
            entries.append(Entry(*ends, invert_chain(entry.ops) if turned else entry.ops, why))
        names = tuple((fit.torch if turned else fit.flax).leaves.values())
        assumptions += [Assumption(text, PARITY, names) for text in fit.connection.assumes]
    return Proposal(tuple(entries), (), tuple(assumptions))


def refused(failure: Failure, torch: Part, flax: Part, turned: bool) -> Proposal:
    """A refusal; nothing else is asked about the two."""
    ends = (tuple(flax.leaves.values()), tuple(torch.leaves.values()))
    sources, targets = ends if turned else ends[::-1]
    shown = replace(failure, key=escape(failure.key))
    return Proposal(failures=(shown,), broken=(Entry(sources, targets),))


def question(
    part: Part, fits: Sequence[Fit], others: Iterable[str], lines: Callable[[Connection], str], turned: bool
) -> Proposal:
    """Ask with which unit a recurrent layer or cell goes: one candidate for each that fits. `others`: the leaves of the
    other side that wait for the answer."""
    mine, theirs = tuple(part.leaves.values()), tuple(dict.fromkeys(others))
    found = tuple(
        Candidate(
            lines(fit.connection),
            tuple(fit.flax.leaves.values()) if turned else mine,
            f"it pairs {part.path} with {fit.flax.path}",
        )
        for fit in fits
    )
    text = f"{part.path}: it is not clear which cells hold this recurrent layer"
    text += "" if found else "; write a rule for each leaf"
    targets, sources = (mine, theirs) if turned else (theirs, mine)
    asked = Question("match", text, targets, sources, found)
    return Proposal(questions=(asked,), broken=(Entry(sources, targets),))
