"""What a probe may use, and how near is near."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a search may use: seconds, and trial evaluations."""

    seconds: float = 60.0
    evaluations: int = 80_000


DRAWN = Limits(seconds=20.0)
"""For inputs that nobody gave."""
GIVEN = Limits(seconds=120.0, evaluations=200_000)
"""For inputs that the user gave."""
RULED = Limits(seconds=20.0, evaluations=20_000)
"""For rules that differ from what was found: do they hold by a symmetry?"""
SURE = Limits(seconds=10.0, evaluations=20_000)
"""For an incomplete result: which of its choices had no alternative?"""
DRAWN_MOST = 50_000_000
"""Parameters up to which models are run on inputs that nobody gave."""
BYTES = 32
"""Memory for each parameter: torch's float64 copy, the record's, the numbers of the entries, and the candidate's."""
NEAR = 1e-5
"""Largest difference of outputs that agree in float64, as a part of the largest entry."""
GROSS = 0.1
"""Outputs that differ more come from wrong weights or another architecture, not from an epsilon."""
