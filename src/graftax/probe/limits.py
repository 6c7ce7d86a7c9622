"""What a probe may use, and how near is near."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a search may use: seconds, and trial evaluations."""

    seconds: float = 60.0
    evaluations: int = 200_000


DRAWN = Limits(seconds=20.0)
"""For inputs that nobody gave."""
GIVEN = Limits(seconds=120.0, evaluations=1_000_000)
"""For inputs that the user gave."""
RULED = Limits(seconds=20.0, evaluations=20_000)
"""For rules that differ from what was found: do they hold by a symmetry?"""
NEAR = 1e-5
"""Largest difference of outputs that agree in float64, as a part of the largest entry."""
GROSS = 0.1
"""Outputs that differ more come from wrong weights or another architecture, not from an epsilon."""
