"""Value ops: they change values; each has a pseudo-inverse, and its exactness is measured while data streams by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graftax.errors import LayoutError, PlanError
from graftax.ops.base import Array, Arrays, Specs, valid_axis
from graftax.ops.floats import widens
from graftax.tree import DTYPES, TensorSpec


def _floating(specs: Specs, op: str) -> None:
    for spec in specs:
        if not spec.floating:
            raise LayoutError(f"{op} takes floating tensors, got {spec}")


def _rounded(value: Array, like: Array) -> Array:
    """float64 -> the dtype of `like`, rounded once."""
    from graftax.ops.casting import cast_array

    return cast_array(value, str(like.dtype), "propagate")[0]


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
        _floating(specs, self.text)
        if not math.isfinite(self.factor) or self.factor == 0:
            raise LayoutError(f"scale by {self.factor} has no inverse")
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        return tuple(
            _rounded(a.astype("float64") / self.factor if self.divide else a.astype("float64") * self.factor, a)
            for a in arrays
        )


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
        _floating(specs, self.text)
        return specs

    def apply(self, arrays: Arrays) -> Arrays:
        return tuple(_rounded(a.astype("float64") + self.value, a) for a in arrays)


@dataclass(frozen=True, slots=True)
class Sum:
    """For each group of input indices their sum, one tensor a group (an LSTM's two biases). The inverse gives the first
    of a group the sum and the others zeros: the function is kept, the bits of the terms are not."""

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
        _floating(specs, self.text)
        return tuple(specs[group[0]] for group in self.groups)

    def apply(self, arrays: Arrays) -> Arrays:
        out: list[Array] = []
        for group in self.groups:
            first = arrays[group[0]]
            total = first.astype("float64")
            for i in group[1:]:
                total = total + arrays[i].astype("float64")
            out.append(first if len(group) == 1 else _rounded(total, first))
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
        if len(specs) != len(self.groups):
            raise LayoutError(f"{self.text} takes {len(self.groups)} tensors, got {len(specs)}")
        return self._spread(specs, lambda spec: spec)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        return self._spread(arrays, lambda array: np.zeros_like(array))


@dataclass(frozen=True, slots=True)
class FoldWeightNorm:
    """(g, v) -> g * v / ||v||, the norm over every axis but `axis`; g has length 1 on the others. The inverse takes
    v = w and g = ||w||: the same function, other bits."""

    name: ClassVar[str] = "fold_weight_norm"
    exact = False
    axis: int = 0

    @property
    def inverse(self) -> UnfoldWeightNorm:
        return UnfoldWeightNorm(self.axis)

    @property
    def text(self) -> str:
        return f"g v / |v| along axis {self.axis}"

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 2:
            raise LayoutError(f"{self.text} takes g and v, got {len(specs)} tensors")
        _floating(specs, self.text)
        g, v = specs
        want = tuple(n if i == self.axis else 1 for i, n in enumerate(v.shape))
        if g.shape != want:
            raise LayoutError(f"{self.text}: g of shape {want} expected beside v of {v.shape}, got {g.shape}")
        return (v,)

    def apply(self, arrays: Arrays) -> Arrays:
        g, v = arrays
        wide = v.astype("float64")
        return (_rounded(wide * (g.astype("float64") / _norm(wide, self.axis)), v),)


@dataclass(frozen=True, slots=True)
class UnfoldWeightNorm:
    """w -> (g = ||w||, v = w): a weight-normalised form of a plain weight."""

    name: ClassVar[str] = "unfold_weight_norm"
    exact = False
    axis: int = 0

    @property
    def inverse(self) -> FoldWeightNorm:
        return FoldWeightNorm(self.axis)

    @property
    def text(self) -> str:
        return f"g = |w| along axis {self.axis}, v = w"

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 1:
            raise LayoutError(f"{self.text} takes one tensor, got {len(specs)}")
        _floating(specs, self.text)
        (w,) = specs
        return (TensorSpec(tuple(n if i == self.axis else 1 for i, n in enumerate(w.shape)), w.dtype), w)

    def apply(self, arrays: Arrays) -> Arrays:
        (w,) = arrays
        return (_rounded(_norm(w.astype("float64"), self.axis), w), w)


def _norm(wide: Array, axis: int) -> Array:
    import numpy as np

    rest = tuple(i for i in range(wide.ndim) if i != axis)
    return np.sqrt((wide * wide).sum(axis=rest, keepdims=True))


@dataclass(frozen=True, slots=True)
class SpectralSigma:
    """(w, u, v) of torch spectral_norm -> (w, u, sigma = u W v), W being w as (O, rest). The inverse takes
    v = W^T u / |W^T u|, which is v once the power iteration has converged."""

    name: ClassVar[str] = "spectral_sigma"
    exact = False
    axis: int = 0

    @property
    def inverse(self) -> SpectralVector:
        return SpectralVector(self.axis)

    @property
    def text(self) -> str:
        return "sigma = u W v"

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 3:
            raise LayoutError(f"{self.text} takes w, u and v, got {len(specs)} tensors")
        w, u, v = specs
        rows = w.shape[valid_axis(w, self.axis, self.text)]
        if u.shape != (rows,) or v.shape != (w.size // max(rows, 1),):
            raise LayoutError(f"{self.text}: u {u} and v {v} do not fit {w}")
        _floating(specs, self.text)
        return (w, u, TensorSpec((), w.dtype))

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        w, u, v = arrays
        flat = np.moveaxis(w, self.axis, 0).reshape(w.shape[self.axis], -1).astype("float64")
        return (w, u, _rounded(np.asarray(u.astype("float64") @ flat @ v.astype("float64")), w))


@dataclass(frozen=True, slots=True)
class SpectralVector:
    """(w, u, sigma) -> (w, u, v = W^T u / |W^T u|)."""

    name: ClassVar[str] = "spectral_vector"
    exact = False
    axis: int = 0

    @property
    def inverse(self) -> SpectralSigma:
        return SpectralSigma(self.axis)

    @property
    def text(self) -> str:
        return "v = W^T u / |W^T u|"

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 3:
            raise LayoutError(f"{self.text} takes w, u and sigma, got {len(specs)} tensors")
        w, u, _ = specs
        rows = w.shape[valid_axis(w, self.axis, self.text)]
        return (w, u, TensorSpec((w.size // max(rows, 1),), w.dtype))

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        w, u, _ = arrays
        flat = np.moveaxis(w, self.axis, 0).reshape(w.shape[self.axis], -1).astype("float64")
        vector = flat.T @ u.astype("float64")
        return (w, u, _rounded(vector / np.linalg.norm(vector), w))


@dataclass(frozen=True, slots=True)
class Fill:
    """Nothing -> a tensor of `value`. Its inverse drops it."""

    name: ClassVar[str] = "fill"
    exact = True
    value: float
    shape: tuple[int, ...]
    dtype: str
    reason: str = ""

    @property
    def inverse(self) -> Drop:
        return Drop(self.reason or f"filled with {self.value:g}", self.shape, self.dtype, self.value)

    @property
    def text(self) -> str:
        return f"fill {self.value:g}"

    def infer(self, specs: Specs) -> Specs:
        if specs:
            raise LayoutError(f"{self.text} takes no tensor, got {len(specs)}")
        return (TensorSpec(self.shape, self.dtype),)

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        from graftax.dtypes import numpy_dtype

        return (np.full(self.shape, self.value, numpy_dtype(self.dtype)),)


@dataclass(frozen=True, slots=True)
class Drop:
    """A tensor -> nothing, for a stated reason. Its inverse fills the recorded spec with `fill`."""

    name: ClassVar[str] = "drop"
    exact = False
    reason: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    fill: float = 0.0

    @property
    def inverse(self) -> Fill:
        if self.shape is None:
            raise LayoutError(f"{self.text} is not bound to a tensor yet")
        return Fill(self.fill, self.shape, self.dtype, self.reason)

    @property
    def text(self) -> str:
        return f"dropped: {self.reason}"

    def bind(self, specs: Specs) -> Drop:
        self.infer(specs)
        return Drop(self.reason, specs[0].shape, specs[0].dtype, self.fill)

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 1:
            raise LayoutError(f"{self.text} takes one tensor, got {len(specs)}")
        return ()

    def apply(self, arrays: Arrays) -> Arrays:
        return ()


@dataclass(frozen=True, slots=True)
class Keep:
    """Nothing -> the value that the target already has in like. The executor supplies it; its inverse drops it."""

    name: ClassVar[str] = "keep"
    exact = True
    shape: tuple[int, ...]
    dtype: str

    @property
    def inverse(self) -> Drop:
        return Drop("kept from like", self.shape, self.dtype)

    @property
    def text(self) -> str:
        return "kept from like"

    def infer(self, specs: Specs) -> Specs:
        return (TensorSpec(self.shape, self.dtype),)

    def apply(self, arrays: Arrays) -> Arrays:
        raise PlanError("a kept leaf takes its value from like; give the same `like` again")
