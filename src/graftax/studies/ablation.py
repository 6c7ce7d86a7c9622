"""Ablate: change one leaf, module or head at a time, and measure what the model gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as replaced
from typing import Any, Literal

from graftax.adapters.nests import is_array
from graftax.errors import UsageError, escape
from graftax.report.progress import progress_bar
from graftax.studies.dry_pass import opened_values, require_fit
from graftax.studies.effects import Baseline
from graftax.studies.forward import Forward, forward_of, is_model, state_of
from graftax.studies.study import Study, row_of
from graftax.studies.targets import EACH, Target, head_targets, leaf_targets, module_targets
from graftax.surgery import replace
from graftax.surgery.live import live_tree
from graftax.tree import Checkpoint


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
    modules = _Modules(run, weights)
    if each == "head":
        targets = head_targets(weights, selector, exclude, modules(), modules.start)
    else:
        targets = (leaf_targets if each == "leaf" else module_targets)(weights, selector, exclude)
    opened = opened_values(chosen)
    require_fit(weights, targets, opened, modules)
    edits = [(target, text, value) for target in targets for text, value in zip(_texts(chosen), opened, strict=True)]
    return _study(run, weights, edits, modules.like, Study((), each, name), metric)


class _Modules:
    """() -> the leaves of the model, or of the weights, with the modules that tell what their axes are; opened when
    they are first asked for."""

    def __init__(self, run: Any, weights: Any) -> None:
        self.run, self.weights = run, weights
        self.tree: Checkpoint | None = None

    def __call__(self) -> Checkpoint:
        if self.tree is None:
            self.tree = self.run.tree() if isinstance(self.run, Forward) else live_tree(self.weights).opened()
        return self.tree  # pyright: ignore[reportReturnType]

    @property
    def start(self) -> str:
        """What the paths have before those of the weights."""
        return "params/" if isinstance(self.run, Forward) and self.run.bare else ""

    @property
    def like(self) -> Checkpoint | None:
        """What `replace` needs as its like: None if no value asked for modules, or there are none."""
        return self.tree if self.tree is not None and self.tree.live.modules else None


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
    edits: Sequence[tuple[Target, str, Any]],
    like: Checkpoint | None,
    empty: Study,
    metric: Callable[[Any], Any] | None,
) -> Study:
    """The study with its rows: one for each (target, name of the value, value)."""
    number = empty.name if metric is None else str(getattr(metric, "__name__", "metric"))
    with progress_bar("ablating", len(edits) + 2, "steps") as advance:
        baseline = Baseline(run(weights), number, metric)
        advance(1)
        again = baseline.effect(run(weights))
        advance(1)
        rows = [row_of(None, "", replaced(again, numbers=baseline.numbers or again.numbers))]
        for target, text, value in edits:
            try:
                effect = baseline.effect(run(replace(weights, dict.fromkeys(target.leaves, value), like=like)))
            except Exception as error:
                error.add_note(f"in the run of {escape(target.text)} with {escape(text)}")
                raise
            rows.append(row_of(target, text, effect))
            advance(1)
    return replaced(empty, rows=tuple(rows), deterministic=again.same)


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
