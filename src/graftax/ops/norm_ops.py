"""Value ops of reparametrised weights: weight norm and spectral norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from graftax.errors import LayoutError
from graftax.ops.base import Array, Arrays, Specs, valid_axis
from graftax.ops.values import floating, one_dtype, rounded
from graftax.tree import TensorSpec


@dataclass(frozen=True, slots=True)
class FoldWeightNorm:
    """(g, v) -> g * v / ||v||, with the norm over every axis but `axis`; g has length 1 on those axes. The inverse
    gives v = w and g = ||w||: the same function with other bits."""

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
        one_dtype(specs, self.text)
        g, v = specs
        valid_axis(v, self.axis, self.text)
        want = tuple(n if i == self.axis else 1 for i, n in enumerate(v.shape))
        if g.shape != want:
            raise LayoutError(f"{self.text}: g of shape {want} expected beside v of {v.shape}, got {g.shape}")
        return (v,)

    def apply(self, arrays: Arrays) -> Arrays:
        g, v = arrays

        def folded(g: Array, v: Array) -> Array:
            return v * (g / _norm(v, self.axis))

        return (rounded(folded, g, v),)


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
        floating(specs, self.text)
        (w,) = specs
        valid_axis(w, self.axis, self.text)
        return (TensorSpec(tuple(n if i == self.axis else 1 for i, n in enumerate(w.shape)), w.dtype), w)

    def apply(self, arrays: Arrays) -> Arrays:
        (w,) = arrays
        return (rounded(partial(_norm, axis=self.axis), w), w)


def _norm(wide: Array, axis: int) -> Array:
    import numpy as np

    rest = tuple(i for i in range(wide.ndim) if i != axis)
    return np.sqrt((wide * wide).sum(axis=rest, keepdims=True))


@dataclass(frozen=True, slots=True)
class SpectralSigma:
    """(w, u, v) of torch spectral_norm -> (w, u, sigma = u W v), where W is w as (O, rest). The inverse gives v = W^T u
    / |W^T u|, which equals v once the power iteration has converged."""

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
        one_dtype(specs, self.text)
        return (w, u, TensorSpec((), w.dtype))

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        w, u, v = arrays

        def sigma(u: Array, v: Array, w: Array) -> Array:
            return np.asarray(u @ np.moveaxis(w, self.axis, 0).reshape(w.shape[self.axis], -1) @ v)

        return (w, u, rounded(sigma, u, v, w))


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
        w, u, sigma = specs
        rows = w.shape[valid_axis(w, self.axis, self.text)]
        if u.shape != (rows,) or sigma.shape != ():
            raise LayoutError(f"{self.text}: u {u} and sigma {sigma} do not fit {w}")
        one_dtype(specs, self.text)
        return (w, u, TensorSpec((w.size // max(rows, 1),), w.dtype))

    def apply(self, arrays: Arrays) -> Arrays:
        import numpy as np

        w, u, _ = arrays

        def vector(u: Array, w: Array) -> Array:
            found = np.moveaxis(w, self.axis, 0).reshape(w.shape[self.axis], -1).T @ u
            return found / np.linalg.norm(found)

        return (w, u, rounded(vector, u, w))
