"""What neither rules nor inference settled: known buffers, names that a module ties, missing keys, unexpected keys, and
keys of one name with a shape mismatch. The order matters: each step may settle what the next would ask about."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from graftax.errors import Failure, GraftaxError, escape, option
from graftax.match.buffers import buffer_name, known_buffers
from graftax.match.roles import role_of
from graftax.match.shape_questions import shape_questions
from graftax.match.tied_leaves import tied_leaves
from graftax.match.ties import join_leftovers, tied_to
from graftax.match.words import COLLECTIONS
from graftax.ops import Copy, Drop, Fill, Keep, apply_chain, same_bits
from graftax.plans import Entry, Proposal, Question
from graftax.tree import Checkpoint, Side, split_path, split_words

COUNTER = "num_batches_tracked"
"""The batch counter of a torch BatchNorm. It affects only the average with momentum=None."""


def settle_leftovers(
    proposal: Proposal,
    source: Checkpoint,
    like: Checkpoint,
    sides: tuple[Side, Side],
    ruled: Mapping[str, str],
    missing: str,
    unused: str,
    spoken: Collection[str] = (),
) -> Proposal:
    """The proposal with an entry for every leaf that is settled without a source or without a target.

    ruled: leaf of like -> error, keep or zeros, for leaves that a rule names; missing, unused: the policies for all
    others; spoken: the leaves of like that rules settle.
    """
    proposal = _settle_buffers(proposal, source, like, sides[1], missing == "keep")
    proposal = _settle_tied_targets(proposal, like)
    proposal = join_leftovers(proposal, source, like, sides) if sides[0] == "torch" else proposal
    proposal = _refuse_torn_ties(proposal, source, like)
    proposal = _settle_missing(proposal, like, ruled, "error")  # a leaf that a rule marks `missing` needs no answer
    namesakes = _namesakes(proposal, source, like, sides)
    proposal = shape_questions(proposal, source, like, sides, namesakes)
    proposal = tied_leaves(proposal, source, like, sides, spoken)
    proposal = _settle_unused(proposal, source, unused)
    proposal = _settle_missing(proposal, like, ruled, missing)
    return _tell_misshapen(proposal, namesakes, source, like)


def _settle_buffers(proposal: Proposal, source: Checkpoint, like: Checkpoint, like_side: Side, keep: bool) -> Proposal:
    """Settle known buffers of like. A source buffer of the same name (apart from a wrapper's prefix), or of that name
    with the same bits in every place, fills it and is not dropped. Else a live torch module (or any like, with `keep`)
    keeps its own buffer, and a batch counter starts at zero."""
    entries = list(proposal.entries)
    filled = {name for entry in entries for name in entry.targets}
    wanted = _known(like, like_side, filled)
    if not wanted:
        return proposal
    dropped = {entry.sources[0]: i for i, entry in enumerate(entries) if entry.dropped and entry.sources}
    twins = {name: _parts(name) for name in dropped}
    settled: set[str] = set()
    reads: list[str] = []
    for name, why in wanted.items():
        spec, words = like[name], _parts(name)
        same = [t for t, other in twins.items() if _ends_alike(words, other) and source[t].shape == spec.shape]
        alone = len(same) == 1 and sum(_ends_alike(twins[same[0]], _parts(w)) for w in wanted) == 1
        alike = [t for t, other in twins.items() if other[-1] == words[-1]]
        if not alone and alike and (twin := _one_value(alike, name, source, like, wanted, reads)):
            same, alone = [twin], True
        if alone and same[0] in dropped:
            entries[dropped.pop(same[0])] = Entry((same[0],), (name,), (), ("both sides have this known buffer",))
        elif alike:
            continue  # the source has several buffers of this name: a question asks which
        elif like_side == "torch" and like.has_values and (keep or like.storage.format == "live"):
            entries.append(Entry((), (name,), (Keep(spec.shape, spec.dtype),), (f"it is a known buffer: {why}",)))
        elif words[-1] == COUNTER:
            entries.append(Entry((), (name,), (Fill(0.0, spec.shape, spec.dtype, why),), ("it is a known buffer",)))
        else:
            continue
        settled.add(name)
    questions = _still_open(proposal.questions, settled)
    return replace(proposal, entries=tuple(entries), questions=questions, reads=(*proposal.reads, *reads))


def _known(like: Checkpoint, side: Side, filled: Collection[str]) -> dict[str, str]:
    """The known buffers of like that nothing fills, and why each is one."""
    left = [name for name in like if name not in filled]
    if side == "torch":
        return known_buffers(like, left, None)
    return {name: why for name in left if (why := buffer_name(name, like[name]))}


def _one_value(alike: list[str], name: str, source: Checkpoint, like: Checkpoint, wanted: Collection[str],
               reads: list[str]) -> str:  # fmt: skip
    """The source buffer for `name`, taken in order, if the source has as many buffers of its name as like and all have
    one shape and the same bits. Else ''."""
    places = [other for other in wanted if _parts(other)[-1] == _parts(name)[-1]]
    specs = {source[t] for t in alike}
    if len(places) != len(alike) or len(specs) > 1 or {like[p].shape for p in places} != {s.shape for s in specs}:
        return ""
    if not source.has_values or any(tied_to(source, t, alike[:1], reads) is None for t in alike[1:]):
        return ""
    return alike[places.index(name)]


def _settle_tied_targets(proposal: Proposal, like: Checkpoint) -> Proposal:
    """Fill the names that a live torch module ties to a filled leaf: they take its tensor too."""
    if not like.storage.aliases:
        return proposal
    entries = list(proposal.entries)
    filled = {name: i for i, entry in enumerate(entries) for name in entry.targets}
    settled: set[str] = set()
    for name, first in like.storage.aliases.items():
        i = filled.get(first)
        if name in filled or name not in like or i is None or len(entries[i].targets) > 1:
            continue
        names = [first, *(n for n, f in like.storage.aliases.items() if f == first and n not in filled and n in like)]
        why = (*entries[i].evidence, "the module ties these names")
        entries[i] = Entry(entries[i].sources, tuple(names), (*entries[i].ops, Copy(len(names))), why)
        filled.update(dict.fromkeys(names, i))
        settled.update(names[1:])
    if not settled:
        return proposal
    return replace(proposal, entries=tuple(entries), questions=_still_open(proposal.questions, settled))


def _refuse_torn_ties(proposal: Proposal, source: Checkpoint, like: Checkpoint) -> Proposal:
    """A failure for names that are one tensor in like but would get different values: the last one loaded would
    overwrite the others."""
    if not like.storage.aliases or not source.has_values:
        return proposal
    home = {name: entry for entry in proposal.entries if len(entry.targets) == 1 for name in entry.targets}
    failures: list[Failure] = []
    reads: list[str] = []
    for name, first in like.storage.aliases.items():
        pair = [home[end] for end in (first, name) if end in home]
        if len(pair) < 2 or not all(entry.sources for entry in pair):
            continue
        reads.append(
            f"{', '.join((*pair[0].sources, *pair[1].sources))}: compared, because {first} and {name} are one tensor"
        )
        try:
            one, other = (apply_chain(entry.ops, tuple(map(source.read, entry.sources)))[0] for entry in pair)
        except GraftaxError:
            continue  # Plan.build says why an entry does not fit
        if not same_bits(one, other):
            text = (
                f"is tied to {escape(first)} in {escape(like.label)}, but the source has different values for the two"
            )
            ends = ", ".join((*pair[0].sources, *pair[1].sources))
            failures.append(
                Failure(text, source.label, name, next=f"Drop one of {escape(ends)}, or untie them in like.")
            )
    return replace(proposal, failures=(*proposal.failures, *failures), reads=(*proposal.reads, *reads))


def _namesakes(
    proposal: Proposal, source: Checkpoint, like: Checkpoint, sides: tuple[Side, Side]
) -> tuple[tuple[str, str], ...]:
    """(source, target) of open keys that have the same name on both sides, if each side has only one key of that
    name."""
    known = _spoken_for(proposal)
    ends: list[dict[tuple[object, ...], list[str]]] = []
    for end, side in zip((source, like), sides, strict=True):
        names: dict[tuple[object, ...], list[str]] = {}
        for name in end:
            if name not in known:
                names.setdefault(_words(name, side), []).append(name)
        ends.append(names)
    return tuple((a[0], b[0]) for words, a in ends[0].items() if len(a) == len(b := ends[1].get(words, [])) == 1)


def _tell_misshapen(
    proposal: Proposal, pairs: Iterable[tuple[str, str]], source: Checkpoint, like: Checkpoint
) -> Proposal:
    """Add to the question of an open key the key of the same name on the other side, and both shapes."""
    settled = _spoken_for(proposal)
    found: list[Question] = []
    for a, b in pairs:
        transposed = source[a].shape == like[b].shape[::-1] and len(like[b].shape) > 1
        ends = f"shape mismatch: {a} {source[a]} -> {b} {like[b]}" + (
            " (its transpose would fit)" if transposed else ""
        )
        if a not in settled and b not in settled:
            found.append(Question("shape", ends, targets=(b,), sources=(a,)))
        elif a not in settled:
            found.append(Question("unused", f"unexpected key: {ends}", sources=(a,)))
        elif b not in settled:
            found.append(Question("missing", f"missing key: {ends}", targets=(b,)))
    return _asking(proposal, found)


def _spoken_for(proposal: Proposal) -> set[str]:
    """Keys of both sides that an entry or a failure holds, or that an open question mentions."""
    known = {n for e in (*proposal.entries, *proposal.broken) for n in (*e.sources, *e.targets)}
    return known | {n for q in proposal.questions if _waits(q) for n in (*q.sources, *q.targets)}


def _asking(proposal: Proposal, questions: Collection[Question]) -> Proposal:
    """The proposal with these questions added. Questions that ask about nothing else are removed."""
    if not questions:
        return proposal
    told = {name for question in questions for name in (*question.targets, *question.sources)}
    kept = [q for q in proposal.questions if not told.issuperset((*q.sources, *q.targets))]
    return replace(proposal, questions=(*kept, *questions))


def _words(path: str, side: Side) -> tuple[object, ...]:
    """What a path of either side says: the words of its module, and the role of its leaf."""
    *module, last = split_path(path, side)
    if side == "flax" and len(module) > 1 and module[0] in ("params", "batch_stats"):
        module = module[1:]
    role, _, rest = role_of(last)
    return (*(word for part in (*module, rest) if part for word in split_words(part)), role)


def _parts(path: str) -> tuple[str, ...]:
    """The words and numbers of a path of either side, and its last part, without collections: `blocks_0/attn/index`
    equals `blocks.0.attn.index`."""
    *above, last = path.replace("/", ".").split(".")
    if above and above[0] in COLLECTIONS:
        above = above[1:]
    return (*(word for part in above for word in split_words(part)), last)


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """True if one is the other with a prefix before it."""
    shorter = min(len(a), len(b))
    return a[-shorter:] == b[-shorter:]


def _settle_unused(proposal: Proposal, source: Checkpoint, policy: str) -> Proposal:
    """Unexpected keys are dropped if the user said so; else they are questions. Tensors that are candidates of an open
    question are not dropped."""
    if policy != "drop":
        return proposal
    used = {name for entry in proposal.entries for name in entry.sources}
    waiting = {
        name
        for question in proposal.questions
        if question.targets and _waits(question)
        for name in (*question.sources, *(n for c in question.candidates for n in c.sources))
    }
    left = [name for name in source if name not in used and name not in waiting]
    dropped = set(left)
    questions = tuple(q for q in proposal.questions if q.targets or not dropped.issuperset(q.sources))
    why = option("unused", policy)
    entries = tuple(Entry((name,), (), (Drop(f"unused ({why})"),), (why,)) for name in left)
    return replace(proposal, entries=proposal.entries + entries, questions=questions)


def _still_open(questions: Iterable[Question], settled: Collection[str]) -> tuple[Question, ...]:
    """The questions without the settled targets. A question whose targets are all settled is removed."""
    return tuple(
        replace(question, targets=left)
        for question in questions
        if (left := tuple(name for name in question.targets if name not in settled)) or not question.targets
    )


def _waits(question: Question) -> bool:
    """True for an open question about a pairing, which no policy for missing or unused leaves may close."""
    return bool(question.candidates) or question.kind not in ("missing", "unused")


def _settle_missing(proposal: Proposal, like: Checkpoint, ruled: Mapping[str, str], policy: str) -> Proposal:
    """Missing keys are settled by the rule that names them, else by the policy. A leaf with candidates stays a
    question: it is open, not missing."""
    if policy == "error" and not ruled:
        return proposal
    filled = {name for entry in proposal.entries for name in entry.targets}
    waiting = {name for q in proposal.questions if _waits(q) for name in q.targets}
    entries: list[Entry] = []
    failures: list[Failure] = []
    settled: set[str] = set()
    for name, spec in like.items():
        how = ruled.get(name, "error" if name in waiting else policy)
        if name in filled or how == "error":
            continue
        why = "rules" if name in ruled else option("missing", policy)
        settled.add(name)
        if how == "zeros":
            entries.append(Entry((), (name,), (Fill(0.0, spec.shape, spec.dtype, why),), (why,)))
        elif like.has_values:
            entries.append(Entry((), (name,), (Keep(spec.shape, spec.dtype),), (why,)))
        else:
            text = f"cannot be kept: {escape(like.label)} has no values"
            failures.append(
                Failure(text, like.label, name, next=f"Use {option('missing', 'zeros')}, or a `like` with values.")
            )
    return replace(
        proposal,
        entries=proposal.entries + tuple(entries),
        questions=_still_open(proposal.questions, settled),
        failures=proposal.failures + tuple(failures),
    )
