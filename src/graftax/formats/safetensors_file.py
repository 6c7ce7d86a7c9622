"""safetensors, a single file. The header is read at once and checked strictly; values are read by position on
demand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftax.errors import FormatError, escape
from graftax.formats import tree_meta
from graftax.formats.base import Log, Output, Tiles
from graftax.formats.io import files, strict_json, system
from graftax.formats.io.direct import DirectFile
from graftax.formats.safetensors_header import PREFIX, Range, build_header, header_length, parse_header, storage_fault
from graftax.formats.writing import tensor_bytes
from graftax.tree import Checkpoint, Key, Side, Storage, TensorSpec
from graftax.tree.sides import SIDE_OF_FORMAT, settled

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TensorFile", "open", "own_metadata", "sniff", "storage_fault", "write", "write_files"]

SCHEMA = 1
_FORMAT_OF: dict[Side, str] = {"torch": "pt", "flax": "flax"}


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The place of each tensor's bytes: `Checkpoint.native` of a safetensors file."""

    path: Path
    stamp: system.Stamp
    specs: Mapping[str, TensorSpec]
    ranges: Mapping[str, Range]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's values; for a packed tensor its bytes. StorageError if the file changed."""
        import numpy as np

        from graftax.tree.dtypes import from_storage

        begin, end = self.ranges[name]
        raw = np.empty(end - begin, np.uint8)
        files.read_into(self.path, self.stamp, begin, memoryview(raw))  # pyright: ignore[reportArgumentType]
        return from_storage(raw, self.specs[name])

    def span(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a tensor."""
        files.read_into(self.path, self.stamp, self._place(name, start, start + len(buffer)), buffer)

    def scatter(self, name: str, start: int, buffers: list[memoryview]) -> int:
        """Fill the buffers one after another from byte `start` of a tensor. Returns the number of bytes."""
        nbytes = files.read_apart(self.path, self.stamp, self._place(name, start, start), buffers)
        self._place(name, start, start + nbytes)  # there may be thousands of buffers: sum their lengths once
        return nbytes

    def read_bytes(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes `start` to `stop` of a tensor, for reading it in pieces."""
        return files.read_bytes(self.path, self.stamp, self._place(name, start, stop), stop - start)

    def _place(self, name: str, start: int, stop: int) -> int:
        """The place of byte `start` of a tensor in the file. IndexError if the tensor ends before `stop`."""
        begin, end = self.ranges[name]
        if not 0 <= start <= stop <= end - begin:
            raise IndexError(f"{name}: bytes {start} to {stop} of {end - begin}")
        return begin + start


def sniff(path: Path, head: bytes) -> bool:
    """A length, then '{'. A length beyond any disk is believed only if the file's name ends in .safetensors."""
    return head[PREFIX : PREFIX + 1] == b"{" and (head[5:8] == b"\0\0\0" or path.suffix == ".safetensors")


def open(path: Path) -> Checkpoint:
    """Names, shapes and dtypes of a safetensors file. Raises FormatError, UnsafeInputError, StorageError."""
    label = escape(path)
    stamp = files.stamp(path)
    prefix = bytes(files.read_bytes(path, stamp, 0, min(PREFIX, stamp.size)))
    length = header_length(prefix, stamp.size, label)
    raw = bytes(files.read_bytes(path, stamp, PREFIX, length))
    specs, ranges, metadata = parse_header(raw, stamp.size, label)
    real_keys, containers, own = _own_metadata(metadata, label)
    declared = SIDE_OF_FORMAT.get(metadata.get("format", ""))
    side, side_by = (declared, "kind") if own and declared else settled(declared, specs)
    native = TensorFile(path, stamp, specs, ranges)
    return Checkpoint(
        label=str(path),
        side=side,
        side_by=side_by,
        specs=specs,
        storage=Storage(
            reader=native.read,
            format="safetensors",
            files=(path,),
            metadata=metadata,
            native=native,
            span=native.span,
            scatter=native.scatter,
        ),
        real_keys=real_keys,
        containers=containers,
    )


def _own_metadata(metadata: Mapping[str, str], label: str) -> tuple[dict[str, Key], dict[str, str], bool]:
    """(real_keys, containers, True) from graftax's metadata; empty and False if graftax did not write the file."""
    text = metadata.get("graftax")
    if text is None:
        return {}, {}, False
    where = f"{label}: metadata `graftax`"
    value = strict_json.parse_object(text.encode("utf-8"), where)
    if value.get("schema") != SCHEMA:
        raise FormatError(f"{where} has schema {escape(value.get('schema'))}; this graftax knows {SCHEMA}")
    keys, containers = tree_meta.decode_tree(value, where)
    return keys, containers, True


def own_metadata(
    side: Side,
    real_keys: Mapping[str, Key],
    containers: Mapping[str, str],
    proof: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The entries that graftax writes into `__metadata__`."""
    value: dict[str, Any] = {"schema": SCHEMA, **tree_meta.encode_tree(real_keys, containers)}
    if proof is not None:
        value["proof"] = dict(proof)
    return {
        "format": _FORMAT_OF[side],
        "graftax": json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    }


def proof_in(metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The proof that graftax wrote into a file's metadata."""
    found = _own_value(metadata)
    proof = found.get("proof")
    return cast("Mapping[str, Any]", proof) if isinstance(proof, dict) else None


def without_proof(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata for other tensors than those that were proved."""
    found = _own_value(metadata)
    if "proof" not in found:
        return dict(metadata)
    rest = {name: value for name, value in found.items() if name != "proof"}
    return {**metadata, "graftax": json.dumps(rest, ensure_ascii=False, separators=(",", ":"))}


def _own_value(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found: Any = json.loads(metadata.get("graftax", "{}"))
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


# ---------------------------------------------------------------- writing


def write(path: Path, output: Output) -> None:
    """Write all of `output` into one file. Tensors may come in any order; each goes to its place."""
    write_files({path: output.specs}, output)


def write_files(shards: Mapping[Path, Mapping[str, TensorSpec]], output: Output) -> None:
    """Write several files at once, each with its own tensors. The headers come first; then every tensor as it arrives
    or, if tensors are made on demand, in the order of the files."""
    heads: dict[Path, bytes] = {}
    place: dict[str, tuple[Path, Range]] = {}
    for path, specs in shards.items():
        metadata = output.metadata
        if metadata is None:
            metadata = own_metadata(
                output.side,
                tree_meta.below(output.real_keys, specs),
                tree_meta.below(output.containers, specs),
                output.proof,
            )
        heads[path], ranges = build_header(specs, metadata, path.name)
        place.update({name: (path, range) for name, range in ranges.items()})
    if output.tiles is not None:
        for path, specs in shards.items():
            _write_tiles(path, heads[path], {name: place[name][1] for name in specs}, output.tiles, output.log)
    else:
        _write_arrays(heads, place, output)


def _write_tiles(path: Path, head: bytes, ranges: Mapping[str, Range], tiles: Tiles, log: Log | None) -> None:
    size = max((end for _, end in ranges.values()), default=len(head))
    with DirectFile(path, size) as file:
        file.append(head)
        for name, (begin, _) in sorted(ranges.items(), key=lambda item: item[1]):
            for tile in tiles.tiles(name):
                if len(tile.data) == 1:
                    file.skip(begin + tile.start)
                    file.append(tile.data[0])
                else:
                    for i, row in enumerate(tile.data):
                        file.write_at(begin + tile.start + i * tile.step, row)
                if log is not None:
                    log.written(path, file.flush)
            tiles.done(name)
        if log is not None:
            log.written(path, file.flush, last=True)


def _write_arrays(heads: Mapping[Path, bytes], place: Mapping[str, tuple[Path, Range]], output: Output) -> None:
    for path, head in heads.items():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            system.write_at(fd, 0, memoryview(head))
            os.ftruncate(fd, max((end for at, (_, end) in place.values() if at == path), default=len(head)))
        finally:
            os.close(fd)
    current: Path | None = None
    fd = -1
    try:
        for name, _, data in tensor_bytes(output):
            path, (begin, _) = place[name]
            if path != current:
                if fd >= 0:
                    os.close(fd)
                fd, current = os.open(path, os.O_WRONLY | os.O_CLOEXEC), path
            system.write_at(fd, begin, memoryview(data))  # pyright: ignore[reportArgumentType]
            del data  # free it before the next is made
    finally:
        if fd >= 0:
            os.close(fd)
