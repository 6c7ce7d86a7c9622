"""Rearrange: permute, merge and split axes, in einops notation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from graftax.errors import LayoutError, RulesError, escape
from graftax.ops.base import Array, Arrays, Specs, refuse_packed
from graftax.tree import TensorSpec

Pattern = tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]


@lru_cache(maxsize=4096)
def parse_pattern(pattern: str) -> Pattern:
    """`(h d) i -> i h d` as (left groups, right groups); '1' is an axis of length one. RulesError if it is no
    pattern."""
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise RulesError(f"{escape(pattern)!r} is not 'axes -> axes', such as 'o i -> i o'")
    sides = (axis_groups(left, pattern), axis_groups(right, pattern))
    names = [[name for group in side for name in group if name != "1"] for side in sides]
    if len(set(names[0])) != len(names[0]) or len(set(names[1])) != len(names[1]):
        raise RulesError(f"{escape(pattern)!r} names an axis twice")
    if set(names[0]) != set(names[1]):
        odd = ", ".join(sorted(set(names[0]) ^ set(names[1])))
        raise RulesError(f"{escape(pattern)!r} has an axis on one side only: {escape(odd)}")
    return sides


@lru_cache(maxsize=4096)
def canonical(pattern: str) -> str:
    """The pattern with single spaces, so that equal ops have equal text. RulesError if it is no pattern."""
    return " -> ".join(map(groups_text, parse_pattern(pattern)))


def groups_text(groups: Sequence[Sequence[str]]) -> str:
    """One side of a pattern: (("h", "d"), ("i",)) as `(h d) i`."""
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def axis_groups(text: str, pattern: str) -> tuple[tuple[str, ...], ...]:
    """One side of `pattern`: `(h d) i` as (("h", "d"), ("i",)); `()` is an axis of length one. Raises RulesError."""
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(" and inside is None:
            inside = []
        elif token == ")" and inside is not None:
            groups.append(tuple(inside) or ("1",))
            inside = None
        elif token != "1" and not token.isidentifier():
            raise RulesError(f"{escape(pattern)!r}: {escape(token)!r} is not an axis name")
        elif inside is not None:
            inside.append(token)
        else:
            groups.append((token,))
    if inside is not None:
        raise RulesError(f"{escape(pattern)!r}: a '(' is not closed")
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Rearrange:
    """Permute, merge and split axes, in einops notation: `(h d) i -> i h d`. Exact; a view if NumPy allows.

    `sizes` fixes axes that the shape does not determine. An axis may differ between the tensors it is mapped over
    (grouped heads), as long as each group has at most one unknown size.
    """

    name: ClassVar[str] = "rearrange"
    exact = True
    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", canonical(self.pattern))

    @property
    def inverse(self) -> Rearrange:
        left, _, right = self.pattern.partition("->")
        return Rearrange(f"{right} -> {left}", self.sizes)

    @property
    def text(self) -> str:
        names = {name for side in parse_pattern(self.pattern) for group in side if len(group) > 1 for name in group}
        shown = [f"{name}={size}" for name, size in self.sizes if name in names]
        return self.pattern + (f" [{' '.join(shown)}]" if shown else "")

    def extents(self, shape: Sequence[int]) -> dict[str, int]:
        """The length of every named axis for an input of `shape`."""
        left, _ = parse_pattern(self.pattern)
        if len(left) != len(shape):
            raise LayoutError(
                f"{self.pattern}: a tensor of shape {tuple(shape)} has {len(shape)} axes, not {len(left)}"
            )
        out = dict(self.sizes)
        for axis, (group, extent) in enumerate(zip(left, shape, strict=True)):
            unknown = [name for name in group if name != "1" and name not in out]
            known = math.prod(out[name] for name in group if name in out)
            if len(unknown) > 1:
                raise LayoutError(f"{self.pattern}: axis {axis} ({' '.join(group)}) needs the size of {unknown[0]}")
            if unknown:
                if not known or extent % known:
                    raise LayoutError(self._misfit(axis, group, extent, out))
                out[unknown[0]] = extent // known
            elif known != extent:
                raise LayoutError(self._misfit(axis, group, extent, out))
        return out

    def _misfit(self, axis: int, group: tuple[str, ...], extent: int, sizes: Mapping[str, int]) -> str:
        product = " x ".join(f"{name}={sizes[name]}" if name in sizes else name for name in group)
        needed = math.prod(sizes[name] for name in group if name in sizes)
        return f"axis {axis} has {extent} rows; {product} needs {'a multiple of ' if len(group) > 1 else ''}{needed}"

    def bind(self, specs: Specs) -> Rearrange:
        found: dict[str, int] = {}
        torn: set[str] = set()
        for spec in specs:
            for name, size in self.extents(spec.shape).items():
                if found.setdefault(name, size) != size:
                    torn.add(name)
        for side in parse_pattern(self.pattern):
            for group in side:
                if sum(name in torn for name in group) > 1:
                    raise LayoutError(
                        f"{self.pattern}: tensors of different shapes leave ({' '.join(group)}) undecided"
                    )
        return Rearrange(self.pattern, tuple((k, v) for k, v in sorted(found.items()) if k not in torn))

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.pattern)
        _, right = parse_pattern(self.pattern)
        out: list[TensorSpec] = []
        for spec in specs:
            sizes = self.extents(spec.shape)
            out.append(TensorSpec(tuple(math.prod(sizes.get(n, 1) for n in group) for group in right), spec.dtype))
        return tuple(out)

    def apply(self, arrays: Arrays) -> Arrays:
        left, right = parse_pattern(self.pattern)
        flat_left = [name for group in left for name in group if name != "1"]
        order = [flat_left.index(name) for group in right for name in group if name != "1"]
        out: list[Array] = []
        for array in arrays:
            sizes = self.extents(array.shape)
            wide = array.reshape([sizes[name] for name in flat_left]).transpose(order)
            out.append(wide.reshape([math.prod(sizes.get(name, 1) for name in group) for group in right]))
        return tuple(out)


def transpose(rank: int, order: Sequence[int], names: str | None = None) -> Rearrange:
    """A permutation of axes as a Rearrange: output axis i is input axis order[i]. `names`: one letter or word per
    axis."""
    axes = names.split() if names else [f"a{i}" for i in range(rank)]
    return Rearrange(f"{' '.join(axes)} -> {' '.join(axes[i] for i in order)}")
