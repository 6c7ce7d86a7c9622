"""The tree that an Orbax item holds, from its `_METADATA`: keys, kinds of keys, entries that are not arrays, and
entries that are not weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftax.errors import FormatError, escape
from graftax.formats.io import files, strict_json
from graftax.tree import Key, join_path
from graftax.tree.limits import check_limit

TREE, OCDBT = "_METADATA", "manifest.ocdbt"
_SEQUENCE, _DICT = 1, 2  # key types in _METADATA


@dataclass(frozen=True, slots=True)
class OrbaxLeaf:
    """An array of the tree: its keys, and its name in the store."""

    keys: tuple[Key, ...]
    name: str
    kind: str  # "jax.Array", "np.ndarray", "scalar", ...


@dataclass(frozen=True, slots=True)
class OrbaxTree:
    """The content of _METADATA: the leaves, and the entries that are not arrays (path -> what it is)."""

    leaves: list[OrbaxLeaf]
    left: dict[str, str]
    containers: dict[str, str]
    ocdbt: bool
    zarr3: bool
    complete: bool  # data equal to the fill value is stored too, so missing data is lost data


def unfinished(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{escape(path)} is an Orbax checkpoint that was not finished: {why}",
        next="Take an earlier step, or save it again.",
    )


def read_tree(item: Path) -> OrbaxTree:
    """Parse and check _METADATA."""
    label = escape(item / TREE)
    found = strict_json.parse_object(files.read_whole(item / TREE), label)
    entries = found.get("tree_metadata")
    if not isinstance(entries, dict):
        raise FormatError(f"{label} does not describe a tree")
    check_limit("leaves", len(entries), label)
    leaves: list[OrbaxLeaf] = []
    left: dict[str, str] = {}
    containers: dict[str, str] = {}
    for entry in entries.values():
        keys, texts = _keys(entry, label, containers)
        value = entry.get("value_metadata")
        kind = value.get("value_type") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(kind, str):
            raise FormatError(f"{label}: {escape(join_path(keys))} has no value type")
        if value.get("skip_deserialize") or kind == "string":
            left[join_path(keys)] = f"text, None or an empty container ({escape(kind)})"
        else:
            leaves.append(OrbaxLeaf(keys, ".".join(texts), kind))
    names = [leaf.name for leaf in leaves]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{label}: two leaves are stored as {escape(twice)}: keys with a '.' in them clash")
    ocdbt = os.path.exists(item / OCDBT)
    if found.get("use_ocdbt", ocdbt) and not ocdbt:
        raise unfinished(item, f"it has no {OCDBT}")
    whole = found.get("store_array_data_equal_to_fill_value") is True
    return OrbaxTree(leaves, left, containers, ocdbt, bool(found.get("use_zarr3")), whole)


def _keys(entry: Any, label: str, containers: dict[str, str]) -> tuple[tuple[Key, ...], list[str]]:
    """The keys of a leaf, typed and as text; lists on the way are recorded."""
    listed = entry.get("key_metadata") if isinstance(entry, dict) else None
    if not isinstance(listed, list):
        raise FormatError(f"{label}: a leaf without keys")
    check_limit("depth", len(listed), label)
    keys: list[Key] = []
    texts: list[str] = []
    for step in listed:
        key, kind = (step.get("key"), step.get("key_type")) if isinstance(step, dict) else (None, None)
        if not isinstance(key, str) or kind not in (_SEQUENCE, _DICT) or (kind == _SEQUENCE and not key.isdecimal()):
            raise FormatError(f"{label}: {escape(key)} is not a key of a dict or a list")
        if kind == _SEQUENCE:
            containers[join_path(keys)] = "list"
        keys.append(int(key) if kind == _SEQUENCE else key)
        texts.append(key)
    return tuple(keys), texts


def without_random(item: Path, tree: OrbaxTree) -> tuple[OrbaxTree, dict[str, str]]:
    """The tree without random keys and the counters beside them, and a note for each."""
    random: dict[str, str] = {}
    folder = item / "array_metadatas"
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = strict_json.parse_object(files.read_whole(file), escape(file)).get("array_metadatas")
        for entry in found if isinstance(found, list) else []:
            about = entry.get("array_metadata") if isinstance(entry, dict) else None
            extra = about.get("ext_metadata") if isinstance(about, dict) else None
            if isinstance(about, dict) and isinstance(extra, dict) and "random_key_impl" in extra:
                random[str(about.get("param_name"))] = str(extra["random_key_impl"])
    # NNX stores a stream as {'key': RngKey, 'count': RngCount}, each with or without its `value` level
    counters = {
        re.sub(r"(^|\.)key(\.value)?$", r"\1count\2", name): f"the counter of {name}"
        for name in random
        if re.search(r"(^|\.)key(\.value)?$", name)
    }
    notes: dict[str, str] = {}
    kept: list[OrbaxLeaf] = []
    for leaf in tree.leaves:
        if leaf.name in random:
            notes[join_path(leaf.keys)] = f"a random key ({escape(random[leaf.name])}), left out"
        elif leaf.name in counters:
            notes[join_path(leaf.keys)] = f"{escape(counters[leaf.name])}, left out"
        else:
            kept.append(leaf)
    return (replace(tree, leaves=kept) if notes else tree), notes


def unwrapped(tree: OrbaxTree) -> OrbaxTree:
    """The tree of an NNX State without the `value` at the end of every leaf's keys; any other tree unchanged."""
    if not tree.leaves or any(len(leaf.keys) < 2 or leaf.keys[-1] != "value" for leaf in tree.leaves):
        return tree
    leaves = [OrbaxLeaf(leaf.keys[:-1], leaf.name, leaf.kind) for leaf in tree.leaves]
    if len({leaf.keys for leaf in leaves}) != len(leaves):
        return tree
    return replace(tree, leaves=leaves)


def real_keys(tree: OrbaxTree, state: bool) -> dict[str, Key]:
    """The keys that are numbers: list indices and, in NNX trees, digits that Orbax turned into text.

    A tree is NNX's in two cases: it had the `value` level of a State (`state`), or, as from nnx.to_pure_dict, it has no
    collection `params` and the keys of a dict are exactly 0 to n-1.
    """
    children: dict[tuple[Key, ...], dict[Key, None]] = {}
    for leaf in tree.leaves:
        for i, key in enumerate(leaf.keys):
            children.setdefault(leaf.keys[:i], {})[key] = None
    linen = "params" in children.get((), {})
    out: dict[str, Key] = {}
    for parent, keys in children.items():
        digits = all(isinstance(key, str) and key.isdecimal() and str(int(key)) == key for key in keys)
        counted = digits and {int(str(key)) for key in keys} == set(range(len(keys)))
        for key in keys:
            if isinstance(key, int):
                out[join_path((*parent, key))] = key
            elif isinstance(key, str) and ((counted and not linen) or (state and digits)):
                out[join_path((*parent, key))] = int(key)
    return out
