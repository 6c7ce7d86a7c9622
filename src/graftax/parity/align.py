"""Activation layouts: turn a torch array into Flax's layout.

What the plan says about the weights comes first (a flattened map whose features are in another order, heads split off,
rows permuted for rotary embeddings, a scale folded in). Then comes a prior by shape (Flax keeps channels last). Any
other order is accepted only if the values agree within NEAR: on faulty values the nearest order is often a wrong one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from graftax.errors import GraftaxError
from graftax.ops import Cast, Offset, Rearrange, Scale, apply_chain, parse_pattern
from graftax.parity.metrics import relative_l2
from graftax.parity.pairing import ModulePair
from graftax.plans import Entry
from graftax.tree import Module, TensorSpec

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
NEAR = 1e-2
CHANNELS_FIRST = (
    *("torch.nn.modules.conv.", "torch.nn.modules.batchnorm.", "torch.nn.modules.pooling."),
    *("torch.nn.modules.instancenorm.", "torch.nn.modules.normalization.GroupNorm"),
)
EMBEDDINGS = ("torch.nn.modules.sparse.",)
LARGEST = 1 << 26
"""The order of features is not derived from weights with more values than this."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One way from a torch array to the corresponding Flax array, in these steps: permute the axes, take the features
    (the last axis) in `order`, multiply by `scale`, then reshape, broadcast or cut to `shape`."""

    axes: tuple[int, ...]
    order: tuple[int, ...] | None = None
    scale: float = 1.0
    shape: Shape = ()

    def __call__(self, array: Array) -> Array:
        out = array if self.axes == tuple(range(array.ndim)) else array.transpose(self.axes)
        if self.order is not None:
            out = out[..., np.asarray(self.order)]
        if self.scale != 1.0:
            out = out * np.asarray(self.scale, out.dtype)
        if out.size == math.prod(self.shape):
            return out.reshape(self.shape)
        if out.size < math.prod(self.shape):
            return np.broadcast_to(out, self.shape)
        return out[tuple(slice(0, extent) for extent in self.shape)]

    @property
    def text(self) -> str:
        plain = self.axes == tuple(range(len(self.axes))) and self.order is None and self.scale == 1.0
        return "as it is" if plain else f"axes {self.axes}" + (", features in the plan's order" if self.order else "")


@dataclass(frozen=True, slots=True)
class Features:
    """What the plan says about a layer's features: their order and shape in Flax. None: the same as in torch."""

    order: tuple[int, ...] | None = None
    shape: Shape | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Alignment:
    """The layout of one module pair: its inputs and its outputs."""

    channels_first: bool = False
    inward: Features = Features()
    outward: Features = Features()

    def turn(self, array: Array, shape: Shape, actual: Any = None, outward: bool = False) -> Turn | None:
        """The turn from `array` (torch) to an array of `shape` (Flax); None if nothing fits. `actual`: Flax's array,
        which chooses between orders that fit equally."""
        features = self.outward if outward else self.inward
        found: list[Turn] = []
        for turn in candidates(array.shape, shape, self.channels_first, features):
            if turn not in found:
                found.append(turn)
            if len(found) >= 24:
                break
        if not found or actual is None or len(found) == 1:
            return found[0] if found else None
        for turn in found:
            if relative_l2(actual, turn(array)) <= NEAR:
                return turn
        return found[0]


def reordered(array: Array, shape: Shape, actual: Any) -> Turn | None:
    """The turn from a torch output to `shape` by permuting, merging or splitting axes. None if axes of length one come
    or go, or change places in a matrix: (N, 1), (1, N) and (N,) broadcast differently."""
    have = array.shape
    if math.prod(have) != math.prod(shape) or not same_ones(have, shape) or (1 in have and len(have) < 3):
        return None
    return Alignment().turn(array, shape, actual)


def same_ones(have: Shape, want: Shape) -> bool:
    """Have both shapes the same number of axes of length one?"""
    return have.count(1) == want.count(1)


def candidates(have: Shape, want: Shape, channels_first: bool, features: Features) -> list[Turn]:
    """Turns from a torch array of shape `have` to a Flax array of shape `want`, the likeliest first."""
    plain = tuple(range(len(have)))
    last = (0, *range(2, len(have)), 1) if len(have) > 2 else plain
    priors = [last, plain] if channels_first else [plain]
    out: list[Turn] = []
    scale = features.scale
    if features.order is not None and features.shape is not None:
        for axes in priors:
            there = tuple(have[a] for a in axes)
            if there and there[-1] == len(features.order) and math.prod(there) == math.prod(want):
                out.append(Turn(axes, features.order, scale, want))
        if out:  # the plan gives the order: features in another order are a fault
            return out
    for axes in priors:
        if tuple(have[a] for a in axes) == want:
            out.append(Turn(axes, None, scale, want))
    if len(have) == len(want) and len(have) <= 5:
        for axes in itertools.permutations(plain):
            if tuple(have[a] for a in axes) == want:
                out.append(Turn(axes, None, scale, want))
    if math.prod(have) == math.prod(want):
        for axes in dict.fromkeys((*priors, *_swaps(len(have)), last)):
            if _regroups(tuple(have[a] for a in axes), want):
                out.append(Turn(axes, None, scale, want))
    if len(have) == len(want) or 1 in have or 1 in want:
        out += _broadcasts(have, want, scale)
    return out


def _swaps(rank: int) -> list[tuple[int, ...]]:
    """Axes with batch and time swapped (torch's recurrent layout), and with heads and time swapped."""
    if rank < 3:
        return []
    return [(1, 0, *range(2, rank))] + ([(0, 2, 1, *range(3, rank))] if rank > 3 else [])


def _regroups(have: Shape, want: Shape) -> bool:
    """Can `have` become `want` by merging neighbouring axes, or by splitting axes? A reshape that does both may cut
    across axes, and then gives another array."""
    fine, coarse = (have, want) if len(have) >= len(want) else (want, have)
    fine, coarse = tuple(n for n in fine if n != 1), tuple(n for n in coarse if n != 1)
    at = 0
    for extent in coarse:
        size = 1
        while size < extent and at < len(fine):
            size *= fine[at]
            at += 1
        if size != extent:
            return False
    return at == len(fine)


def _broadcasts(have: Shape, want: Shape, scale: float) -> list[Turn]:
    """Turns for axes of length one on one of the sides: a position embedding with batch 1 against one with the whole
    batch. Axes that would grow beside others that would shrink are another array."""
    if len(have) != len(want) or have == want:
        return []
    pairs = list(zip(have, want, strict=True))
    grows, shrinks = all(a in (1, b) for a, b in pairs), all(b in (1, a) for a, b in pairs)
    return [Turn(tuple(range(len(have))), None, scale, want)] if grows or shrinks else []


# ---------------------------------------------------------------- what the plan says


def alignment_of(pair: ModulePair, torch: Module | None, specs: Mapping[str, TensorSpec]) -> Alignment:
    """The layout of a pair's activations. specs: those of the torch leaves."""
    if torch is None:
        return Alignment()
    first = any(base.startswith(CHANNELS_FIRST) for base in torch.bases)
    weight = torch.leaves.get("weight")
    entry = next((e for e in pair.entries if weight in e.sources), None)
    if not pair.leaf or entry is None or len(torch.leaves) > 4 or len(entry.targets) > 1:
        return Alignment(first)
    shapes = tuple(specs[name].shape for name in entry.sources if name in specs)
    embedding = any(base.startswith(EMBEDDINGS) for base in torch.bases)
    return Alignment(first, *_features(entry, shapes, embedding))


def _moves(entry: Entry) -> bool:
    """Does an entry do more than permute whole axes?"""
    for op in entry.ops:
        if isinstance(op, (Scale, Cast, Offset)):
            continue
        if not isinstance(op, Rearrange):
            return True
        if any(len(group) > 1 for side in parse_pattern(op.pattern) for group in side):
            return True
    return False


@lru_cache(maxsize=4096)
def _features(entry: Entry, shapes: tuple[Shape, ...], embedding: bool) -> tuple[Features, Features]:
    """Where torch's input and output features stand in the Flax leaf: found by passing their numbers through the
    entry's ops."""
    scale = math.prod(1 / op.factor if op.divide else op.factor for op in entry.ops if isinstance(op, Scale))
    plain = Features(), Features(scale=scale)
    ops = tuple(op for op in entry.ops if not isinstance(op, (Scale, Cast, Offset)))
    ranks = {len(shape) for shape in shapes}
    if not _moves(entry) or len(ranks) != 1 or 0 in ranks or len(shapes) != len(entry.sources):
        return plain
    if sum(math.prod(shape) for shape in shapes) > LARGEST:
        return plain
    inner = 1 if ranks.pop() > 1 else 0
    found: list[Features] = []
    for axis in (inner, inner if embedding else 0):
        try:
            there = apply_chain(ops, tuple(numbered(shape, axis) for shape in shapes))[0]
        except GraftaxError:  # an op with a condition on values
            return plain
        found.append(_order(np.asarray(there)))
    inward, outward = found
    return Features() if embedding else inward, Features(outward.order, outward.shape, scale)


def numbered(shape: Shape, axis: int) -> Array:
    """A tensor of this shape whose values are the indices along one axis."""
    where = [1] * len(shape)
    where[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis], dtype=np.int32).reshape(where), shape)


def _order(numbers: Array) -> Features:
    """The shape of the axes along which the numbers vary, and the numbers in the order of these axes."""
    varying = [a for a in range(numbers.ndim) if numbers.shape[a] > 1 and bool((np.diff(numbers, axis=a) != 0).any())]
    index = tuple(slice(None) if a in varying else 0 for a in range(numbers.ndim))
    order = numbers[index]
    flat = order.reshape(-1)
    if not np.array_equal(np.sort(flat), np.arange(flat.size)):
        return Features()
    if np.array_equal(flat, np.arange(flat.size)):
        return Features(None, tuple(order.shape))
    return Features(tuple(int(n) for n in flat), tuple(order.shape))


# ---------------------------------------------------------------- declared layouts


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "transpose")
