"""Compare the outputs of both models in their real layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftax.adapters.layouts import Layout

Array = Any


def difference(
    ours: Sequence[Array],
    theirs: Mapping[str, Array],
    layout: Mapping[str, Layout] | Layout | None = None,
) -> float:
    """The largest difference of Flax's outputs and torch's, as a part of torch's largest entry; infinite where they do
    not correspond. Each floating output of Flax takes the first of torch's that it agrees with. A declared layout, for
    all of torch's outputs or for each by its path, turns them; without one, an output of another shape may have its
    channels last."""
    floating = [np.asarray(a, np.float64) for a in ours if np.asarray(a).dtype.kind == "f"]
    left: list[tuple[Array, bool]] = []
    for path, array in theirs.items():
        turn = layout.get(path) if isinstance(layout, Mapping) else layout
        left.append((array if turn is None else turn(array), turn is not None))
    worst = 0.0 if floating and len(floating) <= len(left) else np.inf
    for mine in floating if worst == 0.0 else ():
        errors = [_error(mine, other, strict) for other, strict in left]
        best = int(np.argmin(errors))
        worst = max(worst, errors[best])
        del left[best]
    return float(worst)


def _error(mine: Array, other: Array, strict: bool) -> float:
    if mine.size != other.size:
        return np.inf
    if not mine.size:
        return 0.0
    scale = max(float(np.abs(other).max()), 1e-300)
    forms = [other] if mine.shape == other.shape else []
    if not forms and not strict:
        forms = [np.moveaxis(other, 1, -1)] if other.ndim > 2 else []
        forms.append(other.reshape(mine.shape))
        forms = [form for form in forms if form.shape == mine.shape]
    errors = [float(np.max(np.abs(form - mine))) / scale for form in forms]
    return min((e for e in errors if np.isfinite(e)), default=np.inf)
