"""What the commands share: the Outcome they return, the options that several of them take, and the plan they make."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from graftax.errors import GraftaxError, StorageError, UsageError, escape


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a command: JSON data, the same as text, and the error if the answer is no."""

    data: Any = None
    text: str = ""
    error: GraftaxError | None = None


Json = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as one JSON object.")]
Out = Annotated[str, Parameter(name=["--out", "-o"])]
MaybeOut = Annotated[str | None, Parameter(name=["--out", "-o"])]
Flag = Parameter(negative="")


@Parameter(name="*")
@dataclass(frozen=True)
class Planning:
    """How the plan is made."""

    like: str | None = None
    """What to produce: a checkpoint, a spec file (inspect --spec), or pkg.mod:factory."""
    rules: str | None = None
    """A rules file (TOML) for what inference cannot know."""
    missing: Literal["error", "keep", "zeros"] | None = None
    """A missing key, a leaf of LIKE that no source tensor fills: an error, unless this says otherwise."""
    unused: Literal["error", "drop"] | None = None
    """An unexpected key, which no leaf of LIKE takes: an error, unless this says otherwise."""
    from_: Annotated[Literal["torch", "flax"] | None, Parameter(name="--from")] = None
    """The side of SOURCE, where it does not declare it: names alone are an assumption."""
    to: Literal["torch", "flax"] | None = None
    """The side that comes out, where LIKE does not declare it."""
    dtype: str | None = None
    """source, like, or a dtype's name. Without it a floating dtype that differs is an error."""
    overflow: Literal["error", "saturate"] | None = None
    """A value that the dtype of --dtype cannot hold: an error, or its largest finite value."""
    suggest: str | None = None
    """Write the open questions here, as a rules file to edit."""
    strict_assumptions: Annotated[bool, Flag] = False
    """Exit 1 where the plan rests on an assumption."""


DEFAULTS = Planning()

_FINISHED = ("rules", "missing", "unused", "from_", "to", "dtype", "overflow")
"""What a finished plan has settled."""


def open_source(text: str) -> Any:
    """Open the checkpoint that an argument of the command line names."""
    from graftax.opening import open_tree

    return open_tree(text)


def planned(source: str, planning: Planning, plan_path: str | None = None) -> tuple[Any, Any, Any]:
    """(plan, source, like), made or read; the suggestions are written whether or not it is complete."""
    from graftax.api import open_both
    from graftax.api import plan as plan_trees
    from graftax.plans import Plan

    if plan_path is not None:
        clash = [f"--{name.rstrip('_')}" for name in _FINISHED if getattr(planning, name) is not None]
        if clash:
            raise UsageError(f"--plan is finished: {', '.join(clash)} cannot change it", next="Plan again with them.")
        made = Plan.load(plan_path)
        opened, like = open_both(source, planning.like, made.source.side, made.like.side)
        return made, opened, like
    if planning.like is None and planning.rules is None:
        raise UsageError("say what to produce: --like LIKE (or --rules R.toml alone, where rules name every target)")
    opened, like = open_both(source, planning.like, planning.from_, planning.to)
    made = plan_trees(
        opened,
        like,
        planning.rules,
        planning.missing or "error",
        planning.unused or "error",
        planning.dtype,
        planning.to,
        planning.overflow or "error",
        planning.from_,
    )
    if planning.suggest is not None:
        from graftax.report.suggesting import write_suggestions

        write_suggestions(made, planning.suggest)
    return made, opened, like


def refuse_own_input(out: str, *paths: str | None) -> None:
    """Raise StorageError if OUT is one of the command's own inputs, also under another name or through a link."""
    place = out if os.path.lexists(out) else out.rpartition("::")[0]
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if path is not None and os.path.samefile(place, path):
                raise StorageError(
                    f"the output {escape(out)} is also an input ({escape(path)})",
                    next="Write to another name, then rename.",
                )


def no_of(made: Any, planning: Planning) -> GraftaxError | None:
    """The error that makes the answer no; None if the answer is yes."""
    from graftax.errors import Failure, PlanError, counted

    try:
        made.require_complete()
    except PlanError as error:
        return error
    if planning.strict_assumptions and made.assumptions:
        failures = [Failure(str(assumption)) for assumption in made.assumptions]
        return PlanError(f"the plan rests on {counted(len(failures), 'assumption')} (--strict-assumptions):", failures)
    return None
