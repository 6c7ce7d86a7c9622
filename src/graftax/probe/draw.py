"""Draw inputs: other values of the same shapes and ranges."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


def drawn_like(array: Any, seed: int, ids: int | None = None) -> Any:
    """Another input of the same shape, dtype and range. Flags, and integers with two values at most (masks), stay as
    they are, unless they are all zero and `ids` says how many ids there are."""
    plain = np.asarray(array)
    random = np.random.default_rng(seed)
    if plain.dtype.kind == "f" or "float" in plain.dtype.name:
        wide = plain.astype(np.float64)
        low, high = (float(wide.min()), float(wide.max())) if wide.size else (0.0, 0.0)
        made = random.standard_normal(plain.shape)
        if high > low:
            made = random.uniform(low, high, plain.shape) if low >= 0 else wide.mean() + wide.std() * made
        return made.astype(plain.dtype)
    if plain.dtype.kind in "iu" and plain.size:
        if len(np.unique(plain)) > 2:
            return random.integers(plain.min(), plain.max() + 1, plain.shape).astype(plain.dtype)
        if ids is not None and not plain.any():
            return random.integers(0, ids, plain.shape).astype(plain.dtype)
    return plain


def axes_between(one: Any, other: Any) -> tuple[int, ...] | None:
    """The permutation of axes that makes `other` of `one`; None if there is none."""
    a, b = np.asarray(one), np.asarray(other)
    if a.ndim != b.ndim or sorted(a.shape) != sorted(b.shape):
        return None
    for axes in itertools.permutations(range(a.ndim)):
        turned = a.transpose(axes)
        if turned.shape == b.shape and np.array_equal(turned, b):
            return axes
    return None
