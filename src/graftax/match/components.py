"""Things in groups that share nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def components(things: Sequence[T], marks: Callable[[T], Iterable[object]]) -> list[list[T]]:
    """The things in groups: those of one group share marks, those of two groups share none. Both keep their order."""
    parent: dict[object, object] = {}

    def root(mark: object) -> object:
        while parent.setdefault(mark, mark) is not mark:
            parent[mark] = mark = parent[parent[mark]]
        return mark

    for thing in things:
        first, *others = marks(thing)
        for mark in others:
            parent[root(mark)] = root(first)
    groups: defaultdict[object, list[T]] = defaultdict(list)
    for thing in things:
        groups[root(next(iter(marks(thing))))].append(thing)
    return list(groups.values())
