"""Leaves that a tie leaves without a source: the source stores one table, and like has a table and a head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from graftax.errors import GraftaxError
from graftax.match.names import concepts, lexicon
from graftax.match.roles import role_of
from graftax.match.sides import tokens_of
from graftax.plans import Candidate, Entry, Proposal, Question
from graftax.rules import apply_rules, escape_key, load_rules, rule_line
from graftax.tree import Checkpoint, Side, split_path

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
        names = [name for name in left if sorted(like[name].shape) == wanted and _may_tie(name, sides[1])]
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


def _is_table(name: str, side: Side) -> bool:
    """True if the name says that the leaf is a table of tokens."""
    words = set(concepts(tokens_of(name, side), lexicon()))
    table = role_of(split_path(name, side)[-1])[1] == "embedding" or not words.isdisjoint(_TABLES)
    return table and words.isdisjoint(_OTHERS)


def _may_tie(name: str, side: Side) -> bool:
    return _OTHERS.isdisjoint(concepts(tokens_of(name, side), lexicon()))


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
