"""Tied weights: one tensor under several names. Values are read only where names are left over; that is recorded."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from graftax.ops import same_bits
from graftax.tree import Checkpoint, TensorSpec

Reads = list[str]
_MANY = 64  # tensors of one shape beyond which they are layers or experts, not names of one weight


def _sizes(specs: Mapping[str, TensorSpec]) -> Counter[int]:
    out: Counter[int] = Counter()
    for shape, count in Counter([spec.shape for spec in specs.values()]).items():
        out[math.prod(shape)] += count
    return out


def constant(array: Any) -> bool:
    """Every element is the same: zeros, ones. Such tensors are equal without being tied."""
    flat = array.reshape(-1)
    return flat.size == 0 or bool((flat.view("u1").reshape(flat.size, -1) == flat[:1].view("u1").reshape(1, -1)).all())


def find_ties(
    source: Checkpoint, paths: Iterable[str], wanted: Mapping[str, TensorSpec], reads: Reads
) -> dict[str, tuple[str, ...]]:
    """first name -> all names, for tensors among `paths` that are bit for bit one and not constant. Only shapes of
    which the source has more than `wanted` are looked at."""
    specs = source.specs
    sizes, have = _sizes(wanted), _sizes(specs)
    more = {size for size, count in have.items() if count > sizes[size] and size > 1}
    if not more:
        return {}
    paths = [path for path in paths if specs[path].size in more]
    groups: defaultdict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for path in paths:
        spec = specs[path]
        if len(spec.shape) >= 2 and spec.kind in "fc" and not spec.packed:  # no parameter is made of whole numbers
            groups[(spec.shape, spec.dtype)].append(path)
    out: dict[str, tuple[str, ...]] = {}
    for (shape, _), names in groups.items():
        if len(names) < 2 or len(names) > _MANY:
            continue
        out |= _equal(source, names, reads, f"shape {list(shape)}")
    return out | _beside(source, paths, out, sizes, have, reads)


def _beside(
    source: Checkpoint,
    paths: list[str],
    ties: Mapping[str, tuple[str, ...]],
    sizes: Counter[int],
    have: Counter[int],
    reads: Reads,
) -> dict[str, tuple[str, ...]]:
    """The other leaves of a module whose weight is tied (a decoder's bias), each with the one leaf that equals it."""
    owners = {name.rpartition(".")[0] for names in ties.values() for name in names}
    tied = {name for names in ties.values() for name in names}
    out: dict[str, tuple[str, ...]] = {}
    for name in paths:
        spec = source[name]
        if name in tied or name.rpartition(".")[0] not in owners or have[spec.size] <= sizes[spec.size]:
            continue
        others = [other for other in paths if other != name and other not in tied and source[other] == spec]
        equal = [other for other in others if tied_to(source, name, [other], reads) is not None]
        if len(equal) == 1:
            # The free name stands first: the tied module's own leaf is the alias.
            out[equal[0]] = (equal[0], name)
            tied |= {equal[0], name}
    return out


def _equal(source: Checkpoint, names: list[str], reads: Reads, what: str) -> dict[str, tuple[str, ...]]:
    stored = {name: source.aliases.get(name, name) for name in names}
    classes: list[tuple[Any, list[str]]] = []
    if source.has_values:
        reads.append(f"{len(names)} tensors of {what}, to tell tied ones: {', '.join(names[:4])}")
        for name in names:
            array = source.read(name)
            for first, members in classes:
                if same_bits(first, array):
                    members.append(name)
                    break
            else:
                classes.append((array, [name]))
    else:
        by_store: defaultdict[str, list[str]] = defaultdict(list)
        for name, store in stored.items():
            by_store[store].append(name)
        classes = [(None, members) for members in by_store.values()]
    return {
        members[0]: tuple(members)
        for first, members in classes
        if len(members) > 1 and (first is None or not constant(first))
    }


def tied_to(source: Checkpoint, name: str, others: Iterable[str], reads: Reads) -> str | None:
    """The one of `others` that `name` is bit for bit equal to."""
    if not source.has_values:
        store = source.aliases.get(name, name)
        return next((other for other in others if source.aliases.get(other, other) == store), None)
    near = [other for other in others if source[other] == source[name]]
    if not near:
        return None
    array = source.read(name)
    for other in near:
        if same_bits(array, source.read(other)):
            reads.append(f"{name} and {other}, bit for bit equal")
            return other
    return None
