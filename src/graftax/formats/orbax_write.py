"""Writing Orbax checkpoints: with Orbax's own StandardCheckpointHandler, so that StandardCheckpointer().restore(path)
reads them, and with graftax.json beside, which holds what Orbax forgets.

Not the same bytes twice: Orbax writes the time of the commit, and OCDBT gives its data files random names. Names,
values and graftax.json are the same.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.formats import files, tree_meta
from graftax.formats.base import Output
from graftax.formats.writing import refuse, tensor_bytes
from graftax.tree import Key, TensorSpec, escape_part, nest, unescape_part

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "graftax.json"


def storage_fault(path: str, spec: TensorSpec) -> str | None:
    """Why Orbax cannot store such a leaf; None where it can."""
    if spec.packed and spec.dtype != "int4":
        return f"Orbax stores no {spec.dtype}"
    return "Orbax stores no arrays of size zero" if spec.size == 0 else None


def write(path: Path, output: Output) -> None:
    """The nested tree as one Orbax item at `path`, which must not exist. All tensors are in memory at once.

    Raises PlanError, before anything is written, for what Orbax would refuse midway or store wrongly: keys with '.'
    in them, numbers and text as keys of one dict, keys that are tuples or no text, arrays of size zero.
    """
    refuse(output, "orbax", _faults(output))
    import orbax.checkpoint as ocp

    from graftax.dtypes import from_storage, unpack

    arrays: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for name, spec, data in tensor_bytes(output):
        digests[name] = hashlib.sha256(data).hexdigest()  # pyright: ignore[reportArgumentType]
        arrays[name] = unpack(data, spec) if spec.packed else from_storage(data, spec)
    tree = _contained(nest({name: arrays[name] for name in output.specs}, output.real_keys), "", output.containers)
    with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(os.path.abspath(path), args=ocp.args.StandardSave(tree))
    done = path / "commit_success.txt"
    if done.exists():  # its presence counts; Orbax writes the staging path into it
        done.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    about = {
        "schema": 1,
        "format": "orbax",
        "sha256": {name: digests[name] for name in output.specs},
        **tree_meta.encode_tree(output.real_keys, output.containers),
    }
    try:
        with builtins.open(path / MANIFEST, "x", encoding="utf-8") as file:
            json.dump(about, file, indent=1, ensure_ascii=True)
            file.write("\n")
    except OSError as error:
        raise files.storage_error(error, path) from error


def digest(array: np.ndarray[Any, Any], spec: TensorSpec) -> str:
    """SHA-256 of a leaf's values: C order, little end first; of packed types their bytes."""
    from graftax.dtypes import storage_bytes

    return hashlib.sha256(storage_bytes(array, spec)).hexdigest()  # pyright: ignore[reportArgumentType]


def _faults(output: Output) -> dict[str, str]:
    """path -> why Orbax cannot hold it."""
    faults: dict[str, str] = {}
    if not output.specs:
        return {"": "Orbax stores no empty trees"}
    kinds: dict[str, set[type]] = {}
    for path, spec in output.specs.items():
        if (fault := storage_fault(path, spec)) is not None:
            faults[path] = fault
        prefix = ""
        for piece in path.split("/"):
            parent, prefix = prefix, f"{prefix}/{piece}" if prefix else piece
            key = output.real_keys.get(prefix, unescape_part(piece))
            kinds.setdefault(parent, set()).add(type(key))
            if (fault := _key_fault(key)) is not None:
                faults[path] = fault
    mixed = [f"{parent}/" if parent else "" for parent, found in kinds.items() if len(found) > 1]
    for path in output.specs:
        if any(path.startswith(prefix) for prefix in mixed):
            faults.setdefault(path, "numbers and text are keys of one dict, which Orbax cannot order")
    for path, kind in output.containers.items():
        if kind in ("list", "tuple"):
            items = _children(output.specs, path)
            if items != {str(i) for i in range(len(items))}:
                faults[path] = f"a {kind} with the items {', '.join(sorted(items))}"
    return faults


def _key_fault(key: Key) -> str | None:
    if isinstance(key, tuple):
        return "a key that is a tuple, which Orbax would make text of"
    if isinstance(key, str) and "." in key:
        return "a key with a '.' in it: Orbax joins keys by '.', and could not tell it from a nested one"
    if isinstance(key, str) and any("\ud800" <= char <= "\udfff" for char in key):
        return "a key that is no text (half of a surrogate pair)"
    return None


def _children(paths: Mapping[str, Any], prefix: str) -> set[str]:
    start = f"{prefix}/" if prefix else ""
    return {path[len(start) :].partition("/")[0] for path in paths if path.startswith(start)}


def _contained(node: Any, prefix: str, containers: Mapping[str, str]) -> Any:
    """The tree with lists and tuples where they were. A FrozenDict is a dict to Orbax."""
    if not isinstance(node, dict):
        return node
    start = f"{prefix}/" if prefix else ""
    below = {key: _contained(child, start + escape_part(key), containers) for key, child in node.items()}
    kind = containers.get(prefix)
    if kind not in ("list", "tuple"):
        return below
    items = [below[key] for key in sorted(below, key=int)]
    return items if kind == "list" else tuple(items)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that Orbax logs of its own settings; errors are raised, and are told by their exception."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
