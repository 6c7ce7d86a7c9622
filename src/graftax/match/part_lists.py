"""Lists of parts against lists of blocks: `attns.{i}` and `mlps.{i}` beside `layers_{i}/attn` and `layers_{i}/mlp`.

Lists with the same numbers are read as one list of blocks if each block has the size of the other side's. A flat list
(`layers.{2*i}` with attention, `layers.{2*i+1}` without) is such lists one after the other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from graftax.match.blocks import View
from graftax.match.cutting import Cut, Cuts, Key, Tokens
from graftax.match.pairs import Scope
from graftax.match.sides import Family, Module, columns_of

_MOST = 4  # parts of a block that one flat list holds one after the other


def merged(families: Sequence[Family], cuts: Cuts) -> list[Family]:
    """The families of a side, with the lists of parts that the cuts name as one list of blocks."""
    groups: defaultdict[tuple[Key, ...], list[Family]] = defaultdict(list)
    for family in families:
        if family.prefix and cuts.get(family.prefix[:-1]) == Cut("parts"):
            groups[tuple(family.keys)].append(family)
    joined = {id(family) for some in groups.values() if len(some) > 1 for family in some}
    out = [family for family in families if id(family) not in joined]
    return out + [_joined(some) for some in groups.values() if len(some) > 1]


def _joined(lists: Sequence[Family]) -> Family:
    paths = [family.prefix[:-1] for family in lists]
    depth = next((n for n, level in enumerate(zip(*paths, strict=False)) if len(set(level)) > 1), min(map(len, paths)))
    modules = [_within(family, module, depth) for family in lists for module in family.modules]
    sizes = [sum(sizes) for sizes in zip(*(family.sizes for family in lists), strict=True)]
    prefix = (*paths[0][:depth], (0,))
    return Family(prefix, lists[0].keys, modules, sizes, [family.prefix for family in lists])


def _within(family: Family, module: Module, depth: int) -> Module:
    """The module with the words of its list as the first part of its path."""
    words = family.prefix[depth:-1]
    cuts = tuple(at + len(words) for at in (0, *module.cuts) if at + len(words))
    own = len(words) + module.own if len(family.modules) > 1 else 0
    return replace(module, tokens=(*words, *module.tokens), cuts=cuts, own=own)


def part_lists(now: View, n: int) -> Iterator[Cuts]:
    """Cuts of side `n` that read lists of parts as blocks which the other side holds and which are not whole yet."""
    mine, theirs = (now.flax, now.torch) if n else (now.torch, now.flax)
    scopes = [(scope.torch, scope.flax)[1 - n] for scope in now.scopes if not scope.root and not _whole(scope)]
    uneven = {id(module) for modules in scopes for module in modules}
    wanted = [f for f in theirs[1:] if any(f is other for other in now.lost[1 - n]) or id(f.modules[0]) in uneven]
    lists = _lists(mine) if wanted else {}
    for other in wanted:
        groups: defaultdict[tuple[int, ...], list[Tokens]] = defaultdict(list)
        for prefix, found in lists.items():
            groups[tuple(found)].append(prefix)
            count, odd = divmod(len(found), len(other.keys))
            runs = list(found.values())
            sums = [sum(runs[i : i + count]) for i in range(0, len(runs), max(count, 1))]
            if not odd and 1 < count <= _MOST and sums == other.sizes:
                parts = {(*prefix, place): Cut("parts") for place in range(count)}
                yield {**_named([prefix]), prefix: Cut("cycle", (len(other.keys),) * count), **parts}
        for keys, group in groups.items():
            for start in dict.fromkeys([(), *(prefix[:1] for prefix in group)]) if len(keys) == len(other.keys) else ():
                some = [
                    p for p in group if p[: len(start)] == start and not any(p[:at] in group for at in range(len(p)))
                ]
                if len(some) > 1 and [sum(lists[p][key] for p in some) for key in keys] == other.sizes:
                    yield {**_named(some), **dict.fromkeys(some, Cut("parts"))}


def _named(prefixes: Iterable[Tokens]) -> Cuts:
    """Cuts for the numbers within these paths: they are names."""
    return {p[:at]: Cut("names") for p in prefixes for at, token in enumerate(p) if isinstance(token, int)}


def _whole(scope: Scope) -> bool:
    """True if both sides have as many elements."""
    sizes = [sum(c.size * len(c.paths) for c in columns_of(side)) for side in (scope.torch, scope.flax)]
    return sizes[0] == sizes[1]


def _lists(families: Sequence[Family]) -> dict[Tokens, dict[int, int]]:
    """The size of every numbered part, by the path of its list, with every number as it is."""
    out: defaultdict[Tokens, Counter[int]] = defaultdict(Counter)
    for module in (module for family in families for module in family.modules):
        sizes: Counter[Key] = Counter()
        for column in columns_of([module]):
            sizes.update({key: math.prod(shape) for key, shape in column.shapes.items()})
        for key, size in sizes.items():
            numbers = iter(key)
            path = [next(numbers) if isinstance(token, tuple) else token for token in (*module.outer, *module.tokens)]
            for at, token in enumerate(path):
                if isinstance(token, int):
                    out[tuple(path[:at])][token] += size
    return {prefix: dict(sorted(found.items())) for prefix, found in out.items()}
