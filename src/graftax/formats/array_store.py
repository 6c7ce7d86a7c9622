"""Read the arrays of an Orbax item, and of formats older than Orbax, through tensorstore on the host. They are zarr
arrays, in an OCDBT database or in one folder each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, FormatError, UnsafeInputError, UsageError, escape
from graftax.formats.io import files
from graftax.formats.orbax_tree import OrbaxTree
from graftax.tree import DTYPES, Key, TensorSpec, join_path

if TYPE_CHECKING:
    import numpy as np


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise UsageError(
            "reading the arrays of an Orbax checkpoint needs tensorstore", next="pip install orbax-checkpoint"
        ) from error
    return tensorstore


def _spec(item: Path, tree: OrbaxTree, name: str) -> dict[str, Any]:
    """The tensorstore spec of an array."""
    folder = os.path.abspath(item)
    if tree.ocdbt:
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    else:
        if "\0" in name or "\\" in name or any(part in {"", ".", ".."} for part in name.split("/")):
            raise UnsafeInputError(f"{escape(item)} names the folder {escape(name)!r}")
        store = {"driver": "file", "path": f"{folder}/{name}/"}
    driver = "zarr3" if tree.zarr3 else "zarr"
    return {"driver": driver, "kvstore": store, "fill_missing_data_reads": not tree.complete}


def opened(item: Path, tree: OrbaxTree, names: list[str]) -> Iterator[Any]:
    """The stores of these arrays. FormatError for an array that is missing or damaged."""
    ts = _tensorstore()
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
    specs = [_spec(item, tree, name) for name in names]
    pending = [ts.open(ts.Spec(spec), open=True, read=True, context=context) for spec in specs]
    for name, future in zip(names, pending, strict=True):
        try:
            yield future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise _damaged(item, name, error) from error


def _damaged(item: Path, name: str, error: Exception) -> FormatError:
    text = str(error).partition(" [")[0]
    return FormatError(f"{escape(item)}: the array {escape(name)} is missing or damaged", next=escape(text, 300))


def stores(item: Path, tree: OrbaxTree) -> dict[tuple[Key, ...], tuple[TensorSpec, int]]:
    """keys -> (spec, bytes that reading needs) of every leaf."""
    out: dict[tuple[Key, ...], tuple[TensorSpec, int]] = {}
    wrong: list[Failure] = []
    for leaf, store in zip(tree.leaves, opened(item, tree, [leaf.name for leaf in tree.leaves]), strict=True):
        dtype = str(store.dtype.name)
        if dtype not in DTYPES:
            wrong.append(Failure(f"unsupported dtype {escape(dtype)}", key=join_path(leaf.keys)))
            continue
        spec = TensorSpec(tuple(int(n) for n in store.shape), dtype)
        layout = store.chunk_layout
        need = spec.nbytes
        for chunk in (layout.read_chunk.shape, layout.write_chunk.shape):
            need = max(need, TensorSpec(tuple(int(n) for n in chunk), dtype).nbytes if chunk else 0)
        out[leaf.keys] = spec, need
    if wrong:
        raise FormatError(f"{escape(item)}: {len(wrong)} arrays cannot be read", wrong)
    return out


def read(item: Path, tree: OrbaxTree, name: str, spec: TensorSpec) -> np.ndarray[Any, Any]:
    import numpy as np

    from graftax.tree.dtypes import spec_of, storage_bytes

    (store,) = opened(item, tree, [name])
    try:
        array = np.ascontiguousarray(store.read().result()).reshape(spec.shape)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise _damaged(item, name, error) from error
    if spec_of(array) != spec:
        raise files.changed(item)
    return storage_bytes(array, spec) if spec.packed else array
