"""Leaves that may be exchanged: the models agree either way, on every redraw, so that nothing decides between them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown
from graftax.probe.search import Found

SECONDS = 1.0
"""For the runs that try it."""


def interchangeable(
    found: Found, unknowns: Sequence[Unknown], record: Record, holds: Callable[[Found], bool]
) -> list[tuple[str, str]]:
    """Pairs of leaves that hold each other's tensors as well. holds: do the models agree with these choices, on every
    redraw?"""
    stop = time.monotonic() + SECONDS
    out: dict[tuple[str, str], None] = {}
    for a, b in _pairs(found, unknowns, record):
        names = unknowns[a].path, unknowns[b].path
        if names[0] == names[1] or names in out:
            continue
        if time.monotonic() > stop:
            break
        swapped = {**found.choices, a: found.choices[b], b: found.choices[a]}
        if holds(replace(found, choices=swapped)):
            out[names] = None
    return list(out)


def _pairs(found: Found, unknowns: Sequence[Unknown], record: Record) -> Iterator[tuple[int, int]]:
    """Decided unknowns of one shape that one event decided, or whose tensors the source used with one value."""
    for chosen in found.events.values():
        yield from _alike(chosen, unknowns)
    holders: dict[int, list[int]] = {}
    for n, choice in found.choices.items():
        if len(choice.sources) == 1:
            holders.setdefault(choice.sources[0], []).append(n)
    for sources in record.twins.values():
        alike = [n for source in sources for n in holders.get(source, ())]
        if len(alike) <= 8:
            yield from _alike(alike, unknowns)


def _alike(some: Sequence[int], unknowns: Sequence[Unknown]) -> Iterator[tuple[int, int]]:
    for a, b in itertools.combinations(some, 2):
        if unknowns[a].shape == unknowns[b].shape:
            yield a, b
