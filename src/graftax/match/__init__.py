"""Infer a plan from names, shapes and live modules: every leaf is decided or asked about. `infer` is the only entry
point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from graftax.match.assumptions import call_orders, stack_orders
from graftax.match.bare_rules import read_named, unsaid_questions
from graftax.match.buffers import COUNTER, buffer_name, known_buffers, last_part
from graftax.match.calls import flax_calls
from graftax.match.cells import fused_cells
from graftax.match.choose import Choice
from graftax.match.engine import Result, match
from graftax.match.groups import GroupLink
from graftax.match.hints import head_count, read_hints
from graftax.match.kinds import Kinds
from graftax.match.live_layouts import by_live_modules
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon, lexicon
from graftax.match.pair_questions import questions
from graftax.match.pairs import Link, Pair, Scope
from graftax.match.partial import consistent, ruled_chains
from graftax.match.recurrent import recurrent
from graftax.match.ties import find_ties
from graftax.match.traced import Traces
from graftax.ops import Drop, Op, Same, invert_chain
from graftax.plans import Entry, Proposal, Question
from graftax.rules.key_templates import skeleton
from graftax.rules.state import Named
from graftax.tree import Checkpoint, Side
from graftax.tree.gc_paused import gc_paused

__all__ = ["infer"]


@gc_paused()
def infer(
    source: Checkpoint,
    like: Checkpoint,
    source_side: Side,
    like_side: Side,
    settled: Proposal,
    lex: Lexicon | None = None,
    named: Iterable[Named] = (),
    missing: Collection[str] = (),
) -> Proposal:
    """Entries for every leaf of `like` that names, structure, shapes and live modules decide, and questions for the
    rest. `settled`: what the rules have decided. Its keys are taken, except those of `named`, whose rules state only
    which leaves belong together. `lex`: the words to know (default: the standard ones). `missing`: like leaves that a
    rule marks `missing`; they are not asked about."""
    lex = lex or lexicon()
    reads: list[str] = []
    turned = source_side == "flax" and like_side == "torch"
    hints = read_hints(settled.entries, turned)
    taken = {name for entry in settled.entries for name in entry.sources}
    filled = {name for entry in settled.entries for name in entry.targets}
    free = [name for name in source if name not in taken]
    open_ = [name for name in like if name not in filled]
    known = known_buffers(source, free, reads) if source_side == "torch" else {}
    theirs = known_buffers(like, open_, None) if like_side == "torch" else {}
    both = _held_by_both((source, free, known), (like, open_, theirs))
    buffers, theirs = ({name for name in end if last_part(name) not in both} for end in (known, theirs))
    plain = [name for name in free if name not in buffers]
    ties = find_ties(source, plain, like.specs, like_side, lex, reads) if source_side == "torch" else {}
    if turned:  # the values of like are no evidence; shared storage is
        ties = find_ties(like, open_, source.specs, "flax", lex, None)
    hidden = {name for names in ties.values() for name in names[1:]}
    t_skip, f_skip = (filled | theirs, taken) if turned else (taken | buffers, filled | theirs)
    torch, flax = (like, source) if turned else (source, like)
    cells = Proposal()
    if source_side != like_side:
        cells = recurrent(torch, flax, settled.entries, turned, lex)
    elif like_side == "flax":
        cells = fused_cells(source, like, taken | filled, lex)
    held = (*cells.entries, *cells.broken)
    ends_of = {name for entry in held for name in entry.sources}, {name for entry in held for name in entry.targets}
    t_skip, f_skip = t_skip | ends_of[turned], f_skip | ends_of[not turned]
    silent = [item.entry for item in named]
    spoken = [entry for entry in settled.entries if not any(entry is other for other in silent)]
    traces = Traces(torch.live.trace, flax.live.trace)
    fused = _whole_columns(hints.fused, torch) | _whole_columns(hints.fused, flax)
    ends = Ends(
        torch.specs,
        flax.specs,
        like_side if turned else source_side,
        source_side if turned else like_side,
        frozenset((t_skip - hints.anchors.keys() - fused) | hidden),
        frozenset(f_skip - set(hints.anchors.values()) - fused),
        hints.anchors,
        hints.styles,
        head_count(source.config) or head_count(like.config),
        ties,
        Kinds.of(torch, flax, traces),
        read_named(named, turned),
        fused=fused,
        ruled=ruled_chains(spoken, hints.anchors, turned),
        traces=traces,
        calls=flax_calls(flax),
    )
    result = match(ends, lex)
    entries = list(cells.entries)
    entries += consistent(_entries(result, ties, turned), settled.entries, silent)
    words = ("torch", "flax") if source_side != like_side else ("source", "target")
    asked = questions(result, words, turned, missing)
    used = {name for entry in entries for name in entry.sources}
    used |= {name for question in asked for name in question.sources}
    entries += [
        Entry((name,), (), (Drop(reason, fill=0.0 if last_part(name) == COUNTER else None),), ("it is a known buffer",))
        for name, reason in known.items()
        if name not in used
    ]
    doubts: list[Question] = []
    if source_side == like_side:
        entries, doubts = by_live_modules(entries, source, like, like_side, settled.entries)
    asked += [*doubts, *cells.questions, *unsaid_questions(result.unsaid, turned)]
    assumed = (*cells.assumptions, *call_orders(result, ends), *stack_orders(result))
    return Proposal(tuple(entries), tuple(asked), assumed, cells.failures, tuple(reads), cells.broken)


def _held_by_both(*ends: tuple[Checkpoint, Collection[str], Mapping[str, str]]) -> frozenset[str]:
    """The last parts of the names of buffers that both sides have: these are matched as any leaf. Of each end: the open
    leaves, and the torch buffers among them."""
    lasts = frozenset(last_part(name) for _, _, known in ends for name in known)
    for end, names, known in ends if lasts else ():
        near = (name for name in names if last_part(name) in lasts)
        lasts = frozenset(last_part(name) for name in near if name in known or buffer_name(name, end[name]))
    return lasts


def _whole_columns(names: Collection[str], end: Checkpoint) -> frozenset[str]:
    """The names of which the tree has no other that differs from them only in its numbers."""
    mine = Counter(skeleton(name) for name in names if name in end)
    every = Counter(found for name in end if (found := skeleton(name)) in mine) if mine else mine
    return frozenset(name for name in names if name in end and mine[s := skeleton(name)] == every[s])


def _entries(result: Result, ties: dict[str, tuple[str, ...]], turned: bool) -> Iterable[Entry]:
    for item in result.settled:
        for pair in item.taken:
            for link in pair.links:
                if item.choices[id(link)].label is not None:
                    yield from _column(item.scope, pair, link, item.choices[id(link)], ties, turned)
        for link in (link for group in item.groups for link in group.links if link.known):
            yield from _grouped(item.scope, link, turned)


def _column(
    scope: Scope, pair: Pair, link: Link, choice: Choice, ties: dict[str, tuple[str, ...]], turned: bool
) -> Iterable[Entry]:
    assert choice.label is not None
    evidence = tuple(filter(None, (pair.why, choice.why, scope.why)))
    chains: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Op, ...]] = {}
    shapes_t, shapes_f = link.torch.shapes, link.flax.shapes
    paths_t, paths_f = link.torch.paths, link.flax.paths
    for key, other in scope.keys:
        if key not in paths_t or other not in paths_f:
            continue
        source, target, shapes, said = paths_t[key], paths_f[other], (shapes_t[key], shapes_f[other]), evidence
        if shapes not in chains:
            chain = link.chains[(choice.label, *shapes)]
            chains[shapes] = invert_chain(chain) if turned else chain
        chain = chains[shapes]
        names = ties.get(source[0]) if ties and not turned and len(source) == 1 else None
        if names is not None:
            source, chain = names, (Same(len(names)), *chain)
            said = (*evidence, f"{len(names)} tied names hold this tensor")
        yield Entry(target, source, chain, said) if turned else Entry(source, target, chain, said)


def _grouped(scope: Scope, link: GroupLink, turned: bool) -> Iterable[Entry]:
    evidence = ("the names are those of the parts of one fused module", f"the fused layout is {link.known!r}")
    evidence += (scope.why,) if scope.why else ()
    keys = dict(scope.keys)
    for key, chain in link.variants[link.known].items():
        ends: list[tuple[str, ...]] = []
        for rows in ([c.paths[key] for c in link.torch], [c.paths[keys[key]] for c in link.flax]):
            # parts on an axis of their own are the outer number, parts of a fused tensor the inner one
            ordered = rows if "list" in link.ways[link.known].stack else zip(*rows, strict=True)
            ends.append(tuple(path for paths in ordered for path in paths))
        ends, ops = (ends[::-1], invert_chain(chain)) if turned else (ends, chain)
        yield Entry(ends[0], ends[1], ops, evidence)
