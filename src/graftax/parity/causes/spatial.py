"""Find the pooling, reducing or flattening that made an array from maps (B, *k, C) or sequences (B, T, C)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

import numpy as np

from graftax.parity.causes.activations import ACTIVATIONS, apply
from graftax.parity.causes.elementwise import Explanation, Operand, cheapest
from graftax.parity.causes.numbers import Array, Bar, Budget, relative

_BATCH, _CHANNELS = 2, 4  # the part of a pooled map that is compared
_ACTS = ("identity", "relu", "gelu erf", "gelu tanh", "silu", "tanh", "relu6", "leaky relu 0.01", "elu")
_FULL = 1 << 22  # larger maps are not considered

Kind = Literal["max", "avg"]
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """A pooling window over the spatial axes. `counted`: an average counts the padding."""

    kind: Kind
    size: int
    stride: int
    pads: Pads
    named: str = ""
    counted: bool = True

    @property
    def flax(self) -> str:
        rank = len(self.pads)
        pads = repr(self.named) if self.named else str(self.pads)
        last = "" if self.kind == "max" or self.counted else ", count_include_pad=False"
        window, strides = (self.size,) * rank, (self.stride,) * rank
        return f"nn.{self.kind}_pool(x, {window}, strides={strides}, padding={pads}{last})"


def pool(x: Array, how: Pool) -> Array:
    """(B, *k, C) -> (B, *k', C)."""
    rank = len(how.pads)
    pads = ((0, 0), *how.pads, (0, 0))
    padded = np.pad(x, pads, constant_values=-np.inf if how.kind == "max" else 0.0)
    cut = (slice(None), *(slice(None, None, how.stride),) * rank)
    axes = tuple(range(1, 1 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (how.size,) * rank, axis=axes)[cut]
    last = tuple(range(-rank, 0))
    if how.kind == "max":
        return windows.max(axis=last)
    if how.counted:
        return windows.mean(axis=last)
    ones = np.pad(np.ones_like(x[:1, ..., :1]), pads)
    count = np.lib.stride_tricks.sliding_window_view(ones, (how.size,) * rank, axis=axes)[cut].sum(axis=last)
    return windows.sum(axis=last) / count


def pools(spatial: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[Pool]:
    """Every usual pool that turns maps of this size into maps of that size."""
    rank = len(spatial)
    for size, stride, kind in product((2, 3, 4, 5), (1, 2, 3, 4), ("max", "avg")):
        seen: set[Pads] = set()
        for named, pads in _paddings(spatial, size, stride):
            sizes = tuple((n + a + b - size) // stride + 1 for n, (a, b) in zip(spatial, pads, strict=True))
            fits = all(n + a + b >= size for n, (a, b) in zip(spatial, pads, strict=True))
            if sizes != wanted or not fits or pads in seen:
                continue
            seen.add(pads)
            yield Pool(kind, size, stride, pads, named)
            if kind == "avg" and any(map(any, pads)):
                yield Pool(kind, size, stride, pads, named, counted=False)
        if rank > 3:
            return


def _paddings(spatial: tuple[int, ...], size: int, stride: int) -> Iterator[tuple[str, Pads]]:
    rank = len(spatial)
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in spatial]
    yield "", ((0, 0),) * rank
    for pad in range(1, size // 2 + 1):
        yield "", ((pad, pad),) * rank
    yield "SAME", tuple((n // 2, n - n // 2) for n in total)
    usual = ((0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2))
    each = [pads for pads in usual if max(pads) < size]
    yield from (("", pads) for pads in product(each, repeat=rank if rank < 3 else 1) if len(pads) == rank)


@dataclass(frozen=True, slots=True)
class Way:
    """reduce(act(sum of operands)), flattened in an order of its axes."""

    terms: tuple[int, ...]
    activation: str
    what: str
    pool: Pool | None = None
    order: tuple[int, ...] = ()
    error: float = float("inf")

    @property
    def text(self) -> str:
        return self.pool.flax if self.pool else self.what


def find_ways(target: Array, operands: Sequence[Operand], bar: Bar, budget: Budget) -> list[Way]:
    """Ways to make `target` from maps, the likeliest first; at the first operand that gives any, it stops."""
    maps = [i for i, operand in enumerate(operands) if operand.array.ndim >= 3 and operand.array.size <= _FULL]
    maps = [i for i in maps if len(operands[i].array) == len(target)][:6]
    terms = [(i,) for i in maps] + [
        (i, j) for at, i in enumerate(maps[:4]) for j in maps[at + 1 : 4] if _alike(operands, i, j)
    ]
    for chosen in terms:
        total = np.sum([operands[i].array.astype(np.float64) for i in chosen], axis=0)
        found: list[Way] = []
        for name in _ACTS:
            for way, made in _made(apply(name, total), target):
                error = relative(made, _cropped(target, made))
                if bar.fitted(error):
                    found.append(Way(chosen, name, way.what, way.pool, way.order, error))
            if not budget.left():
                return found
        if found:
            return found
    return []


def _alike(operands: Sequence[Operand], i: int, j: int) -> bool:
    return operands[i].array.shape == operands[j].array.shape


def _cropped(target: Array, made: Array) -> Array:
    """The part of the target that was computed."""
    return target[tuple(slice(0, n) for n in made.shape)] if target.ndim == made.ndim else target


def _made(x: Array, target: Array) -> Iterator[tuple[Way, Array]]:
    """Reductions of maps x that have the target's shape."""
    blank = Way((), "", "")
    middle = tuple(range(1, x.ndim - 1))
    if target.shape == (len(x), x.shape[-1]):
        for what, made in (
            (f"x.mean(axis={middle})", x.mean(axis=middle)),
            (f"x.max(axis={middle})", x.max(axis=middle)),
            (f"x.sum(axis={middle})", x.sum(axis=middle)),
        ):
            yield Way((), "", what), made
        if x.ndim == 3:
            yield Way((), "", "x[:, 0]"), x[:, 0]
            yield Way((), "", "x[:, -1]"), x[:, -1]
            yield Way((), "", "x[:, 1:].mean(axis=1)"), x[:, 1:].mean(axis=1) if x.shape[1] > 1 else x[:, 0]
    if target.ndim == x.ndim and target.shape[-1] == x.shape[-1] and target.shape[1:-1] != x.shape[1:-1]:
        small = x[:_BATCH, ..., :_CHANNELS]
        for how in pools(x.shape[1:-1], target.shape[1:-1]):
            yield Way((), "", "pool", how), pool(small, how)
        for step, start in product((2, 3), (0, 1)):
            if all(len(range(start, n, step)) == m for n, m in zip(x.shape[1:-1], target.shape[1:-1], strict=True)):
                cut = (slice(None), *(slice(start, None, step),) * len(middle))
                yield Way((), "", f"x[:, {start}::{step}, ...]"), small[cut]
    if target.ndim == 2 and x.size >= target.size and x.ndim >= 3:
        yield from _flattened(x, target, blank)


def _flattened(x: Array, target: Array, blank: Way) -> Iterator[tuple[Way, Array]]:
    axes = tuple(range(1, x.ndim))
    if x[0].size == target.shape[1]:
        for order in permutations(axes):
            yield Way((), "", "flatten", None, order), x.transpose(0, *order).reshape(len(x), -1)
        return
    channels = x.shape[-1]
    if target.shape[1] % channels or x.ndim != 4:
        return
    cells = target.shape[1] // channels
    for side in _sides(x.shape[1:-1], cells):
        for how in pools(x.shape[1:-1], side):
            made = pool(x, how)
            for order in ((1, 2, 3), (3, 1, 2)):
                yield Way((), "", "pool", how, order), made.transpose(0, *order).reshape(len(x), -1)


def _sides(spatial: tuple[int, ...], cells: int) -> Iterator[tuple[int, ...]]:
    for height in range(1, spatial[0] + 1):
        if cells % height == 0 and cells // height <= spatial[1]:
            width = cells // height
            if abs(spatial[0] / height - spatial[1] / width) < 1:
                yield height, width


def compare_ways(want: Sequence[Way], have: Sequence[Way], operands: Sequence[Operand]) -> list[Explanation]:
    """The smallest difference between a way for torch's array and one for Flax's."""
    best: list[tuple[int, Explanation]] = []
    for right, wrong in product(want[:12], have[:12]):
        found = _differ(right, wrong, operands)
        if found is not None:
            best.append(found)
    return cheapest(best)


def _differ(right: Way, wrong: Way, operands: Sequence[Operand]) -> tuple[int, Explanation] | None:
    error = max(right.error, wrong.error)
    parts = {
        "terms": right.terms != wrong.terms,
        "activation": right.activation != wrong.activation,
        "pool": (right.what, right.pool) != (wrong.what, wrong.pool),
        "order": right.order != wrong.order,
    }
    moved = [name for name, differs in parts.items() if differs]
    if len(moved) != 1:
        return None
    if moved == ["order"]:
        text = f"torch flattens axes {right.order} of the map, Flax {wrong.order} (0 is the batch, the last channels)"
        return 1, Explanation("flatten order", text, f"x.transpose(0, {', '.join(map(str, right.order))}) first", error)
    if moved == ["activation"]:
        text = f"torch has {right.activation} before {right.text}, Flax {wrong.activation}"
        return 1, Explanation("activation", text, ACTIVATIONS[right.activation].flax, error)
    if moved == ["terms"]:
        lost = set(right.terms) ^ set(wrong.terms)
        names = ", ".join(operands[index].text for index in sorted(lost))
        side = "torch adds" if len(right.terms) > len(wrong.terms) else "only Flax adds"
        return 2, Explanation("missing residual", f"{side} {names}", f"add or leave out {names}", error)
    return _pools_differ(right, wrong, error)


def _pools_differ(right: Way, wrong: Way, error: float) -> tuple[int, Explanation] | None:
    text = f"torch computes {right.text}, Flax computes {wrong.text}"
    a, b = right.pool, wrong.pool
    if a is None or b is None:
        name = "stride alignment" if a is b and "::" in right.what else "pooling"
        return 1, Explanation(name, text, right.text, error)
    if a.kind != b.kind:
        return 2 + (a.pads != b.pads) + (a.size != b.size), Explanation("pooling", text, a.flax, error)
    if a.size != b.size or a.stride != b.stride:
        return 3, Explanation("pooling", text, a.flax, error)
    return 1, Explanation("padding", text, a.flax, error)
