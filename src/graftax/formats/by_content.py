"""Open one file: its content decides the format, and its name gives only hints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftax.errors import FormatError, GraftaxError, escape
from graftax.formats import foreign, safetensors_file
from graftax.formats.base import Format
from graftax.formats.io import files, strict_json
from graftax.formats.table import FORMATS, by_ending
from graftax.tree import Checkpoint
from graftax.tree.limits import beyond, limit
from graftax.tree.parts import sub_checkpoint

HEAD = 512


def open_file(path: Path, config: bool = True, part: str = "", shard: bool = False) -> Checkpoint:
    """The checkpoint in one file, or the named `part` of it, with the config.json beside it. A `shard` that an index
    names must be a file of tensors, not another index. Raises as `open_path`."""
    head = files.read_head(path, HEAD)
    label = escape(path)
    if not safetensors_file.sniff(path, head):  # its first bytes are a length, which any file may begin with
        foreign.refuse_foreign(path, head, label)
    if not shard:
        foreign.refuse_slice(path, label)
    row = identify(path, head, index=not shard)
    if row is None:
        hinted = by_ending(path.suffix)
        claim = f", though it ends in {path.suffix}" if hinted else ""
        raise FormatError(
            f"{label} is not in a format that graftax knows{claim}: it begins with {escape(repr(head[:16])[2:-1])}",
            next=f"Known: {', '.join(row.name for row in FORMATS.values())}.",
        )
    module = row.load()
    if part and hasattr(module, "open_container"):  # a .pt file has nested dicts that flat names do not show
        found: Checkpoint = module.open_container(path, part)
    else:
        found = module.open(path)
        if part:
            found = sub_checkpoint(found, part)
    if config and found.config is None and (beside := config_of(path.parent)) is not None:
        found = replace(found, config=beside)
    return checked(found, label)


def checked(found: Checkpoint, label: str) -> Checkpoint:
    """`found`, if it holds tensors (a header or a spec may list none) and its names are not nested deeper than trees
    may be. Else FormatError or UnsafeInputError."""
    if not found.specs and found.storage.format not in ("safetensors", "spec"):
        raise FormatError(f"{label} holds no tensors", next=_other(found.storage.metadata))
    deepest = limit("depth")
    for name in found.specs:
        if len(name) > deepest and (depth := max(name.count("/"), name.count("."))) > deepest:
            raise beyond("depth", f"{label}: {escape(name, 60)} has {depth + 1:,} parts")
    if found.storage.metadata.get("format") == "mlx":
        foreign.refuse_mlx({name: spec.shape for name, spec in found.specs.items()}, label)
    return found


def _other(metadata: Mapping[str, str]) -> str:
    some = ", ".join(f"{escape(name, 40)} ({escape(what, 40)})" for name, what in list(metadata.items())[:5])
    return f"It holds: {some}" if some else ""


def identify(path: Path, head: bytes, index: bool = True) -> Format | None:
    """The format whose signs the content shows. `index`: whether the index of a sharded set is accepted. The format of
    the file's ending is tried first, which saves imports."""
    rows = [row for row in FORMATS.values() if row.folder == (head == b"") or (row.name == "hf_folder" and index)]
    rows.sort(key=lambda row: path.suffix.lower() not in row.endings)
    return next((row for row in rows if row.load().sniff(path, head)), None)


def config_of(folder: Path) -> Mapping[str, Any] | None:
    """The config.json of a folder. If the file is not a JSON object, it is ignored: the user did not name this folder,
    so nothing is expected of it."""
    beside = folder / "config.json"
    if not os.path.isfile(beside):
        return None
    try:
        return strict_json.parse_object(files.read_whole(beside), escape(beside))
    except GraftaxError:
        return None
