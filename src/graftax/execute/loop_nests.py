"""Selections of a tensor as loop nests: one affine expression of the loop counters for each axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

MOST_PIECES = 1 << 16
"""A selection that splits into more pieces is not local."""


class NotLocal(Exception):
    """The slice cannot be made from a bounded part of the sources. Run the whole entry and cut its result."""


@dataclass(frozen=True, slots=True)
class Affine:
    """base + coefficients . loop counters."""

    base: int
    by: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Nest:
    """Loops (extents, strides in the output, offset in the output) and one expression for each axis of the current
    tensor."""

    extents: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    axes: tuple[Affine, ...]

    def with_axes(self, axes: Sequence[Affine]) -> Nest:
        return replace(self, axes=tuple(axes))

    def with_axis(self, axis: int, expression: Affine) -> Nest:
        return self.with_axes((*self.axes[:axis], expression, *self.axes[axis + 1 :]))

    def last(self, axis: int) -> int:
        """The largest value of an axis whose coefficients are not negative."""
        e = self.axes[axis]
        return e.base + sum(c * (n - 1) for c, n in zip(e.by, self.extents, strict=True))

    def mapped(self, change: Callable[[Affine], Affine]) -> tuple[Affine, ...]:
        return tuple(change(e) for e in self.axes)

    def reversed(self, loop: int) -> Nest:
        """The same selection with one loop running backwards."""
        n = self.extents[loop] - 1
        axes = self.mapped(lambda e: Affine(e.base + n * e.by[loop], _with(e.by, loop, -e.by[loop])))
        offset = self.offset + n * self.strides[loop]
        return Nest(self.extents, offset, _with(self.strides, loop, -self.strides[loop]), axes)

    def positive(self, axis: int) -> Nest:
        """The same selection without negative coefficients on `axis`."""
        out = self
        for loop, c in enumerate(self.axes[axis].by):
            if c < 0:
                out = out.reversed(loop)
        return out

    def cut(self, loop: int, start: int, stop: int) -> Nest:
        """Iterations start..stop of one loop. A loop with one iteration remains, as a constant."""
        axes = self.mapped(lambda e: Affine(e.base + start * e.by[loop], e.by))
        offset = self.offset + start * self.strides[loop]
        return Nest(_with(self.extents, loop, stop - start), offset, self.strides, axes)

    def nested(self, loop: int, inner: int) -> Nest:
        """One loop split into two: the old loop steps by `inner`, and a new last loop runs inside it."""
        axes = self.mapped(lambda e: Affine(e.base, (*_with(e.by, loop, e.by[loop] * inner), e.by[loop])))
        extents = (*_with(self.extents, loop, self.extents[loop] // inner), inner)
        strides = (*_with(self.strides, loop, self.strides[loop] * inner), self.strides[loop])
        return Nest(extents, self.offset, strides, axes)


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def active(nest: Nest, by: Sequence[int]) -> list[int]:
    """The loops that change an expression with these coefficients."""
    return [loop for loop, c in enumerate(by) if c and nest.extents[loop] > 1]


def plus(a: Affine, b: Affine) -> Affine:
    return Affine(a.base + b.base, tuple(x + y for x, y in zip(a.by, b.by, strict=True)))


def times(a: Affine, factor: int) -> Affine:
    return Affine(a.base * factor, tuple(c * factor for c in a.by))


def divided(nest: Nest, axis: int, size: int) -> Iterator[Nest]:
    """Parts of the selection in which `axis` holds its quotient by `size`, and a new last axis holds the remainder."""
    todo = [nest]
    while todo:
        one = todo.pop().positive(axis)
        e = one.axes[axis]
        rest = tuple(c % size for c in e.by)
        base = e.base % size
        if base + sum(r * (n - 1) for r, n in zip(rest, one.extents, strict=True)) < size:
            quotient = Affine(e.base // size, tuple(c // size for c in e.by))
            part = one.with_axis(axis, quotient)
            yield part.with_axes((*part.axes, Affine(base, rest)))
            continue
        loops = active(one, rest)
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


def zones(nest: Nest, axis: int, sizes: Sequence[int]) -> Iterator[tuple[int, Nest]]:
    """(zone, part): the parts of a selection in each of the consecutive zones of an axis."""
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
        loop = max(active(one, e.by), key=lambda j: e.by[j])
        step, count = e.by[loop], one.extents[loop]
        inner = one.last(axis) - e.base - step * (count - 1)
        below = max(0, min(count, -(-(end - e.base - inner) // step)))  # iterations that end before the border
        begun = max(0, min(count, -(-(end - e.base) // step)))  # iterations that begin before it
        if begun < count:
            todo.append(one.cut(loop, begun, count))
        todo += [one.cut(loop, i, i + 1) for i in range(below, begun)]
        if below:
            todo.append(one.cut(loop, 0, below))
