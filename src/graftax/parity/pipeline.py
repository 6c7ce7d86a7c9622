"""The steps that a check and a replay share: the plan, the notes, the report, the search for causes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftax.errors import GraftaxError, ModelError, ParityError, escape, worded
from graftax.parity.pairing import ModulePair
from graftax.parity.records import Reference, Runner
from graftax.parity.report.model import Cause, LayerRow, ParityReport, ReferenceKind, SettingRow, WeightRow
from graftax.plans import Plan
from graftax.tree import Checkpoint, Module

if TYPE_CHECKING:
    from graftax.parity.compare import Judged
    from graftax.parity.prepare import FlaxSide


def with_causes(report: ParityReport, search: Callable[[], tuple[Cause, ...]]) -> ParityReport:
    """The report with the causes that the search finds. If the search fails, the report stays, with a note."""
    try:
        return replace(report, causes=search())
    except Exception as error:
        note = f"the search for causes failed: {type(error).__name__}: {escape(error, 300)}"
        return replace(report, notes=(*report.notes, note))


def suspect_of(plan: Plan) -> str:
    """The module, a Flax one without its collection, before which the models part as running showed; '' if nothing
    did."""
    separator = "." if plan.source.side == plan.like.side == "torch" else "/"
    return plan.parted.removeprefix("params/").rpartition(separator)[0]


def required(report: ParityReport) -> ParityReport:
    """The report; ParityError, with the report as its text, if parity fails."""
    __tracebackhide__ = True  # pytest shows the line of the test
    if not report:
        error = ParityError(str(report))
        error.report = report
        raise error
    return report


def assemble(
    judged: Judged,
    weights: tuple[WeightRow, ...],
    settings: tuple[SettingRow, ...],
    pairs: Sequence[ModulePair],
    reference: Reference,
    threshold: float,
    *,
    notes: tuple[str, ...] = (),
    torch_modules: Mapping[str, Module] | None = None,
    names: tuple[str, str] = ("torch", "Flax"),
    kind: ReferenceKind = "torch",
) -> ParityReport:
    """The report without causes. It is ok if every output and every layer is within the threshold and the weights are
    bit for bit those that the plan makes."""
    ok = all(row.ok for row in judged.outputs) and judged.first is None and not weights
    side, dot = ("torch", ".") if kind == "torch" else ("reference", "/")
    not_traced = {f"{side}:{path}": why for path, why in reference.not_traced.items()}
    not_traced |= {f"flax:{path}": why for path, why in judged.not_traced.items()}
    modules = torch_modules or {}
    own = parametrised(modules, dot)
    paired = {pair.torch for pair in pairs}
    around = {path: [above for above in _ancestors(path, dot) if above] for path in own}
    covered = {path for path in own if path in paired or any(above in paired for above in around[path])}
    for path in own - covered:
        not_traced.setdefault(f"{side}:{path}", "the plan pairs it with no Flax module")
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
        reference=kind,
    )


def parametrised(modules: Mapping[str, Module], dot: str = ".") -> set[str]:
    """Modules that own leaves themselves, not only through a child."""
    below: dict[str, set[str]] = {}
    for path, module in modules.items():
        for above in _ancestors(path, dot):
            below.setdefault(above, set()).update(module.leaves.values())
    return {path for path, module in modules.items() if set(module.leaves.values()) - below.get(path, set())}


def unpaired(modules: Mapping[str, Module], paired: Sequence[str], dot: str = ".") -> list[str]:
    """Modules without a counterpart in Flax, if they own leaves or are norms: Flax may have used their activations
    wrongly, or left them out."""
    own = parametrised(modules, dot)
    norms = {path for path, module in modules.items() if "Norm" in module.kind}
    return [path for path in modules if path and path in own | norms and path not in paired]


def _ancestors(path: str, dot: str) -> Iterator[str]:
    """The modules that contain a module, the innermost first, the root ('') last."""
    while path:
        path = path.rpartition(dot)[0]
        yield path


def planned(
    torch: Checkpoint, flax: Checkpoint, rules: Any, plan: Plan | None, needed: bool
) -> tuple[Plan, tuple[str, ...]]:
    """(the plan from torch to Flax, the notes on it). If Flax already has its weights, an incomplete plan is enough:
    modules that it leaves open are not paired. PlanError if the plan is needed and incomplete."""
    from graftax.api import plan as make_plan

    made = plan if plan is not None else make_plan(torch, flax, rules=rules, unused="drop", dtype="like", inputs=False)
    if needed:
        made.require_complete()
    unused = [name for entry in made.entries if "unused" in (entry.dropped or "") for name in entry.sources]
    notes: tuple[str, ...] = ()
    if unused:
        text = ", ".join(escape(name) for name in unused[:4]) + (" ..." if len(unused) > 4 else "")
        notes = (
            f"{len(unused)} {'torch tensor(s)' if torch.side == 'torch' else 'leaves of the reference'} are unexpected "
            f"keys, left out because no Flax leaf takes them: {text}",
        )
    if made.complete:
        return made, notes
    count = len(made.questions) + len(made.failures)
    return made, (
        *notes,
        f"the plan leaves {count} question(s) or misfit(s) open; their layers are not traced and their weights not "
        f"audited. The first: "
        f"{str((*made.questions, *made.failures)[0]).splitlines()[0]}",
    )


def settings_of(
    pairs: Sequence[ModulePair], torch: Mapping[str, Module], flax: Mapping[str, Module], kind: ReferenceKind = "torch"
) -> tuple[SettingRow, ...]:
    from graftax.parity.settings_lint import flax_settings, lint_settings

    return tuple(lint_settings(pairs, torch, flax) if kind == "torch" else flax_settings(pairs, torch, flax))


def notes_of(flax: FlaxSide, tree: Checkpoint, whose: str = "torch's") -> tuple[str, ...]:
    from graftax.parity.prepare import large

    half = sorted({spec.dtype for spec in tree.specs.values() if spec.floating and spec.bits < 32})
    notes: list[str] = []
    if half:
        notes.append(
            f"Flax holds weights in {', '.join(half)}: its rounding hides small faults; check the model in float32"
        )
    if flax.ported:
        notes.append(f"the Flax weights are {whose}, ported by the plan")
    if large(tree):
        notes.append("the model is judged block by block: each module's weights are read when it is called")
    return tuple(notes)


_HINTS = "--layout 'NCHW -> NHWC' (and --out-layout", "layout='NCHW -> NHWC' (and out_layout="


class LayoutHint:
    """Adds a hint to a model's error: the images may need another layout. `call`: the call of the model of `side`."""

    def __init__(self, layout: Any, call: Any, side: str = "Flax") -> None:
        from graftax.adapters import nests

        self.side = side
        shapes = [array.shape for _, array in nests.arrays(call) if array.dtype.kind == "f" and array.ndim > 3]
        self.shapes = [] if layout is not None else shapes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.shapes and isinstance(error, GraftaxError) and not any(hint in str(error) for hint in _HINTS):
            raise ModelError(
                str(error),
                error.failures,
                next=f"Inputs of shape {tuple(self.shapes[0])} were passed to {self.side} as they are; if that is "
                f"{'Flax' if self.side == 'torch' else 'torch'}'s {'NHWC' if self.side == 'torch' else 'NCHW'}, "
                f"pass {worded(*_HINTS)} for such outputs).",
            ) from error


class Clock:
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
class Search:
    """The arguments of the search for causes, and the search."""

    reference: Reference
    judged: Judged
    report: ParityReport
    runners: tuple[Runner, Runner, Runner]
    plan: Plan
    source: Checkpoint
    flax: FlaxSide
    expected: Mapping[str, Any]
    call: tuple[tuple[Any, ...], Mapping[str, Any]]
    pairs: Sequence[ModulePair]

    def causes(self) -> tuple[Cause, ...]:
        from graftax.parity.causes import find_causes, weight_causes
        from graftax.parity.divergence import Divergence
        from graftax.parity.prepare import Read

        row, where = self.report.first, self.report.where
        if row is None or where is None:
            wrong = [one.path for one in self.report.weights if all(row.ok for row in self.report.outputs)]
            return weight_causes(self.plan, Read(self.source), self.flax.weights, wrong)
        kept = self.judged.kept.get(row.site_flax)
        record = self.reference.records[row.site_torch]
        torch64, torch32, flax = self.runners
        divergence = Divergence(
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
            self._again,
        )
        return tuple(find_causes(divergence))

    def _again(self, leaves: Mapping[str, Any]) -> float | None:
        """See `again` of `Divergence`."""
        from graftax.parity.compare import judge_flax

        row = self.report.first
        assert row is not None
        made = judge_flax(
            self.reference,
            self.flax.again(leaves),
            *self.call,
            self.pairs,
            self.plan.source.specs,
            threshold=self.report.threshold,
        )
        same = next((other for other in made.layers if other.site_flax == row.site_flax), None)
        return None if same is None else same.in_error if self.report.where == "in" else same.out_error

    def _before(self, row: LayerRow, count: int = 8) -> tuple[tuple[LayerRow, Any], ...]:
        """The layers whose calls ended before this call began (if a container's own code is at fault: before it ended),
        the nearest first, with their outputs in Flax's layout."""
        from graftax.adapters import nests

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
            arrays = nests.arrays(self.reference.records[site].output)
            out.append((other, match.turn(arrays[match.torch][1])))
        return tuple(reversed(out[-count:]))
