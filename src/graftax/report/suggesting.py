"""The open questions of a plan as a rules file to edit: every candidate a line, commented out: nothing is guessed."""

from __future__ import annotations

from pathlib import Path

from graftax.errors import StorageError, escape
from graftax.plans import Plan


def suggestions(plan: Plan) -> str:
    """A rules file: uncomment one line a question. Loads as it is, with no rule."""
    lines = ["# Uncomment one line for each question, then: --rules with this file.", "rules = ["]
    for i, question in enumerate(plan.questions, 1):
        lines += ["", f"  # {i}. {_one_line(question.text)}"]
        for candidate in question.candidates:
            why = f"   # {_one_line(candidate.evidence)}" if candidate.evidence else ""
            lines.append(f"  # {_one_line(candidate.rule)},{why}")
        if not question.candidates:
            lines.append("  # (no candidate: write a rule, or see --missing and --unused)")
    return "\n".join([*lines, "]", ""])


def _one_line(text: str) -> str:
    return escape(text, 2000)


def write_suggestions(plan: Plan, path: str | Path) -> None:
    """StorageError where it cannot be written."""
    try:
        Path(path).write_text(suggestions(plan), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {escape(path)}: {error.strerror}") from error
