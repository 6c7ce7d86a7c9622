"""Resize maps as torch and JAX do, in float64: one matrix (given, taken) for each axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from graftax.parity.causes.numbers import Array


@dataclass(frozen=True, slots=True)
class Method:
    """kernel, radius   the weight by distance, and the distance beyond which it is 0
    antialias   the kernel is widened if the map gets smaller
    corners     the outermost samples of both maps coincide (align_corners)
    clamped     samples beyond the edge take the edge's value (torch without antialias); otherwise they are left out and
                the rest is normalised (torch with antialias, JAX)
    swapped     the table's height and width are swapped first
    fix         the Flax code that does it
    """

    kernel: Callable[[Array], Array]
    radius: float
    fix: str
    antialias: bool = False
    corners: bool = False
    clamped: bool = False
    swapped: bool = False


def _linear(x: Array) -> Array:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(a: float) -> Callable[[Array], Array]:
    def kernel(x: Array) -> Array:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def _nearest(x: Array) -> Array:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _lanczos(radius: int) -> Callable[[Array], Array]:
    return lambda x: np.where(np.abs(x) < radius, np.sinc(x) * np.sinc(x / radius), 0.0)


_FLAX = "jax.image.resize(maps, shape, {!r}, antialias={})"
_HAND = "resize by weights worked out by hand: jax.image.scale_and_translate has no torch {}"

METHODS: Mapping[str, Method] = {
    "bilinear": Method(_linear, 1, _FLAX.format("linear", False)),
    "bilinear with antialias": Method(_linear, 1, _FLAX.format("linear", True), antialias=True),
    "bicubic (a=-0.75)": Method(_cubic(-0.75), 2, _HAND.format("bicubic (a=-0.75)"), clamped=True),
    "bicubic (a=-0.5) with antialias": Method(_cubic(-0.5), 2, _FLAX.format("cubic", True), antialias=True),
    "bicubic (a=-0.5)": Method(_cubic(-0.5), 2, _FLAX.format("cubic", False)),
    "bicubic (a=-0.5), clamped": Method(_cubic(-0.5), 2, _HAND.format("bicubic"), clamped=True),
    "bilinear, corners aligned": Method(_linear, 1, _HAND.format("align_corners"), corners=True, clamped=True),
    "bicubic (a=-0.75), corners aligned": Method(
        _cubic(-0.75), 2, _HAND.format("align_corners"), corners=True, clamped=True
    ),
    "nearest (centres)": Method(_nearest, 0.5, _FLAX.format("nearest", False), clamped=True),
    "lanczos3 with antialias": Method(_lanczos(3), 3, _FLAX.format("lanczos3", True), antialias=True),
    "bilinear, height and width exchanged": Method(_linear, 1, _FLAX.format("linear", False), swapped=True),
    "bilinear with antialias, height and width exchanged": Method(
        _linear, 1, _FLAX.format("linear", True), antialias=True, swapped=True
    ),
    "bicubic (a=-0.75), height and width exchanged": Method(
        _cubic(-0.75), 2, _HAND.format("bicubic (a=-0.75)"), clamped=True, swapped=True
    ),
}
"""Name in a report -> method. The likely ones come first."""


def matrix(taken: int, given: int, how: Method) -> Array:
    """(given, taken): the weights of the samples."""
    scale = taken / given
    if how.corners:
        centres = np.linspace(0, taken - 1, given) if given > 1 else np.zeros(1)
    else:
        centres = (np.arange(given) + 0.5) * scale - 0.5
    width = max(scale, 1.0) if how.antialias else 1.0
    reach = int(np.ceil(how.radius * width)) + 1
    out = np.zeros((given, taken))
    for row, centre in enumerate(centres):
        at = np.arange(int(np.floor(centre)) - reach, int(np.floor(centre)) + reach + 2)
        weights = how.kernel((at - centre) / width)
        if how.clamped:
            np.add.at(out[row], np.clip(at, 0, taken - 1), weights)
        else:
            inside = (at >= 0) & (at < taken)
            out[row, at[inside]] = weights[inside]
        total = out[row].sum()
        if total:
            out[row] /= total
    return out


def resize(maps: Array, given: tuple[int, int], how: Method) -> Array:
    """(H, W, C) -> (given[0], given[1], C)."""
    if how.swapped:
        maps = maps.reshape(maps.shape[1], maps.shape[0], -1).swapaxes(0, 1)
    rows, columns = (matrix(taken, n, how) for taken, n in zip(maps.shape[:2], given, strict=True))
    return np.einsum("ah,bw,hwc->abc", rows, columns, maps.astype(np.float64), optimize=True)
