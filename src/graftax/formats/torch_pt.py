"""torch .pt, .pth and .bin files: the zip archives and the older plain pickles that torch.save writes.

They are read without torch and without running any of their content. `pickles` reads the structure as inert values,
`torch_nest` finds the weights in it, and the bytes of a tensor are read by position on demand. `torch_write` writes
such files, also without torch.

Formats: zip: NAME/data.pkl, NAME/data/KEY, NAME/byteorder. Legacy: five pickles (magic number, protocol, system, the
object, the keys of its storages), then for each key its element count (int64) and its bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, FormatError, UnsafeInputError, escape
from graftax.formats import pickles, torch_write
from graftax.formats.io import zip_read
from graftax.formats.io.source import StampedFile, check_ratio, open_stamped
from graftax.tree import Checkpoint, Storage, TensorSpec
from graftax.tree.inert import STORAGES, Tensor, TorchStorage
from graftax.tree.limits import beyond, check_limit, element_count, limit
from graftax.tree.torch_nest import choose, metadata

if TYPE_CHECKING:
    import numpy as np

write = torch_write.write
ENDINGS = (".pt", ".pth", ".bin")
MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_NAMES = ("data.pkl", "constants.pkl", "version", "byteorder", ".format_version", ".storage_alignment")


@dataclass(frozen=True, slots=True)
class _Content:
    """The content of a file: the unpickled value; the size stored for each storage; a function to get `length` bytes
    from `start` on; a function to fill a buffer with them; and whether a storage is uncompressed (`stored`), which
    filling requires."""

    root: Any
    records: dict[str, int]
    fetch: Callable[[TorchStorage, int, int], bytearray]
    fill: Callable[[TorchStorage, int, memoryview], None]
    stored: Callable[[TorchStorage], bool] = lambda storage: True
    swapped: bool = False  # the bytes are big-endian


def sniff(path: Path, head: bytes) -> bool:
    """True for a zip with torch's members, a pickle, or a file with torch's endings that begins like an old one."""
    name = zip_read.first_member_name(head)
    if name is not None:
        inner = name.partition("/")[2] or name
        ours = inner in _ZIP_NAMES or inner.startswith(("data/", "code/"))
        return ours or (path.suffix in ENDINGS and not name.endswith(".npy"))
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    return path.suffix in ENDINGS and (head[257:262] == b"ustar" or head[:1] in (b"c", b"(", b"}", b"]"))


def open(path: Path) -> Checkpoint:
    """The state_dict in the file. Raises UnsafeInputError if reading everything would run code or exceeds a limit,
    FormatError if the file is malformed, PlanError if several containers hold weights or the weights are quantized."""
    return _checkpoint(path, None)


def open_container(path: Path, name: str) -> Checkpoint:
    """As `open`, for the container `name` in the file ('model', 'a/b'; '.' for everything)."""
    return _checkpoint(path, name)


def _checkpoint(path: Path, name: str | None) -> Checkpoint:
    source = open_stamped(path)
    content = _content(source)
    label = escape(path)
    chosen = choose(content.root, name, label)
    specs = _specs(chosen.tensors, content, source)

    def reader(key: str) -> np.ndarray[Any, Any]:
        return _array(chosen.tensors[key], specs[key], content)

    whole = frozenset(key for key, tensor in chosen.tensors.items() if not _as_it_is(tensor, content))

    def span(key: str, start: int, buffer: memoryview) -> None:
        tensor = chosen.tensors[key]
        if key in whole:
            raise LookupError(f"{key} does not lie in order")
        if not 0 <= start <= start + len(buffer) <= specs[key].nbytes:
            raise IndexError(f"{key}: bytes {start} to {start + len(buffer)} of {specs[key].nbytes}")
        content.fill(tensor.storage, tensor.storage.start + tensor.offset * tensor.itemsize + start, buffer)

    return Checkpoint(
        label=f"{path}::{name}" if name else str(path),
        side="torch",
        specs=specs,
        storage=Storage(
            reader=reader,
            format="torch",
            files=(path,),
            span=span,
            whole=whole,
            metadata=metadata(chosen.container, chosen.left),
            aliases=_aliases(chosen.tensors),
        ),
        real_keys=chosen.real_keys,
        left=chosen.left,
        chosen=True,
    )


# ---------------------------------------------------------------- the two kinds of file


def _content(source: StampedFile) -> _Content:
    label = escape(source.path)
    head = bytes(source.read(0, min(512, source.size)))
    if head[:2] == b"PK":
        return _read_zip(source, label)
    if head[257:262] == b"ustar":
        raise UnsafeInputError(
            f"{label} is a tar file of torch before 0.1.10, which no restricted reader supports",
            next="Ask for the weights as .safetensors, or as a .pt file of a newer torch.",
        )
    return _read_legacy(source, label)


def _read_zip(source: StampedFile, label: str) -> _Content:
    members = zip_read.zip_members(source)
    tops = {name.partition("/")[0] for name in members}
    prefix = f"{next(iter(tops))}/" if len(tops) == 1 else ""
    if f"{prefix}constants.pkl" in members or any(name.startswith(f"{prefix}code/") for name in members):
        raise UnsafeInputError(
            f"{label} is a TorchScript archive, which is code and not only weights",
            next="Where it was made, save the weights alone: torch.save(module.state_dict(), path), or .safetensors.",
        )
    if f"{prefix}data.pkl" not in members:
        raise FormatError(f"{label} is a zip archive, but not one that torch.save writes: it has no data.pkl")
    # torch.serialization.set_crc32_options(False) leaves every CRC zero: then there is nothing to check
    checked = any(member.crc for member in members.values())
    pickle_member = members[f"{prefix}data.pkl"]
    check_limit("header", pickle_member.size, label)
    order = members.get(f"{prefix}byteorder")
    order_text = bytes(zip_read.read_member(source, order, checked)) if order and order.size < 16 else b"little"
    if order_text not in (b"little", b"big"):
        raise FormatError(f"{label} does not say its byte order")
    root = pickles.load(io.BytesIO(zip_read.read_member(source, pickle_member, checked)), label)
    positions = zip_read.Positions(source, checked)

    def record(storage: TorchStorage) -> zip_read.Member:
        return members[f"{prefix}data/{storage.key}"]

    def fetch(storage: TorchStorage, start: int, length: int) -> bytearray:
        member = record(storage)
        if member.method != zip_read.STORED:
            return zip_read.read_member(source, member, checked)[start : start + length]
        if length == member.size and member.name not in positions.starts:  # one pass is enough
            return zip_read.read_member(source, member, checked)
        data = bytearray(length)
        positions.read_into(member, start, memoryview(data))
        return data

    def fill(storage: TorchStorage, start: int, buffer: memoryview) -> None:
        positions.read_into(record(storage), start, buffer)

    def stored(storage: TorchStorage) -> bool:
        return record(storage).method == zip_read.STORED

    data = f"{prefix}data/"
    records = {name.removeprefix(data): member.size for name, member in members.items() if name.startswith(data)}
    return _Content(root, records, fetch, fill, stored, order_text == b"big")


def _read_legacy(source: StampedFile, label: str) -> _Content:
    block = bytes(source.read(0, min(source.size, limit("header"))))
    stream = io.BytesIO(block)
    if _legacy_pickle(stream, source, label) != MAGIC:
        raise FormatError(
            f"{label} is a pickle, but not one that torch.save wrote", next="Write it with torch.save, or .safetensors."
        )
    if _legacy_pickle(stream, source, label) != 1001:
        raise FormatError(f"{label} has an unknown version of torch's legacy format")
    _legacy_pickle(stream, source, label)  # skip the sizes of C types on the machine that wrote it
    storages: dict[str, TorchStorage] = {}
    root = _legacy_pickle(stream, source, label, storages)
    keys = _legacy_pickle(stream, source, label)
    if not isinstance(keys, list) or any(type(key) not in (str, int, bytes) for key in keys):
        raise FormatError(f"{label} does not list its storages")
    places: dict[str, int] = {}
    at = stream.tell()
    for key in (key.decode("latin1") if isinstance(key, bytes) else str(key) for key in keys):
        if key in places or key not in storages:
            raise FormatError(f"{label} lists storage {escape(key)} twice, or one that nothing uses")
        storage = storages[key]
        itemsize = STORAGES[storage.kind][1]
        raw = block[at : at + 8] if at + 8 <= len(block) else source.read(at, 8)
        count = int.from_bytes(raw, "little", signed=True)
        if count * itemsize != storage.total:
            raise FormatError(f"{label}: storage {escape(key)} is damaged: its length is not what the pickle says")
        places[key] = at + 8
        at += 8 + storage.total
        if at > source.size:
            raise FormatError(f"{label} is truncated in storage {escape(key)}")
    if at != source.size:
        raise FormatError(f"{label} has {source.size - at} bytes after its end")

    def fetch(storage: TorchStorage, start: int, length: int) -> bytearray:
        return source.read(places[storage.key] + start, length)

    def fill(storage: TorchStorage, start: int, buffer: memoryview) -> None:
        source.read_into(places[storage.key] + start, buffer)

    return _Content(root, {key: storages[key].total for key in places}, fetch, fill)


def _legacy_pickle(
    stream: io.BytesIO, source: StampedFile, label: str, storages: dict[str, TorchStorage] | None = None
) -> Any:
    """The next of the pickles at the beginning of a legacy file."""
    try:
        return pickles.load(stream, label, storages)
    except FormatError:
        if source.size > limit("header") and stream.tell() >= limit("header"):
            raise beyond("header", f"{label}: a pickle does not end within {limit('header'):,}") from None
        raise


# ---------------------------------------------------------------- tensors


def _specs(tensors: dict[str, Tensor], content: _Content, source: StampedFile) -> dict[str, TensorSpec]:
    """The spec of each tensor, after checking that all tensors fit into their storages and stay within the limits."""
    label = escape(source.path)
    wrong: list[Failure] = []
    dense = 0
    most = limit("dense")
    for name, tensor in tensors.items():
        storage = tensor.storage
        try:
            size = element_count(tensor.shape, label) * tensor.itemsize
        except FormatError:
            wrong.append(Failure("no array can have this shape", label, name, found=escape(tensor.shape)))
            continue
        need = (tensor.offset + _span(tensor)) * tensor.itemsize if size else 0
        record = content.records.get(storage.key)
        if record != storage.total:
            found = "none" if record is None else f"{record} bytes"
            what = f"the record of its storage {escape(storage.key)} is missing or damaged"
            wrong.append(Failure(what, label, name, f"{storage.total} bytes", found, "Fetch the file again."))
        elif tensor.offset < 0 or min(tensor.strides, default=0) < 0:
            wrong.append(Failure("it has a negative offset or stride", label, name))
        elif need > storage.nbytes:
            wrong.append(Failure("its storage is too short", label, name, f"{need} bytes", f"{storage.nbytes} bytes"))
        elif size > most * storage.nbytes:
            check_ratio("dense", size, storage.nbytes, f"{label}: {escape(name)} needs too much memory")
        dense += size
    if wrong:
        raise FormatError(f"{label}: {len(wrong)} of {len(tensors)} tensors are malformed", wrong)
    check_ratio("dense", dense, source.size, f"the tensors of {label} need too much memory")
    return {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _span(tensor: Tensor) -> int:
    """The number of elements from the first to the last one that a tensor reaches; 0 for an empty tensor."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.strides, strict=True))


def _contiguous(tensor: Tensor) -> bool:
    expected = 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def _as_it_is(tensor: Tensor, content: _Content) -> bool:
    """True if the bytes in the file are the values in C order, little endian."""
    if not content.stored(tensor.storage) or tensor.conj or tensor.neg:
        return False
    return _contiguous(tensor) and not (content.swapped and tensor.itemsize > 1)


def _array(tensor: Tensor, spec: TensorSpec, content: _Content) -> np.ndarray[Any, Any]:
    """The values of a tensor, C-contiguous, in the machine's byte order, bit for bit."""
    import numpy as np

    from graftax.tree.dtypes import numpy_dtype

    dtype = numpy_dtype(spec.dtype)
    span = _span(tensor)
    if not span:
        return np.empty(spec.shape, dtype)
    start = tensor.storage.start + tensor.offset * tensor.itemsize
    flat = np.frombuffer(content.fetch(tensor.storage, start, span * tensor.itemsize), np.uint8)
    unit = tensor.itemsize // 2 if spec.kind == "c" else tensor.itemsize
    if content.swapped != (np.little_endian is False) and unit > 1:
        flat = flat.view(f"u{unit}").byteswap()
    array = flat.view(dtype)
    if _contiguous(tensor):
        array = array.reshape(spec.shape)
    else:
        steps = [stride * tensor.itemsize for stride in tensor.strides]
        array = np.lib.stride_tricks.as_strided(array, spec.shape, steps).copy(order="C")
    if tensor.conj:
        array = np.conj(array)
    return np.negative(array) if tensor.neg else array


def _aliases(tensors: dict[str, Tensor]) -> dict[str, str]:
    """name -> the first name with the same view of the same bytes."""
    first: dict[tuple[Any, ...], str] = {}
    out: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not _span(tensor):
            continue
        start = tensor.storage.start + tensor.offset * tensor.itemsize
        view = (tensor.storage.key, start, tensor.dtype, tensor.shape, tensor.strides, tensor.conj, tensor.neg)
        if (known := first.setdefault(view, name)) != name:
            out[name] = known
    return out
