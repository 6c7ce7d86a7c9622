"""Make the reference of the torch side: one recorded float64 run, and torch float32's error against it, free and
forced."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from graftax.adapters import nests
from graftax.errors import ModelError, escape
from graftax.parity.metrics import relative_l2
from graftax.parity.records import Record, Reference, Runner, Site

if TYPE_CHECKING:
    from graftax.parity.torch_runner import TorchRunner

ORDERS = 3
"""How many float32 runs are made beside the ordinary one; in each, errors propagate with other signs."""


def make_reference(
    torch64: Runner,
    torch32: TorchRunner,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    watch: Collection[str],
    also: Collection[str] = (),
) -> Reference:
    """Run torch in float64 and record it (as float32). Then run it in float32, free and forced: once unchanged, and
    ORDERS times with the error of sequential summing added to its contractions (`summing`). The float32 runs leave only
    the largest error at each place, and the output array that is furthest off.

    also: modules without a counterpart, recorded for the search for causes. ModelError if the user's code fails, draws
    random numbers or was left in train mode."""
    start = time.perf_counter()
    recorder = Recorder()
    outputs = torch64.run(args, kwargs, watch=[*watch, *also], tap=recorder)
    not_traced = {path: why for path, why in torch64.not_traced().items() if path in watch}
    free = _Free(recorder.found)
    outputs_float32 = torch32.run(args, kwargs, watch=watch, tap=free)
    _require_deterministic(torch64, torch32, args, kwargs, outputs_float32)
    forced = _Forced(recorder.found)
    if watch:
        torch32.run(args, kwargs, watch=watch, tap=forced)
    for seed in range(ORDERS):
        other = torch32.run(args, kwargs, watch=watch, tap=free, in_a_row=seed)
        outputs_float32 = _furthest(outputs_float32, other, outputs)
        if watch:
            torch32.run(args, kwargs, watch=watch, tap=forced, in_a_row=seed)
    records = {
        site: Record(one.args, one.kwargs, one.output, forced.inward[site], forced.outward[site], free.outward[site])
        for site, one in recorder.found.items()
        if site in recorder.ended
    }
    return Reference(
        torch64.modules,
        tuple(recorder.ended),
        records,
        outputs,
        outputs_float32,
        not_traced,
        time.perf_counter() - start,
        tuple(event for event in recorder.events if event[1] in records),
    )


def _require_deterministic(torch64: Any, torch32: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    """ModelError if random numbers were drawn and another seed gives other outputs."""
    drawn = getattr(torch64, "drawn", {})
    if not drawn:
        return
    if nest_error(torch32.run(args, kwargs, reseed=True), outputs) > 0:
        path, op = next(iter(drawn.items()))
        raise ModelError(
            f"the torch model draws random numbers ({escape(op)} in {escape(path) or 'the model'}): "
            "no two runs of it agree",
            next="Pass what it draws as an input, on both sides.",
        )


class Recorder:
    """Records every call. An array that is the same object at several sites is kept once.

    keep  what is kept of the Values of a call
    """

    def __init__(self, keep: Callable[[Any], Any] = lambda values: values) -> None:
        self.keep = keep
        self.found: dict[Site, Record] = {}
        self.ended: dict[Site, None] = {}
        self.events: list[tuple[str, Site]] = []

    def restart(self) -> None:
        """Forget a run that did not finish."""
        self.found.clear()
        self.ended.clear()
        self.events.clear()

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        args, kwargs = self.keep((args, kwargs))
        self.found[site] = Record(args, kwargs, None)
        self.events.append(("in", site))

    def leave(self, site: Site, output: Any) -> None:
        began = self.found[site]
        self.found[site] = Record(began.args, began.kwargs, self.keep(output))
        self.ended[site] = None
        self.events.append(("out", site))


class _Free:
    """The largest error of ordinary runs at each site."""

    def __init__(self, records: Mapping[Site, Record]) -> None:
        self.records = records
        self.outward: dict[Site, float] = defaultdict(float)

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        return None

    def leave(self, site: Site, output: Any) -> None:
        if site in self.records:
            self.outward[site] = max(self.outward[site], nest_error(output, self.records[site].output))


class _Forced:
    """Gives every site the reference input, and measures the input and output that the run had."""

    def __init__(self, records: Mapping[Site, Record]) -> None:
        self.records = records
        self.inward: dict[Site, float] = defaultdict(float)
        self.outward: dict[Site, float] = defaultdict(float)

    def enter(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        record = self.records.get(site)
        if record is None:
            return None
        error = nest_error((args, kwargs), (record.args, record.kwargs))
        self.inward[site] = max(self.inward[site], error)
        return record.args, record.kwargs

    def leave(self, site: Site, output: Any) -> Any:
        record = self.records.get(site)
        if record is None:
            return None
        self.outward[site] = max(self.outward[site], nest_error(output, record.output))
        return record.output


def _furthest(one: Any, other: Any, want: Any) -> Any:
    """The nest `one`, with each array replaced by that of `other` if it is further off `want`. An infinite error does
    not count: it shows no rounding."""
    found = [nests.arrays(nest) for nest in (one, other, want)]
    if len({tuple(path for path, _ in arrays) for arrays in found}) > 1:
        return one
    chosen: list[Any] = []
    for (_, a), (_, b), (_, c) in zip(*found, strict=True):
        further = relative_l2(a, c) < relative_l2(b, c) < float("inf")
        chosen.append(b if further else a)
    return nests.rebuilt(one, lambda value: hasattr(value, "shape") and hasattr(value, "dtype"), chosen)


def nest_error(got: Any, want: Any) -> float:
    """The largest relative L2 of the arrays of two nests of one structure. 0.0 if the structures differ: float32's
    error is then unknown, and the floor is UNIT."""
    a, b = nests.arrays(got), nests.arrays(want)
    if [path for path, _ in a] != [path for path, _ in b]:
        return 0.0
    errors = [relative_l2(x, y) for (_, x), (_, y) in zip(a, b, strict=True)]
    return max((error for error in errors if error != float("inf")), default=0.0)
