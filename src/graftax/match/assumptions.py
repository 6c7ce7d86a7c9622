"""What no file shows and the plan relies on, with the check that would prove it."""

from __future__ import annotations

from graftax.match.engine import Result
from graftax.plans import Assumption, Entry

CALL_ORDER = "call order"


def assumptions(result: Result, entries: list[Entry]) -> list[Assumption]:
    """Every assumption of the plan."""
    out: list[Assumption] = []
    if result.call_order:
        targets = tuple(
            path
            for pair in result.call_order
            for link in pair.links
            for paths in link.flax.paths.values()
            for path in paths
        )
        out.append(
            Assumption(
                f"{CALL_ORDER}: modules named by a counter are called in the other side's order",
                "compare the outputs of both models on one input",
                targets,
            )
        )
    return out
