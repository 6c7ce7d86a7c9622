"""Questions about what inference leaves open: each has its candidates and the rule lines that settle them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from graftax.match.engine import Result
from graftax.match.layout_questions import layout_questions
from graftax.match.pair_questions import block_question, pair_questions
from graftax.match.settle import Settled, open_links
from graftax.match.sides import columns_of, paths_of
from graftax.plans import Question
from graftax.rules.key_templates import by_form


def questions(result: Result, sides: tuple[str, str], turned: bool, missing: Collection[str] = ()) -> list[Question]:
    """Every question of the result. `turned`: the torch end is like, so its leaves are the targets. `missing`: like
    leaves that a rule marks `missing`."""
    crowd = by_form(path for item in result.settled for path in _all_paths(item)) if _asks(result) else {}
    for item in result.settled:
        item.scope.crowd = crowd
    out = layout_questions(result.settled, sides, turned)
    out += pair_questions(result, sides, turned, missing)
    return out + [block_question(doubt, sides, turned) for doubt in result.doubts]


def _asks(result: Result) -> bool:
    """True if something in a scope is open."""
    return any(item.board.pairs() or open_links(item) or item.groups for item in result.settled)


def _all_paths(item: Settled) -> Iterable[str]:
    if item.scope.root or item.scope.keys:
        yield from paths_of(columns_of((*item.scope.torch, *item.scope.flax)))
