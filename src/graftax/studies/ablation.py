"""Ablate: change one leaf, module or head at a time, and measure what the model gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as replaced
from typing import Any, Literal

from graftax.adapters.nests import is_array
from graftax.errors import UsageError, escape
from graftax.report.progress import steps_bar
from graftax.studies.effects import Baseline
from graftax.studies.forward import forward_of, is_model, state_of
from graftax.studies.study import Study, row_of
from graftax.studies.targets import EACH, Target, leaf_targets, module_targets
from graftax.surgery import replace


def ablate(
    what: Any,
    params: Any,
    selector: Any,
    values: Any,
    *,
    each: Literal["leaf", "module", "head"] = "leaf",
    exclude: Any = None,
    metric: Callable[[Any], Any] | None = None,
    inputs: Any = None,
) -> Study:
    """What a model gives when one leaf, module or head at a time has another value: one row for each, with each value,
    behind the row of the unchanged weights. `params` stays as it is.

    what      gx.linen(model, *example), which runs on its example; an nnx.Module, with `inputs`; or a function of the
              weights that gives outputs, a number or {name: number} (a loss over many batches, any library)
    params    the weights, as `gx.replace` takes them
    selector  what is changed, one at a time; with each="module" and each="head", the paths of modules
    values    a value or a list of them, as `gx.replace` takes them: gx.zeros(), gx.quantized(4), gx.mean()
    each      "leaf"; "module": all floating weights below its path together; "head": the value goes into one query
              head's rows of the attention's output projection, so that zeros remove the head
    exclude   a selector of leaves that stay as they are
    metric    outputs -> a number, or {name: number}; without it, relative L2 and cosine against the outputs of the
              unchanged weights, the worst of all arrays
    inputs    what a model is run on, as gx.check_parity takes it

    Each row has the bits of `gx.replace` and of the jitted forward: a model is compiled once, with its weights as
    arguments. Edits are made one at a time and dropped. The unchanged weights run twice, to see if they give the same.

    Raises PlanError if nothing is selected or a value does not fit a leaf (all are listed, nothing has run then);
    UsageError if `what` cannot be run, or its example is constant or has only shapes; ModelError if the model fails.
    """
    if each not in EACH:
        raise UsageError(f"each={escape(repr(each))} is none of {', '.join(map(repr, EACH))}")
    run, weights, name = _runner(what, params, inputs)
    chosen = list(values) if isinstance(values, (list, tuple)) else [values]
    if not chosen:
        raise UsageError("there is no value to put in", next="Give gx.zeros() or another value, or a list of them.")
    pick = leaf_targets if each == "leaf" else module_targets
    return _study(run, weights, pick(weights, selector, exclude), chosen, each, name, metric)


def _runner(what: Any, params: Any, inputs: Any) -> tuple[Callable[[Any], Any], Any, str]:
    """(weights -> outputs, the weights that it takes, the name of the model or function)."""
    if not is_model(what):
        if inputs is not None:
            raise UsageError("a function of the weights has its own inputs", next="Leave inputs= out.")
        return what, params, str(getattr(what, "__name__", type(what).__name__))
    weights = state_of(params)
    forward = forward_of(what, weights, inputs)
    return forward, weights, forward.name


def _study(
    run: Callable[[Any], Any],
    weights: Any,
    targets: Sequence[Target],
    values: Sequence[Any],
    each: str,
    name: str,
    metric: Callable[[Any], Any] | None,
) -> Study:
    number = name if metric is None else str(getattr(metric, "__name__", "metric"))
    texts = _texts(values)
    with steps_bar("ablating", len(targets) * len(values) + 2) as advance:
        baseline = Baseline(run(weights), number, metric)
        advance()
        again = baseline.effect(run(weights))
        advance()
        rows = [row_of(None, "", replaced(again, numbers=baseline.numbers or again.numbers))]
        for target in targets:
            for value, text in zip(values, texts, strict=True):
                try:
                    effect = baseline.effect(run(replace(weights, dict.fromkeys(target.leaves, value))))
                except Exception as error:
                    error.add_note(f"in the run of {escape(target.text)} with {text}")
                    raise
                rows.append(row_of(target, text, effect))
                advance()
    return Study(tuple(rows), each, name, again.same)


def _texts(values: Sequence[Any]) -> list[str]:
    """What each value is called; equal names (of two lambdas) are numbered."""
    texts = [_text(value) for value in values]
    return [f"{text} ({i})" if texts.count(text) > 1 else text for i, text in enumerate(texts, 1)]


def _text(value: Any) -> str:
    text = getattr(value, "text", None)
    if isinstance(text, str):
        return text
    if is_array(value):
        return f"an array, {value.dtype}"
    return escape(getattr(value, "__name__", repr(value)), 60)
