"""Sidecars: the files beside the weights in a model folder (settings, tokenizer, licence, code). They are copied
unchanged into a new folder that is made from this one. Other weights and training state are not copied: they do not
belong to the new weights."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from graftax.errors import GraftaxError, UnsafeInputError, escape
from graftax.formats.foreign import foreign_file
from graftax.formats.hf_folder import INDEX
from graftax.formats.io import files
from graftax.formats.opening import identify
from graftax.formats.table import by_ending
from graftax.tree import Checkpoint

_HEAD = 512
_DEPTH = 2
"""Levels of sub-folders that are searched: `1_Pooling/config.json`."""
_CACHES = frozenset({"__pycache__", "runs", "logs", "wandb"})
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Sidecars:
    """name in the folder -> the file to copy; and the names that are left out."""

    folder: Path
    copied: dict[str, Path]
    left: tuple[str, ...]

    def copy(self, to: Path) -> None:
        """Copy the files into the folder `to`. StorageError if one changes meanwhile; OSError."""
        for name, path in self.copied.items():
            target = to / name
            target.parent.mkdir(exist_ok=True, parents=True)
            before = files.stamp(path)
            shutil.copyfile(path, target)
            if files.stamp(path) != before:
                raise files.changed(path)

    def holds(self, name: str, path: Path) -> bool:
        """True if the new folder will have a file with this name and the same bytes as the file at `path`."""
        mine = self.copied.get(name)
        return mine is not None and not os.path.islink(path) and filecmp.cmp(mine, path, shallow=False)

    @property
    def notes(self) -> list[str]:
        """One line each on what was copied and what was not."""
        lines: list[str] = []
        if self.copied:
            lines.append(f"copied unchanged from {escape(self.folder)}: {_some(self.copied)}")
        if self.left:
            lines.append(f"not copied (other weights, training state, links out of it): {_some(self.left)}")
        return lines


def beside(checkpoint: Checkpoint) -> Sidecars | None:
    """The sidecars of a checkpoint that was opened as a model folder; None for any other checkpoint."""
    folder = checkpoint.storage.folder
    if folder is None:
        return None
    own = {os.path.realpath(path) for path in checkpoint.storage.files}
    copied: dict[str, Path] = {}
    left: list[str] = []
    for name in _names(folder, "", _DEPTH):
        try:
            path = files.inside(folder, name, escape(folder))
            if os.path.realpath(path) not in own:
                if _is_weights(path):
                    left.append(name)
                else:
                    copied[name] = path
        except UnsafeInputError:  # a link that leads out of the folder
            left.append(name)
    return Sidecars(folder, copied, tuple(left))


def for_port(source: Checkpoint, like: Checkpoint | None, leaves: Iterable[str]) -> Sidecars | None:
    """The sidecars for a port that makes these `leaves`: the files beside LIKE. If LIKE is not a folder, the files
    beside the source, provided that the leaves are the source's own, so that its settings apply to them."""
    if like is not None and like.storage.folder is not None:
        return beside(like)
    return beside(source) if source.specs.keys() == set(leaves) else None


def _names(folder: Path, prefix: str, depth: int) -> Iterator[str]:
    """The files of a folder and its sub-folders, without hidden ones and caches."""
    for name in sorted(os.listdir(folder / prefix)):
        place = folder / prefix / name
        if name.startswith(".") or name in _CACHES:
            continue
        if os.path.isfile(place):
            yield f"{prefix}{name}"
        elif depth and os.path.isdir(place) and not os.path.islink(place):
            yield from _names(folder, f"{prefix}{name}/", depth - 1)


def _is_weights(path: Path) -> bool:
    """True for weights, an index of weights, or training state, by name or by content."""
    if path.name.endswith(INDEX) or ((row := by_ending(path.suffix)) is not None and row.weights):
        return True
    try:
        head = files.read_head(path, _HEAD)
        row = identify(path, head) if head else None
    except GraftaxError:
        return False
    other = foreign_file(path.name, head)
    return (row is not None and row.weights) or (other is not None and other.weights)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(map(escape, listed[:_SHOWN])) + more
