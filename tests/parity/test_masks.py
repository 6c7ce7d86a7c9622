"""Masks of huge numbers among what layers hand on."""

from __future__ import annotations

import numpy as np

from graftax.parity.metrics import relative_l2
from graftax.parity.teacher_forced import beneath_mask

LOWEST = np.finfo(np.float32).min


def masked(bias: np.ndarray) -> np.ndarray:
    out = bias.copy()
    out[..., -2:] = LOWEST
    return out


def test_a_bias_with_a_mask_in_it_is_not_the_mask_alone() -> None:
    bias = np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype(np.float32)
    alone = masked(np.zeros_like(bias))
    assert relative_l2(masked(bias), alone) < 1e-6
    assert beneath_mask(masked(bias), alone) > 0.5
    assert beneath_mask(masked(bias), masked(bias)) == 0.0


def test_masks_of_other_numbers_or_places_are_not_the_same() -> None:
    bias = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    assert beneath_mask(masked(bias), np.where(masked(bias) == LOWEST, np.float32(-1e10), bias)) > 0.5
    assert beneath_mask(masked(bias), masked(bias)[:, ::-1]) > 0.5


def test_a_mask_that_agrees_does_not_stand_for_an_input_that_cannot_be_matched():
    from graftax.parity.align import Alignment
    from graftax.parity.teacher_forced import fits

    mask = np.where(np.tri(5, dtype=bool), 0, -1e9).astype(np.float32)
    x, other = np.ones((3, 4), np.float32), np.ones((7, 2), np.float32)
    assert fits([x, mask], [other, mask], Alignment(), outward=False) == ()
    assert len(fits([x, mask], [x, mask], Alignment(), outward=False)) == 2
    assert len(fits([mask], [mask], Alignment(), outward=False)) == 1
