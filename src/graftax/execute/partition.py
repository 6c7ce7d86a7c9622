"""Divide the work on one checkpoint among several processes: pure arithmetic, with the same result in all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graftax.execute.loop_nests import NotLocal
from graftax.execute.tiling import source_run
from graftax.plans import Entry
from graftax.tree import TensorSpec

Part = tuple[int, int]
"""Tiles `start` to `stop` of a target."""


def divide_tiles(groups: Iterable[Mapping[str, Sequence[int]]], count: int) -> list[dict[str, Part]]:
    """For each of `count` processes: target -> the tiles that it makes. Each process gets about the same number of
    bytes, in one stretch. A group is: target -> the bytes of its tiles. One process makes all of a group with several
    targets; a group with one target may be cut between tiles."""
    listed = list(groups)
    total = sum(sum(sizes) for group in listed for sizes in group.values())
    out: list[dict[str, Part]] = [{} for _ in range(count)]
    done = 0
    for group in listed:
        if len(group) > 1:
            nbytes = sum(sum(sizes) for sizes in group.values())
            out[_owner(done, nbytes, total, count)].update({name: (0, len(sizes)) for name, sizes in group.items()})
            done += nbytes
            continue
        for name, sizes in group.items():
            for number, nbytes in enumerate(sizes):
                mine = out[_owner(done, nbytes, total, count)]
                mine[name] = (mine.get(name, (number, 0))[0], number + 1)
                done += nbytes
    return out


def divide_whole(sizes: Sequence[int], count: int) -> list[int]:
    """The process of each file: the largest file comes first, and each goes to the process with the fewest bytes."""
    load = [0] * count
    owners = [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[place] = min(range(count), key=lambda i: load[i])
        load[owners[place]] += sizes[place]
    return owners


def _owner(done: int, nbytes: int, total: int, count: int) -> int:
    """The process whose stretch contains the middle of these bytes."""
    return min(count - 1, (2 * done + nbytes) * count // max(2 * total, 1))


def parts_per_axis(shape: tuple[int, ...], count: int, order: Sequence[int]) -> list[int]:
    """The number of equal parts to cut each axis into, at most `count` parts in total. The first axes of `order` are
    cut as often as possible."""
    out = [1] * len(shape)
    left = count
    for axis in order:
        out[axis] = math.gcd(shape[axis], left) if shape[axis] else 1
        left //= out[axis]
    return out


def best_order(entry: Entry, target: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> list[int]:
    """The axes of a target. The axis comes first that, cut in two, leaves the longest runs in the sources of the
    entry."""
    sources = tuple(specs[name] for name in entry.sources)
    index = entry.targets.index(target)

    def run(axis: int) -> int:
        box = [(0, -(-n // 2) if i == axis else n) for i, n in enumerate(shape)]
        try:
            return source_run(entry.ops, sources, index, box)
        except NotLocal:
            return 0

    return sorted(range(len(shape)), key=run, reverse=True) if all(shape) else list(range(len(shape)))


def spread_sharding(shape: tuple[int, ...], devices: Sequence[Any], order: Sequence[int]) -> Any:
    """A sharding of an array of this shape over all devices. Its axes are cut into as many parts as possible, in
    `order`; the remaining devices hold copies."""
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    parts = parts_per_axis(shape, len(devices), order)
    names = [f"axis_{axis}" for axis in range(len(shape))]
    grid = np.asarray(devices, dtype=object).reshape(*parts, len(devices) // math.prod(parts))
    return NamedSharding(Mesh(grid, (*names, "copies")), PartitionSpec(*names))


def sum_counts(counts: Iterable[Any]) -> Any:
    """The sum of counts of one form. Whole numbers are added, other numbers give the largest, booleans hold if all
    hold, and lists are summed item by item."""
    return _joined(list(counts), sum)


def subtract_counts(after: Any, before: Any) -> Any:
    """What was added to `before` (None: nothing) to reach `after`."""
    return after if before is None else _joined([after, before], lambda pair: pair[0] - pair[1])


def _joined(items: list[Any], number: Any) -> Any:
    if isinstance(items[0], list):
        return [_joined(list(parts), number) for parts in zip(*items, strict=True)]
    if isinstance(items[0], bool):
        return all(items)
    return max(items) if isinstance(items[0], float) else number(items)
