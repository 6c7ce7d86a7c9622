"""Shared by the writers: tensors in any order, each exactly once, as their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, PlanError
from graftax.formats.base import Output
from graftax.tree import TensorSpec

if TYPE_CHECKING:
    import numpy as np


def refuse(output: Output, row: str, reason: dict[str, str]) -> None:
    """PlanError if `reason` (path -> why) is not empty: it lists what the format `row` cannot hold, and which formats
    can hold everything."""
    if not reason:
        return
    from graftax.formats.table import FORMATS, holders

    dtypes = {spec.dtype for spec in output.specs.values()}
    able = [name for name in FORMATS if name != row and all(name in holders(dtype, output.side) for dtype in dtypes)]
    raise PlanError(
        f"{row} cannot hold {len(reason)} of {len(output.specs)} leaves",
        [Failure(why, key=path, found=str(output.specs.get(path, ""))) for path, why in reason.items()],
        next=f"Formats that can: {', '.join(able)}." if able else "",
    )


def tensor_bytes(output: Output) -> Iterator[tuple[str, TensorSpec, np.ndarray[Any, Any]]]:
    """(path, spec, bytes in C order, little endian, as a flat uint8 array) as the tensors arrive.

    Raises FormatError if an array does not match its spec, PlanError if a path comes twice or not at all.
    """
    from graftax.tree.dtypes import storage_bytes

    due = dict.fromkeys(output.specs)
    for path, array in output.tensors:
        if path not in due:
            raise PlanError("a tensor came twice, or without a spec", [Failure("unexpected key", key=path)])
        del due[path]
        data = storage_bytes(array, output.specs[path])
        yield path, output.specs[path], data
        del array, data  # free them before the next is made
    if due:
        raise PlanError(f"{len(due)} tensors never came", [Failure("missing key", key=path) for path in due])


def byte_runs(output: Output) -> Iterator[tuple[str, TensorSpec, int, np.ndarray[Any, Any]]]:
    """(path, spec, start, bytes from `start` of the tensor on). Every tensor comes from front to end before the next.
    Tensors that are made on demand come in the order of `output.specs`, one tile at a time; then the bytes are valid
    until the next item is requested."""
    if output.tiles is None:
        for path, spec, data in tensor_bytes(output):
            yield path, spec, 0, data
        return
    for path, spec in output.specs.items():
        for tile in output.tiles.tiles(path, contiguous=True):
            yield path, spec, tile.start, tile.data[0]
        if not spec.nbytes:
            yield path, spec, 0, storage_of_nothing()
        output.tiles.done(path)


def storage_of_nothing() -> np.ndarray[Any, Any]:
    """The bytes of an empty tensor."""
    import numpy as np

    return np.empty(0, np.uint8)
