"""Contenders for one job, run in rounds of random order: medians, minima, and ratios to the baseline of the same run.

A contender is a function that does the job once and says what it took; what it made is checked every time. See `call`
for one in this process and `processes.Child` for one in a process of its own.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class NotRun(Exception):
    """A contender cannot run here; the message says why."""


class Wrong(Exception):
    """A contender's output is not the truth; the message says where."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. seconds: the job itself, without start-up; process: from start to exit of its process, where it has
    one; anonymous: the peak of memory that no file backs, in bytes, and before: what of it was there before the job;
    resident: the peak with files; checked: values compared with the truth, all of them equal."""

    seconds: float
    process: float | None = None
    anonymous: int | None = None
    before: int | None = None
    resident: int | None = None
    checked: int = 0


@dataclass(frozen=True, slots=True)
class Contender:
    """run: does the job once and checks what came out; raises NotRun, Wrong. required: the benchmark fails with it."""

    name: str
    run: Callable[[], Sample]
    required: bool = False


@dataclass(slots=True)
class Row:
    """A contender's runs, in order; or why there are none."""

    name: str
    required: bool
    samples: list[Sample] = field(default_factory=list[Sample])
    not_run: str = ""
    wrong: str = ""

    @property
    def ok(self) -> bool:
        return not self.wrong and not (self.required and self.not_run)

    def median(self, of: str = "seconds") -> float | None:
        return self._of(of, statistics.median)

    def minimum(self, of: str = "seconds") -> float | None:
        return self._of(of, min)

    def maximum(self, of: str) -> float | None:
        return self._of(of, max)

    def _of(self, name: str, what: Callable[[list[float]], float]) -> float | None:
        values = [value for sample in self.samples if (value := getattr(sample, name)) is not None]
        return what(values) if values else None


@dataclass(slots=True)
class Group:
    """What contenders took for one job. nbytes: what the job moves, 0 where a rate means nothing. facts: more that is
    worth keeping, as JSON."""

    title: str
    baseline: str
    rows: list[Row]
    nbytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def ratio(self, row: Row, what: str = "median") -> float | None:
        """How often the baseline's median (or minimum) goes into this contender's."""
        base = next((other for other in self.rows if other.name == self.baseline), None)
        mine = getattr(row, what)()
        other = getattr(base, what)() if base else None
        return mine / other if mine is not None and other else None


def call(name: str, job: Callable[[], Any], check: Callable[[Any], int], required: bool = False) -> Contender:
    """A contender in this process: `job` is timed, and must wait for what it starts; `check` is given what it made and
    says how many values it compared. What was made is let go before the next one runs."""

    def run() -> Sample:
        gc.collect()
        start = time.perf_counter()
        made = job()
        seconds = time.perf_counter() - start
        return Sample(seconds, checked=check(made))

    return Contender(name, run, required)


def measure(
    title: str,
    contenders: Sequence[Contender],
    baseline: str,
    repeats: int,
    seed: int = 0,
    nbytes: int = 0,
    warm_up: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Group:
    """Every contender once a round, in an order drawn anew for each; one that fails is out. warm_up: a round before
    that does not count, for what compiles or touches memory the first time."""
    rng = random.Random(seed)
    rows = {contender.name: Row(contender.name, contender.required) for contender in contenders}
    for number in range(-1 if warm_up else 0, repeats):
        order = list(contenders)
        rng.shuffle(order)
        for contender in order:
            row = rows[contender.name]
            if row.not_run or row.wrong:
                continue
            say(f"{title}: {'warming up' if number < 0 else f'round {number + 1} of {repeats}'}: {row.name}")
            try:
                sample = contender.run()
            except NotRun as error:
                row.not_run = str(error)
            except Wrong as error:
                row.wrong = str(error)
            else:
                if number >= 0:
                    row.samples.append(sample)
    return Group(title, baseline, list(rows.values()), nbytes)
