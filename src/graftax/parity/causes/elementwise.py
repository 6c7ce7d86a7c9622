"""Find the elementwise code that made an array from earlier outputs: act(a + b), act(a) * b, a x factor, capped.

A recipe is fitted on samples of torch's array and of Flax's array. The cause is the part in which the two simplest
recipes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graftax.parity.causes.activations import ACTIVATIONS, KIN, apply
from graftax.parity.causes.numbers import SAMPLES, Array, Bar, Budget, nice, positions, relative

_FIRST, _NEAR = 6, 10  # operands tried with every other operand, and with each other
_TRIPLES = 7  # operands that are tried by threes


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A reference array that the code may have used. `table`: it is the output of an embedding; `part`: the slice, if
    it is a part of a fused projection; `into`: the layers that also take it as input; `norm`: it is the output of a
    norm."""

    name: str
    array: Array
    table: bool = False
    part: str = ""
    into: tuple[str, ...] = ()
    norm: bool = False

    @property
    def text(self) -> str:
        return f"{self.name}{self.part}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """cap(factor x act(sum of terms) x gate) + after. `terms`, `gate` and `after` are indices into the operands;
    weights: how many times each term counts."""

    terms: tuple[int, ...]
    activation: str = "identity"
    weights: tuple[float, ...] = ()
    gate: int | None = None
    after: int | None = None
    cap: float | None = None
    error: float = float("inf")

    @property
    def size(self) -> int:
        """The number of parts: a recipe with fewer parts is likelier."""
        plain = self.activation == "identity"
        scaled = sum(weight != 1.0 for weight in self.weights)
        return (
            len(self.terms)
            + 2 * (not plain)
            + (self.gate is not None)
            + (self.after is not None)
            + scaled
            + 2 * (self.cap is not None)
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """How Flax's code differs from torch's: a name of `CAUSES`, the text, the fix, the error of the fit."""

    name: str
    text: str
    fix: str
    error: float


def cheapest(found: Sequence[tuple[int, Explanation]]) -> list[Explanation]:
    """The explanations of the least cost, one for each name, in the order in which they were found."""
    least = min((cost for cost, _ in found), default=0)
    out: dict[str, Explanation] = {}
    for cost, difference in found:
        if cost == least:
            out.setdefault(difference.name, difference)
    return list(out.values())


def sampled(array: Array, operands: Sequence[Operand]) -> tuple[tuple[Array, ...], list[Array | None]]:
    """Where to look in `array`, and the values of each operand there: by the same index, by the same order of all
    values, or broadcast; None if an operand does not fit."""
    at = positions(array.shape, SAMPLES)
    flat = np.ravel_multi_index(at, array.shape) if array.shape else np.zeros(1, dtype=np.int64)
    out: list[Array | None] = []
    for operand in operands:
        value = operand.array
        if value.shape == array.shape:
            out.append(value[at].astype(np.float64))
        elif value.size == array.size and value.shape[-1:] == array.shape[-1:]:
            out.append(value.reshape(-1)[flat].astype(np.float64))
        elif value.size > 1 and _broadcasts(value.shape, array.shape):
            out.append(np.broadcast_to(value, array.shape)[at].astype(np.float64))
        else:
            out.append(None)
    return at, out


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return len(shape) <= len(full) and all(a in (1, b) for a, b in zip(shape[::-1], full[::-1], strict=False))


def find_recipes(target: Array, values: Sequence[Array | None], bar: Bar, budget: Budget) -> list[Recipe]:
    """The recipes that give the sampled `target`, the simplest first."""
    usable = [index for index, value in enumerate(values) if value is not None]
    kept: list[Recipe] = []
    for stage in _STAGES:
        for recipe in stage(target, values, usable):
            if bar.fitted(recipe.error):
                kept.append(recipe)
            if not budget.left():
                return sorted(kept, key=_order)
        if kept and stage is not _single:
            break
    return sorted(kept, key=_order)


def _order(recipe: Recipe) -> tuple[int, int]:
    return recipe.size, sum(recipe.terms)


def _value(values: Sequence[Array | None], index: int) -> Array:
    value = values[index]
    assert value is not None
    return value


def _single(target: Array, values: Sequence[Array | None], usable: list[int]) -> Iterator[Recipe]:
    for index in usable:
        x = _value(values, index)
        for name in ACTIVATIONS:
            made = apply(name, x)
            yield Recipe((index,), name, error=relative(made, target))
            scaled = _factor(made, target)
            if scaled is not None:
                yield Recipe((index,), name, (scaled[0],), error=scaled[1])
        capped = fit_cap(x, target)
        if capped is not None:
            yield Recipe((index,), cap=capped[0], error=capped[1])


def _factor(made: Array, target: Array) -> tuple[float, float] | None:
    """(factor, error) of target = factor x made."""
    with np.errstate(all="ignore"):
        size = float(made @ made)
        factor = float(made @ target) / size if size and np.isfinite(size) else 0.0
    if not factor or not np.isfinite(factor) or abs(factor - 1) < 1e-7:
        return None
    return factor, relative(made * factor, target)


def _products(target: Array, values: Sequence[Array | None], usable: list[int]) -> Iterator[Recipe]:
    near = usable[: _NEAR + 4]
    for i in near:
        for name in ACTIVATIONS:
            made = apply(name, _value(values, i))
            for j in near:
                if i != j:
                    yield Recipe((i,), name, gate=j, error=relative(made * _value(values, j), target))


def _sums(target: Array, values: Sequence[Array | None], usable: list[int]) -> Iterator[Recipe]:
    near = usable[:_NEAR]
    for at, i in enumerate(near[:_FIRST]):
        for j in usable[at + 1 :]:  # the residual may come from far away
            total = _value(values, i) + _value(values, j)
            yield from _weighted(target, values, (i, j))
            for name in ACTIVATIONS:
                yield Recipe((i, j), name, error=relative(apply(name, total), target))
    for i in near:
        for j in near:
            if i != j:
                for name in list(ACTIVATIONS)[1:]:
                    made = apply(name, _value(values, i)) + _value(values, j)
                    yield Recipe((i,), name, after=j, error=relative(made, target))


def _triples(target: Array, values: Sequence[Array | None], usable: list[int]) -> Iterator[Recipe]:
    near = usable[:_TRIPLES]
    for a, i in enumerate(near):
        for b, j in enumerate(near[a + 1 :], a + 1):
            for k in near[b + 1 :]:
                yield from _weighted(target, values, (i, j, k))
                total = _value(values, i) + _value(values, j) + _value(values, k)
                for name in ("identity", "relu"):
                    yield Recipe((i, j, k), name, error=relative(apply(name, total), target))


def _weighted(target: Array, values: Sequence[Array | None], terms: tuple[int, ...]) -> Iterator[Recipe]:
    """A weighted sum, by least squares; none if the terms are linearly dependent."""
    columns = np.stack([_value(values, index) for index in terms], axis=1)
    if len(columns) < 8 * len(terms):
        return
    weights, _, rank, sizes = np.linalg.lstsq(columns, target, rcond=None)
    if rank < len(terms) or sizes[-1] < 1e-4 * sizes[0] or not np.isfinite(weights).all():
        return
    rounded = tuple(float(round(w)) if abs(w - round(w)) < 1e-5 else float(w) for w in weights)
    if 0.0 in rounded:
        return
    yield Recipe(terms, weights=rounded, error=relative(columns @ np.array(rounded), target))


_Stage = Callable[[Array, Sequence[Array | None], list[int]], Iterator[Recipe]]
_STAGES: tuple[_Stage, ...] = (_single, _sums, _products, _triples)


def fit_cap(x: Array, target: Array) -> tuple[float, float] | None:
    """(cap, error) of target = cap x tanh(x / cap), solved at the largest values."""
    size, top = np.abs(x), np.abs(target)
    if not size.size or not np.isfinite(size).all() or (top > size * (1 + 1e-6) + 1e-30).any():
        return None
    at = int(np.argmax(size))
    if not top[at] or top[at] > size[at] * (1 - 1e-6):
        return None
    low, high = np.log(top[at] * (1 - 1e-12)), np.log(size[at] * 1e4)
    for _ in range(80):
        middle = (low + high) / 2
        cap = np.exp(middle)
        low, high = (middle, high) if cap * np.tanh(size[at] / cap) < top[at] else (low, middle)
    cap = float(np.exp((low + high) / 2))
    whole = round(cap)
    if whole and abs(cap / whole - 1) < 1e-3:
        cap = float(whole)
    if abs(cap - 1) < 1e-3:  # a cap of 1 is tanh itself
        return None
    return cap, relative(cap * np.tanh(x / cap), target)


# ---------------------------------------------------------------- what differs


def compare(want: Sequence[Recipe], have: Sequence[Recipe], operands: Sequence[Operand]) -> list[Explanation]:
    """The smallest difference between a recipe for torch's array and one for Flax's; several if they are equally
    small."""
    best: list[tuple[int, Explanation]] = []
    for right in want[:6]:
        for wrong in have[:6]:
            found = _differ(right, wrong, operands)
            if found is not None:
                best.append((found[0] + right.size + wrong.size, found[1]))
    return cheapest(best)


def _differ(right: Recipe, wrong: Recipe, operands: Sequence[Operand]) -> tuple[int, Explanation] | None:
    """(how much differs, the explanation)."""
    error = max(right.error, wrong.error)
    if replace(right, weights=(), cap=None, error=0) == replace(wrong, weights=(), cap=None, error=0):
        return _numbers(right, wrong, operands, error)
    if right.cap != wrong.cap:
        return None
    plain = set(right.weights) | set(wrong.weights) <= {1.0}
    used = {*right.terms, right.gate, right.after} - {None}
    theirs = {*wrong.terms, wrong.gate, wrong.after} - {None}
    if right.activation != wrong.activation and used == theirs and (plain or right.weights == wrong.weights):
        names = right.activation, wrong.activation
        kin = KIN.get(names[0], names[0]) == KIN.get(names[1], names[1])
        text = f"torch has {_activation_text(names[0])}, Flax {_activation_text(names[1])}"
        same_place = right.terms == wrong.terms and right.gate == wrong.gate
        where = "" if same_place else f" on {operands[right.terms[0]].text}"
        return (1 if kin else 2) + (not same_place), Explanation(
            "activation", text, f"{ACTIVATIONS[names[0]].flax}{where}", error
        )
    if right.activation == wrong.activation and theirs < used and wrong.gate == right.gate:
        lost = ", ".join(operands[index].text for index in sorted(used - theirs))
        text = f"torch adds {lost}, Flax does not"
        return 2, Explanation("missing residual", text, f"add {lost}", error)
    if right.activation == wrong.activation and used < theirs and wrong.gate == right.gate:
        more = ", ".join(operands[index].text for index in sorted(theirs - used))
        return 2, Explanation("missing residual", f"Flax adds {more}, torch does not", f"do not add {more}", error)
    if used == theirs and right.activation == wrong.activation and right.gate is not None and wrong.gate is not None:
        text = f"the activation belongs on {operands[right.terms[0]].text}, not on {operands[wrong.terms[0]].text}"
        return 2, Explanation("activation", text, f"{ACTIVATIONS[right.activation].flax} of the other half", error)
    return _other_operand(right, wrong, operands, error)


def _other_operand(
    right: Recipe, wrong: Recipe, operands: Sequence[Operand], error: float
) -> tuple[int, Explanation] | None:
    """One term comes from another array: the residual was taken before or after the wrong layer."""
    if right.activation != wrong.activation or len(right.terms) != len(wrong.terms) or right.gate != wrong.gate:
        return None
    ours, theirs = set(right.terms) - set(wrong.terms), set(wrong.terms) - set(right.terms)
    if len(right.terms) < 2 or len(ours) != 1 or len(theirs) != 1:
        return None
    want, have = operands[ours.pop()], operands[theirs.pop()]
    text, fix = f"torch adds {want.text}, Flax adds {have.text} instead", f"add {want.text}"
    if want.norm and want.name in have.into:
        return 3, Explanation("norm not applied", f"{text}: {want.name} is not applied to it", fix, error)
    if have.norm and have.name in want.into:
        return 3, Explanation("norm order", f"{text}: {have.name} is applied where torch does not", fix, error)
    return 3, Explanation("missing residual", text, fix, error)


def _activation_text(name: str) -> str:
    return "no activation" if name == "identity" else name


def _numbers(right: Recipe, wrong: Recipe, operands: Sequence[Operand], error: float) -> tuple[int, Explanation] | None:
    """The same recipe with other numbers."""
    if right.cap != wrong.cap:
        want, have = (f"{cap:g} x tanh(x / {cap:g})" if cap else "no cap" for cap in (right.cap, wrong.cap))
        fix = f"x = {right.cap:g} * jnp.tanh(x / {right.cap:g})" if right.cap else "leave the tanh cap out"
        return 2, Explanation("logit softcap", f"torch has {want}, Flax {have}", fix, error)
    ones = (1.0,) * len(right.terms)
    want, have = right.weights or ones, wrong.weights or ones
    moved = [at for at in range(len(want)) if abs(want[at] / have[at] - 1) > 1e-5]
    if not moved:
        return None
    at = moved[0]
    operand = operands[right.terms[at]]
    name = "embedding scale" if operand.table else "scale factor"
    text = f"torch has {nice(want[at])} x {operand.text}, Flax {nice(have[at])} x"
    return len(moved), Explanation(name, text, f"multiply {operand.text} by {nice(want[at] / have[at])}", error)
