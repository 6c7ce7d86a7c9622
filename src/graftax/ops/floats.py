"""The floating formats, in one table: which format holds every value of another. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Float:
    """bits; mantissa bits; least and greatest exponent of a normal value; top: the largest value; ieee: it has
    infinities, many NaNs and -0."""

    bits: int
    mantissa: int
    least: int
    greatest: int
    top: float
    ieee: bool = True


FLOATS: Mapping[str, Float] = {
    "float64": Float(64, 52, -1022, 1023, (2 - 2.0**-52) * 2.0**1023),
    "float32": Float(32, 23, -126, 127, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": Float(16, 7, -126, 127, (2 - 2.0**-7) * 2.0**127),
    "float16": Float(16, 10, -14, 15, 65504.0),
    "float8_e5m2": Float(8, 2, -14, 15, 57344.0),
    "float8_e4m3fn": Float(8, 3, -6, 8, 448.0, ieee=False),
    "float8_e5m2fnuz": Float(8, 2, -15, 15, 57344.0, ieee=False),
    "float8_e4m3fnuz": Float(8, 3, -7, 7, 240.0, ieee=False),
    "float8_e8m0fnu": Float(8, 0, -127, 127, 2.0**127, ieee=False),
}


def widens(source: str, target: str) -> bool:
    """True if every value of `source` is a value of `target`, and a cast there and back keeps every bit, also of NaN
    payloads."""
    if source == target:
        return True
    if source not in FLOATS or target not in FLOATS or not FLOATS[target].ieee:
        return False
    a, b = FLOATS[source], FLOATS[target]
    return b.mantissa >= a.mantissa and b.greatest >= a.greatest and b.least - b.mantissa <= a.least - a.mantissa
