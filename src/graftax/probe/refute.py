"""Look for a wrong reading in a plan that names and shapes made: a leaf whose axes are in another order, as running
shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from graftax.probe.evaluate import evaluate, widened
from graftax.probe.program import Program
from graftax.probe.record import Record
from graftax.probe.rewrite import Unknown

Array = Any


def wrong_reading(
    program: Program,
    unknowns: Sequence[Unknown],
    record: Record,
    fixed: Mapping[int, Array],
    held: Mapping[int, Array],
    keys: Mapping[str, Collection[str]],
) -> str:
    """The path of the first leaf that is multiplied with a value with which torch used the leaf's own tensor, and makes
    another product than torch's; "" if there is none. Then the axes of the leaf are wrong, whatever else differs
    between the models: an activation or a norm before it would have changed the value that it meets.

    held: unknown -> its array under the plan; keys: path -> the tensor that fills it, for leaves of one tensor
    """
    known: dict[int, Array] = {n: widened(array) for n, array in program.constants.items()}
    known |= fixed
    known |= {unknowns[n].value: array for n, array in held.items()}
    leaf: dict[int, int | None] = {unknown.value: n for n, unknown in enumerate(unknowns)}
    data = set(program.inputs)
    for step in program.steps:
        if not all(n in known for n in step.ins):
            return ""
        known.update(zip(step.outs, evaluate(step, [known[n] for n in step.ins]), strict=True))
        if any(n in data for n in step.ins):
            data.update(step.outs)
        else:
            mine = {leaf[n] for n in step.ins if n in leaf}
            leaf.update(dict.fromkeys(step.outs, mine.pop() if len(mine) == 1 else None) if mine else {})
            continue
        if step.name != "dot_general":
            continue
        weights = [n for n in step.ins if n in leaf and n not in data]
        given = [n for n in step.ins if n in data]
        if len(weights) != 1 or len(given) != 1 or (number := leaf[weights[0]]) is None:
            continue
        path = unknowns[number].path
        met = {
            key
            for value in record.values.find(np.asarray(known[given[0]], np.float64))
            for source in record.twins.get(value, ())
            for key in record.sources[source].keys
        }
        if met & set(keys.get(path, ())) and not record.values.find(known[step.outs[0]]):
            return path
    return ""
