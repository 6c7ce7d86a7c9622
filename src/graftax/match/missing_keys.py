"""What neither rules nor inference settled: known buffers, names that a module ties, missing keys, unexpected keys, and
keys of one name with a shape mismatch. The order matters: each step may settle what the next would ask about."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from graftax.errors import Failure, GraftaxError, escape, option
from graftax.match.buffers import COUNTER, known_buffers, last_part
from graftax.match.shape_questions import role, shape_questions
from graftax.match.sides import tokens_of
from graftax.match.ties import join_leftovers, tied_leaves
from graftax.ops import Copy, Drop, Fill, Keep, apply_chain, same_bits
from graftax.plans import Entry, Proposal, Question
from graftax.tree import Checkpoint, Side


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
    proposal = _settle_buffers(proposal, like, sides[1], missing == "keep")
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


def _settle_buffers(proposal: Proposal, like: Checkpoint, like_side: Side, keep: bool) -> Proposal:
    """Settle known buffers of like that nothing fills, unless the source has one of that name to spare: a live torch
    module (or any like, with `keep`) keeps its own buffer, and a batch counter starts at zero."""
    filled = {name for entry in proposal.entries for name in entry.targets}
    filled |= {name for question in proposal.questions if question.candidates for name in question.targets}
    theirs = {last_part(name) for entry in proposal.entries if entry.dropped for name in entry.sources}
    open_ = [name for name in like if name not in filled] if like_side == "torch" else ()
    known = {name: why for name, why in known_buffers(like, open_, None).items() if last_part(name) not in theirs}
    kept = like.has_values and (keep or like.storage.format == "live")
    ways = {name: "keep" if kept else "zeros" if last_part(name) == COUNTER else "error" for name in known}
    return _fill(proposal, like, {name: (way, f"it is a known buffer: {known[name]}") for name, way in ways.items()})


def _settle_tied_targets(proposal: Proposal, like: Checkpoint) -> Proposal:
    """Fill the names that a live torch module ties to a filled leaf: they take its tensor too."""
    if not like.storage.aliases:
        return proposal
    entries = list(proposal.entries)
    filled = {name: i for i, entry in enumerate(entries) for name in entry.targets}
    settled: set[str] = set()
    for first in dict.fromkeys(like.storage.aliases.values()):
        names = [n for n, f in like.storage.aliases.items() if f == first and n not in filled and n in like]
        i = filled.get(first)
        if not names or i is None or len(entries[i].targets) > 1:
            continue
        ops, why = (*entries[i].ops, Copy(len(names) + 1)), (*entries[i].evidence, "the module ties these names")
        entries[i] = Entry(entries[i].sources, (first, *names), ops, why)
        settled.update(names)
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
        ends = ", ".join((*pair[0].sources, *pair[1].sources))
        reads.append(f"{ends}: compared, because {first} and {name} are one tensor")
        try:
            one, other = (apply_chain(entry.ops, tuple(map(source.read, entry.sources)))[0] for entry in pair)
        except GraftaxError:
            continue  # Plan.build says why an entry does not fit
        if not same_bits(one, other):
            what = f"is tied to {escape(first)} in {escape(like.label)}"
            hint = f"Drop one of {escape(ends)}, or untie them in like."
            text = f"{what}, but the source has different values for the two"
            failures.append(Failure(text, source.label, name, next=hint))
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
                names.setdefault((*tokens_of(name, side), role(name, side)), []).append(name)
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
        open_ = tuple(name for name in (a,) if name not in settled), tuple(name for name in (b,) if name not in settled)
        kind = "shape" if all(open_) else "unused" if open_[0] else "missing"
        if any(open_):
            found.append(Question(kind, f"{_HALVES[kind]}{ends}", open_[1], open_[0]))
    told = {name for question in found for name in (*question.targets, *question.sources)}
    kept = [q for q in proposal.questions if not (told and told.issuperset((*q.sources, *q.targets)))]
    return replace(proposal, questions=(*kept, *found))


_HALVES = {"shape": "", "unused": "unexpected key: ", "missing": "missing key: "}


def _spoken_for(proposal: Proposal) -> set[str]:
    """Keys of both sides that an entry or a failure holds, or that an open question mentions."""
    known = {n for e in (*proposal.entries, *proposal.broken) for n in (*e.sources, *e.targets)}
    return known | {n for q in proposal.questions if _waits(q) for n in (*q.sources, *q.targets)}


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
    why = option("missing", policy)
    open_ = [name for name in like if name not in filled and (name in ruled or name not in waiting)]
    return _fill(proposal, like, {name: (ruled[name], "rules") if name in ruled else (policy, why) for name in open_})


def _fill(proposal: Proposal, like: Checkpoint, ways: Mapping[str, tuple[str, str]]) -> Proposal:
    """The proposal with entries for leaves that no source fills. `ways`: leaf -> how (zeros, keep, or error: it is left
    open), and why."""
    entries: list[Entry] = []
    failures: list[Failure] = []
    for name, (how, why) in ways.items():
        spec = like[name]
        if how == "zeros":
            entries.append(Entry((), (name,), (Fill(0.0, spec.shape, spec.dtype, why),), (why,)))
        elif how == "keep" and like.has_values:
            entries.append(Entry((), (name,), (Keep(spec.shape, spec.dtype),), (why,)))
        elif how == "keep":
            text = f"cannot be kept: {escape(like.label)} has no values"
            hint = f"Use {option('missing', 'zeros')}, or a `like` with values."
            failures.append(Failure(text, like.label, name, next=hint))
    return replace(
        proposal,
        entries=proposal.entries + tuple(entries),
        questions=_still_open(proposal.questions, {name for name, (how, _) in ways.items() if how != "error"}),
        failures=proposal.failures + tuple(failures),
    )
