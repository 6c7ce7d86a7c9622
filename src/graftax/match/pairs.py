"""Pairs of modules that could be one: whether every leaf has a reading, what the names say, what forbids it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from graftax.match.layouts import Facts, Readings, axis_choices, readings, stacked
from graftax.match.names import Lexicon, Name, concepts, contradicts, name_of, strip_common
from graftax.match.sides import Column, Key, Module
from graftax.ops import Op, Unstack

Label = tuple[tuple[int, ...], str]
"""(axes of the stacked numbers, reading)"""


@dataclass(slots=True, eq=False)
class Link:
    """One leaf of a pair: both columns and the readings that fit every instance."""

    torch: Column
    flax: Column
    labels: frozenset[Label]
    chains: dict[tuple[Label, tuple[int, ...], tuple[int, ...]], tuple[Op, ...]]


@dataclass(slots=True, eq=False)
class Pair:
    """A torch module and a Flax module that fit. `score`: how alike the names are, 0..1; `blocked`: why it may not be
    taken although it fits; `whole`: same roles, same instances."""

    torch: Module
    flax: Module
    links: list[Link]
    whole: bool
    score: float = 0.0
    shared: tuple[str, ...] = ()
    telling: float = 0.0
    any_shared: float = 0.0
    blocked: str = ""
    soft: bool = False
    equal: bool = False
    why: str = ""
    bonus: float = 0.0

    @property
    def total(self) -> float:
        return self.score + self.bonus


@dataclass(slots=True, eq=False)
class Scope:
    """What is matched together: the modules of two paired families and which instance goes with which."""

    torch: list[Module]
    flax: list[Module]
    keys: list[tuple[Key, Key]]
    root: bool
    same: bool
    lex: Lexicon
    label: str = ""
    torch_names: dict[int, Name] = field(default_factory=dict[int, Name])
    flax_names: dict[int, Name] = field(default_factory=dict[int, Name])
    wrappers: frozenset[str] = frozenset()
    common: frozenset[str] = frozenset()

    def name(self, module: Module, torch: bool) -> Name:
        cache = self.torch_names if torch else self.flax_names
        found = cache.get(id(module))
        if found is None:
            found = cache[id(module)] = name_of(module.tokens, module.outer, self.lex)
        return found


def candidates(scope: Scope) -> list[Pair]:
    """Every pair of the scope that fits by roles and shapes."""
    by_size: defaultdict[int, dict[int, Module]] = defaultdict(dict)
    for module in scope.flax:
        for size in _main_sizes(module):
            by_size[size][id(module)] = module
    to_flax = dict(scope.keys)
    out: list[Pair] = []
    _learn_common(scope)
    ranks_t, ranks_f = number_ranks(scope.torch, scope, True), number_ranks(scope.flax, scope, False)
    for module in scope.torch:
        near: dict[int, Module] = {}
        for size in _main_sizes(module):
            near |= by_size.get(size, {})
        for other in near.values():
            pair = fit(module, other, to_flax, scope.same)
            if pair is not None:
                judge(pair, scope, ranks_t.get(id(module), ()), ranks_f.get(id(other), ()))
                out.append(pair)
    return out


def _learn_common(scope: Scope) -> None:
    names_t = [scope.name(m, True).concepts for m in scope.torch]
    names_f = [scope.name(m, False).concepts for m in scope.flax]
    scope.common = strip_common(names_t) | strip_common(names_f) | scope.wrappers


_MAIN = ("weight", "value", "v", "bias", "mean", "var", "g")


def _main(module: Module) -> Column:
    for role in _MAIN:
        if role in module.roles:
            return module.roles[role]
    return next(iter(module.roles.values()))


def _main_sizes(module: Module) -> set[int]:
    column = _main(module)
    factor = 1
    for n in column.stack:
        factor *= n
    out: set[int] = set()
    for shape in set(column.shapes.values()):
        size = factor
        for n in shape:
            size *= n
        out.add(size)
    return out


def wrapper_words(modules: Sequence[Module], others: Sequence[Module], lex: Lexicon) -> frozenset[str]:
    """First words that half of a side's modules bear and the other side knows nowhere: a model inside a wrapper."""
    known = {concept for module in others for concept in concepts((*module.outer, *module.tokens), lex)}
    counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for module in modules:
        path = (*module.outer, *module.tokens)
        counts[concepts(path[:1], lex)] += 1
    often = [first for first, count in counts.items() if 2 * count >= len(modules)]
    return frozenset(concept for first in often for concept in first if concept not in known)


# ---------------------------------------------------------------- fit

_TWINS = {"value": ("weight", "bias"), "weight": ("value",), "bias": ("value",)}


def fit(torch: Module, flax: Module, to_flax: dict[Key, Key], same: bool) -> Pair | None:
    """The pair, if every role that both have has a reading over all shared instances."""
    links: list[Link] = []
    used: set[str] = set()
    whole = True
    for role, column in torch.roles.items():
        if role == "counter":
            continue
        other = flax.roles.get(role)
        twin = role
        if other is None:
            for name in _TWINS.get(role, ()):
                if name in flax.roles and name not in torch.roles and (len(torch.roles) == 1 or role == "weight"):
                    other, twin = flax.roles[name], name
                    break
        if other is None:
            whole = False
            continue
        link, full = _link(role, column, other, to_flax, same)
        if link is None:
            return None
        used.add(twin)
        links.append(link)
        whole = whole and full
    if not links or _main(torch) not in [link.torch for link in links]:
        return None
    if not _deconv_backed(links):
        return None
    whole = whole and used == {role for role in flax.roles if role != "counter"}
    return Pair(torch, flax, links, whole)


def _deconv_backed(links: list[Link]) -> bool:
    """Where only the flipped reading of a transposed convolution fits, a bias must not say that it is none."""
    for link in links:
        if {label for _, label in link.labels} == {"conv_transpose"}:
            bias = next((other.torch for other in links if other.torch.role == "bias"), None)
            if bias is not None:
                return all(
                    bias.shapes[key] == shape[1:2] for key, shape in link.torch.shapes.items() if key in bias.shapes
                )
    return True


def _link(role: str, torch: Column, flax: Column, to_flax: dict[Key, Key], same: bool) -> tuple[Link | None, bool]:
    facts = Facts(role if role != "value" else "weight", torch.kind, flax.kind, same)
    shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    met = 0
    for key, shape in torch.shapes.items():
        other = to_flax.get(key)
        if other is not None:
            target = flax.shapes.get(other)
            if target is not None:
                met += 1
                shapes.add((shape, target))
    if not met:
        return None, False
    labels: set[Label] | None = None
    chains: dict[tuple[Label, tuple[int, ...], tuple[int, ...]], tuple[Op, ...]] = {}
    for source, target in shapes:
        found = _readings(source, target, torch.stack, flax.stack, facts)
        for label, chain in found.items():
            chains[(label, source, target)] = chain
        labels = set(found) if labels is None else labels & set(found)
        if not labels:
            return None, False
    full = met == len(torch.shapes) == len(flax.shapes)
    return Link(torch, flax, frozenset(labels or ()), chains), full


def _readings(
    source: tuple[int, ...],
    target: tuple[int, ...],
    stack_t: tuple[int, ...],
    stack_f: tuple[int, ...],
    facts: Facts,
) -> dict[Label, tuple[Op, ...]]:
    if not stack_t and not stack_f:
        return {((), label): chain for label, chain in readings(source, target, facts).items()}
    out: dict[Label, tuple[Op, ...]] = {}
    if stack_t and not stack_f:
        for axes in axis_choices(len(stack_t), len(target)):
            for label, chain in stacked(source, target, stack_t, axes, facts).items():
                out[(axes, label)] = chain
    elif stack_f and not stack_t and len(stack_f) == 1:
        for (axis,) in axis_choices(1, len(source)):
            place = axis if axis >= 0 else len(source) + axis
            if source[place] != stack_f[0]:
                continue
            inner = source[:place] + source[place + 1 :]
            found: Readings = readings(inner, target, facts)
            for label, chain in found.items():
                out[((axis,), label)] = (Unstack(place, stack_f[0]), *chain)
    return out


# ---------------------------------------------------------------- names


def number_ranks(modules: Sequence[Module], scope: Scope, torch: bool) -> dict[int, tuple[tuple[str, int, int], ...]]:
    """For each module the numbers of its name as (what is numbered, rank, how many): the siblings at one place of the
    tree are numbered together, so that 1, 2 and 0, 1 and 0, 3 say the same."""
    groups: defaultdict[tuple[object, ...], set[int]] = defaultdict(set)
    for module in modules:
        for i, token in enumerate(module.tokens):
            if isinstance(token, int):
                groups[module.tokens[:i]].add(token)
    orders = {prefix: sorted(values) for prefix, values in groups.items() if len(values) > 1}
    out: dict[int, tuple[tuple[str, int, int], ...]] = {}
    for module in modules:
        found: list[tuple[str, int, int]] = []
        for i, token in enumerate(module.tokens):
            order = orders.get(module.tokens[:i]) if isinstance(token, int) else None
            if order is not None:
                words = [t for t in module.tokens[:i] if isinstance(t, str)]
                last = scope.lex.synonyms.get(words[-1], (words[-1],)) if words else ("",)
                found.append((" ".join(last), order.index(token), len(order)))  # type: ignore[arg-type]
        if found:
            out[id(module)] = tuple(found)
    return out


def judge(
    pair: Pair, scope: Scope, ranks_t: Iterable[tuple[str, int, int]], ranks_f: Iterable[tuple[str, int, int]]
) -> None:
    """Score the names of the pair, and find what forbids it. A tied tensor is judged by the best of its names."""
    flax = scope.name(pair.flax, False)
    _judge(pair, scope, scope.name(pair.torch, True), flax, ranks_t, ranks_f)
    for tokens in pair.torch.alias:
        other = Pair(pair.torch, pair.flax, pair.links, pair.whole)
        _judge(other, scope, name_of(tokens, (), scope.lex), flax, (), ranks_f)
        if (not other.blocked, other.score) > (not pair.blocked, pair.score):
            pair.score, pair.shared, pair.telling = other.score, other.shared, other.telling
            pair.any_shared, pair.blocked, pair.soft = other.any_shared, other.blocked, other.soft


def _judge(
    pair: Pair,
    scope: Scope,
    a: Name,
    b: Name,
    ranks_t: Iterable[tuple[str, int, int]],
    ranks_f: Iterable[tuple[str, int, int]],
) -> None:
    lex, common = scope.lex, scope.common
    shared = telling = 0.0
    only_a = only_b = loose_a = loose_b = 0.0
    said: list[tuple[float, str]] = []
    for concept in a.concepts:
        weight = 0.02 if concept in common else lex.weight(concept)
        if concept in b.concepts:
            shared += weight
            said.append((weight, concept))
            telling += weight if weight >= 1 else 0
        else:
            only_a += weight
            loose_a += weight if weight >= 1 else 0
    for concept in b.concepts:
        if concept not in a.concepts:
            weight = 0.02 if concept in common else lex.weight(concept)
            only_b += weight
            loose_b += weight if weight >= 1 else 0
    blocked = contradicts(a.concepts - common, b.concepts - common, lex)
    for what, rank, count in ranks_t:
        for other, place, total in ranks_f:
            if what == other and count == total:
                if rank == place:
                    shared += 0.6
                    said.append((0.6, f"{what} {rank + 1} of {count}".strip()))
                else:
                    blocked = blocked or f"{what} {rank + 1} against {place + 1} of {count}"
    pair.score = shared / (shared + 0.5 * (only_a + only_b) + 0.1)
    pair.equal = a.raw == b.raw
    pair.score += 0.3 if pair.equal else 0.0
    pair.telling, pair.any_shared = telling, shared
    if not blocked and loose_a and loose_b and not telling:
        pair.soft = True
        blocked = "each name says something that the other does not"
    if not blocked and not _deconv_named(pair, a.concepts | b.concepts):
        blocked = "only a transposed convolution fits, and neither name says so"
    pair.blocked = blocked
    said.sort(reverse=True)
    pair.shared = tuple(concept for _, concept in said[:4])


_DECONV = frozenset(("deconv", "transpose", "transposed", "up", "upsample", "dec", "ups", "gen", "generator"))


def _deconv_named(pair: Pair, names: frozenset[str]) -> bool:
    for link in pair.links:
        if {label for _, label in link.labels} == {"conv_transpose"}:
            return bool(names & _DECONV) or any(other.torch.role == "bias" for other in pair.links)
    return True
