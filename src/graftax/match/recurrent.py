"""Recurrent layers: torch's matrices of all gates against one or more Flax cells, connected by the layer table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.errors import Failure, LayoutError
from graftax.layers.base import Connection, Part
from graftax.layers.connect import connect, settled
from graftax.match.names import Lexicon, concepts
from graftax.match.sides import tokens_of
from graftax.match.unlike import unlike
from graftax.ops import invert_chain
from graftax.plans import Entry, Question
from graftax.tree import Checkpoint

_TORCH = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)(?:_l\d+)?(?:_reverse)?")
_GATES = frozenset(
    ("ii", "if", "if_", "ig", "io", "hi", "hf", "hg", "ho", "ir", "iz", "in", "hr", "hz", "hn", "dense_i", "dense_h")
)
_COUNTED = re.compile(r"(.*?)_?(\d+)")


@dataclass(slots=True)
class Recurrent:
    """What was connected, what is asked, what the table refuses, and every leaf that belongs to a recurrent layer."""

    entries: list[Entry] = field(default_factory=list[Entry])
    questions: list[Question] = field(default_factory=list[Question])
    failures: list[Failure] = field(default_factory=list[Failure])
    torch: set[str] = field(default_factory=set[str])
    flax: set[str] = field(default_factory=set[str])


def recurrent(torch: Checkpoint, flax: Checkpoint, skip: set[str], turned: bool, lex: Lexicon) -> Recurrent:
    """Connect the recurrent layers of both sides. `skip`: settled leaves; `turned`: the torch end is like."""
    out = Recurrent()
    left = _torch_parts(torch, skip)
    right = _flax_parts(flax, skip) if left else []
    if not left or not right:
        return out
    fits: list[tuple[Part, Part, Connection]] = []
    for part in left:
        for other in right:
            try:
                found = settled(connect(part, other))
            except LayoutError as error:
                out.failures.append(Failure(str(error), torch.label, part.path))
                continue
            if found is not None:
                fits.append((part, other, found))
    while fits:
        best = [fit for fit in fits if _clear(fit, fits, lex)]
        if not best:
            break
        part, other, found = best[0]
        for entry in found.entries:
            out.entries.append(
                _turned(entry, found) if turned else Entry(entry.sources, entry.targets, entry.ops, found.evidence)
            )
        out.torch |= set(part.leaves.values())
        out.flax |= set(other.leaves.values())
        fits = [
            f for f in fits if not out.torch & set(f[0].leaves.values()) and not out.flax & set(f[1].leaves.values())
        ]
    out.failures = [
        f for f in out.failures if not any(p.path == f.key and out.torch & set(p.leaves.values()) for p in left)
    ]
    for part in left:
        if not out.torch & set(part.leaves.values()):
            out.torch |= set(part.leaves.values())
            _ask(out, part, right, turned)
    return out


def _turned(entry: Entry, found: Connection) -> Entry:
    return Entry(entry.targets, entry.sources, invert_chain(entry.ops), found.evidence)


def _ask(out: Recurrent, part: Part, right: list[Part], turned: bool) -> None:
    others = tuple(path for other in right for path in other.leaves.values() if path not in out.flax)
    mine = tuple(part.leaves.values())
    text = f"{part.path}: the cells that hold this recurrent layer are not clear; write a rule for each leaf"
    out.questions.append(Question("match", text, mine if turned else others, others if turned else mine))
    out.flax |= set(others)


def _clear(fit: tuple[Part, Part, Connection], fits: list[tuple[Part, Part, Connection]], lex: Lexicon) -> bool:
    """The names do not speak against the pair, and no other part fits either end, or none has names as alike."""
    if unlike(fit[0].path, fit[1].path, lex):
        return False
    rivals = [
        other
        for other in fits
        if other is not fit and (other[0] is fit[0] or set(other[1].leaves.values()) & set(fit[1].leaves.values()))
    ]
    own = _likeness(fit, lex)
    return all(_likeness(other, lex) < own - 0.12 for other in rivals)


def _likeness(fit: tuple[Part, Part, Connection], lex: Lexicon) -> float:
    a = set(concepts(tokens_of(f"{fit[0].path}.weight", "torch"), lex))
    b = set(concepts(tokens_of(f"{fit[1].path}/kernel", "flax"), lex))
    return len(a & b) / max(len(a | b), 1)


def _torch_parts(side: Checkpoint, skip: set[str]) -> list[Part]:
    groups: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for path in side.specs:
        owner, _, role = path.rpartition(".")
        if path not in skip and "_" in role and _TORCH.fullmatch(role):
            groups[owner][role] = path
    return [Part(path, "torch", leaves, side.specs, side.modules.get(path)) for path, leaves in groups.items()]


def _flax_parts(side: Checkpoint, skip: set[str]) -> list[Part]:
    """A part for every cell, and one for all numbered cells that stand together."""
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
    out = [_part(path, [path], cells, side) for path in cells]
    return out + [_part(mark, paths, cells, side) for mark, paths in together.items() if len(paths) > 1]


def _part(path: str, members: Iterable[str], cells: Mapping[str, Mapping[str, str]], side: Checkpoint) -> Part:
    members = list(members)
    plain = path.partition("/")[2] if path.startswith("params/") else path
    if len(members) == 1:
        return Part(plain, "flax", dict(cells[members[0]]), side.specs, side.modules.get(plain))
    leaves = {f"{member.rpartition('/')[2]}/{role}": leaf for member in members for role, leaf in cells[member].items()}
    return Part(plain, "flax", leaves, side.specs, None)
