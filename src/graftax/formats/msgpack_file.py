"""Flax msgpack files, as flax.serialization.msgpack_serialize and to_bytes write them. Imports neither flax nor jax.

The reader walks the file by position: names, shapes and dtypes need only small reads, and values are read one leaf at a
time. The keys of a map are text or whole numbers, and keep their type.

Wire format (flax/serialization.py): an array is extension 1, a msgpack triple (shape, dtype name, bytes in C order); a
NumPy scalar is extension 3, with the same content; a Python complex number is extension 2, a pair. An array of more
than 2**30 bytes is a map {'__msgpack_chunked_array__': True, 'shape': {'0': ..}, 'chunks': {'0': array, ..}}. Types
below one byte use one byte per element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import FormatError, escape
from graftax.formats.base import Output
from graftax.formats.io.direct import DirectFile
from graftax.formats.io.source import StampedFile, open_stamped
from graftax.formats.io.system import storage_error
from graftax.formats.msgpack_walk import CHUNKED, FIXED_EXT, NDARRAY, Array, Aside, Text, itemsize, mark, parse
from graftax.formats.writing import byte_runs, refuse
from graftax.tree import Checkpoint, Key, Storage, TensorSpec, join_path, nest
from graftax.tree.limits import check_limit

if TYPE_CHECKING:
    import numpy as np

    from graftax.formats.aside import StoredAside

CHUNK = 1 << 30
"""Bytes above which flax splits an array."""


def sniff(path: Path, head: bytes) -> bool:
    """True for a map whose first key is text or a whole number."""
    if head == b"\x80":
        return True
    if len(head) < 2 or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    first = head[{0xDE: 3, 0xDF: 5}.get(head[0], 1) :][:1]
    return bool(first) and (mark(first[0])[0] in ("str", "number") if first[0] != 0xC1 else False)


def open(path: Path) -> Checkpoint:
    """The tree in the file. Python numbers become 0-d leaves (int64, uint64, float64, bool, complex128), so that none
    is lost. Text, bytes, None and empty containers are listed in the metadata. Arrays in folders beside the file are
    read from there (see `aside`).

    Raises FormatError if the file is malformed or holds something that a checkpoint cannot hold, UnsafeInputError
    beyond a limit.
    """
    source = open_stamped(path)
    label = escape(path)
    root = parse(source, label)
    arrays: dict[str, Array] = {}
    asides: dict[str, Aside] = {}
    names: dict[str, None] = {}
    metadata: dict[str, str] = {}
    others: dict[str, tuple[int, int] | None] = {}
    real_keys: dict[str, Key] = {}
    containers: dict[str, str] = {}
    for keys, leaf in _leaves(root, (), real_keys, containers):
        name = join_path(keys)
        others[name] = None
        if isinstance(leaf, Text) or (isinstance(leaf, Array) and leaf.value is not None):
            others[name] = leaf.place
        if isinstance(leaf, Text):
            metadata[name] = leaf.text
            continue
        if name in names:
            raise FormatError(f"{label} holds two leaves that are both called {escape(name)}")
        names[name] = None
        if isinstance(leaf, Aside):
            asides[name] = leaf
            continue
        arrays[name] = leaf
        if leaf.value is not None:
            metadata[name] = f"a Python {type(leaf.value).__name__}"
    check_limit("leaves", len(names), label)
    specs = {name: array.spec for name, array in arrays.items()}
    stores = _stores_aside(path, asides, label)
    specs |= {name: spec for store in stores for name, spec in store.specs.items()}

    def reader(name: str) -> np.ndarray[Any, Any]:
        if name in arrays:
            return _read(source, arrays[name], f"{label}: {escape(name)}")
        return next(store for store in stores if name in store.specs).read(name)

    whole = frozenset(
        {name for name, array in arrays.items() if array.spec.packed or array.value is not None} | asides.keys()
    )

    def span(name: str, start: int, buffer: memoryview) -> None:
        if name in whole:
            raise LookupError(f"{name} cannot be read by position")
        _read_parts(source, arrays[name], start, buffer)

    return Checkpoint(
        label=str(path),
        side="flax",
        specs={name: specs[name] for name in names},
        storage=Storage(
            reader=reader,
            format="msgpack",
            files=(path, *(file for store in stores for file in store.files)),
            span=span,
            whole=whole,
            metadata=metadata,
            native=lambda: {
                name: None if place is None else bytes(source.read(*place)) for name, place in others.items()
            },
        ),
        real_keys=real_keys,
        containers=containers,
    )


def _stores_aside(path: Path, asides: Mapping[str, Aside], label: str) -> tuple[StoredAside, ...]:
    if not asides:
        return ()
    from graftax.formats.aside import open_aside

    return open_aside(path, asides, label)


def _leaves(
    node: Any, keys: tuple[Key, ...], real_keys: dict[str, Key], containers: dict[str, str]
) -> Iterator[tuple[tuple[Key, ...], Array | Text | Aside]]:
    """(keys, leaf) of every leaf. On the way it records what flat names cannot express."""
    if keys and type(keys[-1]) is int:
        real_keys[join_path(keys)] = keys[-1]
    if isinstance(node, (Array, Text, Aside)):
        yield keys, node
        return
    if not node:  # the root; elsewhere an empty container is a leaf
        yield keys, Text("an empty list" if isinstance(node, list) else "an empty map")
        return
    if isinstance(node, list):
        containers[join_path(keys)] = "list"
    for key, child in enumerate(node) if isinstance(node, list) else node.items():
        yield from _leaves(child, (*keys, key), real_keys, containers)


# ---------------------------------------------------------------- values


def _read(source: StampedFile, array: Array, where: str) -> np.ndarray[Any, Any]:
    import numpy as np

    from graftax.tree.dtypes import codes_of, from_storage, numpy_dtype, pack

    if array.value is not None:
        return np.array(array.value, numpy_dtype(array.spec.dtype))
    data = bytearray(sum(size for _, size in array.parts))
    _read_parts(source, array, 0, memoryview(data))
    if not array.spec.packed:
        return from_storage(data, array.spec)
    codes = codes_of(np.frombuffer(data, np.uint8), array.spec)
    if codes is None:
        raise FormatError(f"{where}: a byte is not a code of {array.spec.dtype}")
    return pack(codes, array.spec.bits)


def _read_parts(source: StampedFile, array: Array, start: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `start` of the elements, which lie in several stretches of the file."""
    done = passed = 0
    for at, size in array.parts:
        skip = start + done - passed
        if skip < size and done < len(buffer):
            count = min(size - skip, len(buffer) - done)
            source.read_into(at + skip, buffer[done : done + count])
            done += count
        passed += size
    if done < len(buffer):
        raise IndexError(f"bytes {start} to {start + len(buffer)} of {passed}")


# ---------------------------------------------------------------- writing


def write(path: Path, output: Output) -> None:
    """The bytes that flax.serialization.msgpack_serialize(tree, in_place=True) gives for the nested tree, in the order
    of `output.specs`. Lists and tuples become msgpack arrays. At most one tensor is in memory at a time, and tensors
    may come in any order.

    Raises PlanError for keys that msgpack cannot hold.
    """
    from graftax.tree.dtypes import unpack

    tuples = [f"{prefix}/" for prefix, key in output.real_keys.items() if isinstance(key, tuple)]
    below = [path for path in output.specs if any(f"{path}/".startswith(prefix) for prefix in tuples)]
    refuse(output, "msgpack", dict.fromkeys(below, "a key is a tuple"))
    tree = nest({path: path for path in output.leaves or output.specs}, output.real_keys)
    pieces: list[tuple[int, bytes]] = []
    places: dict[str, list[tuple[int, int]]] = {}
    at = 0
    for piece in _layout(tree, "", output):
        if isinstance(piece, bytes):
            pieces.append((at, piece))
            at += len(piece)
        else:
            places.setdefault(piece[0], []).append((at, piece[1]))
            at += piece[1]
    try:
        with DirectFile(path, at) as file:
            for start, piece in pieces:
                file.write_at(start, piece)
            for name, spec, begin, data in byte_runs(output):
                if spec.packed:  # it comes whole
                    data = unpack(data, spec).reshape(-1).view("uint8")
                done = 0
                for start, size in places.get(name, ()):
                    low, high = max(begin, done), min(begin + data.size, done + size)
                    if low < high:
                        file.skip(start + low - done)
                        file.append(data[low - begin : high - begin])
                    done += size
                if output.log is not None:
                    output.log.written(path, file.flush)
            if output.log is not None:
                output.log.written(path, file.flush, last=True)
    except OSError as error:
        raise storage_error(error, path) from error


def _layout(node: Any, prefix: str, output: Output) -> Iterator[bytes | tuple[str, int]]:
    """The file in order: fixed bytes, and (path, size) where the elements of a tensor go."""
    import msgpack

    if isinstance(node, str):
        if output.leaves and (raw := output.leaves[node]) is not None:
            yield raw
            return
        yield from _array_layout(node, output.specs[node])
        return
    packer = msgpack.Packer()
    listed = output.containers.get(prefix) in ("list", "tuple")
    items = {str(key): (key, child) for key, child in node.items()}
    if listed and set(items) != {str(i) for i in range(len(items))}:
        refuse(output, "msgpack", {prefix: f"a list with the items {', '.join(items)}"})
    yield bytes(packer.pack_array_header(len(items)) if listed else packer.pack_map_header(len(items)))
    for key, child in (items[str(i)] for i in range(len(items))) if listed else items.values():
        if not listed:
            yield _packed(key)
        path = join_path((key,))
        yield from _layout(child, f"{prefix}/{path}" if prefix else path, output)


def _array_layout(path: str, spec: TensorSpec) -> Iterator[bytes | tuple[str, int]]:
    import msgpack

    width = itemsize(spec)
    if spec.size * width <= CHUNK:
        yield _array_head(spec.shape, spec.dtype, spec.size * width)
        yield path, spec.size * width
        return
    most = max(1, CHUNK // width)
    starts = range(0, spec.size, most)
    yield b"\x83" + _packed(CHUNKED) + b"\xc3" + _packed("shape")
    yield _packed({str(i): n for i, n in enumerate(spec.shape)}) + _packed("chunks")
    yield bytes(msgpack.Packer().pack_map_header(len(starts)))
    for i, start in enumerate(starts):
        count = min(most, spec.size - start)
        yield _packed(str(i)) + _array_head((count,), spec.dtype, count * width)
        yield path, count * width


def _array_head(shape: tuple[int, ...], dtype: str, size: int) -> bytes:
    """An array extension up to its elements."""
    inner = b"\x93" + _packed(shape) + _packed(dtype) + _sized(size, {1: 0xC4, 2: 0xC5, 4: 0xC6})
    length = len(inner) + size
    fixed = {extent: code for code, extent in FIXED_EXT.items()}
    if length in fixed:
        return bytes([fixed[length], NDARRAY]) + inner
    return _sized(length, {1: 0xC7, 2: 0xC8, 4: 0xC9}) + bytes([NDARRAY]) + inner


def _sized(number: int, marks: dict[int, int]) -> bytes:
    """A mark and a length in the fewest bytes that hold them."""
    width = 1 if number < 1 << 8 else 2 if number < 1 << 16 else 4
    return bytes([marks[width]]) + number.to_bytes(width, "big")


def _packed(value: Any) -> bytes:
    import msgpack

    return bytes(msgpack.packb(value) or b"")
