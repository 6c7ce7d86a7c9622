"""Value ops: they change values; each has a pseudo-inverse, and its exactness is measured while data streams by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graftax.errors import LayoutError
from graftax.ops.base import Array, Arrays, Specs
from graftax.ops.floats import widens
from graftax.ops.values import floating, rounded
from graftax.tree import DTYPES, TensorSpec

_OVERFLOW = ("error", "saturate", "propagate")


@dataclass(frozen=True, slots=True)
class Cast:
    """To another floating dtype on the host: round to nearest even; overflow is an error unless it is to "saturate"."""

    name: ClassVar[str] = "cast"
    source: str
    target: str
    overflow: str = "error"

    @property
    def exact(self) -> bool:
        return widens(self.source, self.target)

    @property
    def inverse(self) -> Cast:
        return Cast(self.target, self.source, self.overflow)

    @property
    def text(self) -> str:
        return f"{self.source} -> {self.target}"

    def infer(self, specs: Specs) -> Specs:
        for spec in specs:
            if spec.dtype != self.source:
                raise LayoutError(f"cast {self.text} got {spec}")
        if self.source not in DTYPES or self.target not in DTYPES or self.overflow not in _OVERFLOW:
            raise LayoutError(
                f"cast {self.text}: unknown dtype, or {self.overflow!r} is none of {', '.join(_OVERFLOW)}"
            )
        if DTYPES[self.source][1] != "f" or DTYPES[self.target][1] != "f":
            raise LayoutError(f"cast {self.text}: a cast touches floating tensors only")
        if DTYPES[self.source][0] < 8 or DTYPES[self.target][0] < 8:
            raise LayoutError(f"cast {self.text}: packed types move only as they are")
        return tuple(TensorSpec(spec.shape, self.target) for spec in specs)

    def apply(self, arrays: Arrays) -> Arrays:
        from graftax.ops.casting import cast_array

        return tuple(cast_array(array, self.target, self.overflow)[0] for array in arrays)


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply (or divide) by `factor` in float64, rounded once. The inverse divides; exact for powers of two."""

    name: ClassVar[str] = "scale"
    exact = False
    factor: float
    divide: bool = False

    @property
    def inverse(self) -> Scale:
        return Scale(self.factor, not self.divide)

    @property
    def text(self) -> str:
        return f"{'/' if self.divide else 'x'} {self.factor:.12g}"

    def infer(self, specs: Specs) -> Specs:
        floating(specs, self.text)
        if not math.isfinite(self.factor) or self.factor == 0:
            raise LayoutError(f"scale by {self.factor} has no inverse")
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        def scaled(wide: Array) -> Array:
            return wide / self.factor if self.divide else wide * self.factor

        return tuple(rounded(scaled, array) for array in arrays)


@dataclass(frozen=True, slots=True)
class Offset:
    """Add `value` (a norm stored as scale - 1) in float64, rounded once. Exact for some values only: measured."""

    name: ClassVar[str] = "offset"
    exact = False
    value: float

    @property
    def inverse(self) -> Offset:
        return Offset(-self.value)

    @property
    def text(self) -> str:
        return f"{self.value:+.12g}"

    def infer(self, specs: Specs) -> Specs:
        floating(specs, self.text)
        if not math.isfinite(self.value):
            raise LayoutError(f"an offset of {self.value} has no inverse")
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        def moved(wide: Array) -> Array:
            return wide + self.value

        return tuple(rounded(moved, array) for array in arrays)


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of each group of input indices, one tensor per group (an LSTM's two biases). The inverse gives the sum to
    the first tensor of a group and zeros to the others: the function is kept, but not the bits of the terms."""

    name: ClassVar[str] = "sum"
    exact = False
    groups: tuple[tuple[int, ...], ...]

    @property
    def inverse(self) -> Unsum:
        return Unsum(self.groups)

    @property
    def text(self) -> str:
        return "sum " + ", ".join("+".join(map(str, group)) for group in self.groups)

    def infer(self, specs: Specs) -> Specs:
        if sorted(i for group in self.groups for i in group) != list(range(len(specs))):
            raise LayoutError(f"{self.text} does not name each of {len(specs)} tensors once")
        for group in self.groups:
            if len({specs[i] for i in group}) != 1:
                raise LayoutError(f"{self.text}: {', '.join(str(specs[i]) for i in group)} do not add up")
        floating(specs, self.text)
        return tuple(specs[group[0]] for group in self.groups)

    def apply(self, arrays: Arrays) -> Arrays:
        out: list[Array] = []
        for group in self.groups:
            terms = [arrays[i] for i in group]
            out.append(terms[0] if len(terms) == 1 else rounded(_total, *terms))
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Unsum:
    """The pseudo-inverse of Sum: each tensor becomes the first term of its group, the others are zeros."""

    name: ClassVar[str] = "unsum"
    exact = True
    groups: tuple[tuple[int, ...], ...]

    @property
    def inverse(self) -> Sum:
        return Sum(self.groups)

    @property
    def text(self) -> str:
        return "first term of " + ", ".join("+".join(map(str, group)) for group in self.groups)

    def _spread(self, items: Sequence[Any], other: Callable[[Any], Any]) -> tuple[Any, ...]:
        out: list[Any] = [None] * sum(len(group) for group in self.groups)
        for group, item in zip(self.groups, items, strict=True):
            for place, i in enumerate(group):
                out[i] = item if place == 0 else other(item)
        return tuple(out)

    def infer(self, specs: Specs) -> Specs:
        if sorted(i for group in self.groups for i in group) != list(range(sum(map(len, self.groups)))):
            raise LayoutError(f"{self.text} does not name each tensor once")
        if len(specs) != len(self.groups) or not all(self.groups):
            raise LayoutError(f"{self.text} takes {len(self.groups)} tensors, got {len(specs)}")
        floating(specs, self.text)
        return self._spread(specs, lambda spec: spec)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        return self._spread(arrays, lambda array: np.zeros_like(array))


def _total(*terms: Array) -> Array:
    return sum(terms[1:], terms[0])
