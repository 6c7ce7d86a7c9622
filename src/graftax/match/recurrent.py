"""Recurrent layers: the layer table connects torch's matrices of all gates with one or more Flax cells."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftax.errors import Failure, LayoutError
from graftax.layers.base import Connection, Part
from graftax.layers.connect import connect, settled
from graftax.match.flatten import CELL, Suspect, recurrent_inputs
from graftax.match.names import Lexicon, concepts
from graftax.match.sides import tokens_of
from graftax.match.unlike import unlike
from graftax.ops import invert_chain
from graftax.plans import PARITY, Assumption, Candidate, Entry, Question
from graftax.rules.text import rule_line
from graftax.tree import Checkpoint

_GATES = frozenset(
    ("ii", "if", "if_", "ig", "io", "hi", "hf", "hg", "ho", "ir", "iz", "in", "hr", "hz", "hn", "dense_i", "dense_h")
)
_COUNTED = re.compile(r"(.*?)_?(\d+)")
_MAP = "o (c p) -> (p c) o"
_INPUTS = re.compile(r"(?:.*\.)?weight_ih(?:_l0)?(?:_reverse)?")
"""The matrices that take a layer's inputs."""


@dataclass(slots=True)
class Recurrent:
    """The recurrent layers: what is connected, what is asked, what the table refuses, and every leaf that belongs to
    one."""

    entries: list[Entry] = field(default_factory=list[Entry])
    questions: list[Question] = field(default_factory=list[Question])
    failures: list[Failure] = field(default_factory=list[Failure])
    assumptions: list[Assumption] = field(default_factory=list[Assumption])
    torch: set[str] = field(default_factory=set[str])
    flax: set[str] = field(default_factory=set[str])


Fit = tuple[Part, Part, Connection]


def recurrent(torch: Checkpoint, flax: Checkpoint, ruled: Iterable[Entry], turned: bool, lex: Lexicon) -> Recurrent:
    """Connect the recurrent layers of both sides. `ruled`: settled entries; `turned`: the torch end is like."""
    out = Recurrent()
    ruled = list(ruled)
    said = {name for entry in ruled for name in (*entry.sources, *entry.targets)}
    for fit in _as_ruled(torch, flax, ruled, said) if said else ():
        _take(out, fit, torch, turned, lex)
    skip = {*said, *out.torch, *out.flax}
    left = _torch_parts(torch, skip)
    right = flax_parts(flax, skip) if left else []
    if not left or not right:
        return out
    fits = _fits(left, right, torch.label, out.failures)
    fitting = list(fits)
    while fits:
        best = [fit for fit in fits if _clear(fit, fits, lex)]
        if not best:
            break
        _take(out, best[0], torch, turned, lex)
        fits = [
            f for f in fits if not out.torch & set(f[0].leaves.values()) and not out.flax & set(f[1].leaves.values())
        ]
    out.failures = [
        f for f in out.failures if not any(p.path == f.key and out.torch & set(p.leaves.values()) for p in left)
    ]
    waiting: tuple[set[str], set[str]] = set(), set()
    for part in left:
        if not out.torch & set(part.leaves.values()):
            waiting[0].update(part.leaves.values())
            waiting[1].update(_ask(out, part, right, [fit for fit in fitting if fit[0] is part], turned))
    out.torch |= waiting[0]
    out.flax |= waiting[1]
    return out


def _fits(left: Iterable[Part], right: Iterable[Part], label: str, failures: list[Failure]) -> list[Fit]:
    """Every pair that the layer table connects; a refusal is a failure."""
    out: list[Fit] = []
    right = list(right)
    for part in left:
        for other in right:
            try:
                found = settled(connect(part, other))
            except LayoutError as error:
                failures.append(Failure(str(error), label, part.path))
                continue
            if found is not None:
                out.append((part, other, found))
    return out


def _take(out: Recurrent, fit: Fit, torch: Checkpoint, turned: bool, lex: Lexicon) -> None:
    part, other, found = fit
    waiting: list[Entry] = []
    map_: Suspect | None = None
    for entry in found.entries:
        trap = _map(entry, torch, lex)
        if trap is not None:
            map_ = trap
            waiting.append(entry)
            continue
        ends = (entry.targets, entry.sources) if turned else (entry.sources, entry.targets)
        ops = invert_chain(entry.ops) if turned else entry.ops
        out.entries.append(Entry(*ends, ops, (f"the layer table connects them as {found.layer}", *found.evidence)))
    if map_ is not None:
        out.questions.append(_flattened(waiting, map_, turned))
    names = tuple((part if turned else other).leaves.values())
    out.assumptions += [Assumption(text, PARITY, names) for text in found.assumes]
    out.torch |= set(part.leaves.values())
    out.flax |= set(other.leaves.values())


def _map(entry: Entry, torch: Checkpoint, lex: Lexicon) -> Suspect | None:
    """The flattened map that may be the inputs of this matrix."""
    name = entry.sources[0]
    return recurrent_inputs(torch.specs, name, lex) if _INPUTS.fullmatch(name) else None


def _flattened(entries: Iterable[Entry], trap: Suspect, turned: bool) -> Question:
    """Ask how the inputs of a layer are flattened: the matrices of all directions take the same ones."""
    entries = list(entries)
    torch, flax = (tuple(n for e in entries for n in getattr(e, end)) for end in ("sources", "targets"))
    where = flax if turned else torch
    answers = {f"the inputs are a flattened map (C={c}, P)": {"ops": _MAP, "c": c} for c, _, _ in trap.maps()}
    answers["the layout is linear"] = {"layout": "linear"}
    found = [Candidate(_input_rules(entries, **how), where, said) for said, how in answers.items()]
    text = (
        f"{', '.join(torch)}: the layer has {trap.channels} channels x {trap.positions} positions as inputs; if a "
        "flattened convolution map feeds it, their order may differ between the models"
    )
    return Question("flatten", text, torch if turned else flax, where, tuple(found))


def _input_rules(entries: Iterable[Entry], **how: Any) -> str:
    lines: list[str] = []
    for entry in entries:
        flax = list(entry.targets)
        several = {"fused": "block"} if len(flax) > 1 else {}
        lines.append(rule_line(torch=entry.sources[0], flax=flax if several else flax[0], **several, **how))
    return ", ".join(lines)


def _as_ruled(torch: Checkpoint, flax: Checkpoint, ruled: Iterable[Entry], said: Collection[str]) -> list[Fit]:
    """The pairs that rules have settled in part, exactly as the layer table has them, each with the rest of its leaves.
    `said`: the leaves that rules have settled."""
    sides = _torch_parts(torch, ()), flax_parts(flax, ())
    begun = [[part for part in parts if _begun(part, said)] for parts in sides]
    found = _fits(begun[0], begun[1], torch.label, [])
    rest = [(a, b, left) for a, b, fit in found if (left := unruled(fit, ruled)) is not None]
    return [fit for fit in rest if not any(other is not fit and _meet(other, fit) for other in rest)]


def _begun(part: Part, said: Collection[str]) -> bool:
    """True if some leaves of the part are settled, but not all."""
    return 0 < sum(path in said for path in part.leaves.values()) < len(part.leaves)


def unruled(connection: Connection, ruled: Iterable[Entry]) -> Connection | None:
    """The connection without the leaves that rules settle in the same way, name for name. None if rules settle a leaf
    in another way (gates in another order)."""
    pairings = {frozenset((entry.sources, entry.targets)) for entry in ruled}
    spoken = {name for pairing in pairings for names in pairing for name in names}
    left: list[Entry] = []
    for entry in connection.entries:
        if spoken.isdisjoint((*entry.sources, *entry.targets)):
            left.append(entry)
        elif frozenset((entry.sources, entry.targets)) not in pairings:
            return None
    return replace(connection, entries=tuple(left))


def _meet(a: Fit, b: Fit) -> bool:
    return a[0] is b[0] or not set(a[1].leaves.values()).isdisjoint(b[1].leaves.values())


def _ask(out: Recurrent, part: Part, right: list[Part], fits: Iterable[Fit], turned: bool) -> set[str]:
    """Ask which cells hold a layer: one candidate for each that fits and is still free. Returns the Flax leaves that
    wait for an answer."""
    others = tuple(dict.fromkeys(p for other in right for p in other.leaves.values() if p not in out.flax))
    mine = tuple(part.leaves.values())
    found = [
        Candidate(
            lines,
            tuple(other.leaves.values()) if turned else mine,
            f"it pairs {part.path} with {other.path}",
        )
        for _, other, connection in fits
        if not out.flax & set(other.leaves.values()) and (lines := _lines(connection))
    ]
    text = f"{part.path}: it is not clear which cells hold this recurrent layer"
    text += "" if found else "; write a rule for each leaf"
    targets, sources = (mine, others) if turned else (others, mine)
    out.questions.append(Question("match", text, targets, sources, tuple(found)))
    return set(others)


def _lines(connection: Connection) -> str:
    """The rule lines for the weights of the inputs; the rest of the layer follows from them."""
    inputs = [entry for entry in connection.entries if "weight_ih" in entry.sources[0].rpartition(".")[2]]
    return _input_rules(inputs, layout="linear")


def _clear(fit: Fit, fits: list[Fit], lex: Lexicon) -> bool:
    """True if the names do not exclude the pair and either no other part fits either end, or no other pair has names as
    alike."""
    if unlike(fit[0].path, fit[1].path, lex):
        return False
    rivals = [other for other in fits if other is not fit and _meet(other, fit)]
    own = _likeness(fit, lex)
    return all(_likeness(other, lex) < own - 0.12 for other in rivals)


def _likeness(fit: Fit, lex: Lexicon) -> float:
    a = set(concepts(tokens_of(f"{fit[0].path}.weight", "torch"), lex))
    b = set(concepts(tokens_of(f"{fit[1].path}/kernel", "flax"), lex))
    return len(a & b) / max(len(a | b), 1)


def _torch_parts(side: Checkpoint, skip: Collection[str]) -> list[Part]:
    groups: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for path in side.specs:
        owner, _, role = path.rpartition(".")
        if path not in skip and "_" in role and CELL.fullmatch(role):
            groups[owner][role] = path
    return [Part(path, "torch", leaves, side.specs, side.live.modules.get(path)) for path, leaves in groups.items()]


def flax_parts(side: Checkpoint, skip: Collection[str]) -> list[Part]:
    """A part for every cell, one for all numbered cells of one parent, and one for the cells of each module around
    them (the two directions of a layer)."""
    cells: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for path in side.specs:
        pieces = path.split("/")
        if path not in skip and len(pieces) > 2 and pieces[-2] in _GATES:
            cells["/".join(pieces[:-2])]["/".join(pieces[-2:])] = path
    cells = defaultdict(dict, {path: leaves for path, leaves in cells.items() if len(leaves) > 1})
    together: defaultdict[str, list[str]] = defaultdict(list)
    for path in cells:
        parent, _, name = path.rpartition("/")
        match = _COUNTED.fullmatch(name)
        if match:
            together[f"{parent}/{match[1]}" if match[1] else parent].append(path)
    around: defaultdict[str, list[str]] = defaultdict(list)
    for path in cells:
        pieces = path.split("/")
        for n in range(1, len(pieces) - 1):
            around["/".join(pieces[:n])].append(path)
    out = [_part(path, cells[path], side) for path in cells]
    for mark, paths in together.items():
        if len(paths) > 1:
            out.append(_part(mark, _below(paths[0].rpartition("/")[0], paths, cells), side, alone=False))
    return out + [_part(p, _below(p, paths, cells), side) for p, paths in around.items() if 1 < len(paths) <= _MOST]


_MOST = 16  # cells that one recurrent layer may have


def _below(path: str, members: Iterable[str], cells: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The leaves of cells, by their paths from a module around them."""
    start = len(path) + 1 if path else 0
    return {f"{member[start:]}/{role}": leaf for member in members for role, leaf in cells[member].items()}


def _part(path: str, leaves: Mapping[str, str], side: Checkpoint, alone: bool = True) -> Part:
    """`alone`: the path is a module's, and not the start of the names of several."""
    plain = path.partition("/")[2] if path.startswith("params/") else path
    return Part(plain, "flax", dict(leaves), side.specs, side.live.modules.get(plain) if alone else None)
