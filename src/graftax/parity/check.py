"""`check_parity` and `assert_parity`: prove that a port is right; if it is not, name the layer and the cause."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from graftax.parity.pairing import ModulePair, find_flax_pairs, find_pairs
from graftax.parity.records import THRESHOLD, Reference
from graftax.parity.report.model import ParityReport, ReferenceKind
from graftax.plans import Plan
from graftax.tree import Checkpoint

if TYPE_CHECKING:
    from graftax.parity.reference_side import ReferenceSide

P = ParamSpec("P")
R = TypeVar("R")
HALF = 1e-4
"""float32's own error in a layer is smaller; that of bfloat16 and float16 is larger."""


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

    torch_module  a torch.nn.Module in evaluation mode; weights on the meta device are read from `source`. Or a Flax
                  model, as the reference for another one (Linen against NNX, scanned against unscanned): gx.linen(...),
                  a Linen module (a bound one has its weights), or an nnx.Module in evaluation mode
    flax_model    gx.linen(module, *example), a Linen module, or an nnx.Module (its mode is not changed: call .eval()
    first)
    inputs        one array or a tuple for both sides, or gx.Inputs(...), in which layouts can travel
    source        the weights of the reference, if it does not hold them
    weights       Flax variables, State, module or checkpoint; or a torch state_dict or checkpoint, which is ported.
                  None: the values in flax_model; if it has none, torch_module's weights, ported by gx.plan
    rules, plan   rules as for gx.plan; or a finished plan from torch to Flax
    layout        the layout of the inputs: 'NCHW -> NHWC', or one for each path; out_layout: that of the outputs
    atol, rtol    tolerances that judge the outputs instead of the calibrated float32 error
    layers        trace every layer; causes: try explanations at the first layer that diverges
    threshold     an error is an alarm above this many times torch float32's own error
    rngs, seed    for the Flax side, if it draws random numbers

    Parity holds if the relative L2 error against torch in float64 is at most `threshold` times torch float32's own
    error. A Flax reference in float64 is its own program, interpreted in NumPy with every floating value in float64, so
    that casts inside the model do nothing; it needs memory for a float64 copy of the weights. Causes are not looked for
    then. Neither model is changed. Raises PlanError if the weights cannot be planned, ModelError if a model's own code
    fails or was left in train mode, UsageError.
    """
    from graftax.adapters.layouts import declared
    from graftax.execute.opening import open_tree
    from graftax.parity import compare, pipeline, prepare
    from graftax.parity.audit import Expected, audit
    from graftax.parity.reference import make_reference
    from graftax.parity.reference_side import flax_reference, is_flax_model, torch_side
    from graftax.probe.inputs import calls_of, inputs_of, with_example

    clock = pipeline.Clock()
    given = inputs_of(inputs, layout, out_layout)
    layout, out_layout = given.layout, given.out_layout
    against_flax = is_flax_model(torch_module)
    torch_call, flax_call = calls_of(given, flax_model, None if against_flax else torch_module)
    like = prepare.flax_like(flax_model, flax_call)
    with pipeline.LayoutHint(layout, flax_call):
        flax_tree = open_tree(like)
    if against_flax:
        torch_call = with_example(torch_call, torch_module)
        fallback = weights if weights is not None else flax_tree if flax_tree.has_values else None
        side = flax_reference(torch_module, torch_call, source, fallback, given.torch_call, rngs, seed)
    else:
        side = torch_side(torch_module, source, given.torch_call)
    tree, kind = side.tree, side.side
    made, notes = pipeline.planned(tree, flax_tree, rules, plan, needed=weights is None and not flax_tree.has_values)
    with pipeline.LayoutHint(layout, flax_call):
        flax = prepare.flax_side(like, flax_tree, weights, made, side.values, rngs, seed, given.flax_call)
    clock.lap("prepare")

    pairs = _pairs(side, made, flax_tree)
    watch = list(dict.fromkeys(pair.torch for pair in pairs)) if layers else []
    alone = pipeline.unpaired(tree.live.modules, watch) if layers and kind == "torch" else []
    with pipeline.LayoutHint(layout, torch_call, "torch"):
        reference = make_reference(side.wide, side.narrow, *torch_call, watch, alone)
    clock.lap("torch" if kind == "torch" else "reference")
    with pipeline.LayoutHint(layout, flax_call):
        judged = compare.judge_flax(
            reference,
            flax.runner,
            *flax_call,
            pairs,
            tree.specs,
            threshold=threshold,
            atol=atol,
            rtol=rtol,
            out_layout=declared(out_layout),
        )
    clock.lap("Flax")
    expected = Expected(made, side.values)
    same = isinstance(flax.weights, Expected) and flax.weights.source is side.values
    rows = audit(expected, flax.weights) if side.values.has_values and not same else ()
    clock.lap("audit")
    report = pipeline.assemble(
        judged,
        rows,
        pipeline.settings_of(pairs, tree.live.modules, flax_tree.live.modules, kind),
        pairs,
        reference,
        threshold,
        notes=(*notes, *side.notes, *pipeline.notes_of(flax, flax_tree, side.whose), *_weak(reference, kind)),
        torch_modules=tree.live.modules,
        names=(side.name, flax.name),
        kind=kind,
    )
    if causes and kind == "torch" and not report.ok and (report.first is not None or report.weights):
        sought = pipeline.Search(
            reference,
            judged,
            report,
            (side.wide, side.narrow, flax.runner),
            made,
            side.values,
            flax,
            expected,
            flax_call,
            pairs,
        )
        report = pipeline.with_causes(report, sought.causes)
        clock.lap("causes")
    return replace(report, seconds=clock.seconds(judged.seconds), suspect=pipeline.suspect_of(made))


def _pairs(side: ReferenceSide, made: Plan, flax: Checkpoint) -> tuple[ModulePair, ...]:
    """The module pairs that the plan shows."""
    ends = side.tree.live.modules, flax.live.modules, side.tree.storage.aliases, flax.storage.aliases
    if side.side == "torch":
        return find_pairs(made.entries, *ends)
    return find_flax_pairs(made.entries, made.inverse.entries if made.complete else (), *ends)


def _weak(reference: Reference, kind: ReferenceKind) -> tuple[str, ...]:
    """A note if a Flax reference computes in half precision: its own error then hides faults."""
    worst = max((record.out_error for record in reference.records.values()), default=0.0)
    if kind == "torch" or worst < HALF:
        return ()
    return (
        f"the reference as it is differs from itself in float64 by up to {worst:.0e}: it computes in half precision, "
        "which hides small faults; set dtype=float32 on both",
    )


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
