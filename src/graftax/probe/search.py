"""Find the weights by running: which torch tensor, in which reading, makes each value of Flax one that torch made too.

The program's steps are followed in order. A step that brings known data together with an undecided leaf is an *event*:
a tensor is accepted for the leaf if the value that comes out is in torch's record. A product, a convolution or a lookup
whose value torch never made is a dead end; then the last choice that it depends on is taken back. No name is read.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.probe.candidates import STRICT, Candidates, Pass
from graftax.probe.choices import Choice, Option
from graftax.probe.limits import SURE, Limits
from graftax.probe.partial_run import PartialRun
from graftax.probe.program import INDEX, Program, Step
from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown
from graftax.probe.values import OutOfBudget

Array = Any
PATIENCE = 25
"""Steps that an undecided value may go through before it is a dead end."""
VIEWS = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "split", INDEX))
"""Steps that move the entries of a leaf and make nothing of them."""
LEAVES = 3
"""Most undecided leaves of one value."""


@dataclass(slots=True)
class Found:
    """The result of a search.

    choices   unknown -> what it holds
    open      unknowns that no value of this run depends on
    events    the values of the program that decided something -> the unknowns; `parts`: those of which torch made each
              part alone
    complete  every other unknown is decided, and the outputs agree
    dead_end  the step where the deepest attempt ended, if it is not complete; `dead_leaf`: its undecided leaf
    how       the pass that found it
    """

    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    open: list[int] = field(default_factory=list[int])
    events: dict[int, tuple[int, ...]] = field(default_factory=dict[int, "tuple[int, ...]"])
    parts: frozenset[int] = frozenset()
    complete: bool = False
    dead_end: str = ""
    dead_leaf: str = ""
    how: Pass = field(default_factory=Pass)


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
    chosen: tuple[int, ...] = ()


class _ScriptEnds(Exception):
    """What is followed decides no more."""


class _Script:
    """A result that is followed again, to see which of its choices had no alternative."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.sure: set[int] = set()
        self.bits = 0

    def followed(self, frame: _Frame, option: Option, state: PartialRun, candidates: Candidates) -> Option:
        """The option that was taken. It is sure if every option says the same, and what it rests on is sure."""
        unknowns = self.found.events.get(frame.value)
        if unknowns is None:
            raise _ScriptEnds
        taken: Option | None = None
        alone = True
        for other in itertools.chain([option], frame.options):
            if other[0] == {n: self.found.choices[n] for n in unknowns}:
                taken = taken or other
            elif taken is None or not _alike(other[0], taken[0], state.record):
                alone = False
            if taken is not None and not alone:
                break
        if taken is None:
            raise _ScriptEnds
        if alone and not (state.causes(frame.value) | candidates.blocked) & ~self.bits:
            self.bits |= frame.bit
            self.sure.update(unknowns)
        return taken


def _alike(one: Mapping[int, Choice], other: Mapping[int, Choice], record: Record) -> bool:
    """Do two options give the same arrays?"""
    return one.keys() == other.keys() and all(np.array_equal(one[n].array(record), other[n].array(record)) for n in one)


class Search:
    """One search: see `run`.

    program   the Flax steps; `fixed`: value -> array, for leaves that are no unknowns and for the inputs
    unknowns  what must be found
    record    torch's run
    judge     the outputs, flat -> do they agree with torch's?
    siblings  sources at one place of sibling modules: candidates for a stack, and readings to try first
    forced    unknown -> the array that it holds, as a rule says
    ended     True once a budget has ended a pass
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
        self.judge = judge
        self.limits = limits or Limits()
        self.state = PartialRun(program, unknowns, record, fixed, forced)
        self.candidates = Candidates(self.state, siblings, PASSES[0])
        self.script: _Script | None = None
        self.ended = False

    def run(self) -> Found:
        """Pass after pass, until one is complete. The best incomplete one otherwise."""
        stop = time.monotonic() + self.limits.seconds
        best = Found()
        for number, how in enumerate(PASSES):
            left = 1 if number == len(PASSES) - 1 else 2
            evaluations, seconds = self.limits.evaluations - self.state.evaluations, stop - time.monotonic()
            self.state.budget(evaluations // left, seconds / left)
            found = self._pass(how)
            if found.complete:
                return found
            if len(found.choices) > len(best.choices):
                best = found
        return best

    def _pass(self, how: Pass) -> Found:
        self.candidates.how = how
        self.state.begin()
        self.dead_end = self.dead_leaf = ""
        frames: list[_Frame] = []
        best = Found()
        slot = 0
        while True:
            try:
                conflict = self._follow(slot, frames)
            except OutOfBudget:
                self.ended = True
                return max(best, self._so_far(frames), key=lambda found: len(found.choices))
            if conflict is None:
                found = self._so_far(frames)
                found.open, found.complete = self.state.left_open(), True
                return found
            if len(self.state.choices) > len(best.choices) or not best.dead_end:
                best = self._so_far(frames)
            try:
                again = self._back(frames, conflict)
            except OutOfBudget:
                self.ended, again = True, None
            if again is None:
                return best
            slot = again

    def _so_far(self, frames: Sequence[_Frame]) -> Found:
        """What is decided at present."""
        events = {frame.value: frame.chosen for frame in frames}
        parts = frozenset(self.candidates.in_parts)
        return Found(
            dict(self.state.choices),
            events=events,
            parts=parts,
            dead_end=self.dead_end,
            dead_leaf=self.dead_leaf,
            how=self.candidates.how,
        )

    def sure(self, found: Found) -> Found:
        """The part of an incomplete result that had no alternative: nothing else makes a value that torch made there,
        and the choices on which that rests had none either."""
        self.script = _Script(found)
        self.candidates.how = found.how
        self.state.budget(SURE.evaluations, SURE.seconds)
        self.state.begin()
        with contextlib.suppress(OutOfBudget, _ScriptEnds):
            self._follow(0, [])
        sure, self.script = self.script.sure, None
        events = {value: chosen for value, chosen in found.events.items() if sure.issuperset(chosen)}
        choices = {n: choice for n, choice in found.choices.items() if n in sure}
        return Found(choices, events=events, parts=found.parts, dead_end=found.dead_end, how=found.how)

    def _follow(self, slot: int, frames: list[_Frame]) -> int | None:
        """Follow the steps from `slot`. None at the end; at a dead end, the choices that it depends on."""
        while slot < len(self.state.slots):
            step, j = self.state.slots[slot]
            conflict = self._slot(step, step.outs[j], slot, frames)
            if conflict is not None:
                self.dead_end = _named(step)
                leaves = [leaf for n in step.ins for leaf in self.state.open_of(n)]
                self.dead_leaf = self.state.unknowns[min(leaves)].path if leaves else ""
                return conflict
            slot += 1
        return self._ends()

    def _ends(self) -> int | None:
        """Compare the outputs."""
        outs: list[Array] = []
        conflict = 0
        for value in self.state.program.outputs:
            if value not in self.state.known and self.state.open_of(value):
                self.dead_end, self.dead_leaf = "the outputs", ""
                return self.state.causes(value)
            outs.append(self.state.value(value))
            conflict |= self.state.causes(value)
        if self.judge(outs):
            return None
        self.dead_end, self.dead_leaf = "the outputs", ""
        return conflict

    def _back(self, frames: list[_Frame], conflict: int) -> int | None:
        """Take back the last choice in `conflict` that has another option. The slot to go on from; None if none has."""
        while frames:
            frame = frames[-1]
            self.state.undo(frame.trail)
            if conflict & frame.bit:
                frame.conflict |= conflict & ~frame.bit
                self.candidates.blocked = 0
                option = next(frame.options, None)
                frame.conflict |= self.candidates.blocked & (frame.bit - 1)
                if option is not None:
                    self._take(frame, option)
                    return frame.slot + 1
                conflict = frame.conflict
            frames.pop()
        return None

    def replay(self, found: Found, error: Callable[[Sequence[Array]], float]) -> tuple[float, dict[int, str]]:
        """What was found, on this record: the error of the outputs, and the values that decided something and are no
        value of torch any more, with their steps."""
        state = self.state
        for n, unknown in enumerate(state.unknowns):
            if n not in state.forced:
                held = n in found.choices
                state.known[unknown.value] = found.choices[n].array(state.record) if held else state.random_fill(n)
        broken: dict[int, str] = {}
        for step, j in state.slots:
            value = step.outs[j]
            if value in state.known:
                continue
            state.known[value] = state.value(value)
            if value in found.events and not self._held(value, found):
                broken[value] = _named(step)
        return error([state.known[n] for n in state.program.outputs]), broken

    def _held(self, value: int, found: Found) -> bool:
        """Did torch make this value, or its parts?"""
        return bool(self.state.record.values.find(self.state.known[value])) or value in found.parts

    # ------------------------------------------------------------ one value

    def _slot(self, step: Step, value: int, slot: int, frames: list[_Frame]) -> int | None:
        """Make one value known, lazy, or decide what it needs. A conflict at a dead end, else None."""
        state, how = self.state, self.candidates.how
        if value in state.known:
            return None
        idle = self.candidates.idle = value not in state.live
        for n in step.ins:
            if n not in state.known and not state.open_of(n):  # its leaves were decided after it was passed
                state.set(n, state.value(n), state.causes(n))
        leaves = frozenset[int]().union(*(state.open_of(n) for n in step.ins))
        if not leaves:
            state.set(value, state.value(value), state.cause_of(step))
            return self._strays(step, value, frames) if how.near and not idle else None
        mixed = any(n in state.mixed for n in step.ins if n not in state.known)
        meets = any(state.tells(n) for n in step.ins)
        product = step.name in STRICT
        if not mixed and not meets:
            if product and any(n in state.known for n in step.ins) and not state.moves(value, leaves):
                state.set(value, state.filled(value), state.causes(value))
                return None
            lazily = (
                product
                and step.name == "dot_general"
                and len(leaves) == 2
                and not any(n in state.known for n in step.ins)
            )
            if len(leaves) <= 2 and not product and step.name not in VIEWS:
                (first, *more) = leaves
                options = self.candidates.alone(step, value, leaves) if more else self.candidates.fed(value, first)
                if self._decided(_Frame(slot, 0, len(state.trail), options, 0, value), frames):
                    return None
            if not lazily:
                state.postpone(value, leaves, False, 0)
                return None
        if len(leaves) > 1 or not product:
            leaves = state.that_move(value, leaves)
            if not leaves:
                state.set(value, state.filled(value), state.causes(value))
                return None
        if len(leaves) <= LEAVES:
            frame = _Frame(slot, 0, len(state.trail), self.candidates.of(step, value, leaves), 0, value)
            if self._decided(frame, frames):
                return None
        if len(leaves) == 1 and product and not state.moves(value, leaves):
            state.set(value, state.filled(value), state.causes(value))
            return None
        age = 1 + max((state.age.get(n, 0) for n in step.ins), default=0)
        ends = (product and len(leaves) == 1 and how.strict) or age > PATIENCE or len(leaves) > LEAVES
        if ends and not idle and (how.near or any(n in state.data for n in step.ins)):
            near = how.near and any(n in state.data for n in step.ins)
            return (self._nearest(value, frames) if near else state.causes(value)) | self.candidates.blocked
        state.postpone(value, leaves, mixed or any(n in state.data for n in step.ins), age)
        return None

    def _strays(self, step: Step, value: int, frames: list[_Frame]) -> int | None:
        """The conflict of a product of two data that torch did not make, not even up to a factor."""
        if step.name != "dot_general" or not all(self.state.tells(n) for n in step.ins):
            return None
        made = self.state.known[value]
        values = self.state.record.values
        if made.size < 2 or values.find(made) or values.factors(made):
            return None
        batch = len(step.params["dimension_numbers"][1][0])  # torch may make them item by item
        if batch and all(row.size < 2 or values.find(row) for row in made.reshape(-1, *made.shape[batch:])):
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
            if n in seen or n not in self.state.producer:
                continue
            seen.add(n)
            out |= bits.get(n, 0)
            if n not in bits or self.state.producer[n][0].name not in STRICT:
                stack += self.state.producer[n][0].ins
        return out

    def _decided(self, frame: _Frame, frames: list[_Frame]) -> bool:
        """Take the first option of a new frame, if it has one."""
        self.candidates.blocked = 0
        option = next(frame.options, None)
        if option is None:
            return False
        frame.bit = 1 << len(frames)
        if self.script is not None:
            option = self.script.followed(frame, option, self.state, self.candidates)
        frame.conflict = self.candidates.blocked | (0 if self.candidates.how.near else self.state.causes(frame.value))
        frames.append(frame)
        self._take(frame, option)
        return True

    def _take(self, frame: _Frame, option: Option) -> None:
        chosen, number, made = option
        frame.chosen = tuple(chosen)
        for unknown, choice in chosen.items():
            self.state.choose(unknown, choice, frame.bit)
            self.candidates.remember(unknown, choice)
        cause = self.state.causes(frame.value) | frame.bit
        if made is None:
            made = self.state.value(frame.value, self.state.rest(frame.value))
        self.state.set(frame.value, self.state.record.values.snapped(made, number), cause)


def _named(step: Step) -> str:
    return f"{step.name} at {step.where}" if step.where else step.name
