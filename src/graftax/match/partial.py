"""Rules for a part of a column, such as one instance of a block.

The other instances stay matched as without the rule. If the rule contradicts inference, the rest of the column is asked
about, and the form of the rule is the first candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from graftax.errors import GraftaxError
from graftax.match.assign import Board
from graftax.match.choose import Choice
from graftax.match.pairs import Link, Pair
from graftax.match.sides import Column, Key, Module, paths_of
from graftax.ops import Op, apply_chain
from graftax.plans import Entry

_SAID = 2.0  # what a rule for another instance adds to a pair's score, so that it is offered first
_ELEMENTS = 1 << 24  # the readings of larger tensors are not compared

Chains = Mapping[str, tuple[Op, ...]]


def ruled_chains(entries: Iterable[Entry], anchors: Mapping[str, str], turned: bool) -> Chains:
    """torch leaf -> the ops of its rule, torch -> Flax, for rules of one leaf on each side. `turned`: the entries run
    Flax -> torch, and nothing is returned."""
    if turned:
        return {}
    alone = (entry for entry in entries if len(entry.sources) == len(entry.targets) == 1)
    return {entry.sources[0]: entry.ops for entry in alone if entry.sources[0] in anchors}


def anchored(column: Column, flax: Mapping[str, Module], anchors: Mapping[str, str]) -> str | None:
    """A leaf of the column that rules settle, if they settle the whole column of one of the sides."""
    spoken = paths_of([column])
    path = next((p for p in spoken if p in anchors), None)
    if path is None or all(p in anchors for p in spoken):
        return path
    other = flax.get(anchors[path])
    partners = [paths_of([c]) for c in other.roles.values()] if other else []
    wanted = set(anchors.values())
    return path if any(anchors[path] in paths and wanted.issuperset(paths) for paths in partners) else None


def reopened(taken: list[Pair], board: Board, pairs: list[Pair], keys: Mapping[Key, Key],
             anchors: Mapping[str, str], forced: list[Pair]) -> tuple[list[Pair], Board]:  # fmt: skip
    """The taken and the open pairs without those that a rule contradicts for some instance: these are open again, and
    the pair that the rule states scores higher."""
    back = {path: other for other, path in anchors.items()}
    free = [pair for pair in taken if not any(pair is other for other in forced)]
    against = [pair for pair in free if any(_against(link, keys, anchors, back) for link in pair.links)]
    if not against:
        return taken, board
    kept = [pair for pair in taken if not any(pair is other for other in against)]
    done = {id(module) for pair in kept for module in (pair.torch, pair.flax)}
    for pair in pairs:
        if any(_with(link, keys, anchors) for link in pair.links):
            pair.bonus += _SAID
            pair.findings = ()
    return kept, Board(pair for pair in pairs if id(pair.torch) not in done and id(pair.flax) not in done)


def _ends(link: Link, keys: Mapping[Key, Key]) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    for key, paths in link.torch.paths.items():
        other = link.flax.paths.get(keys[key]) if key in keys else None
        if other is not None:
            yield paths, other


def _against(link: Link, keys: Mapping[Key, Key], anchors: Mapping[str, str], back: Mapping[str, str]) -> bool:
    return any(
        any(anchors.get(path, others[0]) not in others for path in paths)
        or any(back.get(other, paths[0]) not in paths for other in others)
        for paths, others in _ends(link, keys)
    )


def _with(link: Link, keys: Mapping[Key, Key], anchors: Mapping[str, str]) -> bool:
    return any(anchors.get(path) in others for paths, others in _ends(link, keys) for path in paths)


def as_ruled(link: Link, choice: Choice, chains: Chains) -> Choice:
    """The choice for a column. It is open if a rule for one of its instances reads that instance in another way."""
    if choice.label is None and choice.kind != "layout":
        return choice
    for key, paths in link.torch.paths.items():
        ops = chains.get(paths[0]) if len(paths) == 1 else None
        if ops is None or len(link.labels) < 2:
            continue
        said = [label for label in sorted(link.labels) if _same(link, label, link.torch.shapes[key], ops)]
        if choice.label is None:
            rest = [label for label in choice.open if label not in said]
            return replace(choice, open=(*said[:1], *rest))
        if said and choice.label not in said:
            return Choice(None, "", (said[0], choice.label))
    return choice


def _same(link: Link, label: object, shape: tuple[int, ...], ops: tuple[Op, ...]) -> bool:
    """True if the ops of the label and these ops move every element of such a tensor to the same place."""
    import numpy as np

    if math.prod(shape) > _ELEMENTS:
        return False
    marked = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    for (known, source, _), chain in link.chains.items():
        if known == label and source == shape:
            try:
                one, other = apply_chain(chain, (marked,)), apply_chain(ops, (marked,))
            except GraftaxError:
                return False
            return len(one) == len(other) == 1 and np.array_equal(one[0], other[0])
    return False


def consistent(entries: Iterable[Entry], settled: Iterable[Entry], named: Iterable[Entry] = ()) -> list[Entry]:
    """The entries that touch no leaf of the settled entries. `named`: entries of rules that state only what belongs
    together; an entry for the same leaves (tied names may join them) is kept."""
    pairings = {entry.targets: set(entry.sources) for entry in named}
    sources: set[str] = set()
    targets: set[str] = set()
    for entry in settled:
        sources.update(entry.sources)
        targets.update(entry.targets)
    return [
        e
        for e in entries
        if (sources.isdisjoint(e.sources) and targets.isdisjoint(e.targets))
        or (e.targets in pairings and pairings[e.targets] <= set(e.sources))
    ]
