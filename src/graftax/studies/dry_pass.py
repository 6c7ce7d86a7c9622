"""Look, before anything runs, whether each value fits each leaf that it is to go into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graftax.errors import Failure, GraftaxError, PlanError, UsageError, escape, option
from graftax.ops import misfit_of
from graftax.studies.targets import Target
from graftax.surgery.given import prepared
from graftax.surgery.leaves import checked_value
from graftax.surgery.live import live_tree
from graftax.surgery.places import Place
from graftax.surgery.selecting import Edit
from graftax.surgery.values import Quantized
from graftax.tree import Checkpoint
from graftax.tree.leaf_index import split_index

_LIVE = "A function of the weights shows no modules: give gx.linen(model, *batch) or an nnx.Module, or say axis=. "


def opened_values(values: Sequence[Any]) -> list[Any]:
    """The values with every donor open, so that all rows open it once. UsageError for what is no value; what opening a
    donor raises."""
    return [edit.value for edit in prepared(tuple(Edit("**", value) for value in values))]


def require_fit(weights: Any, targets: Sequence[Target], values: Sequence[Any], home: Callable[[], Checkpoint]) -> None:
    """PlanError that lists every leaf and value that do not go together, as far as shapes and dtypes tell. UsageError
    for traced weights.

    home  the leaves with their modules, which tell what the axes of a leaf are
    """
    live = live_tree(weights)
    failures: dict[tuple[str, str], Failure] = {}
    for target in targets:
        for text in target.leaves:
            path, index = (text, None) if text in live.leaves else split_index(text) or (text, None)
            for value in values:
                try:
                    live.require_values(path)
                    if live.traced(path):
                        raise UsageError(
                            f"{escape(path)} is traced, and an ablation runs on values",
                            next="Call gx.ablate outside jit, grad and vmap.",
                        )
                    checked_value(Place(path, live.spec(path), home, index), value)
                except GraftaxError as error:
                    if error.exit_code != PlanError.exit_code:
                        raise
                    failures |= {(failure.key, failure.what): failure for failure in misfit_of(text, error).failures}
    if failures:
        untold = any(isinstance(value, Quantized) for value in values) and not home().live.modules
        raise PlanError(
            f"nothing was run on {escape(live.label)}: values do not fit leaves:",
            list(failures.values()),
            next=f"{_LIVE if untold else ''}{option('exclude')} keeps leaves as they are.",
        )
