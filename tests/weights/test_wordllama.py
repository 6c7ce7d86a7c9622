"""WordLlama's table of token embeddings in half precision: kept as it is, or widened where it is asked for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import graftax as gx
from graftax.errors import PlanError

from . import models_wordllama as models
from .conftest import Weights
from .harness import Case, Ported, check_back, check_nothing_is_guessed, check_parity, inspect

pytestmark = pytest.mark.slow
FILE = "l2_supercat_256.safetensors"


def sentences(rng: np.random.Generator) -> list[np.ndarray]:
    """Four of 24, 17, 9 and 3 tokens, padded."""
    mask = np.arange(24)[None] < np.array([24, 17, 9, 3])[:, None]
    return [rng.integers(0, models.TOKENS, (4, 24)), mask]


CASES = [
    Case("linen", FILE, models.Torch, models.linen_like, sentences, models.Linen),
    Case("nnx", FILE, models.Torch, models.nnx_like, sentences, options={"dtype": "like"}),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def ported(request: pytest.FixtureRequest, weights: Weights) -> Ported:
    return Ported(request.param, weights("wordllama")[request.param.file])


def test_inspect(weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, weights("wordllama")[FILE])
    assert found["tensors"] == {"embedding.weight": {"shape": [32000, 256], "dtype": "float16"}}


def test_parity(ported: Ported) -> None:
    check_parity(ported)


def test_back(ported: Ported) -> None:
    check_back(ported)


def test_nothing_is_guessed(ported: Ported) -> None:
    check_nothing_is_guessed(ported)


def test_half_precision_is_not_widened_unasked(weights: Weights) -> None:
    path, like = weights("wordllama")[FILE], models.nnx_like()
    with pytest.raises(PlanError) as caught:
        gx.port(path, like)
    for word in ("float16", "float32", 'dtype="like"', 'dtype="source"'):
        assert word in str(caught.value)
    assert gx.port(path, like, dtype="like").embed.embedding.dtype == jnp.float32
    assert gx.port(path, like, dtype="source").embed.embedding.dtype == jnp.float16
