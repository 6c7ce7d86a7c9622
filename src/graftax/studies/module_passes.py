"""The runs behind `gx.compare`: a's run is recorded, then b's weights run freely, and once for each level of modules.

The level of a call is how many module calls are around it. In the pass of a level, every call at it gets the input that
it has in a's run, so its output shows what the edit does in this module and in those inside it, which run freely; its
caller gets a's output. All passes run one compiled program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.parity.metrics import cosine, relative_l2
from graftax.parity.records import Record, Runner, Site
from graftax.parity.reference import Recorder
from graftax.studies.comparison import Shift


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """What the runs gave.

    levels        the level of every call in a's run, in the order in which the calls began
    itself, free  how far each output is from a's
    texts         why a call was not compared
    outputs       the Values of the model in both runs
    not_traced    module path -> why its calls were not seen in a's run
    extra         module path -> how many calls b's run has beyond those of a's run
    held          bytes of a's inputs and outputs that were kept
    """

    levels: Mapping[Site, int]
    itself: Mapping[Site, Shift]
    free: Mapping[Site, Shift]
    texts: Mapping[Site, str]
    outputs: tuple[Any, Any]
    not_traced: Mapping[str, str]
    extra: Mapping[str, int]
    held: int


def run_passes(
    a: Runner,
    b: Runner,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    watch: Sequence[str],
) -> Passes:
    """Run both sets of weights, listening at the modules `watch`."""
    distinct = _Distinct()
    recorder = Recorder(distinct)
    first = a.run(args, kwargs, watch=watch, tap=recorder)
    not_traced = dict(a.not_traced())
    levels = _levels(recorder.events, recorder.ended)
    top = [site for site, level in levels.items() if level == 0]
    own = top == [Site("")]  # the model's own call: its input is the same in every run
    forced = range(1 if own else 0, max(levels.values(), default=-1) + 1)
    free = _PassTap(recorder.found, levels, None)
    second = b.run(args, kwargs, watch=watch, tap=free)
    itself: dict[Site, Shift] = {site: free.shifts[site] for site in top if own and site in free.shifts}
    texts = dict(free.texts)
    for level in forced:
        tap = _PassTap(recorder.found, levels, level)
        b.run(args, kwargs, watch=watch, tap=tap)
        itself |= tap.shifts
        texts |= tap.texts
    return Passes(levels, itself, free.shifts, texts, (first, second), not_traced, free.extra, distinct.nbytes)


def _levels(events: Sequence[tuple[str, Site]], ended: Mapping[Site, None]) -> dict[Site, int]:
    """site -> how many calls are around it."""
    out: dict[Site, int] = {}
    around = 0
    for what, site in events:
        if what == "in":
            if site in ended:
                out[site] = around
            around += 1
        else:
            around -= 1
    return out


class _Distinct:
    """Keeps every array once: a module's output is usually the next one's input, and its caller's output."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self.nbytes = 0

    def __call__(self, values: Any) -> Any:
        return nests.mapped(values, lambda item: isinstance(item, np.ndarray), self._kept)

    def _kept(self, array: Any) -> Any:
        plain = np.ascontiguousarray(array)
        digest = hashlib.blake2b(plain.reshape(-1).view(np.uint8).data, digest_size=16).digest()
        key = (digest, plain.shape, str(plain.dtype))
        if key not in self._known:
            self._known[key] = np.array(plain)  # its own memory: the runner may reuse what it hands out
            self.nbytes += plain.nbytes
        return self._known[key]


@dataclass(slots=True, eq=False)
class _PassTap:
    """Measures the outputs of a run against a's.

    level  calls at this level get a's input, and a's output goes on; None: nothing is replaced. It never declares
           `replaces = False`, so that the same compiled program runs
    """

    records: Mapping[Site, Record]
    levels: Mapping[Site, int]
    level: int | None
    shifts: dict[Site, Shift] = field(default_factory=dict[Site, Shift])
    texts: dict[Site, str] = field(default_factory=dict[Site, str])
    extra: dict[str, int] = field(default_factory=dict[str, int])

    def restart(self) -> None:
        """Forget a run that did not finish."""
        for table in (self.shifts, self.texts, self.extra):
            table.clear()

    def enter(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        if site not in self.levels:
            self.extra[site.path] = self.extra.get(site.path, 0) + 1
            return None
        if self.level is None or self.levels[site] != self.level:
            return None
        record = self.records[site]
        if _shapes((args, kwargs)) != _shapes((record.args, record.kwargs)):
            self.texts[site] = "with b's weights it is called with arrays of other shapes"
            return None
        return record.args, record.kwargs

    def leave(self, site: Site, output: Any) -> Any:
        if site not in self.levels or site in self.texts or self.level not in (None, self.levels[site]):
            return None
        want = self.records[site].output
        self.shifts[site] = shift_of(output, want)
        return want if self.level is not None and _shapes(output) == _shapes(want) else None


def shift_of(got: Any, want: Any) -> Shift:
    """The largest relative L2 and the smallest cosine of the arrays of two nests. Nests with other arrays are
    infinitely far apart; nests without arrays are equal."""
    a, b = nests.arrays(got), nests.arrays(want)
    if [path for path, _ in a] != [path for path, _ in b]:
        return Shift(float("inf"), float("nan"))
    errors = [relative_l2(x, y) for (_, x), (_, y) in zip(a, b, strict=True)]
    cosines = [1.0 if not error else cosine(x, y) for error, (_, x), (_, y) in zip(errors, a, b, strict=True)]
    worst = float("nan") if any(map(np.isnan, cosines)) else min(cosines, default=1.0)
    return Shift(max(errors, default=0.0), worst)


def _shapes(nest: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(path, tuple(array.shape)) for path, array in nests.arrays(nest)]
