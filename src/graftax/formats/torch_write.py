"""Write .pt files tile by tile and without torch: the zip archive that torch.save makes of a state_dict.

For each tensor the pickle holds the call that torch's unpickler makes (`torch._utils._rebuild_tensor_v2`, or `_v3` for
dtypes that have no storage class) and the number of its storage. The bytes are the member `data/NUMBER`. The archive
also has the version, byte order and alignment that torch.save writes. It has no hash of the content, because torch's
reader does not check one.

Source: torch/serialization.py (`_save`), torch/_tensor.py (`_reduce_ex_internal`), torch 2.13.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftax.errors import Failure, PlanError, option
from graftax.formats.base import Output
from graftax.formats.io.zip_write import write_archive
from graftax.formats.writing import byte_runs
from graftax.tree import TensorSpec
from graftax.tree.inert import DTYPES, STORAGES

_TOP = "archive"
_STORAGES = {name: kind for kind, (name, _) in STORAGES.items() if name is not None}
"""Our dtype name -> its storage class, for dtypes that have one."""
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write(path: Path, output: Output) -> None:
    """Write an OrderedDict of tensors, in the order of `output.specs`, inside the nested dicts that `output.container`
    ('a/b') names. Each tensor has its own storage. The same input gives the same bytes.

    Raises PlanError for a dtype that torch does not have, StorageError.
    """
    lacking = [
        Failure("torch has no tensors of this dtype", key=name, found=str(spec))
        for name, spec in output.specs.items()
        if spec.dtype not in DTYPES
    ]
    if lacking:
        raise PlanError(
            "a .pt file cannot hold these tensors", lacking, next=f"Write .safetensors, or cast with {option('dtype')}."
        )
    before = {
        f"{_TOP}/data.pkl": _pickled(output.specs, output.container),
        f"{_TOP}/.format_version": b"1",
        f"{_TOP}/.storage_alignment": b"64",
        f"{_TOP}/byteorder": b"little",
    }
    after = {f"{_TOP}/version": b"3\n"}
    data = {name: f"{_TOP}/data/{i}" for i, name in enumerate(output.specs)}
    sizes = {member: len(raw) for member, raw in before.items()}
    sizes |= {member: output.specs[name].nbytes for name, member in data.items()}
    sizes |= {member: len(raw) for member, raw in after.items()}
    write_archive(path, sizes, _runs(output, before, data, after), output.log)


def _runs(
    output: Output, before: Mapping[str, bytes], data: Mapping[str, str], after: Mapping[str, bytes]
) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    for member, raw in before.items():
        yield member, 0, (raw,)
    for name, _, start, part in byte_runs(output):
        yield data[name], start, (part,)
    for member, raw in after.items():
        yield member, 0, (raw,)


# ---------------------------------------------------------------- the pickle


def _pickled(specs: Mapping[str, TensorSpec], container: str | None) -> bytes:
    """The pickle (protocol 2) of the tree."""
    outer = container.split("/") if container else []
    out = bytearray(b"\x80\x02")
    for part in outer:
        out += b"}" + _text(part)  # an empty dict and a key; the value follows
    out += _ORDERED_DICT + b"("
    for number, (name, spec) in enumerate(specs.items()):
        out += _text(name) + _tensor(spec, number)
    out += b"u" + b"s" * len(outer) + b"."
    return bytes(out)


def _tensor(spec: TensorSpec, number: int) -> bytes:
    """The call that makes a contiguous tensor of storage `number`."""
    kind = _STORAGES.get(spec.dtype)
    name = f"torch\n{kind}" if kind else "torch.storage\nUntypedStorage"
    length = spec.size if kind else spec.nbytes
    storage = b"(" + _text("storage") + _global(name) + _text(str(number)) + _text("cpu") + _number(length) + b"tQ"
    strides: list[int] = []
    step = 1
    for extent in reversed(spec.shape):
        strides.append(step)
        step *= max(extent, 1)
    lies = _number(0) + _numbers(spec.shape) + _numbers(strides[::-1]) + b"\x89" + _ORDERED_DICT  # no grad, no hooks
    version = "v2" if kind else "v3"
    dtype = b"" if kind else _global(f"torch\n{spec.dtype}")
    return _global(f"torch._utils\n_rebuild_tensor_{version}") + b"(" + storage + lies + dtype + b"tR"


def _global(name: str) -> bytes:
    return b"c" + name.encode("ascii") + b"\n"


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


def _numbers(numbers: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
