"""Infer a plan from names, shapes and live modules: every leaf is decided or asked about. `infer` is the only entry
point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from graftax.match.assumptions import call_orders, stack_orders
from graftax.match.bare_rules import read_named, unsaid_questions
from graftax.match.buffers import known_buffers
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
from graftax.match.pairs import Link, Pair, Scope
from graftax.match.partial import consistent, ruled_chains
from graftax.match.questions import questions
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
    with gc_paused():
        return _infer(source, like, source_side, like_side, settled, lex or lexicon(), named, missing)


def _infer(
    source: Checkpoint,
    like: Checkpoint,
    source_side: Side,
    like_side: Side,
    settled: Proposal,
    lex: Lexicon,
    named: Iterable[Named],
    missing: Collection[str],
) -> Proposal:
    reads: list[str] = []
    turned = source_side == "flax" and like_side == "torch"
    hints = read_hints(settled.entries, turned)
    taken = {name for entry in settled.entries for name in entry.sources}
    filled = {name for entry in settled.entries for name in entry.targets}
    free = [name for name in source if name not in taken]
    buffers = known_buffers(source, free, reads) if source_side == "torch" else {}
    theirs = known_buffers(like, (name for name in like if name not in filled), None) if like_side == "torch" else {}
    plain = [name for name in free if name not in buffers]
    ties = find_ties(source, plain, like.specs, like_side, lex, reads) if source_side == "torch" else {}
    if turned:  # the values of like are no evidence; shared storage is
        ties = find_ties(like, [name for name in like if name not in filled], source.specs, "flax", lex, None)
    hidden = {name for names in ties.values() for name in names[1:]}
    t_skip, f_skip = (filled | theirs.keys(), taken) if turned else (taken | buffers.keys(), filled | theirs.keys())
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
    words = (source_side, like_side) if source_side != like_side else ("source", "target")
    asked = questions(result, ("torch", "flax") if source_side != like_side else words, turned, missing)
    used = {name for entry in entries for name in entry.sources}
    if source_side == "torch":
        entries += [
            Entry(
                (name,),
                (),
                (Drop(reason, fill=0.0 if name.rpartition(".")[2] == "num_batches_tracked" else None),),
                ("it is a known buffer",),
            )
            for name, reason in buffers.items()
            if name not in used
        ]
    doubts: list[Question] = []
    if source_side == like_side:
        entries, doubts = by_live_modules(entries, source, like, like_side, settled.entries)
    asked += [*doubts, *cells.questions, *unsaid_questions(result.unsaid, turned)]
    assumed = (*cells.assumptions, *call_orders(result, ends), *stack_orders(result))
    return Proposal(tuple(entries), tuple(asked), assumed, cells.failures, tuple(reads), cells.broken)


def _whole_columns(names: Collection[str], end: Checkpoint) -> frozenset[str]:
    """The names of which the tree has no other that differs from them only in its numbers."""
    mine = Counter(skeleton(name) for name in names if name in end)
    every = Counter(found for name in end if (found := skeleton(name)) in mine) if mine else mine
    return frozenset(name for name in names if name in end and mine[s := skeleton(name)] == every[s])


def _entries(result: Result, ties: dict[str, tuple[str, ...]], turned: bool) -> list[Entry]:
    out: list[Entry] = []
    for item in result.settled:
        for pair in item.taken:
            for link in pair.links:
                choice = item.choices[id(link)]
                if choice.label is not None:
                    out += _column(item.scope, pair, link, choice, ties, turned)
        for group in item.groups:
            for link in group.links:
                if link.known:
                    out += _grouped(item.scope, link, turned)
    return out


def _column(
    scope: Scope, pair: Pair, link: Link, choice: Choice, ties: dict[str, tuple[str, ...]], turned: bool
) -> Iterable[Entry]:
    assert choice.label is not None
    evidence = tuple(filter(None, (pair.why, choice.why, scope.why)))
    chains: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Op, ...]] = {}
    shapes_t, shapes_f = link.torch.shapes, link.flax.shapes
    paths_t, paths_f = link.torch.paths, link.flax.paths
    for key, other in scope.keys:
        source, target = paths_t.get(key), paths_f.get(other)
        if source is None or target is None:
            continue
        shapes = (shapes_t[key], shapes_f[other])
        chain = chains.get(shapes)
        if chain is None:
            chain = link.chains[(choice.label, *shapes)]
            chains[shapes] = chain = invert_chain(chain) if turned else chain
        if turned:
            yield Entry(target, source, chain, evidence)
            continue
        names = ties.get(source[0]) if ties and len(source) == 1 else None
        if names is not None:
            yield Entry(
                names, target, (Same(len(names)), *chain), (*evidence, f"{len(names)} tied names hold this tensor")
            )
        else:
            yield Entry(source, target, chain, evidence)


def _grouped(scope: Scope, link: GroupLink, turned: bool) -> Iterable[Entry]:
    evidence = ("the names are those of the parts of one fused module", f"the fused layout is {link.known!r}")
    evidence += (scope.why,) if scope.why else ()
    for key, chain in link.variants[link.known].items():
        other = dict(scope.keys)[key]
        ends: list[tuple[str, ...]] = []
        for rows in ([c.paths[key] for c in link.torch], [c.paths[other] for c in link.flax]):
            # parts on an axis of their own are the outer number, parts of a fused tensor the inner one
            ordered = rows if "list" in link.ways[link.known].stack else zip(*rows, strict=True)
            ends.append(tuple(path for paths in ordered for path in paths))
        sources, targets = ends
        yield (
            Entry(targets, sources, invert_chain(chain), evidence)
            if turned
            else Entry(sources, targets, chain, evidence)
        )
