"""Short texts to compare between processes that write one checkpoint together: they must be equal in all."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from graftax.formats.io import files, system
from graftax.ops import Keep, Op, op_to_json
from graftax.plans import Plan
from graftax.tree import Checkpoint

_SAMPLES, _SAMPLE = 16, 4096  # number of samples of a file, and bytes of each
_FILES = 1000  # number of files that are sampled


def same_work(made: Plan, source: Checkpoint, like: Checkpoint | None) -> dict[str, str]:
    """name -> text that must be equal in all processes: the plan, what decides dtypes, and samples of the files that
    are read."""
    import jax

    same = {"graftax": version("graftax"), "side": made.like.side, "x64": str(jax.config.read("jax_enable_x64"))}
    same["keys"] = _digest(repr((sorted(made.like.real_keys.items()), sorted(made.like.containers.items()))))
    for end, specs in (("source", made.source.specs), ("like", made.like.specs)):
        same |= {f"{end} {name}": str(spec) for name, spec in specs.items()}
    for entry in made.entries:
        name = f"{entry.targets[0]}, how it is made" if entry.targets else f"{entry.sources[0]}, what becomes of it"
        same[name] = _digest(repr((entry.sources, entry.targets, [_plain(op) for op in entry.ops])))
    kept = any(entry.ops and isinstance(entry.ops[0], Keep) for entry in made.entries)
    read = (*source.storage.files, *(like.storage.files if kept and like is not None else ()))
    listed = read[:: max(1, len(read) // _FILES)]
    return same | {str(path): sample(path) for path in listed}


def _plain(op: Op) -> str:
    """An op as text, without identifiers that hold in one process only."""
    return json.dumps(op_to_json(op), sort_keys=True, default=lambda value: type(value).__name__)


def sample(path: Path) -> str:
    """A digest of a file's size and of samples of its content."""
    try:
        stamp = files.stamp(path)
        places = sorted({max(0, stamp.size - _SAMPLE) * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
        taken = [files.read_bytes(path, stamp, place, min(_SAMPLE, stamp.size - place)) for place in places]
    except OSError as error:
        raise system.storage_error(error, path) from error
    return _digest(str(stamp.size).encode() + b"".join(taken))


def _digest(text: str | bytes) -> str:
    raw = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
    return hashlib.sha256(raw).hexdigest()[:32]
