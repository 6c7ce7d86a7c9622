"""Does a tensor look like what an initialiser makes?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graftax.parity.causes.numbers import Array

_FEW = 48  # values below which a spread says nothing


def constant(array: Array) -> float | None:
    """The value of a tensor whose values are all equal; None otherwise."""
    if not array.size:
        return None
    first = float(array.reshape(-1)[0])
    return first if bool((array == array.reshape(-1)[0]).all()) else None


def unrelated(have: Array, want: Array) -> bool:
    """Are the tensors no more alike than two independent draws?"""
    a, b = (x.astype(np.float64).reshape(-1) for x in (have, want))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return bool(size) and abs(float((a * b).sum()) / size) < 5 / np.sqrt(a.size)


def spreads(shape: tuple[int, ...], embedding: bool) -> Iterator[tuple[str, float]]:
    """(initialiser, standard deviation) of the usual initialisers for a kernel of this shape, (*k, in, out), (in, H, h)
    or
    (H, h, out)."""
    if len(shape) < 2:
        return
    fans = {(int(np.prod(shape[:at])), int(np.prod(shape[at:]))) for at in range(1, len(shape))}
    if embedding:
        yield "Flax's initialiser of embeddings", 1 / np.sqrt(shape[-1])
        yield "normal(1)", 1.0
    for into, out in sorted(fans):
        yield "lecun_normal", 1 / np.sqrt(into)
        yield "kaiming_uniform, as torch's Linear uses it", 1 / np.sqrt(3 * into)
        yield "he_normal", np.sqrt(2 / into)
        yield "xavier", np.sqrt(2 / (into + out))
    yield "normal(0.02)", 0.02
    yield "normal(0.01)", 0.01


def looks_fresh(have: Array, want: Array, embedding: bool = False) -> str | None:
    """The initialiser from which a tensor seems to come, if it is unrelated to the torch tensor; None otherwise."""
    if have.size < _FEW or not unrelated(have, want):
        return None
    values = have.astype(np.float64)
    spread = float(values.std())
    if not spread or abs(float(values.mean())) > 5 * spread / np.sqrt(have.size):
        return None
    slack = 0.02 + 3.5 / np.sqrt(2 * have.size)
    found = [(abs(spread / size - 1), name) for name, size in spreads(have.shape, embedding)]
    best = min(found, default=(np.inf, ""))
    return best[1] if best[0] < slack else None
