"""`graftax replace`: give one value to the leaves that a selector picks."""

from __future__ import annotations

from typing import Annotated, Any

from graftax.cli.common import Flag, Json, Out, Outcome, open_source
from graftax.cli.flags import flags
from graftax.cli.value_flags import value_parameters, values_given
from graftax.errors import escape


@flags(select=value_parameters())
def replace_command(
    ckpt: str,
    select: str,
    /,
    *,
    out: Out,
    expect: int | None = None,
    no_clobber: Annotated[bool, Flag] = False,
    dry_run: Annotated[bool, Flag] = False,
    json: Json = False,
    **words: Any,
) -> Outcome:
    """Replace the leaves that SELECT picks; every other leaf stays bit for bit.

    Parameters
    ----------
    ckpt
        The checkpoint to operate on.
    select
        A path or a glob: * stays in a part, ** spans parts.
    out
        Where to write; OUT may not be CKPT.
    expect
        How many leaves SELECT must pick.
    no_clobber
        Refuse an OUT that exists.
    dry_run
        Say what would change, write nothing.
    """
    from graftax.errors import PlanError
    from graftax.report.surgery_text import replacement_text
    from graftax.surgery import write_replacement

    (value,) = values_given(words)
    checkpoint = open_source(ckpt)
    storage = checkpoint.storage
    if storage.format == "torch" and storage.metadata and "::" not in ckpt:
        others = ", ".join(escape(name) for name in storage.metadata if name != "container") or "nothing else"
        inside = storage.metadata.get("container", ".")
        raise PlanError(
            f"{escape(ckpt)} holds more than its weights ({others}), which a replacement would leave behind",
            next=f"To write the weights alone: {escape(ckpt)}::{escape(inside)}",
        )
    report = write_replacement(
        checkpoint, select, value, None if dry_run else out, expect=expect, clobber=not no_clobber
    )
    return Outcome(
        {"out": out, "written": not dry_run} | report, "" if json else replacement_text(report, out, dry_run)
    )
