"""Candidate pairs of modules: every leaf has a reading over all shared instances."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import product

from graftax.layers.patterns import FLIPPED
from graftax.layers.readings import LeafKinds, axis_choices, named, stacked
from graftax.match.choose import says_transposed, words_of
from graftax.match.evidence import judge
from graftax.match.idioms import refined
from graftax.match.kinds import UNKNOWN, Kinds
from graftax.match.pairs import Label, Link, Pair, Scope
from graftax.match.scope_names import learn_common, learn_places, main_column, name_final_norm, number_ranks
from graftax.match.sides import Column, Key, Module
from graftax.ops import Op, Unstack


def candidates(scope: Scope, kinds: Kinds = UNKNOWN, numbers: bool = True) -> list[Pair]:
    """Every pair of the scope that fits by roles, shapes and live kinds. `numbers`: True if numbers in names count as
    evidence."""
    scope.numbers = numbers
    by_size: defaultdict[int, dict[int, Module]] = defaultdict(dict)
    for module in scope.flax:
        for size in _sizes(module.roles.values()):
            by_size[size][id(module)] = module
    to_flax = dict(scope.keys)
    out: list[Pair] = []
    learn_common(scope)
    for modules, experts in zip((scope.torch, scope.flax), scope.experts, strict=True):
        refined(modules, scope.names, scope.lex, experts, scope.root)
    if scope.root and scope.lex.synonyms:
        name_final_norm(scope)
    learn_places(scope)
    ranks_t = number_ranks(scope.torch, scope) if numbers else {}
    ranks_f = number_ranks(scope.flax, scope) if numbers else {}
    for module in scope.torch:
        near: dict[int, Module] = {}
        main = main_column(module)
        for size in (*_sizes([main]), *(_grouped_sizes(main) if says_transposed(words_of(module)) else ())):
            near |= by_size.get(size, {})
        for other in near.values():
            pair = fit(module, other, to_flax, scope.same, kinds)
            if pair is not None:
                judge(pair, scope, ranks_t.get(id(module), ()), ranks_f.get(id(other), ()))
                out.append(pair)
    done = {id(module) for pair in out for module in (pair.torch, pair.flax)}
    left, right = (
        [m for m in modules if id(m) not in done and _is_vocabulary(scope.name(m).concepts)]
        for modules in (scope.torch, scope.flax)
    )
    for module, other in product(left, right if not scope.same else ()):
        if (pair := fit(module, other, to_flax, False, rows=True)) is not None:
            judge(pair, scope, ranks_t.get(id(module), ()), ranks_f.get(id(other), ()))
            out.append(pair)
    return out


def _is_vocabulary(words: frozenset[str]) -> bool:
    return bool(words & {"tok", "embed", "head"}) and words.isdisjoint(("pos", "patch", "seg", "attn"))


def _sizes(columns: Iterable[Column]) -> set[int]:
    return {math.prod(shape) * math.prod(c.stack) for c in columns for shape in set(c.shapes.values())}


def _grouped_sizes(column: Column) -> set[int]:
    """The sizes that a transposed convolution in groups may have with all its outputs."""
    shapes = {shape for shape in column.shapes.values() if 3 <= len(shape) <= 5}
    return {math.prod(s) * n for s in shapes if column.kind == "free" for n in range(2, s[0] + 1) if s[0] % n == 0}


_TWINS = {"value": ("weight", "bias"), "weight": ("value",), "bias": ("value",)}


def fit(
    torch: Module, flax: Module, to_flax: dict[Key, Key], same: bool, kinds: Kinds = UNKNOWN, rows: bool = False
) -> Pair | None:
    """The pair, if every role that both modules have has a reading over all shared instances. `rows`: names say that
    both are a vocabulary, which one side may pad."""
    links: list[Link] = []
    used: set[str] = set()
    whole = True
    for role, column in torch.roles.items():
        other = flax.roles.get(role)
        if role == "counter" and other is None:
            continue
        twin = role
        if other is None:
            for name in _TWINS.get(role, ()):
                if name in flax.roles and name not in torch.roles and (len(torch.roles) == 1 or role == "weight"):
                    other, twin = flax.roles[name], name
                    break
        if other is None:
            whole = False
            continue
        link, full = _link(role, column, other, to_flax, same, rows)
        if link is not None and not same:
            kinds.tell((torch, flax), link, to_flax)
        if link is None or not link.labels:
            return None
        used.add(twin)
        links.append(link)
        whole = whole and full
    if not links or main_column(torch) not in [link.torch for link in links]:
        return None
    if not _deconv_backed(links):
        return None
    whole = whole and used >= {role for role in flax.roles if role != "counter"}
    return Pair(torch, flax, links, whole)


def _deconv_backed(links: list[Link]) -> bool:
    """False if only one reading of a transposed convolution fits but the bias shows that it is not one."""
    outputs = {FLIPPED: -1, "conv_transpose": -2}
    bias = next((other.flax for other in links if other.torch.role == "bias"), None)
    if bias is None:
        return True
    for link in links:
        labels = {label for _, label in link.labels}
        if len(labels) == 1 and labels <= outputs.keys() and not link.told:
            axis = outputs[labels.pop()]
            shapes = ((bias.shapes.get(key), (shape[axis],)) for key, shape in link.flax.shapes.items())
            return all(found in (None, wanted) for found, wanted in shapes)
    return True


def _link(
    role: str, torch: Column, flax: Column, to_flax: dict[Key, Key], same: bool, rows: bool
) -> tuple[Link | None, bool]:
    kinds = LeafKinds(role if role != "value" else "weight", torch.kind, flax.kind, same, rows)
    shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    met = 0
    one, other_one = set(torch.shapes.values()), set(flax.shapes.values())
    if len(one) == len(other_one) == 1 and len(torch.shapes) == len(flax.shapes) == len(to_flax):
        met = len(to_flax)
        shapes.add((one.pop(), other_one.pop()))
    else:
        for key, shape in torch.shapes.items():
            other = to_flax.get(key)
            target = flax.shapes.get(other) if other is not None else None
            if target is not None:
                met += 1
                shapes.add((shape, target))
    if not met:
        return None, False
    labels: set[Label] | None = None
    chains: dict[tuple[Label, tuple[int, ...], tuple[int, ...]], tuple[Op, ...]] = {}
    for source, target in shapes:
        found = _readings(source, target, torch.stack, flax.stack, kinds)
        for label, chain in found.items():
            chains[(label, source, target)] = chain
        labels = set(found) if labels is None else labels & set(found)
    full = met == len(torch.shapes) == len(flax.shapes)
    return Link(torch, flax, frozenset(labels or ()), chains), full


def _readings(
    source: tuple[int, ...],
    target: tuple[int, ...],
    stack_t: tuple[int, ...],
    stack_f: tuple[int, ...],
    kinds: LeafKinds,
) -> dict[Label, tuple[Op, ...]]:
    if not stack_t and not stack_f:
        return {((), label): chain for label, chain in named(source, target, kinds).items()}
    out: dict[Label, tuple[Op, ...]] = {}
    if stack_t and not stack_f:
        for axes in axis_choices(len(stack_t), len(target)):
            for label, chain in stacked(source, target, stack_t, axes, kinds).items():
                out[(axes, label)] = chain
    elif stack_f and not stack_t and len(stack_f) == 1:
        for (axis,) in axis_choices(1, len(source)):
            place = axis if axis >= 0 else len(source) + axis
            if source[place] != stack_f[0]:
                continue
            inner = source[:place] + source[place + 1 :]
            for label, chain in named(inner, target, kinds).items():
                out[((axis,), label)] = (Unstack(place, stack_f[0]), *chain)
    return out
