"""Fused tensors that the plan takes apart in another order than torch's code: in blocks (all queries, then keys, then
values) or head by head. Shapes do not show the order. If the user's own rule chose the wrong order, Flax's weights
agree with the plan, and only the outputs differ. So the weights are read in the other order, and the model is run
again."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.errors import GraftaxError
from graftax.ops import Cast, Offset, Scale, apply_chain
from graftax.parity.align import LARGEST, numbered
from graftax.parity.audit import made_of
from graftax.parity.causes.numbers import Array, Bar, Budget
from graftax.parity.divergence import Divergence
from graftax.parity.pairing import OPAQUE
from graftax.parity.report.model import Cause, ratio_of
from graftax.plans import Entry
from graftax.tree import TensorSpec

NAME = "fused order"
_TRIED = 6  # at most this many orders are tried
_WIDTH = 64  # the usual width of a head: if the number of heads is unknown, widths near it are tried first
_BY_RULE = re.compile(r" (item|line) \d+$")


@dataclass(frozen=True, slots=True, eq=False)
class RowOrder:
    """The rows of a fused tensor that belong to each of its parts, in the order of the rows.

    fused   'block' or 'interleaved', as in a rule; heads: the number of heads of the first part, if interleaved
    """

    fused: str
    heads: int
    rows: tuple[Array, ...]

    @property
    def key(self) -> tuple[str, int]:
        """A key that is equal for two orders of the same kind, whatever the sizes."""
        return self.fused, self.heads

    @property
    def text(self) -> str:
        if self.fused == "block":
            return "in blocks, one part after the other"
        return f"head by head ({self.heads} heads)"

    @property
    def keys(self) -> str:
        """The keys of a rule that ask for this order."""
        return f'fused = "{self.fused}"' + (f", heads = {self.heads}" if self.fused == "interleaved" else "")


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """An entry that takes its sources apart along `axis`, with the rows that each target gets."""

    entry: Entry
    axis: int
    rows: tuple[Array, ...]
    heads: tuple[int, ...]

    @property
    def decided(self) -> str:
        """What decided the order, as text: a rule with its line, or other evidence."""
        evidence = self.entry.evidence
        return f"as {evidence[0]} says" if self.by_rule else f"by {', '.join(evidence) or 'the plan'}"

    @property
    def by_rule(self) -> bool:
        return bool(self.entry.evidence and _BY_RULE.search(self.entry.evidence[0]))

    @property
    def order(self) -> RowOrder | None:
        """The order in which the entry reads the rows; None: it has no name."""
        return next((order for order in self.orders() if _alike(order.rows, self.rows)), None)

    def orders(self) -> Iterator[RowOrder]:
        """The orders that the shapes allow."""
        sizes = [len(part) for part in self.rows]
        ends = np.cumsum(sizes)
        yield RowOrder("block", 0, tuple(np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)))
        for heads in self.heads:
            width, odd = divmod(max(sizes), heads)
            if odd or any(size % width for size in sizes):
                continue
            counts = [size // width for size in sizes]
            groups = min(counts)
            if groups > 1 and not any(count % groups for count in counts):
                shape = groups, sum(counts) // groups, width
                parts = np.split(np.arange(sum(sizes)).reshape(shape), np.cumsum(counts)[:-1] // groups, axis=1)
                yield RowOrder("interleaved", heads, tuple(part.reshape(-1) for part in parts))

    def others(self) -> Iterator[RowOrder]:
        """The other orders that the shapes allow."""
        now = self.order
        yield from (order for order in self.orders() if now is None or order.key != now.key)

    def read(self, order: RowOrder, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """The targets made from the sources (`arrays`) read in another order."""
        places = np.empty(sum(map(len, self.rows)), np.int64)
        places[np.concatenate(self.rows)] = np.concatenate(order.rows)
        return made_of(self.entry, tuple(np.take(array, places, self.axis) for array in arrays))


def _alike(one: Sequence[Array], other: Sequence[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def fused_entry(
    entry: Entry, specs: Mapping[str, TensorSpec], like: Mapping[str, TensorSpec], heads: Iterable[int]
) -> Fused | None:
    """The fused tensor that an entry takes apart, found by passing the numbers of its rows through its ops; None if it
    takes nothing apart. heads: possible numbers of heads, if the targets' shapes do not tell."""
    if len(entry.targets) < 2 or not entry.sources or not all(name in specs for name in entry.sources):
        return None
    shapes = [specs[name].shape for name in entry.sources]
    if len(set(shapes)) != 1 or sum(math.prod(shape) for shape in shapes) > LARGEST:
        return None
    ops = tuple(op for op in entry.ops if not isinstance(op, (Scale, Cast, Offset)))
    for axis in range(len(shapes[0])):
        try:
            made = apply_chain(ops, tuple(numbered(shape, axis) for shape in shapes))
        except GraftaxError:  # an op with a condition on values
            return None
        rows = tuple(np.unique(np.asarray(part)) for part in made)
        if np.array_equal(np.sort(np.concatenate(rows)), np.arange(shapes[0][axis])):
            return Fused(entry, axis, rows, _heads(entry, like, rows, heads))
    return None


def _heads(
    entry: Entry, like: Mapping[str, TensorSpec], rows: Sequence[Array], heads: Iterable[int]
) -> tuple[int, ...]:
    """The numbers of heads that the largest part may have. If its target has an axis of heads, (.., H, h) with H x h
    rows, it is H. Otherwise the known numbers come first, then every divisor."""
    largest = max(range(len(rows)), key=lambda i: len(rows[i]))
    count = len(rows[largest])
    shape = like[entry.targets[largest]].shape if entry.targets[largest] in like else ()
    if len(shape) > 1 and shape[-1] * shape[-2] == count:
        return (shape[-2],)
    known = [n for n in sorted(heads) if count % n == 0]
    others = [n for n in range(2, count + 1) if count % n == 0 and n not in known]
    return (*known, *sorted(others, key=lambda n: abs(math.log(count / n / _WIDTH))))


def fused_of(divergence: Divergence, heads: Iterable[int]) -> Iterator[Fused]:
    """The fused entries of the plan, except those of torch's own attention, whose order is known."""
    plan, heads = divergence.plan, tuple(heads)
    if plan is None:
        return
    for entry in plan.entries:
        holder = divergence.reference.modules.get(_holder(entry))
        if holder is None or not OPAQUE & set(holder.bases):
            found = fused_entry(entry, plan.source.specs, plan.like.specs, heads)
            if found is not None:
                yield found


def _holder(entry: Entry) -> str:
    return entry.sources[0].rpartition(".")[0] if entry.sources else ""


# ---------------------------------------------------------------- the model run again


def fused_causes(divergence: Divergence, heads: Iterable[int], bar: Bar, budget: Budget) -> Iterator[Cause]:
    """Fused tensors for which another order makes the model agree. Weight and bias, and all layers that differ only in
    their number, are tried together, those nearest to the diverging layer first."""
    groups: dict[str, list[Fused]] = {}
    for found in fused_of(divergence, heads):
        groups.setdefault(re.sub(r"\d+", "{i}", _holder(found.entry)), []).append(found)
    here = divergence.row.site_torch.path
    nearest = sorted(groups.values(), key=lambda group: -max(_shared(_holder(f.entry), here) for f in group))
    trials = [(group, order) for group in nearest for order in group[0].others()]
    for group, order in trials[:_TRIED]:
        if divergence.again is None or not budget.left():
            return
        try:
            error = divergence.again(_leaves(divergence, group, order))
        except GraftaxError:
            continue
        if error is not None and bar.replayed(error):
            floor = divergence.row.in_floor if divergence.where == "in" else divergence.row.out_floor
            yield _cause(divergence, group, order, bar.before, error, ratio_of(error, floor) or 0.0)
            return


def _shared(one: str, other: str) -> int:
    """How many leading parts two paths share."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _leaves(divergence: Divergence, group: Sequence[Fused], order: RowOrder) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for found in group:
        same = next((other for other in found.orders() if other.key == order.key), None)
        if same is not None:
            arrays = [np.asarray(divergence.torch_weights[name]) for name in found.entry.sources]
            out |= zip(found.entry.targets, found.read(same, arrays), strict=True)
    return out


def _cause(
    divergence: Divergence, group: Sequence[Fused], order: RowOrder, before: float, error: float, ratio: float
) -> Cause:
    first = next((found for found in group if found.by_rule), group[0])
    now, name = first.order, first.entry.sources[0]
    read = "in an order of its own" if now is None else now.text
    more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
    agrees = f"the layer agrees ({ratio:.2g}x float32's own error)"
    text = f"{name}{more} is read {read}, {first.decided}; read {order.text} {agrees}"
    where = f" instead of {now.keys}" if first.by_rule and now is not None else ""
    several = sum(found.entry.sources[0].rpartition(".")[2] == name.rpartition(".")[2] for found in group) > 1
    line = rule_line(first.entry, order, several)
    return Cause(NAME, divergence.row.site_flax.path, text, f"{line}{where}", before, error)


def rule_line(entry: Entry, order: RowOrder, several: bool = False) -> str:
    """The rule that reads a fused tensor in this order. several: make it a rule for all layers, if the names differ in
    one number only."""
    sources, targets = list(entry.sources), list(entry.targets)
    numbers = {number for name in (*sources, *targets) for number in re.findall(r"\d+", name)}
    counts = {len(re.findall(r"\d+", name)) for name in (*sources, *targets)}
    if several and len(numbers) == 1 and counts == {1}:
        sources, targets = ([re.sub(r"\d+", "{i}", name) for name in names] for names in (sources, targets))
    return f"{{ torch = {_listed(sources)}, flax = {_listed(targets)}, {order.keys} }}"


def _listed(names: Sequence[str]) -> str:
    quoted = ", ".join(f'"{name}"' for name in names)
    return quoted if len(names) == 1 else f"[{quoted}]"


# ---------------------------------------------------------------- weights read in another order than the plan's


def other_readings(found: Fused | None, path: str, arrays: Sequence[Any]) -> Iterator[tuple[RowOrder, Array]]:
    """(order, the leaf `path` made by reading its fused tensor in that order) for every order but the plan's."""
    if found is None or path not in found.entry.targets or len(arrays) != len(found.entry.sources):
        return
    for order in found.others():
        yield order, np.asarray(found.read(order, arrays)[found.entry.targets.index(path)])
