"""Rotary position embeddings, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graftax.parity.causes.numbers import Array

Kind = Literal["none", "half", "interleaved"]


@dataclass(frozen=True, slots=True)
class Rotary:
    """kind      which values of a head rotate as a pair: one from each half, or neighbours
    theta     the base
    part      the share of each head that is rotated
    offset    added to the positions of the queries (the keys' positions are 0, 1, ...)
    stretch   factor of the positions (linear scaling)"""

    kind: Kind = "none"
    theta: float = 10000.0
    part: float = 1.0
    offset: float = 0.0
    stretch: float = 1.0


def rotate(x: Array, positions: Array, how: Rotary) -> Array:
    """x (B, T, H, h) rotated by the angles of `positions` (T,)."""
    if how.kind == "none":
        return x
    turned = int(x.shape[-1] * how.part) // 2 * 2
    if turned < 2:
        return x
    inverse = how.theta ** -(np.arange(0, turned, 2, dtype=np.float64) / turned)
    angles = (positions.astype(np.float64) * how.stretch)[:, None] * inverse
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    head, rest = x[..., :turned], x[..., turned:]
    if how.kind == "interleaved":
        a, b = head[..., ::2], head[..., 1::2]
        out = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(head.shape)
    else:
        a, b = head[..., : turned // 2], head[..., turned // 2 :]
        out = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return np.concatenate([out, rest], axis=-1) if rest.shape[-1] else out


THETAS: tuple[float, ...] = (10000.0, 500000.0, 1000000.0, 100000.0, 1000.0, 100.0, 200000.0, 5000000.0, 10000000.0)
PARTS: tuple[float, ...] = (1.0, 0.5, 0.25, 0.75)
STRETCHES: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 2.0, 4.0)
OFFSETS: tuple[float, ...] = (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, 4.0)
