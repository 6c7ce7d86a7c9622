"""Tensors that torch computes from parameters alone, and that graftax can compute too: a sum, a weight norm, a weight
over its spectral norm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from graftax.ops import FoldWeightNorm
from graftax.probe.record import Record

OPS = frozenset(("add", "mul", "div", "_weight_norm_interface", "_weight_norm"))
"""Ops of torch that may end in such a tensor."""


def derived(record: Record, op: str, first: int | None, sources: Collection[int], out: Any) -> int | None:
    """The source of an array that this op made of these sources alone; None if graftax cannot compute it. first: the
    op's first operand, if it is a source."""
    if any(record.sources[source].rows is not None for source in sources):
        return None
    items = [record.sources[source] for source in sorted(sources)]
    if op == "div" and len(items) == 3 and first is not None:
        return _spectral(record, first, sources, out)
    if op == "add" and len(items) == 2 and all(item.array.shape == out.shape for item in items):
        total = items[0].array + items[1].array
        return record.derived("sum", sorted(sources), total) if np.allclose(total, out) else None
    if len(items) == 2 and {item.array.ndim for item in items} == {out.ndim}:
        orders = sorted(sources), sorted(sources, reverse=True)
        return next((found for g, v in orders if (found := _folded(record, g, v, out)) is not None), None)
    return None


def _spectral(record: Record, weight: int, sources: Collection[int], out: Any) -> int | None:
    """W / (u W v), with W as a matrix of one axis and the rest."""
    w = record.sources[weight].array
    u, v = (source for source in sources if source != weight)
    for one, other in ((u, v), (v, u)):
        left, right = record.sources[one].array, record.sources[other].array
        for axis in range(min(w.ndim, 2)):
            matrix = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
            fits = (*left.shape, *right.shape) == matrix.shape and w.shape == out.shape
            if fits and np.allclose(w / (left @ matrix @ right), out):
                return record.derived("spectral_norm", (weight, one, other), out)
    return None


def _folded(record: Record, g: int, v: int, out: Any) -> int | None:
    scale, weight = record.sources[g].array, record.sources[v].array
    axes = [axis for axis in range(weight.ndim) if scale.shape == _kept(weight.shape, axis)]
    for axis in axes if weight.shape == out.shape else ():
        if np.allclose(FoldWeightNorm(axis).apply((scale, weight))[0], out):
            return record.derived(f"weight_norm {axis}", (g, v), out)
    return None


def _kept(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(size if a == axis else 1 for a, size in enumerate(shape))
