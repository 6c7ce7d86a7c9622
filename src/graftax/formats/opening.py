"""open_path: text -> Checkpoint. The content of a file decides its format; its name gives only hints."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graftax.errors import Failure, FormatError, GraftaxError, PlanError, StorageError, UsageError, escape
from graftax.formats import foreign, hub
from graftax.formats.base import LEFTOVER
from graftax.formats.by_content import HEAD, checked, identify, open_file
from graftax.formats.io import files, system
from graftax.formats.remote.url import is_url
from graftax.formats.table import by_ending
from graftax.tree import Checkpoint, natural_key
from graftax.tree.parts import sub_checkpoint
from graftax.tree.sides import in_own_names

_SHARD = re.compile(r"-[0-9]+-of-[0-9]+\.\w+$")
_BY_CONTENT = ("safetensors", "torch", "npz")  # no other file looks like these
_LISTED = 1200  # bytes of a folder's names that a message lists


def open_path(path: str | Path) -> Checkpoint:
    """A checkpoint from a file, a folder, `PATH::NAME` (a container or sub-tree inside), a hub id in the local cache,
    or a URL.

    An existing path wins over every other reading. Only names, shapes and dtypes are read now.

    Raises StorageError (missing, unreadable), FormatError (malformed, unknown), UnsafeInputError, PlanError (no such
    NAME inside).
    """
    return in_own_names(_found(str(path)))


def _found(text: str) -> Checkpoint:
    """As `open_path`, with the names as they are in the file."""
    if os.path.lexists(text) if "\0" not in text else False:
        return _open_existing(Path(text), text)
    if is_url(text):
        from graftax.formats.remote.opening import open_url

        return open_url(text)
    head, sep, name = text.rpartition("::")
    tail = name
    while sep:  # from the right: the longest path that exists
        if os.path.lexists(head) or hub.snapshot(head) is not None:
            return _open_inside(head, tail)
        head, sep, name = head.rpartition("::")
        tail = f"{name}::{tail}"
    folder = hub.snapshot(text)
    if folder is not None:
        return replace(_open_existing(folder, text), label=text)
    raise _missing(text.partition("::")[0] if "\0" not in text else text)


def _open_inside(head: str, name: str) -> Checkpoint:
    """`PATH::NAME`: a sub-tree of the checkpoint at PATH, or of a checkpoint in a folder below PATH."""
    if not name:
        raise UsageError(f"{escape(head)}:: names nothing; PATH::NAME needs a name")
    try:
        if os.path.isfile(head):
            return open_file(Path(head), part=name)
        return sub_checkpoint(_found(head), name)
    except (FormatError, PlanError) as exc:
        parts = name.split("/")
        if not os.path.isdir(head) or any(part in {"", ".", ".."} for part in parts):
            raise
        for count in range(len(parts), 0, -1):
            below = Path(_only_step(head) or head, *parts[:count])
            if os.path.exists(below):
                try:
                    found = _found(str(below))
                except GraftaxError:
                    continue
                return sub_checkpoint(found, "/".join(parts[count:])) if count < len(parts) else found
        raise exc from None


def _only_step(folder: str) -> Path | None:
    """The only step of an Orbax CheckpointManager's folder; its items are in there."""
    from graftax.formats.orbax_folder import steps_in

    steps = steps_in(Path(folder))
    return steps[0] if len(steps) == 1 else None


def _missing(text: str) -> StorageError:
    """The error if nothing is at `text`: names near it, and the other places that were searched. FormatError for a
    TensorFlow checkpoint."""
    if not text:
        return StorageError("the name of the checkpoint is empty")
    path = Path(text)
    if "\0" in text:
        return StorageError(f"{escape(text)} cannot be the name of a file")
    foreign.refuse_prefix(text)
    hints: list[str] = []
    old = path.with_name(path.name + LEFTOVER) if path.name else path
    if path.name and os.path.lexists(old):
        hints.append(f"{escape(old)} was put aside by a stopped run: rename it back.")
    try:
        names = os.listdir(path.parent)
    except OSError:
        hints.append(f"The folder {escape(path.parent)} does not exist either.")
    else:
        near = difflib.get_close_matches(path.name, names[:5000], n=3, cutoff=0.5)
        near = near or sorted(name for name in names if by_ending(Path(name).suffix) and name != "config.json")[:3]
        if near:
            hints.append("Near: " + ", ".join(escape(path.parent / name) for name in near))
    if hub.is_id(text) and "/" in text:
        hints.append(f"As a hub id it is not in the cache {escape(hub.cache_folder())} either.")
    return StorageError(f"{escape(text)} does not exist", next="\n".join(hints))


# ---------------------------------------------------------------- one file or folder


def _open_existing(path: Path, label: str) -> Checkpoint:
    try:
        folder = os.path.isdir(path)
        if not folder:
            os.stat(path)
    except OSError as exc:
        if os.path.islink(path) and not os.path.exists(path):
            target = escape(os.readlink(path))
            raise StorageError(f"{escape(path)} is a link to {target}, which cannot be reached") from None
        raise system.storage_error(exc, path) from None
    return open_folder(path) if folder else open_file(path)


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises as `open_path`."""
    row = identify(path, b"")
    try:
        names = sorted(os.listdir(path))
    except OSError as exc:
        raise system.storage_error(exc, path) from None
    # Orbax may recognise a checkpoint by a folder below; a folder with foreign files is never an Orbax checkpoint.
    others = row is not None and row.name == "orbax" and any(_is_file_of_weights(path / name) for name in names)
    if row is not None and not others:
        return checked(row.load().open(path), escape(path))
    foreign.refuse_foreign_folder(path, names)
    if (saved := _saved(path, names)) is not None:
        return saved
    if not any(_is_file_of_weights(path / name) for name in names):
        foreign.refuse_foreign_inside(path, names)
    inside = _checkpoints(path, names)
    if len(inside) > 1:
        raise FormatError(
            f"{escape(path)} is a folder, not a checkpoint: it holds {len(inside)} checkpoints",
            next=f"Name one of the checkpoints inside: {_listed(path, inside)}\n"
            f"{foreign.perhaps_slices(path / name for name in inside)}".rstrip(),
        )
    if inside and os.path.isfile(path / inside[0]):  # recognised by its content, for example a single `last.ckpt`
        found = open_file(path / inside[0])
        return replace(found, label=str(path / inside[0]), storage=replace(found.storage, folder=path))
    inside = inside or [name for name in names if os.path.isdir(path / name)]
    raise FormatError(
        f"{escape(path)} is a folder, but not a checkpoint: expected a sharded set with its index.json, one "
        "checkpoint file, or an Orbax checkpoint",
        next=f"Name one of the checkpoints inside: {_listed(path, inside)}" if inside else "",
    )


_SAVED = re.compile(r"checkpoint_?\d+(?:\.\d+)?", re.ASCII)


def _saved(path: Path, names: list[str]) -> Checkpoint | None:
    """The one checkpoint that flax.training.checkpoints saved in a folder: one file without an ending for each step.
    PlanError if there are several."""
    steps = sorted((name for name in names if _SAVED.fullmatch(name) and os.path.isfile(path / name)), key=natural_key)
    if not steps:
        return None
    if len(steps) == 1:
        return replace(open_file(path / steps[0]), label=str(path))
    raise PlanError(
        f"{escape(path)} holds {len(steps)} steps",
        [Failure("a step", file=str(path / name), key=str(path / name)) for name in steps],
        next=f"Name one; the latest is {escape(path / steps[-1])}",
    )


def _checkpoints(folder: Path, names: Sequence[str]) -> list[str]:
    """The entries of a folder that look like checkpoints, by their ending or (for example `last.ckpt`) by their
    content. The shards of a set count as one, named by its index."""
    sets = [name for name in names if name.endswith(".index.json")]
    single = [name for name in names if name not in sets and not (sets and _SHARD.search(name))]
    return [*sets, *(name for name in single if _is_checkpoint(folder / name))]


def _is_file_of_weights(path: Path) -> bool:
    row = by_ending(path.suffix)
    return row is not None and row.weights and os.path.isfile(path)


def _is_checkpoint(path: Path) -> bool:
    try:
        if os.path.isdir(path):
            return identify(path, b"") is not None
        if by_ending(path.suffix) is None and os.path.isfile(path):
            row = identify(path, files.read_head(path, HEAD))
            return row is not None and row.name in _BY_CONTENT
    except GraftaxError:
        return False
    return _is_file_of_weights(path)


def _listed(path: Path, names: Sequence[str]) -> str:
    """The names in a folder, as many as fit into a message."""
    shown: list[str] = []
    for name in names:
        text = escape(path / name)
        if len("".join(shown).encode()) + len(text.encode()) > _LISTED:
            return ", ".join(shown) + f" and {len(names) - len(shown)} more"
        shown.append(text)
    return ", ".join(shown)
