"""Write Orbax checkpoints with Orbax's own handlers, so that StandardCheckpointer().restore(path) reads them.
graftax.json beside them holds what Orbax does not keep.

The bytes differ from run to run: Orbax writes the commit time, and OCDBT gives its data files random names. Names,
values and graftax.json are the same.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.formats import tree_meta
from graftax.formats.base import Output, Tiles
from graftax.formats.io import system
from graftax.formats.orbax_quiet import finished
from graftax.formats.orbax_tree import TREE
from graftax.formats.writing import refuse, tensor_bytes
from graftax.tree import Key, TensorSpec, escape_part, nest, unescape_part

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "graftax.json"


def storage_fault(path: str, spec: TensorSpec) -> str | None:
    """The reason why Orbax cannot store such a leaf; None if it can."""
    if spec.packed and spec.dtype != "int4":
        return f"Orbax cannot store {spec.dtype}"
    return "Orbax cannot store arrays of size zero" if spec.size == 0 else None


def write(path: Path, output: Output) -> None:
    """Write the nested tree as one Orbax item at `path`, which must not exist. Tensors that are made on demand are in
    memory a few at a time.

    Raises PlanError, before anything is written, for what Orbax would refuse midway or store wrongly: keys that contain
    '.', a dict with both numbers and text as keys, keys that are tuples or other non-text, arrays of size zero.
    """
    check(output)
    digests: dict[str, Pieces] = {}
    tiles = output.tiles
    made = {name: data for name, _, data in tensor_bytes(output)} if tiles is None else {}

    def make(name: str) -> np.ndarray[Any, Any]:
        spec = output.specs[name]
        data = made.pop(name) if tiles is None else _bytes(tiles, name, spec)
        digests[name] = {_whole(spec): _sha256(data)}
        return _leaf(data, spec)

    finished(lambda: _save_few(path, output, make))
    finish(path, output, digests)


def _bytes(tiles: Tiles, name: str, spec: TensorSpec) -> np.ndarray[Any, Any]:
    import numpy as np

    data = np.empty(spec.nbytes, np.uint8)
    for tile in tiles.tiles(name, contiguous=True):
        data[tile.start : tile.start + tile.data.shape[1]] = tile.data[0]
    tiles.done(name)
    return data


@dataclass(frozen=True, slots=True, eq=False)
class _Due:
    """A leaf as Orbax sees it before it is made."""

    name: str
    nbytes: int


_AT_ONCE = 16 << 20
"""Bytes of leaves that Orbax is given together: each commit costs two small files."""


def _few(sizes: Sequence[int]) -> Iterator[slice]:
    """Slices of the leaves, each of up to _AT_ONCE bytes or of one leaf."""
    start = held = 0
    for place, size in enumerate(sizes):
        if place > start and held + size > _AT_ONCE:
            yield slice(start, place)
            start, held = place, 0
        held += size
    yield slice(start, len(sizes))


def _save_few(path: Path, output: Output, make: Callable[[str], np.ndarray[Any, Any]]) -> None:
    """Write Orbax's own part of the checkpoint. Orbax takes all leaves at once and copies them; this handler makes a
    few at a time, when those before them are written."""
    import orbax.checkpoint as ocp

    class FewAtOnce(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            args = args or [ocp.SaveArgs()] * len(values)
            for few in _few([value.nbytes for value in values]):
                arrays = [make(value.name) for value in values[few]]
                for commit in await super().serialize(arrays, infos[few], args[few]):
                    commit.result()
            return []

    due = {name: _Due(name, spec.nbytes) for name, spec in output.specs.items()}
    known = ocp.type_handlers.create_type_handler_registry((_Due, FewAtOnce()))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=known)) as checkpointer:
        checkpointer.save(os.path.abspath(path), args=ocp.args.PyTreeSave(_tree(output, due)))


def check(output: Output) -> None:
    """PlanError for what Orbax would refuse midway or store wrongly."""
    refuse(output, "orbax", _faults(output))


def save_shared(
    path: Path,
    output: Output,
    arrays: Mapping[str, Any],
    processes: int,
    run_jointly: Callable[[Callable[[], None]], None],
) -> Callable[[], None]:
    """Write Orbax's own part of the checkpoint. Called by all `processes` of a job; the arrays are spread over their
    devices. Each process writes its parts inside `run_jointly`, which raises an error of one process in all of them.
    Returns the action that the first process must run afterwards to join the parts.

    Orbax waits for all processes before and after it writes, for many minutes if necessary. So an error in one process
    must reach the others before they wait. This is why the caller runs Orbax's last step, which only the first process
    does.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    shared = ocp.options.MultiprocessingOptions(
        active_processes=set(range(processes)), barrier_sync_key_prefix=path.parent.name
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=shared)
    save, finalize = handler.save, handler.finalize

    def save_jointly(*args: Any, **more: Any) -> None:
        run_jointly(lambda: save(*args, **more))

    handler.save = save_jointly
    handler.finalize = lambda directory: None

    def write_shared() -> None:
        with ocp.Checkpointer(handler, multiprocessing_options=shared) as checkpointer:
            checkpointer.save(os.path.abspath(path), args=ocp.args.StandardSave(_tree(output, arrays)))

    finished(write_shared)
    return lambda: finalize(epath.Path(os.path.abspath(path)))


def _tree(output: Output, arrays: Mapping[str, Any]) -> Any:
    return _contained(nest({name: arrays[name] for name in output.specs}, output.real_keys), "", output.containers)


def finish(path: Path, output: Output, digests: Mapping[str, Pieces], as_host: bool = False) -> None:
    """Write graftax.json beside Orbax's files. as_host: describe the leaves as NumPy arrays, as they are when one
    process writes. Otherwise Orbax could restore them without a target only on as many devices as wrote them."""
    done = path / "commit_success.txt"
    if done.exists():  # only its presence matters; Orbax writes the staging path into it
        done.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    about = {
        "schema": 1,
        "format": "orbax",
        "sha256": {name: _told(digests[name], spec) for name, spec in output.specs.items()},
        **tree_meta.encode_tree(output.real_keys, output.containers),
    }
    try:
        if as_host:
            _describe_as_host(path)
        with builtins.open(path / MANIFEST, "x", encoding="utf-8") as file:
            json.dump(about, file, indent=1, ensure_ascii=True)
            file.write("\n")
    except OSError as error:
        raise system.storage_error(error, path) from error


def _describe_as_host(path: Path) -> None:
    tree = json.loads((path / TREE).read_bytes())
    for entry in tree["tree_metadata"].values():
        entry["value_metadata"]["value_type"] = "np.ndarray"
        entry["value_metadata"].pop("write_shape", None)
    (path / TREE).write_text(json.dumps(tree), encoding="utf-8")
    (path / "_sharding").unlink(missing_ok=True)


# ---------------------------------------------------------------- leaves and their digests

Pieces = dict[str, str]
"""SHA-256 of the parts of a leaf, keyed by place: `0:4,0:8` is rows 0 to 3, columns 0 to 7."""


def host_leaf(array: np.ndarray[Any, Any], spec: TensorSpec) -> tuple[Any, Pieces]:
    """A leaf in the form that Orbax takes from the host, and its digest."""
    from graftax.tree.dtypes import storage_bytes

    data = storage_bytes(array, spec)
    return _leaf(data, spec), {_whole(spec): _sha256(data)}


def piece_digests(array: Any, spec: TensorSpec) -> Pieces:
    """The digests of the parts of a jax.Array that this process writes; among copies the first counts."""
    import numpy as np

    from graftax.tree.dtypes import storage_bytes

    pieces: Pieces = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            edges = [
                (s.start or 0, n if s.stop is None else s.stop) for s, n in zip(shard.index, spec.shape, strict=True)
            ]
            part = TensorSpec(tuple(stop - start for start, stop in edges), spec.dtype)
            place = ",".join(f"{start}:{stop}" for start, stop in edges)
            pieces[place] = _sha256(storage_bytes(np.asarray(shard.data), part))
    return pieces


def intact(array: np.ndarray[Any, Any], spec: TensorSpec, digests: Any) -> bool:
    """True if a leaf matches its digests in graftax.json. `digests`: one SHA-256 of its values (C order, little endian;
    for packed types the bytes), or the digests of its parts."""
    from graftax.tree.dtypes import storage_bytes

    if isinstance(digests, str):
        return _sha256(storage_bytes(array, spec)) == digests
    seen = 0
    for place, digest in digests.items():
        piece = array[tuple(slice(*edge) for edge in _edges(place))]
        seen += piece.size
        if _sha256(storage_bytes(piece, TensorSpec(piece.shape, spec.dtype))) != digest:
            return False
    return seen == spec.size


def is_digest(value: Any, spec: TensorSpec) -> bool:
    """True if a manifest may hold this value for such a leaf: a digest, or the digests of its parts."""
    if isinstance(value, str):
        return True
    if not isinstance(value, dict) or spec.packed:
        return False
    pattern = ",".join(r"\d{1,18}:\d{1,18}" for _ in spec.shape)
    return all(
        isinstance(digest, str)
        and re.fullmatch(pattern, place, re.ASCII) is not None
        and all(start <= stop <= n for (start, stop), n in zip(_edges(place), spec.shape, strict=True))
        for place, digest in value.items()
    )


def _edges(place: str) -> list[tuple[int, int]]:
    return [(int(start), int(stop)) for start, _, stop in (edge.partition(":") for edge in place.split(",") if edge)]


def _told(pieces: Pieces, spec: TensorSpec) -> str | Pieces:
    """A single digest if there is one of the whole leaf, else the digests of its parts."""
    return pieces.get(_whole(spec)) or pieces


def _whole(spec: TensorSpec) -> str:
    return ",".join(f"0:{extent}" for extent in spec.shape)


def _sha256(data: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(data).hexdigest()  # pyright: ignore[reportArgumentType]


def _leaf(data: np.ndarray[Any, Any], spec: TensorSpec) -> Any:
    from graftax.tree.dtypes import from_storage, unpack

    return unpack(data, spec) if spec.packed else from_storage(data, spec)


# ---------------------------------------------------------------- what Orbax cannot hold


def _faults(output: Output) -> dict[str, str]:
    """path -> why Orbax cannot hold it."""
    faults: dict[str, str] = {}
    if not output.specs:
        return {"": "Orbax cannot store an empty tree"}
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
            faults.setdefault(path, "one dict has numbers and text as keys, which Orbax cannot order")
    for path, kind in output.containers.items():
        if kind in ("list", "tuple"):
            items = _children(output.specs, path)
            if items != {str(i) for i in range(len(items))}:
                faults[path] = f"a {kind} with the items {', '.join(sorted(items))}"
    return faults


def _key_fault(key: Key) -> str | None:
    if isinstance(key, tuple):
        return "a key is a tuple, which Orbax would turn into text"
    if isinstance(key, str) and "." in key:
        return "a key contains '.': Orbax joins keys by '.', so it could not tell this key from nested keys"
    if isinstance(key, str) and any("\ud800" <= char <= "\udfff" for char in key):
        return "a key is not valid text (half of a surrogate pair)"
    return None


def _children(paths: Mapping[str, Any], prefix: str) -> set[str]:
    start = f"{prefix}/" if prefix else ""
    return {path[len(start) :].partition("/")[0] for path in paths if path.startswith(start)}


def _contained(node: Any, prefix: str, containers: Mapping[str, str]) -> Any:
    """The tree with its lists and tuples restored. Orbax treats a FrozenDict as a dict."""
    if not isinstance(node, dict):
        return node
    start = f"{prefix}/" if prefix else ""
    below = {key: _contained(child, start + escape_part(key), containers) for key, child in node.items()}
    kind = containers.get(prefix)
    if kind not in ("list", "tuple"):
        return below
    items = [below[key] for key in sorted(below, key=int)]
    return items if kind == "list" else tuple(items)
