"""What the leaves of an event may hold, so that the value that it makes is one that torch made; the likeliest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.layers.readings import readings
from graftax.ops import Fill, Offset, Op, Scale
from graftax.probe.choices import Choice, Option, regions
from graftax.probe.evaluate import evaluate
from graftax.probe.partial_run import PartialRun
from graftax.probe.program import Step
from graftax.probe.rewrite import Unknown

Array = Any
STRICT = frozenset(("dot_general", "conv_general_dilated", "gather"))
"""Steps that must make a value that torch made, if one leaf is undecided."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How strict a pass is. twins: only tensors that torch used with the same data, where there are any; reuse: one
    may fill a second leaf; changed: also tensors with an offset or a factor, and constants where torch has nothing;
    strict: products without a twin are dead ends; near: a dead end takes back the choices next to it only, a reading
    that permutes a value is tried only if later values then are torch's, and a product of two data must be torch's."""

    twins: bool = True
    reuse: bool = False
    changed: bool = False
    strict: bool = True
    near: bool = False


class Candidates:
    """The options of events.

    siblings  sources at one place of sibling modules: candidates for a stack, and readings to try first
    how       how strict the present pass is
    idle      True while no output needs the value of the event
    blocked   the choices that hold tensors which were passed over since it was last set to 0
    in_parts  the values of which torch made each part alone
    """

    def __init__(self, state: PartialRun, siblings: Sequence[Sequence[int]], how: Pass) -> None:
        self.state, self.siblings, self.how = state, siblings, how
        self.places = {source: n for n, group in enumerate(siblings) for source in group}
        self.first = {s.keys[0]: n for n, s in reversed(list(enumerate(state.record.sources))) if s.rows is None}
        self.habits: dict[Any, list[tuple[int, tuple[Op, ...]]]] = {}
        self.in_parts: set[int] = set()
        self.idle = False
        self.blocked = 0

    def remember(self, unknown: int, choice: Choice) -> None:
        """Try the readings of this choice first where the same tensor of a sibling module comes up."""
        for source, ops in zip(choice.sources, choice.ops, strict=False):
            self.habits.setdefault(self.place(source, unknown), []).append((unknown, ops))

    def _habit(self, source: int, unknown: int) -> tuple[Op, ...] | None:
        """The reading that the last such choice has; one that was taken back says nothing."""
        row = self.habits.get(self.place(source, unknown), [])
        while row:
            other, ops = row[-1]
            choice = self.state.choices.get(other)
            if choice is not None and ops in choice.ops:
                return ops
            row.pop()
        return None

    def of(self, step: Step, value: int, leaves: frozenset[int]) -> Iterator[Option]:
        """What the leaves may hold, so that the value is one that torch made; the likeliest first."""
        operands = self._operands(value)
        inputs = {c for n in operands for c in self.state.class_of(n)}
        twins = any(number in self.state.record.twins for number in inputs)
        whole = any(self.state.known[n].size >= math.prod(self.state.program.shapes[value]) for n in operands)
        if self.how.twins and step.name not in STRICT and not twins and not (inputs and whole):
            return iter(())
        if len(leaves) == 1:
            (unknown,) = leaves
            return self._one(value, unknown, inputs)
        return self._joint(value, tuple(sorted(leaves)), inputs)

    def _operands(self, value: int) -> list[int]:
        """The known data that a value is made of: those that meet the leaf first."""
        return [n for n in self.state.made_of(value) if self.state.tells(n)]

    def _ordered(self, inputs: Collection[int], unknown: int) -> list[int]:
        """The sources to try, in order: those that are preferred, the twins, then all others."""
        twins = [source for number in inputs for source in self.state.record.twins.get(number, ())]
        out = list(twins)
        if not (self.how.twins and twins):
            out += [*self.state.record.used, *range(len(self.state.record.sources))]
        return list(dict.fromkeys(out))

    def _blocked(self, source: int) -> bool:
        """True if the tensor, or some of its rows, already fill a leaf; those choices then join the conflict."""
        if self.how.reuse and not self.idle:
            return False
        item = self.state.record.sources[source]
        busy = False
        for key in item.keys:
            for other, bit in self.state.used_by.get(key, ()):
                theirs = self.state.record.sources[other]
                if theirs.keys != item.keys and len(theirs.keys) > 1 and len(item.keys) > 1:
                    continue
                apart = item.rows is not None and theirs.rows is not None and item.axis == theirs.axis
                if not apart or set(item.rows or ()) & set(theirs.rows or ()):
                    busy = True
                    self.blocked |= bit
        return busy

    def _one(self, value: int, unknown: int, inputs: Collection[int]) -> Iterator[Option]:
        target = self.state.unknowns[unknown]
        rest = {v: a for v, a in self.state.rest(value).items() if v != target.value}
        order = self._ordered(inputs, unknown)
        plain = self._plain(value, unknown, inputs, rest, order)
        items = (self.state.record.sources[source] for source in order)
        if any(item.how == "sum" and item.array.size == math.prod(target.shape) for item in items):
            # A bias, or its sum with another: what follows tells which.
            both = [(0 if made is None else -self._ahead(value, made), (chosen, n, made)) for chosen, n, made in plain]
            plain = (option for _, option in sorted(both, key=lambda row: row[0]))
        yield from plain
        if self.how.changed:
            yield from self._changed(value, unknown, inputs, rest)
        yield from self._several(value, unknown, inputs, rest)
        if self.how.changed:
            yield from self._constants(value, unknown, inputs, rest)

    def _plain(
        self, value: int, unknown: int, inputs: Collection[int], rest: dict[int, Array], order: Sequence[int]
    ) -> Iterator[Option]:
        """Tensors as they are, in some reading."""
        target = self.state.unknowns[unknown]
        maps = self._maps(inputs, math.prod(self.state.program.shapes[value]))
        size = math.prod(target.shape)
        for source in order:
            item = self.state.record.sources[source]
            if item.array.size != size or self._blocked(source):
                continue
            permuted: list[tuple[int, Option]] = []
            least = -1
            habit = self._habit(source, unknown)
            ways = readings(item.array.shape, target.shape, maps)
            for rank, ops in enumerate(ways if habit is None else dict.fromkeys((habit, *ways))):
                choice = Choice((source,), (ops,))
                made = self.state.value(value, rest | {target.value: choice.array(self.state.record)})
                number = self._accepted(made, inputs)
                if number is None:
                    continue
                option = ({unknown: choice}, number, made)
                if (rank == 0 and habit is not None) or self.state.record.values.same_layout(made, number):
                    yield option
                    least = max(least, self._ahead(value, made)) if self.how.near else least
                else:
                    permuted.append((self._ahead(value, made), ({unknown: choice}, number, None)))
            permuted.sort(key=lambda row: -row[0])
            for ahead, option in permuted:
                if ahead > least:
                    yield option

    def _ahead(self, value: int, made: Array) -> int:
        """How many of the values that follow from one, without another leaf, are torch's: a permutation of what is
        rotated, added or multiplied later is not."""
        local: dict[int, Array] = {value: made}
        deep = {value}
        found: set[int] = set()
        start = self.state.place_of[value] + 1
        for step, j in self.state.slots[start : start + 400]:
            if len(deep) > 30:
                break
            if step.outs[j] in local:
                continue
            if not all(n in local or n in self.state.known for n in step.ins):
                if step.name in STRICT and any(self.state.is_zero(n) for n in step.ins):  # a first state, times W
                    local[step.outs[j]] = np.zeros(self.state.program.shapes[step.outs[j]])
                continue
            self.state.count()
            local.update(
                zip(step.outs, evaluate(step, [local.get(n, self.state.known.get(n)) for n in step.ins]), strict=True)
            )
            if not any(n in deep for n in step.ins):
                continue
            deep.update(step.outs)
            for n in step.outs:
                if np.asarray(local[n]).dtype.kind == "f":
                    found.update(self.state.record.values.find(local[n])[:1])
        return len(found)

    def place(self, source: int, unknown: int) -> Any:
        """Equal for the same tensor of sibling modules and leaves of one shape."""
        item = self.state.record.sources[source]
        whole = self.first.get(item.keys[0], source)
        rows = len(item.rows or ()), item.axis
        place = (self.places[whole], -1) if whole in self.places else (-1, whole)
        return place, item.array.shape, item.how, self.state.unknowns[unknown].shape, rows

    def _changed(
        self, value: int, unknown: int, inputs: Collection[int], rest: Mapping[int, Array]
    ) -> Iterator[Option]:
        """Twins with another offset (a norm stored as scale - 1) or factor (a query scale folded in)."""
        target = self.state.unknowns[unknown]
        vector = len([size for size in target.shape if size > 1]) == 1
        used = {op.factor for c in self.state.choices.values() for ops in c.ops for op in ops if isinstance(op, Scale)}
        twins = dict.fromkeys(s for number in inputs for s in self.state.record.twins.get(number, ()))
        for source in twins:
            item = self.state.record.sources[source]
            if item.array.size != math.prod(target.shape) or self._blocked(source):
                continue
            for ops in itertools.islice(readings(item.array.shape, target.shape), 4):
                for more in (Offset(-1.0), Offset(1.0), *map(Scale, sorted(used))) if vector else ():
                    choice = Choice((source,), ((*ops, more),))
                    made = self.state.value(value, {**rest, target.value: choice.array(self.state.record)})
                    number = self._accepted(made, inputs)
                    if number is not None:
                        yield {unknown: choice}, number, made
                plain = self.state.value(
                    value, {**rest, target.value: Choice((source,), (ops,)).array(self.state.record)}
                )
                for factor in self.state.record.values.factors(plain):
                    choice = Choice((source,), ((*ops, Scale(factor)),))
                    made = self.state.value(value, {**rest, target.value: choice.array(self.state.record)})
                    number = self._accepted(made, inputs)
                    if number is not None:
                        yield {unknown: choice}, number, made

    def _constants(
        self, value: int, unknown: int, inputs: Collection[int], rest: Mapping[int, Array]
    ) -> Iterator[Option]:
        """Zeros where torch adds nothing, ones where it multiplies by nothing: the value stays what it was."""
        target = self.state.unknowns[unknown]
        if not inputs or len([size for size in target.shape if size > 1]) > 1:
            return
        size = math.prod(target.shape)
        twins = [s for number in inputs for s in self.state.record.twins.get(number, ()) if self.how.twins]
        if any(self.state.record.sources[s].array.size == size and not self._blocked(s) for s in twins):
            return  # torch uses such a tensor with the same data: a later step decides
        for constant in (0.0, 1.0):
            fill = Fill(constant, target.shape, "float32", "torch has none; the outputs agree with it")
            choice = Choice((), ((fill,),))
            made = self.state.value(value, {**rest, target.value: choice.array(self.state.record)})
            same = [n for n in self.state.record.values.find(made) if n in inputs]
            if same:
                yield {unknown: choice}, same[0], made

    def _accepted(self, made: Array, inputs: Collection[int]) -> int | None:
        numbers = [n for n in self.state.record.values.find(made) if n not in inputs]
        return numbers[0] if numbers else None

    def _maps(self, inputs: Collection[int], size: int) -> list[tuple[int, ...]]:
        """Shapes of maps that may be flattened in the data, or unflattened from a value of this size."""
        shapes: dict[tuple[int, ...], None] = {}
        for number in (*inputs, *self.state.record.values.of_size(size)):
            shapes.update(dict.fromkeys(sorted(self.state.record.values.items[number].shapes, key=len)))
        out = dict.fromkeys(map_ for one in shapes for other in shapes if (map_ := _shuffled(one, other)))
        for shape in shapes:
            for start in range(1, len(shape) - 1):
                for stop in range(start + 2, min(len(shape), start + 4) + 1):
                    out[shape[start:stop]] = None
            if len(shape) > 2 and shape[-1] % 2 == 0 and shape[-1] > 2:  # heads whose halves or pairs are rotated
                half = shape[-1] // 2
                for heads in sorted({size for size in shape[:-1] if size > 1}):
                    out[heads, 2, half] = out[heads, half, 2] = None
                out[2, half] = out[half, 2] = None
        return list(out)

    # ------------------------------------------------------------ leaves made of several tensors

    def _several(
        self, value: int, unknown: int, inputs: Collection[int], rest: Mapping[int, Array]
    ) -> Iterator[Option]:
        """Tensors stacked, or side by side, in one leaf: experts, layers, fused projections."""
        target = self.state.unknowns[unknown]
        for choice in self._joined(target, inputs):
            if any(self._blocked(source) for source in choice.sources):
                continue
            made = self.state.value(value, {**rest, target.value: choice.array(self.state.record)})
            number = self._accepted(made, inputs)
            if number is not None:
                yield {unknown: choice}, number, made
                continue
            if len({self.state.record.sources[source].keys for source in choice.sources}) < len(choice.sources):
                continue
            parts = self._each_part(value, target, choice, made, rest)
            number = self.state.record.values.add(made) if parts else None
            if number is not None:
                self.in_parts.add(value)
                for twin in (source for part in parts for source in self.state.record.twins.get(part, ())):
                    self.state.record.meets(number, twin)
                yield {unknown: choice}, number, made

    def _joined(self, target: Unknown, inputs: Collection[int]) -> Iterator[Choice]:
        shape = target.shape
        twins = [s for number in inputs for s in self.state.record.twins.get(number, ())]
        for number in inputs:
            if number in self.state.record.joins:
                yield from self._cut_alike(target, twins, number)
        for axis, count in enumerate(shape):
            inner = (*shape[:axis], *shape[axis + 1 :])
            if not 2 <= count <= 256 or not inner:
                continue
            groups = [g for g in self.siblings if len(g) == count]
            groups.sort(key=lambda g: min((twins.index(s) for s in g if s in twins), default=len(twins)))
            if len(twins) >= count and len(twins) <= 8:
                groups += [list(g) for g in itertools.permutations(twins, count)][:40]
            for group in groups:
                items = [self.state.record.sources[s].array for s in group]
                if len({item.shape for item in items}) != 1 or items[0].size != math.prod(inner):
                    continue
                for ops in readings(items[0].shape, inner):
                    yield Choice(tuple(group), (ops,) * count, ("stack", axis))
        fits = [s for s in dict.fromkeys(twins) if self.state.record.sources[s].array.size < math.prod(shape)]
        for count in range(2, min(len(fits), 4) + 1):
            for group in itertools.islice(itertools.permutations(fits, count), 60):
                items = [self.state.record.sources[s].array for s in group]
                if sum(item.size for item in items) != math.prod(shape):
                    continue
                for axis in range(len(shape) - 1, -1, -1):
                    around = math.prod(shape) // shape[axis]
                    if any(item.size % around for item in items):
                        continue
                    parts = [(*shape[:axis], item.size // around, *shape[axis + 1 :]) for item in items]
                    ways = [list(itertools.islice(readings(i.shape, p), 4)) for i, p in zip(items, parts, strict=True)]
                    for ops in zip(*ways, strict=False):
                        yield Choice(tuple(group), ops, ("concat", axis))

    def _cut_alike(self, target: Unknown, twins: Sequence[int], joined: int) -> Iterator[Choice]:
        """A tensor that is multiplied by joined values, cut as they are: each part in its own reading, in any order."""
        parts = self.state.record.joins[joined]
        length = sum(size for _, size in parts)
        for source in twins:
            pieces = self.state.record.cuts.get((source, joined), [])
            whole = self.state.record.sources[source].array.size
            if not pieces or whole != math.prod(target.shape) or length not in target.shape:
                continue
            place = target.shape.index(length)
            ways: list[list[tuple[Op, ...]]] = []
            for piece, (value, size) in zip(pieces, parts, strict=True):
                shape = (*target.shape[:place], size, *target.shape[place + 1 :])
                maps = [] if value is None else self._maps([value], 0)
                ways.append(list(readings(self.state.record.sources[piece].array.shape, shape, maps)[:12]))
            for order in itertools.permutations(range(len(pieces))):
                for ops in itertools.islice(itertools.product(*(ways[n] for n in order)), 64):
                    yield Choice(tuple(pieces[n] for n in order), ops, ("concat", place))

    def _each_part(
        self, value: int, target: Unknown, choice: Choice, made: Array, rest: Mapping[int, Array]
    ) -> list[int]:
        """torch's value for the part that each source makes; [] if one is not torch's. Changing a source shows its
        part."""
        parts: list[int] = []
        whole = choice.array(self.state.record)
        for region in regions(choice, self.state.record, whole.shape):
            changed = whole.copy()
            changed[region] = self.state.random.uniform(0.5, 1.5, changed[region].shape)
            other = self.state.value(value, {**rest, target.value: changed})
            moved = ~np.isclose(other, made, rtol=1e-9, atol=1e-12)
            part = made[moved]
            found = self.state.record.values.find(part) if 2 <= part.size < made.size else []
            if not found:
                return []
            parts.append(found[0])
        return parts

    # ------------------------------------------------------------ two or three leaves at once

    def _joint(self, value: int, leaves: tuple[int, ...], inputs: Collection[int]) -> Iterator[Option]:
        """Leaves that first meet data together: a variance and a scale; two tables added; latents and a projection."""
        rest = {
            self.state.unknowns[n].value: self.state.random_fill(n)
            for n in self.state.all_open(value)
            if n not in leaves
        }
        most = 64 if len(leaves) == 2 else 16
        pools = [list(enumerate(self._pool(n, inputs)[:most])) for n in leaves]
        for ranked in sorted(itertools.product(*pools), key=lambda row: sum(rank for rank, _ in row)):
            picked = [choice for _, choice in ranked]
            sources = [c.sources[0] for c in picked]
            if len({self._tensor(s) for s in sources}) < len(sources):
                continue
            given = {
                self.state.unknowns[n].value: c.array(self.state.record) for n, c in zip(leaves, picked, strict=True)
            }
            made = self.state.value(value, rest | given)
            number = self._accepted(made, inputs)
            if number is not None:
                yield dict(zip(leaves, picked, strict=True)), number, made

    def alone(self, step: Step, value: int, both: Collection[int]) -> Iterator[Option]:
        """Two leaves that meet before any data (queries and their positions), if torch made such a value too."""
        leaves = list(dict.fromkeys(leaf for n in step.ins for leaf in sorted(self.state.open_of(n)) if leaf in both))
        for number, sources in self.state.record.made_of.items():
            for pair in itertools.permutations(sources):
                items = [self.state.record.sources[source].array for source in pair]
                shapes = [self.state.unknowns[n].shape for n in leaves]
                if [i.size for i in items] != [math.prod(s) for s in shapes] or any(map(self._blocked, pair)):
                    continue
                ways = [itertools.islice(readings(i.shape, s), 4) for i, s in zip(items, shapes, strict=True)]
                for ops in itertools.product(*ways):
                    picked = {n: Choice((s,), (o,)) for n, s, o in zip(leaves, pair, ops, strict=True)}
                    given = {
                        self.state.unknowns[n].value: choice.array(self.state.record) for n, choice in picked.items()
                    }
                    if number in self.state.record.values.find(self.state.value(value, self.state.rest(value) | given)):
                        yield picked, number, None

    def fed(self, value: int, unknown: int) -> Iterator[Option]:
        """One leaf that meets no data yet (latents that are normed first), if only one tensor makes a value that torch
        made of it."""
        target = self.state.unknowns[unknown]
        found: list[tuple[bool, Option]] = []
        for source in self.state.record.fed:
            item = self.state.record.sources[source]
            if item.array.size != math.prod(target.shape) or self._blocked(source):
                continue
            for ops in readings(item.array.shape, target.shape):
                choice = Choice((source,), (ops,))
                made = self.state.value(value, {target.value: choice.array(self.state.record)})
                number = self._accepted(made, ())
                if number is not None:
                    permuted = not self.state.record.values.same_layout(made, number)
                    found.append((permuted, ({unknown: choice}, number, made)))
        if len({option[0][unknown].sources for _, option in found}) == 1:
            yield from (option for _, option in sorted(found, key=lambda row: row[0]))

    def _pool(self, unknown: int, inputs: Collection[int]) -> list[Choice]:
        shape = self.state.unknowns[unknown].shape
        size = math.prod(shape)
        out: list[Choice] = []
        for source in self._ordered(inputs, unknown):
            item = self.state.record.sources[source]
            if item.array.size == size and not self._blocked(source):
                out += [Choice((source,), (ops,)) for ops in itertools.islice(readings(item.array.shape, shape), 6)]
            if len(out) >= 64:
                break
        return out

    def _tensor(self, source: int) -> Any:
        """What is used up when a source is taken: the tensor and the rows."""
        item = self.state.record.sources[source]
        return item.keys, item.rows, item.axis


def _shuffled(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """(c, r, r) if a map with c r r channels becomes one that is r times as high and wide (pixel shuffle); else ()."""
    if not 3 <= len(one) == len(other) or one[0] != other[0] or 0 in one:
        return ()
    ratios = [divmod(b, a) for a, b in zip(one[2:], other[2:], strict=True)]
    many = math.prod(ratio for ratio, _ in ratios)
    if many < 2 or one[1] != other[1] * many or any(rest for _, rest in ratios):
        return ()
    return other[1], *(ratio for ratio, _ in ratios)
