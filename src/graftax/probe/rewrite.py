"""Rewrite a program so that each unknown is decided alone: leaves that are only used in pieces become one unknown each
(scanned layers, leaf[i]), and concatenated leaves are multiplied and added piece by piece (OptimizedLSTMCell)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftax.probe.program import INDEX, Program, Step


@dataclass(frozen=True, slots=True)
class Cut:
    """One piece of an array: start to stop along `axis`; the axis itself is dropped if `element`."""

    axis: int
    start: int
    stop: int
    element: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """A leaf, or a piece of one: the value that stands for it in the program."""

    path: str
    value: int
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()


def unknowns_of(program: Program, paths: Sequence[str]) -> list[Unknown]:
    """The unknowns of the leaves at `paths`. Steps that take the pieces are removed from the program."""
    out: list[Unknown] = []
    for path in paths:
        value = program.leaves[path]
        _pieces(program, Unknown(path, value, program.shapes[value]), out)
    return out


def _pieces(program: Program, whole: Unknown, out: list[Unknown]) -> None:
    users = [step for step in program.steps if whole.value in step.ins]
    cuts = _cuts(users, whole)
    if not cuts or whole.value in program.outputs:
        out.append(whole)
        return
    program.steps = [step for step in program.steps if step not in users]
    for cut, values in cuts.items():
        first = values[0]
        for other in values[1:]:
            _renumber(program, other, first)
        _pieces(program, Unknown(whole.path, first, program.shapes[first], (*whole.cuts, cut)), out)


def _cuts(users: Sequence[Step], whole: Unknown) -> dict[Cut, list[int]]:
    """Each piece and the values that stand for it, if the leaf is used in pieces that lie side by side on one axis and
    fill it; {} otherwise."""
    found: dict[Cut, list[int]] = {}
    for step in users:
        if step.name == INDEX:
            at = step.params["at"]
            found.setdefault(Cut(0, at, at + 1, True), []).append(step.outs[0])
        elif step.name == "slice" and not any(s != 1 for s in step.params["strides"] or ()):
            spans = zip(step.params["start_indices"], step.params["limit_indices"], whole.shape, strict=True)
            moved = [(axis, a, b) for axis, (a, b, size) in enumerate(spans) if (a, b) != (0, size)]
            if len(moved) != 1:
                return {}
            found.setdefault(Cut(*moved[0]), []).append(step.outs[0])
        elif step.name == "split":
            ends = list(itertools.accumulate(step.params["sizes"], initial=0))
            for (a, b), value in zip(itertools.pairwise(ends), step.outs, strict=True):
                found.setdefault(Cut(step.params["axis"], a, b), []).append(value)
        else:
            return {}
    cuts = sorted(found, key=lambda cut: (cut.axis, cut.start))
    if len(cuts) < 2 or len({cut.axis for cut in cuts}) > 1:
        return {}
    filled = all(a.stop == b.start for a, b in itertools.pairwise(cuts))
    whole_axis = cuts[0].start == 0 and cuts[-1].stop == whole.shape[cuts[0].axis]
    return {cut: found[cut] for cut in cuts} if filled and whole_axis else {}


def _renumber(program: Program, old: int, new: int) -> None:
    program.steps = [
        replace(step, ins=tuple(new if n == old else n for n in step.ins)) if old in step.ins else step
        for step in program.steps
    ]
    program.outputs = [new if n == old else n for n in program.outputs]


# ---------------------------------------------------------------- concatenated leaves


@dataclass(frozen=True, slots=True)
class _Parts:
    """An array as parts along `axis`."""

    axis: int
    values: tuple[int, ...]


_PAIRWISE = frozenset(("add", "sub", "mul", "div", "max", "min", "add_any"))
_ALONE = frozenset(("neg", "exp", "tanh", "logistic", "sqrt", "rsqrt", "abs", "square", "integer_pow"))


@dataclass(slots=True)
class _Apart:
    program: Program
    leafy: set[int]
    steps: list[Step] = field(default_factory=list[Step])
    parts: dict[int, _Parts] = field(default_factory=dict[int, _Parts])
    alias: dict[int, int] = field(default_factory=dict[int, int])

    def size(self, part: int, axis: int) -> int:
        return self.program.shapes[part][axis]

    def run(self) -> None:
        for step in self.program.steps:
            step = replace(step, ins=tuple(self.alias.get(n, n) for n in step.ins))
            if step.name == "concatenate" and all(n in self.leafy for n in step.ins) and len(step.ins) > 1:
                self.parts[step.outs[0]] = _Parts(step.params["dimension"], step.ins)
                continue
            if any(n in self.parts for n in step.ins) and self._apart(step):
                continue
            for n in step.ins:
                self._whole(n)
            self.steps.append(step)
        for n in self.program.outputs:
            self._whole(n)
        self.program.steps = self.steps
        self.program.outputs = [self.alias.get(n, n) for n in self.program.outputs]

    def _whole(self, value: int) -> None:
        """A step that joins the parts again, where something needs them joined."""
        parts = self.parts.pop(value, None)
        if parts is not None:
            self.steps.append(Step("concatenate", {"dimension": parts.axis}, parts.values, (value,)))

    def _emit(
        self, step: Step, axis: int, rows: Sequence[tuple[int, ...]], params: Sequence[Mapping[str, Any]]
    ) -> None:
        """The step once for each part: `rows` are its operands."""
        made: list[int] = []
        shape = self.program.shapes[step.outs[0]]
        for ins, own, size in zip(rows, params, self._sizes, strict=True):
            value = self.program.value((*shape[:axis], size, *shape[axis + 1 :]), self.program.dtypes[step.outs[0]])
            self.steps.append(replace(step, ins=ins, outs=(value,), params=own))
            made.append(value)
        self.parts[step.outs[0]] = _Parts(axis, tuple(made))

    _sizes: list[int] = field(default_factory=list[int])

    def _apart(self, step: Step) -> bool:
        """Do the step part by part; False where it does not allow that."""
        shapes = self.program.shapes
        place = next(n for n, value in enumerate(step.ins) if value in self.parts)
        parts = self.parts[step.ins[place]]
        self._sizes = [self.size(part, parts.axis) for part in parts.values]
        same = [step.params] * len(parts.values)
        if step.name == "dot_general" and len([n for n in step.ins if n in self.parts]) == 1:
            contracting, batch = step.params["dimension_numbers"]
            if parts.axis in contracting[place] or parts.axis in batch[place]:
                return False
            free = [
                [a for a in range(len(shapes[n])) if a not in contracting[i] and a not in batch[i]]
                for i, n in enumerate(step.ins)
            ]
            axis = len(batch[0]) + (len(free[0]) if place else 0) + free[place].index(parts.axis)
            rows = [tuple(part if i == place else n for i, n in enumerate(step.ins)) for part in parts.values]
            for n in step.ins:
                if n not in self.parts:
                    self._whole(n)
            self._emit(step, axis, rows, same)
            return True
        if step.name in _ALONE or step.name in _PAIRWISE:
            return self._elementwise(step, parts)
        if step.name == "reshape":
            return self._reshape(step, parts)
        if step.name == "broadcast_in_dim":
            axis = step.params["broadcast_dimensions"][parts.axis]
            shape = step.params["shape"]
            if shape[axis] != sum(self._sizes):
                return False
            own = [dict(step.params, shape=(*shape[:axis], size, *shape[axis + 1 :])) for size in self._sizes]
            self._emit(step, axis, [(part,) for part in parts.values], own)
            return True
        if step.name == "split" and step.params["axis"] == parts.axis and list(step.params["sizes"]) == self._sizes:
            self.alias.update(zip(step.outs, parts.values, strict=True))
            return True
        if step.name == "slice" and not any(s != 1 for s in step.params["strides"] or ()):
            return self._slice(step, parts)
        return False

    def _elementwise(self, step: Step, parts: _Parts) -> bool:
        rank = len(self.program.shapes[step.outs[0]])
        rows: list[list[int]] = [[] for _ in parts.values]
        for value in step.ins:
            mine = self.parts.get(value)
            shape = self.program.shapes[value]
            if mine is not None:
                if mine.axis != parts.axis or [self.size(p, mine.axis) for p in mine.values] != self._sizes:
                    return False
                for row, part in zip(rows, mine.values, strict=True):
                    row.append(part)
            elif len(shape) == 0 or (len(shape) == rank and shape[parts.axis] == 1):
                for row in rows:
                    row.append(value)
            else:
                return False
        self._emit(step, parts.axis, [tuple(row) for row in rows], [step.params] * len(rows))
        return True

    def _reshape(self, step: Step, parts: _Parts) -> bool:
        """Only where the axis is kept and axes of length one come or go."""
        before, after = self.program.shapes[step.ins[0]], step.params["new_sizes"]
        if step.params.get("dimensions") is not None or [s for s in before if s != 1] != [s for s in after if s != 1]:
            return False
        place = [a for a, s in enumerate(before) if s != 1].index(parts.axis) if before[parts.axis] != 1 else -1
        if place < 0:
            return False
        axis = [a for a, s in enumerate(after) if s != 1][place]
        own = [dict(step.params, new_sizes=(*after[:axis], size, *after[axis + 1 :])) for size in self._sizes]
        self._emit(step, axis, [(part,) for part in parts.values], own)
        return True

    def _slice(self, step: Step, parts: _Parts) -> bool:
        shape = self.program.shapes[step.ins[0]]
        spans = list(zip(step.params["start_indices"], step.params["limit_indices"], strict=True))
        if any(
            span != (0, size) for axis, (span, size) in enumerate(zip(spans, shape, strict=True)) if axis != parts.axis
        ):
            return False
        ends = list(itertools.accumulate(self._sizes, initial=0))
        for part, span in zip(parts.values, itertools.pairwise(ends), strict=True):
            if span == spans[parts.axis]:
                self.alias[step.outs[0]] = part
                return True
        return False


def apart(program: Program, unknowns: Sequence[Unknown]) -> None:
    """Do what is done to concatenated leaves once for each leaf."""
    leafy = {unknown.value for unknown in unknowns}
    for step in program.steps:  # whatever is made of leaves alone
        if (
            step.ins
            and all(n in leafy or n in program.constants for n in step.ins)
            and any(n in leafy for n in step.ins)
        ):
            leafy.update(step.outs)
    _Apart(program, leafy).run()


def piece(array: Any, cuts: Sequence[Cut]) -> Any:
    """The piece of a leaf that an unknown stands for."""
    for cut in cuts:
        where = cut.start if cut.element else slice(cut.start, cut.stop)
        array = array[(*(slice(None),) * cut.axis, where)]
    return array
