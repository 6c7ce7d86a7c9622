"""Norms written by hand: find the norm that gives y from x on each side, and how the two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.numbers import Array, Bar, in_bfloat16, relative

_ROWS = 512
EPSILONS: tuple[float, ...] = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 1e-7, 1e-4, 2.0**-23, 2.0**-52, 0.0, 1e-2, 1e-15, 1e-10)


@dataclass(frozen=True, slots=True)
class Norm:
    """centred   the mean is subtracted (layer norm) or not (RMS norm)
    epsilon     added to the variance, or (outside) to its root
    unbiased    the variance is divided by n - 1
    shift       added to the weight: 1 for a zero-centred norm"""

    centred: bool
    epsilon: float
    unbiased: bool = False
    outside: bool = False
    shift: float = 0.0
    error: float = float("inf")

    @property
    def text(self) -> str:
        parts = ["layer norm" if self.centred else "RMS norm", f"epsilon {self.epsilon:g}"]
        parts += ["variance over n - 1"] if self.unbiased else []
        parts += ["epsilon added to the root"] if self.outside else []
        parts += [f"weight {self.shift:+g}"] if self.shift else []
        return ", ".join(parts)


def norm(x: Array, weight: Array | None, bias: Array | None, how: Norm) -> Array:
    """The norm of x over the last axis."""
    off = x - x.mean(axis=-1, keepdims=True) if how.centred else x
    count = x.shape[-1] - (1 if how.unbiased else 0)
    variance = (off * off).sum(axis=-1, keepdims=True) / max(count, 1)
    with np.errstate(all="ignore"):
        root = np.sqrt(variance) + how.epsilon if how.outside else np.sqrt(variance + how.epsilon)
        y = off / root
    if weight is not None:
        y = y * (weight + how.shift)
    return y if bias is None else y + bias


def _norms(epsilons: Sequence[float]) -> Iterator[Norm]:
    for centred, unbiased, outside, shift in product((True, False), (False, True), (False, True), (0.0, 1.0, -1.0)):
        if not (unbiased and not centred):
            for epsilon in epsilons:
                yield Norm(centred, epsilon, unbiased, outside, shift)


def fit_norm(x: Array, y: Array, weight: Array | None, bias: Array | None, bar: Bar) -> list[Norm]:
    """Every norm that gives y, the best first. x, y (rows, D)."""
    out: list[Norm] = []
    for how in _norms(EPSILONS):
        if weight is None and how.shift:
            continue
        error = relative(norm(x, weight, bias, how), y)
        if bar.fitted(error):
            out.append(Norm(how.centred, how.epsilon, how.unbiased, how.outside, how.shift, error))
    if not out:
        out += _solved(x, y, weight, bias, bar)
    return sorted(out, key=lambda n: (n.unbiased + n.outside + abs(n.shift), n.error))


def _solved(x: Array, y: Array, weight: Array | None, bias: Array | None, bar: Bar) -> Iterator[Norm]:
    """Norms with an unusual epsilon, solved from the values."""
    for centred, shift in product((True, False), (0.0, 1.0)):
        off = x - x.mean(axis=-1, keepdims=True) if centred else x
        made = off * (1.0 if weight is None else weight + shift)
        left = y if bias is None else y - bias
        with np.errstate(all="ignore"):
            rate = (made * left).sum(axis=-1) / (made * made).sum(axis=-1)
            epsilon = float(np.median(1 / rate**2 - (off * off).mean(axis=-1)))
        if np.isfinite(epsilon) and epsilon > 0:
            how = Norm(centred, epsilon, shift=shift)
            error = relative(norm(x, weight, bias, how), y)
            if bar.fitted(error):
                yield Norm(centred, epsilon, shift=shift, error=error)


def norm_difference(x: Array, want: Array, have: Array, leaves: Mapping[str, Array], bar: Bar) -> list[Explanation]:
    """How Flax's norm differs from torch's. `leaves`: the right leaves of the Flax module by their last name: 'scale'
    or 'weight', 'bias'."""
    if want.shape != have.shape or want.shape != x.shape or x.ndim < 2 or x.shape[-1] < 2:
        return []
    weight = next((leaves[name] for name in ("scale", "weight", "gamma", "g") if name in leaves), None)
    bias = next((leaves[name] for name in ("bias", "beta", "b") if name in leaves), None)
    if weight is None and len(leaves) == 1:
        weight = next(iter(leaves.values()))
    if any(leaf is not None and leaf.shape != x.shape[-1:] for leaf in (weight, bias)):
        return []
    rows = np.unique(np.linspace(0, x[..., 0].size - 1, _ROWS).astype(int))
    a, y, z = (v.reshape(-1, v.shape[-1])[rows].astype(np.float64) for v in (x, want, have))
    weight, bias = (None if leaf is None else leaf.astype(np.float64) for leaf in (weight, bias))
    right = fit_norm(a, y, weight, bias, bar)
    if not right:
        return []
    wrong = fit_norm(a, z, weight, bias, bar)
    if wrong:
        return _compare(right, wrong)
    return _rounded(a, z, weight, bias, right[0], have, want)


def _compare(right: Sequence[Norm], wrong: Sequence[Norm]) -> list[Explanation]:
    best: list[tuple[int, float, Explanation]] = []
    for a, b in product(right, wrong):
        parts = [
            name
            for name in ("centred", "epsilon", "unbiased", "outside", "shift")
            if getattr(a, name) != getattr(b, name)
        ]
        if not parts:
            return []
        cost = len(parts) + a.unbiased + a.outside + (a.shift != 0) + b.unbiased + b.outside
        error = max(a.error, b.error)
        name = _NAMES.get(parts[0], "norm statistics")
        text = f"torch computes {a.text}; Flax computes {b.text}"
        fix = f"epsilon={a.epsilon:g}" if parts == ["epsilon"] else a.text
        if parts == ["shift"]:
            fix = "multiply by (1 + weight)" if a.shift > b.shift else "multiply by the weight itself, not 1 + weight"
        best.append((cost, error, Explanation(name, text, fix, error)))
    best.sort(key=lambda item: item[:2])
    return [best[0][2]]


_NAMES: Mapping[str, str] = {"epsilon": "epsilon", "shift": "zero-centred norm", "outside": "epsilon"}


def _rounded(
    x: Array, z: Array, weight: Array | None, bias: Array | None, right: Norm, have: Array, want: Array
) -> list[Explanation]:
    """The right norm in less exact arithmetic: bfloat16, or the variance as E[x^2] - E[x]^2."""
    made = norm(x, weight, bias, right)
    error = relative(z, made)
    if in_bfloat16(have) and not in_bfloat16(want) and error < 2.0**-6:
        text = "Flax's norm is computed in bfloat16"
        return [Explanation("bfloat16 accumulation", text, "dtype=jnp.float32", error)]
    off = x - x.mean(axis=-1, keepdims=True)
    if not right.centred:
        return []
    scaled = off * (1.0 if weight is None else weight + right.shift)
    left = z if bias is None else z - bias
    with np.errstate(all="ignore"):
        rate = (scaled * left).sum(axis=-1) / (scaled * scaled).sum(axis=-1)
        implied = 1 / rate**2 - right.epsilon
    variance, mean = (off * off).mean(axis=-1), x.mean(axis=-1)
    slack = 16 * 2.0**-24 * (mean**2 + variance)
    rest = relative(scaled * rate[:, None], left)
    if np.isfinite(implied).all() and (np.abs(implied - variance) <= slack).all() and rest < error / 3:
        text = "the variance of each row has the error that E[x^2] - E[x]^2 makes when the mean is large"
        return [Explanation("fast variance", text, "use_fast_variance=False, or E[(x - E[x])^2]", rest)]
    return []
