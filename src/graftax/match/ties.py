"""Tied weights: one tensor with several names. Values are read only if names are left over, and the plan records it.

Names come before values. Tensors that each have a leaf of like of their own name are not tied, even if they are equal
(two tables of sines); layers of a list are not tied either (adapters that start as the identity). In a live module,
shared storage shows what is tied.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from graftax.match.names import Lexicon, concepts, lexicon
from graftax.match.numbers import NUMBER
from graftax.match.sides import tokens_of
from graftax.ops import Same, same_bits
from graftax.plans import Entry, Proposal
from graftax.tree import Checkpoint, Side, TensorSpec

Reads = list[str]
Name = tuple[tuple[str, ...], tuple[object, ...]]
"""The concepts of a module's path, and its numbers."""
_MANY = 64  # more tensors of one shape are layers or experts, not names of one weight


def _sizes(specs: Mapping[str, TensorSpec]) -> Counter[int]:
    out: Counter[int] = Counter()
    for shape, count in Counter([spec.shape for spec in specs.values()]).items():
        out[math.prod(shape)] += count
    return out


def constant(array: Any) -> bool:
    """True if all elements are equal (zeros, ones). Such tensors are equal without being tied."""
    flat = array.reshape(-1)
    return flat.size == 0 or bool((flat.view("u1").reshape(flat.size, -1) == flat[:1].view("u1").reshape(1, -1)).all())


def find_ties(
    source: Checkpoint,
    paths: Iterable[str],
    wanted: Mapping[str, TensorSpec],
    wanted_side: Side,
    lex: Lexicon,
    reads: Reads | None,
) -> dict[str, tuple[str, ...]]:
    """first name -> all names, for tensors among `paths` that are equal bit for bit and not constant. Only shapes that
    the source has more often than `wanted` are compared. Tensors that have leaves of `wanted` of their own names are
    not tied. Tensors whose names differ only in their numbers are tied only if they share storage. reads=None: no value
    is read, so only storage shows ties."""
    specs = source.specs
    if reads is None:
        ours, theirs = (Counter(tuple(sorted(spec.shape)) for spec in end.values()) for end in (specs, wanted))
        few = {shape for shape, count in ours.items() if count > theirs[shape]}
        paths = [path for path in paths if tuple(sorted(specs[path].shape)) in few]
    sizes, have = _sizes({} if reads is None else wanted), _sizes(specs)
    more = {size for size, count in have.items() if count > sizes[size] and size > 1}
    if not more:
        return {}
    paths = [path for path in paths if specs[path].size in more]
    groups: defaultdict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for path in paths:
        spec = specs[path]
        if len(spec.shape) >= 2 and spec.kind in "fc" and not spec.packed:  # integers are no parameters
            groups[(spec.shape, spec.dtype)].append(path)
    out: dict[str, tuple[str, ...]] = {}
    for (shape, _), names in groups.items():
        if len(names) < 2 or len(names) > _MANY:
            continue
        theirs = {_name(path, wanted_side, lex) for path, spec in wanted.items() if sorted(spec.shape) == sorted(shape)}
        equal = _equal(source, names, reads, f"shape {list(shape)}")
        out |= _apart(source, names, equal, theirs, lex) if equal else {}
    return out if reads is None else out | _beside(source, paths, out, sizes, have, reads)


def _beside(
    source: Checkpoint,
    paths: list[str],
    ties: Mapping[str, tuple[str, ...]],
    sizes: Counter[int],
    have: Counter[int],
    reads: Reads,
) -> dict[str, tuple[str, ...]]:
    """The other leaves of a module whose weight is tied (a decoder's bias), each with the only leaf that equals it."""
    owners = {name.rpartition(".")[0] for names in ties.values() for name in names}
    tied = {name for names in ties.values() for name in names}
    out: dict[str, tuple[str, ...]] = {}
    for name in paths:
        spec = source[name]
        if name in tied or name.rpartition(".")[0] not in owners or have[spec.size] <= sizes[spec.size]:
            continue
        others = [other for other in paths if other != name and other not in tied and source[other] == spec]
        equal = [other for other in others if tied_to(source, name, [other], reads) is not None]
        if len(equal) == 1:
            # The free name comes first, and the tied module's own leaf is the alias, unless both modules are tied.
            owns = [other.rpartition(".")[0] for other in (name, *equal)]
            both = owns[1] in owners and any(first.rpartition(".")[0] == owns[0] for first in ties)
            found = (name, *equal) if both else (*equal, name)
            out[found[0]] = found
            tied |= {*found}
    return out


def _apart(
    source: Checkpoint, names: list[str], equal: list[list[str]], theirs: set[Name], lex: Lexicon
) -> dict[str, tuple[str, ...]]:
    """The equal tensors without those that names or numbers keep separate."""
    known = {name: _name(name, "torch", lex) for name in names}
    listed = Counter(_skeleton(name) for name in names)
    out: dict[str, tuple[str, ...]] = {}
    for members in equal:
        groups: list[tuple[set[Name], list[str]]] = []
        for name in members:
            own = {other for other in theirs if _ends_alike(known[name], other)}
            store = source.storage.aliases.get(name, name)
            for have, group in groups:
                shared = any(source.storage.aliases.get(other, other) == store for other in group)
                alone = all(listed[_skeleton(other)] == 1 for other in (name, *group))
                if (shared or alone) and (not have or own <= have):
                    group.append(name)
                    have |= own
                    break
            else:
                groups.append((own, [name]))
        out |= {group[0]: tuple(group) for _, group in groups if len(group) > 1}
    return out


def _name(path: str, side: Side, lex: Lexicon) -> Name:
    tokens = tokens_of(path, side)
    return concepts(tokens, lex), tuple(token for token in tokens if not isinstance(token, str))


def _skeleton(path: str) -> str:
    return NUMBER.sub("#", path)


def _ends_alike(a: Name, b: Name) -> bool:
    """True if one is the other with a prefix before it."""
    short = min(len(a[0]), len(b[0]))
    return a[1] == b[1] and bool(short or a[0] == b[0]) and a[0][len(a[0]) - short :] == b[0][len(b[0]) - short :]


def _equal(source: Checkpoint, names: list[str], reads: Reads | None, what: str) -> list[list[str]]:
    """Groups of names of one tensor: by storage in a live module, else by values."""
    classes: list[tuple[Any, list[str]]] = []
    if source.has_values and not source.live.modules and reads is not None:
        reads.append(f"{len(names)} tensors of {what}, to find tied ones: {', '.join(names[:4])}")
        for name in names:
            array = source.read(name)
            for first, members in classes:
                if same_bits(first, array):
                    members.append(name)
                    break
            else:
                classes.append((array, [name]))
    else:
        by_store: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            by_store[source.storage.aliases.get(name, name)].append(name)
        classes = [(None, members) for members in by_store.values()]
    return [members for first, members in classes if len(members) > 1 and (first is None or not constant(first))]


def join_leftovers(proposal: Proposal, source: Checkpoint, like: Checkpoint, sides: tuple[Side, Side]) -> Proposal:
    """The proposal with tensors that are left over joined to the entries of tensors that they are tied to: matrices
    that `find_ties` would tie, if sizes or rules had not hidden them, and the other leaves of their modules (a
    decoder's bias)."""
    entries = list(proposal.entries)
    known = {name for entry in (*entries, *proposal.broken) for name in entry.sources}
    known |= {name for question in proposal.questions if question.candidates for name in question.sources}
    free = [name for name in source if name not in known]
    if not free:
        return proposal
    reads: Reads = []
    places = {name: i for i, entry in enumerate(entries) if _joinable(entry) for name in entry.sources}
    by_spec: defaultdict[TensorSpec, list[str]] = defaultdict(list)
    for name in places:
        by_spec[source[name]].append(name)
    crowd = Counter(source[name] for name in free)
    owners = {name.rpartition(".")[0] for entry in entries if _held(entry) for name in entry.sources}
    for name in sorted(free, key=lambda name: len(source[name].shape) < 2):
        spec = source[name]
        twins = by_spec[spec]
        if not twins or crowd[spec] > _MANY or spec.kind not in "fc" or spec.packed:
            continue
        if len(spec.shape) < 2 and name.rpartition(".")[0] not in owners:
            continue
        twin = tied_to(source, name, twins, reads)
        if twin is None or (len(spec.shape) > 1 and not _may_tie(source, twin, name, like, sides[1])):
            continue
        old = entries[places[twin]]
        count = len(old.sources) + 1
        why = tuple(text for text in old.evidence if not text.endswith(_HELD))
        ops = (Same(count), *(old.ops[1:] if _held(old) else old.ops))
        entries[places[twin]] = Entry((*old.sources, name), old.targets, ops, (*why, f"{count} {_HELD}"))
        owners.update(other.rpartition(".")[0] for other in (*old.sources, name))
    return replace(proposal, entries=tuple(entries), reads=(*proposal.reads, *reads))


_HELD = "tied names hold this tensor"


def _held(entry: Entry) -> bool:
    """True if the entry takes one tensor under several names."""
    return bool(entry.ops) and isinstance(entry.ops[0], Same)


def _joinable(entry: Entry) -> bool:
    """True if the entry takes one tensor, under one name or several."""
    return bool(entry.targets) and (len(entry.sources) == 1 or _held(entry))


def _may_tie(source: Checkpoint, twin: str, name: str, like: Checkpoint, like_side: Side) -> bool:
    """True if neither names nor numbers keep the two equal tensors apart, and they are not constant."""
    if source.has_values and constant(source.read(name)):
        return False
    lex, shape = lexicon(), sorted(source[name].shape)
    theirs = {_name(path, like_side, lex) for path, spec in like.items() if sorted(spec.shape) == shape}
    alike = [other for other in source if source[other] == source[name]]
    return len(alike) <= _MANY and bool(_apart(source, alike, [[twin, name]], theirs, lex))


def tied_to(source: Checkpoint, name: str, others: Iterable[str], reads: Reads) -> str | None:
    """The name among `others` whose tensor equals that of `name` bit for bit; for parameters of a live module, whose
    tensor is the same."""
    if not source.has_values or (source.live.modules and name not in source.live.buffers):
        store = source.storage.aliases.get(name, name)
        return next((other for other in others if source.storage.aliases.get(other, other) == store), None)
    near = [other for other in others if source[other] == source[name]]
    if not near:
        return None
    array = source.read(name)
    for other in near:
        if same_bits(array, source.read(other)):
            reads.append(f"{name} and {other}, bit for bit equal")
            return other
    return None
