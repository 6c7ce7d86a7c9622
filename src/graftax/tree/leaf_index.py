"""A part of a leaf: NumPy's basic index, as the bracket that ends a selector writes it (`[:, 3]`, `[2]`, `[..., -1]`).

Whole numbers, slices and one `...`; negative numbers count from the end. A whole number drops its axis, as in NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

from graftax.errors import PlanError

_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_PARTS = tuple[int | None, int | None, int | None]


@dataclass(frozen=True, slots=True)
class LeafIndex:
    """A basic index. items: a whole number, the (start, stop, step) of a slice, or `...`, in the order of the axes."""

    items: tuple[int | _PARTS | EllipsisType, ...]

    @property
    def text(self) -> str:
        """The index as it ends a selector, in one spelling: `[:, 3]`."""
        return f"[{', '.join(map(_item_text, self.items))}]"

    @property
    def key(self) -> tuple[int | slice | EllipsisType, ...]:
        """The index as arrays take it: `array[index.key]`."""
        return tuple(slice(*item) if isinstance(item, tuple) else item for item in self.items)

    def ranges(self, shape: Sequence[int]) -> tuple[range, ...]:
        """The positions that the index reaches on each axis of a leaf of this shape, in the order of the index.

        Raises PlanError for more indices than axes, a number out of range, and an index that reaches no element.
        """
        found = tuple(self._on_axis(axis, item, shape) for axis, item in enumerate(self._by_axis(shape)))
        if not all(map(len, found)):
            axis = next(axis for axis, positions in enumerate(found) if not positions)
            raise PlanError(
                f"{self.text} selects no element: axis {axis} has {shape[axis]}",
                next=f"The leaf is {_shape_text(shape)}. {_within(shape[axis])}",
            )
        return found

    def _by_axis(self, shape: Sequence[int]) -> list[int | _PARTS]:
        """The item of every axis: those of `...` and those left out are whole. PlanError for too many items."""
        named = [item for item in self.items if not isinstance(item, EllipsisType)]
        if len(named) > len(shape):
            axes = "1 axis" if len(shape) == 1 else f"{len(shape)} axes"
            indices = "1 index" if len(named) == 1 else f"{len(named)} indices"
            raise PlanError(
                f"{self.text} has {indices}, the leaf has {axes}", next=f"The leaf is {_shape_text(shape)}."
            )
        before = self.items.index(...) if ... in self.items else len(named)
        return [*named[:before], *[(None, None, None)] * (len(shape) - len(named)), *named[before:]]

    def _on_axis(self, axis: int, item: int | _PARTS, shape: Sequence[int]) -> range:
        size = shape[axis]
        if isinstance(item, tuple):
            return range(*slice(*item).indices(size))
        if not -size <= item < size:
            raise PlanError(
                f"{self.text} is out of range: axis {axis} has {size}, so {item} is none of its indices",
                next=f"The leaf is {_shape_text(shape)}. {_within(size)}",
            )
        start = item % size
        return range(start, start + 1)

    def part_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of a leaf of this shape. PlanError as `ranges`."""
        items = self._by_axis(shape)
        reached = self.ranges(shape)
        return tuple(len(at) for at, item in zip(reached, items, strict=True) if not isinstance(item, int))


def overlap(first: Sequence[range], second: Sequence[range]) -> bool:
    """True if two indices of one leaf, as `LeafIndex.ranges` gives them, reach a common element."""
    return all(
        any(i in b for i in a) if len(a) <= len(b) else any(i in a for i in b)
        for a, b in zip(first, second, strict=True)
    )


def cover(outer: Sequence[range], inner: Sequence[range]) -> bool:
    """True if the first index reaches every element that the second reaches."""
    return all(all(i in a for i in b) for a, b in zip(outer, inner, strict=True))


def split_index(selector: str) -> tuple[str, LeafIndex] | None:
    """(what stands before it, the index) of a selector that ends in a basic index, else None. Whether the bracket is
    meant as an index or as a glob's character class is the caller's question: `[2]` may be either."""
    start = selector.rfind("[")
    if start <= 0 or not selector.endswith("]"):
        return None
    items = [_parsed(text.strip()) for text in _items(selector[start + 1 : -1])]
    if not items or None in items or items.count(...) > 1:
        return None
    return selector[:start], LeafIndex(tuple(item for item in items if item is not None))


def _items(body: str) -> list[str]:
    """The items of an index; as in Python, a comma may end it."""
    items = body.split(",")
    return items[:-1] if len(items) > 1 and not items[-1].strip() else items


def _parsed(text: str) -> int | _PARTS | EllipsisType | None:
    if text == "...":
        return ...
    if _NUMBER.fullmatch(text):
        return int(text)
    pieces = [piece.strip() for piece in text.split(":")]
    if not 2 <= len(pieces) <= 3 or not all(piece == "" or _NUMBER.fullmatch(piece) for piece in pieces):
        return None
    numbers = [int(piece) if piece else None for piece in pieces]
    start, stop, step = (*numbers, None)[:3]
    return None if step == 0 else (start, stop, step)


def _item_text(item: int | _PARTS | EllipsisType) -> str:
    if isinstance(item, EllipsisType):
        return "..."
    if isinstance(item, int):
        return str(item)
    start, stop, step = ("" if number is None else str(number) for number in item)
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _shape_text(shape: Sequence[int]) -> str:
    return f"of shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def _within(size: int) -> str:
    return f"Its indices are 0 to {size - 1}." if size else "The axis is empty."
