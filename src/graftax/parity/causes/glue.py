"""Explain the code between layers: try every fit in turn on torch's array and on Flax's array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np

from graftax.parity.causes.additions import added, capped, position_ids, position_tables, scaled
from graftax.parity.causes.attention import explain as explain_attention
from graftax.parity.causes.attention_forms import Scene
from graftax.parity.causes.context import halves
from graftax.parity.causes.elementwise import Explanation, Operand, compare, find_recipes, sampled
from graftax.parity.causes.numbers import Array, Bar, Budget, in_bfloat16, relative
from graftax.parity.causes.ordering import order_difference
from graftax.parity.causes.reorder import Known
from graftax.parity.causes.spatial import compare_ways, find_ways

_SCENES = 10  # operands that are tried as queries, keys and values


def explain(
    want: Array,
    have: Array,
    operands: Sequence[Operand],
    known: Known,
    tables: Mapping[str, Array],
    bar: Bar,
    budget: Budget,
) -> list[Explanation]:
    """How the code that made `have` differs from the code that made `want`; [] if no fit explains both."""
    if want.shape != have.shape or not want.size or relative(have, want) <= bar.bar:
        return []
    bar = Bar(min(bar.before, max(relative(have, want), bar.bar)), bar.bar)
    if in_bfloat16(have) and not in_bfloat16(want) and relative(have, want) < 2.0**-4:
        text = "every value that arrives is a bfloat16 value: the code before the layer computes in bfloat16"
        return [Explanation("bfloat16 accumulation", text, "compute in float32 in that code", bar.bar)]
    maps = any(operand.array.ndim >= 4 and operand.array[0].size == want[0].size for operand in operands[:8])
    maps = maps or any(int(np.prod(sizes)) == want.shape[-1] for sizes in known.maps)
    turned = order_difference(want, have, known, bar, maps and want.ndim == 2)
    if turned is not None:
        return [turned]
    for found in _fits(want, have, list(operands), known, tables, bar, budget):
        if found:
            return found
        if not budget.left():
            break
    return []


def _fits(
    want: Array,
    have: Array,
    operands: list[Operand],
    known: Known,
    tables: Mapping[str, Array],
    bar: Bar,
    budget: Budget,
) -> Iterator[list[Explanation]]:
    wide = halves(operands, want.shape[-1])
    at, values = sampled(want, wide)
    a, b = want[at].astype(np.float64), have[at].astype(np.float64)
    seen = Bar(relative(b, a), bar.bar)
    if seen.before > 2 * bar.bar:  # the samples show the error
        right = find_recipes(a, values, seen, budget)
        wrong = find_recipes(b, values, seen, budget) if right else []
        yield compare(right, wrong, wide)
    yield added(want, have, wide, bar)
    yield _by_ways(want, have, operands, bar, budget)
    yield list(position_tables(want, have, tables, bar))[:1]
    yield _by_attention(want, have, operands, known, bar, budget)
    table = any(operand.table for operand in operands[:3])
    yield [found for found in (capped(want, have, bar), scaled(want, have, bar, table)) if found is not None][:1]


def explain_leaf(
    want: Array, have: Array, operands: Sequence[Operand], known: Known, bar: Bar, budget: Budget
) -> list[Explanation]:
    """Explain a layer's own output without knowing its formula: another order, a factor or a cap."""
    turned = order_difference(want, have, known, bar, False)
    if turned is not None:
        return [turned]
    return [found for found in (capped(want, have, bar), scaled(want, have, bar, False)) if found is not None][:1]


def integers(want: Array, have: Array) -> list[Explanation]:
    """Explain integers and masks that arrive and differ."""
    if want.dtype.kind == "b" and have.dtype.kind == "b":
        return masks(want, have)
    found = position_ids(want, have)
    return [] if found is None else [found]


def masks(want: Array, have: Array) -> list[Explanation]:
    """Explain masks (.., T, S) that arrive and differ (True attends): what one of them hides and the other does not."""
    if want.shape != have.shape or want.ndim < 2 or not bool((want != have).any()):
        return []
    if bool((want != have).all()):
        return [Explanation("attention mask", "the mask is inverted: True attends in Flax", "~mask", 0.0)]
    keys = want.shape[-1]
    back = np.arange(want.shape[-2])[:, None] - np.arange(keys)[None, :]
    for window in range(1, keys) if want.shape[-2] == keys else ():
        for near in (back < window, np.abs(back) < window):
            for wide, narrow, side in ((want, have, "Flax"), (have, want, "torch")):
                if np.array_equal(wide & near, narrow):
                    text = f"{side} sees only {window} tokens, the other side more"
                    return [Explanation("sliding window", text, f"{'no' if side == 'Flax' else window} window", 0.0)]
    hidden, seen = int((want & ~have).sum()), int((have & ~want).sum())
    text = f"of {want.size} places, Flax hides {hidden} that torch sees and sees {seen} that torch hides"
    return [Explanation("attention mask", text, "make the same mask as torch (True attends in Flax)", 0.0)]


def _by_ways(want: Array, have: Array, operands: list[Operand], bar: Bar, budget: Budget) -> list[Explanation]:
    if not any(operand.array.ndim >= 3 for operand in operands):
        return []
    right = find_ways(want, operands, bar, budget)
    return compare_ways(right, find_ways(have, operands, bar, budget), operands) if right else []


# ---------------------------------------------------------------- attention


def _by_attention(
    want: Array, have: Array, operands: list[Operand], known: Known, bar: Bar, budget: Budget
) -> list[Explanation]:
    for scene in _scenes(want, operands, known):
        found = explain_attention(scene, want, have, bar, budget)
        if found or not budget.left():
            return found
    return []


def _scenes(want: Array, operands: list[Operand], known: Known) -> Iterator[Scene]:
    """Queries, keys and values among the nearest operands: first in the order q, k, v. An attention output lies within
    the range of its values, so operands outside it are not values."""
    if want.ndim < 3:
        return
    near = [s for s in operands[:_SCENES] if s.array.ndim in (3, 4) and len(s.array) == len(want)]
    width = int(np.prod(want.shape[2:]))
    for q, k, v in sorted(permutations(range(len(near)), 3), key=_call_order):
        query, key, value = (near[i].array for i in (q, k, v))
        if query.shape[:2] != want.shape[:2] or key.shape[:2] != value.shape[:2] or _flat(query) != width:
            continue
        if _flat(key) == _flat(value) and _flat(query) % _flat(key) == 0 and _inside(want, value, width):
            yield Scene(query, key, value, None, known.heads)
    for operand in near[:3]:
        yield from _fused(operand, want, width, known)


def _call_order(places: tuple[int, int, int]) -> tuple[int, bool, tuple[int, int, int]]:
    q, k, v = places
    return max(places), not (q > k > v), places


def _flat(array: Array) -> int:
    return int(np.prod(array.shape[2:]))


def _inside(want: Array, value: Array, width: int) -> bool:
    """Does the output lie within the range of the values? Attention outputs are weighted means of them."""
    w = want.reshape(*want.shape[:2], -1).astype(np.float64)
    v = value.reshape(*value.shape[:2], -1).astype(np.float64)
    if v.shape[-1] != width:
        return bool(w.max() <= v.max() + 1e-4 and w.min() >= v.min() - 1e-4)
    slack = 1e-4 * float(np.abs(v).max())
    return bool((w.max(axis=1) <= v.max(axis=1) + slack).all() and (w.min(axis=1) >= v.min(axis=1) - slack).all())


def _fused(operand: Operand, want: Array, width: int, known: Known) -> Iterator[Scene]:
    """Scenes from a fused projection that holds all three, in blocks or head by head."""
    array = operand.array.reshape(*operand.array.shape[:2], -1)
    if array.shape[:2] != want.shape[:2] or array.shape[-1] != 3 * width:
        return
    q, k, v = (array[..., i * width : (i + 1) * width] for i in range(3))
    if _inside(want, v, width):
        yield Scene(q, k, v, None, known.heads)
    for heads in sorted(known.heads):
        if width % heads == 0:
            parts = array.reshape(*array.shape[:2], heads, 3, width // heads)
            if _inside(want, parts[..., 2, :], width):
                yield Scene(parts[..., 0, :], parts[..., 1, :], parts[..., 2, :], None, known.heads)


_PROJECTIONS = (("query", "key", "value", "out"), ("q", "k", "v", "o"), ("q_proj", "k_proj", "v_proj", "o_proj"))


def module_attention(
    inputs: Sequence[Array], leaves: Mapping[str, Array], want: Array, have: Array, bar: Bar, budget: Budget
) -> list[Explanation]:
    """Explain a whole attention module from its input and its own leaves: query, key and value kernels (D, H, h), out
    (H, h, D)."""
    names = next((row for row in _PROJECTIONS if all(f"{name}/kernel" in leaves for name in row)), None)
    if names is None or any(leaves[f"{name}/kernel"].ndim != 3 for name in names):
        return []
    given = [x for x in inputs if x.ndim == 3]
    if not given:
        return []
    taken = (given * 3)[:3] if len(given) == 1 else [given[0], given[1], given[2 if len(given) > 2 else 1]]
    parts = [_projected(x, leaves, name) for x, name in zip(taken, names[:3], strict=True)]
    kernel, bias = leaves[f"{names[3]}/kernel"].astype(np.float64), leaves.get(f"{names[3]}/bias")

    def project(mixed: Array) -> Array:
        out = np.einsum("bthd,hdo->bto", mixed, kernel)
        return out if bias is None else out + bias

    heads = frozenset({kernel.shape[0]})
    return explain_attention(Scene(parts[0], parts[1], parts[2], project, heads), want, have, bar, budget)


def _projected(x: Array, leaves: Mapping[str, Array], name: str) -> Array:
    out = np.einsum("bti,ihd->bthd", x.astype(np.float64), leaves[f"{name}/kernel"].astype(np.float64))
    bias = leaves.get(f"{name}/bias")
    return out if bias is None else out + bias
