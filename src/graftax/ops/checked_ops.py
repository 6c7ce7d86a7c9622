"""Index ops that are valid only for some values, in one direction at least. They check those values bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftax.errors import LayoutError, PlanError
from graftax.ops.base import Array, Arrays, Specs, at_least, holds, refuse_packed, valid_axis, with_axis
from graftax.tree import TensorSpec
from graftax.tree.dtypes import same_bits


@dataclass(frozen=True, slots=True)
class Repeat:
    """Repeat every row along `axis` `count` times in a row (heads repeated for tensor parallelism). Exact."""

    name: ClassVar[str] = "repeat"
    exact = True
    axis: int
    count: int

    @property
    def inverse(self) -> Unrepeat:
        return Unrepeat(self.axis, self.count)

    @property
    def text(self) -> str:
        return f"repeat axis {self.axis} x{self.count}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        at_least(self.count, 1, self.text)
        return tuple(with_axis(s, self.axis, s.shape[valid_axis(s, self.axis, self.text)] * self.count) for s in specs)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        return tuple(np.repeat(array, self.count, axis=self.axis) for array in arrays)


@dataclass(frozen=True, slots=True)
class Unrepeat:
    """Keep one of every `count` equal rows along `axis`; PlanError if they are not bit-identical. Exact."""

    name: ClassVar[str] = "unrepeat"
    exact = True
    axis: int
    count: int

    @property
    def inverse(self) -> Repeat:
        return Repeat(self.axis, self.count)

    @property
    def text(self) -> str:
        return f"one of every {self.count} equal rows on axis {self.axis}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        at_least(self.count, 1, self.text)
        out: list[TensorSpec] = []
        for spec in specs:
            extent = spec.shape[valid_axis(spec, self.axis, self.text)]
            if extent % self.count:
                raise LayoutError(f"{self.text}: axis {self.axis} of {spec} is not a multiple of {self.count}")
            out.append(with_axis(spec, self.axis, extent // self.count))
        return tuple(out)

    def apply(self, arrays: Arrays) -> Arrays:
        out: list[Array] = []
        for array in arrays:
            lead = (slice(None),) * self.axis
            first = array[(*lead, slice(0, None, self.count))]
            for i in range(1, self.count):
                if not same_bits(first, array[(*lead, slice(i, None, self.count))]):
                    raise PlanError(f"the rows along axis {self.axis} do not repeat {self.count} times")
            out.append(first)
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Pad:
    """Add `before` and `after` rows of `fill` on `axis` (a vocabulary padded to a multiple). Exact."""

    name: ClassVar[str] = "pad"
    exact = True
    axis: int
    before: int
    after: int
    fill: float = 0.0

    @property
    def inverse(self) -> Crop:
        return Crop(self.axis, self.before, self.after, self.fill)

    @property
    def text(self) -> str:
        return f"pad axis {self.axis} by {self.before}+{self.after} rows of {self.fill:g}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        at_least(min(self.before, self.after), 0, self.text)
        for spec in specs:
            holds(self.fill, spec.dtype, self.text)
        return tuple(
            with_axis(s, self.axis, s.shape[valid_axis(s, self.axis, self.text)] + self.before + self.after)
            for s in specs
        )

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        out: list[Array] = []
        for array in arrays:
            shape = list(array.shape)
            shape[self.axis] += self.before + self.after
            wide = np.full(shape, self.fill, array.dtype)
            wide[(slice(None),) * self.axis + (slice(self.before, shape[self.axis] - self.after),)] = array
            out.append(wide)
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Crop:
    """Remove rows that Pad adds; PlanError if one of them is not `fill`. Exact."""

    name: ClassVar[str] = "crop"
    exact = True
    axis: int
    before: int
    after: int
    fill: float = 0.0

    @property
    def inverse(self) -> Pad:
        return Pad(self.axis, self.before, self.after, self.fill)

    @property
    def text(self) -> str:
        return f"crop axis {self.axis} by {self.before}+{self.after} rows of {self.fill:g}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        at_least(min(self.before, self.after), 0, self.text)
        out: list[TensorSpec] = []
        for spec in specs:
            holds(self.fill, spec.dtype, self.text)
            rows = spec.shape[valid_axis(spec, self.axis, self.text)] - self.before - self.after
            if rows < 0:
                raise LayoutError(f"{self.text}: axis {self.axis} of {spec} has too few rows")
            out.append(with_axis(spec, self.axis, rows))
        return tuple(out)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        out: list[Array] = []
        for array in arrays:
            lead = (slice(None),) * self.axis
            stop = array.shape[self.axis] - self.after
            for dropped in (array[(*lead, slice(0, self.before))], array[(*lead, slice(stop, None))]):
                fill = np.full((), self.fill, array.dtype)
                if dropped.size and not same_bits(dropped, np.broadcast_to(fill, dropped.shape)):
                    raise PlanError(f"{self.text} would drop rows that are not {self.fill:g}")
            out.append(array[(*lead, slice(self.before, stop))])
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Same:
    """`count` tensors that are equal bit for bit (a tied weight with several names) -> one. PlanError if they
    differ."""

    name: ClassVar[str] = "same"
    exact = True
    count: int

    @property
    def inverse(self) -> Copy:
        return Copy(self.count)

    @property
    def text(self) -> str:
        return f"one of {self.count} tied"

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != self.count or len(set(specs)) != 1:
            raise LayoutError(f"{self.text}: expected {self.count} alike, got {', '.join(map(str, specs))}")
        return specs[:1]

    def apply(self, arrays: Arrays) -> Arrays:
        for other in arrays[1:]:
            if not same_bits(arrays[0], other):
                raise PlanError("the plan treats these tensors as tied, but their values differ")
        return arrays[:1]


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor -> `count` copies. Exact."""

    name: ClassVar[str] = "copy"
    exact = True
    count: int

    @property
    def inverse(self) -> Same:
        return Same(self.count)

    @property
    def text(self) -> str:
        return f"to {self.count} tied names"

    def infer(self, specs: Specs) -> Specs:
        at_least(self.count, 1, self.text)
        if len(specs) != 1:
            raise LayoutError(f"{self.text} takes one tensor, got {len(specs)}")
        return specs * self.count

    def apply(self, arrays: Arrays) -> Arrays:
        return arrays * self.count


@dataclass(frozen=True, slots=True)
class RequireZero:
    """Pass all tensors; PlanError unless rows start..stop on `axis` of tensor `index` are zero, because the target has
    no place for them (a GRU's b_hn, for a cell without one). Exact; its own inverse; checked while planning."""

    name: ClassVar[str] = "require_zero"
    exact = True
    index: int
    axis: int
    start: int
    stop: int
    why: str = ""

    @property
    def inverse(self) -> RequireZero:
        return self

    @property
    def text(self) -> str:
        return f"rows {self.start}..{self.stop} of input {self.index} must be zero"

    def infer(self, specs: Specs) -> Specs:
        spec = specs[self.index] if 0 <= self.index < len(specs) else None
        inside = spec is not None and spec.shape[valid_axis(spec, self.axis, self.text)] >= self.stop
        if not inside or not 0 <= self.start <= self.stop:
            raise LayoutError(f"{self.text}: no such rows in {', '.join(map(str, specs))}")
        refuse_packed(specs[self.index : self.index + 1], self.text)
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        rows = arrays[self.index][(slice(None),) * self.axis + (slice(self.start, self.stop),)]
        if (rows != 0).any():
            raise PlanError(self.why or f"{self.text}, but they are not")
        return arrays
