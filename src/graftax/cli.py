"""The command line. Commands are thin: they open, call the library, and hand back an Outcome; this module prints it,
turns errors into exit codes and never shows a traceback. stdout carries results, stderr messages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from graftax.errors import GraftaxError, UsageError, clip, escape

OK, INTERNAL, INTERRUPTED = 0, 70, 130


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found: JSON data, the same as text, and the error that makes it a no, if one does."""

    data: Any = None
    text: str = ""
    error: GraftaxError | None = None


app = App(
    name="graftax",
    help="Port weights between PyTorch and Flax, operate on them, and prove the result.",
    help_format="plaintext",
    help_formatter="plain",
    version="0.1.0",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)

Json = Annotated[bool, Parameter(name="--json", negative="")]
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
    missing: Literal["error", "keep", "zeros"] = "error"
    """A leaf of LIKE that no source fills."""
    unused: Literal["error", "drop"] = "error"
    """A source tensor that goes nowhere."""
    to: Literal["torch", "flax"] | None = None
    """The side that comes out, where names do not tell."""
    dtype: str | None = None
    """source, like, or a dtype's name. Without it a floating dtype that differs is an error."""
    suggest: str | None = None
    """Write the open questions here, as a rules file to edit."""
    strict_assumptions: Annotated[bool, Flag] = False
    """Exit 1 where the plan rests on an assumption."""


@app.command(name="inspect")
def inspect_command(
    ckpt: str,
    /,
    *,
    stats: Annotated[bool, Flag] = False,
    hashes: Annotated[bool, Flag] = False,
    spec: Annotated[bool, Flag] = False,
    json: Json = False,
) -> Outcome:
    """What is in a checkpoint: names, shapes, dtypes.

    Parameters
    ----------
    ckpt
        A file, a sharded or Hugging Face folder, an Orbax checkpoint, or pkg.mod:factory; PATH::NAME picks a part.
    stats
        min, max, mean, std, zeros, NaN and infinite values of every leaf.
    hashes
        sha256 of every leaf.
    spec
        Print a spec file: names, shapes and dtypes, to be used as --like.
    """
    from graftax.report.inspecting import inspection, inspection_text

    checkpoint = _open(ckpt)
    if spec:
        from graftax.formats.spec_file import dump_spec

        text = dump_spec(checkpoint)
        return Outcome(_json(text), text.rstrip("\n"))
    data = inspection(checkpoint, stats=stats, hashes=hashes)
    return Outcome(data, "" if json else inspection_text(data))


@app.command(name="plan")
def plan_command(
    source: str,
    /,
    *,
    planning: Planning = Planning(),
    out: MaybeOut = None,
    json: Json = False,
) -> Outcome:
    """What goes where, and how, from SOURCE to LIKE; nothing is moved. Exit 1 where something is open.

    Parameters
    ----------
    source
        The checkpoint to port.
    out
        Write the plan here (JSON), for port --plan.
    """
    made, _, _ = _plan(source, planning)
    no = _no(made, planning)
    if out is not None and no is None:
        from graftax.report.suggesting import refuse_other_file

        refuse_other_file(out, "graftax_plan", "a plan")
        made.save(out)
    return Outcome(made.as_json(), "" if json else str(made), no)


@app.command(name="port")
def port_command(
    source: str,
    /,
    *,
    planning: Planning = Planning(),
    plan: str | None = None,
    out: Out,
    format: str | None = None,
    shard_size: str | None = None,
    no_clobber: Annotated[bool, Flag] = False,
    dry_run: Annotated[bool, Flag] = False,
    json: Json = False,
) -> Outcome:
    """Port SOURCE into LIKE's names and layouts, and write it.

    Parameters
    ----------
    source
        The checkpoint to port.
    plan
        A plan made before (graftax plan -o), instead of --like and the options that make one.
    out
        Where to write. The ending picks the format: .safetensors .msgpack .npz .pt .pth .bin; none: Orbax for Flax, a
        sharded folder for torch.
    format
        A format's name, whatever the ending.
    shard_size
        The size of a shard, such as 5GB; needs a folder.
    no_clobber
        Refuse an OUT that exists.
    dry_run
        Plan and check everything, write nothing.
    """
    from graftax.api import write_plan
    from graftax.report.progress import with_progress

    made, opened, like = _plan(source, planning, plan)
    no = _no(made, planning)
    data: dict[str, Any] = {
        "out": out,
        "written": False,
        "complete": made.complete,
        "questions": [question.as_json() for question in made.questions],
        "assumptions": [assumption.as_json() for assumption in made.assumptions],
    }
    if no is not None:
        return Outcome(data, "", no)
    if dry_run:
        return Outcome(data | {"plan": made.as_json()}, "" if json else f"{made}\n{escape(out)}: not written (dry run)")
    receipt = write_plan(
        made,
        opened,
        like,
        out,
        format=format,
        shard_size=shard_size,
        clobber=not no_clobber,
        progress=with_progress,
    )
    data |= {"written": True, "receipt": receipt.as_json()}
    lines = [_written(out, receipt.leaves, receipt.nbytes), receipt.text]
    lines += [f"dropped: {line}" for line in _by_reason(receipt.dropped)]
    lines += [f"not from the source: {line}" for line in _by_reason(receipt.filled)]
    lines += [f"note: {escape(note, 400)}" for note in receipt.notes]
    lines += [f"assumed: {assumption}" for assumption in made.assumptions]
    return Outcome(data, "\n".join(lines))


@app.command(name="replace")
def replace_command(
    ckpt: str,
    select: str,
    /,
    *,
    constant: str | None = None,
    zeros: Annotated[bool, Flag] = False,
    normal: float | None = None,
    add_normal: float | None = None,
    seed: int | None = None,
    scaled: float | None = None,
    quantized: int | None = None,
    axis: int | None = None,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    key: str | None = None,
    layout: Literal["linear", "conv", "identity"] | None = None,
    out: Out,
    expect: int | None = None,
    no_clobber: Annotated[bool, Flag] = False,
    dry_run: Annotated[bool, Flag] = False,
    json: Json = False,
) -> Outcome:
    """Replace the leaves that SELECT picks; every other leaf stays bit for bit.

    Parameters
    ----------
    ckpt
        The checkpoint to operate on.
    select
        A path or a glob: * stays in a part, ** spans parts.
    constant
        Every value becomes this.
    zeros
        Every value becomes zero.
    normal
        Drawn from a normal distribution of this standard deviation (needs --seed).
    add_normal
        Noise of this standard deviation is added (needs --seed).
    seed
        Of the draws; each leaf draws from (seed, path).
    scaled
        Multiplied by this.
    quantized
        Rounded to this many bits, symmetric per channel; the dtype stays.
    axis
        The channel axis of --quantized (default: the last).
    from_
        Another checkpoint to take the values from.
    key
        The tensor in it.
    layout
        How the donor is stored, where its shape does not tell.
    out
        Where to write; OUT may not be CKPT.
    expect
        How many leaves SELECT must pick.
    no_clobber
        Refuse an OUT that exists.
    dry_run
        Say what would change, write nothing.
    """
    from graftax import surgery_values as values
    from graftax.errors import PlanError
    from graftax.report.surgery_text import replacement_text
    from graftax.surgery import write_replacement

    chosen = {
        "--constant": constant is not None,
        "--zeros": zeros,
        "--normal": normal is not None,
        "--add-normal": add_normal is not None,
        "--scaled": scaled is not None,
        "--quantized": quantized is not None,
        "--from": from_ is not None,
    }
    given = [name for name, on in chosen.items() if on]
    if len(given) != 1:
        raise UsageError(f"say what to put there: exactly one of {', '.join(chosen)}; got {', '.join(given) or 'none'}")
    for flag, value, needs in (
        ("--seed", seed, ("--normal", "--add-normal")),
        ("--axis", axis, ("--quantized",)),
        ("--key", key, ("--from",)),
        ("--layout", layout, ("--from",)),
    ):
        if value is not None and given[0] not in needs:
            raise UsageError(f"{flag} goes with {' or '.join(needs)}, not with {given[0]}")
    if given[0] in ("--normal", "--add-normal") and seed is None:
        raise UsageError(f"{given[0]} needs --seed, so that the draw can be repeated")
    value: Any
    if constant is not None:
        value = values.constant(_number(constant))
    elif normal is not None:
        value = values.normal(normal, seed or 0)
    elif add_normal is not None:
        value = values.add_normal(add_normal, seed or 0)
    elif scaled is not None:
        value = values.scaled(scaled)
    elif quantized is not None:
        value = values.quantized(quantized, -1 if axis is None else axis)
    elif from_ is not None:
        value = values.from_checkpoint(from_, key, layout)
    else:
        value = values.zeros()
    checkpoint = _open(ckpt)
    if checkpoint.format == "torch" and checkpoint.metadata and "::" not in ckpt:
        others = ", ".join(escape(name) for name in checkpoint.metadata if name != "container") or "nothing else"
        inside = checkpoint.metadata.get("container")
        raise PlanError(
            f"{escape(ckpt)} holds more than its weights ({others}), which a replacement would leave behind",
            next=f"To write the weights alone: {escape(ckpt)}::{escape(inside)}" if inside else "",
        )
    report = write_replacement(
        checkpoint, select, value, None if dry_run else out, expect=expect, clobber=not no_clobber
    )
    return Outcome(
        {"out": out, "written": not dry_run} | report, "" if json else replacement_text(report, out, dry_run)
    )


@app.command(name="diff")
def diff_command(
    a: str,
    b: str,
    /,
    *,
    plan: str | None = None,
    like: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    json: Json = False,
) -> Outcome:
    """Compare two checkpoints leaf by leaf; exit 1 where they differ.

    Parameters
    ----------
    a
        A checkpoint.
    b
        Another. With --plan or --like, A is ported to B's side first.
    plan
        The plan that ports A.
    like
        The tree that A is ported to.
    atol
        Absolute tolerance; without atol and rtol every bit counts.
    rtol
        Relative tolerance.
    """
    from graftax.api import open_both
    from graftax.errors import DifferenceError
    from graftax.report.comparing import comparison, comparison_text

    first, second = open_both(a, b)
    assert second is not None
    if plan is not None and like is not None:
        raise UsageError("give --plan or --like, not both")
    for checkpoint in (first, second):
        if not checkpoint.has_values:
            raise UsageError(f"{escape(checkpoint.label)} has no values to compare")
    read, specs = first.read, first.specs
    if plan is not None or like is not None:
        from graftax.api import host_arrays

        made, opened, opened_like = _plan(a, Planning(like=like), plan)
        made.require_complete()
        arrays, _ = host_arrays(made, opened, opened_like)
        read, specs = arrays.__getitem__, made.like.specs
    data = comparison(specs, read, second.specs, second.read, atol, rtol)
    error = None
    if not data["equal"]:
        mixed = plan is None and like is None and {first.side, second.side} == {"torch", "flax"}
        hint = f"A is {first.side} and B is {second.side}: give --like {b} or --plan." if mixed else ""
        error = DifferenceError(f"{escape(first.label)} and {escape(second.label)} differ", next=hint)
    return Outcome(data, "" if json else comparison_text(data), error)


@app.command(name="layers")
def layers_command(*, json: Json = False) -> Outcome:
    """What is supported, exact or measured, and what is refused and why."""
    from graftax.layers import layer_rows, layers_text

    return Outcome(layer_rows(), "" if json else layers_text())


# ---------------------------------------------------------------- shared by commands


def _open(text: str) -> Any:
    from graftax.adapters import open_tree

    return open_tree(text)


def _number(text: str) -> int | float:
    """An integer where the text is one (int64 beyond 2^53 keeps its value), else a float. UsageError for neither."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"--constant {escape(text)!r} is not a number")


def _json(text: str) -> Any:
    return json.loads(text)


def _plan(source: str, planning: Planning, plan_path: str | None = None) -> tuple[Any, Any, Any]:
    """(plan, source, like), made or read; the suggestions are written whether or not it is complete."""
    from graftax.api import open_both
    from graftax.api import plan as plan_trees
    from graftax.plan_json import load_plan_file

    if plan_path is not None:
        clash = [f"--{name}" for name in ("rules", "to", "dtype") if getattr(planning, name) is not None]
        if clash:
            raise UsageError(f"--plan is finished: {', '.join(clash)} cannot change it", next="Plan again with them.")
        made = load_plan_file(plan_path)
        opened, like = open_both(source, planning.like)
        return made, opened, like
    if planning.like is None and planning.rules is None:
        raise UsageError("say what to produce: --like LIKE (or --rules R.toml alone, where rules name every target)")
    opened, like = open_both(source, planning.like)
    made = plan_trees(opened, like, planning.rules, planning.missing, planning.unused, planning.dtype, planning.to)
    if planning.suggest is not None:
        from graftax.report.suggesting import write_suggestions

        write_suggestions(made, planning.suggest)
    return made, opened, like


def _no(made: Any, planning: Planning) -> GraftaxError | None:
    """Why the answer is no, if it is."""
    from graftax.errors import Failure, PlanError

    try:
        made.require_complete()
    except PlanError as error:
        return error
    if planning.strict_assumptions and made.assumptions:
        failures = [Failure(str(assumption)) for assumption in made.assumptions]
        return PlanError(f"the plan rests on {len(failures)} assumption(s) (--strict-assumptions):", failures)
    return None


def _written(out: str, leaves: int, nbytes: int) -> str:
    from graftax.formats.sizes import size_text

    return f"wrote {escape(out)}: {leaves} leaves, {size_text(nbytes)}"


def _by_reason(names: Mapping[str, str]) -> list[str]:
    """`bn{1..9}.num_batches_tracked (9): why`, a line a reason."""
    from graftax.plan_text import fold_names

    reasons: dict[str, list[str]] = {}
    for name, reason in names.items():
        reasons.setdefault(reason, []).append(name)
    out: list[str] = []
    for reason, group in reasons.items():
        folded = fold_names(group)
        more = f" and {len(folded) - 4} more" if len(folded) > 4 else ""
        out.append(f"{', '.join(folded[:4])}{more} ({len(group)}): {escape(reason, 300)}")
    return out


# ---------------------------------------------------------------- running


@dataclass(slots=True)
class _Answer:
    """What is printed in the end."""

    command: str
    exit: int = OK
    outcome: Outcome = field(default_factory=Outcome)
    message: str = ""
    errors: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def run(argv: Sequence[str]) -> int:
    """Run one command; prints the result and the message, gives the exit code."""
    as_json = "--json" in argv
    answer = _Answer(next((word for word in argv if not word.startswith("-")), ""))
    try:
        result = app(list(argv), exit_on_error=False, print_error=False)
        if not isinstance(result, Outcome):
            return OK  # help or version, printed already
        answer.outcome = result
        if result.error is not None:
            _take(answer, result.error)
    except CycloptsError as error:
        answer.exit, answer.message = UsageError.exit_code, f"{error}\nTry: graftax {_known(answer.command)}--help"
        answer.errors = [{"what": str(error)}]
    except GraftaxError as error:
        _take(answer, error)
    except KeyboardInterrupt:
        answer.exit, answer.message = INTERRUPTED, "interrupted"
    except OSError as error:
        answer.exit, answer.message = 5, f"{escape(error.filename or '')}: {error.strerror or error}".lstrip(": ")
        answer.errors = [{"what": answer.message}]
    except Exception as error:
        where = _where(error)
        answer.exit = INTERNAL
        answer.message = (
            f"{type(error).__name__}: {escape(error, 600)}\n  in {where}\nThis is a bug, in the code named above."
        )
        answer.errors = [{"what": answer.message}]
    _print(answer, as_json)
    return answer.exit


def _known(command: str) -> str:
    """The command's name and a blank, or nothing where there is no such command."""
    return f"{command} " if command in ("inspect", "plan", "port", "replace", "diff", "layers") else ""


def _take(answer: _Answer, error: GraftaxError) -> None:
    answer.exit, answer.message = error.exit_code, f"{type(error).__name__}: {error}"
    answer.errors = [failure.as_json() for failure in error.failures] or [{"what": str(error)}]


def _where(error: BaseException) -> str:
    """Whose code failed: the innermost frame."""
    trace, name = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        name = f"{trace.tb_frame.f_globals.get('__name__', Path(code.co_filename).name)}.{code.co_name}"
        trace = trace.tb_next
    return escape(name)


def _print(answer: _Answer, as_json: bool) -> None:
    if as_json:
        document = {
            "schema": 1,
            "command": answer.command,
            "ok": answer.exit == OK,
            "exit": answer.exit,
            "result": answer.outcome.data,
            "errors": answer.errors,
        }
        _write(sys.stdout, json.dumps(document, ensure_ascii=False, allow_nan=False))
    elif answer.outcome.text:
        _write(sys.stdout, answer.outcome.text)
    if answer.message:
        _write(sys.stderr, clip(answer.message))


def _write(stream: Any, text: str) -> None:
    """A line, whatever the stream's encoding can hold."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def main() -> None:
    """The `graftax` command."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (graftax inspect ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


if __name__ == "__main__":
    main()
