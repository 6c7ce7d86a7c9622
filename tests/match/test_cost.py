"""Planning grows about linearly with the number of tensors; the bounds leave room for a busy machine."""

from __future__ import annotations

import time

import pytest

from graftax.match import infer
from graftax.plans import Proposal
from graftax.tree import Checkpoint, TensorSpec

Specs = dict[str, TensorSpec]
D, H = 64, 256


def _add(torch: Specs, flax: Specs, name: str, other: str, shape: tuple[int, ...]) -> None:
    torch[name] = TensorSpec(shape, "float32")
    flax[other] = TensorSpec(shape[::-1] if other.endswith("kernel") else shape, "float32")


def decoder(layers: int, experts: int = 0) -> tuple[Checkpoint, Checkpoint]:
    """A deep decoder, or one with experts, under two naming habits."""
    torch: Specs = {}
    flax: Specs = {}
    _add(torch, flax, "model.embed_tokens.weight", "params/embed/embedding", (1000, D))
    for i in range(layers):
        t, f = f"model.layers.{i}", f"params/layers_{i}"
        for a, b, out in (("q", "query", D), ("k", "key", D // 2), ("v", "value", D // 2), ("o", "out", D)):
            _add(torch, flax, f"{t}.self_attn.{a}_proj.weight", f"{f}/attention/{b}/kernel", (out, D))
        parts = [(f".experts.{e}", f"/experts_{e}") for e in range(experts)] or [("", "")]
        for a, b in parts:
            for name, role, shape in (("gate", "gate", (H, D)), ("up", "up", (H, D)), ("down", "down", (D, H))):
                _add(torch, flax, f"{t}.mlp{a}.{name}_proj.weight", f"{f}/mlp{b}/{role}/kernel", shape)
        _add(torch, flax, f"{t}.input_layernorm.weight", f"{f}/attention_norm/scale", (D,))
        _add(torch, flax, f"{t}.post_attention_layernorm.weight", f"{f}/mlp_norm/scale", (D,))
    _add(torch, flax, "model.norm.weight", "params/final_norm/scale", (D,))
    _add(torch, flax, "lm_head.weight", "params/lm_head/kernel", (1000, D))
    return Checkpoint("torch", "torch", torch), Checkpoint("flax", "flax", flax)


def _plan(source: Checkpoint, like: Checkpoint) -> float:
    start = time.process_time()
    found = infer(source, like, "torch", "flax", Proposal())
    seconds = time.process_time() - start
    assert not found.questions
    assert len(found.entries) == len(like)
    return seconds


def test_a_thousand_tensors_in_a_blink() -> None:
    ends = decoder(110)
    assert min(_plan(*ends) for _ in range(3)) < 0.25


def test_cost_grows_about_linearly() -> None:
    small, large = decoder(110), decoder(1110)
    one = min(_plan(*small) for _ in range(3))
    ten = min(_plan(*large) for _ in range(2))
    assert ten < 30 * one


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts"), [(11110, 0), (130, 256)], ids=["deep", "experts"])
def test_a_hundred_thousand_tensors(layers: int, experts: int) -> None:
    assert _plan(*decoder(layers, experts)) < 15
