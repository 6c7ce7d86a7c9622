"""Parts of jax arrays that lie on several devices: read and set shard by shard. Nothing else is gathered, and a shard
that no part reaches keeps its memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from graftax.adapters.jax_arrays import is_abstract
from graftax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

Ranges = Sequence[range]
"""The positions of a part on each axis of the leaf (`LeafIndex.ranges`)."""


def is_split(leaf: Any) -> bool:
    """True for a jax array with values on several devices."""
    return not is_abstract(leaf) and hasattr(leaf, "addressable_shards") and len(leaf.sharding.device_set) > 1


def read_part(leaf: Any, part: Ranges, name: str) -> np.ndarray[Any, Any]:
    """The values of a part of a split leaf, every axis kept. UsageError if a shard that it needs is on another host."""
    import numpy as np

    out = np.empty([len(positions) for positions in part], leaf.dtype)
    filled = 0
    for data in {str(shard.index): shard for shard in leaf.addressable_shards}.values():
        for inside, local in _meet(data, part):
            out[inside] = np.asarray(data.data[local])
            filled += out[inside].size
    if filled < out.size:
        raise UsageError(f"{name} has shards on other hosts; gather it before its values are read here")
    return out


def with_parts(leaf: Any, parts: Iterable[tuple[Ranges, np.ndarray[Any, Any]]]) -> Any:
    """A split leaf like `leaf` with other values in some parts, each array with every axis kept."""
    import jax
    import numpy as np

    given = list(parts)
    shards: list[Any] = []
    for shard in leaf.addressable_shards:
        host: np.ndarray[Any, Any] | None = None
        for part, values in given:
            for inside, local in _meet(shard, part):
                host = np.array(shard.data) if host is None else host
                host[local] = values[inside]
        data = shard.data if host is None else jax.device_put(host, shard.data.sharding)
        shards.append(data)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards, dtype=leaf.dtype)


def traced_with_part(leaf: Any, key: Any, part: Any) -> Any:
    """The leaf with another part, where either is traced. Gradients flow through both."""
    import jax.numpy as jnp

    return jnp.asarray(leaf).at[key].set(part)


def _meet(shard: Any, part: Ranges) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """(where in the part, where in the shard) the elements lie that both have, if there are any."""
    inside: list[slice] = []
    local: list[slice] = []
    for positions, edges in zip(part, shard.index, strict=True):
        low = edges.start or 0
        hits = [i for i, at in enumerate(positions) if low <= at and (edges.stop is None or at < edges.stop)]
        if not hits:
            return
        inside.append(slice(hits[0], hits[-1] + 1))
        first, last = positions[hits[0]] - low, positions[hits[-1]] - low
        stop = last + (1 if positions.step > 0 else -1)
        local.append(slice(first, None if stop < 0 else stop, positions.step))
    yield tuple(inside), tuple(local)
