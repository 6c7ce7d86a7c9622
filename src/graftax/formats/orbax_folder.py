"""Orbax checkpoints: the folder of one tree, a step of a CheckpointManager, or a manager's root with one step.

They are read through tensorstore, which Orbax itself stores arrays with: leaf by leaf, on the host, without jax, and
without the devices or sharding that they were saved with. Names come from the `_METADATA` of the tree.

Layouts (orbax-checkpoint 0.5 to 0.12): ITEM/_METADATA describes the tree; the arrays are zarr (version 2 or 3), named
by their keys joined by '.', in an OCDBT database (manifest.ocdbt) or in folders of their own. STEP/_CHECKPOINT_METADATA
stands beside its items' folders, ROOT holds the steps' folders. A folder that is being written has
`.orbax-checkpoint-tmp` in its name.

What graftax wrote has graftax.json in it: the order and SHA-256 of every leaf, and the keys and containers that Orbax
forgets. Orbax itself keeps no checksum of values: a flipped bit in another checkpoint is not noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, FormatError, PlanError, UnsafeInputError, UsageError, escape
from graftax.formats import beside, files, orbax_write, strict_json, tree_meta
from graftax.formats.limits import check_limit
from graftax.formats.orbax_tree import OCDBT, TREE, Tree, read_tree, real_keys, unfinished, unwrapped, without_random
from graftax.formats.source import check_ratio
from graftax.tree import DTYPES, Checkpoint, Key, TensorSpec, join_path, natural_key

if TYPE_CHECKING:
    import numpy as np

TEMPORARY = ".orbax-checkpoint-tmp"
STEP, OURS = "_CHECKPOINT_METADATA", orbax_write.MANIFEST
_STEP_NAME = re.compile(r"(?:.*_)?(\d+)")
_OWN_FILES = {TREE, STEP, OCDBT, OURS, "_sharding", "_strings.json", "commit_success.txt", "descriptor.pbtxt"}
_OWN_FOLDERS = re.compile(r"d|ocdbt\.process_.*|ocdbt_(data|meta)|array_metadatas|descriptor")

write = orbax_write.write
storage_fault = orbax_write.storage_fault


# ---------------------------------------------------------------- finding the tree


def sniff(path: Path, head: bytes) -> bool:
    """A folder with one of Orbax's own files, or with steps or items in it that have one; also an unfinished one."""
    if head or not os.path.isdir(path):
        return False
    if TEMPORARY in path.name or _marked(path) or os.path.exists(path / OCDBT):
        return True
    return any(TEMPORARY in child.name or _marked(child) for child in _folders(path))


def open(path: Path) -> Checkpoint:
    """The tree in the folder. Random keys (and their counters) are no weights: they are listed in the metadata, as are
    text, None and empty containers. The `value` level of an NNX State is taken away, and its list indices are numbers.

    Raises FormatError where it is unfinished or malformed, PlanError where it holds several steps or items,
    UnsafeInputError where it leads out of its folder or passes a limit.
    """
    item = _locate(path)
    label = escape(item)
    tree = read_tree(item)
    stamps = {name: files.stamp(item / name) for name in (TREE, OCDBT) if os.path.exists(item / name)}
    own, size = _own_files(item, path, tree)
    ours = os.path.exists(item / OURS)  # then nothing is to be told from the look of the tree
    weights, notes = (tree, {}) if ours else without_random(item, tree)
    plain = tree if ours else unwrapped(weights)
    stores = _stores(item, plain)
    specs = {join_path(keys): spec for keys, (spec, _) in stores.items()}
    if len(specs) != len(stores):
        raise FormatError(f"{label} holds two leaves of one name")
    if not specs:
        raise FormatError(f"{label} holds no arrays", next=", ".join(tree.left)[:200])
    check_ratio("dense", sum(need for _, need in stores.values()), size, f"the arrays of {label} ask for too much")
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
        array = _read(item, plain, names[name], specs[name])
        if manifest is not None and not orbax_write.intact(array, specs[name], manifest.digests[name]):
            raise FormatError(f"{label}: {escape(name)} is damaged: it is not what graftax.json says was written")
        return array

    scalars = {join_path(leaf.keys): "a Python number" for leaf in plain.leaves if leaf.kind == "scalar"}
    return Checkpoint(
        label=str(path),
        side="flax",
        specs=specs,
        reader=reader,
        format="orbax",
        files=tuple(own),
        metadata=tree.left | notes | scalars,
        real_keys=keys,
        containers=containers,
    )


def _marked(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in (TREE, STEP))


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, in natural order; none where it cannot be read."""
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
    if os.path.isfile(path / TREE):
        return path
    folders = [child for child in _folders(path) if TEMPORARY not in child.name]
    steps = [child for child in folders if _STEP_NAME.fullmatch(child.name) and _marked(child)]
    if steps and not os.path.isfile(path / STEP):
        if len(steps) == 1:
            return _locate(steps[0])
        latest = max(steps, key=lambda child: int(_STEP_NAME.fullmatch(child.name)[1]))  # pyright: ignore
        raise PlanError(
            f"{escape(path)} holds {len(steps)} steps",
            [Failure("a step", file=str(child), key=str(child)) for child in steps],
            next=f"Name one; the latest is {escape(latest)}",
        )
    items = [child for child in folders if os.path.isfile(child / TREE)]
    weights = [child for child in items if not _beside(child.name)]
    if len(weights) == 1:
        return weights[0]
    if items:
        raise PlanError(
            f"{escape(path)} holds {len(items)} items",
            [Failure("an item", file=str(child), key=str(child)) for child in weights or items],
            next=f"Name one, for example {escape((weights or items)[0])}",
        )
    if os.path.exists(path / "checkpoint"):
        raise FormatError(
            f"{escape(path)} is of Orbax before 0.5, whose arrays are in one file",
            next="Open that file: its name is 'checkpoint', and it is msgpack.",
        )
    raise unfinished(path, f"it has no {TREE}")


def _beside(name: str) -> bool:
    return name.lower() == "opt" or bool(beside.family(name))


def _check_committed(path: Path) -> None:
    found = strict_json.parse_object(files.read_whole(path / STEP), escape(path / STEP))
    if found.get("init_timestamp_nsecs") is not None and found.get("commit_timestamp_nsecs") is None:
        raise unfinished(path, f"{STEP} has no time of its commit")


def _own_files(item: Path, path: Path, tree: Tree) -> tuple[list[Path], int]:
    """The files of the checkpoint from `path` down, and their bytes. UnsafeInputError where a link leads out."""
    root = os.path.realpath(path)
    own: list[Path] = []
    total = 0
    arrays = set() if tree.ocdbt else {leaf.name.partition("/")[0] for leaf in tree.leaves}
    step = path
    while True:  # the levels above the item: root, step
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
            raise UnsafeInputError(f"{escape(path)} leads out of itself: {escape(file)} is a link to {escape(real)}")
        total += os.path.getsize(file) if os.path.isfile(file) else 0
    return own, total


@dataclass(frozen=True, slots=True)
class _Manifest:
    digests: dict[str, Any]
    real_keys: dict[str, Key]
    containers: dict[str, str]


def _manifest(item: Path, specs: Mapping[str, TensorSpec]) -> _Manifest:
    """graftax.json, which must list exactly the leaves that are there."""
    label = escape(item / OURS)
    found = strict_json.parse_object(files.read_whole(item / OURS), label)
    digests = found.get("sha256")
    if found.get("schema") != 1 or not isinstance(digests, dict):
        raise FormatError(f"{label} is not of schema 1", next="It was written by a newer graftax, or changed.")
    if set(digests) != set(specs):
        odd = sorted(set(digests) ^ set(specs))
        raise FormatError(f"{label} does not list the {len(specs)} leaves beside it", [Failure("differs", key=odd[0])])
    real_keys, containers = tree_meta.decode_tree(found, label)
    wrong = [name for name, digest in digests.items() if not orbax_write.is_digest(digest, specs[name])]
    if wrong:
        raise FormatError(f"{label}: {len(wrong)} digests are of no form", [Failure("no digest", key=wrong[0])])
    return _Manifest(digests, real_keys, containers)


# ---------------------------------------------------------------- tensorstore


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise UsageError(
            "reading an Orbax checkpoint takes tensorstore", next="pip install orbax-checkpoint"
        ) from error
    return tensorstore


def _spec(item: Path, tree: Tree, name: str) -> dict[str, Any]:
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


def _opened(item: Path, tree: Tree, names: list[str]) -> Iterator[Any]:
    """The stores of these arrays; FormatError for one that is not there or damaged."""
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


def _stores(item: Path, tree: Tree) -> dict[tuple[Key, ...], tuple[TensorSpec, int]]:
    """keys -> (spec, bytes that reading it takes) of every leaf."""
    out: dict[tuple[Key, ...], tuple[TensorSpec, int]] = {}
    wrong: list[Failure] = []
    for leaf, store in zip(tree.leaves, _opened(item, tree, [leaf.name for leaf in tree.leaves]), strict=True):
        dtype = str(store.dtype.name)
        if dtype not in DTYPES:
            wrong.append(Failure(f"dtype {escape(dtype)} is none that a checkpoint holds", key=join_path(leaf.keys)))
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


def _read(item: Path, tree: Tree, name: str, spec: TensorSpec) -> np.ndarray[Any, Any]:
    import numpy as np

    from graftax.dtypes import spec_of, storage_bytes

    (store,) = _opened(item, tree, [name])
    try:
        array = np.ascontiguousarray(store.read().result()).reshape(spec.shape)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise _damaged(item, name, error) from error
    if spec_of(array) != spec:
        raise files.changed(item)
    return storage_bytes(array, spec) if spec.packed else array
