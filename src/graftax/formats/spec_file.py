"""A spec file: names, shapes and dtypes as JSON, without values. `inspect --spec` prints it, and LIKE accepts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftax.errors import Failure, FormatError, UsageError, escape
from graftax.formats import tree_meta
from graftax.formats.base import Output
from graftax.formats.io import files, strict_json
from graftax.tree import DTYPES, Checkpoint, Side, Storage, TensorSpec
from graftax.tree.limits import check_limit
from graftax.tree.sides import side_of_names

VERSION = 1


def dump_spec(checkpoint: Checkpoint) -> str:
    """The spec of a checkpoint, one line for each tensor; equal trees give equal text. It declares a side only if the
    checkpoint does: if names decided the side, they decide it again for the spec."""
    tensors = [
        f"  {_text(path)}: {_text({'shape': list(spec.shape), 'dtype': spec.dtype})}"
        for path, spec in checkpoint.specs.items()
    ]
    tree = tree_meta.encode_tree(checkpoint.real_keys, checkpoint.containers)
    side = None if checkpoint.side_by == "names" else checkpoint.side
    body = ",\n".join(tensors)
    return (
        f'{{"graftax_spec": {VERSION}, "side": {_text(side)},\n'
        f' "tensors": {{\n{body}\n }},\n'
        f' "keys": {_text(tree["keys"])},\n "containers": {_text(tree["containers"])}}}\n'
    )


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def sniff(path: Path, head: bytes) -> bool:
    """True for any JSON object except the index of a sharded set. Opening reports what is missing for a spec."""
    return head.lstrip()[:1] == b"{" and not path.name.endswith(".index.json")


def open(path: Path) -> Checkpoint:
    """A checkpoint without values. Raises FormatError, UnsafeInputError, StorageError."""
    label = escape(path)
    value = strict_json.parse_object(files.read_whole(path), label)
    if "graftax_spec" not in value:
        raise FormatError(f"{label} is JSON, but not a spec file", next="`graftax inspect --spec` writes one.")
    if value["graftax_spec"] != VERSION:
        raise FormatError(f"{label}: spec version {escape(value['graftax_spec'])}; this graftax knows {VERSION}")
    side = value.get("side")
    if side not in ("torch", "flax", None):
        raise FormatError(f"{label}: side is {escape(side)!r}, expected torch, flax or null")
    specs = _specs(value.get("tensors"), label)
    real_keys, containers = tree_meta.decode_tree(value, label)
    return Checkpoint(
        label=str(path),
        side=_side(side) or side_of_names(specs),
        side_by="kind" if side else "names",
        specs=specs,
        storage=Storage(format="spec", files=(path,)),
        real_keys=real_keys,
        containers=containers,
    )


def _side(value: Any) -> Side | None:
    return value


def _specs(value: Any, label: str) -> dict[str, TensorSpec]:
    if not isinstance(value, dict):
        raise FormatError(f"{label}: expected `tensors`, a map from names to shape and dtype")
    check_limit("leaves", len(value), label)  # pyright: ignore[reportUnknownArgumentType]
    specs: dict[str, TensorSpec] = {}
    failures: list[Failure] = []
    for name, entry in value.items():  # pyright: ignore[reportUnknownVariableType]
        shape: Any = entry.get("shape") if isinstance(entry, dict) else None  # pyright: ignore
        dtype: Any = entry.get("dtype") if isinstance(entry, dict) else None  # pyright: ignore
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):  # pyright: ignore
            failures.append(Failure("the shape must be a list of whole numbers from 0", label, str(name)))
        elif not isinstance(dtype, str) or dtype not in DTYPES:
            failures.append(Failure(f"unknown dtype {escape(dtype)!r}; known: {', '.join(DTYPES)}", label, str(name)))
        else:
            specs[str(name)] = TensorSpec(tuple(shape), dtype)  # pyright: ignore[reportUnknownArgumentType]
    if failures:
        raise FormatError(f"{label}: {len(failures)} tensors have a malformed entry:", failures)
    return specs


def write(path: Path, output: Output) -> None:
    """Always refused: a spec file holds no values."""
    raise UsageError(f"{escape(path.name)}: a spec file holds no values", next="`graftax inspect --spec` writes one.")
