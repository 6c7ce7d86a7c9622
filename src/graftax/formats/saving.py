"""save: write a tree of tensors into a file or folder of any format, completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, GraftaxError, PlanError, StorageError, UsageError, escape, option, worded
from graftax.formats import tree_meta
from graftax.formats.base import Format, Output, Tile, Tiles
from graftax.formats.io import files, system
from graftax.formats.io.commit import put_back, staged
from graftax.formats.io.journal import Journal
from graftax.formats.remote.url import is_url, shown
from graftax.formats.table import FORMATS, NO_ENDING, by_ending, by_name, holders
from graftax.tree import Checkpoint, Side

if TYPE_CHECKING:
    from graftax.formats.sidecars import Sidecars

_DISK_FULL = {"no space left on device": errno.ENOSPC, "file too large": errno.EFBIG, "quota exceeded": errno.EDQUOT}
"""Messages of libraries with their own writers, for a full disk -> the original errno."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What `save` did: where, in which format, and what it cleaned up before (lines for the user)."""

    path: Path
    format: str
    notes: tuple[str, ...]


def save(
    path: str | Path,
    output: Output,
    *,
    format: str | None = None,
    clobber: bool = True,
    inputs: Iterable[str | Path | Checkpoint] = (),
    origin: str | None = None,
    write: Callable[[Path], None] | None = None,
    sidecars: Sidecars | None = None,
) -> Saved:
    """Write `output` at `path`, or at `PATH::NAME` below NAME. The ending picks the format; `format` overrides it.

    Everything is checked before anything is written. What was at `path` stays until the new file is complete and
    synced. `inputs` are the files that the tensors are read from; they are never overwritten. `origin` makes the run
    resumable: it is a digest of everything that determines the tensors of `output.tiles`. If such a run is stopped, its
    output stays, and the next run with the same origin, path, format and options continues it. `write`, if given, is
    called with the staging name in place of the format's own writer. `sidecars` are copied into a folder after its
    weights.

    Raises UsageError (format), PlanError (a dtype or side that the format cannot hold), StorageError (destination
    refused, disk full), and whatever `output.tensors` raises.
    """
    out, row, output = prepare(path, output, format)
    _check_parent(out)
    resumed = origin is not None and row.resumes
    notes = guarded(lambda: put_back(out), out)  # other stale files are removed after all checks
    if origin is not None and not resumed:
        notes.append(f"{row.name} is written as a whole: a stopped run cannot be resumed")
    if not row.folder:
        sidecars = None
    _check_destination(out, row, clobber, sidecars)
    _refuse_own_input(out, inputs)
    with files.kept_open():
        if resumed:
            assert origin is not None
            saved = guarded(lambda: _go_on(out, row, output, clobber, notes, origin, sidecars), out)
        else:
            saved = guarded(lambda: _write(out, row, output, clobber, notes, write, sidecars), out)
    guarded(lambda: _proof_beside(out, row, output), out)
    return saved


def _proof_beside(out: Path, row: Format, output: Output) -> None:
    """What was proved about the tensors, beside a file whose format has no room for it. What an earlier file left there
    is removed."""
    place = out.with_name(f"{out.name}.proof.json")
    if output.proof is not None and row.name not in ("safetensors", "hf_folder"):
        place.write_text(json.dumps(dict(output.proof), indent=1) + "\n", encoding="utf-8")
    elif os.path.isfile(place) and b'"leaves"' in place.read_bytes()[:4096]:
        place.unlink()


def prepare(path: str | Path, output: Output, format: str | None) -> tuple[Path, Format, Output]:
    """The path, the format, and the output as it goes there (below a NAME). UsageError, PlanError as `save`."""
    out, name = split_target(path)
    row = choose_format(out, output.side, format, output.shard_size)
    if name:
        output = _nested(output, name, row)
    _check_fits(row, output)
    return out, row, output


def _write(
    out: Path,
    row: Format,
    output: Output,
    clobber: bool,
    notes: list[str],
    write: Callable[[Path], None] | None,
    sidecars: Sidecars | None,
) -> Saved:
    module = row.load()
    with staged(out, folder=row.folder, clobber=clobber) as place:
        if write is None:
            module.write(place.payload, output)
        else:
            write(place.payload)
        told = _copied(sidecars, place.payload)
    return Saved(out, row.name, (*notes, *place.notes, *told))


def _copied(sidecars: Sidecars | None, folder: Path) -> list[str]:
    if sidecars is None:
        return []
    sidecars.copy(folder)
    return sidecars.notes


def _go_on(
    out: Path,
    row: Format,
    output: Output,
    clobber: bool,
    notes: list[str],
    origin: str,
    sidecars: Sidecars | None,
) -> Saved:
    """As `_write`, continuing a stopped run."""
    assert output.tiles is not None
    with staged(out, folder=row.folder, clobber=clobber, keep=True) as place:
        journal = Journal(place.payload, _key(out, row, output, origin), output.tiles)
        try:
            row.load().write(place.payload, replace(output, tiles=journal, log=journal))
        finally:
            journal.close()
        told = _copied(sidecars, place.payload)
    return Saved(out, row.name, (*notes, *place.notes, *journal.told, *told))


def _key(out: Path, row: Format, output: Output, origin: str) -> str:
    """A digest of everything that the bytes of a file depend on."""
    specs = [[name, spec.dtype, list(spec.shape)] for name, spec in output.specs.items()]
    tree = tree_meta.encode_tree(output.real_keys, output.containers)
    form = [version("graftax"), row.name, out.name, output.side, output.shard_size, output.container, specs, tree]
    return hashlib.sha256(json.dumps([origin, form]).encode("ascii")).hexdigest()


def guarded(action: Any, out: Path) -> Any:
    """The result of `action`. An OSError, even one that a library wrapped, becomes a StorageError."""
    try:
        return action()
    except GraftaxError:
        raise
    except OSError as exc:
        raise system.storage_error(exc, out) from exc
    except Exception as exc:
        seen: BaseException | None = exc
        while seen is not None:
            text = str(seen).lower()
            code = next((code for words, code in _DISK_FULL.items() if words in text), None)
            code = code or (seen.errno if isinstance(seen, OSError) else None)
            if code:
                raise system.storage_error(OSError(code, os.strerror(code)), out) from exc
            seen = seen.__cause__ or seen.__context__
        raise


# ---------------------------------------------------------------- destination and format


def split_target(path: str | Path) -> tuple[Path, str]:
    """(PATH, NAME) of `PATH::NAME`. NAME is empty if there is none, or if a path with the whole text exists."""
    text = str(path)
    if "\0" in text or not text:
        raise StorageError(f"{escape(text) or repr(text)} cannot be the name of a file")
    if is_url(text) and not os.path.lexists(Path(text).parent):
        raise UsageError(f"{shown(text)} is a URL; the output is a path", next="Write a file, then copy it there.")
    head, sep, name = text.rpartition("::")
    if not sep or os.path.lexists(text):
        return Path(text), ""
    if not head or not name:
        raise UsageError(f"{escape(text)}: PATH::NAME needs both a path and a name")
    return Path(head), name


def choose_format(out: Path, side: Side, format: str | None, shard_size: int | None = None) -> Format:
    """The row for an OUT: by `format`, else by its ending, else by side. Raises UsageError."""
    if format is not None:
        row = by_name(format)
    elif not any(char.isalpha() for char in out.suffix):  # 'model', 'model-v1.5'
        row = FORMATS[NO_ENDING[side]]
    else:
        row = by_ending(out.suffix)
    if row is None or not row.writes:
        known = ", ".join(ending for r in FORMATS.values() for ending in r.endings if r.writes)
        if row is None:
            what = f"no format has the ending {escape(out.suffix)!r}"
        else:
            what = f"graftax only reads {row.name} files" if row.weights else "a spec file holds no values"
        raise UsageError(
            f"{escape(out)}: {what}", next=f"Use one of {known}, none for a folder, or {option('format')}."
        )
    if side not in row.sides:
        raise PlanError(
            f"{escape(out)}: {row.name} holds {' and '.join(row.sides)} trees, but this is a {side} tree",
            next=f"For {side}: {', '.join(r.name for r in FORMATS.values() if side in r.sides and r.name != 'spec')}.",
        )
    if shard_size is not None and row.name != "hf_folder":
        raise UsageError(
            f"{escape(out)}: a shard size needs a folder of shards, but {row.name} is a single file",
            next=f"Name a folder and give {option('format', 'hf_folder')}.",
        )
    return row


def _nested(output: Output, name: str, row: Format) -> Output:
    """`output` with everything below `name`."""
    name = name.strip("/.")
    if row.name == "torch":
        return replace(output, container=name)
    sep = "/" if output.side == "flax" else "."
    prefix = (name if sep == "/" else name.replace("/", ".")) + sep

    def below(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + path if path else prefix[:-1]: value for path, value in mapping.items()}

    return replace(
        output,
        specs=below(output.specs),
        tensors=((prefix + path, array) for path, array in output.tensors),
        real_keys=below(output.real_keys),
        containers=below(output.containers),
        leaves=None if output.leaves is None else below(output.leaves),
        tiles=None if output.tiles is None else _Below(output.tiles, len(prefix)),
    )


@dataclass(frozen=True, slots=True)
class _Below:
    """Tiles of a tree below a name: a target's own name begins after `cut` characters."""

    under: Tiles
    cut: int

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        return self.under.tiles(target[self.cut :], contiguous, first)

    def done(self, target: str) -> None:
        self.under.done(target[self.cut :])

    def skip(self, target: str) -> None:
        self.under.skip(target[self.cut :])

    @property
    def unit(self) -> int:
        return self.under.unit

    def counts(self, target: str) -> Any:
        return self.under.counts(target[self.cut :])

    def restore(self, target: str, counts: Any) -> None:
        self.under.restore(target[self.cut :], counts)


def _check_fits(row: Format, output: Output) -> None:
    """PlanError listing every tensor that the format cannot hold, and the formats that can."""
    fault = getattr(row.load(), "storage_fault", None)
    failures: list[Failure] = []
    for path, spec in output.specs.items():
        if spec.dtype not in row.holds:
            able = ", ".join(holders(spec.dtype, output.side)) or "no format"
            failures.append(Failure(f"{row.name} cannot hold {spec.dtype}", key=path, next=f"Formats that can: {able}"))
        elif fault is not None and (what := fault(path, spec)) is not None:
            failures.append(Failure(what, key=path))
    if failures:
        raise PlanError(f"{len(failures)} of {len(output.specs)} tensors do not fit into {row.name}:", failures)


# ---------------------------------------------------------------- checks of the destination


def _check_parent(out: Path) -> None:
    if out.name in {"", ".", ".."}:
        raise StorageError(f"{escape(out)} is not a name that can be written", next="Name a new file or folder.")
    parent = out.parent
    if not os.path.isdir(parent):
        what = "is not a folder" if os.path.exists(parent) else "does not exist"
        raise StorageError(f"the folder {escape(parent)} {what}", next=f"Make it first: mkdir -p {escape(parent)}")


def _check_destination(out: Path, row: Format, clobber: bool, sidecars: Sidecars | None) -> None:
    """StorageError if `out` exists and must not be replaced."""
    try:
        mode = os.lstat(out).st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise system.storage_error(exc, out) from None
    if not clobber:
        raise StorageError(f"{escape(out)} exists and must not be replaced ({worded('--no-clobber', 'clobber=False')})")
    if stat.S_ISLNK(mode):
        # The link itself is replaced, never its target, which may be a blob of the hub cache.
        if os.path.isdir(out):
            raise StorageError(f"{escape(out)} is a link to a folder", next="Name the folder itself, or a new name.")
        return
    if stat.S_ISDIR(mode) != row.folder or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        wanted = "a folder" if row.folder else "a file"
        found = "a file" if stat.S_ISREG(mode) else system.kind_of(mode)
        raise StorageError(f"{escape(out)} is {found}; {row.name} writes {wanted}", next="Choose another name.")
    if row.folder and any(os.scandir(out)):
        _refuse_foreign_files(out, sidecars)


_LONE = frozenset({"model.safetensors", "pytorch_model.bin"})
"""If a folder's only checkpoint file has one of these names, the folder is the checkpoint."""


def _refuse_foreign_files(out: Path, sidecars: Sidecars | None) -> None:
    """StorageError if the folder holds anything other than the checkpoint in it and copies of the same sidecars."""
    from graftax.formats.opening import open_folder

    try:
        own = {os.path.abspath(path) for path in open_folder(out).storage.files}
        if len(own) == 1 and os.path.basename(next(iter(own))) not in _LONE:
            own = set()  # a single file with a name that no folder writer uses belongs to the user
    except GraftaxError as exc:
        raise StorageError(
            f"the folder {escape(out)} exists and is not a checkpoint that graftax can read",
            [Failure(str(exc), file=str(out))],
            next="Choose another name, or remove the folder yourself.",
        ) from None
    foreign = [
        Failure("is not part of the checkpoint there", file=path, key=os.path.relpath(path, out))
        for here, folders, names in os.walk(out)
        for path in (os.path.abspath(os.path.join(here, name)) for name in [*names, *_links(here, folders)])
        if path not in own
        and not (sidecars is not None and sidecars.holds(os.path.relpath(path, os.path.abspath(out)), Path(path)))
    ]
    if foreign:
        raise StorageError(
            f"the folder {escape(out)} holds {len(foreign)} files that replacing it would delete:",
            foreign,
            next="Choose another name, or move these files away.",
        )


def _links(here: str, folders: list[str]) -> list[str]:
    """Links to folders, which os.walk does not follow."""
    return [name for name in folders if os.path.islink(os.path.join(here, name))]


def _refuse_own_input(out: Path, inputs: Iterable[str | Path | Checkpoint]) -> None:
    """StorageError if writing `out` would replace, or write into, a file that is being read."""
    target = Path(os.path.realpath(out))
    sources = [p for item in inputs for p in (item.storage.files if isinstance(item, Checkpoint) else (Path(item),))]
    for source in sources:
        real = Path(os.path.realpath(source))
        same = real == target or (os.path.exists(out) and os.path.exists(real) and os.path.samefile(out, real))
        if same or target in real.parents or (os.path.isdir(real) and real in target.parents):
            raise StorageError(
                f"the output {escape(out)} is also an input ({escape(source)})",
                next="Write to another name, then rename.",
            )
