"""Settle a plan by running: both models with the same redrawn weights, until their outputs agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from graftax.adapters import nests
from graftax.adapters.layouts import declared
from graftax.errors import GraftaxError, ModelError, escape
from graftax.ops import Cast, apply_chain
from graftax.plans import Entry
from graftax.probe.draw import calls_to_try, check_finite, redrawn
from graftax.probe.entries import Node, entries_of, nodes_of
from graftax.probe.flax_origin import FlaxOrigin
from graftax.probe.flax_side import Forward, as_arrays, fixed_values, flax_forward, input_arrays, is_flax
from graftax.probe.hashes import sha
from graftax.probe.inputs import Call, Inputs
from graftax.probe.limits import GROSS, NEAR, Limits
from graftax.probe.outputs import difference
from graftax.probe.program import Program
from graftax.probe.record import Record
from graftax.probe.refute import wrong_reading
from graftax.probe.rewrite import Unknown, apart, piece, unknowns_of
from graftax.probe.search import Found, Search
from graftax.probe.siblings import siblings_of
from graftax.probe.symmetries import interchangeable
from graftax.probe.values import TOLERANCE, OutOfBudget

BROKE = "running failed"
"""How `stopped` begins where graftax itself failed on inputs that nobody gave."""
LOOSE = 1e-3
"""For models whose code differs a little: the difference allowed in a value that decides."""
PARTLY = "found by running both models, short of their outputs: nothing else makes the source's value, on two redraws"
SEEDS = (0, 1)
"""The first redraw finds the plan, the second confirms it."""


@dataclass(frozen=True, slots=True)
class Unsaid:
    """A leaf that was found, but that no ops write: the tensors that it is made of, and why.

    made_by  (an entry, torch -> Flax) -> does it make what was found?
    no_op    graftax has no op for it, so that no rule and no name can write it
    """

    path: str
    keys: tuple[str, ...]
    why: str
    made_by: Callable[[Entry], bool]
    no_op: bool = False

    @property
    def text(self) -> str:
        keys = ", ".join(escape(key) for key in self.keys)
        return f"running both models finds {escape(self.path)} in {keys}, and this cannot be written: {self.why}"


@dataclass(frozen=True, slots=True)
class Settled:
    """What running both models shows.

    entries     torch -> Flax, for every leaf that is proved
    open        leaves that nothing in the run depends on: not proved
    unsaid      leaves that were found, but not as graftax's ops can say it
    error       the largest difference of the outputs in the confirming run, as a part of the largest entry
    stopped     why nothing, or not all, was found; "" if everything was
    dead_end    the step of the Flax model where the deepest attempt ended; `dead_leaf`: its undecided leaf
    models, inputs  hashes of the code of both models and of the inputs, as in plans.Proof
    attempt     both models, to run them again
    symmetries  pairs of leaves that may be exchanged: the models agree either way
    partly      the search did not reach the outputs: the entries are those to which it found no alternative
    """

    entries: tuple[Entry, ...] = ()
    open: tuple[str, ...] = ()
    unsaid: tuple[Unsaid, ...] = ()
    error: float = np.inf
    stopped: str = ""
    dead_end: str = ""
    dead_leaf: str = ""
    models: tuple[tuple[str, str], ...] = ()
    inputs: str = ""
    attempt: Attempt | None = None
    symmetries: tuple[tuple[str, str], ...] = ()
    partly: bool = False

    @property
    def proved(self) -> bool:
        return not self.stopped and self.error <= NEAR

    @property
    def broke(self) -> bool:
        """True if graftax itself failed."""
        return self.stopped.startswith(BROKE)

    @property
    def differs(self) -> bool:
        """True if the mapping was found, but the models' code differs a little: an epsilon, an activation."""
        return bool(self.entries) and not self.proved and not self.partly

    def tried(self, entries: Sequence[Entry]) -> tuple[float | None, str]:
        """(the difference of the outputs with the leaves that these entries make, on redrawn weights; None if some leaf
        has none, or the models could not be run; if they are far off, a leaf whose axes are in a wrong order, whatever
        else differs: "" if none)."""
        attempt = self.attempt
        if attempt is None:
            return None, ""
        record, arrays = attempt.redrawn(SEEDS[1])
        held = attempt.forced(record, entries)
        if len(held) < len(attempt.unknowns):
            return None, ""
        error, _ = attempt.confirmed(Found(), record, arrays, held)
        if error <= GROSS:
            return error, ""
        fixed = fixed_values(attempt.program, attempt.forward, arrays)
        keys = {path: e.sources for e in entries if len(e.sources) == 1 for path in e.targets}
        return error, wrong_reading(attempt.program, attempt.unknowns, record, fixed, held, keys)


class Origin(Protocol):
    """The model whose tensors are looked for."""

    call: Call

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """key -> shape of its tensors."""
        ...

    def code(self) -> tuple[str, str]:
        """(which side, sha256 of its code)."""
        ...

    def record(self, seed: int, call: Call) -> Record:
        """The record of one call with redrawn weights."""
        ...

    def on(self, weights: Mapping[str, Any]) -> Record:
        """The sources and outputs of its own call with these weights."""
        ...

    def ids(self) -> int | None:
        """How many ids all its tables have; None if it has none, or that is not known."""
        ...


def _origin(model: Any, call: Call, inputs: Inputs) -> Origin:
    if is_flax(model):
        return FlaxOrigin.of(model, call)
    from graftax.probe.torch_origin import TorchOrigin  # torch may not be installed

    return TorchOrigin(model, call, inputs)


def _forward(model: Any, inputs: Inputs) -> Forward:
    if is_flax(model):
        return flax_forward(model, inputs.flax_call)
    from graftax.probe.torch_program import TorchForward  # torch may not be installed

    return TorchForward.of(model, inputs.flax_call or inputs.torch_call)


@dataclass(slots=True)
class Attempt:
    """Both models, prepared for one pair of calls."""

    origin: Origin
    forward: Forward
    flax_call: Call
    inputs: Inputs
    example: bool
    program: Program
    unknowns: list[Unknown]

    @classmethod
    def of(cls, module: Any, model: Any, calls: tuple[Call, Call], inputs: Inputs, example: bool) -> Attempt:
        flax_call = calls[1]
        forward = _forward(model, inputs)
        program = forward.program(*as_arrays(flax_call))
        unknowns = unknowns_of(program, forward.paths)
        apart(program, unknowns)
        return cls(_origin(module, calls[0], inputs), forward, flax_call, inputs, example, program, unknowns)

    def redrawn(self, seed: int) -> tuple[Record, list[Any]]:
        """The source's record with redrawn weights and inputs, and the flat inputs of Flax."""
        ids = self.origin.ids() if self.example else None
        call, arrays = redrawn(self.origin.call, self.flax_call, seed, ids)
        return self.origin.record(seed, call), arrays

    def code(self) -> tuple[tuple[str, str], ...]:
        """sha256 of each model's code: the modules of torch with their settings, the steps of Flax."""
        return self.origin.code(), self.forward.code(self.program)

    def digest(self) -> str:
        """sha256 of the inputs of both models."""
        arrays = [*(a for _, a in nests.leaves(self.origin.call, nests.is_array)), *input_arrays(*self.flax_call)]
        return sha(*(f"{np.asarray(a).dtype}{np.shape(a)}".encode() + np.asarray(a).tobytes() for a in arrays))

    def search(
        self, record: Record, arrays: Sequence[Any], limits: Limits, forced: Mapping[int, Any], near: float = NEAR
    ) -> Search:
        layout = declared(self.inputs.out_layout)
        return Search(
            self.program,
            self.unknowns,
            record,
            fixed_values(self.program, self.forward, arrays),
            lambda outs: difference(outs, record.outputs, layout) <= near,
            siblings=siblings_of(record),
            forced=forced,
            limits=limits,
        )

    def forced(self, record: Record, entries: Sequence[Entry]) -> dict[int, Any]:
        """unknown -> the array that rules say, with the record's weights."""
        by_name = {
            name: s.array
            for s in record.sources
            if s.how == "tensor" and s.rows is None
            for name in (*s.keys, *s.names)
        }
        leaves: dict[str, Any] = {}
        for entry in entries:
            if all(name in by_name for name in entry.sources):
                made = apply_chain(entry.ops, tuple(by_name[name] for name in entry.sources))
                leaves.update(zip(entry.targets, made, strict=True))
        leaves = {path: leaves[other] for other, path in self.forward.others.items() if other in leaves} | leaves
        return {n: piece(leaves[u.path], u.cuts) for n, u in enumerate(self.unknowns) if u.path in leaves}

    def confirmed(
        self, found: Found, record: Record, arrays: Sequence[Any], forced: Mapping[int, Any]
    ) -> tuple[float, dict[int, str]]:
        """(the difference of the outputs, the values that decided something and do not hold, with their steps), on
        another redraw."""
        fixed = fixed_values(self.program, self.forward, arrays)
        search = Search(self.program, self.unknowns, record, fixed, lambda outs: True, forced=forced)
        return search.replay(found, lambda outs: difference(outs, record.outputs, declared(self.inputs.out_layout)))


def settle(
    module: Any, model: Any, inputs: Inputs | None, limits: Limits | None = None, forced: Sequence[Entry] = ()
) -> Settled:
    """Find what `model` (gx.linen(...) or an nnx.Module) holds of the torch `module`, by running both. Neither is
    changed. inputs=None: they are drawn from the example of gx.linen, with images channels first
    and last in turn. forced: entries that hold, because rules say so.

    ModelError if a model cannot be run or traced on given inputs."""
    limits = limits or Limits()
    start = time.monotonic()
    best = Settled(stopped="there is no example input")
    for calls in calls_to_try(module, model, inputs):
        check_finite(calls)
        try:
            attempt = Attempt.of(module, model, calls, inputs or Inputs(), inputs is None)
            found = _settled(attempt, limits, forced)
        except (GraftaxError, OutOfBudget) as error:
            if inputs is not None and isinstance(error, GraftaxError):
                raise _with_hint(error, inputs, calls) if is_flax(model) != is_flax(module) else error from error
            found = Settled(stopped=str(error))
        except Exception as error:
            if inputs is not None:
                raise
            # Nobody asked to run these models: the plan is made without it, and says so.
            found = Settled(stopped=f"{BROKE}: {type(error).__name__}: {str(error)[:200]}")
        if found.proved or len(found.entries) > len(best.entries) or not best.dead_end:
            best = found
        if found.proved or time.monotonic() - start > limits.seconds:
            break
    return best


def on_real_weights(
    module: Any, model: Any, inputs: Inputs, entries: Sequence[Entry], weights: Mapping[str, Any]
) -> float | None:
    """The difference of both models' outputs on the given inputs, as a part of the largest entry, in float64: `module`
    with these weights, `model` with what the entries make of them. None if the entries do not make every leaf."""
    attempt = Attempt.of(module, model, next(calls_to_try(module, model, inputs)), inputs, False)
    record = attempt.origin.on(weights)
    plain = [replace(e, ops=tuple(op for op in e.ops if not isinstance(op, Cast))) for e in entries]
    held = attempt.forced(record, [e for e in plain if e.targets and not e.unfilled])
    if len(held) < len(attempt.unknowns):
        return None
    arrays = [np.asarray(array) for array in input_arrays(*attempt.flax_call)]
    return attempt.confirmed(Found(), record, arrays, held)[0]


def _settled(attempt: Attempt, limits: Limits, forced: Sequence[Entry]) -> Settled:
    record, arrays = attempt.redrawn(SEEDS[0])
    fixed = attempt.forced(record, forced)
    strict = attempt.search(record, arrays, limits, fixed)
    first = found = strict.run()
    near, dead_end = NEAR, found.dead_end
    if not found.complete:  # the code of the models may differ a little
        record.values.tolerance, near = LOOSE, GROSS
        found = attempt.search(record, arrays, limits, fixed, GROSS).run()
    other, other_arrays = attempt.redrawn(SEEDS[1])
    if not found.complete:
        record.values.tolerance = TOLERANCE
        sure = strict.sure(first)
        _, broken = attempt.confirmed(sure, other, other_arrays, attempt.forced(other, forced))
        held = {n for value, chosen in sure.events.items() if value not in broken for n in chosen}
        choices = {n: choice for n, choice in sure.choices.items() if n in held}
        nodes = nodes_of(attempt.unknowns, choices, record.sources)
        entries, _ = entries_of(nodes, attempt.origin.shapes(), dict.fromkeys(nodes, PARTLY))
        stopped = "no plan makes the models agree"
        if strict.ended:
            stopped = f"no plan makes the models agree within {limits.seconds:g} s and {limits.evaluations:,} trials"
        return Settled(
            tuple(entries), stopped=stopped, dead_end=dead_end, dead_leaf=first.dead_leaf, attempt=attempt, partly=True
        )
    other.values.tolerance = record.values.tolerance
    again = other, other_arrays, attempt.forced(other, forced)
    error, broken = attempt.confirmed(found, *again)
    if near != NEAR and error <= NEAR:  # the strict search had no time left, and the models do not differ
        other.values.tolerance = TOLERANCE
        near = GROSS if attempt.confirmed(found, *again)[1] else NEAR
    if broken or not error <= near:
        return Settled(
            stopped=f"what was found does not hold on other weights and inputs (off by {error:.1e})",
            error=error,
            dead_end=next(iter(broken.values()), "the outputs"),
            attempt=attempt,
        )

    def holds(swapped: Found) -> bool:
        runs = (attempt.confirmed(swapped, *run) for run in (again, (record, arrays, fixed)))
        return all(error <= NEAR and not broken for error, broken in runs)

    nodes = nodes_of(attempt.unknowns, found.choices, record.sources)
    others = attempt.forward.others
    nodes |= {other: nodes[path] for other, path in others.items() if path in nodes}
    opened = dict.fromkeys(attempt.unknowns[n].path for n in found.open)
    shapes = attempt.origin.shapes()
    how = "proved" if near == NEAR else "found"
    entries, unsaid = entries_of(nodes, shapes, dict.fromkeys(nodes, f"{how} by running both models"))
    stopped = "" if near == NEAR else f"the mapping was found, and the models differ (outputs off by {error:.1e})"
    return Settled(
        tuple(entries),
        tuple(name for path in opened for name in (path, *(o for o, p in others.items() if p == path))),
        tuple(_unsaid(attempt, record, found, nodes, path, why) for path, why in unsaid.items()),
        error,
        stopped,
        dead_end if stopped else "",
        first.dead_leaf if stopped else "",
        models=attempt.code(),
        inputs=attempt.digest(),
        attempt=attempt,
        symmetries=() if stopped else tuple(interchangeable(found, attempt.unknowns, record, holds)),
    )


def _unsaid(attempt: Attempt, record: Record, found: Found, nodes: Mapping[str, Node], path: str, why: str) -> Unsaid:
    leaf = attempt.forward.others.get(path, path)
    held = {n: found.choices[n] for n, unknown in enumerate(attempt.unknowns) if unknown.path == leaf}

    def made_by(entry: Entry) -> bool:
        made = attempt.forced(record, [entry])
        return all(n in made and np.allclose(made[n], choice.array(record)) for n, choice in held.items())

    sources = [slot.source for slot in nodes[path].slots() if slot.source is not None]
    keys = dict.fromkeys(key for source in sources for key in source.keys)
    return Unsaid(path, tuple(keys), why, made_by, any(source.how == "spectral_norm" for source in sources))


def _with_hint(error: GraftaxError, inputs: Inputs, calls: tuple[Call, Call]) -> GraftaxError:
    """The error; if one array served both sides and may be an image, with the way to say its layout."""
    shared = inputs.layout is None and (inputs.torch is None or inputs.flax is None)
    if not isinstance(error, ModelError) or not shared or not any(a.ndim > 2 for a in input_arrays(*calls[1])):
        return error
    return ModelError(
        str(error),
        next="Both sides were given arrays of one layout; if Flax takes channels last, say so: "
        "gx.Inputs(x, layout='NCHW -> NHWC') (--layout).",
    )
