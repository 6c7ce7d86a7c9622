"""Layers that one side numbers consecutively and the other keeps in cycles: 48 layers as 12 stacked cycles of 4."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from graftax.match.numbers import NUMBER
from graftax.match.sides import Family

Renames = dict[str, str]


def cycle_options(families: Iterable[Family], paths: Iterable[str], others: Iterable[str]) -> Iterator[Renames]:
    """Ways to read the number of each family as two numbers, as maps from a path to the path to read instead. Every
    length of a cycle that some number of the other side's paths has is tried, once as (place in the cycle, cycle) and
    once as (stage, layer)."""
    lengths = _counts(others)
    names = list(paths)
    for family in families:
        count = len(family.keys)
        places = [i for i, token in enumerate(family.prefix) if not isinstance(token, str)]
        if len(family.keys[0]) != 1 or len(places) != 1 or count < 4:
            continue
        rank = {key[0]: n for n, key in enumerate(family.keys)}
        held = {p for m in family.modules for c in m.roles.values() for group in c.paths.values() for p in group}
        for length in sorted(lengths):
            if not 1 < length < count or count % length:
                continue
            for stages in (False, True):
                per = count // length
                two = {n: ((r // per, r % per) if stages else (r % length, r // length)) for n, r in rank.items()}
                yield {name: _renamed(name, two) for name in names if name in held}


def _renamed(path: str, two: Mapping[int, tuple[int, int]]) -> str:
    found = NUMBER.search(path)
    if found is None:
        return path
    place, cycle = two[int(found[0])]
    return f"{path[: found.start()]}{place}.{cycle}{path[found.end() :]}"


def _counts(paths: Iterable[str]) -> set[int]:
    """The counts of distinct values that numbers of the paths take."""
    values: defaultdict[str, set[int]] = defaultdict(set)
    for path in paths:
        for found in NUMBER.finditer(path):
            values[path[: found.start()]].add(int(found[0]))
    return {len(found) for found in values.values()}
