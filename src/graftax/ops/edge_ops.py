"""Ops at the edge of a plan: they make a tensor from no source, or remove one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from graftax.errors import LayoutError, PlanError
from graftax.ops.base import Arrays, Specs, at_least, holds
from graftax.tree import TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """No source -> a tensor of `value`. The inverse drops it. NaN equals NaN, so that a plan equals its own copy."""

    name: ClassVar[str] = "fill"
    exact = True
    value: float
    shape: tuple[int, ...]
    dtype: str
    reason: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fill) and _fields(self) == _fields(other)

    def __hash__(self) -> int:
        return hash(_fields(self))

    @property
    def inverse(self) -> Drop:
        return Drop(self.reason, self.shape, self.dtype, self.value)

    @property
    def text(self) -> str:
        return f"fill {self.value:g}"

    def infer(self, specs: Specs) -> Specs:
        if specs:
            raise LayoutError(f"{self.text} takes no tensor, got {len(specs)}")
        spec = TensorSpec(self.shape, self.dtype)
        at_least(min(self.shape, default=0), 0, self.text)
        holds(self.value, self.dtype, self.text)
        return (spec,)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        from graftax.tree.dtypes import numpy_dtype, pack

        out = np.full(self.shape, self.value, numpy_dtype(self.dtype))
        spec = TensorSpec(self.shape, self.dtype)
        return (pack(out, spec.bits) if spec.packed else out,)


@dataclass(frozen=True, slots=True, eq=False)
class Drop:
    """Drop a tensor for a stated reason. The inverse fills the recorded spec with `fill`, or keeps like's values if
    this op undoes a Keep. With fill=None there is no inverse: a dropped tensor is never made up on the way back."""

    name: ClassVar[str] = "drop"
    exact = False
    reason: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    fill: float | None = None
    keep: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Drop) and _fields(self) == _fields(other)

    def __hash__(self) -> int:
        return hash(_fields(self))

    @property
    def inverse(self) -> Fill | Keep:
        if self.shape is None:
            raise LayoutError(f"{self.text} is not bound to a tensor yet")
        if self.keep:
            return Keep(self.shape, self.dtype)
        if self.fill is None:
            raise LayoutError(f"{self.text}: nothing can bring it back")
        return Fill(self.fill, self.shape, self.dtype, self.reason)

    @property
    def text(self) -> str:
        return f"dropped: {self.reason or f'{self.fill or 0:g} on the way back'}"

    def bind(self, specs: Specs) -> Drop:
        self.infer(specs)
        return Drop(self.reason, specs[0].shape, specs[0].dtype, self.fill, self.keep)

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 1:
            raise LayoutError(f"{self.text} takes one tensor, got {len(specs)}")
        return ()

    def apply(self, arrays: Arrays) -> Arrays:
        return ()


@dataclass(frozen=True, slots=True)
class Keep:
    """No source -> the value that the target already has in like. The executor supplies it; the inverse drops it."""

    name: ClassVar[str] = "keep"
    exact = True
    shape: tuple[int, ...]
    dtype: str

    @property
    def inverse(self) -> Drop:
        return Drop("kept from like", self.shape, self.dtype, keep=True)

    @property
    def text(self) -> str:
        return "kept from like"

    def infer(self, specs: Specs) -> Specs:
        if specs:
            raise LayoutError(f"{self.text} takes no tensor, got {len(specs)}")
        at_least(min(self.shape, default=0), 0, self.text)
        return (TensorSpec(self.shape, self.dtype),)

    def apply(self, arrays: Arrays) -> Arrays:
        raise PlanError(
            "a kept leaf takes its value from like, and a loaded plan has none",
            next="Give the same like again: gx.port_file(source, like, out, plan=plan).",
        )


def _fields(op: Fill | Drop) -> tuple[object, ...]:
    """The fields, numbers as text: so NaN equals NaN, and -0.0 is not 0.0."""
    values = (getattr(op, field.name) for field in fields(op))
    return tuple(
        repr(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        for value in values
    )
