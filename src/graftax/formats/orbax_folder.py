"""Orbax checkpoints: the folder of one tree, a step of a CheckpointManager, or a manager's root with one step.

They are read through tensorstore, which Orbax itself uses to store arrays: leaf by leaf, on the host, without jax, and
without the devices or sharding of the run that saved them. Names come from the `_METADATA` of the tree.

Layouts (orbax-checkpoint 0.5 to 0.12): ITEM/_METADATA describes the tree. The arrays are zarr (version 2 or 3), named
by their keys joined by '.', in an OCDBT database (manifest.ocdbt) or in one folder each. STEP/_CHECKPOINT_METADATA
stands beside the folders of the step's items; ROOT holds the folders of the steps. A folder that is still being written
has `.orbax-checkpoint-tmp` in its name. Before 0.5 (and in T5X) an item has a msgpack file `checkpoint` instead of
_METADATA, and a folder for each array that is not in this file: see `aside`.

A checkpoint that graftax wrote has graftax.json in it: the order and SHA-256 of every leaf, and the keys and containers
that Orbax does not keep. Orbax itself keeps no checksum of values: a flipped bit in another checkpoint goes unnoticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, FormatError, PlanError, StorageError, UnsafeInputError, escape
from graftax.formats import array_store, msgpack_file, orbax_write, tree_meta
from graftax.formats.io import files, strict_json
from graftax.formats.io.source import check_ratio
from graftax.formats.orbax_tree import (
    OCDBT,
    TREE,
    OrbaxTree,
    read_tree,
    real_keys,
    unfinished,
    unwrapped,
    without_random,
)
from graftax.tree import Checkpoint, Key, Storage, TensorSpec, join_path, natural_key
from graftax.tree.limits import check_limit
from graftax.tree.training_state import family
from graftax.tree.training_tree import is_optimizer_name

if TYPE_CHECKING:
    import numpy as np

TEMPORARY = ".orbax-checkpoint-tmp"
STEP, OURS, OLD = "_CHECKPOINT_METADATA", orbax_write.MANIFEST, "checkpoint"
_STEP_NAME = re.compile(r"(?:.*_)?(\d+)")
_OWN_FILES = {TREE, STEP, OCDBT, OURS, "_sharding", "_strings.json", "commit_success.txt", "descriptor.pbtxt"}
_OWN_FOLDERS = re.compile(r"d|ocdbt\.process_.*|ocdbt_(data|meta)|array_metadatas|descriptor")

write = orbax_write.write
storage_fault = orbax_write.storage_fault


# ---------------------------------------------------------------- finding the tree


def sniff(path: Path, head: bytes) -> bool:
    """True for a folder with one of Orbax's own files, or with steps or items that have one; also for an unfinished
    checkpoint."""
    if head or not os.path.isdir(path):
        return False
    if TEMPORARY in path.name or _marked(path) or os.path.exists(path / OCDBT):
        return True
    return any(TEMPORARY in child.name or _marked(child) or _is_step(child) for child in _folders(path))


def open(path: Path) -> Checkpoint:
    """The tree in the folder. Random keys (and their counters) are not weights: they are listed in the metadata, as are
    text, None and empty containers. The `value` level of an NNX State is removed, and its list indices become numbers.

    Raises FormatError if the checkpoint is unfinished or malformed, PlanError if it holds several steps or items,
    UnsafeInputError if it leads out of its folder or exceeds a limit.
    """
    item = _locate(path)
    if _old(item):
        found = msgpack_file.open(item / OLD)
        return replace(found, label=str(path), storage=replace(found.storage, format="orbax"))
    label = escape(item)
    tree = read_tree(item)
    stamps = {name: files.stamp(item / name) for name in (TREE, OCDBT) if os.path.exists(item / name)}
    own, size = _own_files(item, path, tree)
    ours = os.path.exists(item / OURS)  # then the tree needs no interpretation
    weights, notes = (tree, {}) if ours else without_random(item, tree)
    plain = tree if ours else unwrapped(weights)
    stores = array_store.stores(item, plain)
    specs = {join_path(keys): spec for keys, (spec, _) in stores.items()}
    if len(specs) != len(stores):
        raise FormatError(f"{label} holds two leaves of one name")
    if not specs:
        raise FormatError(f"{label} holds no arrays", next=", ".join(tree.left)[:200])
    check_ratio("dense", sum(need for _, need in stores.values()), size, f"the arrays of {label} need too much memory")
    manifest = _manifest(item, specs) if ours else None
    names = {join_path(leaf.keys): leaf.name for leaf in plain.leaves}
    keys, containers = real_keys(plain, plain is not weights), plain.containers
    if manifest is not None:
        keys, containers = manifest.real_keys, manifest.containers
        specs = {name: specs[name] for name in manifest.digests}

    def reader(name: str) -> np.ndarray[Any, Any]:
        for file, stamp in stamps.items():
            if files.stamp(item / file) != stamp:
                raise files.changed(item / file)
        array = array_store.read(item, plain, names[name], specs[name])
        if manifest is not None and not orbax_write.intact(array, specs[name], manifest.digests[name]):
            raise FormatError(f"{label}: {escape(name)} is damaged: it does not match graftax.json")
        return array

    from graftax.formats.by_content import config_of

    config = config_of(path)
    scalars = {join_path(leaf.keys): "a Python number" for leaf in plain.leaves if leaf.kind == "scalar"}
    return Checkpoint(
        label=str(path),
        side="flax",
        specs=specs,
        storage=Storage(
            reader=reader,
            format="orbax",
            files=tuple(own),
            metadata=tree.left | notes | scalars,
            folder=None if config is None else path,
        ),
        left=notes | _other_items(item, path),
        real_keys=keys,
        containers=containers,
        config=config,
    )


def _marked(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in (TREE, STEP)) or _old(path)


def _old(path: Path) -> bool:
    """True for an item of Orbax before 0.5, or of T5X."""
    try:
        return not os.path.isfile(path / TREE) and msgpack_file.sniff(path / OLD, files.read_head(path / OLD))
    except StorageError:
        return False


def _is_step(path: Path) -> bool:
    """True for a step of a manager. Old steps contain only the folders of their items."""
    return bool(_STEP_NAME.fullmatch(path.name)) and (_marked(path) or any(map(_old, _folders(path))))


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, in natural order; none if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            found = [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda child: natural_key(child.name))


def _locate(path: Path) -> Path:
    """The folder of the one tree in `path`."""
    if TEMPORARY in Path(os.path.abspath(path)).name:
        raise unfinished(path, "its name says so")
    if os.path.isfile(path / STEP):
        _check_committed(path)
    if os.path.isfile(path / TREE) or _old(path):
        return path
    folders = [child for child in _folders(path) if TEMPORARY not in child.name]
    steps = steps_in(path)
    if steps:
        if len(steps) == 1:
            return _locate(steps[0])
        latest = max(steps, key=lambda child: int(_STEP_NAME.fullmatch(child.name)[1]))  # pyright: ignore
        raise PlanError(
            f"{escape(path)} holds {len(steps)} steps",
            [Failure("a step", file=str(child), key=str(child)) for child in steps],
            next=f"Name one; the latest is {escape(latest)}",
        )
    items = [child for child in folders if os.path.isfile(child / TREE) or _old(child)]
    weights = [child for child in items if not _is_state(child.name)]
    if len(weights) == 1:
        return weights[0]
    if items:
        raise PlanError(
            f"{escape(path)} holds {len(items)} items",
            [Failure("an item", file=str(child), key=str(child)) for child in weights or items],
            next=f"Name one, for example {escape((weights or items)[0])}",
        )
    raise unfinished(path, f"it has no {TREE}")


def steps_in(path: Path) -> list[Path]:
    """The folders of a CheckpointManager's steps; none in a step itself."""
    if os.path.isfile(path / STEP):
        return []
    folders = [child for child in _folders(path) if TEMPORARY not in child.name]
    return [child for child in folders if _is_step(child)]


def _is_state(name: str) -> bool:
    """True if an item of this name is training state."""
    return is_optimizer_name(name) or bool(family(name))


def _other_items(item: Path, path: Path) -> dict[str, str]:
    """The other items with trees beside the one that is read; empty if the user named the item itself."""
    if item == path:
        return {}
    beside = [child.name for child in _folders(item.parent) if child != item and os.path.isfile(child / TREE)]
    return {name: "an item of the checkpoint" for name in beside if _is_state(name)}


def _check_committed(path: Path) -> None:
    found = strict_json.parse_object(files.read_whole(path / STEP), escape(path / STEP))
    if found.get("init_timestamp_nsecs") is not None and found.get("commit_timestamp_nsecs") is None:
        raise unfinished(path, f"{STEP} has no commit time")


def _own_files(item: Path, path: Path, tree: OrbaxTree) -> tuple[list[Path], int]:
    """The files of the checkpoint from `path` down, and their total bytes. UnsafeInputError if a link leads out."""
    root = os.path.realpath(path)
    own: list[Path] = []
    total = 0
    arrays = set() if tree.ocdbt else {leaf.name.partition("/")[0] for leaf in tree.leaves}
    step = path
    while True:  # the levels above the item: step, root
        own += [Path(entry.path) for entry in os.scandir(step) if entry.name in _OWN_FILES and entry.is_file()]
        if step == item:
            break
        step = step / os.path.relpath(item, step).partition(os.sep)[0]
    for entry in os.scandir(item):
        if entry.is_dir() and (_OWN_FOLDERS.fullmatch(entry.name) or entry.name in arrays):
            for here, folders, names in os.walk(entry.path):
                own += [Path(here, name) for name in names]
                own += [Path(here, name) for name in folders if os.path.islink(os.path.join(here, name))]
                check_limit("leaves", len(own), escape(path))
    for file in own:
        real = os.path.realpath(file)
        if not real.startswith(root + os.sep):
            raise UnsafeInputError(
                f"{escape(path)} must not link out of its folder: {escape(file)} is a link to {escape(real)}"
            )
        total += os.path.getsize(file) if os.path.isfile(file) else 0
    return own, total


@dataclass(frozen=True, slots=True)
class _Manifest:
    digests: dict[str, Any]
    real_keys: dict[str, Key]
    containers: dict[str, str]


def _manifest(item: Path, specs: Mapping[str, TensorSpec]) -> _Manifest:
    """graftax.json, which must list exactly the existing leaves."""
    label = escape(item / OURS)
    found = strict_json.parse_object(files.read_whole(item / OURS), label)
    digests = found.get("sha256")
    if found.get("schema") != 1 or not isinstance(digests, dict):
        raise FormatError(f"{label} is not of schema 1", next="A newer graftax wrote it, or it was changed.")
    if set(digests) != set(specs):
        odd = sorted(set(digests) ^ set(specs))
        raise FormatError(f"{label} does not list the {len(specs)} leaves beside it", [Failure("differs", key=odd[0])])
    real_keys, containers = tree_meta.decode_tree(found, label)
    wrong = [name for name, digest in digests.items() if not orbax_write.is_digest(digest, specs[name])]
    if wrong:
        raise FormatError(f"{label}: {len(wrong)} digests are malformed", [Failure("no digest", key=wrong[0])])
    return _Manifest(digests, real_keys, containers)
