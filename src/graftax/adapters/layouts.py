"""Declared layouts of inputs and outputs, such as 'NCHW -> NHWC'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftax.adapters import nests
from graftax.errors import UsageError, escape


@dataclass(frozen=True, slots=True)
class Layout:
    """A declared layout: 'NCHW -> NHWC', or with spaces between names. Arrays of another rank stay as they are."""

    axes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        left, arrow, right = text.partition("->")
        sides = [part.split() if " " in part.strip() else list(part.strip()) for part in (left, right)]
        if not arrow or sorted(sides[0]) != sorted(sides[1]) or len(set(sides[0])) != len(sides[0]) or not sides[0]:
            raise UsageError(f"layout {escape(text)!r} is not axes -> the same axes, such as 'NCHW -> NHWC'")
        return cls(tuple(sides[0].index(name) for name in sides[1]))

    @property
    def inverse(self) -> Layout:
        return Layout(tuple(self.axes.index(a) for a in range(len(self.axes))))

    def __call__(self, array: Any) -> Any:
        return array.transpose(self.axes) if array.ndim == len(self.axes) else array


def declared(layout: str | Mapping[str, str] | None) -> Mapping[str, Layout] | Layout | None:
    """A layout for all arrays, or one for each path of a nest."""
    if layout is None:
        return None
    if isinstance(layout, str):
        return Layout.parse(layout)
    return {path: Layout.parse(text) for path, text in layout.items()}


def with_layout(nest: Any, layout: Mapping[str, Layout] | Layout | None) -> Any:
    """A nest of arrays in the declared layout."""
    if layout is None:
        return nest
    if isinstance(layout, Layout):
        return nests.mapped(nest, _is_array, layout)
    done = [layout[path](leaf) if path in layout else leaf for path, leaf in nests.leaves(nest, _is_array)]
    return nests.rebuilt(nest, _is_array, done)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "transpose")
