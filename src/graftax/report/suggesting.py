"""A plan as a rules file to edit: what was proved as rules, each candidate of an open question as a line that is
commented out. Nothing is guessed."""

from __future__ import annotations

from pathlib import Path

from graftax.errors import PlanError, StorageError, escape
from graftax.formats.io.own_file import refuse_other_file
from graftax.plans import Plan

HEADER = "# Uncomment one line for each question, then: --rules with this file."


def suggest(plan: Plan | PlanError) -> str:
    """The plan as the text of a rules file: the user uncomments one line for each question. What running both models
    proved stands as rules without sizes, and they port a larger model of the same code from files
    (`gx.port_file(source, like, out, rules=text)`). Unedited, the file loads with no other rule."""
    lines = [HEADER, "rules = ["]
    if isinstance(plan, Plan) and plan.proof is not None:
        from graftax.rules.of_plan import rule_lines_of

        lines += [f"  # {escape(str(plan.proof), 400)}", *rule_lines_of(plan)]
    for i, question in enumerate(plan.questions, 1):
        lines += ["", f"  # {i}. {_one_line(question.text)}"]
        for candidate in question.candidates:
            why = f"   # {_one_line(candidate.evidence)}" if candidate.evidence else ""
            lines.append(f"  # {candidate.rule},{why}")
        if not question.candidates:
            lines.append("  # (no candidate: write a rule, or see the options missing and unused)")
    return "\n".join([*lines, "]", ""])


def _one_line(text: str) -> str:
    return escape(text, 2000)


def write_suggestions(plan: Plan | PlanError, path: str | Path) -> None:
    """Write the suggestions. StorageError if writing fails, or if the path holds anything but an unedited list of
    them."""
    refuse_other_file(path, HEADER, "a list of suggestions")
    if Path(path).exists() and any(
        line.lstrip().startswith("{") for line in Path(path).read_text("utf-8").splitlines()
    ):
        raise StorageError(f"{escape(path)} has rules that are in use", next="Choose another name for the suggestions.")
    try:
        Path(path).write_text(suggest(plan), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {escape(path)}: {error.strerror}") from error
