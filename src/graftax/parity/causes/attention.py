"""Fit attention to queries, keys and values: the form that torch computed, the form that Flax computed, and how they
differ.

A form is one choice on every axis of AXES. The search for torch's form starts from the usual choices; the search for
Flax's form changes one choice of torch's form, then two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from graftax.parity.causes.attention_choices import explanation_of, neighbours
from graftax.parity.causes.attention_forms import (
    MASKED,
    AttentionForm,
    QueryRows,
    Scene,
    attend,
    causal_mask,
    error_of,
    head_dim,
    sample,
    scores_of,
)
from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.numbers import Array, Bar, Budget
from graftax.parity.causes.rotary import Kind, Rotary


@dataclass(frozen=True, slots=True)
class FittedForm:
    """A form, the keys that count under its padding ((B, S); None: all), and its error."""

    form: AttentionForm
    keep: tuple[tuple[bool, ...], ...] | None
    error: float


def explain(scene: Scene, want: Array, have: Array, bar: Bar, budget: Budget) -> list[Explanation]:
    """How Flax's attention differs from torch's; [] if the form of either is not found."""
    picked = sample(scene, want, have)
    if picked is None:
        return []
    cut, ours, theirs, where = picked
    right = _fit(cut, ours, where, bar, budget)
    if right is None:
        return []
    found: list[tuple[int, Explanation]] = []
    for changed in (1, 2):
        for form, names in neighbours(right.form, cut, changed):
            error = error_of(cut, form, right.keep, theirs, where)
            if bar.fitted(error):
                difference = explanation_of(right.form, form, names, max(error, right.error), head_dim(cut, form))
                found.append((len(names), difference))
            if not budget.left():
                break
        if found:
            break
    if not found:
        found = [(1, item) for item in _solved(cut, right, theirs, where, bar, budget)]
    out: dict[str, Explanation] = {}
    for _, difference in sorted(found, key=lambda item: item[0]):
        out.setdefault(difference.name, difference)
    return list(out.values())


# ---------------------------------------------------------------- torch's form


def _fit(scene: Scene, target: Array, where: QueryRows, bar: Bar, budget: Budget) -> FittedForm | None:
    """The form of torch's array: a usual form, or one or two changes from a usual form that comes near."""
    near: list[FittedForm] = []
    for form in _bases(scene):
        fit = _padded(scene, form, target, where)
        if fit is None:
            continue
        if bar.fitted(fit.error):
            return fit
        if fit.error < _NEAR:
            near.append(fit)
        if not budget.left():
            return None
    near = sorted(near, key=lambda fit: fit.error)[:_TRIED]
    for changes in (1, 2):
        for base in near[: _TRIED if changes == 1 else 2]:
            for form, names in neighbours(base.form, scene, changes):
                if set(names) & _NOT_USUAL:
                    continue
                fit = _padded(scene, form, target, where, base.keep)
                if fit is not None and bar.fitted(fit.error):
                    return fit
                if not budget.left():
                    return None
        if changes == 1:
            fit = _unusual(scene, near, target, where, bar, budget)
            if fit is not None:
                return fit
    return None


_NEAR, _TRIED = 0.9, 6  # an array that is not attention has an error of about 1
_NOT_USUAL = frozenset({"polarity", "padding", "causal", "kind"})


def _unusual(
    scene: Scene, near: Sequence[FittedForm], target: Array, where: QueryRows, bar: Bar, budget: Budget
) -> FittedForm | None:
    """A usual form with an unusual scale, base or cap."""
    for base in near:
        for name in ("scale", "cap", "theta"):
            found = solve(scene, base.form, name, base.keep, target, where, budget)
            if found is None or not budget.left():
                continue
            fit = found if bar.fitted(found.error) else _padded(scene, found.form, target, where)
            if fit is not None and bar.fitted(fit.error):
                return fit
    return None


def _head_counts(scene: Scene) -> list[tuple[int, int]]:
    """(query heads, key heads), the likely ones first."""
    if scene.query.ndim == 4 and scene.key.ndim == 4:
        return [(scene.query.shape[2], scene.key.shape[2])]
    width = scene.query.shape[-1] * (scene.query.shape[2] if scene.query.ndim == 4 else 1)
    narrow = scene.key.shape[-1] * (scene.key.shape[2] if scene.key.ndim == 4 else 1)
    counts = [n for n in range(1, width // 2 + 1) if width % n == 0 and narrow % (width // n) == 0 and n <= 256]
    likely = sorted(counts, key=lambda n: (n not in scene.heads, abs(np.log2(width / n / 64))))
    return [(n, narrow // (width // n)) for n in likely if narrow // (width // n) <= n]


def _bases(scene: Scene) -> list[AttentionForm]:
    kinds: tuple[Kind, ...] = ("none", "half", "interleaved")
    return [
        AttentionForm(heads, kv, rotary=Rotary(kind), causal=causal)
        for heads, kv in _head_counts(scene)
        for kind, causal in product(kinds, ("no", "yes"))
    ]


def _padded(scene: Scene, form: AttentionForm, target: Array, where: QueryRows, keep: Any = None) -> FittedForm | None:
    """The form with all keys (or those of `keep`), or with only the first or the last few keys of each example,
    whichever comes nearer. So the padding is found from the values."""
    error = error_of(scene, form, keep, target, where)
    if not np.isfinite(error):
        return None
    if error < 1e-5:
        return FittedForm(form, keep, error)
    found = _keys(scene, form, target, where)
    if found is None:
        return FittedForm(form, keep, error)
    padded = error_of(scene, form, found, target, where)
    rows = tuple(tuple(bool(x) for x in row) for row in found)
    return FittedForm(form, rows, padded) if padded < error else FittedForm(form, keep, error)


def _keys(scene: Scene, form: AttentionForm, target: Array, where: QueryRows) -> Array | None:
    """The keys of each example that count: the prefix or suffix that comes nearest."""
    if scene.project is not None:
        return _keys_projected(scene, form, target, where)
    made = scores_of(scene, form, where)
    if made is None:
        return None
    scores, v = made
    seen = causal_mask(form, where, scores.shape[-1])
    if seen is not None:
        scores = np.where(seen, scores, MASKED)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    wanted = target.reshape(*target.shape[:2], v.shape[2], -1).transpose(0, 2, 1, 3)
    if wanted.shape[-1] != v.shape[-1]:
        return None
    few = np.unique([0, scores.shape[1] - 1])  # heads
    weights, v, wanted = weights[:, few], v[:, :, few], wanted[:, few]
    keys = scores.shape[-1]
    keep = np.ones((len(v), keys), dtype=bool)
    for b in range(len(v)):
        parts = weights[b][..., None] * v[b].transpose(1, 0, 2)[:, None]
        best = (np.inf, keep[b])
        for flip in (False, True):
            w, p = (weights[b][..., ::-1], parts[:, :, ::-1]) if flip else (weights[b], parts)
            total, weight = np.cumsum(p, axis=2), np.cumsum(w, axis=2)
            with np.errstate(all="ignore"):
                means = total / weight[..., None]
            ok = weight > 1e-200
            off = np.where(ok[..., None], (means - wanted[b][:, :, None]) ** 2, 0.0).sum(axis=-1)
            # a query that sees no key is no evidence; every length must explain some queries
            spoken = ok.sum(axis=(0, 1))
            errors = np.where(spoken > 0, off.sum(axis=(0, 1)) / np.maximum(spoken, 1), np.inf)
            errors = np.where(spoken >= max(1, spoken.max() // 3), errors, np.inf)
            length = int(np.argmin(errors)) + 1
            if errors[length - 1] < best[0]:
                row = np.arange(keys) < length
                best = (float(errors[length - 1]), row[::-1] if flip else row)
        keep[b] = best[1]
    return None if keep.all() else keep


def _keys_projected(scene: Scene, form: AttentionForm, target: Array, where: QueryRows) -> Array | None:
    """The same if an output projection follows: every length is tried."""
    keys = scene.key.shape[1]
    if keys > 64 or scene.project is None:
        return None
    keep = np.ones((len(scene.key), keys), dtype=bool)
    best = np.full(len(keep), np.inf)
    chosen = keep.copy()
    for length, flip in product(range(1, keys + 1), (False, True)):
        row = np.arange(keys) < length
        trial = np.broadcast_to(row[::-1] if flip else row, keep.shape)
        made = attend(scene, form, np.array(trial), where)
        if made is None:
            return None
        out = scene.project(made).reshape(target.shape)
        errors = ((out - target) ** 2).sum(axis=tuple(range(1, target.ndim)))
        better = errors < best
        best, chosen = np.where(better, errors, best), np.where(better[:, None], trial, chosen)
    return None if chosen.all() else chosen


# ---------------------------------------------------------------- unusual numbers


def _solved(
    scene: Scene, right: FittedForm, target: Array, where: QueryRows, bar: Bar, budget: Budget
) -> list[Explanation]:
    """An unusual scale, base or cap."""
    for name in ("scale", "theta", "cap"):
        found = solve(scene, right.form, name, right.keep, target, where, budget)
        if found is not None and bar.fitted(found.error):
            error = max(found.error, right.error)
            return [explanation_of(right.form, found.form, (name,), error, head_dim(scene, right.form))]
    return []


_STEPS = np.linspace(-4.0, 4.0, 33)


def solve(
    scene: Scene, form: AttentionForm, name: str, keep: Any, target: Array, where: QueryRows, budget: Budget
) -> FittedForm | None:
    """The form with the value of one number ('scale', 'theta', 'cap') that comes nearest to the target, found on a
    coarse grid and then by golden section search."""
    if name == "theta" and form.rotary.kind == "none":
        return None

    def at(power: float) -> AttentionForm:
        times = float(np.exp(power))
        if name == "theta":
            return replace(form, rotary=replace(form.rotary, theta=form.rotary.theta * times))
        return replace(form, factor=form.factor * times) if name == "scale" else replace(form, cap=8.0 * times)

    def error(power: float) -> float:
        return error_of(scene, at(power), keep, target, where)

    errors = [error(power) if budget.left() else np.inf for power in _STEPS]
    best = int(np.argmin(errors))
    low, high = _STEPS[max(best - 1, 0)], _STEPS[min(best + 1, len(_STEPS) - 1)]
    for _ in range(50):
        a, b = low + 0.381966 * (high - low), high - 0.381966 * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    found = at(float((low + high) / 2))
    return FittedForm(_rounded(found, name), keep, error_of(scene, _rounded(found, name), keep, target, where))


def _rounded(form: AttentionForm, name: str) -> AttentionForm:
    """The form with its cap rounded to one decimal, if the cap is that near."""
    if name == "cap" and form.cap is not None and abs(form.cap / round(form.cap, 1) - 1) < 1e-4:
        return replace(form, cap=round(form.cap, 1))
    return form
