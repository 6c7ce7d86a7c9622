"""Record one float64 run of a Flax model, as the source of a port from Flax to Flax: its steps are values already, a
parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graftax.probe.evaluate import evaluate, widened
from graftax.probe.flax_side import FlaxForward, fixed_values
from graftax.probe.program import INDEX, Program, Step
from graftax.probe.record import Record, Source
from graftax.probe.values import Values

_VIEWS = frozenset(("reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "rev", "copy"))
"""Steps that keep every entry of a leaf."""

Array = Any


def redrawn_leaves(forward: FlaxForward, seed: int) -> dict[str, Array]:
    """path -> generic values: positive vectors, noise for matrices."""
    random = np.random.default_rng(seed)
    out: dict[str, Array] = {}
    for path, spec in zip(forward.paths, forward.specs, strict=True):
        shape = tuple(spec.shape)
        vector = len([size for size in shape if size > 1]) < 2
        if vector or path in forward.positive:
            out[path] = random.uniform(0.5, 1.5, shape)
        else:
            out[path] = random.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1))
    return out


def record_flax(
    program: Program,
    forward: FlaxForward,
    leaves: Mapping[str, Array],
    inputs: Sequence[Array],
    values: bool = True,
) -> Record:
    """The record of one run with these leaves and flat inputs; its sources and outputs alone, without `values`."""
    record = Record(Values())
    known: dict[int, Array] = {n: widened(array) for n, array in program.constants.items()}
    known |= fixed_values(program, forward, inputs)
    whole: dict[int, int] = {}
    made_of: dict[int, frozenset[int]] = {}
    for path in forward.paths:
        number = len(record.sources)
        record.sources.append(Source((path,), leaves[path]))
        value = program.leaves[path]
        known[value] = leaves[path]
        whole[value] = number
        made_of[value] = frozenset((number,))
    for value in program.inputs if values else ():
        record.values.add(_floats(known[value]))
    for step in program.steps:
        outs = evaluate(step, [known[n] for n in step.ins])
        known.update(zip(step.outs, outs, strict=True))
        if values:
            _note(step, record, known, whole, made_of, program)
    outs = [np.asarray(known[n]) for n in program.outputs]
    record.outputs = {str(n) if len(outs) > 1 else "": out for n, out in enumerate(outs) if out.dtype.kind == "f"}
    return record


def _note(
    step: Step,
    record: Record,
    known: Mapping[int, Array],
    whole: dict[int, int],
    made_of: dict[int, frozenset[int]],
    program: Program,
) -> None:
    leafy = [n for n in step.ins if n in made_of]
    others = [n for n in step.ins if n not in made_of and n not in program.constants]
    if leafy and not others:
        for out in step.outs:
            made_of[out] = frozenset[int]().union(*(made_of[n] for n in leafy))
        if step.name in _VIEWS and len(leafy) == 1 and leafy[0] in whole:
            whole[step.outs[0]] = whole[leafy[0]]
            return
        if step.name == INDEX and leafy[0] in whole and program.leaves.get(_path(record, whole[leafy[0]])) == leafy[0]:
            at = step.params["at"]
            whole[step.outs[0]] = record.piece(whole[leafy[0]], (at,))
            made_of[step.outs[0]] = frozenset((whole[step.outs[0]],))
            return
    for n in leafy:
        sources = [whole[n]] if n in whole else sorted(made_of[n])
        for source in sources:
            record.meets(None, source)
            for other in step.ins:
                if other != n:
                    record.meets(record.values.add(_floats(known[other])), source)
    for out in step.outs:
        array = np.asarray(known[out])
        if array.dtype.kind in "fiu" and array.size > 1:
            record.values.add(_floats(array))


def _path(record: Record, source: int) -> str:
    item = record.sources[source]
    return item.keys[0] if item.rows is None else ""


def _floats(array: Array) -> Array:
    plain = np.asarray(array)
    return plain.astype(np.float64) if plain.dtype.kind in "fiu" else np.zeros(1)
