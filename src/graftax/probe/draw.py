"""The calls of both models, and other inputs of the same shapes and ranges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import UsageError, escape
from graftax.probe.flax_side import input_arrays, is_flax
from graftax.probe.inputs import Call, Inputs, calls_of, with_example


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


def check_finite(calls: tuple[Call, Call]) -> None:
    """UsageError for inputs that are not finite: every value that they make is equal to every other."""
    for call in calls:
        for path, array in nests.leaves(call, nests.is_array):
            plain = np.asarray(array)
            if plain.dtype.kind == "f" and not np.isfinite(plain).all():
                raise UsageError(f"the input {escape(path)} is not finite (NaN or infinite values)")


def calls_to_try(module: Any, model: Any, inputs: Inputs | None) -> Iterator[tuple[Call, Call]]:
    """Pairs of calls (the source's, the like's) to try: the given ones, or those that an example allows."""
    if inputs is not None:
        theirs, ours = calls_of(inputs, model, None if is_flax(module) else module)
        yield with_example(theirs, module), ours
        return
    if is_flax(module):
        brings = next((m for m in (model, module) if isinstance(m, LinenModel)), None)
        if brings is not None:
            call: Call = nests.mapped((brings.args, dict(brings.kwargs)), nests.is_array, _drawn)
            yield call, call
        return
    if not isinstance(model, LinenModel):
        return
    example: Call = nests.mapped((model.args, dict(model.kwargs)), nests.is_array, _drawn)
    arrays = [array for _, array in nests.leaves(example[0], nests.is_array)]
    maps = {rank for rank in (array.ndim for array in arrays if array.dtype.kind == "f") if rank >= 3}
    ways: list[dict[int, int]] = [{rank: 1 for rank in maps if rank > 3}, {}, dict.fromkeys(maps, 1)]
    if 5 in maps:
        ways.append({5: 2})  # frames, then channels
    for n, moved in enumerate(ways):
        if moved in ways[:n]:
            continue

        def first(array: Any, moved: dict[int, int] = moved) -> Any:
            held = array.ndim in moved and array.dtype.kind == "f"
            return np.moveaxis(array, -1, moved[array.ndim]) if held else array

        args, kwargs = nests.mapped(example, nests.is_array, first)
        named = {name: value for name, value in kwargs.items() if nests.is_array(value)}
        yield (tuple(a for a in args if not isinstance(a, (bool, str))), named), example


def _drawn(array: Any) -> Any:
    """An example input with values: noise for floats and for shapes alone, two items where there is one."""
    shape = tuple(array.shape)
    if shape and shape[0] == 1:
        shape = (2, *shape[1:])
    dtype = np.dtype(array.dtype)
    if dtype.kind == "f" or "float" in dtype.name:
        return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
    if hasattr(array, "__array__"):
        return np.ascontiguousarray(np.broadcast_to(np.asarray(array), shape))
    return np.zeros(shape, dtype)


def redrawn(torch_call: Call, flax_call: Call, seed: int, ids: int | None) -> tuple[Call, list[Any]]:
    """Both calls with other arrays of the same shapes and ranges: torch's nest, Flax's arrays. Arrays of the two sides
    that hold the same values are redrawn together; an array that has no counterpart stays as it is."""
    theirs = [array for _, array in nests.leaves(torch_call, nests.is_array)]
    new = list(theirs)
    ours = [np.asarray(array) for array in input_arrays(*flax_call)]
    left = list(range(len(theirs)))
    out: list[Any] = []
    for array in ours:
        pairs = ((n, axes_between(theirs[n], array)) for n in left)
        n, axes = next(((n, axes) for n, axes in pairs if axes is not None), (-1, None))
        if axes is None:
            out.append(array)
            continue
        left.remove(n)
        new[n] = drawn_like(theirs[n], seed + 17 * n, ids)
        out.append(np.asarray(new[n]).transpose(axes).astype(array.dtype))
    return nests.rebuilt(torch_call, nests.is_array, new), out
