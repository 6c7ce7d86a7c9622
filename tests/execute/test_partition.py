"""What several processes counted, put together."""

from __future__ import annotations

from graftax.execute.meter import Meter
from graftax.execute.partition import subtract_counts, sum_counts
from graftax.ops.casting import CastCount


def test_counts_are_added_and_the_largest_change_is_kept() -> None:
    parts = [
        Meter(False, 3, 4, 0, True, CastCount(4, 1, 0, 0, 0.25)),
        Meter(False, 5, 6, 1, False, CastCount(6, 1, 2, 3, 0.5)),
    ]
    whole = Meter(False)
    for part in parts:
        whole.add(part)
    assert whole == Meter(False, 8, 10, 1, False, CastCount(10, 2, 2, 3, 0.5))
    assert Meter.from_json(False, sum_counts(part.as_json() for part in parts)) == whole
    came = Meter.from_json(False, subtract_counts(whole.as_json(), parts[0].as_json()))
    assert came.casts == parts[1].casts
