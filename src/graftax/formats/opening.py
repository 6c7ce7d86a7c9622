"""open_path: text -> Checkpoint. What a file is, is told by its content; its name is only asked for hints."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftax.errors import Failure, FormatError, GraftaxError, PlanError, StorageError, UsageError, escape, option
from graftax.formats import files, foreign, hub, safetensors_file, strict_json
from graftax.formats.base import LEFTOVER, Format
from graftax.formats.limits import beyond, limit
from graftax.formats.remote_url import is_url
from graftax.formats.table import FORMATS, by_ending
from graftax.sides import in_own_names, side_of_part
from graftax.tree import Checkpoint, Side, natural_key, nearest

_HEAD = 512
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+\.\w+$")
_BY_CONTENT = ("safetensors", "torch", "npz")  # which no other file is taken for
_LISTED = 1200  # bytes of the names in a folder that a message lists


def open_path(path: str | Path) -> Checkpoint:
    """A checkpoint from a file, a folder, `PATH::NAME` (a container or sub-tree inside), a hub id in the local cache or
    a URL.

    A path that exists wins over every other reading. Only names, shapes and dtypes are read now.

    Raises StorageError (missing, unreadable), FormatError (malformed, unknown), UnsafeInputError, PlanError (no such
    NAME inside).
    """
    return in_own_names(_found(str(path)))


def _found(text: str) -> Checkpoint:
    """As `open_path`, with the names that the file has."""
    if os.path.lexists(text) if "\0" not in text else False:
        return _open_existing(Path(text), text)
    if is_url(text):
        from graftax.formats.remote import open_url

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
    """`PATH::NAME`: a sub-tree of the checkpoint at PATH, or of one in a folder below it."""
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
    """The one step of an Orbax CheckpointManager's folder, below which its items are."""
    from graftax.formats.orbax_folder import steps_in

    steps = steps_in(Path(folder))
    return steps[0] if len(steps) == 1 else None


def _missing(text: str) -> StorageError:
    """Nothing is at `text`: what is near, and where else was looked. FormatError for a TensorFlow checkpoint."""
    path = Path(text)
    if "\0" in text:
        return StorageError(f"{escape(text)} cannot be the name of a file")
    foreign.refuse_prefix(text)
    hints: list[str] = []
    old = path.with_name(path.name + LEFTOVER) if path.name else path
    if path.name and os.path.lexists(old):
        hints.append(f"{escape(old)} is what a stopped run put aside: rename it back.")
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
        raise files.storage_error(exc, path) from None
    return open_folder(path) if folder else open_file(path)


def open_file(path: Path, config: bool = True, part: str = "", shard: bool = False) -> Checkpoint:
    """The checkpoint in one file, or the `part` of it that was named, with the config.json beside it. A `shard` that an
    index names is a file of tensors, never another index. Raises as `open_path`."""
    head = files.read_head(path, _HEAD)
    label = escape(path)
    if not safetensors_file.sniff(path, head):  # its first bytes, a length, may be anything's
        foreign.refuse_foreign(path, head, label)
    if not shard:
        foreign.refuse_slice(path, label)
    row = identify(path, head, index=not shard)
    if row is None:
        hinted = by_ending(path.suffix)
        claim = f", though it ends in {path.suffix}" if hinted else ""
        raise FormatError(
            f"{label} is of no format that graftax knows{claim}: it begins with {escape(repr(head[:16])[2:-1])}",
            next=f"Known: {', '.join(row.name for row in FORMATS.values())}.",
        )
    module = row.load()
    if part and hasattr(module, "open_container"):  # a .pt file nests dicts that flat names do not show
        found: Checkpoint = module.open_container(path, part)
    else:
        found = module.open(path)
        if part:
            found = sub_checkpoint(found, part)
    if config and found.config is None and (beside := config_of(path.parent)) is not None:
        found = replace(found, config=beside)
    return checked(found, label)


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint that a folder is. Raises as `open_path`."""
    row = identify(path, b"")
    try:
        names = sorted(os.listdir(path))
    except OSError as exc:
        raise files.storage_error(exc, path) from None
    # An Orbax checkpoint may be told by a folder below; the files of others are never part of one.
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
            f"{escape(path)} is a folder, but no checkpoint: it holds {len(inside)} of them",
            next=f"Inside, to be named one by one: {_listed(path, inside)}\n"
            f"{foreign.perhaps_slices(path / name for name in inside)}".rstrip(),
        )
    if inside and os.path.isfile(path / inside[0]):  # by its content, as the only `last.ckpt`
        return replace(open_file(path / inside[0]), label=str(path / inside[0]), folder=path)
    inside = inside or [name for name in names if os.path.isdir(path / name)]
    raise FormatError(
        f"{escape(path)} is a folder, but no checkpoint: expected a sharded set with its index.json, one "
        "checkpoint file, or what Orbax writes",
        next=f"Inside, to be named one by one: {_listed(path, inside)}" if inside else "",
    )


_SAVED = re.compile(r"checkpoint_?\d+(?:\.\d+)?", re.ASCII)


def _saved(path: Path, names: list[str]) -> Checkpoint | None:
    """The one that flax.training.checkpoints saved in a folder, a file without an ending each. PlanError where there
    are several."""
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


def checked(found: Checkpoint, label: str) -> Checkpoint:
    """`found`, which must hold tensors (a header or a spec may say that there are none), under names that are no deeper
    than trees may be. FormatError, UnsafeInputError."""
    if not found.specs and found.format not in ("safetensors", "spec"):
        raise FormatError(f"{label} holds no tensors", next=_other(found.metadata))
    deepest = limit("depth")
    for name in found.specs:
        if len(name) > deepest and (depth := max(name.count("/"), name.count("."))) > deepest:
            raise beyond("depth", f"{label}: {escape(name, 60)} has {depth + 1:,} parts")
    if found.metadata.get("format") == "mlx":
        foreign.refuse_mlx({name: spec.shape for name, spec in found.specs.items()}, label)
    return found


def _other(metadata: Mapping[str, str]) -> str:
    some = ", ".join(f"{escape(name, 40)} ({escape(what, 40)})" for name, what in list(metadata.items())[:5])
    return f"It holds: {some}" if some else ""


def _checkpoints(folder: Path, names: Sequence[str]) -> list[str]:
    """What in a folder looks like a checkpoint: by the ending or, as of `last.ckpt`, by the content. The shards of a
    set are one, named by its index."""
    sets = [name for name in names if name.endswith(".index.json")]
    single = [name for name in names if name not in sets and not (sets and _SHARD.search(name))]
    return [*sets, *(name for name in single if _is_checkpoint(folder / name))]


def _is_file_of_weights(path: Path) -> bool:
    row = by_ending(path.suffix)
    return row is not None and row.name != "spec" and os.path.isfile(path)


def _is_checkpoint(path: Path) -> bool:
    try:
        if os.path.isdir(path):
            return identify(path, b"") is not None
        if by_ending(path.suffix) is None and os.path.isfile(path):
            row = identify(path, files.read_head(path, _HEAD))
            return row is not None and row.name in _BY_CONTENT
    except GraftaxError:
        return False
    return _is_file_of_weights(path)


def _listed(path: Path, names: Sequence[str]) -> str:
    """The names below a folder, as many as a message holds."""
    shown: list[str] = []
    for name in names:
        text = escape(path / name)
        if len("".join(shown).encode()) + len(text.encode()) > _LISTED:
            return ", ".join(shown) + f" and {len(names) - len(shown)} more"
        shown.append(text)
    return ", ".join(shown)


def identify(path: Path, head: bytes, index: bool = True) -> Format | None:
    """The format whose signs the content shows; the `index` of a set is none where it is not asked for. The one its
    ending names is asked first, which saves imports."""
    rows = [row for row in FORMATS.values() if row.folder == (head == b"") or (row.name == "hf_folder" and index)]
    rows.sort(key=lambda row: path.suffix.lower() not in row.endings)
    return next((row for row in rows if row.load().sniff(path, head)), None)


def config_of(folder: Path) -> Mapping[str, Any] | None:
    """config.json in a folder. Nothing is promised about a folder that was not named: what is not a JSON object
    there is not a model's settings."""
    beside = folder / "config.json"
    if not os.path.isfile(beside):
        return None
    try:
        return strict_json.parse_object(files.read_whole(beside), escape(beside))
    except GraftaxError:
        return None


# ---------------------------------------------------------------- a part of a checkpoint


def sub_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The leaves below `name` ('model', 'items/params', 'state_dict.encoder'), which is stripped from their paths.

    '.' is all of it, training state and all. Raises PlanError where nothing is below `name`.
    """
    if name == ".":
        return replace(checkpoint, left={}, chosen=True)
    prefix = next((p for p in _prefixes(name, checkpoint.side) if any(path.startswith(p) for path in checkpoint)), "")
    if not prefix:
        raise _no_such_part(checkpoint, name)
    cut = len(prefix)

    def within(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {path[cut:]: value for path, value in mapping.items() if path.startswith(prefix)}

    specs = within(checkpoint.specs)
    reader, span, scatter = checkpoint.reader, checkpoint.span, checkpoint.scatter
    containers = within(checkpoint.containers)
    if (root := checkpoint.containers.get(prefix[:-1])) is not None:
        containers[""] = root
    aliases = {path: to[cut:] for path, to in within(checkpoint.aliases).items() if to.startswith(prefix)}
    return Checkpoint(
        label=f"{checkpoint.label}::{name}",
        side=side_of_part(checkpoint.side, specs) if checkpoint.side_by == "names" else checkpoint.side,
        side_by=checkpoint.side_by,
        specs=specs,
        reader=None if reader is None else lambda path: reader(prefix + path),
        span=None if span is None else lambda path, start, buffer: span(prefix + path, start, buffer),
        scatter=None if scatter is None else lambda path, start, buffers: scatter(prefix + path, start, buffers),
        whole=frozenset(path[cut:] for path in checkpoint.whole if path.startswith(prefix)),
        format=checkpoint.format,
        files=checkpoint.files,
        metadata=checkpoint.metadata,
        modules={
            path: replace(module, path=path, leaves={role: leaf[cut:] for role, leaf in module.leaves.items()})
            for path, module in within(checkpoint.modules).items()
        },
        aliases=aliases,
        buffers=frozenset(path[cut:] for path in checkpoint.buffers if path.startswith(prefix)),
        config=checkpoint.config,
        real_keys=within(checkpoint.real_keys),
        containers=containers,
    )


def _prefixes(name: str, side: Side | None) -> list[str]:
    """How `name` can stand before a path: as it is, or with '.' and '/' for each other. The side's own separator comes
    first."""
    name = name.rstrip("/.")
    if not name:
        return []
    forms = [(name, re.sub("[./]", sep, name), sep) for sep in ("./" if side == "torch" else "/.")]
    return [f"{form}{sep}" for *written, sep in forms for form in dict.fromkeys(written)]


def _no_such_part(checkpoint: Checkpoint, name: str) -> PlanError:
    label = escape(checkpoint.label)
    if name in checkpoint:
        return PlanError(
            f"{label}::{escape(name)} is one tensor, expected a container or sub-tree",
            next=f"Name a tensor with {option('key')}.",
        )
    sep = "." if checkpoint.side == "torch" else "/"
    tops = [top for top in dict.fromkeys(path.partition(sep)[0] for path in checkpoint) if top not in checkpoint]
    near = nearest(name, tops) or ", ".join(escape(top) for top in tops[:10])
    return PlanError(f"{label} has nothing below {escape(name)!r}", next=f"It has: {near}" if near else "")
