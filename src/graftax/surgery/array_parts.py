"""The old values of a place, as a user's function gets them and as NumPy values; packed types one code to a byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graftax.adapters.containers import is_tensor
from graftax.adapters.jax_arrays import to_jax
from graftax.adapters.jax_parts import is_split, read_part
from graftax.surgery.places import Place
from graftax.tree import TensorSpec


def own_copy(leaf: Any) -> Any:
    """The old leaf for a user's function: a copy if it could be changed in place."""
    if is_tensor(leaf):
        return leaf.detach().clone()
    return leaf.copy() if type(leaf).__module__ == "numpy" else leaf


def own_part(place: Place, old: Any, host: Callable[[], Any]) -> Any:
    """What a user's function gets of the old leaf `old`: an array of the leaf's own kind, which it may change."""
    if place.index is None:
        return own_copy(old)
    if place.leaf.packed:
        return host_part(place, old, host).copy()
    if is_split(old):
        return to_jax(host_part(place, old, host))
    if is_tensor(old):
        from graftax.adapters.torch_arrays import to_torch

        return to_torch(host_part(place, old, host), old)
    part = old[place.index.key]
    return part if type(old).__module__ != "numpy" else as_array(part).copy()


def host_part(place: Place, old: Any, host: Callable[[], Any]) -> Any:
    """The old values as a NumPy array; those of a part with packed types one code to a byte. host: gives those of the
    whole leaf."""
    if place.index is None:
        return host()
    shape = place.leaf.shape
    if is_split(old):
        return read_part(old, place.index.ranges(shape), place.path).reshape(place.index.part_shape(shape))
    return as_array(as_codes(host(), place.leaf)[place.index.key])


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
