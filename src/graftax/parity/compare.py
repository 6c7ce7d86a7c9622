"""Compare a Flax runner with a reference: the forced pass, the free pass, the rows of the report, the first
divergence."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.adapters.layouts import Layout, with_layout
from graftax.parity.align import Turn, alignment_of, reordered, same_ones
from graftax.parity.metrics import alarms, output_row, relative_l2
from graftax.parity.pairing import RECURRENT, CallMap, ModulePair
from graftax.parity.records import THRESHOLD, UNIT, Reference, Runner, Site
from graftax.parity.report.model import LayerRow, OutputRow, Status, Where
from graftax.parity.teacher_forced import Arrays, ForcedTap, FreeTap, Met
from graftax.tree import TensorSpec

DeclaredLayout = Mapping[str, Layout] | Layout | None


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The result of the Flax passes. `kept`: the arrays of the first calls that alarm, by Flax site; `outputs_flax`:
    the Values of the free run; `seconds`: the time of the two passes."""

    outputs: tuple[OutputRow, ...]
    layers: tuple[LayerRow, ...]
    first: LayerRow | None
    where: Where | None
    not_traced: Mapping[str, str]
    notes: tuple[str, ...]
    kept: Mapping[Site, Arrays]
    met: Mapping[Site, Met]
    outputs_flax: Any
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


def judge_flax(
    reference: Reference,
    flax: Runner,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    pairs: Sequence[ModulePair],
    specs: Mapping[str, TensorSpec],
    *,
    threshold: float = THRESHOLD,
    atol: float | None = None,
    rtol: float | None = None,
    out_layout: DeclaredLayout = None,
) -> Judged:
    """Run Flax forced and free on its own inputs, and compare it with the reference. specs: those of the torch
    leaves."""
    seconds: dict[str, float] = {}
    compiled_before = _compile_seconds(flax)
    watch = list(dict.fromkeys(pair.flax for pair in pairs))
    if not reference.records:
        watch = []
    calls = CallMap.of(pairs, reference.began)
    alignments = {pair: alignment_of(pair, reference.modules.get(pair.torch), specs) for pair in pairs}
    tap = ForcedTap(reference, calls, alignments, threshold)
    not_traced: dict[str, str] = {}
    if watch:
        start = time.perf_counter()
        flax.run(args, kwargs, watch=watch, tap=tap)
        compiling = _compile_seconds(flax) - compiled_before
        seconds["flax forced"] = time.perf_counter() - start - compiling
        not_traced = dict(flax.not_traced())
    start, before = time.perf_counter(), _compile_seconds(flax)
    free = FreeTap(reference, tap.met)
    output = flax.run(args, kwargs, watch=watch, tap=free if watch else None)
    seconds["flax"] = time.perf_counter() - start - (_compile_seconds(flax) - before)
    seconds["flax compile"] = _compile_seconds(flax) - compiled_before
    outputs = output_rows(reference, output, threshold=threshold, atol=atol, rtol=rtol, layout=out_layout)
    rows = layer_rows(reference, calls, tap, threshold)
    first, where = first_alarm(rows, reference, threshold)
    notes = [f"Flax calls {path} {count} time(s) more than torch does" for path, count in tap.extra.items() if path]
    notes += _length_one(tap.met)
    return Judged(outputs, tuple(rows), first, where, not_traced, tuple(notes), tap.kept, tap.met, output, seconds)


def _length_one(met: Mapping[Site, Met]) -> list[str]:
    """A note on layers whose outputs have an axis of length one on one side only. Their values are compared without it,
    but code that uses them may broadcast."""
    found = {
        site: match for site, seen in met.items() for match in seen.outward[:1]
        if site.path and not same_ones(match.turn.shape, match.taken)
    }  # fmt: skip
    if not found:
        return []
    site, match = next(iter(found.items()))
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return [
        f"these outputs have axes of length one on one side only: {site} {match.turn.shape}, torch {match.taken}{more}"
    ]


def _is_state(reference: Reference, array: Any) -> bool:
    """Is an output the last state of a recurrent torch layer? torch puts an axis of layers and directions before the
    batch, even of length one; a Flax cell's carry has none. If no calls were recorded, the layer's settings decide."""
    layers = {path: one for path, one in reference.modules.items() if RECURRENT & set(one.bases)}
    if not layers or array.ndim not in (2, 3) or array.shape[0] != 1:
        return False
    if not reference.records:
        return any(
            array.shape[-1] in (one.settings.get("hidden_size"), one.settings.get("proj_size"))
            for one in layers.values()
        )
    states = [
        state
        for site, record in reference.records.items()
        if site.path in layers
        for path, state in nests.arrays(record.output)
        if path != "0"  # all steps
    ]
    return any(state.shape == array.shape and relative_l2(state, array) <= UNIT for state in states)


def _is_declared(layout: DeclaredLayout, path: str, array: Any) -> bool:
    """Is a layout declared for this output?"""
    if isinstance(layout, Layout):
        return array.ndim == len(layout.axes)
    return layout is not None and path in layout


def _compile_seconds(flax: Runner) -> float:
    """The seconds that a runner has spent on compiling so far."""
    return getattr(flax, "compile_seconds", 0.0)


def layer_rows(reference: Reference, calls: CallMap, tap: ForcedTap, threshold: float) -> list[LayerRow]:
    """One row for each call of a pair, in the order in which the torch calls began."""
    by_torch = {there: here for here, there in calls.sites.items()}
    rows: list[LayerRow] = []
    for site in reference.began:
        here = by_torch.get(site)
        if here is None or site not in reference.records:
            continue
        record, pair = reference.records[site], calls.pairs[here]
        met = tap.met.get(here) or Met(site, in_floor=record.in_error, text="the Flax module was not called")
        status: Status = "ok"
        if met.in_error is None and met.out_error is None:
            status = "not compared"
        if alarms(met.in_error, met.in_floor, threshold) or alarms(met.out_error, record.out_error, threshold):
            status = "diverges"
        rows.append(
            LayerRow(
                pair,
                site,
                here,
                " / ".join(pair.kinds),
                met.in_error,
                met.in_floor,
                met.out_error,
                record.out_error,
                met.free_error,
                record.free_error,
                status,
                met.text,
            )
        )
    return rows


def first_alarm(
    rows: Sequence[LayerRow], reference: Reference, threshold: float
) -> tuple[LayerRow | None, Where | None]:
    """The first row above the threshold, in the order of torch's events, and the side that alarms."""
    found = {row.site_torch: row for row in rows if row.status == "diverges"}
    events = reference.events or tuple((what, site) for site in reference.order for what in ("in", "out"))
    for what, site in events:
        row = found.get(site)
        if row is None:
            continue
        if what == "in" and alarms(row.in_error, row.in_floor, threshold):
            return row, "in"
        if what == "out" and alarms(row.out_error, row.out_floor, threshold):
            return row, "out"
    return None, None


def output_rows(
    reference: Reference,
    output: Any,
    *,
    threshold: float = THRESHOLD,
    atol: float | None = None,
    rtol: float | None = None,
    layout: DeclaredLayout = None,
) -> tuple[OutputRow, ...]:
    """A row for every array of the output. Arrays are paired by path if Flax has all of torch's paths, else in order.

    An output of another shape without a declared layout is compared in the order of axes that fits, and the row says
    so. An output with one more or one less axis of length one counts as another output."""
    want = nests.arrays(with_layout(reference.outputs, layout))
    low = [array for _, array in nests.arrays(with_layout(reference.outputs_float32, layout))]
    got = nests.arrays(output)
    by_path = dict(got)
    together = {path for path, _ in want} <= by_path.keys()
    rows: list[OutputRow] = []
    for i, (path, array) in enumerate(want):
        if together or i < len(got):
            ours = by_path[path] if together else got[i][1]
        else:
            text = f"Flax gives {len(got)} array(s), torch {len(want)}"
            rows.append(OutputRow(path, tuple(array.shape), np.inf, 0.0, np.inf, False, {}, text))
            continue
        other, text = low[i], ""
        free = ours.shape != array.shape and not _is_declared(layout, path, array)
        turn = reordered(array, ours.shape, ours) if free else None
        if free and turn is None and ours.shape == array.shape[1:] and _is_state(reference, array):
            turn = Turn(tuple(range(array.ndim)), shape=ours.shape)
        if turn is not None:
            text = f"torch's shape {tuple(array.shape)} was compared as {tuple(ours.shape)}, {turn.text}"
            array, other = turn(array), turn(other)
        ours = ours.astype(np.float32) if ours.dtype.kind == "V" else ours
        row = output_row(path, ours, array, other, threshold=threshold, atol=atol, rtol=rtol)
        rows.append(replace(row, text=row.text or text))
    return tuple(rows)
