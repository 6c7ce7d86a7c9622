"""What inference leaves open, as questions: each with its candidates and the rule lines that settle them."""

from __future__ import annotations

from collections.abc import Iterable

from graftax.match.blocks import Doubt
from graftax.match.choose import Choice, Habits, choose
from graftax.match.engine import Result
from graftax.match.flatten import Suspect
from graftax.match.orders import components
from graftax.match.pairs import Label, Link, Pair, Scope
from graftax.match.rendering import column_rule, flatten_rules, group_rule
from graftax.match.settle import Settled, open_links
from graftax.match.sides import Column, Module
from graftax.plan_text import fold_names
from graftax.plans import Candidate, Question

_MOST = 3  # modules of one component that are asked in one question


def questions(result: Result, sides: tuple[str, str], turned: bool) -> list[Question]:
    """Every question of the result. `turned`: the torch end is like, so that its leaves are the targets."""
    out: list[Question] = []
    for item in result.settled:
        out += _readings(item, sides, turned)
        out += _groups(item, sides, turned)
        out += _matches(item, sides, turned)
    return out + [_doubt(doubt, sides, turned) for doubt in result.doubts]


def _doubt(doubt: Doubt, sides: tuple[str, str], turned: bool) -> Question:
    torch = _paths(_columns(m for family in doubt.torch for m in family.modules))
    flax = _paths(_columns(m for family in doubt.flax for m in family.modules))
    found: list[Candidate] = []
    for scope, pair in doubt.options:
        link = pair.links[0]
        label = min(link.labels) if len(link.labels) == 1 else _usual(link)
        rule = column_rule(scope, pair.torch, pair.flax, link, label, sides)
        found.append(Candidate(rule, _paths([link.flax if turned else link.torch]), "the blocks are of the same sizes"))
    names = ", ".join(fold_names(torch if turned else flax)[:4])
    text = f"{names}: blocks of the same sizes stand in several places, and their names do not tell which is which"
    return Question("match", text, torch if turned else flax, flax if turned else torch, tuple(found))


def _paths(columns: Iterable[Column]) -> tuple[str, ...]:
    return tuple(path for column in columns for paths in column.paths.values() for path in paths)


def _columns(modules: Iterable[Module]) -> list[Column]:
    return [column for module in modules for column in module.roles.values() if column.role != "counter"]


def _readings(item: Settled, sides: tuple[str, str], turned: bool) -> list[Question]:
    out: list[Question] = []
    stacks: dict[tuple[Label, ...], list[tuple[Pair, Link]]] = {}
    for pair, link, choice in open_links(item):
        if choice.kind == "stack":
            stacks.setdefault(choice.open, []).append((pair, link))
            continue
        out.append(_reading(item.scope, [(pair, link)], choice, sides, turned))
    for open_, links in stacks.items():
        out.append(_reading(item.scope, links, Choice(None, "", open_, "stack"), sides, turned))
    return out


def _reading(
    scope: Scope, links: list[tuple[Pair, Link]], choice: Choice, sides: tuple[str, str], turned: bool
) -> Question:
    torch = _paths(link.torch for _, link in links)
    flax = _paths(link.flax for _, link in links)
    pair, link = links[0]
    found: list[Candidate] = []
    for label in choice.open:
        if choice.trap is not None:
            for rule in flatten_rules(scope, pair.torch, pair.flax, link, label, choice.trap, sides):
                where = _paths([link.flax if turned else link.torch])
                found.append(Candidate(rule, where, "a flattened map (C, H, W)"))
        labels = [known for known in sorted(link.labels) if known == label or (not label[1] and known[0] == label[0])]
        for known in labels[:2]:
            rule = column_rule(scope, pair.torch, pair.flax, link, known, sides, open_=True)
            where = f"stacked on axis {', '.join(map(str, known[0]))}" if known[0] else known[1]
            found.append(Candidate(rule, _paths([link.flax if turned else link.torch]), where))
    what = "the axis on which it is stacked" if choice.kind == "stack" else "its layout"
    names = ", ".join(fold_names(torch if turned else flax)[:4])
    if choice.trap is not None:
        text = (
            f"{names}: its width is {choice.trap.channels} channels x {choice.trap.positions} positions; if "
            f"{_FLOWS[choice.trap.out]}, its order must change: from (C, H, W), or from any other order "
            f"that torch uses, such as {_other_order(choice.trap)}"
        )
        return Question("flatten", text, torch if turned else flax, flax if turned else torch, tuple(found))
    text = f"{names}: shapes fit in {len(found)} ways; nothing says which is {what}"
    return Question(choice.kind, text, torch if turned else flax, flax if turned else torch, tuple(found))


_FORMS = {"block": "one after the other", "interleaved": "head by head"}


_FLOWS = {False: "a flattened convolution map feeds it", True: "its outputs become a convolution's map"}


def _other_order(trap: Suspect) -> str:
    """What a rule says where torch permutes the map first."""
    channels, height, width = trap.maps()[0]
    return "(w h c)" if trap.vector else f'flatten = "W={width} H={height} C={channels}"'


def _groups(item: Settled, sides: tuple[str, str], turned: bool) -> list[Question]:
    out: list[Question] = []
    for group in item.groups:
        links = [link for link in group.links if not link.known]
        if not links:
            continue
        # One leaf is asked; its answer settles the others of the group.
        left = _paths(column for link in links for column in link.torch)
        right = _paths(column for link in links for column in link.flax)
        found: list[Candidate] = []
        for variant in links[0].variants:
            rule = group_rule(item.scope, group, links[0], variant, sides)
            found.append(Candidate(rule, right if turned else left, _FORMS.get(variant, variant)))
        targets, sources = (left, right) if turned else (right, left)
        text = f"{', '.join(fold_names(targets)[:3])}: nothing says how the parts lie in the fused tensor"
        out.append(Question("fused", text, targets, sources, tuple(found)))
    return out


def _matches(item: Settled, sides: tuple[str, str], turned: bool) -> list[Question]:
    out: list[Question] = []
    for torch, flax, found in components(item.board.pairs()):
        wanted = torch if turned else flax
        if len(wanted) <= _MOST:
            out.append(_match(item.scope, wanted, torch, flax, list(found.values()), sides, turned))
            continue
        for module in wanted:
            mine = [p for p in found.values() if (p.torch if turned else p.flax) is module]
            others = [p.flax if turned else p.torch for p in mine]
            out.append(
                _match(item.scope, [module], [module] if turned else others, others if turned else [module], mine,
                       sides, turned)
            )  # fmt: skip
    return out


def _match(
    scope: Scope,
    wanted: list[Module],
    torch: list[Module],
    flax: list[Module],
    pairs: list[Pair],
    sides: tuple[str, str],
    turned: bool,
) -> Question:
    targets = _paths(_columns(torch if turned else flax))
    sources = _paths(_columns(flax if turned else torch))
    found: list[Candidate] = []
    for module in wanted:
        mine = [p for p in pairs if (p.torch if turned else p.flax) is module]
        mine.sort(key=lambda p: (bool(p.blocked), -p.total))
        for pair in mine:
            link = pair.links[0]
            why = f"names share {', '.join(pair.shared)}" if pair.shared else "fits by shape"
            why += f"; against it: {pair.blocked}" if pair.blocked else ""
            for label in _likely(link, pair, scope):
                rule = column_rule(scope, pair.torch, pair.flax, link, label, sides, open_=True)
                found.append(Candidate(rule, _paths([link.flax if turned else link.torch]), why))
    names = ", ".join(fold_names(_paths([next(iter(m.roles.values())) for m in wanted]))[:4])
    text = f"{names}: {len(found)} candidates, and names and structure do not tell which"
    return Question("match", text, targets, sources, tuple(found))


def _likely(link: Link, pair: Pair, scope: Scope) -> tuple[Label, ...]:
    """The readings to offer for a pair that is itself in doubt."""
    choice = choose(link, pair, scope, Habits())
    if choice.label is not None:
        return (choice.label,)
    known = tuple(label for label in choice.open if label in link.labels)
    return known[:3] or (_usual(link),)


def _usual(link: Link) -> Label:
    """The reading a rule line should name where several fit: the convention of the field."""
    order = ("linear", "conv", "identity", "reshape")
    return min(link.labels, key=lambda label: (order.index(label[1]) if label[1] in order else 9, label))
