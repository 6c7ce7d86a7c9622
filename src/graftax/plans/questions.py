"""What a plan leaves open or assumes: questions with their candidates, and assumptions; and the proposal that a
producer of plans returns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from graftax.errors import Failure, escape
from graftax.plans.entries import Entry
from graftax.plans.names import fold_names


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to a question: the rule line that picks it (ready to paste; several inline tables if it takes several
    rules) and the evidence for it."""

    rule: str
    sources: tuple[str, ...] = ()
    evidence: str = ""

    def __str__(self) -> str:
        rules = ",\n      ".join(escape(rule, 400) for rule in re.split(r"(?<= }), (?={ )", self.rule))
        return f"{rules}{f'   # {escape(self.evidence, 200)}' if self.evidence else ''}"


@dataclass(frozen=True, slots=True)
class Question:
    """What inference cannot decide. `kind` is a word (match, layout, flatten, fused, order, stack, shape, missing,
    unused); `targets` and `sources` are the leaves that wait for the answer; each candidate has the rule line that
    settles the question."""

    kind: str
    text: str
    targets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def __str__(self) -> str:
        waiting = [name for name in fold_names(self.targets) if name not in self.text]
        also = f" (also waiting: {', '.join(waiting[:6])}{', ...' * (len(waiting) > 6)})" if waiting else ""
        lines = [escape(self.text, 600) + also]
        lines += [f"    {candidate}" for candidate in self.candidates[:10]]
        if len(self.candidates) > 10:
            lines.append(f"    ... and {len(self.candidates) - 10} more candidates")
        return "\n".join(lines)

    def as_json(self, candidates: int | None = 10) -> dict[str, Any]:
        """The question as JSON data with its first `candidates` (None: all)."""
        return {
            "kind": self.kind,
            "text": self.text,
            "targets": list(self.targets),
            "sources": list(self.sources),
            "candidates": [
                {"rule": c.rule, "sources": list(c.sources), "evidence": c.evidence}
                for c in self.candidates[:candidates]
            ],
        }


PARITY = "graftax verify, or gx.check_parity: one input through both models"
"""The check that proves what only the outputs of the models show."""


@dataclass(frozen=True, slots=True)
class Assumption:
    """What no file can show but the plan relies on, with the check that proves it."""

    text: str
    check: str
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{escape(self.text, 400)} (to prove it: {escape(self.check, 200)})"

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "check": self.check, "targets": list(self.targets)}


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a producer found: entries for what is settled, questions for what is not. `reads`: which values were read
    while planning, and why; `broken`: entries (without ops) for the keys that a failure holds already."""

    entries: tuple[Entry, ...] = ()
    questions: tuple[Question, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    failures: tuple[Failure, ...] = ()
    reads: tuple[str, ...] = ()
    broken: tuple[Entry, ...] = ()

    def joined(self, other: Proposal) -> Proposal:
        """Both proposals as one."""
        return Proposal(
            self.entries + other.entries,
            self.questions + other.questions,
            self.assumptions + other.assumptions,
            self.failures + other.failures,
            self.reads + other.reads,
            self.broken + other.broken,
        )
