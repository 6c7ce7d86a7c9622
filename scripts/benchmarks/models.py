"""Synthetic pairs of checkpoints (names and shapes, no values) under two naming habits."""

from __future__ import annotations

from graftax.tree import Checkpoint, TensorSpec

Specs = dict[str, TensorSpec]
D, H = 64, 256


def decoder(layers: int, experts: int = 0) -> tuple[Checkpoint, Checkpoint]:
    """A deep decoder (9 tensors a layer), or one with experts (6 + 3 for each expert): torch and Flax."""
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


def _add(torch: Specs, flax: Specs, name: str, other: str, shape: tuple[int, ...]) -> None:
    torch[name] = TensorSpec(shape, "float32")
    flax[other] = TensorSpec(shape[::-1] if other.endswith("kernel") else shape, "float32")


SIZES: dict[str, tuple[int, int]] = {
    "deep 1,000": (111, 0),
    "deep 10,000": (1111, 0),
    "deep 100,000": (11111, 0),
    "256 experts 100,000": (129, 256),
}
"""name -> (layers, experts)."""
