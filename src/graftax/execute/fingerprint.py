"""A digest of everything that determines the output of a run: two runs with equal digests make the same tensors."""

from __future__ import annotations

import hashlib
import json
import os

from graftax.errors import UsageError, escape, worded
from graftax.ops import Keep
from graftax.plans import Plan
from graftax.tree import Checkpoint


def fingerprint(plan: Plan, source: Checkpoint, like: Checkpoint | None) -> str:
    """A digest of the plan and of the files it reads: their sizes, inodes and modification times.

    UsageError if some values do not come from files, because a change of those values would not show.
    """
    kept = any(entry.ops and isinstance(entry.ops[0], Keep) for entry in plan.entries)
    ends = [source, like] if kept and like is not None else [source]
    whole = plan.as_json()
    about = [{key: whole[key] for key in ("source", "like", "entries")}, [_files(end) for end in ends]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode("ascii")).hexdigest()


def _files(end: Checkpoint) -> list[list[int]]:
    if not end.storage.files:
        raise UsageError(
            f"{escape(end.label)} is not stored in files, so a change of it would not be noticed",
            next=f"Port it without {worded('--resume', 'resume=True')}, or save it first.",
        )
    stats = [os.stat(path) for path in end.storage.files]
    return [[info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns] for info in stats]
