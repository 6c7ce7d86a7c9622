"""A target straight into the shards of a jax.Array: each process reads what its own devices need, each byte once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graftax.dtypes import numpy_dtype
from graftax.execute import strided
from graftax.execute.gather import Evaluate, Values, fill
from graftax.execute.memory import allocate
from graftax.execute.pushdown import Box, push
from graftax.execute.tiling import Edges, box_steps, grid, source_run
from graftax.ops import Op
from graftax.tree import TensorSpec

Array = np.ndarray[Any, Any]

LONG_RUN = 64 << 10
"""Bytes: shorter runs of the source, wanted by several shards, are read once for all of them."""
_TILE = 32 << 20


def sharding_boxes(shape: tuple[int, ...], sharding: Any) -> dict[Edges, list[Any]]:
    """What the devices of this process hold of an array: box -> its devices (several where it is replicated).

    ValueError as jax gives it, where the shape cannot be divided so.
    """
    out: dict[Edges, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        edges = tuple(
            (part.start or 0, extent if part.stop is None else part.stop)
            for part, extent in zip(index, shape, strict=True)
        )
        out.setdefault(edges, []).append(device)
    return out


def assemble(shape: tuple[int, ...], sharding: Any, parts: dict[Edges, Array]) -> Any:
    """The jax.Array whose local shards are `parts`. Their memory may become the array's: it is not written again."""
    import jax

    shards: list[Any] = []
    for edges, devices in sharding_boxes(shape, sharding).items():
        shards += jax.device_put([parts[edges]] * len(devices), devices)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def fill_boxes(
    ops: tuple[Op, ...],
    specs: tuple[TensorSpec, ...],
    index: int,
    spec: TensorSpec,
    boxes: list[Edges],
    sources: list[Values],
    scratch: Array,
    evaluate: Evaluate,
) -> dict[Edges, Array]:
    """Every box of a target, each in aligned memory of its own. NotLocal where an op needs whole tensors."""
    dtype = numpy_dtype(spec.dtype)
    out = {box: allocate(_count(box) * dtype.itemsize).view(dtype) for box in boxes}
    stored = any(not values.in_memory for values in sources)
    torn = (
        stored
        and len(boxes) > 1
        and spec.size > 0
        and any(source_run(ops, specs, index, box) * dtype.itemsize < min(LONG_RUN, spec.nbytes) for box in boxes)
    )
    if torn:
        _scatter(ops, specs, index, spec, out, sources, scratch, evaluate)
    else:
        for box, flat in out.items():
            fill(flat, push(ops, specs, index, box), sources, scratch, evaluate)
    return {box: flat.reshape([stop - start for start, stop in box]) for box, flat in out.items()}


def _scatter(
    ops: tuple[Op, ...],
    specs: tuple[TensorSpec, ...],
    index: int,
    spec: TensorSpec,
    out: dict[Edges, Array],
    sources: list[Values],
    scratch: Array,
    evaluate: Evaluate,
) -> None:
    """Tiles with long runs in the source, each cut up into the boxes that want a part of it."""
    union = [(min(box[a][0] for box in out), max(box[a][1] for box in out)) for a in range(len(spec.shape))]
    whole = TensorSpec(tuple(stop - start for start, stop in union), spec.dtype)
    origin = [start for start, _ in union]
    steps = box_steps(ops, specs, index, whole, _TILE, contiguous=False, origin=origin, rows=False)
    dtype = numpy_dtype(spec.dtype)
    room = allocate(math.prod(steps) * dtype.itemsize).view(dtype)
    for tile in grid(union, steps):
        wanted = [(box, common) for box in out if (common := _common(tile, box)) is not None]
        if not wanted:
            continue
        flat = room[: _count(tile)]
        fill(flat, push(ops, specs, index, tile), sources, scratch, evaluate)
        made = flat.reshape([stop - start for start, stop in tile])
        for box, common in wanted:
            shaped = out[box].reshape([stop - start for start, stop in box])
            strided.copy(shaped[_within(common, box)], made[_within(common, tile)])


def _common(a: Box, b: Box) -> Edges | None:
    both = tuple((max(x, u), min(y, v)) for (x, y), (u, v) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(x - u, y - u) for (x, y), (u, _) in zip(inner, outer, strict=True))


def _count(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
