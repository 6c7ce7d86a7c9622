"""`graftax compare`: what an edit of a Flax model's weights does, module by module."""

from __future__ import annotations

from typing import Annotated, Any

from graftax.cli.common import Flag, Json, Outcome, live_model, refuse_own_input, stdout_style
from graftax.errors import escape


def compare_command(
    a: str,
    b: str,
    /,
    *,
    flax: str,
    inputs: str | None = None,
    logits: Annotated[bool, Flag] = False,
    report: str | None = None,
    json: Json = False,
) -> Outcome:
    """Run one Flax model with the weights A and with the weights B, and show for every module what the edit does given
    the same input, and in a free run.

    Parameters
    ----------
    a
        A checkpoint in Flax form, with the model's names and shapes.
    b
        Another: the edited one.
    flax
        pkg.mod:factory of gx.linen(module, *batch) or of an nnx.Module.
    inputs
        A .npz or .safetensors file (arg0, arg1, ... by position, other names by keyword) or pkg.mod:factory. Without
        it: the batch that gx.linen(...) was given.
    logits
        The output is logits, or holds an array with that name: KL and top-1 flips too.
    report
        Write the whole comparison here, as one HTML page.
    """
    from graftax.studies.comparing import compare
    from graftax.studies.comparison_text import comparison_text

    if report is not None:
        refuse_own_input(report, a, b, inputs)
    model = live_model(flax)
    given: Any = None
    if inputs is not None:
        from graftax.parity.input_files import read_inputs

        given = read_inputs(inputs)
    found = compare(a, b, like=model, inputs=given, logits=logits)
    lines: list[str] = []
    if report is not None:
        found.save_html(report)
        lines.append(f"wrote {escape(report)}")
    text = "" if json else "\n".join([comparison_text(found, **stdout_style()), *lines])
    return Outcome({**found.as_json(), "report": report}, text)
