"""`find_causes`: try explanations in order, and return those that make the layer agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from graftax.errors import GraftaxError
from graftax.layers.connect import known_kind
from graftax.parity.causes import glue
from graftax.parity.causes.context import (
    LeafSubset,
    known,
    leaf,
    module_leaves,
    nearer,
    operands,
    step_of,
    tables,
    unrounded,
)
from graftax.parity.causes.elementwise import Explanation
from graftax.parity.causes.fused import fused_causes, fused_entry, other_readings, rule_line
from graftax.parity.causes.misplaced import misplaced
from graftax.parity.causes.norms import norm_difference
from graftax.parity.causes.numbers import Array, Bar, Budget, arrays, in_bfloat16, is_number, relative
from graftax.parity.causes.recurrent import cell_causes, recurrent_causes
from graftax.parity.causes.settings import trials
from graftax.parity.causes.weights import diagnose, same
from graftax.parity.divergence import Divergence
from graftax.parity.report.model import Cause
from graftax.plans import Entry, Plan

SECONDS = 20.0
_CANNOT = (GraftaxError, ArithmeticError, LookupError, ValueError, MemoryError, np.linalg.LinAlgError)
"""Raised for arrays that a fit cannot take, or a plan without values: that fit finds nothing, and the report is still
made."""
_SHOWN = 3  # causes that a report lists
_NO_NORM = ("Dense", "Linear", "Conv", "Embed", "Einsum")  # class names that are never a norm


def find_causes(divergence: Divergence, budget_seconds: float = SECONDS) -> tuple[Cause, ...]:
    """Explanations of the divergence, the best first; empty: unknown. Each was tried and makes the layer agree: either
    the Flax module, run again with the fix, is below the alarm; or both torch's array and Flax's were computed from the
    reference inputs, and they differ exactly in the named cause. An explanation that cannot be tried raises nothing."""
    budget = Budget(budget_seconds)
    divergence = unrounded(divergence)
    steps = (_weights, _settings, _formulas) if divergence.where == "out" else (_bare_weights, _between)
    for step in steps:
        try:
            found = tuple(_ranked(step(divergence, budget)))
        except _CANNOT:
            found = ()
        if found:
            return found[:_SHOWN]
        if not budget.left():
            break
    try:
        return tuple(_fused(divergence, Budget(budget_seconds)))
    except _CANNOT:
        return ()


def weight_causes(
    plan: Plan, torch: Mapping[str, Any], flax: Mapping[str, Any], paths: Iterable[str]
) -> tuple[Cause, ...]:
    """Causes for leaves that differ from those the plan makes, although the models agree: fused tensors that Flax holds
    in another order than the plan reads."""
    out: dict[str, Cause] = {}
    entries = {path: entry for entry in plan.entries for path in entry.targets}
    for path in paths:
        entry = entries.get(path)
        fused = None if entry is None else fused_entry(entry, plan.source.specs, plan.like.specs, ())
        if fused is None or fused.entry.sources[0] in out:
            continue
        have, arrays = np.asarray(flax[path]), [np.asarray(torch[name]) for name in fused.entry.sources]
        for order, made in other_readings(fused, path, arrays):
            if same(have, made):
                name = fused.entry.sources[0]
                read = "" if fused.order is None else f" {fused.order.text}"
                text = f"{name} is read{read}, {fused.decided}; Flax holds it read {order.text}, and agrees with torch"
                out[name] = Cause("fused order", path, text, rule_line(fused.entry, order), 0.0, 0.0)
                break
        if len(out) == _SHOWN:
            break
    return tuple(out.values())


def _ranked(found: Iterable[Cause]) -> list[Cause]:
    """One cause of each name; 'weights differ', which explains nothing, comes last."""
    out: dict[str, Cause] = {}
    for cause in found:
        if cause.name not in out:
            out[cause.name] = cause
    return sorted(out.values(), key=lambda cause: cause.name == "weights differ")


def _bar(divergence: Divergence) -> Bar:
    row = divergence.row
    if divergence.where == "out":
        return Bar.of(row.out_error, row.out_floor, divergence.threshold)
    return Bar.of(row.in_error, row.in_floor, divergence.threshold)


# ---------------------------------------------------------------- replays


def replay_error(
    divergence: Divergence, settings: Mapping[str, Any] | None = None, leaves: Mapping[str, Any] | None = None
) -> float | None:
    """The module's own error with other settings or leaves; None if it cannot be run with them."""
    try:
        made = divergence.flax.replay(
            divergence.row.site_flax.path,
            divergence.want_args,
            divergence.want_kwargs,
            settings=settings,
            leaves=leaves,
        )
    except (GraftaxError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError):
        return None
    return nest_error(made, divergence.want_out)


def nest_error(have: Any, want: Any) -> float:
    """Relative L2 over all floating arrays of two nests; infinite if their shapes differ."""
    a, b = ([array for _, array in arrays(nest) if is_number(array)] for nest in (have, want))
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    if not a:
        return 0.0
    flat = [np.concatenate([x.astype(np.float64).reshape(-1) for x in side]) for side in (a, b)]
    return relative(*flat)


# ---------------------------------------------------------------- the module itself


def _wrong_leaves(divergence: Divergence, paths: Iterable[str]) -> list[str]:
    known_paths = [
        path for path in dict.fromkeys(paths) if path in divergence.flax_weights and path in divergence.expected
    ]
    expected = LeafSubset(known_paths, divergence.expected)
    made = [path for path in known_paths if np.size(expected[path])]
    return [path for path in made if not same(np.asarray(divergence.flax_weights[path]), expected[path])]


def _weights(divergence: Divergence, budget: Budget) -> Iterator[Cause]:
    """Wrong leaves of this module, if the right leaves make it agree, or at least clearly better."""
    entries = divergence.pair.entries
    wrong = _wrong_leaves(divergence, (path for entry in entries for path in entry.targets))
    if not wrong:
        return
    bar = _bar(divergence)
    right = {
        path: divergence.expected[path] for entry in entries for path in entry.targets if path in divergence.expected
    }
    after = replay_error(divergence, leaves=right)
    if after is not None and after > bar.before / 1.5 and after > bar.bar:
        return
    yield from _leaf_causes(divergence, entries, wrong, bar, after)
    if after is not None and after > bar.bar:
        yield from _tried(divergence, Bar(after, bar.bar), right, budget)


def _leaf_causes(
    divergence: Divergence, entries: Iterable[Entry], wrong: list[str], bar: Bar, after: float | None
) -> Iterator[Cause]:
    error = min(divergence.row.out_floor, bar.bar) if after is None else after
    entries = tuple(entries)
    found = recurrent_causes(entries, divergence.torch_weights, divergence.flax_weights, divergence.expected)
    if not found:
        shared = known(divergence)
        for path in wrong:
            entry = next((entry for entry in entries if path in entry.targets), None)
            whole = leaf(divergence, path, entry, shared)
            first = diagnose(whole)
            part = step_of(divergence, whole)
            inner = diagnose(part) if part is not None else None
            best = inner if inner is not None and (first is None or first.name == "weights differ") else first
            if best is not None:
                found.append(best)
    for item in found:
        yield Cause(item.name, divergence.row.site_flax.path, item.detail, item.fix, bar.before, error)


def _settings(divergence: Divergence, budget: Budget) -> Iterator[Cause]:
    yield from _tried(divergence, _bar(divergence), None, budget)


def _tried(divergence: Divergence, bar: Bar, leaves: Mapping[str, Any] | None, budget: Budget) -> Iterator[Cause]:
    """The setting that brings the module below the alarm. The search stops after the settings of the first name that
    does."""
    flax = divergence.flax.modules.get(divergence.row.site_flax.path)
    torch = divergence.reference.modules.get(divergence.row.site_torch.path)
    if flax is None:
        return
    as_it_is = replay_error(divergence, leaves=leaves)
    if as_it_is is None or not bar.before / 2 < as_it_is < bar.before * 2:
        return  # alone, the module behaves unlike in the model: a replay proves nothing
    best: tuple[float, Cause] | None = None
    for trial in trials(torch, flax):
        if best is not None and trial.name != best[1].name:
            break
        error = replay_error(divergence, settings=trial.settings, leaves=leaves)
        if error is not None and bar.replayed(error) and (best is None or error < best[0] / 2):
            best = error, Cause(trial.name, divergence.row.site_flax.path, trial.text, trial.fix, bar.before, error)
        if not budget.left():
            break
    if best is not None:
        yield best[1]


def _formulas(divergence: Divergence, budget: Budget) -> Iterator[Cause]:
    """Explain a module that no setting corrects: a norm or attention written by hand, or the code of a container."""
    bar = _bar(divergence)
    want, have = ([array for _, array in arrays(nest)] for nest in (divergence.want_out, divergence.flax_out))
    if len(want) != len(have):
        return
    inputs = [array for _, array in arrays((divergence.want_args, dict(divergence.want_kwargs))) if is_number(array)]
    flax = divergence.flax.modules.get(divergence.row.site_flax.path)
    kind = known_kind(flax, "flax")
    leaves = module_leaves(divergence)
    for right, wrong in zip(want, have, strict=True):
        if not is_number(right) or right.shape != wrong.shape:
            continue
        right = nearer(right, wrong, divergence.record.output)
        found: list[Explanation] = []
        if inputs and not kind.startswith(_NO_NORM):
            found = norm_difference(inputs[0], right, wrong, leaves, bar)
        if not found and inputs:
            entries, torch = divergence.pair.entries, divergence.torch_weights
            found = cell_causes(entries, torch, inputs[0], right, wrong, bar)
        if not found and inputs:
            found = glue.module_attention(inputs, leaves, right, wrong, bar, budget)
        if not found:
            found = _out_in_bfloat16(right, wrong, bar)
        if not found and not divergence.pair.leaf:
            found = misplaced(divergence, right, wrong, bar, sure=True)
        if not found and not divergence.pair.leaf:
            found = glue.explain(right, wrong, operands(divergence), known(divergence), {}, bar, budget)
        if not found and not divergence.pair.leaf:
            found = misplaced(divergence, right, wrong, bar, sure=False)
        if not found and divergence.pair.leaf:
            found = glue.explain_leaf(right, wrong, operands(divergence), known(divergence), bar, budget)
        if found:
            yield from _causes(divergence, found, bar)
            return


def _out_in_bfloat16(want: Array, have: Array, bar: Bar) -> list[Explanation]:
    if in_bfloat16(have) and not in_bfloat16(want) and relative(have, want) < 2.0**-4:
        text = "every output value of Flax is a bfloat16 value"
        return [Explanation("bfloat16 accumulation", text, "dtype=jnp.float32 in this module", bar.bar)]
    return []


def _causes(divergence: Divergence, found: Iterable[Explanation], bar: Bar) -> Iterator[Cause]:
    for item in found:
        yield Cause(item.name, divergence.row.site_flax.path, item.text, item.fix, bar.before, item.error)


def _fused(divergence: Divergence, budget: Budget) -> Iterator[Cause]:
    """Fused tensors that were taken apart in another order than torch's. It is not tried for a single layer's own
    output."""
    if divergence.where == "in" or not divergence.pair.leaf:
        yield from fused_causes(divergence, known(divergence).heads, _bar(divergence), budget)


# ---------------------------------------------------------------- the code before it


def _bare_weights(divergence: Divergence, budget: Budget) -> Iterator[Cause]:
    """Wrong parameters that belong to no layer (position tables, class tokens, scales of layers)."""
    rows = [divergence.row, *(row for row, _ in divergence.before), *divergence.more]
    owned = {path for row in rows if row.pair.leaf for entry in row.pair.entries for path in entry.targets}
    wrong = _wrong_leaves(divergence, (path for path in divergence.expected if path not in owned))
    if not wrong or divergence.plan is None:
        return
    bar = _bar(divergence)
    entries = [entry for entry in divergence.plan.entries if set(entry.targets) & set(wrong)]
    yield from _leaf_causes(divergence, entries, wrong, bar, bar.bar)


def _between(divergence: Divergence, budget: Budget) -> Iterator[Cause]:
    """Explain the arrays that arrive at the module and differ from torch's."""
    bar = _bar(divergence)
    shared, added = known(divergence), tables(divergence)
    nearby = operands(divergence)
    for want, have in _arriving(divergence):
        if is_number(want) and relative(have, want) <= bar.bar:
            continue
        want = nearer(want, have, (divergence.record.args, dict(divergence.record.kwargs)))
        if want.dtype.kind in "iub" or have.dtype.kind in "iub":
            found = glue.integers(want, have)
        else:
            found = misplaced(divergence, want, have, bar, sure=True)
            found = found or glue.explain(want, have, nearby, shared, added, bar, budget)
            found = found or misplaced(divergence, want, have, bar, sure=False)
        if found:
            yield from _causes(divergence, found, bar)
            return


def _arriving(divergence: Divergence) -> Iterator[tuple[Array, Array]]:
    """(the right array, the array that arrives) for every array that differs."""
    if divergence.flax_args is None:
        return
    want = [array for _, array in arrays((divergence.want_args, dict(divergence.want_kwargs)))]
    have = [array for _, array in arrays((divergence.flax_args, dict(divergence.flax_kwargs or {})))]
    for a, b in zip(want, have, strict=False):
        if a.shape == b.shape and not same(a, b):
            yield a, b
