"""Cut a target into tiles that fit a budget, with runs on disk as long as possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from graftax.execute.pushdown import Box, push
from graftax.ops import Op
from graftax.tree import TensorSpec

SHORT = 2 << 10
"""Bytes. A tile that is one run of the target is written past the page cache. This gains more than longer source runs
do, if source runs have at least this length: after the first tile they come from the cache."""

Edges = tuple[tuple[int, int], ...]


def box_steps(
    ops: tuple[Op, ...],
    specs: tuple[TensorSpec, ...],
    index: int,
    spec: TensorSpec,
    most: int,
    contiguous: bool,
    origin: Sequence[int] | None = None,
    rows: bool = True,
) -> list[int]:
    """The length of a tile on every axis, for tiles of `most` bytes. The tiles cover a target, or a box of it with the
    extents of `spec` at `origin`.

    Each step halves the axis that leaves the longest runs in the sources. If the tile goes to disk, the runs in the
    target count too (`rows`: a tile is rows of one run at even distances, ideally a single run). contiguous: halve
    leading axes first. NotLocal as `push`.
    """
    width = spec.bits // 8
    steps = list(spec.shape)
    start = [0] * len(steps) if origin is None else origin
    while math.prod(steps) * width > most and any(step > 1 for step in steps):
        lead = next(axis for axis, step in enumerate(steps) if step > 1)
        if contiguous:
            steps[lead] = -(-steps[lead] // 2)
            continue
        best: tuple[bool, int, int] | None = None
        for axis in range(len(steps)):
            tried = [*steps[:axis], -(-steps[axis] // 2), *steps[axis + 1 :]]
            if steps[axis] == 1 or (rows and not _even_rows(tried, spec.shape)):
                continue
            score = source_run(ops, specs, index, [(s, s + step) for s, step in zip(start, tried, strict=True)])
            straight = False
            if rows:
                target = _target_run(tried, spec.shape)
                straight = target == math.prod(tried) and score * width >= SHORT
                score = min(score, target)
            if best is None or (straight, score) > best[:2]:
                best = (straight, score, axis)
        axis = lead if best is None else best[2]
        steps[axis] = -(-steps[axis] // 2)
    return steps


def grid(edges: Box, steps: Sequence[int]) -> Iterator[Edges]:
    """The tiles of these lengths that cover a box, in C order."""
    return product(
        *(
            [(i, min(i + step, stop)) for i in range(start, stop, step)]
            for (start, stop), step in zip(edges, steps, strict=True)
        )
    )


def source_run(ops: tuple[Op, ...], specs: tuple[TensorSpec, ...], index: int, box: Box) -> int:
    """The shortest run of source elements that a box of a target needs."""
    found = 1 << 62
    for piece in push(ops, specs, index, box):
        for leaf in piece.leaves():
            run = 1
            for stride, extent in sorted(zip(map(abs, leaf.strides), piece.extents, strict=True)):
                if stride != run:
                    break
                run *= extent
            found = min(found, run)
    return found


def _target_run(steps: list[int], shape: tuple[int, ...]) -> int:
    run = 1
    for step, extent in zip(reversed(steps), reversed(shape), strict=True):
        run *= step
        if step != extent:
            break
    return run


def _even_rows(steps: list[int], shape: tuple[int, ...]) -> bool:
    """True if at most one axis before a tile's run has more than one index."""
    axis = len(steps)
    while axis and (axis == len(steps) or steps[axis] == shape[axis]):
        axis -= 1
    return sum(step > 1 for step in steps[:axis]) <= 1
