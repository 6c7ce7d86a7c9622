"""RearrangeEach: a pattern of its own for each tensor of the tuple."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftax.errors import LayoutError
from graftax.ops.base import Arrays, Specs
from graftax.ops.rearrange import Rearrange, canonical

Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class RearrangeEach:
    """Rearrange tensor i by patterns[i]; '' leaves it as it is. Exact. It is needed if the tensors of one entry differ
    in rank (a kernel, its u and its sigma) or are rearranged differently (grouped heads).

    `sizes`, if given, holds one tuple of axis sizes for each pattern, as Rearrange takes them.
    """

    name: ClassVar[str] = "rearrange_each"
    exact = True
    patterns: tuple[str, ...]
    sizes: tuple[Sizes, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(canonical(p) if p else "" for p in self.patterns))

    def _steps(self) -> tuple[Rearrange | None, ...]:
        sizes = self.sizes or ((),) * len(self.patterns)
        if len(sizes) != len(self.patterns):
            raise LayoutError(f"{self.text}: {len(sizes)} sets of sizes for {len(self.patterns)} patterns")
        return tuple(Rearrange(p, s) if p else None for p, s in zip(self.patterns, sizes, strict=True))

    @property
    def inverse(self) -> RearrangeEach:
        return RearrangeEach(tuple(step.inverse.pattern if step else "" for step in self._steps()), self.sizes)

    @property
    def text(self) -> str:
        return ", ".join(pattern.strip() or "as it is" for pattern in self.patterns)

    def _check(self, count: int) -> None:
        if count != len(self.patterns):
            raise LayoutError(f"{self.text} takes {len(self.patterns)} tensors, got {count}")

    def bind(self, specs: Specs) -> RearrangeEach:
        self._check(len(specs))
        pairs = zip(self._steps(), specs, strict=True)
        return RearrangeEach(self.patterns, tuple(step.bind((spec,)).sizes if step else () for step, spec in pairs))

    def infer(self, specs: Specs) -> Specs:
        self._check(len(specs))
        pairs = zip(self._steps(), specs, strict=True)
        return tuple(step.infer((spec,))[0] if step else spec for step, spec in pairs)

    def apply(self, arrays: Arrays) -> Arrays:
        pairs = zip(self._steps(), arrays, strict=True)
        return tuple(step.apply((array,))[0] if step else array for step, array in pairs)
