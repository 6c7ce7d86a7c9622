"""Prove a port before anything is written or returned: both models on the real weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graftax.api import host_arrays
from graftax.errors import ParityError, escape
from graftax.parity.check import check_parity
from graftax.parity.pipeline import required, suspect_of
from graftax.parity.prepare import class_name
from graftax.parity.report.model import OutputRow, ParityReport
from graftax.plans import Plan
from graftax.probe.inputs import Inputs
from graftax.probe.limits import NEAR
from graftax.probe.settle import on_real_weights
from graftax.surgery.loading import load_arrays
from graftax.tree import DTYPES, Checkpoint


def prove_port(
    plan: Plan, module: Any, model: Any, inputs: Inputs, source: Checkpoint, flipped: bool, own_weights: bool
) -> ParityReport:
    """The report of both models with the source's weights: those of `model` are made by the plan; where the plan goes
    from Flax to torch (`flipped`), a copy of `module` gets them. own_weights: the source has other weights than
    `module`.
    ParityError with `.report` if the outputs differ.
    """
    if flipped:
        like = None if plan.made_from is None else plan.made_from.like  # kept leaves take their values from it
        module = _loaded(module, host_arrays(plan, source, like)[0])
        report = check_parity(module, model, inputs, weights={path: source.read(path) for path in source})
        report = replace(report, suspect=suspect_of(plan))
    else:
        if own_weights and not any(tensor.is_meta for tensor in module.state_dict().values()):
            module = _loaded(module, {key: source.read(key) for key in source})
        report = check_parity(module, model, inputs, weights=source, plan=plan, source=source)
    return required(report)


def prove_within_side(plan: Plan, module: Any, model: Any, inputs: Inputs, source: Checkpoint) -> float | None:
    """The difference of the outputs of two models of one side, in float64, on the source's weights; None if the plan
    leaves some leaves as they are. ParityError with `.report` if they differ."""
    floats = {path: source.read(path) for path in source if DTYPES[source.specs[path].dtype][1] == "f"}
    error = on_real_weights(module, model, inputs, plan.entries, floats)
    if error is None or error <= NEAR:
        return error
    text = f"in float64 the outputs differ by {error:.1e} of the largest entry; {NEAR:.0e} is allowed"
    names = class_name(module), class_name(model)
    suspect = suspect_of(plan)
    before = f"; run on redrawn weights, they part before {escape(suspect)}" if suspect else ""
    failed = ParityError(f"{escape(names[0])} and {escape(names[1])} differ on the real weights: {text}{before}")
    row = OutputRow("", (), error, 0.0, np.inf, False, {}, text)
    failed.report = ParityReport(False, (row,), torch_name=names[0], flax_name=names[1], suspect=suspect)
    raise failed


def _loaded(module: Any, arrays: Mapping[str, Any]) -> Any:
    """A copy of the module that holds these tensors; the others are its own."""
    return load_arrays(copy.deepcopy(module), arrays, given=True)
