"""Hashes that say for which code and inputs a proof holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from graftax.probe.program import Program


def sha(*parts: str | bytes) -> str:
    """sha256 of texts and bytes, in hex."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
    return made.hexdigest()


def steps_hash(program: Program) -> str:
    """sha256 of the steps of a Flax model."""
    return sha("\n".join(f"{s.name} {s.ins} {s.outs} {_plain(s.params)}" for s in program.steps))


def _plain(params: Mapping[str, Any]) -> str:
    """Parameters as text, without what differs from process to process."""
    return ",".join(f"{k}={v}" for k, v in params.items() if isinstance(v, (int, float, str, tuple)))
