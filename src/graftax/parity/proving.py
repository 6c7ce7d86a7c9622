"""Prove a port before anything is written or returned: both models on the real weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftax.api import host_arrays
from graftax.parity.check import check_parity
from graftax.parity.pipeline import required, suspect_of
from graftax.parity.report.model import ParityReport
from graftax.plans import Plan
from graftax.probe.inputs import Inputs
from graftax.surgery.loading import load_arrays
from graftax.tree import Checkpoint


def prove_port(
    plan: Plan, module: Any, model: Any, inputs: Inputs, source: Checkpoint, flipped: bool, own_weights: bool
) -> ParityReport:
    """The report of both models with the source's weights: those of `model` are made by the plan; where the plan goes
    from Flax to torch (`flipped`), a copy of `module` gets them. own_weights: the source has other weights than
    `module`.
    ParityError with `.report` if the outputs differ.
    """
    if flipped:
        module = _loaded(module, host_arrays(plan, source, None)[0])
        report = check_parity(module, model, inputs, weights={path: source.read(path) for path in source})
        report = replace(report, suspect=suspect_of(plan))
    else:
        if own_weights and not any(tensor.is_meta for tensor in module.state_dict().values()):
            module = _loaded(module, {key: source.read(key) for key in source})
        report = check_parity(module, model, inputs, weights=source, plan=plan, source=source)
    return required(report)


def _loaded(module: Any, arrays: Mapping[str, Any]) -> Any:
    """A copy of the module that holds these tensors; the others are its own."""
    return load_arrays(copy.deepcopy(module), arrays, given=True)
