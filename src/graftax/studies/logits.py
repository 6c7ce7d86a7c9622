"""The logits of a model's output, with the weights a and with the weights b."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import UsageError, escape, option, with_article
from graftax.parity.metrics import kl_of_rows
from graftax.studies.comparison import LogitsShift

Array = Any


def picking(model: Any, call: Any, pick: Callable[[Any], Any]) -> Callable[..., Any]:
    """A call of the model that gives its output, and the logits that `pick` finds in it."""
    from graftax.parity.linen_runner import method_call

    run = call or method_call(model.method if isinstance(model, LinenModel) else None)

    def picked(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = run(module, *args, **kwargs)
        try:
            return {"output": output, "logits": pick(output)}
        except (LookupError, AttributeError, TypeError) as error:
            if "racer" in type(error).__name__ or "oncretization" in type(error).__name__:  # it needs concrete values
                raise
            raise UsageError(
                f"the function logits= fails on the model's output, {with_article(type(output).__name__)}: "
                f"{type(error).__name__}: {escape(error, 300)}",
                next="It gets what the model returns, and returns one array: logits=lambda out: out[0].",
            ) from error

    return picked


def one_array(values: Any) -> Array:
    if not isinstance(values, np.ndarray):
        raise UsageError(f"the function logits= must return one array, not {with_article(type(values).__name__)}")
    return values


def logits_path(output: Any) -> str:
    """The path of the logits in an output: the only floating array, or the only one named so."""
    floating = [path for path, array in nests.arrays(output) if array.dtype.kind in "fV" and array.ndim]
    named = [path for path in floating if path.rpartition("/")[2] == "logits"]
    chosen = named if len(named) == 1 else floating
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(escape(path) for path in floating[:8]) or "none"
    raise UsageError(
        f"which of the {len(floating)} floating arrays of the output are the logits ({option('logits')})? {names}",
        next="In the library, pick them: logits=lambda out: out[0].",
    )


def logits_row(path: str, want: Array, got: Array | None) -> LogitsShift:
    if want.ndim == 0 or want.shape[-1] < 2:
        raise UsageError(f"the logits have shape {tuple(want.shape)}: the last axis must hold two classes or more")
    rows = want.reshape(-1, want.shape[-1]).astype(np.float64)
    shape = tuple(int(n) for n in want.shape)
    if got is None or got.shape != want.shape:
        return LogitsShift(path, shape, np.inf, np.inf, len(rows), len(rows))
    others = got.reshape(-1, got.shape[-1]).astype(np.float64)
    found = kl_of_rows(rows, others)
    flips = int(np.count_nonzero(np.argmax(rows, -1) != np.argmax(others, -1)))
    return LogitsShift(path, shape, float(np.mean(found)), float(np.max(found, initial=0.0)), flips, len(rows))
