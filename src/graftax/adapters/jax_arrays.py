"""Arrays between NumPy and jax. The dtype never changes, and writable memory is never shared.

Ownership: a result never shares memory with its input. The exception is `adopt`, with which a caller gives its arrays
away: an array that is writable and is the only user of its memory is then used without a copy. Readers of live objects
return read-only views, which are copied even then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graftax.errors import PlanError, UsageError
from graftax.tree import TensorSpec, dtypes

if TYPE_CHECKING:
    import numpy as np


def to_jax(array: Any, like: Any = None, *, adopt: bool = False) -> Any:
    """`array` as a jax array of the same dtype, placed as `like` is (a jax.Array, or a ShapeDtypeStruct with a
    sharding; else on the default device).

    A dtype that jax would narrow (int64, uint64, float64, complex128, unless jax_enable_x64 is set) stays a NumPy array
    on the host. The result never shares memory with `array`, unless the caller gives it away with `adopt`.
    """
    import jax
    import numpy as np

    if is_tracer(array):
        return array
    if isinstance(array, jax.Array):
        return _placed(array, like)
    host = own(np.asarray(array), adopt)
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        return host
    host.flags.writeable = False  # jax may use this memory
    return _placed(host, like)


def all_to_jax(arrays: Mapping[str, Any], shardings: Mapping[str, Any], given: Callable[[Any], bool]) -> dict[str, Any]:
    """As `to_jax` for each of `arrays`, with as few jax calls as possible: on the device of the sharding with its name,
    or on jax's default device. given: whether an array is given away (see `once`)."""
    import jax
    import numpy as np

    out: dict[str, Any] = {}
    wide: dict[Any, bool] = {}
    loose: list[str] = []
    bound: list[str] = []
    for name, array in arrays.items():
        out[name] = host = own(np.asarray(array), given(array))
        if host.dtype not in wide:
            wide[host.dtype] = jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype
        if not wide[host.dtype]:
            host.flags.writeable = False  # jax may use this memory
            (loose if shardings.get(name) is None else bound).append(name)
    out.update(zip(loose, jax.device_put([out[name] for name in loose]), strict=True))
    homes = [shardings[name] for name in bound]
    out.update(zip(bound, jax.device_put([out[name] for name in bound], homes), strict=True))
    return out


def once(adopt: bool) -> Callable[[Any], bool]:
    """A function that tells whether an array may be adopted: the caller allows it, and its memory was not given away
    before."""
    seen: set[int] = set()

    def given(array: Any) -> bool:
        interface = getattr(array, "__array_interface__", None)
        if not adopt or interface is None or interface["data"][0] in seen:
            return False
        seen.add(interface["data"][0])
        return True

    return given


def own(array: np.ndarray[Any, Any], adopt: bool = False) -> np.ndarray[Any, Any]:
    """`array` in C order, in the machine's byte order and in its own memory; `array` itself if `adopt` allows it."""
    import numpy as np

    if adopt and array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative and _alone(array):
        return array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)


def _alone(array: np.ndarray[Any, Any]) -> bool:
    """True if the array spans all of its memory."""
    import numpy as np

    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    held = len(base) if isinstance(base, bytearray) else getattr(base, "nbytes", -1)
    return held == array.nbytes


def _placed(array: Any, like: Any) -> Any:
    import jax

    sharding = None if is_tracer(like) else getattr(like, "sharding", None)
    if sharding is None or not isinstance(sharding, jax.sharding.Sharding):
        return jax.device_put(array)
    if isinstance(like, jax.Array) and not getattr(like, "committed", True):
        return jax.device_put(array)  # keep an uncommitted array uncommitted: it may move to where it is used
    return jax.device_put(array, sharding)


def to_host(leaf: Any, spec: TensorSpec, name: str = "") -> np.ndarray[Any, Any]:
    """The values of a NumPy or jax leaf as a read-only array, without a copy if possible; packed types as their bytes.
    PlanError for a leaf without values, UsageError for a leaf that this process cannot read."""
    import numpy as np

    if is_abstract(leaf):
        raise PlanError(f"{name or 'the leaf'} has a shape and a dtype, but no values")
    if getattr(leaf, "is_deleted", lambda: False)():
        raise UsageError(f"{name or 'the array'} was deleted (donated to a jitted function?)")
    if not getattr(leaf, "is_fully_addressable", True):
        raise UsageError(f"{name or 'the array'} has shards on other hosts; gather it before it is read here")
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if spec.packed:
        return dtypes.pack(array, spec.bits)
    view = array.view()
    view.flags.writeable = False
    return view


def from_storage(array: Any, spec: TensorSpec) -> Any:
    """The values of a packed tensor from its bytes, one byte per code; any other array unchanged."""
    packed = spec.packed and getattr(array, "ndim", 0) == 1 and str(array.dtype) == "uint8"
    return dtypes.unpack(array, spec) if packed else array


def is_abstract(leaf: Any) -> bool:
    """True for a shape and a dtype without values: jax.ShapeDtypeStruct, a tracer, or anything else that is not an
    array."""
    import numpy as np

    if isinstance(leaf, (np.ndarray, np.generic)):
        return False
    jax = sys.modules.get("jax")
    return jax is None or not isinstance(leaf, jax.Array) or is_tracer(leaf)


def is_tracer(leaf: Any) -> bool:
    """True for an array inside jit, grad or vmap, whose values are not known yet."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(leaf, jax.core.Tracer)
