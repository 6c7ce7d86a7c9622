"""`gx.compare`: what an edit of a Flax model's weights does, module by module."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import UsageError, escape
from graftax.execute.opening import open_tree
from graftax.parity.metrics import cosine, relative_l2
from graftax.parity.pairing import HOLDERS
from graftax.parity.prepare import FlaxRunners, class_name, large
from graftax.parity.reference_side import is_nnx_model
from graftax.studies.comparison import Comparison, LeafRow, ModuleRow, OutputShift, Shift
from graftax.studies.example_inputs import runnable
from graftax.studies.logits import logits_path, logits_row, one_array, picking
from graftax.studies.model_weights import require_same_model, weights_for
from graftax.studies.module_passes import Passes, run_passes
from graftax.tree import Checkpoint, Module
from graftax.tree.dtypes import same_bits

Array = Any


def compare(
    a: Any,
    b: Any,
    *,
    like: Any = None,
    inputs: Any = None,
    logits: bool | Callable[[Any], Any] | None = None,
) -> Comparison:
    """What an edit of the weights does, module by module: one Flax model is run with the weights a and with b.

    For every call of a module the answer has two relative L2 errors, |y_b - y_a| / |y_a| over the values of its output,
    and two cosines. "itself": the module with b's weights on the input that it has in a's run. "free run": b's run
    against a's.

    a, b      the two sets of weights: Linen variables (or params, if the model has no other collection), nnx.State,
              nnx.Module, or a checkpoint in Flax form
    like      the model: gx.linen(module, *batch) or an nnx.Module. It may be left out if a is an nnx.Module
    inputs    an array, a tuple of arrays, (args, kwargs) or gx.Inputs(...). None: the example of gx.linen(...), which
              must be a real batch
    logits    True, or a function from the model's output to logits (classes on the last axis): KL and top-1 flips

    The model runs 2 + (depth of nested modules) times, compiled if it can be, with matrix products of precision
    "highest" and in the dtypes that it computes in. The same random numbers are drawn for a and b. In memory at once:
    both sets of weights, and on the host every distinct input and output of a module in a's run.
    Nothing that is passed in is changed.

    Raises PlanError if weights do not fit the model, UsageError, and ModelError if the model's own code fails.
    """
    start = time.perf_counter()
    run = runnable(_model(a, b, like), inputs)
    model, (args, kwargs) = run.model, run.call
    tree = open_tree(model)
    ours, theirs = weights_for(a, tree, "a"), weights_for(b, tree, "b")
    leaves = tuple(_leaf_rows(tree, ours, theirs))
    picked = picking(model, run.own, logits) if callable(logits) else run.own
    rngs = model.rngs if isinstance(model, LinenModel) else None
    runners = FlaxRunners(model, tree, rngs=rngs, call=picked)
    modules = tree.live.modules
    began = time.perf_counter()
    first = runners.of(ours)
    found = run_passes(first, runners.of(theirs), args, kwargs, list(modules))
    ran = time.perf_counter() - began
    outputs, row = found.outputs, None
    if callable(logits):
        row = logits_row("logits=", *(one_array(out["logits"]) for out in outputs))
        outputs = outputs[0]["output"], outputs[1]["output"]
    elif logits:
        path = logits_path(outputs[0])
        row = logits_row(path, *(dict(nests.arrays(out)).get(path) for out in outputs))
    compiling = getattr(first, "compile_seconds", 0.0)
    return Comparison(
        class_name(model),
        tuple(_module_rows(found, modules, leaves)),
        tuple(_output_rows(*outputs)),
        row,
        leaves,
        len(tree),
        _not_traced(found, modules),
        _notes(found, tree, leaves),
        {"Flax": ran, "flax compile": compiling, "total": time.perf_counter() - start},
    )


# ---------------------------------------------------------------- the model and its weights


def _model(a: Any, b: Any, like: Any) -> Any:
    """The model to run: like, else a. UsageError if it cannot be run, or if two modules are not one model."""
    if like is None and not is_nnx_model(a):
        raise UsageError(
            "like is missing: the weights a cannot be run without their model",
            next="Pass the model: like=gx.linen(module, *batch), or like=an nnx.Module.",
        )
    given = {"like": like, "a": a, "b": b}
    trees = {name: open_tree(one).live.modules for name, one in given.items() if is_nnx_model(one)}
    names = list(trees)
    for name in names[1:]:
        require_same_model(trees[names[0]], trees[name], names[0], name)
    return a if like is None else like


def _leaf_rows(tree: Checkpoint, ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> Any:
    """A row for every leaf whose bits differ. One leaf of each is in memory at a time."""
    for path in tree:
        x, y = np.asarray(ours[path]), np.asarray(theirs[path])
        if x.dtype == y.dtype and same_bits(x, y):
            continue
        wide = [array.astype(np.complex128 if array.dtype.kind == "c" else np.float64) for array in (x, y)]
        differing = int(np.count_nonzero((wide[0] != wide[1]) & ~(np.isnan(wide[0]) & np.isnan(wide[1]))))
        shift = Shift(relative_l2(wide[1], wide[0]), cosine(wide[1], wide[0]))
        yield LeafRow(path, tuple(x.shape), (str(x.dtype), str(y.dtype)), differing, int(x.size), shift)


# ---------------------------------------------------------------- rows


def _module_rows(found: Passes, modules: Mapping[str, Module], leaves: tuple[LeafRow, ...]) -> Any:
    edited = _edited({site.path for site in found.levels}, modules, leaves)
    for site, level in found.levels.items():
        itself, free = found.itself.get(site), found.free.get(site)
        text = found.texts.get(site, "" if free is not None else "with b's weights it is not called")
        kind = modules[site.path].kind
        yield ModuleRow(site.path, site.call, kind, level, itself, free, edited.get(site.path, ()), text)


def _edited(called: set[str], modules: Mapping[str, Module], leaves: tuple[LeafRow, ...]) -> dict[str, tuple[str, ...]]:
    """module path -> the leaves that differ, at the innermost called modules that hold them (several, if shared)."""
    out: dict[str, list[str]] = {}
    for leaf in leaves:
        holders = [path for path in called if leaf.path in modules[path].leaves.values()]
        for path in holders:
            if not any(other != path and other.startswith(f"{path}/" if path else "") for other in holders):
                out.setdefault(path, []).append(leaf.path)
    return {path: tuple(names) for path, names in out.items()}


def _not_traced(found: Passes, modules: Mapping[str, Module]) -> dict[str, str]:
    """Modules without a row; not those that only hold others and cannot be called."""
    return {path: why for path, why in found.not_traced.items() if not HOLDERS & set(modules[path].bases)}


def _output_rows(first: Any, second: Any) -> Any:
    want, got = nests.arrays(first), dict(nests.arrays(second))
    for path, array in want:
        other = got.pop(path, None)
        shape = tuple(int(n) for n in array.shape)
        if other is None or other.shape != array.shape:
            text = "b's run does not give it" if other is None else f"b's run gives shape {tuple(other.shape)}"
            yield OutputShift(path, shape, Shift(np.inf, np.nan), np.inf, text)
            continue
        shift = Shift(relative_l2(other, array), cosine(other, array))
        yield OutputShift(path, shape, shift, _max_abs(other, array))
    for path, array in got.items():
        yield OutputShift(path, tuple(array.shape), Shift(np.inf, np.nan), np.inf, "a's run does not give it")


def _max_abs(got: Array, want: Array) -> float:
    kind = np.complex128 if want.dtype.kind == "c" else np.float64
    a, b = got.astype(kind), want.astype(kind)
    with np.errstate(invalid="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    most = float(np.max(gap, initial=0.0))
    return np.inf if np.isnan(most) else most


def _in_training(module: Module) -> bool:
    """Does a norm take the statistics of the batch, or does dropout draw?"""
    draws = module.settings.get("deterministic") is False and module.settings.get("rate", 0) not in (0, 0.0)
    return draws or module.settings.get("use_running_average") is False


def _notes(found: Passes, tree: Checkpoint, leaves: tuple[LeafRow, ...]) -> tuple[str, ...]:
    modules = tree.live.modules
    notes = [
        f"b's run calls {escape(path) or '(the model)'} {count} time(s) more than a's"
        for path, count in found.extra.items()
    ]
    retyped = [row.path for row in leaves if row.dtypes[0] != row.dtypes[1]]
    if retyped:
        notes.append(
            f"{len(retyped)} leaves have another dtype in b, for example {escape(retyped[0])}: a and b run as two "
            "programs, whose rounding may differ in every module"
        )
    training = [path for path, one in modules.items() if _in_training(one)]
    if training:
        notes.append(
            f"{len(training)} modules are in training mode, for example {escape(training[0]) or '(the model)'}: "
            "statistics are those of the batch, dropout draws the same for a and b; .eval() or a flag ends it"
        )
    if large(tree):
        notes.append("each module's weights were read when it was called; the runs were not compiled")
    return tuple(notes)
