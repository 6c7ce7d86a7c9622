"""Attention, fitted from queries, keys and values: what torch computed, what Flax computed, and in what they differ.

A form is a choice on every axis of AXES. The form behind torch's array is looked for from the usual choices outwards;
the form behind Flax's is torch's with one choice changed, or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import numpy as np

from graftax.parity.causes.numbers import Array, Bar, Budget, nice, relative
from graftax.parity.causes.recipes import Difference
from graftax.parity.causes.rotary import OFFSETS, PARTS, STRETCHES, THETAS, Kind, Rotary, rotate

_BATCH, _QUERIES, _KEYS = 4, 12, 512
_MASKED = -1e30


@dataclass(frozen=True, slots=True)
class Form:
    """How attention is computed.

    heads, kv   numbers of query and of key heads; grouping: 'repeat' gives each key head to neighbours, 'tile' does not
    power, factor   scores are multiplied by factor x head_dim ** power
    causal      'no', 'yes', 'strict' (a token does not see itself), 'future' (sees itself and what follows)
    polarity    of the whole mask: 'right', 'inverted', 'added' (True and False added as 1 and 0), 'queries' (the
                padding mask on the other axis)
    padding     'found', 'ignored', or 'inverted' (before it meets the causal mask)
    window      how many tokens are seen, the own one included; None: all
    cap         of the scores: cap x tanh(scores / cap)
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
    """Queries (B, T, H, h) and keys, values (B, S, K, h) as the projections gave them, flat or cut into heads, and what
    was made of them. `project`: the output projection behind the attention, where the array is what comes after it."""

    query: Array
    key: Array
    value: Array
    project: Callable[[Array], Array] | None = None
    heads: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Fit:
    """A form, the padding that it was found with (keys that count, (B, S); None: all), and its error."""

    form: Form
    keep: tuple[tuple[bool, ...], ...] | None
    error: float


def explain(scene: Scene, want: Array, have: Array, bar: Bar, budget: Budget) -> list[Difference]:
    """In what Flax's attention differs from torch's; [] where torch's is not found, or Flax's is not."""
    picked = _rows(scene, want, have)
    if picked is None:
        return []
    cut, ours, theirs, where = picked
    right = _fit(cut, ours, where, bar, budget)
    if right is None:
        return []
    found: list[tuple[int, Difference]] = []
    for changed in (1, 2):
        for form, names in _neighbours(right.form, cut, changed):
            error = _error(cut, form, right.keep, theirs, where)
            if bar.fitted(error):
                difference = _said(right.form, form, names, max(error, right.error), _head_dim(cut, form))
                found.append((len(names), difference))
            if not budget.left():
                break
        if found:
            break
    if not found:
        found = [(1, item) for item in _solved(cut, right, theirs, where, bar, budget)]
    out: dict[str, Difference] = {}
    for _, difference in sorted(found, key=lambda item: item[0]):
        out.setdefault(difference.name, difference)
    return list(out.values())


# ---------------------------------------------------------------- forward


@dataclass(frozen=True, slots=True, eq=False)
class _Where:
    """Which queries are looked at."""

    rows: Array


def whole(length: int) -> _Where:
    """Every query."""
    return _Where(np.arange(length))


def _rows(scene: Scene, want: Array, have: Array) -> tuple[Scene, Array, Array, _Where] | None:
    """A few examples and queries of it all, in float64; None where the arrays do not go together."""
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
    return cut, target[0], target[1], _Where(rows)


def _heads(x: Array, heads: int) -> Array | None:
    """(B, T, H, h); None where it does not cut."""
    if x.ndim == 4:
        return x if x.shape[2] == heads else None
    return x.reshape(*x.shape[:2], heads, -1) if x.shape[-1] % heads == 0 else None


def _grouped(x: Array, form: Form) -> Array:
    times = form.heads // form.kv
    if times == 1:
        return x
    return np.tile(x, (1, 1, times, 1)) if form.grouping == "tile" else np.repeat(x, times, axis=2)


def _scores(scene: Scene, form: Form, where: _Where) -> tuple[Array, Array] | None:
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


def _causal(form: Form, where: _Where, keys: int) -> Array | None:
    """(T, S) of what may be seen, by the causal order and the window; None: everything."""
    t, s = where.rows[:, None], np.arange(keys)[None, :]
    seen: Array | None = None
    if form.causal != "no":
        seen = {"yes": s <= t, "strict": s < t, "future": s >= t}[form.causal]
    if form.window is not None:
        near = (t - s < form.window) if form.causal != "no" else (np.abs(t - s) < form.window)
        seen = near if seen is None else seen & near
    return seen


def _mask(form: Form, where: _Where, keep: Array | None, shape: tuple[int, ...]) -> Array | None:
    """(B, 1, T, S) of what may be seen; None: everything."""
    seen = _causal(form, where, shape[-1])
    full = None if seen is None else np.broadcast_to(seen, (shape[0], 1, *seen.shape))
    if keep is not None and form.padding != "ignored":
        pad = ~keep if form.padding == "inverted" else keep
        on = pad[:, None, where.rows, None] if form.polarity == "queries" else pad[:, None, None, :]
        full = on if full is None else full & on
    if form.polarity == "inverted":
        full = np.zeros((1, 1, 1, 1), dtype=bool) if full is None else ~full
    return None if full is None else np.broadcast_to(full, (shape[0], 1, *shape[2:]))


def attend(scene: Scene, form: Form, keep: Array | None, where: _Where) -> Array | None:
    """(B, T, H, h) of the queries that are looked at."""
    made = _scores(scene, form, where)
    if made is None:
        return None
    scores, v = made
    if form.polarity == "queries" and scene.query.shape[1] != scene.key.shape[1]:
        return None
    mask = _mask(form, where, keep, scores.shape)
    if mask is not None:
        scores = scores + mask if form.polarity == "added" else np.where(mask, scores, _MASKED)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v, optimize=True)


def _error(scene: Scene, form: Form, keep: Any, target: Array, where: _Where) -> float:
    made = attend(scene, form, None if keep is None else np.array(keep), where)
    return float("inf") if made is None else _compare(scene, made, target)


def _compare(scene: Scene, made: Array, target: Array) -> float:
    out = made if scene.project is None else scene.project(made)
    if out.size != target.size:
        return float("inf")
    return relative(out.reshape(target.shape), target)


# ---------------------------------------------------------------- torch's form


def _fit(scene: Scene, target: Array, where: _Where, bar: Bar, budget: Budget) -> Fit | None:
    """The form behind torch's array: a usual one, or one or two changes from a usual one that comes near."""
    near: list[Fit] = []
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
            for form, names in _neighbours(base.form, scene, changes):
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


_NEAR, _TRIED = 0.9, 6  # an array that is no attention at all is about 1 off
_NOT_USUAL = frozenset({"polarity", "padding", "causal", "kind"})


def _unusual(scene: Scene, near: Sequence[Fit], target: Array, where: _Where, bar: Bar, budget: Budget) -> Fit | None:
    """A usual form with a scale, base or cap that stands in no list."""
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


def _bases(scene: Scene) -> list[Form]:
    kinds: tuple[Kind, ...] = ("none", "half", "interleaved")
    return [
        Form(heads, kv, rotary=Rotary(kind), causal=causal)
        for heads, kv in _head_counts(scene)
        for kind, causal in product(kinds, ("no", "yes"))
    ]


def _padded(scene: Scene, form: Form, target: Array, where: _Where, keep: Any = None) -> Fit | None:
    """The form with all keys (or those of `keep`), or with the first or the last few of each example, whichever comes
    nearer: padding shows itself."""
    error = _error(scene, form, keep, target, where)
    if not np.isfinite(error):
        return None
    if error < 1e-5:
        return Fit(form, keep, error)
    found = _keys(scene, form, target, where)
    if found is None:
        return Fit(form, keep, error)
    padded = _error(scene, form, found, target, where)
    rows = tuple(tuple(bool(x) for x in row) for row in found)
    return Fit(form, rows, padded) if padded < error else Fit(form, keep, error)


def _keys(scene: Scene, form: Form, target: Array, where: _Where) -> Array | None:
    """Which keys of each example count, by the prefix or suffix that comes closest."""
    if scene.project is not None:
        return _keys_projected(scene, form, target, where)
    made = _scores(scene, form, where)
    if made is None:
        return None
    scores, v = made
    seen = _causal(form, where, scores.shape[-1])
    if seen is not None:
        scores = np.where(seen, scores, _MASKED)
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
            # queries that see nothing say nothing; every length must explain some
            spoken = ok.sum(axis=(0, 1))
            errors = np.where(spoken > 0, off.sum(axis=(0, 1)) / np.maximum(spoken, 1), np.inf)
            errors = np.where(spoken >= max(1, spoken.max() // 3), errors, np.inf)
            length = int(np.argmin(errors)) + 1
            if errors[length - 1] < best[0]:
                row = np.arange(keys) < length
                best = (float(errors[length - 1]), row[::-1] if flip else row)
        keep[b] = best[1]
    return None if keep.all() else keep


def _keys_projected(scene: Scene, form: Form, target: Array, where: _Where) -> Array | None:
    """The same behind an output projection: every length is tried."""
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


# ---------------------------------------------------------------- other choices

Axis = Callable[[Form, Scene], Iterator[Form]]


def _on(name: str, *values: Any) -> Axis:
    def choices(form: Form, scene: Scene) -> Iterator[Form]:
        for value in values:
            if getattr(form, name) != value:
                yield replace(form, **{name: value})

    return choices


def _on_rotary(name: str, *values: Any) -> Axis:
    def choices(form: Form, scene: Scene) -> Iterator[Form]:
        if form.rotary.kind == "none" and name != "kind":
            return
        for value in values:
            if getattr(form.rotary, name) != value:
                yield replace(form, rotary=replace(form.rotary, **{name: value}))

    return choices


def _parts(form: Form, scene: Scene) -> Iterator[Form]:
    head = _head_dim(scene, form)
    turned = int(head * form.rotary.part) // 2
    for part in PARTS if form.rotary.kind != "none" else ():
        if int(head * part) // 2 not in (0, turned):
            yield replace(form, rotary=replace(form.rotary, part=part))


def _windows(form: Form, scene: Scene) -> Iterator[Form]:
    keys = scene.key.shape[1]
    sizes = range(1, keys) if keys <= 64 else sorted({*(2**n for n in range(1, 12)), 1024, keys // 2, keys // 4})
    for size in (None, *(n for n in sizes if n < keys)):
        if size != form.window:
            yield replace(form, window=size)


def _groupings(form: Form, scene: Scene) -> Iterator[Form]:
    if form.heads != form.kv and form.kv > 1:
        yield replace(form, grouping="tile" if form.grouping == "repeat" else "repeat")


def _scales(form: Form, scene: Scene) -> Iterator[Form]:
    head = _head_dim(scene, form)
    wide = head * form.heads
    powers = ((-0.5, 1.0), (0.0, 1.0), (-1.0, 1.0), (-0.25, 1.0), (0.5, 1.0), (-0.5, 2.0), (-0.5, 0.5))
    plain = tuple((0.0, factor) for factor in (wide**-0.5, (2 * head) ** -0.5, 0.125, 256**-0.5))
    for power, factor in (*powers, *plain):
        if abs(factor * head**power / form.scale(head) - 1) > 1e-9:
            yield replace(form, power=power, factor=factor)


AXES: Mapping[str, tuple[str, Axis]] = {
    "scale": ("attention scale", _scales),
    "causal": ("attention mask", _on("causal", "no", "yes", "strict", "future")),
    "polarity": ("attention mask", _on("polarity", "right", "inverted", "added", "queries")),
    "padding": ("attention mask", _on("padding", "found", "ignored", "inverted")),
    "kind": ("rotary interleave", _on_rotary("kind", "none", "half", "interleaved")),
    "theta": ("rotary theta", _on_rotary("theta", *THETAS)),
    "part": ("rotary part", _parts),
    "offset": ("rotary offset", _on_rotary("offset", *OFFSETS)),
    "stretch": ("rotary theta", _on_rotary("stretch", *STRETCHES)),
    "grouping": ("key-value heads", _groupings),
    "cap": ("logit softcap", _on("cap", None, 50.0, 30.0, 20.0, 100.0, 10.0, 5.0, 15.0, 2.0)),
    "window": ("sliding window", _windows),
}
"""Axis -> (the name of the cause, its other choices)."""


def _head_dim(scene: Scene, form: Form) -> int:
    return scene.query.shape[-1] if scene.query.ndim == 4 else scene.query.shape[-1] // form.heads


def _neighbours(form: Form, scene: Scene, changes: int) -> Iterator[tuple[Form, tuple[str, ...]]]:
    """Forms with another choice on `changes` axes, and which."""
    for names in combinations(AXES, changes):
        made: list[Form] = [form]
        for name in names:
            made = [other for one in made for other in AXES[name][1](one, scene)]
        for other in made:
            yield other, names


def _solved(scene: Scene, right: Fit, target: Array, where: _Where, bar: Bar, budget: Budget) -> list[Difference]:
    """A scale, a base or a cap that stands in no list."""
    for name in ("scale", "theta", "cap"):
        found = solve(scene, right.form, name, right.keep, target, where, budget)
        if found is not None and bar.fitted(found.error):
            error = max(found.error, right.error)
            return [_said(right.form, found.form, (name,), error, _head_dim(scene, right.form))]
    return []


_STEPS = np.linspace(-4.0, 4.0, 33)


def solve(scene: Scene, form: Form, name: str, keep: Any, target: Array, where: _Where, budget: Budget) -> Fit | None:
    """The form with the value of one number ('scale', 'theta', 'cap') that comes nearest to the target: looked for on a
    coarse grid, then by golden sections."""
    if name == "theta" and form.rotary.kind == "none":
        return None

    def at(power: float) -> Form:
        times = float(np.exp(power))
        if name == "theta":
            return replace(form, rotary=replace(form.rotary, theta=form.rotary.theta * times))
        return replace(form, factor=form.factor * times) if name == "scale" else replace(form, cap=8.0 * times)

    def error(power: float) -> float:
        return _error(scene, at(power), keep, target, where)

    errors = [error(power) if budget.left() else np.inf for power in _STEPS]
    best = int(np.argmin(errors))
    low, high = _STEPS[max(best - 1, 0)], _STEPS[min(best + 1, len(_STEPS) - 1)]
    for _ in range(50):
        a, b = low + 0.381966 * (high - low), high - 0.381966 * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    found = at(float((low + high) / 2))
    return Fit(_rounded(found, name), keep, _error(scene, _rounded(found, name), keep, target, where))


def _rounded(form: Form, name: str) -> Form:
    """Numbers that people write, where they are that near."""
    if name == "cap" and form.cap is not None and abs(form.cap / round(form.cap, 1) - 1) < 1e-4:
        return replace(form, cap=round(form.cap, 1))
    return form


# ---------------------------------------------------------------- words


def _said(right: Form, wrong: Form, names: Sequence[str], error: float, head: int) -> Difference:
    """The difference on the named axes."""
    causes = list(dict.fromkeys(AXES[name][0] for name in names))
    if "kind" in names and "none" in (right.rotary.kind, wrong.rotary.kind):
        causes = ["rotary missing" if cause == "rotary interleave" else cause for cause in causes]
    texts, fixes = zip(*(_words(name, right, wrong, head) for name in names), strict=True)
    return Difference(causes[0], "; ".join(texts), "; ".join(fixes), error)


def _words(name: str, right: Form, wrong: Form, head: int) -> tuple[str, str]:
    if name == "scale":
        want, have = (nice(form.scale(head)) for form in (right, wrong))
        return f"torch multiplies the scores by {want}, Flax by {have}", f"scores * {want}"
    if name in ("kind", "theta", "part", "offset", "stretch"):
        want, have = getattr(right.rotary, name), getattr(wrong.rotary, name)
        what = {
            "kind": "rotary pairs", "theta": "rotary theta", "part": "the share of a head that turns",
            "offset": "the queries' positions less the keys'", "stretch": "the factor of the positions",
        }[name]  # fmt: skip
        want, have = (f"{value:g}" if isinstance(value, float) else value for value in (want, have))
        return f"{what}: {want} in torch, {have} in Flax", f"{what}: {want}"
    if name == "window":
        want, have = (f"{form.window} tokens" if form.window else "no window" for form in (right, wrong))
        return f"torch sees {want}, Flax {have}", f"sliding window: {want}"
    if name == "cap":
        want, have = (f"capped at {form.cap:g}" if form.cap else "not capped" for form in (right, wrong))
        return f"the scores are {want} in torch, {have} in Flax", f"scores {want}"
    if name == "grouping":
        call = "jnp.repeat(k, groups, axis=2)" if right.grouping == "repeat" else "jnp.tile(k, (1, 1, groups, 1))"
        return f"key heads go to query heads by {right.grouping} in torch, by {wrong.grouping} in Flax", call
    want, have = getattr(right, name), getattr(wrong, name)
    said = _MASKS[name]
    return f"{said[have]} in Flax; in torch {said[want]}", f"the mask so that {said[want]} (True attends in Flax)"


_MASKS: Mapping[str, Mapping[str, str]] = {
    "causal": {
        "no": "every token sees all",
        "yes": "a token sees itself and what is before",
        "strict": "a token sees only what is before, not itself",
        "future": "a token sees itself and what follows",
    },
    "polarity": {
        "right": "the mask says who is seen",
        "inverted": "the mask is inverted",
        "added": "the boolean mask is added to the scores as a number",
        "queries": "the padding mask lies on the queries and not on the keys",
    },
    "padding": {
        "found": "padding is not seen",
        "ignored": "padding is seen",
        "inverted": "only padding is seen",
    },
}
