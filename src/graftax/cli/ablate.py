"""`graftax ablate`: change one leaf, module or head at a time, and measure what the model gives."""

from __future__ import annotations

from typing import Any, Literal

from graftax.cli.common import Json, Outcome, live_model, refuse_own_input, stdout_style
from graftax.cli.flags import flags
from graftax.cli.value_flags import value_parameters, values_given
from graftax.errors import UsageError, escape


@flags(select=value_parameters(several=True))
def ablate_command(
    select: str,
    /,
    *,
    flax: str,
    weights: str | None = None,
    inputs: str | None = None,
    exclude: str | None = None,
    each: Literal["leaf", "module", "head"] = "leaf",
    metric: str | None = None,
    report: str | None = None,
    json: Json = False,
    **words: Any,
) -> Outcome:
    """Give one leaf, module or head at a time another value, run the model, and print the largest effect first. Each
    value flag may be given more than once.

    Parameters
    ----------
    select
        A path or a glob of what is changed, one at a time: * stays in a part, ** spans parts; of modules with --each
        module and --each head.
    flax
        pkg.mod:factory of gx.linen(module, example) or of an nnx.Module.
    weights
        The weights: a Flax or a torch checkpoint. Without it: those that the nnx.Module holds.
    inputs
        A .npz or .safetensors file (arg0, arg1, ... by position, other names by keyword) or pkg.mod:factory. Without
        it: the example that gx.linen(...) was given.
    exclude
        A path or a glob of leaves that stay as they are.
    each
        leaf; module: all floating weights below it together; head: the rows of one query head in the output projection
        of an attention.
    metric
        pkg.mod:function that takes the outputs and gives a number, or a dict of numbers. Without it: relative L2 and
        cosine against the outputs of the unchanged weights.
    report
        Write the whole study here, as one HTML page.
    """
    values = values_given(words, several=True)
    if report is not None:
        refuse_own_input(report, weights, inputs)
    from graftax.execute.factories import named_function
    from graftax.parity.input_files import read_inputs
    from graftax.studies.ablation import ablate
    from graftax.studies.study_text import study_text

    measure = None if metric is None else named_function(metric)
    model = live_model(flax)
    given = None if inputs is None else read_inputs(inputs)
    study = ablate(
        model, _weights(model, weights), select, values, each=each, exclude=exclude, metric=measure, inputs=given
    )
    lines: list[str] = []
    if report is not None:
        study.save_html(report)
        lines.append(f"wrote {escape(report)}")
    text = "" if json else "\n".join([study_text(study, **stdout_style()), *lines])
    return Outcome({**study.as_json(), "report": report}, text)


def _weights(model: Any, weights: str | None) -> Any:
    """The weights in the model's own containers."""
    from graftax.api import port
    from graftax.execute.opening import open_tree

    if weights is not None:
        return port(weights, model)
    if not open_tree(model).has_values:
        raise UsageError("the model has no values", next="Give --weights CKPT.")
    return model
