"""Plans: what goes where, and how. Data made from names, shapes and dtypes, separate from its execution.

Names resolve on first use, so that `--help`, which shows the options, loads neither plans nor ops.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftax.plans.entries import End, Entry, with_ops
    from graftax.plans.options import PlanOptions, WriteOptions
    from graftax.plans.plan import Plan
    from graftax.plans.proof import Proof
    from graftax.plans.questions import PARITY, Assumption, Candidate, Proposal, Question

_HOMES = {
    "entries": ("End", "Entry", "with_ops"),
    "options": ("PlanOptions", "WriteOptions"),
    "plan": ("Plan",),
    "proof": ("Proof",),
    "questions": ("PARITY", "Assumption", "Candidate", "Proposal", "Question"),
}

__all__ = [
    "PARITY",
    "Assumption",
    "Candidate",
    "End",
    "Entry",
    "Plan",
    "PlanOptions",
    "Proof",
    "Proposal",
    "Question",
    "WriteOptions",
    "with_ops",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"graftax.plans.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'graftax.plans' has no attribute {name!r}")
