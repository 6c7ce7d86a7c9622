"""Questions about what inference leaves open: first layouts, then pairs of modules and blocks, with the pairings that
fit. Each has the rule lines that settle it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice, product

from graftax.errors import some
from graftax.match.blocks import Doubt
from graftax.match.choose import Habits, choose, trapped, usual
from graftax.match.engine import Result
from graftax.match.flatten import Suspect
from graftax.match.layout_questions import Ways, layout_questions, leaf_ways
from graftax.match.pairings import MOST, Asked, Aspect, Option, arranged
from graftax.match.pairs import Link, Pair, Scope
from graftax.match.part_order import in_said_order
from graftax.match.rendering import column_rule
from graftax.match.scope_names import main_column
from graftax.match.settle import open_links
from graftax.match.sides import Column, Module, columns_of, paths_of
from graftax.match.stack_axes import stack_axes
from graftax.plans import Candidate, Question
from graftax.plans.names import fold_names
from graftax.rules.key_templates import by_form

Item = tuple[Scope, Pair]


def questions(result: Result, sides: tuple[str, str], turned: bool, missing: Collection[str] = ()) -> list[Question]:
    """Every question of the result. `turned`: the torch end is like, so its leaves are the targets. `missing`: like
    leaves that a rule marks `missing`."""
    scopes = [item.scope for item in result.settled]
    if any(item.board.pairs() or open_links(item) or item.groups for item in result.settled):
        named = [(*scope.torch, *scope.flax) for scope in scopes if scope.root or scope.keys]
        crowd = by_form(path for modules in named for path in paths_of(columns_of(modules)))
        for scope in scopes:
            scope.crowd = crowd
    out = layout_questions(result.settled, sides, turned)
    out += pair_questions(result, sides, turned, missing)
    return out + [block_question(doubt, sides, turned) for doubt in result.doubts]


def pair_questions(
    result: Result, sides: tuple[str, str], turned: bool, missing: Collection[str] = ()
) -> list[Question]:
    """The questions about open pairs of all scopes. `missing`: like leaves that a rule marks `missing`."""
    options: list[Option[Item]] = []
    taken: list[Aspect] = []
    for item in result.settled:
        open_ = item.board.pairs()
        if missing:
            open_ = [pair for pair in open_ if not set(missing).issuperset(paths_of([_main(pair, turned)]))]
        said = any(pair.bonus > 1 for pair in open_)  # a rule for another instance says so: do not trust the names
        options += [_option(item.scope, pair, turned, said) for pair in open_]
        taken += [aspect for pair in item.taken for aspect in _aspects(pair)] if open_ else []
        stack_axes(item.scope, open_, result.habits)

    def ways(scope: Scope, pair: Pair) -> Ways:
        return leaf_options(pair, scope, result.habits, sides, result.traps.get(id(pair.torch)))

    return [pair_question(asked, ways, turned) for asked in arranged(options, taken)]


def _option(scope: Scope, pair: Pair, turned: bool, said: bool) -> Option[Item]:
    torch, flax = frozenset([id(pair.torch)]), frozenset([id(pair.flax)])
    ends = (flax, torch) if turned else (torch, flax)
    score = pair.total - pair.found("untransposed call")
    return Option(ends, (scope, pair), score, pair.forbidden and not said, tuple(_aspects(pair)))


def pair_question(asked: Asked[Item], ways_of: Callable[[Scope, Pair], Ways], turned: bool) -> Question:
    """One question: its candidates are the answers, each in the layouts that its pairs may have (`ways_of`)."""
    ways: dict[int, Ways] = {}
    moving = _moving([[option.item[1] for option in answer] for answer in asked.answers])
    found: list[tuple[int, Candidate]] = []
    for answer in asked.answers:
        pairs = [option.item[1] for option in answer]
        for scope, pair in (option.item for option in answer):
            if id(pair) not in ways:
                ways[id(pair)] = ways_of(scope, pair)
        where = paths_of(_main(pair, not turned) for pair in pairs)
        several = moving if len(pairs) > 1 else None
        for n, chosen in enumerate(_ways([ways[id(pair)] for pair in pairs])):
            rule = ", ".join(dict.fromkeys(rule for rule, _ in chosen))
            found.append((n, Candidate(rule, where, _says(pairs, [said for _, said in chosen], several))))
    every = [option.item[1] for option in asked.options]
    ends = {id(pair.torch): pair.torch for pair in every}, {id(pair.flax): pair.flax for pair in every}
    left, right = (tuple(dict.fromkeys(paths_of(columns_of(modules.values())))) for modules in ends)
    targets, sources = (left, right) if turned else (right, left)
    candidates = [candidate for _, candidate in sorted(found, key=lambda item: item[0])][:MOST]
    wanted = ends[0 if turned else 1].values()
    return Question(
        "match", f"{_named(wanted)}: {_doubts(asked, len(candidates))}", targets, sources, tuple(candidates)
    )


def _named(modules: Iterable[Module]) -> str:
    return some(fold_names(dict.fromkeys(paths_of([main_column(module) for module in modules]))), 4)


def _doubts(asked: Asked[Item], count: int) -> str:
    first = asked.answers[0]
    if not asked.complete:
        return "they pair in more ways than one question can list; these are the likeliest first steps"
    if any(len(answer) == len(first) for answer in asked.answers[1:]):
        return f"{count} candidates fit, and names and structure do not tell which is right"
    several = f" in {count} layouts" if count > 1 and len(asked.answers) == 1 else ""
    fits, what = ("candidate", "shape matches") if len(first) == 1 else ("pairing", "shapes match")
    return f"one {fits} fits{several}, and only the {what}"


def _says(pairing: Sequence[Pair], layouts: Sequence[str], moving: set[int] | None = None) -> str:
    """The evidence for a pairing or, if `moving` is given (the modules that pairings pair differently), how it differs
    from the others."""
    said = [text for text in dict.fromkeys(layouts) if text]
    if moving is None:
        (pair,) = pairing
        joined = ", but " if pair.shared else ", and "
        why = pair.says if pair.shared else "only the shape matches"
        return "; ".join([f"{why}{joined}{pair.blocked}" if pair.blocked else why, *said])
    ends = [f"{_named([p.torch])} with {_named([p.flax])}" for p in pairing if id(p.torch) in moving]
    return "; ".join([f"it pairs {', '.join(ends)}", *said] if ends else said or ["the shapes match"])


def _moving(pairings: Sequence[Sequence[Pair]]) -> set[int]:
    """The modules, by id, that pairings pair differently, and their partners."""
    partners: defaultdict[int, set[int]] = defaultdict(set)
    for pair in (pair for pairing in pairings for pair in pairing):
        partners[id(pair.torch)].add(id(pair.flax))
        partners[id(pair.flax)].add(id(pair.torch))
    moving = {key for key, others in partners.items() if len(others) > 1}
    return moving | {other for key in moving for other in partners[key]}


_WAYS = 6  # how many layouts of one pairing are offered


def _ways(options: Sequence[Ways]) -> list[Ways]:
    """One option for each pair. If several pairs have the same options, they share one choice."""
    kinds = list(dict.fromkeys(tuple(said for _, said in found) for found in options if len(found) > 1))
    out: list[Ways] = []
    for picks in islice(product(*(range(len(kind)) for kind in kinds)), _WAYS):
        at = dict(zip(kinds, picks, strict=True))
        out.append([found[at.get(tuple(said for _, said in found), 0)] for found in options])
    return out


def leaf_options(
    pair: Pair, scope: Scope, habits: Habits, sides: tuple[str, str], trap: Suspect | None = None, silent: bool = False
) -> Ways:
    """The ways in which the main leaf of an open pair may be read. `silent`: see `leaf_ways`."""
    link = main_link(pair)
    choice = choose(link, pair, scope, habits)
    choice = in_said_order(choice if trap is None else trapped(link, choice, trap), pair)
    return leaf_ways(scope, pair, link, choice, sides, silent)[:_WAYS]


def main_link(pair: Pair) -> Link:
    """The link of the leaf that represents the module: its weight, if it has one."""
    main = main_column(pair.torch)
    return next((link for link in pair.links if link.torch is main), pair.links[0])


def _main(pair: Pair, torch: bool) -> Column:
    """The main leaf on torch's side, or on the Flax side."""
    link = main_link(pair)
    return link.torch if torch else link.flax


# ---------------------------------------------------------------- what should be paired along with a pair


def _aspects(pair: Pair) -> Iterable[Aspect]:
    """What should be paired along with the modules: their parents, and their last words without numbers."""
    (*above, last), (*other_above, other) = _parts(pair.torch), _parts(pair.flax)
    if above and other_above:
        yield ("parent", *above), ("parent", *other_above)
        yield ("parents", *map(_stem, above)), ("parents", *map(_stem, other_above))
    if _stem(last) and _stem(other):
        yield _stem(last), _stem(other)


_COUNTED = re.compile(r"_?\d+$")


def _stem(part: str) -> str:
    """The part without its number."""
    return _COUNTED.sub("", part)


def _parts(module: Module) -> list[str]:
    """The parts of the path of a module's first instance."""
    path = main_column(module).path
    parts = path.split("/" if "/" in path else ".")
    return parts if module.raw or len(parts) == 1 else parts[:-1]


# ---------------------------------------------------------------- blocks


def block_question(doubt: Doubt, sides: tuple[str, str], turned: bool) -> Question:
    """Blocks that several blocks of the other side fit: which stands for which."""
    torch, flax = (
        paths_of(columns_of(m for family in families for m in family.modules)) for families in (doubt.torch, doubt.flax)
    )
    found: list[Candidate] = []
    for said, chosen in doubt.options[:MOST]:
        links = ((scope, main_link(pair)) for scope, pair in chosen)
        rules = [column_rule(scope, link, min(link.labels, key=usual), sides) for scope, link in links]
        where = paths_of(_main(pair, not turned) for _, pair in chosen)
        found.append(Candidate(", ".join(rules), where, said))
    targets, sources = (torch, flax) if turned else (flax, torch)
    return Question("match", f"{', '.join(fold_names(targets)[:4])}: {doubt.why}", targets, sources, tuple(found))
