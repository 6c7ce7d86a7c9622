"""open_url: a checkpoint at a URL. Headers and values are read by ranges; nothing is downloaded whole in advance.

A single file, or an index of shards, may have any format that a local file may have, and the same readers read it. In a
folder (a URL that ends in '/') the usual names of weights are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from graftax.errors import FormatError, StorageError
from graftax.formats import by_content, hf_folder, safetensors_file
from graftax.formats.io import files, strict_json
from graftax.formats.remote.file import RemoteFile
from graftax.formats.remote.retry import NotFoundError
from graftax.formats.remote.url import HTTP, Address, parse, split_part
from graftax.tree import Checkpoint
from graftax.tree.parts import sub_checkpoint

Opener = Callable[[Address], RemoteFile]
"""Opens a file with one request for its size and first bytes. Raises NotFoundError, StorageError."""
AT_ONCE = 8
"""The number of shards whose headers are requested at the same time."""


def open_url(text: str) -> Checkpoint:
    """The checkpoint at a URL, or the part of it that `URL::NAME` names. Only names, shapes and dtypes are read now.

    Raises UsageError (unknown scheme, a missing package), StorageError (missing, unreadable, changed, a server without
    ranges), FormatError, UnsafeInputError, PlanError (no such NAME inside).
    """
    url, part = split_part(text)
    address = parse(url)
    opener = _opener(address)
    file = opener(address) if address.name else _inside(address, opener)
    sharded = file.name.endswith(hf_folder.INDEX)
    found = _sharded(file, opener, part) if sharded else _single(file, part)
    if found.config is None:
        # As on a disk: a config.json that is not a JSON object is an error only beside the shards of a model.
        found = replace(found, config=_config(file.address, opener, strict=sharded or not address.name))
    return replace(found, storage=replace(found.storage, files=()))  # none of its files is in the file system


def _opener(address: Address) -> Opener:
    """A function that opens files in the same place, over the same connections."""
    if address.scheme in HTTP:
        from graftax.formats.remote.connect import Connections
        from graftax.formats.remote.http import HttpFile

        connections = Connections()
        return lambda file: RemoteFile(file, HttpFile(file, connections))
    from graftax.formats.remote.store import StoreFile, filesystem

    store = filesystem(address)
    return lambda file: RemoteFile(file, StoreFile(file, store))


def _inside(folder: Address, opener: Opener) -> RemoteFile:
    """The index or file that holds the weights in a folder. StorageError if no file has one of the usual names."""
    for name in hf_folder.WEIGHTS:
        for candidate in (name, name + hf_folder.INDEX):
            try:
                return opener(folder.beside(candidate))
            except NotFoundError:
                continue
    names = ", ".join(hf_folder.WEIGHTS[:3])
    raise StorageError(f"{folder} holds no weights under a usual name ({names}, ...)", next="Name the file itself.")


def _as_path(file: RemoteFile) -> Path:
    """The file typed as a Path: readers access a path only through `files`, which handles both."""
    return cast("Path", file)


def _single(file: RemoteFile, part: str, shard: bool = False) -> Checkpoint:
    path = _as_path(file)
    if not safetensors_file.sniff(path, files.read_head(path)):
        return by_content.open_file(path, config=False, part=part, shard=shard)
    found = by_content.open_file(path, config=False, shard=shard)
    file.lay_out(found.storage.native.ranges.values())
    return sub_checkpoint(found, part) if part else found


def _sharded(index: RemoteFile, opener: Opener, part: str) -> Checkpoint:
    label = str(index)
    weight_map = hf_folder.weight_map(strict_json.parse_object(files.read_whole(_as_path(index)), label), label)
    names = dict.fromkeys(weight_map.values())
    places = hf_folder.gathered(names, index.address.beside, label)  # check all names before requesting a file
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = {
            name: pool.submit(lambda place: _single(opener(place), "", shard=True), place)
            for name, place in places.items()
        }
        shards = hf_folder.gathered(names, lambda name: asked[name].result(), label)
    found = hf_folder.joined(label, weight_map, shards, (), label)
    return sub_checkpoint(found, part) if part else found


def _config(weights: Address, opener: Opener, strict: bool) -> dict[str, Any] | None:
    """config.json in the same folder. If it cannot be read, it fails as the weights would; if it is not JSON, it fails
    only if `strict`."""
    try:
        file = opener(weights.beside("config.json"))
        return strict_json.parse_object(files.read_whole(_as_path(file)), str(file))
    except NotFoundError:
        return None
    except FormatError:
        if strict:
            raise
        return None
