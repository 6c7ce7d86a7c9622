"""`check_parity` and `assert_parity`: prove that a port is right; if it is not, name the layer and the cause."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from graftax.parity.pairing import find_pairs
from graftax.parity.records import THRESHOLD
from graftax.parity.report.model import ParityReport
from graftax.plans import Plan

P = ParamSpec("P")
R = TypeVar("R")


def check_parity(
    torch_module: Any,
    flax_model: Any,
    inputs: Any,
    weights: Any = None,
    *,
    rules: Any = None,
    plan: Plan | None = None,
    source: Any = None,
    layout: Any = None,
    out_layout: Any = None,
    atol: float | None = None,
    rtol: float | None = None,
    layers: bool = True,
    causes: bool = True,
    threshold: float = THRESHOLD,
    rngs: Any = None,
    seed: int = 0,
) -> ParityReport:
    """Check that the Flax model computes what the torch model computes. The report is true if it does; printed, it
    names the first layer that diverges and the cause.

    torch_module  a torch.nn.Module in evaluation mode; weights on the meta device are read from `source`
    flax_model    gx.linen(module, *example), a Linen module, or an nnx.Module (its mode is not changed: call .eval()
    first)
    inputs        one array or a tuple for both sides, or gx.Inputs(...), in which layouts can travel
    weights       Flax variables, State, module or checkpoint; or a torch state_dict or checkpoint, which is ported.
                  None: the values in flax_model; if it has none, torch_module's weights, ported by gx.plan
    rules, plan   rules as for gx.plan; or a finished plan from torch to Flax
    layout        the layout of the inputs: 'NCHW -> NHWC', or one for each path; out_layout: that of the outputs
    atol, rtol    tolerances that judge the outputs instead of the calibrated float32 error
    layers        trace every layer; causes: try explanations at the first layer that diverges
    threshold     an error is an alarm above this many times torch float32's own error
    rngs, seed    for the Flax side, if it draws random numbers

    Parity holds if the relative L2 error against torch in float64 is at most `threshold` times torch float32's own
    error. Neither model is changed. Raises PlanError if the weights cannot be planned, ModelError if a model's own code
    fails or was left in train mode, UsageError.
    """
    from graftax.adapters.layouts import declared
    from graftax.execute.opening import open_tree, open_weights
    from graftax.parity import compare, pipeline, prepare
    from graftax.parity.audit import Expected, audit
    from graftax.parity.reference import make_reference
    from graftax.parity.torch_runner import runners
    from graftax.probe.inputs import calls_of, inputs_of

    clock = pipeline.Clock()
    torch_module = getattr(torch_module, "_orig_mod", torch_module)  # the module inside torch.compile's wrapper
    given = inputs_of(inputs, layout, out_layout)
    layout, out_layout = given.layout, given.out_layout
    torch_tree = open_tree(torch_module)
    values_of = torch_tree if source is None else open_weights(source)
    torch64, torch32 = runners(torch_module, None if source is None else values_of, given.torch_call)
    torch_call, flax_call = calls_of(given, flax_model, torch_module)
    like = prepare.flax_like(flax_model, flax_call)
    with pipeline.LayoutHint(layout, flax_call):
        flax_tree = open_tree(like)
    made, notes = pipeline.planned(
        torch_tree, flax_tree, rules, plan, needed=weights is None and not flax_tree.has_values
    )
    with pipeline.LayoutHint(layout, flax_call):
        flax = prepare.flax_side(like, flax_tree, weights, made, values_of, rngs, seed, given.flax_call)
    clock.lap("prepare")

    pairs = find_pairs(
        made.entries,
        torch_tree.live.modules,
        flax_tree.live.modules,
        torch_tree.storage.aliases,
        flax_tree.storage.aliases,
    )
    watch = list(dict.fromkeys(pair.torch for pair in pairs)) if layers else []
    alone = pipeline.unpaired(torch_tree.live.modules, watch) if layers else []
    with pipeline.LayoutHint(layout, torch_call, "torch"):
        reference = make_reference(torch64, torch32, *torch_call, watch, alone)
    clock.lap("torch")
    with pipeline.LayoutHint(layout, flax_call):
        judged = compare.judge_flax(
            reference,
            flax.runner,
            *flax_call,
            pairs,
            torch_tree.specs,
            threshold=threshold,
            atol=atol,
            rtol=rtol,
            out_layout=declared(out_layout),
        )
    clock.lap("Flax")
    expected = Expected(made, values_of)
    same = isinstance(flax.weights, Expected) and flax.weights.source is values_of
    rows = audit(expected, flax.weights) if values_of.has_values and not same else ()
    clock.lap("audit")
    report = pipeline.assemble(
        judged,
        rows,
        pipeline.settings_of(pairs, torch_tree.live.modules, flax_tree.live.modules),
        pairs,
        reference,
        threshold,
        notes=(*notes, *pipeline.notes_of(flax, flax_tree)),
        torch_modules=torch_tree.live.modules,
        names=(type(torch_module).__name__, flax.name),
    )
    if causes and not report.ok and (report.first is not None or report.weights):
        sought = pipeline.Search(
            reference,
            judged,
            report,
            (torch64, torch32, flax.runner),
            made,
            values_of,
            flax,
            expected,
            flax_call,
            pairs,
        )
        report = pipeline.with_causes(report, sought.causes)
        clock.lap("causes")
    return replace(report, seconds=clock.seconds(judged.seconds), suspect=pipeline.suspect_of(made))


def _with_parameters_of(model: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """For a function that hands all its arguments on to `model`: type checkers and `help` show the parameters."""

    def named(function: Callable[..., R]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(model)  # pyright: ignore[reportFunctionMemberAccess]
        function.__annotations__ = dict(model.__annotations__)
        return function

    return named


@_with_parameters_of(check_parity)
def assert_parity(*args: Any, **kwargs: Any) -> ParityReport:
    """`check_parity` that raises ParityError, with the report as its text, if parity fails."""
    __tracebackhide__ = True  # pytest shows the line of the test
    from graftax.parity.pipeline import required

    return required(check_parity(*args, **kwargs))
