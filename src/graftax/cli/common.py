"""What the commands share: the Outcome they return, the options that several of them take, and the plan they make."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from cyclopts import Parameter

from graftax.cli.flags import option_names, options_given
from graftax.errors import GraftaxError, StorageError, UsageError, escape, flag
from graftax.plans import PlanOptions


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


Like = Annotated[
    str | None, Parameter(help="What to produce: a checkpoint, a spec file (inspect --spec), or pkg.mod:factory.")
]
Suggest = Annotated[str | None, Parameter(help="Write the open questions here, as a rules file to edit.")]
Strict = Annotated[bool, Parameter(negative="", help="Exit 1 if the plan rests on any assumption.")]


def open_source(text: str) -> Any:
    """Open the checkpoint that an argument of the command line names."""
    from graftax.execute.opening import open_tree

    return open_tree(text)


def live_model(text: str) -> Any:
    """The live model of a factory. UsageError for a checkpoint, which cannot be run."""
    from graftax.execute import factories

    if not factories.is_factory(text):
        raise UsageError(
            f"{escape(text)} is no pkg.mod:factory, and a checkpoint alone cannot be run",
            next="Give a function that returns the model; --source and --weights take checkpoints.",
        )
    return factories.call_factory(text)


def stdout_style() -> dict[str, bool]:
    """How a report is printed: with the colours and in the encoding that stdout can show."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return {"color": color, "ascii": not encoding.startswith("utf")}


def planned(
    source: str,
    like: str | None,
    given: Mapping[str, Any],
    plan_path: str | None = None,
    suggest: str | None = None,
) -> tuple[Any, Any, Any]:
    """(plan, source, like), made with the options that were given, or read; the suggestions are written whether or not
    it is complete."""
    from graftax.api import make_plan, open_both
    from graftax.plans import Plan

    if plan_path is not None:
        clash = [flag(name) for name in option_names(PlanOptions) if name in given]
        clash += ["--suggest"] * (suggest is not None)
        if clash:
            raise UsageError(
                f"the plan of --plan is finished: {', '.join(clash)} cannot change it", next="Plan again with them."
            )
        made = Plan.load(plan_path)
        opened, opened_like = open_both(source, like, made.source.side, made.like.side)
        return made, opened, opened_like
    options = options_given(PlanOptions, given)
    if like is None and options.rules is None:
        raise UsageError("say what to produce: --like LIKE (or --rules R.toml alone, where rules name every target)")
    if isinstance(options.inputs, str):
        from graftax.parity.input_files import read_inputs

        options = replace(options, inputs=read_inputs(options.inputs))
    opened, opened_like = open_both(source, like, options.source_side, options.to)
    made = make_plan(opened, opened_like, options)
    if suggest is not None:
        from graftax.report.suggesting import write_suggestions

        write_suggestions(made, suggest)
    return made, opened, opened_like


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


def no_of(made: Any, strict_assumptions: bool) -> GraftaxError | None:
    """The error that makes the answer no; None if the answer is yes."""
    from graftax.errors import Failure, PlanError, counted

    try:
        made.require_complete()
    except PlanError as error:
        return error
    if strict_assumptions and made.assumptions:
        failures = [Failure(str(assumption)) for assumption in made.assumptions]
        return PlanError(f"the plan rests on {counted(len(failures), 'assumption')} (--strict-assumptions):", failures)
    return None
