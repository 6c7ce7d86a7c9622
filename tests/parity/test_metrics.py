"""The numbers of a verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graftax.parity.metrics import alarms, output_row, relative_l2
from graftax.parity.records import UNIT


def test_relative_l2_is_what_it_says():
    rng = np.random.default_rng(0)
    want = rng.normal(size=(40, 50)).astype(np.float32)
    for size in (1.0, 1e-3, 1e-7):
        got = (want + size * rng.normal(size=want.shape)).astype(np.float32)
        exact = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64))
        assert relative_l2(got, want) == pytest.approx(exact, rel=1e-4)
        assert relative_l2(got.astype(np.float64), want) == pytest.approx(exact, rel=1e-12)
    assert relative_l2(want, want) == 0.0
    assert relative_l2(want[:0], want[:0]) == 0.0


def test_values_beyond_float32_sums():
    tiny = np.full(10, 1e-25, np.float32)
    assert relative_l2(tiny * np.float32(1.5), tiny) == pytest.approx(0.5, rel=1e-3)
    huge = np.full(10, 1e25, np.float32)
    assert relative_l2(huge * np.float32(1.5), huge) == pytest.approx(0.5, rel=1e-3)
    near = np.full(10, 1.0, np.float32)
    assert 0 < relative_l2(np.nextafter(near, 2, dtype=np.float32), near) < 2e-7


def test_nan_and_infinity():
    want = np.array([1.0, -np.inf, 2.0], np.float32)
    assert relative_l2(want, want) == 0.0
    assert relative_l2(np.array([1.0, np.nan, 2.0], np.float32), want) == math.inf
    assert relative_l2(np.array([1.0, 3.0, 2.0], np.float32), want) == math.inf
    assert relative_l2(np.array([1.0, np.inf, 2.0], np.float32), want) == math.inf
    assert relative_l2(np.ones(2), np.ones(3)) == math.inf
    assert relative_l2(np.array([0.5]), np.array([0.0])) == 0.5


def test_alarms():
    assert not alarms(None, 0.0)
    assert not alarms(4.9 * UNIT, 0.0)
    assert alarms(5.1 * UNIT, 0.0)
    assert not alarms(5.1 * UNIT, 2 * UNIT)
    assert alarms(math.nan, 1.0)
    assert alarms(math.inf, 1.0)


def test_an_output_is_judged_by_torchs_own_float32_error():
    rng = np.random.default_rng(1)
    want = rng.normal(size=(4, 10)).astype(np.float32)
    low = want + 1e-6 * rng.normal(size=want.shape).astype(np.float32)
    near = want + 3e-6 * rng.normal(size=want.shape).astype(np.float32)
    far = want + 9e-6 * rng.normal(size=want.shape).astype(np.float32)
    assert output_row("", near, want, low).ok
    row = output_row("logits", far, want, low)
    assert not row.ok
    assert row.ratio > 5
    assert row.metrics["top1"] == 1.0
    assert 0 <= row.metrics["kl"] < 1e-9
    assert row.metrics["cosine"] == pytest.approx(1.0)
    assert row.metrics["max_abs"] == pytest.approx(np.abs(far - want).max())
    assert output_row("", near, want, want).ratio > 5, "against the unit where torch is exact"


def test_metrics_mean_what_they_say():
    want = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], np.float32)
    got = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]], np.float32)
    row = output_row("", got, want, want)
    assert row.metrics["top1"] == 0.5
    p = np.exp(want) / np.exp(want).sum(-1, keepdims=True)
    q = np.exp(got) / np.exp(got).sum(-1, keepdims=True)
    assert row.metrics["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert row.metrics["cosine"] == pytest.approx(4 / 5)


def test_tolerances_on_request_decide():
    want = np.ones((2, 3), np.float32)
    got = want + np.float32(1e-3)
    assert not output_row("", got, want, want).ok
    assert output_row("", got, want, want, atol=2e-3).ok
    row = output_row("", got, want, want, rtol=1e-4)
    assert not row.ok
    assert row.metrics["outside"] == 6
    assert "6 of 6 values are outside atol=0 rtol=0.0001" in row.text


def test_shapes_and_integers():
    row = output_row("x", np.ones((2, 3)), np.ones((3, 2)), np.ones((3, 2)))
    assert not row.ok
    assert row.text == "shape mismatch: Flax gives (2, 3), torch (3, 2)"
    ids = np.array([1, 2, 3])
    assert output_row("", ids, ids, ids).ok
    assert not output_row("", np.array([1, 2, 4]), ids, ids).ok
