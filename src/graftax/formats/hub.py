"""The local cache of the Hugging Face hub, by its documented layout. Nothing is downloaded.

    <cache>/models--org--name/refs/main            a revision
    <cache>/models--org--name/snapshots/<revision>  links into ../../blobs
Source: huggingface_hub, "Manage your cache"; environment variables as documented there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from graftax.errors import FormatError, StorageError, escape

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[\w.-]+")


def cache_folder() -> Path:
    """The cache folder: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME/hub, else a folder below the user's cache
    folder."""
    env = os.environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(env[name]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    base = Path(env["XDG_CACHE_HOME"]) if env.get("XDG_CACHE_HOME") else Path("~/.cache")
    return base.expanduser() / "huggingface" / "hub"


def is_id(text: str) -> bool:
    """True if this could be `org/name` (or one of the hub's early ids without an org)."""
    return _ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def snapshot(text: str) -> Path | None:
    """The folder of a hub id's snapshot in the cache; None if the cache does not have the id.

    Raises FormatError or StorageError if the id is in the cache without its snapshot.
    """
    if not is_id(text):
        return None
    repo = cache_folder() / f"models--{text.replace('/', '--')}"
    if not os.path.isdir(repo):
        return None
    try:
        revision = (repo / "refs" / "main").read_text("utf-8", "replace").strip()
    except OSError:
        found = sorted(p.name for p in (repo / "snapshots").glob("*"))
        if len(found) == 1:
            return repo / "snapshots" / found[0]
        raise StorageError(
            f"{escape(text)} is in the hub cache, but its `main` is not",
            next=f"Name one of its snapshots as a folder: {escape(repo / 'snapshots')} has {len(found)}",
        ) from None
    if not _REVISION.fullmatch(revision) or revision in {".", ".."}:
        raise FormatError(f"{escape(repo / 'refs' / 'main')} does not hold a revision: {escape(revision)!r}")
    folder = repo / "snapshots" / revision
    if not os.path.isdir(folder):
        raise StorageError(f"{escape(folder)} does not exist; the hub cache is incomplete", next="Download it again.")
    return folder
