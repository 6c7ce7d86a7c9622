"""`check_parity` and `assert_parity`: prove a port, and name the layer and the cause when it is off."""

from __future__ import annotations

from typing import Any

from graftax.errors import ParityError
from graftax.parity.records import THRESHOLD
from graftax.parity.report_model import ParityReport


def check_parity(
    torch_module: Any,
    flax_model: Any,
    inputs: Any,
    weights: Any = None,
    *,
    rules: Any = None,
    plan: Any = None,
    source: Any = None,
    layout: str | None = None,
    out_layout: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    layers: bool = True,
    causes: bool = True,
    threshold: float = THRESHOLD,
    rngs: Any = None,
    seed: int = 0,
) -> ParityReport:
    """Is the Flax model the torch model? A report that is truthy when it is."""
    raise NotImplementedError


def assert_parity(*args: Any, **kwargs: Any) -> ParityReport:
    """`check_parity` that raises ParityError, with the report as its text, where the answer is no."""
    report = check_parity(*args, **kwargs)
    if not report:
        raise ParityError(str(report))
    return report
