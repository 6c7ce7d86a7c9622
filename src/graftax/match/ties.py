"""Tied weights: one tensor with several names. Values are read only if names are left over, and the plan records it.

Names come before values. Tensors that each have a leaf of like of their own name are not tied, even if they are equal
(two tables of sines); layers of a list are not tied either (adapters that start as the identity). In a live module,
shared storage shows what is tied.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from graftax.errors import GraftaxError
from graftax.match.names import Lexicon, concepts, lexicon
from graftax.match.roles import role_of
from graftax.match.sides import tokens_of
from graftax.ops import Same, same_bits
from graftax.plans import Candidate, Entry, Proposal, Question
from graftax.rules import apply_rules, escape_key, load_rules, rule_line
from graftax.rules.key_templates import skeleton
from graftax.tree import Checkpoint, Side, TensorSpec, split_path

Reads = list[str]
Name = tuple[tuple[str, ...], tuple[object, ...]]
"""The concepts of a module's path, and its numbers."""
_MANY = 64  # more tensors of one shape are layers or experts, not names of one weight


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
    sizes = Counter(spec.size for spec in wanted.values()) if reads is not None else Counter[int]()
    more = {size for size, n in Counter(spec.size for spec in specs.values()).items() if n > sizes[size] and size > 1}
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
    homes = {other.rpartition(".")[0]: names[0].rpartition(".")[0] for names in out.values() for other in names[1:]}
    if reads is None:
        return out
    for name in paths:  # the other leaves of two modules whose weights are tied
        module, _, leaf = name.rpartition(".")
        twin = f"{homes.get(module)}.{leaf}"
        if twin in source and name not in out.get(twin, (twin,)) and tied_to(source, name, [twin], reads) is not None:
            out[twin] = (*out.get(twin, (twin,)), name)
    return out


def _apart(
    source: Checkpoint, names: list[str], equal: list[list[str]], theirs: set[Name], lex: Lexicon
) -> dict[str, tuple[str, ...]]:
    """The equal tensors without those that names or numbers keep separate."""
    known = {name: _name(name, "torch", lex) for name in names}
    listed = Counter(skeleton(name) for name in names)
    out: dict[str, tuple[str, ...]] = {}
    for members in equal:
        groups: list[tuple[set[Name], list[str]]] = []
        for name in members:
            own = {other for other in theirs if _ends_alike(known[name], other)}
            store = source.storage.aliases.get(name, name)
            for have, group in groups:
                shared = any(source.storage.aliases.get(other, other) == store for other in group)
                alone = all(listed[skeleton(other)] == 1 for other in (name, *group))
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
    one = [(i, entry) for i, entry in enumerate(entries) if entry.targets and (len(entry.sources) == 1 or _held(entry))]
    places = {name: i for i, entry in one for name in entry.sources}
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


# ---------------------------------------------------------------- one table in the source, a table and a head in like

_TABLES = frozenset(("tok", "embed", "shared"))
_OTHERS = frozenset(("pos", "seg", "rel"))
_SAID = "tie_word_embeddings"


def tied_leaves(
    proposal: Proposal, source: Checkpoint, like: Checkpoint, sides: tuple[Side, Side], spoken: Collection[str]
) -> Proposal:
    """The proposal with a question for matrices of like that no source fills and that have the sizes of a table of
    tokens: they may be tied to it. Nothing is asked if config.json says that they are. `spoken`: the leaves of like
    that rules settle."""
    filled = {name for entry in (*proposal.entries, *proposal.broken) for name in entry.targets}
    asked = {name for question in proposal.questions if question.candidates for name in question.targets}
    left = [name for name in like if name not in filled and name not in asked and len(like[name].shape) > 1]
    found = proposal
    for table in proposal.entries if left else ():
        if len(table.targets) != 1 or len(table.sources) != 1 or table.targets[0] in spoken:
            continue
        if not any(_is_table(name, side) for name, side in zip((*table.sources, *table.targets), sides, strict=True)):
            continue
        wanted = sorted(like[table.targets[0]].shape)
        names = [name for name in left if sorted(like[name].shape) == wanted]
        names = [name for name in names if _OTHERS.isdisjoint(_words(name, sides[1]))]
        line, entry = _tied(table, names, source, like, sides) if names else ("", None)
        if entry is None:
            continue
        left = [name for name in left if name not in names]
        if (source.config or {}).get(_SAID) is True:
            entry = replace(entry, evidence=(*table.evidence, f"config.json says {_SAID}"))
            entries = tuple(entry if other is table else other for other in found.entries)
            found = replace(found, entries=entries)
            continue
        text = f"{', '.join(names)}: no source tensor fills it; it may be tied to {table.targets[0]}"
        question = Question("match", text, tuple(names), table.sources, (Candidate(line, table.sources, "it is tied"),))
        found = replace(found, questions=(*found.questions, question))
    return found


def _words(name: str, side: Side) -> frozenset[str]:
    return frozenset(concepts(tokens_of(name, side), lexicon()))


def _is_table(name: str, side: Side) -> bool:
    """True if the name says that the leaf is a table of tokens."""
    words = _words(name, side)
    table = role_of(split_path(name, side)[-1])[1] == "embedding" or not words.isdisjoint(_TABLES)
    return table and words.isdisjoint(_OTHERS)


def _tied(
    table: Entry, names: list[str], source: Checkpoint, like: Checkpoint, sides: tuple[Side, Side]
) -> tuple[str, Entry | None]:
    """The rule that fills these leaves with the table too, each in its own layout, and its entry. None if the shapes
    leave the layout of one open."""
    one, many = escape_key(table.sources[0]), [escape_key(name) for name in (*table.targets, *names)]
    words = sides if sides[0] != sides[1] else ("source", "target")
    line = rule_line(**{words[0]: one, words[1]: many}, fused="tied")
    try:
        made = apply_rules(load_rules(line), source, like, *sides).proposal
    except GraftaxError:
        return line, None
    return line, made.entries[0] if made.entries and not made.failures else None
