"""Find the source values that a slice of a target needs, by pushing the slice back through the ops.

A slice is a loop nest: extents, and for each axis of the tensor one affine expression of the loop counters. An index op
changes the expressions on the way back; it splits a loop where a merged axis wraps, and cuts a loop at the border of a
concat. At the sources the slice has become a list of pieces. Each piece is a strided copy, with value ops on top:
out[offset + loops . strides] = source[offset + loops . strides]. Pieces do not overlap, and together they cover the
slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftax.execute.loop_nests import MOST_PIECES, Affine, Nest, NotLocal, active, divided, plus, times, zones
from graftax.ops import Op, infer_chain
from graftax.ops.checked_ops import Copy, Crop, Pad, Repeat, RequireZero, Same, Unrepeat
from graftax.ops.edge_ops import Fill
from graftax.ops.index_ops import Concat, Flip, Reorder, Split, Stack, Unstack
from graftax.ops.rearrange import Rearrange, parse_pattern
from graftax.ops.rearrange_each import RearrangeEach
from graftax.ops.replace_op import Replace
from graftax.ops.value_ops import Cast, Offset, Scale, Sum, Unsum
from graftax.tree import TensorSpec

Box = Sequence[tuple[int, int]]
"""[start, stop) on every axis of a tensor."""


@dataclass(frozen=True, slots=True)
class SourceView:
    """A strided view of one source: `offset`, and one stride for each loop, in the source's C order."""

    source: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Const:
    """One value everywhere."""

    value: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Apply:
    """A value op applied to its arguments element by element; `output` is the index of its output."""

    op: Op
    args: tuple[Value, ...]


Value = SourceView | Const | Apply


@dataclass(frozen=True, slots=True)
class TilePiece:
    """out[offset + loops . strides] = value, for all loop counters below `extents`. Counts elements, not bytes."""

    extents: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    value: Value

    @property
    def count(self) -> int:
        return math.prod(self.extents)

    def leaves(self) -> Iterator[SourceView]:
        yield from _leaves(self.value)


def _leaves(value: Value) -> Iterator[SourceView]:
    if isinstance(value, SourceView):
        yield value
    elif isinstance(value, Apply):
        for arg in value.args:
            yield from _leaves(arg)


# ---------------------------------------------------------------- pushing back


def push(
    ops: Sequence[Op],
    sources: Sequence[TensorSpec],
    target: int,
    box: Box,
    most: int = MOST_PIECES,
    within: Box | None = None,
) -> list[TilePiece]:
    """The pieces that make `box` of the chain's output `target`. They fill a C-contiguous tile of the box's extents;
    with `within`, a larger box, they fill their place in a tile of `within`.

    This function does not check the conditions of checked ops (repeated rows, dropped padding, ties). Raises NotLocal
    if an op needs whole tensors (norms), or if the slice splits into more than `most` pieces.
    """
    extents = tuple(stop - start for start, stop in box)
    outer = box if within is None else within
    strides = [1] * len(extents)
    for i in range(len(extents) - 2, -1, -1):
        strides[i] = strides[i + 1] * (outer[i + 1][1] - outer[i + 1][0])
    offset = sum((start - first) * step for (start, _), (first, _), step in zip(box, outer, strides, strict=True))
    axes = tuple(
        Affine(start, tuple(int(i == axis) for i in range(len(extents)))) for axis, (start, _) in enumerate(box)
    )
    if 0 in extents:
        return []
    walk = _Push(tuple(ops), tuple(sources), most)
    return [_coalesced(piece) for piece in walk.back(len(ops), target, Nest(extents, offset, tuple(strides), axes))]


class _Push:
    """One push: the specs along the chain, and the number of pieces that remain."""

    __slots__ = ("left", "ops", "specs")

    def __init__(self, ops: tuple[Op, ...], sources: tuple[TensorSpec, ...], most: int) -> None:
        self.ops = ops
        self.specs = [sources]
        for op in ops:
            self.specs.append(infer_chain((op,), self.specs[-1]))
        self.left = most

    def back(self, place: int, tensor: int, nest: Nest) -> Iterator[TilePiece]:
        """The pieces of `nest`, which selects from output `tensor` of the first `place` ops."""
        if place == 0:
            self.left -= 1
            if self.left < 0:
                raise NotLocal("too many pieces")
            yield _at_source(tensor, self.specs[0][tensor], nest)
            return
        op, before = self.ops[place - 1], self.specs[place - 1]
        if isinstance(op, Fill) or (isinstance(op, Unsum) and _term(op, tensor)[1]):
            value = op.value if isinstance(op, Fill) else 0.0
            yield TilePiece(nest.extents, nest.offset, nest.strides, Const(value, self.specs[place][tensor].dtype))
        elif isinstance(op, Replace) and op.local and not op.reads:
            value = Apply(op, (Const(0.0, op.dtype),))  # gives the extents; nothing is read
            yield TilePiece(nest.extents, nest.offset, nest.strides, value)
        elif isinstance(op, (Cast, Scale, Offset)) or (isinstance(op, Replace) and op.local):
            for piece in self.back(place - 1, tensor, nest):
                yield replace(piece, value=Apply(op, (piece.value,)))
        elif isinstance(op, Sum):
            yield self._sum(op, place, tensor, nest)
        elif isinstance(op, Pad):
            yield from self._pad(op, place, tensor, nest)
        elif (step := _STEPS.get(type(op))) is not None:
            for at, selection in step(op, before, tensor, nest):
                yield from self.back(place - 1, at, selection)
        else:
            raise NotLocal(f"{op.text} needs whole tensors")

    def _sum(self, op: Sum, place: int, tensor: int, nest: Nest) -> TilePiece:
        found = [list(self.back(place - 1, term, nest)) for term in op.groups[tensor]]
        first = found[0][0]
        layouts = {(p.extents, p.offset, p.strides) for pieces in found for p in pieces}
        if any(len(pieces) != 1 for pieces in found) or len(layouts) != 1:
            raise NotLocal(f"{op.text} of tensors that were moved apart")
        if len(found) == 1:
            return first
        alone = Sum((tuple(range(len(found))),))
        return replace(first, value=Apply(alone, tuple(pieces[0].value for pieces in found)))

    def _pad(self, op: Pad, place: int, tensor: int, nest: Nest) -> Iterator[TilePiece]:
        spec = self.specs[place - 1][tensor]
        for zone, part in zones(nest, op.axis, (op.before, spec.shape[op.axis], op.after)):
            if zone == 1:
                e = part.axes[op.axis]
                yield from self.back(place - 1, tensor, part.with_axis(op.axis, Affine(e.base - op.before, e.by)))
            else:
                yield TilePiece(part.extents, part.offset, part.strides, Const(op.fill, spec.dtype))


def _at_source(tensor: int, spec: TensorSpec, nest: Nest) -> TilePiece:
    step, offset = 1, 0
    strides = [0] * len(nest.extents)
    for e, extent in zip(reversed(nest.axes), reversed(spec.shape), strict=True):
        offset += e.base * step
        for loop, c in enumerate(e.by):
            strides[loop] += c * step
        step *= extent
    return TilePiece(nest.extents, nest.offset, nest.strides, SourceView(tensor, offset, tuple(strides)))


Back = Iterator[tuple[int, Nest]]
"""(input tensor, selection of it): the parts of one selection of an output."""


def _term(op: Unsum, tensor: int) -> tuple[int, int]:
    """(group, place in it) of an output of Unsum."""
    return next((g, group.index(tensor)) for g, group in enumerate(op.groups) if tensor in group)


def _rearrange(op: Rearrange, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    left, right = parse_pattern(op.pattern)
    sizes = op.extents(before[tensor].shape)
    for found, part in _split_groups(nest, right, sizes):
        zero = Affine(0, (0,) * len(part.extents))
        axes: list[Affine] = []
        for group in left:
            e = zero
            for name in group:
                if name != "1":
                    e = plus(times(e, sizes[name]), found[name])
            axes.append(e)
        yield tensor, part.with_axes(axes)


def _split_groups(
    nest: Nest, groups: Sequence[Sequence[str]], sizes: dict[str, int]
) -> Iterator[tuple[dict[str, Affine], Nest]]:
    """The index of every named axis, for a tensor whose axes merge `groups` of named axes.

    The expressions found so far become further axes of the nest, so that splitting a loop keeps them right.
    """
    names: list[str] = []
    todo: list[Nest] = [nest]
    for axis, group in enumerate(groups):
        inner = [name for name in group if name != "1"]
        for name in reversed(inner[1:]):
            parts = [part for one in todo for part in divided(one, axis, sizes[name])]
            names.append(name)
            todo = parts
        if inner:
            names.append(inner[0])
            todo = [one.with_axes((*one.axes, one.axes[axis])) for one in todo]
    for one in todo:
        yield dict(zip(names, one.axes[len(groups) :], strict=True)), one


def _concat(op: Concat, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    width = len(op.sizes)
    for zone, part in zones(nest, op.axis, op.sizes):
        e = part.axes[op.axis]
        yield tensor * width + zone, part.with_axis(op.axis, Affine(e.base - sum(op.sizes[:zone]), e.by))


def _split(op: Split, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    at, piece = divmod(tensor, len(op.sizes))
    e = nest.axes[op.axis]
    yield at, nest.with_axis(op.axis, Affine(e.base + sum(op.sizes[:piece]), e.by))


def _stack(op: Stack, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    inner = len(before) // op.count
    todo = [nest]
    while todo:
        one = todo.pop()
        e = one.axes[op.axis]
        loops = active(one, e.by)
        if loops:
            todo += [one.cut(loops[0], i, i + 1) for i in range(one.extents[loops[0]])]
        else:
            yield e.base * inner + tensor, one.with_axes((*one.axes[: op.axis], *one.axes[op.axis + 1 :]))


def _unstack(op: Unstack, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    instance, at = divmod(tensor, len(before))
    constant = Affine(instance, (0,) * len(nest.extents))
    yield at, nest.with_axes((*nest.axes[: op.axis], constant, *nest.axes[op.axis :]))


def _flip(op: Flip, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    for axis in op.axes:
        e = nest.axes[axis]
        nest = nest.with_axis(axis, plus(Affine(before[tensor].shape[axis] - 1, (0,) * len(e.by)), times(e, -1)))
    yield tensor, nest


def _repeat(op: Repeat, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    for part in divided(nest, op.axis, op.count):
        yield tensor, part.with_axes(part.axes[:-1])


def _unrepeat(op: Unrepeat, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    yield tensor, nest.with_axis(op.axis, times(nest.axes[op.axis], op.count))


def _crop(op: Crop, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    e = nest.axes[op.axis]
    yield tensor, nest.with_axis(op.axis, Affine(e.base + op.before, e.by))


def _each(op: RearrangeEach, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    sizes = op.sizes[tensor] if op.sizes else ()
    if not op.patterns[tensor]:
        yield tensor, nest
    else:
        yield from _rearrange(Rearrange(op.patterns[tensor], sizes), before, tensor, nest)


def _first(op: Any, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    yield 0, nest


def _same(op: Any, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    yield tensor, nest


def _reorder(op: Reorder, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    yield op.taken(tensor), nest


def _unsum(op: Unsum, before: Sequence[TensorSpec], tensor: int, nest: Nest) -> Back:
    yield _term(op, tensor)[0], nest


_STEPS: dict[type[Any], Callable[[Any, Sequence[TensorSpec], int, Nest], Back]] = {
    Rearrange: _rearrange,
    RearrangeEach: _each,
    Concat: _concat,
    Split: _split,
    Stack: _stack,
    Unstack: _unstack,
    Reorder: _reorder,
    Flip: _flip,
    Repeat: _repeat,
    Unrepeat: _unrepeat,
    Crop: _crop,
    Same: _first,
    Copy: _first,
    RequireZero: _same,
    Unsum: _unsum,
}
"""op -> how a selection of one output maps to its inputs"""


# ---------------------------------------------------------------- tidying


def _coalesced(piece: TilePiece) -> TilePiece:
    """The piece with as few loops as possible: loops of one iteration are dropped, and loops that continue each other
    are joined. The outermost loop of the output comes first."""
    rows = [(piece.strides, *(leaf.strides for leaf in piece.leaves()))]
    columns = list(zip(*rows[0], strict=True)) if piece.extents else []
    loops = [(n, column) for n, column in zip(piece.extents, columns, strict=True) if n > 1]
    loops.sort(key=lambda loop: -abs(loop[1][0]))
    joined: list[tuple[int, tuple[int, ...]]] = []
    for n, column in loops:
        if joined and all(outer == inner * n for outer, inner in zip(joined[-1][1], column, strict=True)):
            joined[-1] = (joined[-1][0] * n, column)
        else:
            joined.append((n, column))
    strides = [tuple(column[i] for _, column in joined) for i in range(len(rows[0]))]
    rest = iter(strides[1:])
    value = _restrided(piece.value, rest)
    return TilePiece(tuple(n for n, _ in joined), piece.offset, strides[0], value)


def _restrided(value: Value, strides: Iterator[tuple[int, ...]]) -> Value:
    if isinstance(value, SourceView):
        return replace(value, strides=next(strides))
    if isinstance(value, Apply):
        return replace(value, args=tuple(_restrided(arg, strides) for arg in value.args))
    return value
