"""`graftax replace`: give one value to the leaves that a selector picks."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from graftax.cli.common import Flag, Json, Out, Outcome, open_source
from graftax.errors import UsageError, escape


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
    layout: str | None = None,
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
        Every value is drawn from a normal distribution of this standard deviation (needs --seed).
    add_normal
        Normal noise of this standard deviation is added to every value (needs --seed).
    seed
        The seed of the draws; each leaf draws from (seed, path).
    scaled
        Every value is multiplied by this.
    quantized
        Every value is rounded to this many bits, symmetric per channel; the dtype stays.
    axis
        The channel axis of --quantized (default: the last axis of a matrix; other leaves need this option).
    from_
        Another checkpoint to take the values from.
    key
        The name of the tensor in that checkpoint.
    layout
        How the donor is stored, if its shape does not tell: linear, conv, identity, or a layout that the error message
        offers.
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
    from graftax.surgery import values, write_replacement

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
        value = values.quantized(quantized, axis)
    elif from_ is not None:
        value = values.from_checkpoint(from_, key, layout)
    else:
        value = values.zeros()
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


def _number(text: str) -> int | float:
    """An integer where the text is one (int64 beyond 2^53 keeps its value), else a float. UsageError for neither."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"--constant {escape(text)!r} is not a number")
