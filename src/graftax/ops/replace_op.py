"""The op of surgery: a leaf gets another value of its own shape and dtype."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from graftax.errors import Failure, GraftaxError, LayoutError, PlanError
from graftax.ops.base import Arrays, Specs
from graftax.tree import TensorSpec

RunMaker = Callable[[TensorSpec, Any], Any]


class LeafValue(Protocol):
    """What a leaf becomes. `apply` gives a new array of the leaf's shape and dtype, or raises PlanError; the dtype
    never changes unasked. `reads`: it needs the old leaf; otherwise `old` may be None.

    A value may also have
      check    (path, spec): PlanError if no leaf of this spec can take the value, whatever its numbers are
      traced   (path, spec, leaf): the same inside jit, grad and vmap, from a traced leaf
      local    True: each new element depends on the old element alone, so `apply` works on any part of a leaf
      in_order (path) -> what makes the leaf from front to end, a flat run after the other: (spec of the run, its old
               values) -> its new values; or None if it needs the whole leaf
      as_data  () -> JSON data that says everything about it; PlanError if it is no data. Without it the value is a
               dataclass whose fields are data.
    """

    reads: ClassVar[bool]

    @property
    def text(self) -> str: ...
    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any: ...


class Misfit(PlanError):
    """Leaves that cannot take their values; `failures` has one for each."""

    def __init__(self, *failures: Failure) -> None:
        super().__init__("", failures)


def misfit_of(path: str, error: GraftaxError) -> Misfit:
    """An error about one leaf as one that names it."""
    if isinstance(error, Misfit):
        return error
    what, _, then = str(error).partition("\n")
    return Misfit(Failure(what, key=path, next=then.strip()))


@dataclass(frozen=True, slots=True)
class Replace:
    """The leaf at `path` becomes what `value` (a LeafValue) makes of it; shape and dtype stay. The old values are gone,
    so there is no inverse."""

    name: ClassVar[str] = "replace"
    exact = False
    path: str
    shape: tuple[int, ...]
    dtype: str
    value: Any

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)

    @property
    def local(self) -> bool:
        """True if a part of the new leaf can be made from the same part of the old one."""
        return bool(getattr(self.value, "local", False))

    def in_order(self) -> RunMaker | None:
        """What makes the leaf from front to end; None if the value does not say how. It raises as `apply`."""
        start = getattr(self.value, "in_order", None)
        make = None if start is None else start(self.path)
        return None if make is None else lambda spec, old: self._guarded(make, spec, old)

    @property
    def reads(self) -> bool:
        return bool(self.value.reads)

    @property
    def inverse(self) -> Replace:
        raise LayoutError(f"{self.text} cannot be undone: the old values of {self.path} are gone")

    @property
    def text(self) -> str:
        return f"becomes {self.value.text}"

    def infer(self, specs: Specs) -> Specs:
        if specs != (self.spec,):
            raise LayoutError(f"{self.text} is for {self.spec}, got {', '.join(map(str, specs))}")
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        """The new leaf. For a part of the leaf, if the value is `local`: the same part of the new leaf. None stands for
        an old leaf that the value does not read. Misfit if the leaf cannot take its value."""
        import numpy as np

        (old,) = arrays
        whole = self.spec
        if self.local and not whole.packed and old is not None:
            whole = TensorSpec(tuple(old.shape), self.dtype)
        return (np.asarray(self._guarded(lambda spec, old: self.value.apply(self.path, spec, old), whole, old)),)

    def _guarded(self, make: RunMaker, spec: TensorSpec, old: Any) -> Any:
        try:
            return make(spec, old)
        except GraftaxError as error:
            if error.exit_code != PlanError.exit_code:
                raise
            raise misfit_of(self.path, error) from error

    def as_json(self) -> dict[str, Any]:
        """The op as JSON data. PlanError if its value is no data, such as a Python function."""
        return {
            "op": self.name,
            "path": self.path,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "value": value_data(self.value),
        }


def value_data(value: Any) -> Any:
    """A value, or a field of one, as JSON data. PlanError for what is no data."""
    if (as_data := getattr(value, "as_data", None)) is not None:
        return as_data()
    if dataclasses.is_dataclass(value):
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(value).__name__).lower()
        fields = {field.name: value_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": kind, **fields}
    if isinstance(value, (tuple, list)):
        return [value_data(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no numbers for these
    if isinstance(value, complex):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise not_data("an array in memory" if hasattr(value, "shape") else f"a {type(value).__name__}")


def not_data(what: str) -> PlanError:
    """The error for a part of a value that no file can hold."""
    return PlanError(
        f"{what} is no data: it is not written into a plan, and a stopped run with it cannot be resumed",
        next="Save arrays in a file, and give gx.from_checkpoint(path, key).",
    )
