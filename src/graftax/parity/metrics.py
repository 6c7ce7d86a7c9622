"""Measure errors: relative L2, the rows of outputs, the metrics of outputs, the alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from graftax.parity.records import THRESHOLD, UNIT
from graftax.parity.report.model import OutputRow, ratio_of

Array = np.ndarray[Any, Any]
LOGITS = 2
"""An output with at least this many values on its last axis counts as logits: top-1 and KL are measured."""


def relative_l2(got: Any, want: Any) -> float:
    """|got - want| / |want| over all values; |got| if `want` is all zeros. Infinite if a value is NaN or infinite on
    one side only, or if the shapes differ. Equal values (also two infinities) differ by 0."""
    a, b = np.asarray(got), np.asarray(want)
    if a.shape != b.shape:
        return math.inf
    if not a.size:
        return 0.0
    if a.dtype == np.float32 and b.dtype == np.float32:
        fast = _fast(a.reshape(-1), b.reshape(-1))
        if fast is not None:
            return fast
    a, b = _wide(a), _wide(b)
    with np.errstate(invalid="ignore", over="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.where(same, 0.0, a - b)
        usable = np.isfinite(b)
        scale = math.sqrt(float(np.sum(np.abs(b[usable]) ** 2)))
        distance = math.sqrt(float(np.sum(np.abs(difference) ** 2)))
    if not math.isfinite(distance):
        return math.inf
    return distance / scale if scale > 0 else distance


def cosine(got: Any, want: Any) -> float:
    """The cosine of two arrays as vectors: 1 if they are equal, 0 if only one is all zeros. NaN if the shapes differ,
    or if a value is NaN or infinite on one side only."""
    a, b = np.asarray(got), np.asarray(want)
    if a.shape != b.shape:
        return math.nan
    a, b = _wide(a).reshape(-1), _wide(b).reshape(-1)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 1.0
    usable = np.isfinite(a) | ~same  # a value that is infinite on both sides has no share
    a, b = a[usable], b[usable]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    peaks = float(np.max(np.abs(a), initial=0.0)), float(np.max(np.abs(b), initial=0.0))
    if not all(peaks):
        return 0.0
    a, b = a / peaks[0], b / peaks[1]  # squares stay in range
    length = math.sqrt(float(np.vdot(a, a).real) * float(np.vdot(b, b).real))
    return max(-1.0, min(1.0, float(np.vdot(b, a).real) / length))


def _fast(a: Array, b: Array) -> float | None:
    """The same by float32 dot products, with a relative accuracy of 1e-4; None if a sum leaves float32's range."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = a - b
        distance, scale = float(np.dot(difference, difference)), float(np.dot(b, b))
    if math.isfinite(distance) and 1e-30 < scale < 1e30 and (distance > 1e-30 or not difference.any()):
        return math.sqrt(distance / scale)
    return None


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def output_row(
    path: str,
    got: Any,
    want: Any,
    float32: Any,
    *,
    threshold: float = THRESHOLD,
    atol: float | None = None,
    rtol: float | None = None,
) -> OutputRow:
    """Compare one output array with the float64 reference; torch float32's own error is the floor.

    atol, rtol   if either is given, the output is right if |got - want| <= atol + rtol * |want| everywhere,
                 as in numpy.allclose
    """
    got, want, float32 = np.asarray(got), np.asarray(want), np.asarray(float32)
    shape = tuple(int(n) for n in want.shape)
    if got.shape != want.shape:
        text = f"shape mismatch: Flax gives {tuple(got.shape)}, torch {shape}"
        return OutputRow(path, shape, math.inf, 0.0, math.inf, False, {}, text)
    error, floor = relative_l2(got, want), relative_l2(float32, want)
    if floor > 1e-2 and not math.isfinite(floor):
        floor = 0.0
    ratio = ratio_of(error, floor) or 0.0
    ok = ratio <= threshold
    text = ""
    metrics = dict(metrics_of(got, want))
    if want.dtype.kind in "biu":
        ok = bool(np.array_equal(got, want))
        text = "" if ok else "integers differ"
    if atol is not None or rtol is not None:
        outside = _outside(got, want, atol or 0.0, rtol or 0.0)
        metrics |= {"atol": atol or 0.0, "rtol": rtol or 0.0, "outside": float(outside)}
        ok = outside == 0
        text = "" if ok else f"{outside} of {want.size} values are outside atol={atol or 0.0:g} rtol={rtol or 0.0:g}"
    return OutputRow(path, shape, error, floor, ratio, ok, metrics, text)


def _outside(got: Array, want: Array, atol: float, rtol: float) -> int:
    a, b = _wide(got), _wide(want)
    with np.errstate(invalid="ignore"):
        near = (a == b) | (np.abs(a - b) <= atol + rtol * np.abs(b)) | (np.isnan(a) & np.isnan(b))
    return int(a.size - np.count_nonzero(near))


def metrics_of(got: Array, want: Array) -> Mapping[str, float]:
    """max_abs; for floating arrays with a last axis: top-1 agreement, KL(torch | Flax) of the softmax in nats, and the
    smallest cosine of two rows."""
    if not want.size or got.dtype.kind not in "fiub" or want.dtype.kind not in "fiub":
        return {}
    a, b = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        out = {"max_abs": float(np.max(np.abs(np.where(a == b, 0.0, a - b))))}
        if want.dtype.kind != "f" or want.ndim < 2 or want.shape[-1] < LOGITS:
            return out
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        out["top1"] = float(np.mean(np.argmax(a, -1) == np.argmax(b, -1)))
        out["kl"] = float(np.mean(kl_of_rows(b, a)))
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = np.where(norms > 0, np.sum(a * b, -1) / np.where(norms > 0, norms, 1.0), 1.0)
        out["cosine"] = float(np.min(cosine))
    return out


def kl_of_rows(p: Array, q: Array) -> Array:
    """KL(p | q) in nats of the softmax over the last axis of two arrays of logits, one value for each row. Equal rows
    give 0; a NaN on one side only gives infinity."""
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = _log_softmax(p.astype(np.float64)), _log_softmax(q.astype(np.float64))
        found = np.sum(np.where(np.exp(a) == 0, 0.0, np.exp(a) * (a - b)), -1)
        same = np.all((p == q) | (np.isnan(p) & np.isnan(q)), -1)
        return np.where(same, 0.0, np.where(np.isnan(found), np.inf, np.maximum(found, 0.0)))


def _log_softmax(x: Array) -> Array:
    shifted = x - np.max(x, -1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), -1, keepdims=True))


def alarms(error: float | None, floor: float, threshold: float = THRESHOLD) -> bool:
    """Is the error larger than float32 explains? An error of None (nothing was compared) is no alarm."""
    return error is not None and not error <= threshold * max(floor, UNIT)
