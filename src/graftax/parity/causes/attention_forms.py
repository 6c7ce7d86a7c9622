"""Attention in float64: every form that the fit knows, computed for a few examples and queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.parity.causes.numbers import Array, relative
from graftax.parity.causes.rotary import Rotary, rotate

_BATCH, _QUERIES, _KEYS = 4, 12, 512
MASKED = -1e30


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """How attention is computed.

    heads, kv   numbers of query and of key heads; grouping: 'repeat' gives each key head to neighbouring query heads,
    'tile' gives key head i % kv to query head i
    power, factor   the scores are multiplied by factor x head_dim ** power
    causal      'no', 'yes', 'strict' (a token does not see itself), 'future' (sees itself and what follows)
    polarity    of the whole mask: 'right', 'inverted', 'added' (True and False added as 1 and 0), 'queries' (the
                padding mask on the other axis)
    padding     'found', 'ignored', or 'inverted' (before it meets the causal mask)
    window      how many tokens a token sees, itself included; None: all
    cap         the scores become cap x tanh(scores / cap)
    """

    heads: int = 1
    kv: int = 1
    power: float = -0.5
    factor: float = 1.0
    rotary: Rotary = field(default_factory=Rotary)
    causal: str = "no"
    polarity: str = "right"
    padding: str = "found"
    window: int | None = None
    cap: float | None = None
    grouping: str = "repeat"

    def scale(self, head: int) -> float:
        return self.factor * head**self.power


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """Queries (B, T, H, h), keys and values (B, S, K, h) from the projections, flat or cut into heads. `project`: the
    output projection, if the compared array comes after it. `heads`: likely numbers of heads."""

    query: Array
    key: Array
    value: Array
    project: Callable[[Array], Array] | None = None
    heads: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class QueryRows:
    """The queries that are compared."""

    rows: Array


def whole(length: int) -> QueryRows:
    """Every query."""
    return QueryRows(np.arange(length))


def sample(scene: Scene, want: Array, have: Array) -> tuple[Scene, Array, Array, QueryRows] | None:
    """A few examples and queries, in float64; None if the shapes do not fit together."""
    q, k, v = scene.query, scene.key, scene.value
    if want.shape != have.shape or want.ndim < 3 or want.shape[:2] != q.shape[:2] or k.shape[:2] != v.shape[:2]:
        return None
    if len(q) != len(k) or k.shape[1] > _KEYS:
        return None
    length = q.shape[1]
    rows = np.unique(np.concatenate([np.arange(min(4, length)), np.linspace(0, length - 1, _QUERIES).astype(int)]))
    examples = np.unique(np.linspace(0, len(q) - 1, _BATCH).astype(int))
    q, k, v = (x[examples].astype(np.float64) for x in (q, k, v))
    cut = Scene(q, k, v, scene.project, scene.heads)
    target = [x[examples][:, rows].astype(np.float64) for x in (want, have)]
    return cut, target[0], target[1], QueryRows(rows)


def _heads(x: Array, heads: int) -> Array | None:
    """x as (B, T, H, h); None if it cannot be cut into this many heads."""
    if x.ndim == 4:
        return x if x.shape[2] == heads else None
    return x.reshape(*x.shape[:2], heads, -1) if x.shape[-1] % heads == 0 else None


def _grouped(x: Array, form: AttentionForm) -> Array:
    times = form.heads // form.kv
    if times == 1:
        return x
    return np.tile(x, (1, 1, times, 1)) if form.grouping == "tile" else np.repeat(x, times, axis=2)


def scores_of(scene: Scene, form: AttentionForm, where: QueryRows) -> tuple[Array, Array] | None:
    """Scores (B, H, T, S) before any mask, and values (B, S, H, h)."""
    q, k, v = (_heads(x, n) for x, n in ((scene.query, form.heads), (scene.key, form.kv), (scene.value, form.kv)))
    if q is None or k is None or v is None or q.shape[-1] != k.shape[-1]:
        return None
    positions = np.arange(q.shape[1])
    q = rotate(q, positions + form.rotary.offset, form.rotary)[:, where.rows]
    k = rotate(k, np.arange(k.shape[1]), form.rotary)
    k, v = _grouped(k, form), _grouped(v, form)
    scores = np.einsum("bthd,bshd->bhts", q, k, optimize=True) * form.scale(q.shape[-1])
    if form.cap is not None:
        scores = form.cap * np.tanh(scores / form.cap)
    return scores, v


def causal_mask(form: AttentionForm, where: QueryRows, keys: int) -> Array | None:
    """(T, S): which keys a query may see, by the causal order and the window; None: all."""
    t, s = where.rows[:, None], np.arange(keys)[None, :]
    seen: Array | None = None
    if form.causal != "no":
        seen = {"yes": s <= t, "strict": s < t, "future": s >= t}[form.causal]
    if form.window is not None:
        near = (t - s < form.window) if form.causal != "no" else (np.abs(t - s) < form.window)
        seen = near if seen is None else seen & near
    return seen


def _mask(form: AttentionForm, where: QueryRows, keep: Array | None, shape: tuple[int, ...]) -> Array | None:
    """(B, 1, T, S): which keys a query may see; None: all."""
    seen = causal_mask(form, where, shape[-1])
    full = None if seen is None else np.broadcast_to(seen, (shape[0], 1, *seen.shape))
    if keep is not None and form.padding != "ignored":
        pad = ~keep if form.padding == "inverted" else keep
        on = pad[:, None, where.rows, None] if form.polarity == "queries" else pad[:, None, None, :]
        full = on if full is None else full & on
    if form.polarity == "inverted":
        full = np.zeros((1, 1, 1, 1), dtype=bool) if full is None else ~full
    return None if full is None else np.broadcast_to(full, (shape[0], 1, *shape[2:]))


def attend(scene: Scene, form: AttentionForm, keep: Array | None, where: QueryRows) -> Array | None:
    """The output (B, T, H, h) for the compared queries."""
    made = scores_of(scene, form, where)
    if made is None:
        return None
    scores, v = made
    if form.polarity == "queries" and scene.query.shape[1] != scene.key.shape[1]:
        return None
    mask = _mask(form, where, keep, scores.shape)
    if mask is not None:
        scores = scores + mask if form.polarity == "added" else np.where(mask, scores, MASKED)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v, optimize=True)


def error_of(scene: Scene, form: AttentionForm, keep: Any, target: Array, where: QueryRows) -> float:
    made = attend(scene, form, None if keep is None else np.array(keep), where)
    return float("inf") if made is None else compare_to(scene, made, target)


def compare_to(scene: Scene, made: Array, target: Array) -> float:
    out = made if scene.project is None else scene.project(made)
    if out.size != target.size:
        return float("inf")
    return relative(out.reshape(target.shape), target)


def head_dim(scene: Scene, form: AttentionForm) -> int:
    return scene.query.shape[-1] if scene.query.ndim == 4 else scene.query.shape[-1] // form.heads
