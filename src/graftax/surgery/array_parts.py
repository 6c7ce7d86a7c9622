"""The part of an old leaf, as a user's function gets it and as NumPy values; packed types one code to a byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graftax.tree import LeafIndex, TensorSpec


def leaf_part(path: str, spec: TensorSpec, index: LeafIndex, old: Any, host: Callable[[], Any]) -> Any:
    """The part of the old leaf that a user's function gets: an array of the leaf's own kind, which it may change."""
    from graftax.adapters.containers import is_tensor
    from graftax.adapters.jax_arrays import to_jax
    from graftax.adapters.jax_parts import is_split

    if spec.packed:
        return host_part(path, spec, index, old, host).copy()
    if is_split(old):
        return to_jax(host_part(path, spec, index, old, host))
    if is_tensor(old):
        from graftax.adapters.torch_arrays import to_torch

        return to_torch(host_part(path, spec, index, old, host), old)
    return old[index.key] if type(old).__module__ != "numpy" else as_array(old[index.key]).copy()


def host_part(path: str, spec: TensorSpec, index: LeafIndex, old: Any, host: Callable[[], Any]) -> Any:
    """The values of a part of the old leaf as a NumPy array; packed types one code to a byte."""
    from graftax.adapters.jax_parts import is_split, read_part

    if is_split(old):
        return read_part(old, index.ranges(spec.shape), path).reshape(index.part_shape(spec.shape))
    return as_array(as_codes(host(), spec)[index.key])


def as_array(values: Any) -> Any:
    import numpy as np

    return np.asarray(values)


def as_codes(array: Any, spec: TensorSpec) -> Any:
    """The array, with one code to a byte if its dtype is packed."""
    from graftax.tree.dtypes import unpack

    array = as_array(array)
    as_bytes = spec.packed and array.dtype == "uint8" and array.shape == (spec.nbytes,)
    return unpack(array, spec) if as_bytes else array


def as_stored(array: Any, spec: TensorSpec) -> Any:
    """The array, as its bytes on disk if its dtype is packed."""
    from graftax.tree.dtypes import pack

    return pack(array, spec.bits) if spec.packed else array
