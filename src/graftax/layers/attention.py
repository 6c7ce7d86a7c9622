"""Rows for attention: torch's MultiheadAttention and a fused projection of query, key and value."""

from __future__ import annotations

import re
from collections.abc import Iterable

from graftax.layers.base import Layer, LayerFacts, LayerForm, Makes, Refusal, Setting, Step
from graftax.layers.leaf_axes import ATTENTION_AXES
from graftax.ops import Rearrange, Split

_PARTS = ("query", "key", "value")


def _heads(facts: LayerFacts) -> tuple[int, int] | None:
    """(heads, head_dim) of the Flax side."""
    for role in ("query/kernel", "key/kernel", "value/kernel"):
        shape = facts.flax.get(role, ())
        if len(shape) == 3:
            return shape[1], shape[2]
    return None


def attention_form(facts: LayerFacts) -> Iterable[LayerForm]:
    """torch in_proj_weight (3 H h, D), or one weight per projection, to query, key, value (D, H, h) and out (H, h,
    D)."""
    found = _heads(facts)
    if found is None:
        return
    heads, head = found
    width = heads * head
    sizes = (("d", head), ("h", heads))
    split = Rearrange("(h d) i -> i h d", sizes)
    bias = Rearrange("(h d) -> h d", sizes)
    thirds = Split(0, (width,) * 3)
    biases = tuple(f"{name}/bias" for name in _PARTS)
    if "in_proj_weight" in facts.torch:
        kernels: tuple[Step, ...] = (Step("in_proj_weight", tuple(f"{n}/kernel" for n in _PARTS), (thirds, split)),)
        variant = "fused in_proj_weight"
    else:
        kernels = tuple(Step(f"{n[0]}_proj_weight", f"{n}/kernel", (split,)) for n in _PARTS)
        variant = "separate q, k, v weights"
    steps = (
        *kernels,
        Step("in_proj_bias", biases, (thirds, bias), optional=True),
        Step("out_proj.weight", "out/kernel", (Rearrange("o (h d) -> h d o", sizes),)),
        Step("out_proj.bias", "out/bias", optional=True),
    )
    yield LayerForm(
        variant,
        steps,
        why="Flax's attention has an axis for the heads, torch's MultiheadAttention has none",
    )


def _is_attention(facts: LayerFacts) -> bool:
    """False for a parameter of a user's own attention that happens to have the name."""
    return bool(_heads(facts)) and ("in_proj_weight" in facts.torch or "q_proj_weight" in facts.torch)


def _grouped_heads(facts: LayerFacts) -> bool:
    heads = facts.flax_settings.get("num_heads")
    kv = facts.flax_settings.get("num_kv_heads")
    return _is_attention(facts) and None not in (heads, kv) and heads != kv


# ---------------------------------------------------------------- fused query, key, value

_LETTER = re.compile(r"(?:.*[./_])?(?:to_|w_?)?(query|key|value|q|k|v)(?:_?(?:proj|lin|kernel|dense))?", re.IGNORECASE)


def projection_letter(role: str) -> str:
    """q, k or v for a role such as 'query/kernel', 'to_q/kernel', 'k_proj/bias'; '' for another."""
    module, _, leaf = role.rpartition("/")
    found = _LETTER.fullmatch(module) if leaf in ("kernel", "bias") else None
    return found[1][0].lower() if found else ""


ATTENTION_ROWS: tuple[Layer, ...] = (
    Layer(
        "MultiheadAttention",
        torch=("MultiheadAttention",),
        linen=("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"),
        nnx=("MultiHeadAttention",),
        forms=(
            Makes(
                attention_form,
                (
                    "in_proj_weight, in_proj_bias -> query, key, value: split in 3, then (h d) i -> i h d",
                    "q_proj_weight, k_proj_weight, v_proj_weight (kdim, vdim) -> query, key, value: (h d) i -> i h d",
                    "out_proj.weight -> out/kernel: o (h d) -> h d o",
                ),
            ),
        ),
        settings=(
            Setting.same("num_heads"),
        ),
        refusals=(
            Refusal(
                lambda f: ("bias_k" in f.torch or "bias_v" in f.torch) and _is_attention(f),
                "bias_k and bias_v",
                "Flax attention has no learned extra key and value position",
                "Append them by hand: two parameters (1, 1, D), concatenated to the projected keys and values.",
            ),
            Refusal(
                lambda f: bool(f.torch_settings.get("add_zero_attn")) and f.torch_kind == "MultiheadAttention",
                "add_zero_attn",
                "Flax attention has no extra position of zeros",
                "Append a zero key and value by hand before the attention.",
            ),
            Refusal(
                _grouped_heads,
                "num_kv_heads against MultiheadAttention",
                "torch's MultiheadAttention has as many key and value heads as query heads",
                "Set num_kv_heads=num_heads, or average and repeat the torch heads first.",
            ),
        ),
        axes=ATTENTION_AXES,
        note="in_proj_weight (3D, D): split in 3, transpose, THEN cut into heads (D, H, h); out (H, h, D). kdim and "
        "vdim give three weights. A boolean mask means the opposite in Flax.",
    ),
)  # fmt: skip
