"""A folder of checkpoint files: shards with an index.json, or a single file, with config.json beside them.

The index is Hugging Face's: {"metadata": {..}, "weight_map": {tensor: file}}. Shards may have any file format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graftax.errors import SEVERITY, Failure, FormatError, GraftaxError, StorageError, UnsafeInputError, escape
from graftax.formats import safetensors_file
from graftax.formats.base import Output
from graftax.formats.io import files, strict_json
from graftax.formats.table import by_ending
from graftax.tree import Checkpoint, Side, SideBy, Storage, TensorSpec
from graftax.tree.limits import check_limit
from graftax.tree.sides import declared_by, settled

if TYPE_CHECKING:
    import numpy as np

Value = TypeVar("Value")

storage_fault = safetensors_file.storage_fault
INDEX = ".index.json"
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "flax_model.msgpack",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "consolidated.safetensors",
)
"""Usual names of a model's weights, preferred first: if a folder holds several formats, the first name is opened."""
SHARD_SIZE = 5_000_000_000  # bytes, the hub's default


def sniff(path: Path, head: bytes) -> bool:
    """True for a folder with weights in it, and for the index itself."""
    if head:
        return path.name.endswith(INDEX) and head.lstrip()[:1] == b"{"
    return _weights(path) is not None


def _weights(folder: Path) -> str | None:
    """The name of the index or file that holds the weights; None if there is none or the choice is unclear."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return None
    for name in WEIGHTS:  # the file before the index, as in transformers
        if name in names:
            return name
        if name + INDEX in names:
            return name + INDEX
    indices = [name for name in names if name.endswith(INDEX)]
    singles = [name for name in names if (row := by_ending(Path(name).suffix)) and row.weights]
    found = indices or singles
    return found[0] if len(found) == 1 else None


def open(path: Path) -> Checkpoint:
    """All tensors of a folder (or of the named index). Raises FormatError, UnsafeInputError, StorageError."""
    folder, name = (path, _weights(path)) if os.path.isdir(path) else (path.parent, path.name)
    if name is None:
        raise FormatError(f"{escape(path)} holds no weights, or several sets of weights")
    config = _config(folder)
    if name.endswith(INDEX):
        found = _open_sharded(folder, name)
    else:
        from graftax.formats.by_content import open_file

        found = open_file(files.inside(folder, name, escape(folder)), config=False)
    return replace(found, label=str(folder / name), config=config, storage=replace(found.storage, folder=folder))


def _config(folder: Path) -> dict[str, Any] | None:
    if not os.path.lexists(folder / "config.json"):
        return None
    path = files.inside(folder, "config.json", escape(folder))
    return strict_json.parse_object(files.read_whole(path), escape(path))


def _open_sharded(folder: Path, index_name: str) -> Checkpoint:
    from graftax.formats.by_content import open_file

    index = files.inside(folder, index_name, escape(folder))
    label = escape(index)
    shard_of = weight_map(strict_json.parse_object(files.read_whole(index), label), label)
    names = dict.fromkeys(shard_of.values())
    paths = gathered(
        names, lambda name: files.inside(folder, name, label), label
    )  # check all names before opening a file
    shards = gathered(names, lambda name: open_file(paths[name], config=False, shard=True), label)
    return joined(str(folder), shard_of, shards, (index,), label)


def joined(
    label: str, shard_of: Mapping[str, str], shards: Mapping[str, Checkpoint], index: tuple[Path, ...], where: str
) -> Checkpoint:
    """All shards as one checkpoint; `shard_of`: tensor -> shard. FormatError if the index, called `where`, disagrees
    with the shards."""
    failures = _disagreements(shard_of, shards, where)
    if failures:
        raise FormatError(f"{where}: the index and its shards disagree ({len(failures)} tensors):", failures)
    real_keys, containers = {}, {}
    for shard in shards.values():
        real_keys.update(shard.real_keys)
        containers.update(shard.containers)

    def read(path: str) -> np.ndarray[Any, Any]:
        return shards[shard_of[path]].read(path)

    def span(path: str, start: int, buffer: memoryview) -> None:
        by_position = shards[shard_of[path]].storage.span
        assert by_position is not None
        by_position(path, start, buffer)

    def scatter(path: str, start: int, buffers: list[memoryview]) -> int:
        in_a_row = shards[shard_of[path]].storage.scatter
        assert in_a_row is not None
        return in_a_row(path, start, buffers)

    side, side_by = _side(shard_of, shards, where)
    return Checkpoint(
        label=label,
        side=side,
        side_by=side_by,
        specs={name: shards[shard][name] for name, shard in shard_of.items()},
        storage=Storage(
            reader=read,
            format="hf_folder",
            files=(*index, *(path for shard in shards.values() for path in shard.storage.files)),
            metadata=_shared_metadata(shards.values()),
            span=span if all(shard.storage.span for shard in shards.values()) else None,
            whole=frozenset(path for shard in shards.values() for path in shard.storage.whole),
            scatter=scatter if all(shard.storage.scatter for shard in shards.values()) else None,
        ),
        real_keys=real_keys,
        containers=containers,
    )


def _side(names: Iterable[str], shards: Mapping[str, Checkpoint], where: str) -> tuple[Side | None, SideBy]:
    """(side, what decided it) of a set: the side that its shards declare, else the side of all their names. FormatError
    if the shards declare both sides."""
    kinds: dict[str, Side] = {}
    kinds |= {name: shard.side for name, shard in shards.items() if shard.side is not None and shard.side_by == "kind"}
    declared = dict(kinds)
    declared |= {name: side for name, shard in shards.items() if (side := declared_by(shard)) is not None}
    sides = set(declared.values())
    if len(sides) > 1:
        failures = [Failure(f"declares itself {side}", file=where, key=name) for name, side in declared.items()]
        raise FormatError(
            f"{where}: some shards declare torch, others Flax",
            failures,
            next="They do not form one checkpoint: fetch or write the set again.",
        )
    side: Side | None = sides.pop() if sides else None
    return (side, "kind") if kinds else settled(side, names)


def _shared_metadata(shards: Iterable[Checkpoint]) -> dict[str, str]:
    """The metadata entries that all shards share. Empty if graftax wrote the shards, because its metadata describe one
    shard each."""
    found = [shard.storage.metadata for shard in shards if shard.storage.format == "safetensors"]
    if not found or any("graftax" in metadata for metadata in found):
        return {}
    return {key: value for key, value in found[0].items() if all(m.get(key) == value for m in found)}


def weight_map(value: Mapping[str, Any], label: str) -> dict[str, str]:
    """Tensor -> shard, as an index says. FormatError, UnsafeInputError."""
    found = value.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):  # pyright: ignore
        raise FormatError(f"{label}: expected `weight_map`, a map from tensor names to file names")
    check_limit("leaves", len(found), label)  # pyright: ignore[reportUnknownArgumentType]
    return found  # pyright: ignore[reportUnknownVariableType]


def gathered(names: Iterable[str], action: Callable[[str], Value], label: str) -> dict[str, Value]:
    """The result of `action` for every shard. All failures are raised at once, with the exit code of the gravest."""
    out: dict[str, Value] = {}
    errors: list[GraftaxError] = []
    failures: list[Failure] = []
    for name in names:
        try:
            out[name] = action(name)
        except (FormatError, StorageError, UnsafeInputError) as exc:
            errors.append(exc)
            failures.append(Failure(str(exc), file=label, key=name))
    if errors:
        codes = {exc.exit_code: type(exc) for exc in errors}
        gravest = next(codes[code] for code in SEVERITY if code in codes)
        raise gravest(f"{label}: {len(errors)} of {len(out) + len(errors)} shards cannot be opened:", failures)
    return out


def _disagreements(weight_map: Mapping[str, str], shards: Mapping[str, Checkpoint], label: str) -> list[Failure]:
    """Tensors that are not in the shard that the index names, or that the index does not list."""
    out: list[Failure] = []
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            other = next((name for name in shards if tensor in shards[name]), None)
            found = f"in {escape(other)}" if other else "in no shard"
            out.append(Failure("is not in the shard the index names", label, tensor, escape(shard), found))
    for name, shard in shards.items():
        out.extend(
            Failure("is in a shard where the index does not list it", label, tensor, found=escape(name))
            for tensor in shard
            if weight_map.get(tensor) != name
        )
    return out


# ---------------------------------------------------------------- writing


def write(path: Path, output: Output) -> None:
    """safetensors shards with at most `shard_size` bytes of data each (a larger tensor gets its own shard), and their
    index."""
    path.mkdir(exist_ok=output.log is not None)
    files_of = shards(path, output)
    safetensors_file.write_files(files_of, output)
    write_index(path, files_of, output)


def shards(path: Path, output: Output) -> dict[Path, dict[str, TensorSpec]]:
    """The files of the folder, each with the tensors that it will hold."""
    groups = _split(output.specs, output.shard_size or SHARD_SIZE)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return {path / name: group for name, group in zip(names, groups, strict=True)}


def write_index(path: Path, files_of: Mapping[Path, Mapping[str, TensorSpec]], output: Output) -> None:
    """The index of the shards in the folder."""
    shard_of = {tensor: file.name for file, group in files_of.items() for tensor in group}
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in output.specs.values())},
        "weight_map": {tensor: shard_of[tensor] for tensor in output.specs},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (path / f"model.safetensors{INDEX}").write_bytes(text.encode("utf-8"))


def _split(specs: Mapping[str, TensorSpec], size: int) -> list[dict[str, TensorSpec]]:
    """`specs` divided into runs of at most `size` bytes."""
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > size:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    return groups
