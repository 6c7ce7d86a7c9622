"""Resemblyzer's pretrained.pt: three LSTMs in a legacy pickle, beside the optimizer's state and a loss's weights."""

from __future__ import annotations

import numpy as np
import pytest

import graftax as gx

from . import models_resemblyzer as models
from .conftest import Weights
from .harness import Case, Ported, check_back, check_nothing_is_guessed, check_parity, inspect

pytestmark = pytest.mark.slow


def spectrograms(rng: np.random.Generator) -> list[np.ndarray]:
    """Four of 1.6 s, as large as those of speech."""
    return [np.abs(0.02 * rng.standard_normal((4, 160, models.MELS))).astype(np.float32)]


DROPPED = """
  { torch = "similarity_weight", drop = "the training loss" },
  { torch = "similarity_bias", drop = "the training loss" },
"""


SUMMED = tuple((f"lstm.bias_ih_l{i}", f"lstm.bias_hh_l{i}") for i in range(models.LAYERS))
CASES = [
    Case(
        "linen",
        "pretrained.pt",
        models.Torch,
        models.linen_like,
        spectrograms,
        models.Linen,
        DROPPED,
        summed=SUMMED,
    ),
    Case("nnx", "pretrained.pt", models.Torch, models.nnx_like, spectrograms, rules=DROPPED, summed=SUMMED),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def ported(request: pytest.FixtureRequest, weights: Weights) -> Ported:
    return Ported(request.param, weights("Resemblyzer")[request.param.file])


def test_inspect(weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights("Resemblyzer")["pretrained.pt"]
    found = inspect(capsys, path)
    assert (found["format"], found["leaves"], found["dtypes"]) == ("torch", 16, {"float32": 16})
    assert found["metadata"]["container"] == "model_state"
    assert "not read" in found["metadata"]["optimizer_state"]
    assert inspect(capsys, f"{path}::model_state")["tensors"] == found["tensors"]


def test_parity(ported: Ported) -> None:
    check_parity(ported)


def test_back(ported: Ported) -> None:
    check_back(ported)


def test_nothing_is_guessed(ported: Ported) -> None:
    check_nothing_is_guessed(ported)


def test_the_weights_of_the_loss_are_not_dropped_unasked(weights: Weights) -> None:
    plan = gx.plan(weights("Resemblyzer")["pretrained.pt"], models.nnx_like())
    asked = {name for question in plan.questions for name in (*question.sources, *question.targets)}
    assert asked == {"similarity_weight", "similarity_bias"}
