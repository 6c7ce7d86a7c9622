"""What the values of a run come from, as a digest: equal for two runs only if they make the same tensors."""

from __future__ import annotations

import hashlib
import json
import os

from graftax.errors import UsageError, escape, worded
from graftax.ops import Keep
from graftax.plans import Plan
from graftax.tree import Checkpoint


def fingerprint(plan: Plan, source: Checkpoint, like: Checkpoint | None) -> str:
    """A digest of the plan and of the files that its values are read from: their sizes, inodes and times of change.

    UsageError where values come from anything but files: by nothing would a change of them show.
    """
    kept = any(entry.ops and isinstance(entry.ops[0], Keep) for entry in plan.entries)
    ends = [source, like] if kept and like is not None else [source]
    whole = plan.as_json()
    about = [{key: whole[key] for key in ("source", "like", "entries")}, [_files(end) for end in ends]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode("ascii")).hexdigest()


def _files(end: Checkpoint) -> list[list[int]]:
    if not end.storage.files:
        raise UsageError(
            f"{escape(end.label)} is not in files, so that nothing shows whether it is still the same",
            next=f"Port it without {worded('--resume', 'resume=True')}, or save it first.",
        )
    stats = [os.stat(path) for path in end.storage.files]
    return [[info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns] for info in stats]
