"""Which source values a slice of a target needs, found by pushing the slice back through the ops.

A slice is a loop nest: extents, and for each axis of the tensor one affine expression of the loop counters. Going back
through an index op changes the expressions, splits a loop where a merged axis wraps, or cuts one where a concat has a
border. What arrives at the sources is a list of pieces, each a strided copy: out[offset + loops . strides] =
source[offset + loops . strides], with value ops on top. Pieces do not overlap and cover the slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftax.ops import Op, infer_chain
from graftax.ops.checked_ops import Copy, Crop, Pad, Repeat, RequireZero, Same, Unrepeat
from graftax.ops.edge_ops import Fill
from graftax.ops.index_ops import Concat, Flip, Split, Stack, Unstack
from graftax.ops.rearrange import Rearrange, parse_pattern
from graftax.ops.rearrange_each import RearrangeEach
from graftax.ops.value_ops import Cast, Offset, Scale, Sum, Unsum
from graftax.tree import TensorSpec

Box = Sequence[tuple[int, int]]
"""[start, stop) on every axis of a tensor."""
MOST_PIECES = 1 << 16


class NotLocal(Exception):
    """The slice cannot be made from a bounded part of the sources: run the whole entry and cut."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Elements of one source: `offset` plus one stride for each loop, in C order of the source."""

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
    """A value op on what its arguments give, element by element; `output` is which of its outputs."""

    op: Op
    args: tuple[Value, ...]


Value = Leaf | Const | Apply


@dataclass(frozen=True, slots=True)
class Piece:
    """out[offset + loops . strides] = value, for all loop counters below `extents`. Elements, not bytes."""

    extents: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    value: Value

    @property
    def count(self) -> int:
        return math.prod(self.extents)

    def leaves(self) -> Iterator[Leaf]:
        yield from _leaves(self.value)


def _leaves(value: Value) -> Iterator[Leaf]:
    if isinstance(value, Leaf):
        yield value
    elif isinstance(value, Apply):
        for arg in value.args:
            yield from _leaves(arg)


# ---------------------------------------------------------------- selections


@dataclass(frozen=True, slots=True)
class _Affine:
    """base + coefficients . loop counters."""

    base: int
    by: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Nest:
    """Loops (extents, strides in the output, output offset) and one expression for each axis of the current tensor."""

    extents: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    axes: tuple[_Affine, ...]

    def with_axes(self, axes: Sequence[_Affine]) -> _Nest:
        return replace(self, axes=tuple(axes))

    def with_axis(self, axis: int, expression: _Affine) -> _Nest:
        return self.with_axes((*self.axes[:axis], expression, *self.axes[axis + 1 :]))

    def last(self, axis: int) -> int:
        """The largest value of an axis whose coefficients are not negative."""
        e = self.axes[axis]
        return e.base + sum(c * (n - 1) for c, n in zip(e.by, self.extents, strict=True))

    def mapped(self, change: Callable[[_Affine], _Affine]) -> tuple[_Affine, ...]:
        return tuple(change(e) for e in self.axes)

    def reversed(self, loop: int) -> _Nest:
        """The same with one loop running backwards."""
        n = self.extents[loop] - 1
        axes = self.mapped(lambda e: _Affine(e.base + n * e.by[loop], _with(e.by, loop, -e.by[loop])))
        offset = self.offset + n * self.strides[loop]
        return _Nest(self.extents, offset, _with(self.strides, loop, -self.strides[loop]), axes)

    def positive(self, axis: int) -> _Nest:
        """The same with no negative coefficient on `axis`."""
        out = self
        for loop, c in enumerate(self.axes[axis].by):
            if c < 0:
                out = out.reversed(loop)
        return out

    def cut(self, loop: int, start: int, stop: int) -> _Nest:
        """Iterations start..stop of one loop; a loop of one iteration stays, as a constant."""
        axes = self.mapped(lambda e: _Affine(e.base + start * e.by[loop], e.by))
        offset = self.offset + start * self.strides[loop]
        return _Nest(_with(self.extents, loop, stop - start), offset, self.strides, axes)

    def nested(self, loop: int, inner: int) -> _Nest:
        """One loop as two: the old one steps by `inner`, a new last loop runs inside it."""
        axes = self.mapped(lambda e: _Affine(e.base, (*_with(e.by, loop, e.by[loop] * inner), e.by[loop])))
        extents = (*_with(self.extents, loop, self.extents[loop] // inner), inner)
        strides = (*_with(self.strides, loop, self.strides[loop] * inner), self.strides[loop])
        return _Nest(extents, self.offset, strides, axes)


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _active(nest: _Nest, by: Sequence[int]) -> list[int]:
    return [loop for loop, c in enumerate(by) if c and nest.extents[loop] > 1]


# ---------------------------------------------------------------- the walk


def push(
    ops: Sequence[Op],
    sources: Sequence[TensorSpec],
    target: int,
    box: Box,
    most: int = MOST_PIECES,
    within: Box | None = None,
) -> list[Piece]:
    """The pieces that make `box` of the chain's output `target`, as a C-contiguous tile of the box's extents; or at its
    place in a tile of the larger box `within`.

    Conditions of checked ops (repeated rows, dropped padding, ties) are not looked at here. Raises NotLocal where an
    op needs whole tensors (norms), or the slice falls into more than `most` pieces.
    """
    extents = tuple(stop - start for start, stop in box)
    outer = box if within is None else within
    strides = [1] * len(extents)
    for i in range(len(extents) - 2, -1, -1):
        strides[i] = strides[i + 1] * (outer[i + 1][1] - outer[i + 1][0])
    offset = sum((start - first) * step for (start, _), (first, _), step in zip(box, outer, strides, strict=True))
    axes = tuple(
        _Affine(start, tuple(int(i == axis) for i in range(len(extents)))) for axis, (start, _) in enumerate(box)
    )
    if 0 in extents:
        return []
    walk = _Walk(tuple(ops), tuple(sources), most)
    return [_coalesced(piece) for piece in walk.back(len(ops), target, _Nest(extents, offset, tuple(strides), axes))]


class _Walk:
    """One push: the specs along the chain, and how many pieces are left."""

    __slots__ = ("left", "ops", "specs")

    def __init__(self, ops: tuple[Op, ...], sources: tuple[TensorSpec, ...], most: int) -> None:
        self.ops = ops
        self.specs = [sources]
        for op in ops:
            self.specs.append(infer_chain((op,), self.specs[-1]))
        self.left = most

    def back(self, place: int, tensor: int, nest: _Nest) -> Iterator[Piece]:
        """The pieces of `nest`, a selection of output `tensor` of the first `place` ops."""
        if place == 0:
            self.left -= 1
            if self.left < 0:
                raise NotLocal("too many pieces")
            yield _at_source(tensor, self.specs[0][tensor], nest)
            return
        op, before = self.ops[place - 1], self.specs[place - 1]
        if isinstance(op, Fill) or (isinstance(op, Unsum) and _term(op, tensor)[1]):
            value = op.value if isinstance(op, Fill) else 0.0
            yield Piece(nest.extents, nest.offset, nest.strides, Const(value, self.specs[place][tensor].dtype))
        elif isinstance(op, (Cast, Scale, Offset)):
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

    def _sum(self, op: Sum, place: int, tensor: int, nest: _Nest) -> Piece:
        found = [list(self.back(place - 1, term, nest)) for term in op.groups[tensor]]
        first = found[0][0]
        layouts = {(p.extents, p.offset, p.strides) for pieces in found for p in pieces}
        if any(len(pieces) != 1 for pieces in found) or len(layouts) != 1:
            raise NotLocal(f"{op.text} of tensors that were moved apart")
        if len(found) == 1:
            return first
        alone = Sum((tuple(range(len(found))),))
        return replace(first, value=Apply(alone, tuple(pieces[0].value for pieces in found)))

    def _pad(self, op: Pad, place: int, tensor: int, nest: _Nest) -> Iterator[Piece]:
        spec = self.specs[place - 1][tensor]
        for zone, part in _zones(nest, op.axis, (op.before, spec.shape[op.axis], op.after)):
            if zone == 1:
                e = part.axes[op.axis]
                yield from self.back(place - 1, tensor, part.with_axis(op.axis, _Affine(e.base - op.before, e.by)))
            else:
                yield Piece(part.extents, part.offset, part.strides, Const(op.fill, spec.dtype))


def _at_source(tensor: int, spec: TensorSpec, nest: _Nest) -> Piece:
    step, offset = 1, 0
    strides = [0] * len(nest.extents)
    for e, extent in zip(reversed(nest.axes), reversed(spec.shape), strict=True):
        offset += e.base * step
        for loop, c in enumerate(e.by):
            strides[loop] += c * step
        step *= extent
    return Piece(nest.extents, nest.offset, nest.strides, Leaf(tensor, offset, tuple(strides)))


Back = Iterator[tuple[int, _Nest]]
"""(input tensor, selection of it), parts of one selection of an output."""


def _term(op: Unsum, tensor: int) -> tuple[int, int]:
    """(group, place in it) of an output of Unsum."""
    return next((g, group.index(tensor)) for g, group in enumerate(op.groups) if tensor in group)


def _rearrange(op: Rearrange, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    left, right = parse_pattern(op.pattern)
    sizes = op.extents(before[tensor].shape)
    for found, part in _split_groups(nest, right, sizes):
        zero = _Affine(0, (0,) * len(part.extents))
        axes: list[_Affine] = []
        for group in left:
            e = zero
            for name in group:
                if name != "1":
                    e = _plus(_times(e, sizes[name]), found[name])
            axes.append(e)
        yield tensor, part.with_axes(axes)


def _split_groups(
    nest: _Nest, groups: Sequence[Sequence[str]], sizes: dict[str, int]
) -> Iterator[tuple[dict[str, _Affine], _Nest]]:
    """The index of every named axis, for a tensor whose axes are merged `groups` of them.

    The expressions of named axes found so far ride along as further axes of the nest, so that splitting a loop keeps
    them right.
    """
    names: list[str] = []
    todo: list[_Nest] = [nest]
    for axis, group in enumerate(groups):
        inner = [name for name in group if name != "1"]
        for name in reversed(inner[1:]):
            parts = [part for one in todo for part in _divided(one, axis, sizes[name])]
            names.append(name)
            todo = parts
        if inner:
            names.append(inner[0])
            todo = [one.with_axes((*one.axes, one.axes[axis])) for one in todo]
    for one in todo:
        yield dict(zip(names, one.axes[len(groups) :], strict=True)), one


def _plus(a: _Affine, b: _Affine) -> _Affine:
    return _Affine(a.base + b.base, tuple(x + y for x, y in zip(a.by, b.by, strict=True)))


def _times(a: _Affine, factor: int) -> _Affine:
    return _Affine(a.base * factor, tuple(c * factor for c in a.by))


def _divided(nest: _Nest, axis: int, size: int) -> Iterator[_Nest]:
    """Parts in which `axis` is its quotient by `size`, and its remainder is a further last axis."""
    todo = [nest]
    while todo:
        one = todo.pop().positive(axis)
        e = one.axes[axis]
        rest = tuple(c % size for c in e.by)
        base = e.base % size
        if base + sum(r * (n - 1) for r, n in zip(rest, one.extents, strict=True)) < size:
            quotient = _Affine(e.base // size, tuple(c // size for c in e.by))
            part = one.with_axis(axis, quotient)
            yield part.with_axes((*part.axes, _Affine(base, rest)))
            continue
        loops = _active(one, rest)
        loop = max(loops, key=lambda j: rest[j])
        step, count = rest[loop], one.extents[loop]
        until = -(-(size - base) // step)  # iterations until this loop alone wraps
        period = size // step
        if size % step == 0 and base < step and 1 < period < count:
            full = count // period * period
            if full < count:
                todo.append(one.cut(loop, full, count))
            todo.append(one.cut(loop, 0, full).nested(loop, period))
        elif 0 < until < count:
            todo += [one.cut(loop, until, count), one.cut(loop, 0, until)]
        else:
            todo += [one.cut(loop, i, i + 1) for i in range(count)]
        if len(todo) > MOST_PIECES:
            raise NotLocal("too many pieces")


def _zones(nest: _Nest, axis: int, sizes: Sequence[int]) -> Iterator[tuple[int, _Nest]]:
    """(zone, part): the parts of a selection that lie in one of the consecutive zones of an axis."""
    todo = [nest]
    while todo:
        one = todo.pop().positive(axis)
        e = one.axes[axis]
        end, zone = 0, -1
        while end <= e.base:
            zone += 1
            end += sizes[zone]
        if one.last(axis) < end:
            yield zone, one
            continue
        loop = max(_active(one, e.by), key=lambda j: e.by[j])
        step, count = e.by[loop], one.extents[loop]
        inner = one.last(axis) - e.base - step * (count - 1)
        below = max(0, min(count, -(-(end - e.base - inner) // step)))  # iterations that lie before the border whole
        begun = max(0, min(count, -(-(end - e.base) // step)))  # iterations that begin before it
        if begun < count:
            todo.append(one.cut(loop, begun, count))
        todo += [one.cut(loop, i, i + 1) for i in range(below, begun)]
        if below:
            todo.append(one.cut(loop, 0, below))


def _concat(op: Concat, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    width = len(op.sizes)
    for zone, part in _zones(nest, op.axis, op.sizes):
        e = part.axes[op.axis]
        yield tensor * width + zone, part.with_axis(op.axis, _Affine(e.base - sum(op.sizes[:zone]), e.by))


def _split(op: Split, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    at, piece = divmod(tensor, len(op.sizes))
    e = nest.axes[op.axis]
    yield at, nest.with_axis(op.axis, _Affine(e.base + sum(op.sizes[:piece]), e.by))


def _stack(op: Stack, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    inner = len(before) // op.count
    todo = [nest]
    while todo:
        one = todo.pop()
        e = one.axes[op.axis]
        loops = _active(one, e.by)
        if loops:
            todo += [one.cut(loops[0], i, i + 1) for i in range(one.extents[loops[0]])]
        else:
            yield e.base * inner + tensor, one.with_axes((*one.axes[: op.axis], *one.axes[op.axis + 1 :]))


def _unstack(op: Unstack, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    instance, at = divmod(tensor, len(before))
    constant = _Affine(instance, (0,) * len(nest.extents))
    yield at, nest.with_axes((*nest.axes[: op.axis], constant, *nest.axes[op.axis :]))


def _flip(op: Flip, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    for axis in op.axes:
        e = nest.axes[axis]
        nest = nest.with_axis(axis, _plus(_Affine(before[tensor].shape[axis] - 1, (0,) * len(e.by)), _times(e, -1)))
    yield tensor, nest


def _repeat(op: Repeat, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    for part in _divided(nest, op.axis, op.count):
        yield tensor, part.with_axes(part.axes[:-1])


def _unrepeat(op: Unrepeat, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    yield tensor, nest.with_axis(op.axis, _times(nest.axes[op.axis], op.count))


def _crop(op: Crop, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    e = nest.axes[op.axis]
    yield tensor, nest.with_axis(op.axis, _Affine(e.base + op.before, e.by))


def _each(op: RearrangeEach, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    sizes = op.sizes[tensor] if op.sizes else ()
    if not op.patterns[tensor]:
        yield tensor, nest
    else:
        yield from _rearrange(Rearrange(op.patterns[tensor], sizes), before, tensor, nest)


def _first(op: Any, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    yield 0, nest


def _same(op: Any, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    yield tensor, nest


def _unsum(op: Unsum, before: Sequence[TensorSpec], tensor: int, nest: _Nest) -> Back:
    yield _term(op, tensor)[0], nest


_STEPS: dict[type[Any], Callable[[Any, Sequence[TensorSpec], int, _Nest], Back]] = {
    Rearrange: _rearrange,
    RearrangeEach: _each,
    Concat: _concat,
    Split: _split,
    Stack: _stack,
    Unstack: _unstack,
    Flip: _flip,
    Repeat: _repeat,
    Unrepeat: _unrepeat,
    Crop: _crop,
    Same: _first,
    Copy: _first,
    RequireZero: _same,
    Unsum: _unsum,
}
"""op -> how a selection of one of its outputs falls on its inputs"""


# ---------------------------------------------------------------- tidying


def _coalesced(piece: Piece) -> Piece:
    """The piece with as few loops as can be: those of one iteration dropped, those that continue each other joined;
    outermost in the output first."""
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
    return Piece(tuple(n for n, _ in joined), piece.offset, strides[0], value)


def _restrided(value: Value, strides: Iterator[tuple[int, ...]]) -> Value:
    if isinstance(value, Leaf):
        return replace(value, strides=next(strides))
    if isinstance(value, Apply):
        return replace(value, args=tuple(_restrided(arg, strides) for arg in value.args))
    return value
