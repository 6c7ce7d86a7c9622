"""`graftax verify`: check that the Flax model computes what the torch module computes; if not, say where and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from graftax.cli.common import Flag, Json, Outcome, live_model, refuse_own_input, stdout_style
from graftax.errors import ParityError, PlanError, UsageError, escape

if TYPE_CHECKING:
    from graftax.parity.report.model import ParityReport


def verify_command(
    *,
    torch: str | None = None,
    golden: str | None = None,
    flax: str | None = None,
    source: str | None = None,
    weights: str | None = None,
    inputs: str | None = None,
    layout: str | None = None,
    out_layout: str | None = None,
    rules: str | None = None,
    plan: str | None = None,
    suggest: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    record: str | None = None,
    record_layers: Annotated[bool, Flag] = False,
    report: str | None = None,
    json: Json = False,
) -> Outcome:
    """Check that the Flax model computes what the torch module computes. If it does not, name the first layer that
    diverges and the cause, and exit 1.

    Parameters
    ----------
    torch
        pkg.mod:factory of a torch.nn.Module, in evaluation mode.
    golden
        A file that --record wrote, instead of --torch: no torch is needed.
    flax
        pkg.mod:factory of gx.linen(module, example) or of an nnx.Module.
    source
        A checkpoint with torch's weights, loaded into the torch module.
    weights
        The Flax weights, or a torch checkpoint to port. Without it: the weights that the Flax model holds; if it holds
        none, torch's weights, ported.
    inputs
        A .npz or .safetensors file (arg0, arg1, ... by position, other names by keyword; torch.NAME and flax.NAME for
        one side) or pkg.mod:factory. Without it: the example that gx.linen(...) was given.
    layout
        The axes of the inputs in torch and in Flax, such as 'NCHW -> NHWC'.
    out_layout
        The same for the outputs.
    rules
        A rules file for the plan that pairs the layers and ports weights.
    plan
        A finished plan from torch to Flax, instead of one made here.
    suggest
        Write the open questions of the plan here, as a rules file to edit.
    atol
        Absolute tolerance: judge the outputs by it instead of by float32's own error.
    rtol
        Relative tolerance, used in the same way.
    record
        Record torch's run in this file (.safetensors), for --golden. --flax may be left out. Written only on exit 0.
    record_layers
        Record the inputs and outputs of every layer too, so that a replay can name the layer that diverges.
    report
        Write the whole report here, as one HTML page.
    """
    _check_options(torch, golden, flax, source, inputs, layout, record, record_layers)
    for out in (record, report):
        if out is not None:
            refuse_own_input(out, golden, source, weights, inputs, rules, plan)
    model = None if flax is None else live_model(flax)
    finished = None
    if plan is not None:
        from graftax.plans import Plan

        finished = Plan.load(plan)
    shared: dict[str, Any] = {"source": source, "rules": rules, "plan": finished}
    judged = shared | {"atol": atol, "rtol": rtol, "out_layout": out_layout}
    if golden is not None:
        from graftax.parity.replay import check_golden

        with _suggesting(suggest):
            return _outcome(check_golden(golden, model, weights, **judged), report, json)
    given, notes = _inputs(inputs, model)
    assert torch is not None
    module, shared["source"] = _with_weights(_torch_model(torch), source)
    judged |= shared
    found: ParityReport | None = None
    if model is not None:
        from graftax.parity.check import check_parity

        with _suggesting(suggest):
            found = check_parity(module, model, given, weights, layout=layout, **judged)
        found = replace(found, notes=(*found.notes, *notes))
    recorded: list[str] = []
    if record is not None and (found is None or found.ok):
        from graftax.parity.replay import record_golden

        kept = record_golden(
            module, model, given, record, layout=layout, out_layout=out_layout, layers=record_layers, **shared
        )
        layers = f" and {len(kept.reference.records)} layer calls" if record_layers else ""
        recorded.append(f"recorded {escape(record)}: {kept.torch_name}, its outputs{layers}")
    if found is None:
        return Outcome({"recorded": record}, "\n".join(recorded))
    if record is not None and not recorded:
        recorded.append(f"{escape(record)} was not written, because parity fails (without --flax it is written)")
    return _outcome(found, report, json, recorded, record if found.ok else None)


@contextmanager
def _suggesting(path: str | None) -> Iterator[None]:
    """If the plan is incomplete, write its open questions before the error leaves."""
    try:
        yield
    except PlanError as error:
        if path is not None and error.questions:
            from graftax.report.suggesting import write_suggestions

            write_suggestions(error, path)
        raise


def _check_options(
    torch: str | None, golden: str | None, flax: str | None, source: str | None, inputs: str | None,
    layout: str | None, record: str | None, record_layers: bool,
) -> None:  # fmt: skip
    """UsageError for options that do not go together."""
    if (torch is None) == (golden is None):
        raise UsageError("say what to compare with: exactly one of --torch pkg.mod:factory and --golden FILE")
    if flax is None and (golden is not None or record is None):
        raise UsageError("--flax pkg.mod:factory is missing", next="Only --torch with --record can do without it.")
    if record_layers and record is None:
        raise UsageError("--record-layers goes with --record")
    if golden is not None:
        given = {"--inputs": inputs, "--layout": layout, "--record": record}
        clash = [name for name, value in given.items() if value is not None]
        if clash:
            raise UsageError(f"a golden file has its own inputs: {', '.join(clash)} cannot go with --golden")
    if flax is None and inputs is None:
        raise UsageError("--inputs is missing", next="Without --flax there is no example to take them from.")


def _torch_model(text: str) -> Any:
    """The live torch module of a factory. UsageError for a Flax model: it is a reference in the library alone."""
    from graftax.parity.reference_side import is_flax_model

    made = live_model(text)
    if is_flax_model(made):
        raise UsageError(
            f"--torch {escape(text)} must be a torch.nn.Module, not a Flax model",
            next="In the library a Flax model may be the reference: gx.check_parity(reference, model, inputs).",
        )
    return made


def _with_weights(module: Any, source: str | None) -> tuple[Any, str | None]:
    """(the torch module, the checkpoint that its run reads weights from). A module that has values gets the weights
    loaded; for one on the meta device they are read layer by layer."""
    from graftax.adapters import kind_of
    from graftax.execute.opening import open_tree

    if source is None or kind_of(module) != "torch module" or not open_tree(module).has_values:
        return module, source
    from graftax.api import load_into

    return load_into(module, source), None


def _inputs(text: str | None, model: Any) -> tuple[Any, tuple[str, ...]]:
    from graftax.parity.input_files import example_inputs, read_inputs

    return (read_inputs(text), ()) if text is not None else example_inputs(model)


def _outcome(
    found: ParityReport, report: str | None, as_json: bool, lines: list[str] | None = None, recorded: str | None = None
) -> Outcome:
    messages = list(lines or ())
    if report is not None:
        found.save_html(report)
        messages.append(f"wrote {escape(report)}")
    data = {**found.as_json(), "recorded": recorded, "report": report}
    error = None
    if not found:
        from graftax.parity.report.words import one_line

        error = ParityError(one_line(found), next="" if report or as_json else "More: --report out.html, --json")
    return Outcome(data, "" if as_json else "\n".join([_text(found), *messages]), error)


def _text(found: ParityReport) -> str:
    """The report in the encoding and colours that stdout can show."""
    from graftax.parity.report.text import parity_text

    return parity_text(found, **stdout_style())
