"""`check_parity` and `assert_parity`: prove a port, and name the layer and the cause when it is off."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftax.errors import GraftaxError, ModelError, ParityError, escape
from graftax.parity.pairing import Pair, find_pairs
from graftax.parity.records import THRESHOLD, Reference, Runner
from graftax.parity.report_model import Cause, LayerRow, ParityReport, SettingRow, WeightRow
from graftax.plans import Plan
from graftax.tree import Checkpoint, Module

if TYPE_CHECKING:
    from graftax.parity.passes import Judged
    from graftax.parity.sides import FlaxSide


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
    """Is the Flax model the torch model? A report that is truthy when it is; printed, it names the first layer that
    diverges and the cause.

    torch_module  a torch.nn.Module in evaluation mode; weights on the meta device are read from `source`
    flax_model    gx.linen(module, *example), a Linen module, an nnx.Module (as it is: call .eval() first)
    inputs        one array or a tuple for both sides, or gx.Inputs(torch=((args), {kw}), flax=((args), {kw}))
    weights       Flax variables, State, module or checkpoint; a torch state_dict or checkpoint, which is ported; None:
                  the values in flax_model, or where it has none, torch_module's, ported by gx.plan
    rules, plan   as for gx.plan; plan: a finished one, torch to Flax
    layout        of the inputs: 'NCHW -> NHWC', or one for each path; out_layout: of the outputs
    atol, rtol    decide the outputs instead of the calibrated float32 error
    layers        trace every layer; causes: try explanations at the first that diverges
    threshold     how many times torch float32's own error is an alarm
    rngs, seed    of the Flax side, where it draws random numbers

    The judgement: relative L2 against torch in float64, at most `threshold` times torch float32's own error. Neither
    model is changed. Raises PlanError where the weights cannot be planned, ModelError where a model's own code fails
    or was left in train mode, UsageError.
    """
    from graftax.adapters import open_tree
    from graftax.parity import passes, sides
    from graftax.parity.align import declared
    from graftax.parity.audit import Expected, audit
    from graftax.parity.inputs import Inputs
    from graftax.parity.reference import make_reference
    from graftax.parity.torch_runner import runners

    clock = _Clock()
    torch_module = getattr(torch_module, "_orig_mod", torch_module)  # of torch.compile
    calls = inputs if isinstance(inputs, Inputs) else None
    torch_tree = open_tree(torch_module)
    values_of = torch_tree if source is None else open_tree(source)
    torch64, torch32 = runners(torch_module, None if source is None else values_of, calls and calls.torch_call)
    torch_call, flax_call = sides.calls_of(inputs, layout, flax_model)
    like = sides.flax_like(flax_model, flax_call)
    with _layout_hint(layout, flax_call):
        flax_tree = open_tree(like)
    made, notes = _planned(torch_tree, flax_tree, rules, plan, needed=weights is None and not flax_tree.has_values)
    with _layout_hint(layout, flax_call):
        flax = sides.flax_side(like, flax_tree, weights, made, values_of, rngs, seed, calls and calls.flax_call)
    clock.lap("prepare")

    pairs = find_pairs(made.entries, torch_tree.modules, flax_tree.modules, torch_tree.aliases, flax_tree.aliases)
    watch = list(dict.fromkeys(pair.torch for pair in pairs)) if layers else []
    reference = make_reference(torch64, torch32, *torch_call, watch)
    clock.lap("torch")
    with _layout_hint(layout, flax_call):
        judged = passes.judge_flax(
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
    report = assemble(
        judged,
        rows,
        _settings(pairs, torch_tree.modules, flax_tree.modules),
        pairs,
        reference,
        threshold,
        notes=(*notes, *_notes(flax, flax_tree)),
        torch_modules=torch_tree.modules,
        names=(type(torch_module).__name__, flax.name),
    )
    if causes and not report.ok and report.first is not None:
        sought = _Search(reference, judged, report, (torch64, torch32, flax.runner), made, values_of, flax, expected)
        report = with_causes(report, sought.causes)
        clock.lap("causes")
    return replace(report, seconds=clock.seconds(judged.seconds))


def assert_parity(*args: Any, **kwargs: Any) -> ParityReport:
    """`check_parity` that raises ParityError, with the report as its text, where the answer is no."""
    __tracebackhide__ = True  # pytest shows the line of the test
    report = check_parity(*args, **kwargs)
    if not report:
        error = ParityError(str(report))
        error.report = report
        raise error
    return report


def with_causes(report: ParityReport, search: Callable[[], tuple[Cause, ...]]) -> ParityReport:
    """The report with what a search for causes found. A search that fails costs the cause and not the report."""
    try:
        return replace(report, causes=search())
    except Exception as error:
        note = f"the search for causes failed: {type(error).__name__}: {escape(error, 300)}"
        return replace(report, notes=(*report.notes, note))


def assemble(
    judged: Judged,
    weights: tuple[WeightRow, ...],
    settings: tuple[SettingRow, ...],
    pairs: Sequence[Pair],
    reference: Reference,
    threshold: float,
    *,
    notes: tuple[str, ...] = (),
    torch_modules: Mapping[str, Module] | None = None,
    names: tuple[str, str] = ("torch", "Flax"),
) -> ParityReport:
    """The report of what was found, without causes. It is ok when every output and every layer is within the threshold
    and the weights are the plan's, bit for bit."""
    ok = all(row.ok for row in judged.outputs) and judged.first is None and not weights
    not_traced = {f"torch:{path}": why for path, why in reference.not_traced.items()}
    not_traced |= {f"flax:{path}": why for path, why in judged.not_traced.items()}
    modules = torch_modules or {}
    own = parametrised(modules)
    paired = {pair.torch for pair in pairs}
    covered = {path for path in own if any(_inside(path, holder) for holder in paired - {""}) or path in paired}
    for path in own - covered:
        not_traced.setdefault(f"torch:{path}", "the plan gives it no Flax module of its own")
    return ParityReport(
        ok,
        judged.outputs,
        judged.layers,
        judged.first,
        judged.where,
        (),
        weights,
        settings,
        not_traced,
        (*notes, *judged.notes),
        threshold,
        paired=(len({row.pair for row in judged.layers}), len(covered), len(own)),
        torch_name=names[0],
        flax_name=names[1],
    )


def parametrised(modules: Mapping[str, Module]) -> set[str]:
    """Modules that own leaves themselves and not through a child."""
    own: set[str] = set()
    for path, module in modules.items():
        children = [child for child in modules if child != path and _inside(child, path)]
        below = {name for child in children for name in modules[child].leaves.values()}
        if set(module.leaves.values()) - below:
            own.add(path)
    return own


def _inside(path: str, holder: str) -> bool:
    return path == holder or not holder or path.startswith(f"{holder}.")


# ---------------------------------------------------------------- steps


def _planned(
    torch: Checkpoint, flax: Checkpoint, rules: Any, plan: Plan | None, needed: bool
) -> tuple[Plan, tuple[str, ...]]:
    """The plan from torch to Flax, and what to say of it. Where the weights are already there an incomplete plan will
    do: what it leaves open is not paired. PlanError where it is needed and incomplete."""
    from graftax.api import plan as make_plan

    made = plan if plan is not None else make_plan(torch, flax, rules=rules, unused="drop", dtype="like")
    if needed:
        made.require_complete()
    unused = [name for entry in made.entries if "unused" in (entry.dropped or "") for name in entry.sources]
    notes: tuple[str, ...] = ()
    if unused:
        text = ", ".join(escape(name) for name in unused[:4]) + (" ..." if len(unused) > 4 else "")
        notes = (f"{len(unused)} torch tensor(s) have no place in Flax and are left out: {text}",)
    if made.complete:
        return made, notes
    count = len(made.questions) + len(made.failures)
    return made, (
        *notes,
        f"the plan leaves {count} thing(s) open, whose layers are not traced and whose weights are not audited: "
        f"{str((*made.questions, *made.failures)[0]).splitlines()[0]}",
    )


def _settings(pairs: Sequence[Pair], torch: Mapping[str, Module], flax: Mapping[str, Module]) -> tuple[SettingRow, ...]:
    from graftax.parity.settings_lint import lint_settings

    return tuple(lint_settings(pairs, torch, flax))


def _notes(flax: FlaxSide, tree: Checkpoint) -> tuple[str, ...]:
    from graftax.parity.sides import large

    half = sorted({spec.dtype for spec in tree.specs.values() if spec.floating and spec.bits < 32})
    notes: list[str] = []
    if half:
        notes.append(f"Flax holds weights in {', '.join(half)}: its rounding hides small faults; prove it in float32")
    if flax.ported:
        notes.append("the Flax weights are torch's, ported by the plan")
    if large(tree):
        notes.append("the model is judged block by block: weights are read as they are used")
    return tuple(notes)


class _layout_hint:
    """Adds to an error of the Flax model that images may want another layout."""

    def __init__(self, layout: Any, call: Any) -> None:
        from graftax.parity import values

        shapes = [array.shape for _, array in values.arrays(call) if array.dtype.kind == "f" and array.ndim > 3]
        self.shapes = [] if layout is not None else shapes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.shapes and isinstance(error, GraftaxError) and "layout=" not in str(error):
            raise ModelError(
                str(error),
                error.failures,
                next=f"Inputs of shape {tuple(self.shapes[0])} were passed to Flax as they are; if that is torch's "
                "NCHW, pass layout='NCHW -> NHWC' (and out_layout= for such outputs).",
            ) from error


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now

    def seconds(self, more: Mapping[str, float]) -> dict[str, float]:
        return {**self.laps, **more, "total": time.perf_counter() - self.start}


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """The cause finder's call."""

    reference: Reference
    judged: Judged
    report: ParityReport
    runners: tuple[Runner, Runner, Runner]
    plan: Plan
    source: Checkpoint
    flax: FlaxSide
    expected: Mapping[str, Any]

    def causes(self) -> tuple[Cause, ...]:
        from graftax.parity.causes import find_causes
        from graftax.parity.sides import Read
        from graftax.parity.suspect import Suspect

        row, where = self.report.first, self.report.where
        assert row is not None
        assert where is not None
        kept = self.judged.kept.get(row.site_flax)
        record = self.reference.records[row.site_torch]
        torch64, torch32, flax = self.runners
        suspect = Suspect(
            row,
            where,
            self.reference,
            None if kept is None else kept.arrived[0],
            None if kept is None else kept.arrived[1],
            None if kept is None else kept.output,
            record.args if kept is None else kept.given[0],
            record.kwargs if kept is None else kept.given[1],
            None if kept is None else kept.wanted,
            torch32,
            torch64,
            flax,
            self.plan,
            Read(self.source),
            self.flax.weights,
            self.expected,
            None,
            self._before(row),
            tuple(other for other in self.report.layers if other.status == "diverges" and other is not row),
            self.report.threshold,
        )
        return tuple(find_causes(suspect))

    def _before(self, row: LayerRow, count: int = 8) -> tuple[tuple[LayerRow, Any], ...]:
        """The layers whose calls ended before this one began (for a container whose own code is to blame: ended),
        nearest first, with their outputs in Flax's layout."""
        from graftax.parity import values

        rows = {other.site_torch: other for other in self.report.layers}
        out: list[tuple[LayerRow, Any]] = []
        for what, site in self.reference.events:
            if what == self.report.where and site == row.site_torch:
                break
            other = rows.get(site)
            met = None if other is None else self.judged.met.get(other.site_flax)
            if what != "out" or other is None or met is None or not met.outward:
                continue
            match = met.outward[0]
            arrays = values.arrays(self.reference.records[site].output)
            out.append((other, match.turn(arrays[match.torch][1])))
        return tuple(reversed(out[-count:]))
