"""Check, tile by tile, what an entry assumes about its values, including values that no target holds.

An op in `ops.CONDITIONS` is valid only for some values, and checks whole tensors when it is applied. This module runs
the same check on tiles of the op's inputs, and reads only the source bytes that each tile needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graftax.errors import PlanError
from graftax.execute.fill_tile import Values, fill_tile
from graftax.execute.memory import allocate
from graftax.execute.pushdown import push
from graftax.execute.tiling import Edges, box_steps, grid
from graftax.ops import CONDITIONS, Op, infer_chain
from graftax.ops.checked_ops import Crop, RequireZero, Same, Unrepeat
from graftax.tree import TensorSpec
from graftax.tree.dtypes import numpy_dtype

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Region:
    """A box of an op's input tensors that the op checks together. `judge` gives the op that checks tiles of these
    extents. On `axis`, a tile has a multiple of `grain` rows."""

    tensors: tuple[int, ...]
    box: Edges
    judge: Callable[[tuple[int, ...]], Op]
    axis: int = 0
    grain: int = 1


def check_conditions(
    ops: tuple[Op, ...], specs: tuple[TensorSpec, ...], sources: Sequence[Values], scratch: Array, most: int
) -> None:
    """Check the conditions that the ops place on values, with tiles of `most` bytes in total.

    PlanError if a condition does not hold; NotLocal if the check needs whole tensors.
    """
    for place, op in enumerate(ops):
        if isinstance(op, CONDITIONS):
            for region in _regions(op, infer_chain(ops[:place], specs)):
                _check(op, region, ops[:place], specs, sources, scratch, most)


def _check(
    op: Op,
    region: _Region,
    before: tuple[Op, ...],
    specs: tuple[TensorSpec, ...],
    sources: Sequence[Values],
    scratch: Array,
    most: int,
) -> None:
    extents = [stop - start for start, stop in region.box]
    if 0 in extents:
        return
    spec = infer_chain(before, specs)[region.tensors[0]]
    dtype = numpy_dtype(spec.dtype)
    extents[region.axis : region.axis + 1] = [n // region.grain for n in extents[region.axis : region.axis + 1]]
    share = most // len(region.tensors) // region.grain
    origin = [start for start, _ in region.box]
    cut = TensorSpec(tuple(extents), spec.dtype)
    steps = box_steps(before, specs, region.tensors[0], cut, share, contiguous=False, origin=origin, rows=False)
    steps[region.axis : region.axis + 1] = [n * region.grain for n in steps[region.axis : region.axis + 1]]
    rooms = [allocate(math.prod(steps) * dtype.itemsize).view(dtype) for _ in region.tensors]
    for tile in grid(region.box, steps):
        shape = tuple(stop - start for start, stop in tile)
        made: list[Array] = []
        for tensor, room in zip(region.tensors, rooms, strict=True):
            flat = room[: math.prod(shape)]
            fill_tile(flat, push(before, specs, tensor, tile), sources, scratch)
            made.append(flat.reshape(shape))
        judge = region.judge(shape)
        try:
            judge.apply(tuple(made))
        except PlanError as error:
            raise PlanError(str(error).replace(judge.text, op.text), error.failures) from None


# ---------------------------------------------------------------- the regions each op checks


def _regions(op: Op, specs: tuple[TensorSpec, ...]) -> Iterator[_Region]:
    yield from _TABLE[type(op)](op, specs)


def _whole(spec: TensorSpec) -> Edges:
    return tuple((0, n) for n in spec.shape)


def _rows(spec: TensorSpec, axis: int, start: int, stop: int) -> Edges:
    return tuple((start, stop) if a == axis else (0, n) for a, n in enumerate(spec.shape))


def _same(op: Same, specs: tuple[TensorSpec, ...]) -> Iterator[_Region]:
    for other in range(1, op.count):
        yield _Region((0, other), _whole(specs[0]), lambda shape: Same(2))


def _unrepeat(op: Unrepeat, specs: tuple[TensorSpec, ...]) -> Iterator[_Region]:
    for i, spec in enumerate(specs):
        yield _Region((i,), _whole(spec), lambda shape: op, op.axis, op.count)


def _crop(op: Crop, specs: tuple[TensorSpec, ...]) -> Iterator[_Region]:
    for i, spec in enumerate(specs):
        end = spec.shape[op.axis]
        for start, stop in ((0, op.before), (end - op.after, end)):
            yield _Region(
                (i,),
                _rows(spec, op.axis, start, stop),
                lambda shape: Crop(op.axis, shape[op.axis], 0, op.fill),
            )


def _require_zero(op: RequireZero, specs: tuple[TensorSpec, ...]) -> Iterator[_Region]:
    box = _rows(specs[op.index], op.axis, op.start, op.stop)
    yield _Region((op.index,), box, lambda shape: replace(op, index=0, start=0, stop=shape[op.axis]))


_TABLE: dict[type[Any], Callable[[Any, tuple[TensorSpec, ...]], Iterator[_Region]]] = {
    Same: _same,
    Unrepeat: _unrepeat,
    Crop: _crop,
    RequireZero: _require_zero,
}
"""op -> the regions of its input tensors that it checks"""
assert set(_TABLE) == set(CONDITIONS)
