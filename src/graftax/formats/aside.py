"""Arrays that a msgpack file names but does not hold: each is a zarr array in a folder beside the file.

Orbax before 0.5: ITEM/checkpoint holds `PLACEHOLDER://params.a.kernel`; the array is in ITEM/params.a.kernel, or in an
OCDBT database in ITEM. T5X: checkpoint_N/checkpoint holds a tensorstore spec whose path is a folder beside it.
flax.training.checkpoints, for arrays that several processes share: checkpoint_N holds
`//GDAPlaceholder:params/a/kernel`, and the array is in checkpoint_N_gda/params/a/kernel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, FormatError, UnsafeInputError, escape
from graftax.formats import array_store
from graftax.formats.io import files
from graftax.formats.io.source import check_ratio
from graftax.formats.msgpack_walk import Aside
from graftax.formats.orbax_tree import OCDBT, OrbaxLeaf, OrbaxTree
from graftax.tree import TensorSpec, unescape_part

if TYPE_CHECKING:
    import numpy as np

_ZARR = (".zarray", "zarr.json")  # zarr version 2, version 3


@dataclass(frozen=True, slots=True)
class StoredAside:
    """Arrays beside a file that share one folder and one zarr version. `stores`: leaf -> its name in the folder."""

    item: Path
    tree: OrbaxTree
    specs: Mapping[str, TensorSpec]
    stores: Mapping[str, str]
    files: tuple[Path, ...]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        return array_store.read(self.item, self.tree, self.stores[name], self.specs[name])


def open_aside(path: Path, asides: Mapping[str, Aside], label: str) -> tuple[StoredAside, ...]:
    """The arrays that the file at `path` names in `asides` (leaf -> what the file says of it).

    Raises FormatError, naming the arrays, if they are not beside the file; UnsafeInputError if one leads out of its
    folder.
    """
    at_hand = isinstance(path, Path)  # else it is a file at a URL, whose folder cannot be listed
    groups: dict[tuple[Path, bool, bool], dict[str, str]] = {}
    lost: list[Failure] = []
    for name, aside in asides.items():
        found = _found(path, aside) if at_hand else None
        if found is None:
            what = f"its array is stored outside the file: {escape(aside.said, 100)}"
            lost.append(Failure(what, label, name, next=f"Not there: {escape(_place(aside)[1])}" if at_hand else ""))
        else:
            groups.setdefault(found[:3], {})[name] = found[3]
    if lost:
        writers = ", ".join(sorted({aside.writer for aside in asides.values()}))
        raise FormatError(
            f"{label} was written by {writers}; {len(lost)} of its arrays are neither in this file nor beside it:",
            lost,
            next="Fetch the whole folder of the file; or restore it with its own program, and save it again as "
            "msgpack (flax.serialization.msgpack_serialize) or with today's Orbax.",
        )
    return tuple(_stored(*key, names, label) for key, names in groups.items())


def _place(aside: Aside) -> tuple[str, str]:
    """(what to append to the file's name to get the folder's name, the place of the array in the folder)."""
    if aside.writer == "flax.training.checkpoints":
        return "_gda", aside.place
    if aside.writer == "T5X":  # the path may be from the machine that wrote it
        return "", os.path.basename(aside.place.rstrip("/"))
    return "", aside.place


def _found(path: Path, aside: Aside) -> tuple[Path, bool, bool, str] | None:
    """(folder, is it an OCDBT database, is it zarr version 3, the name of the array in it); None if the array is
    missing."""
    ending, name = _place(aside)
    folder = path.parent if not ending else path.with_name(path.name + ending)
    if not name:
        return None
    if not ending and os.path.isfile(folder / OCDBT):
        return folder, True, False, name
    here = files.inside(folder, name, escape(path))
    for mark in _ZARR:
        if os.path.isfile(here / mark):
            return folder, False, mark == "zarr.json", name
    return None


def _stored(item: Path, ocdbt: bool, zarr3: bool, names: Mapping[str, str], label: str) -> StoredAside:
    keys = {name: tuple(map(unescape_part, name.split("/"))) for name in names}
    leaves = [OrbaxLeaf(keys[name], stored, "np.ndarray") for name, stored in names.items()]
    tree = OrbaxTree(leaves, {}, {}, ocdbt, zarr3, complete=False)
    found = array_store.stores(item, tree)
    own = _files(item, ocdbt, names.values())
    need = sum(nbytes for _, nbytes in found.values())
    check_ratio("dense", need, sum(map(os.path.getsize, own)), f"the arrays of {label} need too much memory")
    return StoredAside(item, tree, {name: found[keys[name]][0] for name in names}, names, tuple(own))


def _files(item: Path, ocdbt: bool, names: Any) -> list[Path]:
    """The files of these arrays. UnsafeInputError if a link leads out of the folder."""
    own: list[Path] = []
    tops = [item / OCDBT, item / "d"] if ocdbt else [item / name for name in names]
    for top in tops:
        own += [top] if os.path.isfile(top) else []
        for here, folders, found in os.walk(top):
            own += [Path(here, name) for name in (*found, *(f for f in folders if os.path.islink(Path(here, f))))]
    root = os.path.realpath(item)
    for file in own:
        if not os.path.realpath(file).startswith(root + os.sep):
            raise UnsafeInputError(f"{escape(item)} must not link out of its folder: {escape(file)} does")
    return own
