"""A fault, and the changes to ported weights that faults are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..zoo.base import Arrays, Edit

FLOAT32 = np.float32


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with one port.

    kind      the name of the cause, as graftax should give it
    model, api, seed   which port: a name of KINDS, linen or nnx, and the seed of its weights and inputs
    text      which variant: with kind, model and api it tells this fault from every other
    layers    Flax paths of the layer that is to be named first: the module that is wrong (of several that have the same
              wrong setting, the first in which it shows) or, for functional code, the one behind it or the container
              around it; 'a/**' stands for all below a
    right, wrong   settings of the torch model, and of the Flax model
    edit      what happens to the ported weights; loud: see zoo.Kind
    also      further names that are no less true of it
    by        where it shows: in the 'layers', or (no forward run can show it) in the 'settings'
    """

    kind: str
    model: str
    api: str
    text: str
    layers: tuple[str, ...]
    right: Any
    wrong: Any
    edit: Edit | None = None
    loud: bool = False
    also: tuple[str, ...] = ()
    by: str = "layers"
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.kind, *self.also)

    def __str__(self) -> str:
        return f"{self.kind}: {self.model} {self.api}, {self.text}, seed {self.seed}"

    def is_layer(self, path: str, where: str = "out") -> bool:
        """Whether this Flax path is the layer to be named. What arrives wrong ('in') at a layer arrives so at the
        containers that begin with it: the outermost of these is called first."""
        for layer in self.layers:
            if path == layer or (layer.endswith("/**") and path.startswith(layer[:-2])):
                return True
            if where == "in" and path and layer.startswith(f"{path}/"):
                return True
        return False


# ---------------------------------------------------------------- edits


def at(path: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Edit:
    """The edit that changes one leaf; what it gives is another array of the leaf's shape and dtype."""

    def edit(arrays: Arrays, torch: Arrays) -> Arrays:
        new = np.ascontiguousarray(change(arrays[path]))
        assert new.shape == arrays[path].shape, (path, new.shape, arrays[path].shape)
        assert not np.array_equal(new, arrays[path]), f"{path}: the fault changes nothing"
        return {**arrays, path: new.astype(arrays[path].dtype)}

    return edit


def untransposed(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The square matrix, or the convolution of as many channels in as out, that was not transposed."""
    if kernel.ndim == 4:
        return kernel.swapaxes(2, 3)
    return kernel.T


def untransposed_heads(out: bool) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """(D, H, h) or (out) (H, h, D) of a square matrix that was cut into heads without being transposed."""

    def change(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        width = kernel.shape[-1] if out else kernel.shape[0]
        return kernel.reshape(width, width).T.reshape(kernel.shape)

    return change


def reshaped(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """torch's weight with the kernel's shape forced on it instead of being transposed."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1).reshape(kernel.shape)
    flat = kernel.reshape(kernel.shape[0], -1) if kernel.ndim == 3 else kernel
    return flat.T.reshape(kernel.shape)


def heads_inner(heads: int, axis: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Rows or columns read as (head_dim, heads) where they are (heads, head_dim). Kernels with split heads are
    (D, H, h) for axis 1, (H, h, D) for axis 0; others (D, H h) and (H h, D)."""

    def change(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        front, back = kernel.shape[:axis], kernel.shape[axis + (2 if kernel.ndim == 3 else 1) :]
        size = kernel.size // int(np.prod(front + back)) // heads
        return kernel.reshape(*front, size, heads, *back).swapaxes(axis, axis + 1).reshape(kernel.shape)

    return change


def flipped(*axes: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    return lambda kernel: np.flip(kernel, axes)


def spatial_swapped(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return kernel.swapaxes(0, 1)


def rounded(leaf: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return leaf.astype(ml_dtypes.bfloat16).astype(FLOAT32)


def swapped(first: str, second: str) -> Edit:
    """All leaves below two modules exchanged: 'params/a/' and 'params/b/', which are of equal shapes."""

    def edit(arrays: Arrays, torch: Arrays) -> Arrays:
        out = dict(arrays)
        pairs = [(path, second + path.removeprefix(first)) for path in arrays if path.startswith(first)]
        assert pairs, first
        for a, b in pairs:
            out[a], out[b] = arrays[b], arrays[a]
        return out

    return edit


def each(edits: Sequence[Edit]) -> Edit:
    def edit(arrays: Arrays, torch: Arrays) -> Arrays:
        for one in edits:
            arrays = one(arrays, torch)
        return arrays

    return edit
