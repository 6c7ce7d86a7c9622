"""Find the weights by running: which torch tensor, in which reading, makes each value of Flax one that torch made too.

The program's steps are followed in order. A step that brings known data together with an undecided leaf is an *event*:
a tensor is accepted for the leaf if the value that comes out is in torch's record. A product, a convolution or a lookup
whose value torch never made is a dead end; then the last choice that it depends on is taken back. No name is read.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.layers.readings import readings
from graftax.ops import Fill, Offset, Op, Scale, apply_chain
from graftax.probe.evaluate import evaluate, widened
from graftax.probe.limits import Limits
from graftax.probe.program import Program, Step
from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown
from graftax.probe.values import OutOfBudget

Array = Any
STRICT = frozenset(("dot_general", "conv_general_dilated", "gather"))
"""Steps that must make a value that torch made, if one leaf is undecided."""
PATIENCE = 25
"""Steps that an undecided value may go through before it is a dead end."""
LEAVES = 3
"""Most undecided leaves of one value."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What an unknown holds: sources, the ops of each, and how they are joined: None for one source, ("stack", axis) or
    ("concat", axis). Without sources, `ops` makes a constant."""

    sources: tuple[int, ...]
    ops: tuple[tuple[Op, ...], ...]
    join: tuple[str, int] | None = None

    def array(self, record: Record) -> Array:
        if not self.sources:
            return apply_chain(self.ops[0], ())[0]
        parts = [
            apply_chain(ops, (record.sources[source].array,))[0]
            for source, ops in zip(self.sources, self.ops, strict=True)
        ]
        if self.join is None:
            return parts[0]
        return np.stack(parts, self.join[1]) if self.join[0] == "stack" else np.concatenate(parts, self.join[1])


Option = tuple[dict[int, Choice], int, Array]
"""A choice for each unknown that an event decides, the value in torch's record that it makes, and that value as Flax
makes it (None: it is made again)."""


@dataclass(slots=True)
class Found:
    """The result of a search.

    choices   unknown -> what it holds
    open      unknowns that no value of this run depends on
    events    the values of the program that decided something; `parts`: those of which torch made each part alone
    complete  every other unknown is decided, and the outputs agree
    dead_end  the step where the deepest attempt ended, if it is not complete
    """

    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    open: list[int] = field(default_factory=list[int])
    events: list[int] = field(default_factory=list[int])
    parts: frozenset[int] = frozenset()
    complete: bool = False
    dead_end: str = ""


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


PASSES = (
    Pass(near=True),
    Pass(near=True, changed=True),
    Pass(near=True, changed=True, reuse=True, twins=False),
    Pass(changed=True),
    Pass(twins=False, changed=True, strict=False),
    Pass(twins=False, reuse=True, changed=True),
)


@dataclass(slots=True)
class _Frame:
    """A decision that may be taken back."""

    slot: int
    bit: int
    trail: int
    options: Iterator[Option]
    conflict: int
    value: int


class Search:
    """One search: see `run`.

    program   the Flax steps; `fixed`: value -> array, for leaves that are no unknowns and for the inputs
    unknowns  what must be found
    record    torch's run
    judge     the outputs, flat -> do they agree with torch's?
    siblings  sources at one place of sibling modules: candidates for a stack, and readings to try first
    forced    unknown -> the array that it holds, as a rule says
    """

    def __init__(
        self,
        program: Program,
        unknowns: Sequence[Unknown],
        record: Record,
        fixed: Mapping[int, Array],
        judge: Callable[[Sequence[Array]], bool],
        siblings: Sequence[Sequence[int]] = (),
        forced: Mapping[int, Array] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.program, self.unknowns, self.record, self.judge = program, unknowns, record, judge
        self.siblings = siblings
        self.forced = forced or {}
        self.places = {source: n for n, group in enumerate(siblings) for source in group}
        self.habits: dict[Any, tuple[Op, ...]] = {}
        self.limits = limits or Limits()
        self.by_value = {unknown.value: n for n, unknown in enumerate(unknowns)}
        self.producer: dict[int, tuple[Step, int]] = {
            out: (step, j) for step in program.steps for j, out in enumerate(step.outs)
        }
        self.live = self._live()
        every = [(step, j) for step in program.steps for j in range(len(step.outs))]
        # What no output needs comes last: it takes what is left, and can contradict nothing.
        self.slots = sorted(every, key=lambda slot: slot[0].outs[slot[1]] not in self.live)
        self.place_of = {step.outs[j]: n for n, (step, j) in enumerate(self.slots)}
        self.fixed = {**{n: widened(array) for n, array in program.constants.items()}, **fixed}
        self.data = self._data()
        self.first = {s.keys[0]: n for n, s in reversed(list(enumerate(record.sources))) if s.rows is None}
        self.random = np.random.default_rng(0)
        self.flat: dict[int, bool] = {}
        self.in_parts: set[int] = set()
        self.evaluations = 0

    def _data(self) -> set[int]:
        """The values that depend on the inputs."""
        out = set(self.program.inputs)
        for step in self.program.steps:
            if any(n in out for n in step.ins):
                out.update(step.outs)
        return out

    def _live(self) -> set[int]:
        """The values that the outputs need."""
        out = set(self.program.outputs)
        for step in reversed(self.program.steps):
            if any(n in out for n in step.outs):
                out.update(step.ins)
                out.update(step.outs)
        return out

    # ------------------------------------------------------------ the passes

    def run(self) -> Found:
        """Pass after pass, until one is complete. The best incomplete one otherwise."""
        self.stop = time.monotonic() + self.limits.seconds
        best = Found()
        for number, how in enumerate(PASSES):
            left = 1 if number == len(PASSES) - 1 else 2
            self.deadline = time.monotonic() + (self.stop - time.monotonic()) / left
            self.most = self.evaluations + (self.limits.evaluations - self.evaluations) // left
            found = self._pass(how)
            if found.complete:
                return found
            if len(found.choices) > len(best.choices):
                best = found
        return best

    def _pass(self, how: Pass) -> Found:
        self.how = how
        self.known: dict[int, Array] = dict(self.fixed)
        self.cause: dict[int, int] = {}
        self.open: dict[int, frozenset[int]] = {u.value: frozenset((n,)) for n, u in enumerate(self.unknowns)}
        self.mixed: set[int] = set()
        self.age: dict[int, int] = {}
        self.choices: dict[int, Choice] = {}
        for n, array in self.forced.items():
            self.known[self.unknowns[n].value] = array
        self.used_by: dict[str, list[tuple[int, int]]] = {}
        self.trail: list[tuple[str, int]] = []
        self.flat = {}
        self.blocked = 0
        self.dead_end = ""
        self.idle = False
        self.classes: dict[int, list[int]] = {}
        frames: list[_Frame] = []
        best = Found()
        slot = 0
        while True:
            try:
                conflict = self._follow(slot, frames)
            except OutOfBudget:
                return best
            if conflict is None:
                found = Found(dict(self.choices), self._left_open(), complete=True)
                found.events = [frame.value for frame in frames]
                found.parts = frozenset(self.in_parts)
                return found
            if len(self.choices) > len(best.choices) or not best.dead_end:
                best = Found(dict(self.choices), dead_end=self.dead_end)
            try:
                again = self._back(frames, conflict)
            except OutOfBudget:
                again = None
            if again is None:
                return best
            slot = again

    def _left_open(self) -> list[int]:
        return [n for n in range(len(self.unknowns)) if n not in self.choices and n not in self.forced]

    def _follow(self, slot: int, frames: list[_Frame]) -> int | None:
        """Follow the steps from `slot`. None at the end; at a dead end, the choices that it depends on."""
        while slot < len(self.slots):
            step, j = self.slots[slot]
            conflict = self._slot(step, step.outs[j], slot, frames)
            if conflict is not None:
                self.dead_end = _named(step)
                return conflict
            slot += 1
        return self._ends()

    def _ends(self) -> int | None:
        """Compare the outputs."""
        outs: list[Array] = []
        conflict = 0
        for value in self.program.outputs:
            if value not in self.known and self._open_of(value):
                self.dead_end = "the outputs"
                return self._causes(value)
            outs.append(self._value(value))
            conflict |= self._causes(value)
        if self.judge(outs):
            return None
        self.dead_end = "the outputs"
        return conflict

    def _back(self, frames: list[_Frame], conflict: int) -> int | None:
        """Take back the last choice in `conflict` that has another option. The slot to go on from; None if none has."""
        while frames:
            frame = frames[-1]
            self._undo(frame.trail)
            if conflict & frame.bit:
                frame.conflict |= conflict & ~frame.bit
                self.blocked = 0
                option = next(frame.options, None)
                frame.conflict |= self.blocked & (frame.bit - 1)
                if option is not None:
                    self._take(frame, option)
                    return frame.slot + 1
                conflict = frame.conflict
            frames.pop()
        return None

    def replay(self, found: Found, error: Callable[[Sequence[Array]], float]) -> tuple[float, str]:
        """What was found, on this record: the error of the outputs, and the first step that decided something and makes
        no value of torch any more ("" if all hold)."""
        self.deadline, self.most = time.monotonic() + 3600, 1 << 60
        self.known, self.choices = dict(self.fixed), {}
        for n, unknown in enumerate(self.unknowns):
            if n in self.forced:
                self.known[unknown.value] = self.forced[n]
            else:
                held = n in found.choices
                self.known[unknown.value] = found.choices[n].array(self.record) if held else self._random_fill(n)
        broken = ""
        events = set(found.events)
        for step, j in self.slots:
            value = step.outs[j]
            if value in self.known:
                continue
            self.known[value] = self._value(value)
            if value in events and not broken and not self._held(value, found):
                broken = _named(step)
        return error([self.known[n] for n in self.program.outputs]), broken

    def _held(self, value: int, found: Found) -> bool:
        """Did torch make this value, or its parts?"""
        return bool(self.record.values.find(self.known[value])) or value in found.parts

    # ------------------------------------------------------------ one value

    def _slot(self, step: Step, value: int, slot: int, frames: list[_Frame]) -> int | None:
        """Make one value known, lazy, or decide what it needs. A conflict at a dead end, else None."""
        if value in self.known:
            return None
        self.idle = value not in self.live
        for n in step.ins:
            if n not in self.known and not self._open_of(n):  # its leaves were decided after it was passed
                self._set(n, self._value(n), self._causes(n))
        leaves = frozenset[int]().union(*(self._open_of(n) for n in step.ins))
        if not leaves:
            self._set(value, self._value(value), self._cause_of(step))
            return self._strays(step, value, frames) if self.how.near and not self.idle else None
        mixed = any(n in self.mixed for n in step.ins if n not in self.known)
        meets = any(self._tells(n) for n in step.ins)
        product = step.name in STRICT
        if not mixed and not meets:
            if product and any(n in self.known for n in step.ins) and not self._moves(value, leaves):
                self._set(value, self._filled(value), self._causes(value))
                return None
            lazily = product and step.name == "dot_general" and len(leaves) == 2 and self._both_lazy(step)
            if (
                len(leaves) == 2
                and not product
                and self._decided(_Frame(slot, 0, len(self.trail), self._alone(step, value, leaves), 0, value), frames)
            ):
                return None
            if not lazily:
                self._lazy(value, leaves, False, 0)
                return None
        if len(leaves) > 1 or not product:
            leaves = self._that_move(value, leaves)
            if not leaves:
                self._set(value, self._filled(value), self._causes(value))
                return None
        if len(leaves) <= LEAVES:
            frame = _Frame(slot, 0, len(self.trail), self._options(step, value, leaves), 0, value)
            if self._decided(frame, frames):
                return None
        if len(leaves) == 1 and product and not self._moves(value, leaves):
            self._set(value, self._filled(value), self._causes(value))
            return None
        age = 1 + max((self.age.get(n, 0) for n in step.ins), default=0)
        ends = (product and len(leaves) == 1 and self.how.strict) or age > PATIENCE or len(leaves) > LEAVES
        if ends and not self.idle and (self.how.near or any(n in self.data for n in step.ins)):
            near = self.how.near and any(n in self.data for n in step.ins)
            return (self._nearest(value, frames) if near else self._causes(value)) | self.blocked
        self._lazy(value, leaves, mixed or any(n in self.data for n in step.ins), age)
        return None

    def _tells(self, value: int) -> bool:
        """Known, and either data or made from decided leaves: more than a constant."""
        return (
            value in self.known and (value in self.data or self.cause.get(value, 0) > 0) and not self._constant(value)
        )

    def _strays(self, step: Step, value: int, frames: list[_Frame]) -> int | None:
        """The conflict of a product of two data that torch did not make, not even up to a factor."""
        if step.name != "dot_general" or not all(self._tells(n) for n in step.ins):
            return None
        made = self.known[value]
        if made.size < 2 or self.record.values.find(made) or self.record.values.factors(made):
            return None
        return self._nearest(value, frames) or None

    def _nearest(self, value: int, frames: list[_Frame]) -> int:
        """The choices next to a value: those of the products that it is made of, and of what was added to them."""
        bits = {frame.value: frame.bit for frame in frames}
        out = 0
        seen: set[int] = set()
        stack = [value]
        while stack:
            n = stack.pop()
            if n in seen or n not in self.producer:
                continue
            seen.add(n)
            out |= bits.get(n, 0)
            if n not in bits or self.producer[n][0].name not in STRICT:
                stack += self.producer[n][0].ins
        return out

    def _decided(self, frame: _Frame, frames: list[_Frame]) -> bool:
        """Take the first option of a new frame, if it has one."""
        self.blocked = 0
        option = next(frame.options, None)
        if option is None:
            return False
        frame.bit = 1 << len(frames)
        frame.conflict = self.blocked | (0 if self.how.near else self._causes(frame.value))
        frames.append(frame)
        self._take(frame, option)
        return True

    def _both_lazy(self, step: Step) -> bool:
        return all(n not in self.known for n in step.ins)

    def _open_of(self, value: int) -> frozenset[int]:
        if value in self.known:
            return frozenset()
        return frozenset(n for n in self.open.get(value, ()) if n not in self.choices and n not in self.forced)

    def _constant(self, value: int) -> bool:
        """True for a known value whose entries are all equal: it tells nothing."""
        if value not in self.flat:
            self.flat[value] = _constant(self.known[value])
        return self.flat[value]

    def _set(self, value: int, array: Array, cause: int) -> None:
        self.known[value] = array
        self.cause[value] = cause
        self.trail.append(("known", value))

    def _lazy(self, value: int, leaves: frozenset[int], mixed: bool, age: int) -> None:
        self.open[value] = leaves
        self.age[value] = age
        if mixed:
            self.mixed.add(value)
        self.trail.append(("lazy", value))

    def _undo(self, length: int) -> None:
        while len(self.trail) > length:
            kind, key = self.trail.pop()
            if kind == "known":
                del self.known[key]
                self.cause.pop(key, None)
                self.classes.pop(key, None)
                self.flat.pop(key, None)
            elif kind == "lazy":
                self.open.pop(key, None)
                self.age.pop(key, None)
                self.mixed.discard(key)
            elif kind == "choice":
                for source in self.choices.pop(key).sources:
                    self._free(source)

    def _free(self, source: int) -> None:
        for key in self.record.sources[source].keys:
            self.used_by[key].pop()

    # ------------------------------------------------------------ evaluation

    def _value(self, value: int, given: Mapping[int, Array] | None = None) -> Array:
        """A value, with arrays for the undecided unknowns that it depends on (by their values)."""
        local: dict[int, Array] = dict(given or {})
        stack = [value]
        while stack:
            n = stack[-1]
            if n in self.known or n in local:
                stack.pop()
                continue
            step, _ = self.producer[n]
            missing = [i for i in step.ins if i not in self.known and i not in local]
            if missing:
                stack += missing
                continue
            self._count()
            outs = evaluate(step, [local[i] if i in local else self.known[i] for i in step.ins])
            local.update(zip(step.outs, outs, strict=True))
            stack.pop()
        return self.known[value] if value in self.known else local[value]

    def _count(self) -> None:
        self.evaluations += 1
        if self.evaluations > self.most or (self.evaluations % 64 == 0 and time.monotonic() > self.deadline):
            raise OutOfBudget("the search has used its budget")

    def _slice(self, value: int) -> Iterator[int]:
        """The known values and decided unknowns that a value is made of."""
        seen: set[int] = set()
        stack = [value]
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n in self.known or n not in self.producer:
                yield n
            else:
                stack += self.producer[n][0].ins

    def _causes(self, value: int) -> int:
        out = 0
        for n in self._slice(value):
            out |= self.cause.get(n, 0)
        return out

    def _cause_of(self, step: Step) -> int:
        out = 0
        for n in step.ins:
            out |= self._causes(n)
        return out

    def _random_fill(self, unknown: int) -> Array:
        shape = self.unknowns[unknown].shape
        return self.random.uniform(0.5, 1.5, shape)

    def _filled(self, value: int) -> Array:
        """The value with random leaves: it does not depend on them."""
        return self._value(value, self._rest(value))

    def _all_open(self, value: int) -> frozenset[int]:
        """Every undecided unknown below a value, also those that do not move it."""
        return frozenset(self.by_value[n] for n in self._slice(value) if n in self.by_value and n not in self.known)

    def _moves(self, value: int, leaves: Collection[int]) -> bool:
        """Does the value depend on these leaves at all?"""
        fill = self._rest(value)
        one = self._value(value, fill)
        other = self._value(value, fill | {self.unknowns[n].value: self._random_fill(n) for n in leaves})
        return not _close(one, other)

    def _that_move(self, value: int, leaves: frozenset[int]) -> frozenset[int]:
        return frozenset(n for n in leaves if self._moves(value, (n,)))

    # ------------------------------------------------------------ options

    def _take(self, frame: _Frame, option: Option) -> None:
        chosen, number, made = option
        for unknown, choice in chosen.items():
            self.choices[unknown] = choice
            for source, ops in zip(choice.sources, choice.ops, strict=False):
                for key in self.record.sources[source].keys:
                    self.used_by.setdefault(key, []).append((source, frame.bit))
                self.habits[self._place(source, unknown)] = ops
            self.trail.append(("choice", unknown))
            self._set(self.unknowns[unknown].value, choice.array(self.record), frame.bit)
        cause = self._causes(frame.value) | frame.bit
        if made is None:
            made = self._value(frame.value, self._rest(frame.value))
        self._set(frame.value, self.record.values.snapped(made, number), cause)

    def _rest(self, value: int) -> dict[int, Array]:
        """Random arrays for undecided unknowns that do not move the value."""
        return {self.unknowns[n].value: self._random_fill(n) for n in self._all_open(value)}

    def _tensor(self, source: int) -> Any:
        """What is used up when a source is taken: the tensor and the rows."""
        item = self.record.sources[source]
        return item.keys, item.rows, item.axis

    def _class_of(self, value: int) -> list[int]:
        """The values of the record that a known value is."""
        if value not in self.classes:
            array = self.known[value]
            floating = np.asarray(array).dtype.kind in "fiu"
            self.classes[value] = self.record.values.find(array) if floating and np.size(array) > 1 else []
        return self.classes[value]

    def _operands(self, value: int) -> list[int]:
        """The known data that a value is made of: those that meet the leaf first."""
        return [n for n in self._slice(value) if self._tells(n)]

    def _options(self, step: Step, value: int, leaves: frozenset[int]) -> Iterator[Option]:
        """What the leaves may hold, so that the value is one that torch made; the likeliest first."""
        operands = self._operands(value)
        inputs = {c for n in operands for c in self._class_of(n)}
        twins = any(number in self.record.twins for number in inputs)
        whole = any(self.known[n].size >= math.prod(self.program.shapes[value]) for n in operands)
        if self.how.twins and step.name not in STRICT and not twins and not (inputs and whole):
            return iter(())
        if len(leaves) == 1:
            (unknown,) = leaves
            return self._one(value, unknown, inputs)
        return self._joint(value, tuple(sorted(leaves)), inputs)

    def _ordered(self, inputs: Collection[int], unknown: int) -> list[int]:
        """The sources to try, in order: those that are preferred, the twins, then all others."""
        twins = [source for number in inputs for source in self.record.twins.get(number, ())]
        out = list(twins)
        if not (self.how.twins and twins):
            out += [*self.record.used, *range(len(self.record.sources))]
        return list(dict.fromkeys(out))

    def _blocked(self, source: int) -> bool:
        """True if the tensor, or some of its rows, already fill a leaf; those choices then join the conflict."""
        if self.how.reuse and not self.idle:
            return False
        item = self.record.sources[source]
        busy = False
        for key in item.keys:
            for other, bit in self.used_by.get(key, ()):
                theirs = self.record.sources[other]
                if theirs.keys != item.keys and len(theirs.keys) > 1 and len(item.keys) > 1:
                    continue
                apart = item.rows is not None and theirs.rows is not None and item.axis == theirs.axis
                if not apart or set(item.rows or ()) & set(theirs.rows or ()):
                    busy = True
                    self.blocked |= bit
        return busy

    def _one(self, value: int, unknown: int, inputs: Collection[int]) -> Iterator[Option]:
        target = self.unknowns[unknown]
        maps = self._maps(inputs, math.prod(self.program.shapes[value]))
        size = math.prod(target.shape)
        rest = {v: a for v, a in self._rest(value).items() if v != target.value}
        for source in self._ordered(inputs, unknown):
            item = self.record.sources[source]
            if item.array.size != size or self._blocked(source):
                continue
            permuted: list[tuple[int, Option]] = []
            least = -1
            habit = self.habits.get(self._place(source, unknown))
            ways = readings(item.array.shape, target.shape, maps)
            for rank, ops in enumerate(ways if habit is None else dict.fromkeys((habit, *ways))):
                choice = Choice((source,), (ops,))
                made = self._value(value, rest | {target.value: choice.array(self.record)})
                number = self._accepted(made, inputs)
                if number is None:
                    continue
                option = ({unknown: choice}, number, made)
                if (rank == 0 and habit is not None) or self.record.values.same_layout(made, number):
                    yield option
                    least = max(least, self._ahead(value, made)) if self.how.near else least
                else:
                    permuted.append((self._ahead(value, made), ({unknown: choice}, number, None)))
            permuted.sort(key=lambda row: -row[0])
            for ahead, option in permuted:
                if ahead > least:
                    yield option
        if self.how.changed:
            yield from self._changed(value, unknown, inputs, rest)
        yield from self._several(value, unknown, inputs, rest)
        if self.how.changed:
            yield from self._constants(value, unknown, inputs, rest)

    def _ahead(self, value: int, made: Array) -> int:
        """How many of the values that follow from one, without another leaf, are torch's: a permutation of what is
        rotated, added or multiplied later is not."""
        local: dict[int, Array] = {value: made}
        deep = {value}
        found: set[int] = set()
        start = self.place_of[value] + 1
        for step, j in self.slots[start : start + 400]:
            if len(deep) > 30:
                break
            if step.outs[j] in local or not all(n in local or n in self.known for n in step.ins):
                continue
            self._count()
            local.update(
                zip(step.outs, evaluate(step, [local.get(n, self.known.get(n)) for n in step.ins]), strict=True)
            )
            if not any(n in deep for n in step.ins):
                continue
            deep.update(step.outs)
            for n in step.outs:
                if np.asarray(local[n]).dtype.kind == "f":
                    found.update(self.record.values.find(local[n])[:1])
        return len(found)

    def _place(self, source: int, unknown: int) -> Any:
        """Equal for the same tensor of sibling modules and leaves of one shape."""
        item = self.record.sources[source]
        whole = self.first.get(item.keys[0], source)
        rows = len(item.rows or ()), item.axis
        place = (self.places[whole], -1) if whole in self.places else (-1, whole)
        return place, item.array.shape, item.how, self.unknowns[unknown].shape, rows

    def _changed(
        self, value: int, unknown: int, inputs: Collection[int], rest: Mapping[int, Array]
    ) -> Iterator[Option]:
        """Twins with another offset (a norm stored as scale - 1) or factor (a query scale folded in)."""
        target = self.unknowns[unknown]
        vector = len([size for size in target.shape if size > 1]) == 1
        used = {op.factor for c in self.choices.values() for ops in c.ops for op in ops if isinstance(op, Scale)}
        twins = dict.fromkeys(s for number in inputs for s in self.record.twins.get(number, ()))
        for source in twins:
            item = self.record.sources[source]
            if item.array.size != math.prod(target.shape) or self._blocked(source):
                continue
            for ops in itertools.islice(readings(item.array.shape, target.shape), 4):
                for more in (Offset(-1.0), Offset(1.0), *map(Scale, sorted(used))) if vector else ():
                    choice = Choice((source,), ((*ops, more),))
                    made = self._value(value, {**rest, target.value: choice.array(self.record)})
                    number = self._accepted(made, inputs)
                    if number is not None:
                        yield {unknown: choice}, number, made
                plain = self._value(value, {**rest, target.value: Choice((source,), (ops,)).array(self.record)})
                for factor in self.record.values.factors(plain):
                    choice = Choice((source,), ((*ops, Scale(factor)),))
                    made = self._value(value, {**rest, target.value: choice.array(self.record)})
                    number = self._accepted(made, inputs)
                    if number is not None:
                        yield {unknown: choice}, number, made

    def _constants(
        self, value: int, unknown: int, inputs: Collection[int], rest: Mapping[int, Array]
    ) -> Iterator[Option]:
        """Zeros where torch adds nothing, ones where it multiplies by nothing: the value stays what it was."""
        target = self.unknowns[unknown]
        if not inputs or len([size for size in target.shape if size > 1]) > 1:
            return
        for constant in (0.0, 1.0):
            fill = Fill(constant, target.shape, "float32", "torch has none; the outputs agree with it")
            choice = Choice((), ((fill,),))
            made = self._value(value, {**rest, target.value: choice.array(self.record)})
            same = [n for n in self.record.values.find(made) if n in inputs]
            if same:
                yield {unknown: choice}, same[0], made

    def _accepted(self, made: Array, inputs: Collection[int]) -> int | None:
        numbers = [n for n in self.record.values.find(made) if n not in inputs]
        return numbers[0] if numbers else None

    def _maps(self, inputs: Collection[int], size: int) -> list[tuple[int, ...]]:
        """Shapes of maps that may be flattened in the data, or unflattened from a value of this size."""
        shapes: dict[tuple[int, ...], None] = {}
        for number in (*inputs, *self.record.values.of_size(size)):
            shapes.update(dict.fromkeys(sorted(self.record.values.items[number].shapes, key=len)))
        out: dict[tuple[int, ...], None] = {}
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
        target = self.unknowns[unknown]
        for choice in self._joined(target, inputs):
            if any(self._blocked(source) for source in choice.sources):
                continue
            made = self._value(value, {**rest, target.value: choice.array(self.record)})
            number = self._accepted(made, inputs)
            if number is not None:
                yield {unknown: choice}, number, made
                continue
            if len({self.record.sources[source].keys for source in choice.sources}) < len(choice.sources):
                continue
            parts = self._each_part(value, target, choice, made, rest)
            number = self.record.values.add(made) if parts else None
            if number is not None:
                self.in_parts.add(value)
                for twin in (source for part in parts for source in self.record.twins.get(part, ())):
                    self.record.meets(number, twin)
                yield {unknown: choice}, number, made

    def _joined(self, target: Unknown, inputs: Collection[int]) -> Iterator[Choice]:
        shape = target.shape
        twins = [s for number in inputs for s in self.record.twins.get(number, ())]
        for number in inputs:
            if number in self.record.joins:
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
                items = [self.record.sources[s].array for s in group]
                if len({item.shape for item in items}) != 1 or items[0].size != math.prod(inner):
                    continue
                for ops in readings(items[0].shape, inner):
                    yield Choice(tuple(group), (ops,) * count, ("stack", axis))
        fits = [s for s in dict.fromkeys(twins) if self.record.sources[s].array.size < math.prod(shape)]
        for count in range(2, min(len(fits), 4) + 1):
            for group in itertools.islice(itertools.permutations(fits, count), 60):
                items = [self.record.sources[s].array for s in group]
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
        parts = self.record.joins[joined]
        length = sum(size for _, size in parts)
        for source in twins:
            pieces = self.record.parts_of(source, joined)
            whole = self.record.sources[source].array.size
            if not pieces or whole != math.prod(target.shape) or length not in target.shape:
                continue
            place = target.shape.index(length)
            ways: list[list[tuple[Op, ...]]] = []
            for piece, (value, size) in zip(pieces, parts, strict=True):
                shape = (*target.shape[:place], size, *target.shape[place + 1 :])
                maps = [] if value is None else self._maps([value], 0)
                ways.append(list(readings(self.record.sources[piece].array.shape, shape, maps)[:12]))
            for order in itertools.permutations(range(len(pieces))):
                for ops in itertools.islice(itertools.product(*(ways[n] for n in order)), 64):
                    yield Choice(tuple(pieces[n] for n in order), ops, ("concat", place))

    def _each_part(
        self, value: int, target: Unknown, choice: Choice, made: Array, rest: Mapping[int, Array]
    ) -> list[int]:
        """torch's value for the part that each source makes; [] if one is not torch's. Changing a source shows its
        part."""
        parts: list[int] = []
        whole = choice.array(self.record)
        for region in _regions(choice, self.record, whole.shape):
            changed = whole.copy()
            changed[region] = self.random.uniform(0.5, 1.5, changed[region].shape)
            other = self._value(value, {**rest, target.value: changed})
            moved = ~np.isclose(other, made, rtol=1e-9, atol=1e-12)
            part = made[moved]
            found = self.record.values.find(part) if 2 <= part.size < made.size else []
            if not found:
                return []
            parts.append(found[0])
        return parts

    # ------------------------------------------------------------ two or three leaves at once

    def _joint(self, value: int, leaves: tuple[int, ...], inputs: Collection[int]) -> Iterator[Option]:
        """Leaves that first meet data together: a variance and a scale; two tables added; latents and a projection."""
        rest = {self.unknowns[n].value: self._random_fill(n) for n in self._all_open(value) if n not in leaves}
        most = 64 if len(leaves) == 2 else 16
        pools = [list(enumerate(self._pool(n, inputs)[:most])) for n in leaves]
        for ranked in sorted(itertools.product(*pools), key=lambda row: sum(rank for rank, _ in row)):
            picked = [choice for _, choice in ranked]
            sources = [c.sources[0] for c in picked]
            if len({self._tensor(s) for s in sources}) < len(sources):
                continue
            given = {self.unknowns[n].value: c.array(self.record) for n, c in zip(leaves, picked, strict=True)}
            made = self._value(value, rest | given)
            number = self._accepted(made, inputs)
            if number is not None:
                yield dict(zip(leaves, picked, strict=True)), number, made

    def _alone(self, step: Step, value: int, both: Collection[int]) -> Iterator[Option]:
        """Two leaves that meet before any data (queries and their positions), if torch made such a value too."""
        leaves = list(dict.fromkeys(leaf for n in step.ins for leaf in sorted(self._open_of(n)) if leaf in both))
        for number, sources in self.record.made_of.items():
            for pair in itertools.permutations(sources):
                items = [self.record.sources[source].array for source in pair]
                shapes = [self.unknowns[n].shape for n in leaves]
                if [i.size for i in items] != [math.prod(s) for s in shapes] or any(map(self._blocked, pair)):
                    continue
                ways = [itertools.islice(readings(i.shape, s), 4) for i, s in zip(items, shapes, strict=True)]
                for ops in itertools.product(*ways):
                    picked = {n: Choice((s,), (o,)) for n, s, o in zip(leaves, pair, ops, strict=True)}
                    given = {self.unknowns[n].value: choice.array(self.record) for n, choice in picked.items()}
                    if number in self.record.values.find(self._value(value, self._rest(value) | given)):
                        yield picked, number, None

    def _pool(self, unknown: int, inputs: Collection[int]) -> list[Choice]:
        shape = self.unknowns[unknown].shape
        size = math.prod(shape)
        out: list[Choice] = []
        for source in self._ordered(inputs, unknown):
            item = self.record.sources[source]
            if item.array.size == size and not self._blocked(source):
                out += [Choice((source,), (ops,)) for ops in itertools.islice(readings(item.array.shape, shape), 6)]
            if len(out) >= 64:
                break
        return out


def _regions(choice: Choice, record: Record, shape: Sequence[int]) -> Iterator[tuple[slice | int, ...]]:
    """The part of the joined array that each source fills."""
    assert choice.join is not None
    how, axis = choice.join
    before = (slice(None),) * axis
    start = 0
    around = math.prod(shape) // shape[axis]
    for n, source in enumerate(choice.sources):
        if how == "stack":
            yield (*before, n)
        else:
            size = record.sources[source].array.size // around
            yield (*before, slice(start, start + size))
            start += size


def _constant(array: Array) -> bool:
    plain = np.asarray(array)
    return plain.size < 2 or plain.dtype.kind not in "fiu" or bool(np.all(plain == plain.flat[0]))


def _close(one: Array, other: Array) -> bool:
    return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, rtol=1e-10, atol=1e-12, equal_nan=True))


def _named(step: Step) -> str:
    return f"{step.name} at {step.where}" if step.where else step.name
