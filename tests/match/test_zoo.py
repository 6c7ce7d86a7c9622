"""Real models written by different people: every pair exact both ways, from names and shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftax.formats import open_path
from graftax.match import infer
from graftax.match.names import Lexicon
from graftax.ops import apply_chain, same_bits
from graftax.plans import Proposal

CASES = (
    "albert-maskedlm", "bart-cg", "bert-bf16", "bert-model", "clip-model", "diffusers-vae", "flaxmodels-resnet18",
    "gpt2-lm", "gpt2-model", "jaxnn-vit", "llama-lm", "mamba2-untied", "resnet-square", "scan-vit", "t5-cg",
    "tunix-llama3", "tunix-qwen3", "vitax-vit", "wav2vec2-model", "whisper-model",
)  # fmt: skip


def _compare(folder: Path, reverse: bool, lex: Lexicon | None = None) -> tuple[list[str], list[str], Proposal]:
    """(leaves that differ, leaves that stay open, the proposal)."""
    names = ("truth", "like_torch", "torch") if reverse else ("torch", "like", "truth")
    source, like, truth = (open_path(str(folder / f"{name}.safetensors")) for name in names)
    sides = ("flax", "torch") if reverse else ("torch", "flax")
    found = infer(source, like, sides[0], sides[1], Proposal(), lex)
    wrong: list[str] = []
    filled: set[str] = set()
    for entry in found.entries:
        out: tuple[Any, ...] = apply_chain(entry.ops, tuple(source.read(name) for name in entry.sources))
        for name, array in zip(entry.targets, out, strict=True):
            filled.add(name)
            if not same_bits(np.ascontiguousarray(array).reshape(array.shape), truth.read(name)):
                wrong.append(name)
    return wrong, [name for name in like if name not in filled], found


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_real_pair_is_exact(zoo: Path, case: str, reverse: bool) -> None:
    wrong, open_, found = _compare(zoo / case, reverse)
    assert wrong == []
    assert open_ == []
    assert found.questions == ()


@pytest.mark.parametrize("case", CASES)
def test_a_real_pair_is_never_wrong_without_synonyms(zoo: Path, case: str) -> None:
    wrong, _, _ = _compare(zoo / case, False, Lexicon.empty())
    assert wrong == []
