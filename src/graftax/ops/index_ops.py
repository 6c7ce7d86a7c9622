"""Index ops: they move values and are always exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graftax.errors import LayoutError
from graftax.ops.base import Array, Arrays, Specs, at_least, count_groups, refuse_packed, valid_axis, with_axis
from graftax.tree import TensorSpec


@dataclass(frozen=True, slots=True)
class Split:
    """Cut every tensor along `axis` into pieces of `sizes`, in order. Exact; views."""

    name: ClassVar[str] = "split"
    exact = True
    axis: int
    sizes: tuple[int, ...]

    @property
    def inverse(self) -> Concat:
        return Concat(self.axis, self.sizes)

    @property
    def text(self) -> str:
        return f"split axis {self.axis} into {'+'.join(map(str, self.sizes))}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        at_least(min(self.sizes, default=0), 0, self.text)
        out: list[TensorSpec] = []
        for spec in specs:
            extent = spec.shape[valid_axis(spec, self.axis, self.text)]
            if extent != sum(self.sizes):
                raise LayoutError(f"{self.text}: axis {self.axis} of {spec} has {extent} rows, not {sum(self.sizes)}")
            out += [with_axis(spec, self.axis, size) for size in self.sizes]
        return tuple(out)

    def apply(self, arrays: Arrays) -> Arrays:
        out: list[Array] = []
        for array in arrays:
            start = 0
            for size in self.sizes:
                out.append(array[(slice(None),) * self.axis + (slice(start, start + size),)])
                start += size
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Concat:
    """Join every len(sizes) consecutive tensors along `axis`; their extents there must be `sizes`. Exact."""

    name: ClassVar[str] = "concat"
    exact = True
    axis: int
    sizes: tuple[int, ...]

    @property
    def inverse(self) -> Split:
        return Split(self.axis, self.sizes)

    @property
    def text(self) -> str:
        return f"concat {'+'.join(map(str, self.sizes))} on axis {self.axis}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        width = len(self.sizes)
        out: list[TensorSpec] = []
        for g in range(count_groups(len(specs), width, self.text)):
            group = specs[g * width : (g + 1) * width]
            joined = with_axis(group[0], valid_axis(group[0], self.axis, self.text), sum(self.sizes))
            for spec, size in zip(group, self.sizes, strict=True):
                if len(spec.shape) <= self.axis or spec.shape[self.axis] != size:
                    raise LayoutError(f"{self.text}: expected {size} rows on axis {self.axis}, got {spec}")
                if with_axis(spec, self.axis, sum(self.sizes)) != joined:
                    raise LayoutError(f"{self.text}: {spec} does not join {group[0]}")
            out.append(joined)
        return tuple(out)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        width = len(self.sizes)
        return tuple(
            np.concatenate(arrays[g * width : (g + 1) * width], axis=self.axis) for g in range(len(arrays) // width)
        )


@dataclass(frozen=True, slots=True)
class Stack:
    """Stack `count` tensors along a new `axis`. If an instance has m tensors, the input is instance by instance (count
    x m tensors in, m out). Exact."""

    name: ClassVar[str] = "stack"
    exact = True
    axis: int
    count: int

    @property
    def inverse(self) -> Unstack:
        return Unstack(self.axis, self.count)

    @property
    def text(self) -> str:
        return f"stack {self.count} on axis {self.axis}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        inner = count_groups(len(specs), self.count, self.text)
        out: list[TensorSpec] = []
        for j in range(inner):
            first = specs[j]
            for spec in specs[j::inner]:
                if spec != first:
                    raise LayoutError(f"{self.text}: {spec} does not stack with {first}")
            if not 0 <= self.axis <= len(first.shape):
                raise LayoutError(f"{self.text}: {first} has no place for axis {self.axis}")
            shape = (*first.shape[: self.axis], self.count, *first.shape[self.axis :])
            out.append(TensorSpec(shape, first.dtype))
        return tuple(out)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        inner = len(arrays) // self.count
        return tuple(np.stack(arrays[j::inner], axis=self.axis) for j in range(inner))


@dataclass(frozen=True, slots=True)
class Unstack:
    """The pieces of every tensor along `axis`, instance by instance (m tensors in, count x m out). Exact; views."""

    name: ClassVar[str] = "unstack"
    exact = True
    axis: int
    count: int

    @property
    def inverse(self) -> Stack:
        return Stack(self.axis, self.count)

    @property
    def text(self) -> str:
        return f"unstack {self.count} from axis {self.axis}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        for spec in specs:
            extent = spec.shape[valid_axis(spec, self.axis, self.text)]
            if extent != self.count:
                raise LayoutError(f"{self.text}: axis {self.axis} of {spec} has {extent} entries, not {self.count}")
        one = tuple(TensorSpec(s.shape[: self.axis] + s.shape[self.axis + 1 :], s.dtype) for s in specs)
        return one * self.count

    def apply(self, arrays: Arrays) -> Arrays:
        lead = (slice(None),) * self.axis
        return tuple(array[(*lead, i)] for i in range(self.count) for array in arrays)


@dataclass(frozen=True, slots=True)
class Reorder:
    """Put every len(order) consecutive tensors in another order: output i is input order[i]. Exact; views."""

    name: ClassVar[str] = "reorder"
    exact = True
    order: tuple[int, ...]

    @property
    def inverse(self) -> Reorder:
        return Reorder(tuple(sorted(range(len(self.order)), key=self.order.__getitem__)))

    @property
    def text(self) -> str:
        return f"put the parts in the order {' '.join(map(str, self.order))}"

    def infer(self, specs: Specs) -> Specs:
        if sorted(self.order) != list(range(len(self.order))):
            raise LayoutError(f"{self.text}: it is no order of {len(self.order)} tensors")
        count_groups(len(specs), len(self.order), self.text)
        return tuple(specs[self.taken(i)] for i in range(len(specs)))

    def apply(self, arrays: Arrays) -> Arrays:
        return tuple(arrays[self.taken(i)] for i in range(len(arrays)))

    def taken(self, output: int) -> int:
        """The input that becomes this output."""
        start = output - output % len(self.order)
        return start + self.order[output - start]


@dataclass(frozen=True, slots=True)
class Flip:
    """Reverse `axes`. Exact; a view; its own inverse."""

    name: ClassVar[str] = "flip"
    exact = True
    axes: tuple[int, ...]

    @property
    def inverse(self) -> Flip:
        return self

    @property
    def text(self) -> str:
        return f"flip axes {','.join(map(str, self.axes))}"

    def infer(self, specs: Specs) -> Specs:
        refuse_packed(specs, self.text)
        if len(set(self.axes)) < len(self.axes):
            raise LayoutError(f"{self.text} names an axis twice")
        for spec in specs:
            for axis in self.axes:
                valid_axis(spec, axis, self.text)
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        return tuple(np.flip(array, self.axes) for array in arrays)
