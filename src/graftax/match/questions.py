"""Questions about what inference leaves open: each has its candidates and the rule lines that settle them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice, product

from graftax.match.assignments import Asked, Cluster, arranged
from graftax.match.blocks import Doubt
from graftax.match.choose import Choice, Habits, choose, stack_axes, trapped
from graftax.match.engine import Result
from graftax.match.flatten import Suspect
from graftax.match.key_templates import skeleton
from graftax.match.orders import components
from graftax.match.pairs import Label, Link, Pair, Scope
from graftax.match.part_order import order_keys
from graftax.match.rendering import column_rule, flatten_rules, group_rule
from graftax.match.scope_names import main_column
from graftax.match.settle import Settled, open_links
from graftax.match.sides import Column, Module
from graftax.plans import Candidate, Question
from graftax.plans.names import fold_names


def questions(result: Result, sides: tuple[str, str], turned: bool, missing: Collection[str] = ()) -> list[Question]:
    """Every question of the result. `turned`: the torch end is like, so its leaves are the targets. `missing`: like
    leaves that a rule marks `missing`."""
    out: list[Question] = []
    crowd: defaultdict[str, list[str]] = defaultdict(list)
    for path in (path for item in result.settled for path in _all_paths(item)) if _asks(result) else ():
        crowd[skeleton(path)].append(path)
    for item in result.settled:
        item.scope.crowd = crowd
    for item in result.settled:
        out += _readings(item, sides, turned)
        out += _groups(item, sides, turned)
    out += _matches(result, sides, turned, missing)
    return out + [_doubt(doubt, sides, turned) for doubt in result.doubts]


def _asks(result: Result) -> bool:
    """True if something in a scope is open."""
    return any(item.board.pairs() or open_links(item) or item.groups for item in result.settled)


def _all_paths(item: Settled) -> Iterable[str]:
    if item.scope.root or item.scope.keys:
        yield from _paths(_columns((*item.scope.torch, *item.scope.flax)))


def _doubt(doubt: Doubt, sides: tuple[str, str], turned: bool) -> Question:
    torch = _paths(_columns(m for family in doubt.torch for m in family.modules))
    flax = _paths(_columns(m for family in doubt.flax for m in family.modules))
    found: list[Candidate] = []
    for said, chosen in doubt.options:
        rules: list[str] = []
        where: list[str] = []
        for scope, pair in chosen:
            link = main_link(pair)
            rules.append(column_rule(scope, link, min(link.labels, key=_usual), sides))
            where += _paths([link.flax if turned else link.torch])
        found.append(Candidate(", ".join(rules), tuple(where), said))
    names = ", ".join(fold_names(torch if turned else flax)[:4])
    targets, sources = (torch, flax) if turned else (flax, torch)
    return Question("match", f"{names}: {doubt.why}", targets, sources, tuple(found))


def _paths(columns: Iterable[Column]) -> tuple[str, ...]:
    return tuple(path for column in columns for paths in column.paths.values() for path in paths)


def _columns(modules: Iterable[Module]) -> list[Column]:
    return [column for module in modules for column in module.roles.values() if column.role != "counter"]


def _readings(item: Settled, sides: tuple[str, str], turned: bool) -> list[Question]:
    out: list[Question] = []
    stacks: dict[tuple[Label, ...], list[tuple[Pair, Link]]] = {}
    orders: dict[int, list[tuple[Pair, Link, Choice]]] = {}
    for pair, link, choice in open_links(item):
        if choice.kind == "order":
            orders.setdefault(id(pair), []).append((pair, link, choice))
            continue
        if choice.kind == "stack":
            stacks.setdefault(choice.open, []).append((pair, link))
            continue
        out.append(_reading(item.scope, [(pair, link)], choice, sides, turned))
    out += [_order(item.scope, found, sides, turned) for found in orders.values()]
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
        ways = [*order_keys(pair, link, label, choice.parts), {}] if choice.parts else [{}]
        for more in ways if choice.trap is not None else ():
            assert choice.trap is not None
            for rule in flatten_rules(scope, link, label, choice.trap, sides, more):
                where = _paths([link.flax if turned else link.torch])
                found.append(Candidate(rule, where, "the values are a flattened map (C, H, W)"))
        labels = [known for known in sorted(link.labels) if known == label or (not label[1] and known[0] == label[0])]
        for known, more in product(labels[:2], ways):
            rule = column_rule(scope, link, known, sides, open_=True, asked=True, more=more)
            where = f"it is stacked on axis {', '.join(map(str, known[0]))}" if known[0] else _layout(known, rule)
            where += f", and its parts change places ({choice.parts})" if more else ""
            found.append(Candidate(rule, _paths([link.flax if turned else link.torch]), where))
    what = "stack axes" if choice.kind == "stack" else "layouts"
    names = ", ".join(fold_names(torch if turned else flax)[:4])
    if choice.trap is not None:
        text = (
            f"{names}: its width is {choice.trap.size}; if "
            f"{_FLOWS[choice.trap.out]}, its values must be reordered from (C, H, W), or from any other "
            f"order that torch uses, such as {_other_order(choice.trap)}"
        )
        return Question("flatten", text, torch if turned else flax, flax if turned else torch, tuple(found))
    text = f"{names}: the shape fits {len(found)} {what}, and nothing tells which is right"
    return Question(choice.kind, text, torch if turned else flax, flax if turned else torch, tuple(found))


def _order(scope: Scope, leaves: Sequence[tuple[Pair, Link, Choice]], sides: tuple[str, str], turned: bool) -> Question:
    """The leaves of one fused module whose two names list its parts in different orders."""
    torch, flax = _paths(link.torch for _, link, _ in leaves), _paths(link.flax for _, link, _ in leaves)
    parts = leaves[0][2].parts
    ways: list[list[str]] = []
    for pair, link, choice in leaves:
        ways.append([
            column_rule(scope, link, choice.open[0], sides, asked=True, more=more)
            for more in (*order_keys(pair, link, choice.open[0], parts), {})
        ])  # fmt: skip
    where = flax if turned else torch
    says = [f"its parts change places ({parts})"] * (len(ways[0]) - 1) + ["its parts lie in one order"]
    found = [Candidate(", ".join(lines), where, said) for *lines, said in zip(*ways, says, strict=True)]
    names = ", ".join(fold_names(torch if turned else flax)[:4])
    text = f"{names}: the two names list its parts in different orders ({parts}), and no file shows whether they lie so"
    return Question("order", text, torch if turned else flax, where, tuple(found))


def _layout(label: Label, rule: str) -> str:
    """The layout of a candidate, in the word that its rule line states."""
    stated = "conv_transpose" if label[1] == "conv" and 'layout = "conv_transpose"' in rule else label[1]
    return f"the layout is {stated}"


_FORMS = {"block": "the parts lie one after the other", "interleaved": "the parts lie head by head"}


_FLOWS = {False: "a flattened convolution map feeds it", True: "its outputs become a convolution's map"}


def _other_order(trap: Suspect) -> str:
    """What a rule says if torch permutes the map first."""
    channels, height, width = trap.maps()[0]
    return "(w h c)" if trap.vector or trap.raw is not None else f'flatten = "W={width} H={height} C={channels}"'


def _groups(item: Settled, sides: tuple[str, str], turned: bool) -> list[Question]:
    out: list[Question] = []
    for group in item.groups:
        links = [link for link in group.links if not link.known]
        if not links:
            continue
        # The question offers lines for one leaf; the answer settles the other leaves of the group.
        left = _paths(column for link in links for column in link.torch)
        right = _paths(column for link in links for column in link.flax)
        found: list[Candidate] = []
        for variant in links[0].variants:
            rule = group_rule(item.scope, links[0], variant, sides)
            found.append(Candidate(rule, right if turned else left, _FORMS.get(variant, f"the layout is {variant}")))
        targets, sources = (left, right) if turned else (right, left)
        text = f"{', '.join(fold_names(targets)[:3])}: nothing tells how the parts lie in the fused tensor"
        out.append(Question("fused", text, targets, sources, tuple(found)))
    return out


def _matches(result: Result, sides: tuple[str, str], turned: bool, missing: Collection[str]) -> list[Question]:
    clusters: list[Cluster] = []
    for item in result.settled:
        open_ = item.board.pairs()
        if missing:
            ends = [(pair, main_link(pair)) for pair in open_]
            open_ = [pair for pair, link in ends if not set(missing).issuperset(_paths([_like(link, turned)]))]
        for torch, flax, found in components(open_):
            clusters.append(Cluster(item, torch, flax, list(found.values())))
        _axes(item, result.habits)
    out: list[Question] = []
    for asked in arranged(clusters):
        if asked.pairings:
            out.append(_joint(asked, result, sides, turned))
        else:
            out += [_single(cluster, module, result, sides, turned) for cluster in asked.clusters
                    for module in (cluster.torch if turned else cluster.flax)]  # fmt: skip
    return out


def _joint(asked: Asked, result: Result, sides: tuple[str, str], turned: bool) -> Question:
    """All clusters in one question: every candidate is a complete pairing."""
    homes = {id(pair): cluster for cluster in asked.clusters for pair in cluster.pairs}
    options: dict[int, list[tuple[str, str]]] = {}
    names = _short_names(asked.pairings)
    found: list[Candidate] = []
    for pairing in asked.pairings:
        for pair in pairing:
            if id(pair) not in options:
                options[id(pair)] = _options(pair, homes[id(pair)].item, result, sides)
        where = _paths(main_link(pair).flax if turned else main_link(pair).torch for pair in pairing)
        for chosen in _ways([options[id(pair)] for pair in pairing]):
            rule = ", ".join(dict.fromkeys(rule for rule, _ in chosen))
            layouts = [said for _, said in chosen]
            alone = names if len(pairing) > 1 else None
            found.append(Candidate(rule, where, _says(pairing, layouts, alone)))
    left = _paths(_columns(m for cluster in asked.clusters for m in cluster.torch))
    right = _paths(_columns(m for cluster in asked.clusters for m in cluster.flax))
    targets, sources = (left, right) if turned else (right, left)
    wanted = [m for cluster in asked.clusters for m in (cluster.torch if turned else cluster.flax)]
    return Question("match", f"{_named(wanted)}: {_doubts(found, asked.pairings)}", targets, sources, tuple(found))


def _single(cluster: Cluster, module: Module, result: Result, sides: tuple[str, str], turned: bool) -> Question:
    """One module of like, with every module that fits it."""
    mine = [pair for pair in cluster.pairs if (pair.torch if turned else pair.flax) is module]
    mine.sort(key=lambda p: (bool(p.blocked), -p.total))
    found: list[Candidate] = []
    for pair in mine:
        where = _paths([main_link(pair).flax if turned else main_link(pair).torch])
        for rule, said in _options(pair, cluster.item, result, sides):
            found.append(Candidate(rule, where, _says([pair], [said])))
    targets = _paths(_columns([module]))
    sources = _paths(_columns(pair.flax if turned else pair.torch for pair in mine))
    text = f"{_named([module])}: {_doubts(found, [(pair,) for pair in mine])}"
    return Question("match", text, targets, sources, tuple(found))


def _named(modules: Iterable[Module]) -> str:
    names = fold_names(_paths([main_column(module) for module in modules]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _doubts(found: Sequence[Candidate], pairings: Sequence[Sequence[Pair]]) -> str:
    if len(pairings) > 1:
        return f"{len(found)} candidates fit, and names and structure do not tell which is right"
    several = f" in {len(found)} layouts" if len(found) > 1 else ""
    fits, what = ("candidate", "shape matches") if len(pairings[0]) == 1 else ("pairing", "shapes match")
    return f"one {fits} fits{several}, and only the {what}"


def _says(pairing: Sequence[Pair], layouts: Sequence[str], names: Mapping[int, str] | None = None) -> str:
    """The evidence for a pairing or, if `names` is given, how it differs from the other pairings (`names`: of the
    modules that differ)."""
    said = [text for text in dict.fromkeys(layouts) if text]
    if names is None:
        (pair,) = pairing
        joined = ", but " if pair.shared else ", and "
        why = pair.says if pair.shared else "only the shape matches"
        return "; ".join([f"{why}{joined}{pair.blocked}" if pair.blocked else why, *said])
    ends = [f"{names[id(p.torch)]} with {names[id(p.flax)]}" for p in pairing if id(p.torch) in names]
    return "; ".join([f"it pairs {', '.join(ends)}", *said] if ends else said or ["the shapes match"])


def _short_names(pairings: Sequence[Sequence[Pair]]) -> dict[int, str]:
    """Short names of the modules that pairings pair differently: as many last words as tell each from the others."""
    partners: defaultdict[int, set[int]] = defaultdict(set)
    modules: tuple[dict[int, Module], dict[int, Module]] = ({}, {})
    for pair in (pair for pairing in pairings for pair in pairing):
        partners[id(pair.torch)].add(id(pair.flax))
        partners[id(pair.flax)].add(id(pair.torch))
        modules[0][id(pair.torch)], modules[1][id(pair.flax)] = pair.torch, pair.flax
    moving = {key for key, others in partners.items() if len(others) > 1}
    moving |= {other for key in moving for other in partners[key]}
    out: dict[int, str] = {}
    for found in modules:
        paths = {key: _words(module) for key, module in found.items() if key in moving}
        longest = max(map(len, paths.values()), default=0)
        for key, words in paths.items():
            told = (n for n in range(1, longest) if sum(w[-n:] == words[-n:] for w in paths.values()) == 1)
            out[key] = ".".join(words[-next(told, longest) :])
    return out


def _words(module: Module) -> list[str]:
    found = [str(token) for token in (*module.outer, *module.tokens) if not isinstance(token, tuple)]
    return found or [main_column(module).leaf]


_WAYS = 6  # how many layouts of one pairing are offered


def _ways(options: Sequence[Sequence[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """One option for each pair. If several pairs have the same options, they share one choice."""
    kinds = list(dict.fromkeys(tuple(said for _, said in found) for found in options if len(found) > 1))
    out: list[list[tuple[str, str]]] = []
    for picks in islice(product(*(range(len(kind)) for kind in kinds)), _WAYS):
        at = dict(zip(kinds, picks, strict=True))
        out.append([found[at.get(tuple(said for _, said in found), 0)] for found in options])
    return out


def _axes(item: Settled, habits: Habits) -> None:
    """Set the stack axis of open pairs: the axis of the settled leaves of the scope, else the one that fits them
    all."""
    open_ = item.board.pairs()
    known = [habits.axes[id(link)] for pair in item.taken for link in pair.links if id(link) in habits.axes]
    settled = {choice.label[0]: choice for choice in known if choice.label is not None}
    if len(settled) != 1:
        stack_axes(item.scope, open_, habits)
        return
    ((axes, choice),) = settled.items()
    for pair in open_:
        for link in pair.links:
            if any(label[0] == axes for label in link.labels):
                habits.axes[id(link)] = choice


def _options(pair: Pair, item: Settled, result: Result, sides: tuple[str, str]) -> list[tuple[str, str]]:
    """(rule line, the layout that it states) for every reading that an open pair may have; the layout is empty if there
    is only one reading."""
    link, scope = main_link(pair), item.scope
    choice = choose(link, pair, scope, result.habits)
    trap = result.traps.get(id(pair.torch))
    if trap is not None:
        choice = trapped(link, choice, trap)
    labels = [choice.label] if choice.label is not None else _known(choice, link)
    out: list[tuple[str, str]] = []
    for label in labels:
        said = None if choice.trap is not None and not label[0] else label  # a next question asks for the order
        rule = column_rule(scope, link, said, sides, open_=choice.label is None)
        axis = f"it is stacked on axis {', '.join(map(str, label[0]))}" if choice.kind == "stack" and label[0] else ""
        layout = _layout(label, rule) if label[1] else ""
        way = "; ".join(filter(None, (axis, layout)))
        out.append((rule, way if choice.label is None and said is not None else ""))
    return list(dict(out).items())


def _known(choice: Choice, link: Link) -> list[Label]:
    """The labels between which nothing decides."""
    out: list[Label] = []
    for label in choice.open:
        fits = [known for known in sorted(link.labels) if known == label or (not label[1] and known[0] == label[0])]
        out += fits if label[1] or len(fits) < 2 else [min(fits, key=_usual)]
    return (out or [min(link.labels, key=_usual)])[:_WAYS]


def _like(link: Link, turned: bool) -> Column:
    return link.torch if turned else link.flax


def main_link(pair: Pair) -> Link:
    """The link of the leaf that represents the module: its weight, if it has one."""
    main = main_column(pair.torch)
    return next((link for link in pair.links if link.torch is main), pair.links[0])


def _usual(label: Label) -> tuple[int, Label]:
    """A sort key: the field's convention comes first."""
    order = ("linear", "conv", "identity", "reshape")
    return (order.index(label[1]) if label[1] in order else 9, label)
