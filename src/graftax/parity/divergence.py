"""The first layer that diverges, with everything that the search for causes needs to try explanations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftax.parity.pairing import ModulePair
from graftax.parity.records import Record, Reference, Runner
from graftax.parity.report.model import LayerRow, Where
from graftax.plans import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """A call of a module pair that diverges.

    row, where   the row, and the side that alarms: 'out' the module itself, 'in' the functional code between the
                 modules before it and this one
    reference    the whole torch float64 run; `record` is the record of this call
    flax_args, flax_kwargs   what arrived at the Flax module in the forced pass (Flax layout); None: not kept
    flax_out     the Flax module's output for the reference input (Flax layout); None: not kept
    want_args, want_kwargs   the reference input in Flax's layout, with which the Flax module was called in that pass
    want_out     the reference output in Flax's layout
    torch, torch64, flax     the runners: torch in float32, in float64, and Flax
    plan         torch -> Flax
    torch_weights, flax_weights, expected   path -> array: torch's leaves, Flax's leaves, and the leaves that the plan
    makes from torch's
    initial      path -> array: Flax's leaves as its initialiser makes them, if known
    before       rows of the pairs called before this one, the nearest first, with their reference outputs in Flax's
                 layout: an 'in' error arises behind them
    more         other rows that alarm
    again        leaves -> this call's error, on the side that alarms, after the whole model has run again with these
                 leaves in place of Flax's own; it returns None if nothing was compared
    """

    row: LayerRow
    where: Where
    reference: Reference
    flax_args: tuple[Any, ...] | None
    flax_kwargs: Mapping[str, Any] | None
    flax_out: Any
    want_args: tuple[Any, ...]
    want_kwargs: Mapping[str, Any]
    want_out: Any
    torch: Runner
    torch64: Runner
    flax: Runner
    plan: Plan | None
    torch_weights: Mapping[str, Any] = field(default_factory=dict[str, Any])
    flax_weights: Mapping[str, Any] = field(default_factory=dict[str, Any])
    expected: Mapping[str, Any] = field(default_factory=dict[str, Any])
    initial: Mapping[str, Any] | None = None
    before: tuple[tuple[LayerRow, Any], ...] = ()
    more: tuple[LayerRow, ...] = ()
    threshold: float = 5.0
    again: Callable[[Mapping[str, Any]], float | None] | None = None

    @property
    def pair(self) -> ModulePair:
        return self.row.pair

    @property
    def record(self) -> Record:
        """The reference at this call."""
        return self.reference.records[self.row.site_torch]
