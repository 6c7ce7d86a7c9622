"""Golden files: record a run of a torch module, and judge a Flax model against it where torch is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from graftax.errors import PlanError, ReplayError, escape, option
from graftax.parity.golden import Golden, load_golden, save_golden
from graftax.parity.records import THRESHOLD
from graftax.parity.report.model import ParityReport
from graftax.plans import Plan
from graftax.tree import Checkpoint, Module

Pathlike = str | PathLike[str]


def record_golden(
    torch_module: Any,
    flax_model: Any,
    inputs: Any,
    path: Pathlike | None = None,
    *,
    source: Any = None,
    rules: Any = None,
    plan: Plan | None = None,
    layout: Any = None,
    out_layout: Any = None,
    layers: bool = False,
) -> Golden:
    """Run the torch module in float64 and float32, and record what a replay needs; write it to `path` if one is given.

    torch_module, inputs, source, layout, rules, plan   as for gx.check_parity
    flax_model   tells which layers have a counterpart, and which flags its call takes; None: every layer with weights
                 is recorded
    layers       record the inputs and outputs of the layers too: a replay then names the layer that diverges

    Raises what gx.check_parity raises for the torch side, UsageError for inputs that a file cannot hold, StorageError.
    """
    from graftax.execute.opening import open_tree, open_weights
    from graftax.parity import pipeline
    from graftax.parity.reference import make_reference
    from graftax.parity.torch_runner import runners
    from graftax.probe.inputs import calls_of, inputs_of

    tree = open_tree(torch_module)
    values_of = None if source is None else open_weights(source)
    given = inputs_of(inputs, layout, out_layout)
    layout, out_layout = given.layout, given.out_layout
    torch64, torch32 = runners(torch_module, values_of, given.torch_call)
    torch_call, flax_call = calls_of(given, flax_model, torch_module)
    watch = _watched(tree, flax_model, flax_call, rules, plan) if layers else []
    with pipeline.LayoutHint(layout, torch_call, "torch"):
        reference = make_reference(torch64, torch32, *torch_call, watch)
    golden = Golden(
        replace(reference, modules=tree.live.modules),
        *flax_call,
        specs=tree.specs,
        buffers=tree.live.buffers,
        aliases=tree.storage.aliases,
        torch_name=type(torch_module).__name__,
        layout=layout if isinstance(layout, str) else None,
        out_layout=out_layout,
        versions=_versions(),
    )
    if path is not None:
        save_golden(path, golden, layers=layers)
    return golden


def check_golden(
    golden: Golden | Pathlike,
    flax_model: Any,
    weights: Any = None,
    *,
    source: Any = None,
    rules: Any = None,
    plan: Plan | None = None,
    out_layout: Any = None,
    atol: float | None = None,
    rtol: float | None = None,
    layers: bool = True,
    causes: bool = True,
    threshold: float = THRESHOLD,
    rngs: Any = None,
    seed: int = 0,
    flax_call: Any = None,
) -> ParityReport:
    """Check that the Flax model computes what the torch module computed in the golden file. torch is not needed.

    weights    the Flax weights, as for gx.check_parity; None: the values that flax_model holds
    source     torch's checkpoint: the weights are audited against it, and ported where the Flax side has none
    flax_call  as in gx.Inputs; the rest as for gx.check_parity

    Layers are judged if they were recorded. Raises what gx.check_parity raises for the Flax side, FormatError for a
    malformed golden file.
    """
    from graftax.adapters.layouts import declared
    from graftax.execute.opening import open_tree, open_weights
    from graftax.parity import compare, pipeline, prepare
    from graftax.parity.audit import Expected, audit
    from graftax.parity.pairing import find_pairs
    from graftax.probe.inputs import with_example

    clock = pipeline.Clock()
    kept = golden if isinstance(golden, Golden) else load_golden(golden)
    torch = kept.checkpoint()
    values_of = torch if source is None else open_weights(source)
    call = with_example((kept.flax_args, dict(kept.flax_kwargs)), flax_model)
    like = prepare.flax_like(flax_model, call)
    with pipeline.LayoutHint(kept.layout, call):
        tree = open_tree(like)
    if weights is None and not tree.has_values and not values_of.has_values:
        raise PlanError(
            f"{escape(tree.label)} holds no weights, and neither does a golden file",
            next=f"Pass the Flax weights ({option('weights')}), or torch's checkpoint ({option('source')}).",
        )
    made, notes = pipeline.planned(torch, tree, rules, plan, needed=weights is None and not tree.has_values)
    with pipeline.LayoutHint(kept.layout, call):
        flax = prepare.flax_side(like, tree, weights, made, values_of, rngs, seed, flax_call)
        clock.lap("prepare")
        pairs = find_pairs(
            made.entries, torch.live.modules, tree.live.modules, torch.storage.aliases, tree.storage.aliases
        )
        traced = layers and bool(kept.reference.records)
        reference = kept.reference if traced else replace(kept.reference, records={}, order=(), events=())
        judged = compare.judge_flax(
            reference,
            flax.runner,
            *call,
            pairs if traced else [],
            torch.specs,
            threshold=threshold,
            atol=atol,
            rtol=rtol,
            out_layout=declared(out_layout if out_layout is not None else kept.out_layout),
        )
    clock.lap("Flax")
    expected: Mapping[str, Any] = Expected(made, values_of) if values_of.has_values else {}
    rows = audit(expected, flax.weights) if isinstance(expected, Expected) and not flax.ported else ()
    clock.lap("audit")
    report = pipeline.assemble(
        judged,
        rows,
        pipeline.settings_of(pairs, torch.live.modules, tree.live.modules),
        pairs,
        reference,
        threshold,
        notes=(*notes, *pipeline.notes_of(flax, tree), *_notes(kept, layers, values_of)),
        torch_modules=torch.live.modules,
        names=(kept.torch_name, flax.name),
    )
    if causes and not report.ok and (report.first is not None or report.weights):
        absent = NoTorch(reference.modules)
        values = values_of if values_of.has_values else Checkpoint("no weights", "torch", {})
        sought = pipeline.Search(
            reference, judged, report, (absent, absent, flax.runner), made, values, flax, expected, call, pairs
        )  # fmt: skip
        report = pipeline.with_causes(report, sought.causes)
        clock.lap("causes")
    return replace(report, seconds=clock.seconds(judged.seconds))


def assert_golden(*args: Any, **kwargs: Any) -> ParityReport:
    """`check_golden` that raises ParityError, with the report as its text, if parity fails."""
    __tracebackhide__ = True
    from graftax.parity.pipeline import required

    return required(check_golden(*args, **kwargs))


class NoTorch:
    """Stands for the torch side in a replay: it cannot run anything, it only knows the recorded modules."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = modules

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise ReplayError("the torch side was recorded in a golden file and cannot be run")

    replay = run

    def not_traced(self) -> Mapping[str, str]:
        return {}


# ---------------------------------------------------------------- steps


def _watched(tree: Checkpoint, flax_model: Any, call: Any, rules: Any, plan: Plan | None) -> list[str]:
    """The torch modules that have a counterpart; without a Flax model, all modules that hold weights."""
    from graftax.execute.opening import open_tree
    from graftax.parity import pipeline, prepare
    from graftax.parity.pairing import find_pairs

    if flax_model is None:
        return [path for path, module in tree.live.modules.items() if module.leaves]
    like = open_tree(prepare.flax_like(flax_model, call))
    made, _ = pipeline.planned(tree, like, rules, plan, needed=False)
    pairs = find_pairs(made.entries, tree.live.modules, like.live.modules, tree.storage.aliases, like.storage.aliases)
    return list(dict.fromkeys(pair.torch for pair in pairs))


def _notes(golden: Golden, layers: bool, source: Checkpoint) -> tuple[str, ...]:
    notes: list[str] = []
    if layers and not golden.reference.records:
        notes.append(
            "the golden file holds outputs only; a golden file recorded with layers names the layer that diverges"
        )
    if not source.has_values:
        given = option("source")
        notes.append(f"the weights were not audited: a golden file holds none (give torch's checkpoint as {given})")
    return tuple(notes)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import torch

    return {"torch": str(torch.__version__), "graftax": version("graftax")}
