"""`graftax replace`: give one value to the leaves that a selector picks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from graftax.cli.common import Flag, Json, Out, Outcome, open_source
from graftax.cli.flags import flags, options_given
from graftax.cli.value_flags import value_parameters, values_given
from graftax.errors import escape
from graftax.plans import WriteOptions

_LIKE = "A tree with the same leaves whose modules tell what each leaf is: pkg.mod:factory."


@flags(select=value_parameters(), out=WriteOptions)
def replace_command(
    ckpt: str,
    select: str,
    /,
    *,
    exclude: str | None = None,
    like: Annotated[str | None, Parameter(help=_LIKE)] = None,
    out: Out,
    expect: int | None = None,
    dry_run: Annotated[bool, Flag] = False,
    json: Json = False,
    **options: Any,
) -> Outcome:
    """Replace the leaves that SELECT picks; every other leaf stays bit for bit.

    Parameters
    ----------
    ckpt
        The checkpoint to operate on.
    select
        A path or a glob: * stays in a part, ** spans parts, {a,b} is either. An index at its end, as in
        'fc.weight[:, 3]', is that part of each leaf.
    exclude
        A path or a glob of leaves that stay as they are.
    out
        Where to write; OUT may not be CKPT. The ending picks the format, as for port.
    expect
        How many leaves SELECT must pick.
    dry_run
        Say what would change, write nothing.
    """
    from graftax.errors import PlanError
    from graftax.report.progress import progress_bar
    from graftax.report.surgery_text import replacement_text
    from graftax.surgery import write_replacement

    (value,) = values_given(options)
    writing = options_given(WriteOptions, options)
    checkpoint = open_source(ckpt)
    storage = checkpoint.storage
    if storage.format == "torch" and storage.metadata and "::" not in ckpt:
        others = ", ".join(escape(name) for name in storage.metadata if name != "container") or "nothing else"
        inside = storage.metadata.get("container", ".")
        raise PlanError(
            f"{escape(ckpt)} holds more than its weights ({others}), which a replacement would leave behind",
            next=f"To write the weights alone: {escape(ckpt)}::{escape(inside)}",
        )
    with progress_bar("replacing", 0 if dry_run else sum(spec.nbytes for spec in checkpoint.specs.values())) as advance:
        report = write_replacement(
            checkpoint, select, value, None if dry_run else out, expect=expect, exclude=exclude, like=like,
            advance=advance, **asdict(writing),
        )  # fmt: skip
    return Outcome(
        {"out": out, "written": not dry_run} | report, "" if json else replacement_text(report, out, dry_run)
    )
