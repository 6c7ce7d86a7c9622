"""A run of the Flax model while only some of its leaves are known: what follows, and what each value rests on."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graftax.probe.choices import Choice
from graftax.probe.evaluate import evaluate, widened
from graftax.probe.program import Program, Step
from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown
from graftax.probe.values import OutOfBudget

Array = Any


class PartialRun:
    """The values that are known, decided or open, and how to take decisions back.

    program   the Flax steps; `fixed`: value -> array, for leaves that are no unknowns and for the inputs
    unknowns  what must be found; `forced`: unknown -> the array that it holds, as a rule says
    record    torch's run

    known     value -> array; `cause`: value -> the decisions that it rests on, a bit each
    open      value -> the undecided unknowns that it depends on; `mixed`: the values that meet data with one of them;
              `age`: for how many steps
    choices   unknown -> what it holds; `used_by`: key -> (source, bit) of the choices that take some of the tensor
    """

    def __init__(
        self,
        program: Program,
        unknowns: Sequence[Unknown],
        record: Record,
        fixed: Mapping[int, Array],
        forced: Mapping[int, Array] | None = None,
    ) -> None:
        self.program, self.unknowns, self.record = program, unknowns, record
        self.forced = forced or {}
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
        self.random = np.random.default_rng(0)
        self.evaluations = 0
        self.budget(1 << 60, 3600.0)
        self.begin()

    def begin(self) -> None:
        """Forget all that was decided."""
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
        self.flat: dict[int, bool] = {}
        self.classes: dict[int, list[int]] = {}

    def budget(self, evaluations: int, seconds: float) -> None:
        """What may be used from now on; OutOfBudget is raised beyond."""
        self.most = self.evaluations + evaluations
        self.deadline = time.monotonic() + seconds

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

    # ------------------------------------------------------------ decisions

    def choose(self, unknown: int, choice: Choice, bit: int) -> None:
        """Decide what an unknown holds."""
        self.choices[unknown] = choice
        for source in choice.sources:
            for key in self.record.sources[source].keys:
                self.used_by.setdefault(key, []).append((source, bit))
        self.trail.append(("choice", unknown))
        self.set(self.unknowns[unknown].value, choice.array(self.record), bit)

    def set(self, value: int, array: Array, cause: int) -> None:
        self.known[value] = array
        self.cause[value] = cause
        self.trail.append(("known", value))

    def postpone(self, value: int, leaves: frozenset[int], mixed: bool, age: int) -> None:
        self.open[value] = leaves
        self.age[value] = age
        if mixed:
            self.mixed.add(value)
        self.trail.append(("lazy", value))

    def undo(self, length: int) -> None:
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

    def left_open(self) -> list[int]:
        return [n for n in range(len(self.unknowns)) if n not in self.choices and n not in self.forced]

    def open_of(self, value: int) -> frozenset[int]:
        if value in self.known:
            return frozenset()
        return frozenset(n for n in self.open.get(value, ()) if n not in self.choices and n not in self.forced)

    # ------------------------------------------------------------ what is known

    def tells(self, value: int) -> bool:
        """Known, and either data or made from decided leaves: more than a constant."""
        return (
            value in self.known and (value in self.data or self.cause.get(value, 0) > 0) and not self.is_constant(value)
        )

    def is_constant(self, value: int) -> bool:
        """True for a known value whose entries are all equal: it tells nothing."""
        if value not in self.flat:
            self.flat[value] = _constant(self.known[value])
        return self.flat[value]

    def is_zero(self, value: int) -> bool:
        """True for a known value that is zero everywhere."""
        return value in self.known and not np.asarray(self.known[value]).any()

    def class_of(self, value: int) -> list[int]:
        """The values of the record that a known value is."""
        if value not in self.classes:
            array = self.known[value]
            floating = np.asarray(array).dtype.kind in "fiu"
            self.classes[value] = self.record.values.find(array) if floating and np.size(array) > 1 else []
        return self.classes[value]

    def made_of(self, value: int) -> Iterator[int]:
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

    def causes(self, value: int) -> int:
        out = 0
        for n in self.made_of(value):
            out |= self.cause.get(n, 0)
        return out

    def cause_of(self, step: Step) -> int:
        out = 0
        for n in step.ins:
            out |= self.causes(n)
        return out

    # ------------------------------------------------------------ evaluation

    def value(self, value: int, given: Mapping[int, Array] | None = None) -> Array:
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
            self.count()
            outs = evaluate(step, [local[i] if i in local else self.known[i] for i in step.ins])
            local.update(zip(step.outs, outs, strict=True))
            stack.pop()
        return self.known[value] if value in self.known else local[value]

    def count(self) -> None:
        self.evaluations += 1
        if self.evaluations > self.most or (self.evaluations % 64 == 0 and time.monotonic() > self.deadline):
            raise OutOfBudget("the search has used its budget")

    def random_fill(self, unknown: int) -> Array:
        shape = self.unknowns[unknown].shape
        return self.random.uniform(0.5, 1.5, shape)

    def rest(self, value: int) -> dict[int, Array]:
        """Random arrays for undecided unknowns that do not move the value."""
        return {self.unknowns[n].value: self.random_fill(n) for n in self.all_open(value)}

    def filled(self, value: int) -> Array:
        """The value with random leaves: it does not depend on them."""
        return self.value(value, self.rest(value))

    def all_open(self, value: int) -> frozenset[int]:
        """Every undecided unknown below a value, also those that do not move it."""
        return frozenset(self.by_value[n] for n in self.made_of(value) if n in self.by_value and n not in self.known)

    def moves(self, value: int, leaves: Collection[int]) -> bool:
        """Does the value depend on these leaves at all?"""
        fill = self.rest(value)
        one = self.value(value, fill)
        other = self.value(value, fill | {self.unknowns[n].value: self.random_fill(n) for n in leaves})
        return not _close(one, other)

    def that_move(self, value: int, leaves: frozenset[int]) -> frozenset[int]:
        return frozenset(n for n in leaves if self.moves(value, (n,)))


def _constant(array: Array) -> bool:
    plain = np.asarray(array)
    return plain.size < 2 or plain.dtype.kind not in "fiu" or bool(np.all(plain == plain.flat[0]))


def _close(one: Array, other: Array) -> bool:
    return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, rtol=1e-10, atol=1e-12, equal_nan=True))
