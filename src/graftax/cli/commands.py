"""The commands. Each opens its inputs, calls the library and returns an Outcome, which `running` prints."""

from __future__ import annotations

from collections.abc import Mapping
from json import loads as parse_json
from typing import Annotated, Any

from cyclopts import App, Parameter

from graftax import __version__
from graftax.cli.ablate import ablate_command
from graftax.cli.common import (
    Flag,
    Json,
    Like,
    MaybeOut,
    Out,
    Outcome,
    Strict,
    Suggest,
    no_of,
    open_source,
    planned,
    refuse_own_input,
)
from graftax.cli.compare import compare_command
from graftax.cli.flags import flags, options_given
from graftax.cli.help_text import HelpText
from graftax.cli.replace import replace_command
from graftax.cli.verify import verify_command
from graftax.errors import escape
from graftax.plans import PlanOptions, WriteOptions
from graftax.tree import Side

app = App(
    name="graftax",
    help="Port weights between PyTorch and Flax, operate on them, and prove the result.",
    help_format="plaintext",
    help_formatter=HelpText(),
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


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
    """Print the names, shapes and dtypes in a checkpoint.

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
    from graftax.report.inspecting import inspect

    checkpoint = open_source(ckpt)
    if spec:
        from graftax.formats.spec_file import dump_spec

        text = dump_spec(checkpoint)
        return Outcome(parse_json(text), text.rstrip("\n"))
    found = inspect(checkpoint, stats, hashes=hashes)
    return Outcome(found.as_json(), "" if json else str(found))


@app.command(name="plan")
@flags(like=PlanOptions)
def plan_command(
    source: str,
    /,
    *,
    like: Like = None,
    suggest: Suggest = None,
    strict_assumptions: Strict = False,
    out: MaybeOut = None,
    json: Json = False,
    **options: Any,
) -> Outcome:
    """Show which source tensor becomes which leaf of LIKE, and how. Writes no weights. Exits 1 if a question or misfit
    remains.

    Parameters
    ----------
    source
        The checkpoint to port.
    out
        Write the plan here (JSON), for port --plan.
    """
    made, opened, opened_like = planned(source, like, options, suggest=suggest)
    no = no_of(made, strict_assumptions)
    if out is not None and no is None:
        from graftax.formats.io.own_file import refuse_other_file

        refuse_other_file(out, "graftax_plan", "a plan")
        made.save(out)
    return Outcome(made.as_json(), "" if json else _opened(str(made), opened, opened_like), no)


@app.command(name="port")
@flags(like=PlanOptions, out=WriteOptions)
def port_command(
    source: str,
    /,
    *,
    like: Like = None,
    suggest: Suggest = None,
    strict_assumptions: Strict = False,
    plan: str | None = None,
    out: Out,
    dry_run: Annotated[bool, Flag] = False,
    json: Json = False,
    **options: Any,
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
    dry_run
        Plan and check everything, write nothing.
    """
    from graftax.api import write_plan
    from graftax.plans.text import left_out_lines
    from graftax.report.progress import progress_bar

    refuse_own_input(out, options.get("rules"), plan)
    made, opened, opened_like = planned(source, like, options, plan, suggest)
    no = no_of(made, strict_assumptions)
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
    with progress_bar("porting", sum(spec.nbytes for spec in made.like.specs.values())) as advance:
        receipt = write_plan(made, opened, opened_like, out, options_given(WriteOptions, options), advance)
    data |= {"written": True, "receipt": receipt.as_json()}
    lines = [_opened(_written(out, receipt.leaves, receipt.nbytes), opened, opened_like), receipt.text]
    lines += left_out_lines(made)
    lines += [f"dropped: {line}" for line in _by_reason(receipt.dropped)]
    lines += [f"not from the source: {line}" for line in _by_reason(receipt.filled)]
    lines += [f"note: {escape(note, 400)}" for note in receipt.notes]
    lines += [f"assumed: {assumption}" for assumption in made.assumptions]
    return Outcome(data, "\n".join(lines))


@app.command(name="diff")
def diff_command(
    a: str,
    b: str,
    /,
    *,
    plan: str | None = None,
    like: str | None = None,
    from_: Annotated[Side | None, Parameter(name="--from")] = None,
    to: Side | None = None,
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
    from_
        Whether A is torch or Flax, if it does not say so itself.
    to
        Whether LIKE and B are torch or Flax, if they do not say so themselves.
    atol
        Absolute tolerance; without atol and rtol every bit counts.
    rtol
        Relative tolerance.
    """
    from graftax.errors import DifferenceError
    from graftax.report.comparing import comparison_text, diff

    found = diff(a, b, plan=plan, like=like, source_side=from_, to=to, atol=atol, rtol=rtol)
    error = None
    if not found.equal:
        error = DifferenceError(" and ".join(map(escape, found.labels)) + " differ", next=found.hint)
    return Outcome(found.as_json(), "" if json else comparison_text(found.data), error)


@app.command(name="layers")
def layers_command(*, json: Json = False) -> Outcome:
    """What is supported, exact or measured, and what is refused and why."""
    from graftax.layers import layer_rows, layers_text

    return Outcome(layer_rows(), "" if json else layers_text())


app.command(replace_command, name="replace")
app.command(verify_command, name="verify")
app.command(compare_command, name="compare")
app.command(ablate_command, name="ablate")


# ---------------------------------------------------------------- helpers


def _opened(text: str, *ends: Any) -> str:
    """`text`, below the paths of the files that were opened for a folder or a hub id."""
    from graftax.report.inspecting import opened_file

    found = [(end, path) for end in ends if end is not None and (path := opened_file(end))]
    return "\n".join([*(f"opened: {escape(end.label)}: {escape(path, 400)}" for end, path in found), text])


def _written(out: str, leaves: int, nbytes: int) -> str:
    from graftax.formats.io.sizes import size_text

    return f"wrote {escape(out)}: {leaves} leaves, {size_text(nbytes)}"


def _by_reason(names: Mapping[str, str]) -> list[str]:
    """`bn{1..9}.num_batches_tracked (9): why`, one line per reason."""
    from graftax.plans.text import by_reason

    return [f"{folded} ({count}): {escape(reason, 300)}" for reason, count, folded in by_reason(names, 4)]
