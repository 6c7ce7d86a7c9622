"""Prove a port before anything is written or returned: both models on the real weights."""

from __future__ import annotations

from typing import Any

from graftax.parity.check import check_parity
from graftax.parity.pipeline import required
from graftax.parity.report.model import ParityReport
from graftax.plans import Plan
from graftax.probe.inputs import Inputs


def prove_port(plan: Plan, module: Any, model: Any, inputs: Inputs, source: Any, flipped: bool) -> ParityReport:
    """The report of both models with the source's weights: those of `model` are made by the plan; where the plan goes from
    Flax to torch (`flipped`), a copy of `module` gets them. ParityError with `.report` if the outputs differ.
    """
    if flipped:
        import copy

        from graftax.api import host_arrays
        from graftax.surgery.loading import load_arrays

        module = copy.deepcopy(module)
        load_arrays(module, host_arrays(plan, source, None)[0], given=True)
        report = check_parity(module, model, inputs, weights={path: source.read(path) for path in source})
    else:
        report = check_parity(module, model, inputs, weights=source, plan=plan, source=source)
    return required(report)
