"""Settle a plan by running: both models with the same redrawn weights, until their outputs agree."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from graftax.adapters import nests, torch_arrays
from graftax.adapters.layouts import declared
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import GraftaxError, ModelError
from graftax.plans import Entry
from graftax.probe.entries import entries_of, nodes_of
from graftax.probe.flax_side import FlaxForward, fixed_values, flax_forward, input_arrays
from graftax.probe.inputs import Call, Inputs, calls_of
from graftax.probe.outputs import NEAR, difference
from graftax.probe.program import Program
from graftax.probe.record import Record
from graftax.probe.redraw import axes_between, drawn_like, ids_of, probe_copy
from graftax.probe.rewrite import Unknown, apart, unknowns_of
from graftax.probe.search import Found, Limits, Search
from graftax.probe.siblings import siblings_of
from graftax.probe.torch_record import record_torch
from graftax.probe.values import OutOfBudget

SEEDS = (0, 1)
"""The first redraw finds the plan, the second confirms it."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What running both models shows.

    entries     torch -> Flax, for every leaf that is proved
    open        leaves that nothing in the run depends on: not proved
    unsaid      leaves that were found, but not as graftax's ops can say it: path -> why
    error       the largest difference of the outputs in the confirming run, as a part of the largest entry
    stopped     why nothing, or not all, was found; "" if everything was
    dead_end    the step of the Flax model where the deepest attempt ended
    seconds, evaluations   what it took
    """

    entries: tuple[Entry, ...] = ()
    open: tuple[str, ...] = ()
    unsaid: Mapping[str, str] = field(default_factory=dict[str, str])
    error: float = np.inf
    stopped: str = ""
    dead_end: str = ""
    seconds: float = 0.0
    evaluations: int = 0

    @property
    def proved(self) -> bool:
        return not self.stopped and self.error <= NEAR


@dataclass(slots=True)
class Attempt:
    """Both models, prepared for one pair of calls."""

    module: Any
    forward: FlaxForward
    torch_call: Call
    flax_call: Call
    inputs: Inputs
    example: bool
    program: Program
    unknowns: list[Unknown]

    @classmethod
    def of(cls, module: Any, model: Any, torch_call: Call, flax_call: Call, inputs: Inputs, example: bool) -> Attempt:
        forward = flax_forward(model, inputs.flax_call)
        program = forward.program(*_as_arrays(flax_call))
        unknowns = unknowns_of(program, forward.paths)
        apart(program, unknowns)
        return cls(module, forward, torch_call, flax_call, inputs, example, program, unknowns)

    def redrawn(self, seed: int) -> tuple[Record, list[Any]]:
        """torch's record with redrawn weights and inputs, and the flat inputs of Flax."""
        probe = probe_copy(self.module, seed)
        torch_call, arrays = _redrawn(self.torch_call, self.flax_call, seed, ids_of(probe) if self.example else None)
        args, kwargs = nests.mapped(torch_call, _is_array, _to_torch)
        return record_torch(probe, args, kwargs, self.inputs.torch_call), arrays

    def search(self, record: Record, arrays: Sequence[Any], limits: Limits) -> Found:
        layout = declared(self.inputs.out_layout)
        return Search(
            self.program,
            self.unknowns,
            record,
            fixed_values(self.program, self.forward, arrays),
            lambda outs: difference(outs, record.outputs, layout) <= NEAR,
            siblings=siblings_of(record),
            limits=limits,
        ).run()

    def confirmed(self, found: Found, record: Record, arrays: Sequence[Any]) -> tuple[float, str]:
        """(the difference of the outputs, the first step that decided something and does not hold) on another redraw."""
        fixed = fixed_values(self.program, self.forward, arrays)
        search = Search(self.program, self.unknowns, record, fixed, lambda outs: True)
        return search.replay(found, lambda outs: difference(outs, record.outputs, declared(self.inputs.out_layout)))


def settle(module: Any, model: Any, inputs: Inputs | None, limits: Limits | None = None) -> Settled:
    """Find what `model` (gx.linen(...) or an nnx.Module) holds of the torch `module`, by running both. Neither is
    changed. inputs=None: they are drawn from the example of gx.linen, with images channels first and last in turn.

    ModelError if a model cannot be run or traced on given inputs."""
    limits = limits or Limits()
    start = time.monotonic()
    best = Settled(stopped="there is no example input")
    for torch_call, flax_call in _calls(model, inputs):
        try:
            attempt = Attempt.of(module, model, torch_call, flax_call, inputs or Inputs(), inputs is None)
            found = _settled(attempt, limits)
        except (GraftaxError, OutOfBudget) as error:
            if inputs is not None and isinstance(error, GraftaxError):
                raise
            found = Settled(stopped=str(error))
        if found.proved or len(found.entries) > len(best.entries) or not best.dead_end:
            best = found
        if found.proved or time.monotonic() - start > limits.seconds:
            break
    from dataclasses import replace

    return replace(best, seconds=time.monotonic() - start)


def _settled(attempt: Attempt, limits: Limits) -> Settled:
    record, arrays = attempt.redrawn(SEEDS[0])
    found = attempt.search(record, arrays, limits)
    unknowns = attempt.unknowns
    if not found.complete:
        return Settled(stopped="no plan makes the models agree", dead_end=found.dead_end, evaluations=found.evaluations)
    other, others = attempt.redrawn(SEEDS[1])
    error, broken = attempt.confirmed(found, other, others)
    if broken or not error <= NEAR:
        return Settled(
            stopped=f"what was found does not hold on other weights and inputs (off by {error:.1e})",
            error=error,
            dead_end=broken or "the outputs",
            evaluations=found.evaluations,
        )
    nodes = nodes_of(unknowns, found.choices, record.sources)
    shapes = {key: tuple(value.shape) for key, value in attempt.module.state_dict().items() if hasattr(value, "shape")}
    evidence = dict.fromkeys(nodes, f"proved by running both models (outputs within {error:.0e})")
    entries, unsaid = entries_of(nodes, shapes, evidence)
    left = tuple(dict.fromkeys(unknown.path for n, unknown in enumerate(unknowns) if n not in found.choices))
    return Settled(tuple(entries), left, unsaid, error, evaluations=found.evaluations)


# ---------------------------------------------------------------- inputs


def _calls(model: Any, inputs: Inputs | None) -> Iterator[tuple[Call, Call]]:
    """Pairs of calls to try: the given ones, or those that an example allows."""
    if inputs is not None:
        yield calls_of(inputs, model)
        return
    if not isinstance(model, LinenModel):
        return
    example: Call = nests.mapped((model.args, dict(model.kwargs)), _is_array, _drawn)
    arrays = [array for _, array in nests.leaves(example[0], _is_array)]
    maps = {rank for rank in (array.ndim for array in arrays if array.dtype.kind == "f") if rank >= 3}
    ways: list[frozenset[int]] = [frozenset(rank for rank in maps if rank > 3), frozenset(), frozenset(maps)]
    for moved in dict.fromkeys(ways):

        def first(array: Any, moved: frozenset[int] = moved) -> Any:
            return np.moveaxis(array, -1, 1) if array.ndim in moved and array.dtype.kind == "f" else array

        args = nests.mapped(example[0], _is_array, first)
        yield (tuple(a for a in args if not isinstance(a, (bool, str))), {}), (example[0], {})


def _drawn(array: Any) -> Any:
    """An example input with values: noise for floats and for shapes alone, two items where there is one."""
    shape = tuple(array.shape)
    if shape and shape[0] == 1:
        shape = (2, *shape[1:])
    dtype = np.dtype(array.dtype)
    if dtype.kind == "f" or "float" in dtype.name:
        return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
    if hasattr(array, "__array__"):
        return np.ascontiguousarray(np.broadcast_to(np.asarray(array), shape))
    return np.zeros(shape, dtype)


def _redrawn(torch_call: Call, flax_call: Call, seed: int, ids: int | None) -> tuple[Call, list[Any]]:
    """Both calls with other arrays of the same shapes and ranges: torch's nest, Flax's arrays. Arrays of the two sides
    that hold the same values are redrawn together; an array that has no counterpart stays as it is."""
    theirs = [array for _, array in nests.leaves(torch_call, _is_array)]
    new = list(theirs)
    ours = [np.asarray(array) for array in input_arrays(*flax_call)]
    left = list(range(len(theirs)))
    out: list[Any] = []
    for array in ours:
        pairs = ((n, axes_between(theirs[n], array)) for n in left)
        n, axes = next(((n, axes) for n, axes in pairs if axes is not None), (-1, None))
        if axes is None:
            out.append(array)
            continue
        left.remove(n)
        new[n] = drawn_like(theirs[n], seed + 17 * n, ids)
        out.append(np.asarray(new[n]).transpose(axes).astype(array.dtype))
    return nests.rebuilt(torch_call, _is_array, new), out


def _as_arrays(call: Call) -> Call:
    return nests.mapped(call, _is_array, np.asarray)


def _to_torch(array: Any) -> Any:
    made = torch_arrays.to_torch(np.ascontiguousarray(array))
    return made.long() if made.dtype in (torch.int32, torch.int16) else made


def _is_array(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "shape") and hasattr(value, "dtype")


__all__ = ["ModelError", "Settled", "settle"]
