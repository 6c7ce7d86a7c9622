"""Silero VAD's safetensors: a spectrogram as a convolution, an LSTM cell, a projection as a convolution of one."""

from __future__ import annotations

import numpy as np
import pytest

from . import models_silero as models
from .conftest import Weights
from .harness import Case, Ported, check_back, check_nothing_is_guessed, check_parity, inspect

pytestmark = pytest.mark.slow


def frames(rng: np.random.Generator) -> list[np.ndarray]:
    """Three tracks of five frames: a tone that wanders, with noise."""
    phase = np.cumsum(rng.uniform(0, 0.5, (5, 3, models.SAMPLES)), -1)
    return [(0.3 * np.sin(phase) + 0.02 * rng.standard_normal(phase.shape)).astype(np.float32)]


LINEN = """
  { torch = "final_conv.weight", flax = "params/head/kernel", ops = "o i 1 -> i o" },
"""
FILE = "silero_vad_16k.safetensors"
SUMMED = (("lstm_cell.bias_ih", "lstm_cell.bias_hh"),)
CASES = [
    Case("linen", FILE, models.Torch, models.linen_like, frames, models.Linen, LINEN, summed=SUMMED),
    Case("nnx", FILE, models.Torch, models.nnx_like, frames, summed=SUMMED),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def ported(request: pytest.FixtureRequest, weights: Weights) -> Ported:
    return Ported(request.param, weights("silero-vad")[request.param.file])


def test_inspect(weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, weights("silero-vad")[FILE])
    assert (found["format"], found["leaves"], found["dtypes"]) == ("safetensors", 15, {"float32": 15})
    assert found["parameters"] == 309_633


def test_parity(ported: Ported) -> None:
    check_parity(ported)


def test_back(ported: Ported) -> None:
    check_back(ported)


def test_nothing_is_guessed(ported: Ported) -> None:
    check_nothing_is_guessed(ported)
