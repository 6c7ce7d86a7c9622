"""Names inside of paired parts: the words of the parts mean the same, and so do words that stand for each other."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import graftax as gx

D = 8


def _plan(torch: dict[str, tuple[int, ...]], flax: dict[str, tuple[int, ...]], **options: Any) -> gx.Plan:
    like: dict[str, Any] = {}
    for path, shape in flax.items():
        *above, last = path.split("/")
        at = like
        for part in above:
            at = at.setdefault(part, {})
        at[last] = jax.ShapeDtypeStruct(shape, np.float32)
    rng = np.random.default_rng(0)
    source = {name: rng.normal(size=shape).astype("f4") for name, shape in torch.items()}
    return gx.plan(source, like, source_side="torch", to="flax", **options)


def _paired(plan: gx.Plan) -> dict[str, str]:
    return {target: source for entry in plan.entries for source in entry.sources for target in entry.targets}


def _linears(part: str, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{part}.{name}.weight": (D, D) for name in names}


def _kernels(part: str, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{part}/{name}/kernel": (D, D) for name in names}


def test_names_are_compared_inside_of_two_paired_parts() -> None:
    plan = _plan(
        {"embeddings.cls_token": (1, 1, D), "embeddings.patch_embeddings.projection.weight": (D, 3, 2, 2)},
        {"pos_embeddings/cls_token": (1, 1, D), "pos_embeddings/projection/kernel": (2, 2, 3, D)},
    )
    assert plan.complete


def test_one_leaf_does_not_tell_which_of_two_parts_it_is() -> None:
    plan = _plan(
        {"core.decay.weight": (3, D), **_linears("core", "fc1", "fc2"), **_linears("side", "fc1", "fc2")},
        {"u/decay/kernel": (D, 3), **_kernels("u", "fc1", "fc2"), **_kernels("w", "fc1", "fc2")},
    )
    assert not [target for target in _paired(plan) if "fc" in target]


def test_a_stranger_inside_of_paired_parts_is_asked_about() -> None:
    plan = _plan(
        {"temporal.decay.weight": (3, D), **_linears("temporal", "fc", "adapter")},
        {"recurrent/decay/kernel": (D, 3), **_kernels("recurrent", "fc", "bridge")},
    )
    assert _paired(plan)["recurrent/fc/kernel"] == "temporal.fc.weight"
    assert "recurrent/bridge/kernel" not in _paired(plan)


def test_a_word_means_what_stands_in_its_place_elsewhere() -> None:
    plan = _plan(
        {"cell.lru.recurrent_table.weight": (3, D), **_linears("cell.lru", "recurrent_gate", "input_gate")},
        {"recurrent/lru/a_table/kernel": (D, 3), **_kernels("recurrent/lru", "a_gate", "input_gate")},
    )
    assert plan.complete
    assert _paired(plan)["recurrent/lru/a_gate/kernel"] == "cell.lru.recurrent_gate.weight"


@pytest.mark.parametrize(
    ("torch", "flax", "found"),
    [
        ("norm", "Head_0/LayerNorm_0", True),
        ("post_layernorm", "Transformer/encoder_norm", True),
        ("pre_layernorm", "Transformer/encoder_norm", False),
        ("norm", "adapter/norm", False),
    ],
)
def test_the_only_norm_outside_of_the_blocks_is_the_last(torch: str, flax: str, found: bool) -> None:
    plan = _plan(
        {"blocks.0.fc.weight": (D, D), "blocks.1.fc.weight": (D, D), "head.weight": (5, D), f"{torch}.weight": (D,)},
        {
            "block_0/fc/kernel": (D, D),
            "block_1/fc/kernel": (D, D),
            "Head_0/Dense_0/kernel": (D, 5),
            f"{flax}/scale": (D,),
        },
    )
    assert (f"{flax}/scale" in _paired(plan)) is found


def test_an_encoder_is_a_tower_only_beside_a_decoder() -> None:
    places = [(i, j) for i in (0, 1) for j in (0, 1)]
    torch = {f"levels.{i}.transformer_encoder.{j}.mlp.fc1.weight": (12, D) for i, j in places}
    torch |= {f"levels.{i}.transformer_encoder.{j}.mlp.fc2.weight": (D, 12) for i, j in places}
    flax = {f"NesTStage_{i}/MetaFormerBlock_{j}/MLP_0/Dense_0/kernel": (D, 12) for i, j in places}
    flax |= {f"NesTStage_{i}/MetaFormerBlock_{j}/MLP_0/Dense_1/kernel": (12, D) for i, j in places}
    torch |= {f"levels.{i}.pos_embed": (1, 4 + i, D) for i in (0, 1)}
    flax |= {f"NesTStage_{i}/pos_embed": (4 + i, D) for i in (0, 1)}
    assert _plan(torch, flax).complete


def test_weights_whose_bias_has_several_axes_are_no_convolution() -> None:
    """A block-diagonal gate (heads, width, width) makes no channels that a flattened map could have."""
    plan = _plan(
        {"gate.weight": (4, 2, 2), "gate.bias": (4, 2), "up.weight": (12, D), "down.weight": (D, 12)},
        {"gate/w": (4, 2, 2), "gate/b": (4, 2), "up/kernel": (D, 12), "down/kernel": (12, D)},
    )
    assert "flatten" not in {question.kind for question in plan.questions}


def test_an_order_along_a_block_takes_no_norm_from_outside() -> None:
    torch = {"blocks.0.pre_attention_norm.weight": (D,), "blocks.0.pre_mlp_norm.weight": (D,), "pre_norm.weight": (D,)}
    flax = {"block_0/attn_norm/scale": (D,), "block_0/mlp_norm/scale": (D,), "encoder_norm/scale": (D,)}
    plan = _plan(torch, flax, unused="drop", missing="zeros")
    assert _paired(plan).get("block_0/mlp_norm/scale", "blocks.0.pre_mlp_norm.weight") == "blocks.0.pre_mlp_norm.weight"
    assert "encoder_norm/scale" not in _paired(plan)


def test_a_module_in_a_numbered_tower_may_hold_its_last_norm() -> None:
    names = [(f"text.layers.{i}.fc.weight", f"Encoder_0/block_{i}/fc/kernel") for i in (0, 1)]
    plan = _plan(
        {**{a: (D, D) for a, _ in names}, "text.head.weight": (5, D), "text.final_layer_norm.weight": (D,)},
        {**{b: (D, D) for _, b in names}, "head/kernel": (D, 5), "Encoder_0/encoder_norm/scale": (D,)},
    )
    assert _paired(plan).get("Encoder_0/encoder_norm/scale") == "text.final_layer_norm.weight"


def test_bare_parameters_wq_and_bq_are_one_module() -> None:
    plan = _plan(
        {f"attn.{n}.{leaf}": shape for n in "qkv" for leaf, shape in (("weight", (D, 12)), ("bias", (D,)))},
        {f"attn/{letter}{n}": shape for n in "qkv" for letter, shape in (("w", (12, D)), ("b", (D,)))},
    )
    assert _paired(plan)["attn/bk"] == "attn.k.bias"


def test_two_fused_attentions_go_with_the_modules_beside_them() -> None:
    torch = {f"{n}.in_proj_weight": (3 * D, D) for n in ("attn_a", "attn_b")} | _linears("attn_a", "out_proj")
    flax = {f"{n}/{part}/kernel": (D, 2, 4) for n in ("attn_a", "attn_b") for part in ("query", "key", "value")}
    plan = _plan({**torch, "attn_b.out_proj.weight": (D, D)}, {
        **flax, "attn_a/out/kernel": (2, 4, D), "attn_b/out/kernel": (2, 4, D)})  # fmt: skip
    assert _paired(plan)["attn_b/query/kernel"] == "attn_b.in_proj_weight"


def test_a_bias_with_a_name_of_its_own_is_offered_for_its_module() -> None:
    plan = _plan(
        {"mlp.gate.weight": (4, D), "mlp.gate.score_bias": (4,), "mlp.fc.weight": (12, D)},
        {"mlp/gate/kernel": (D, 4), "mlp/gate/bias": (4,), "mlp/fc/kernel": (D, 12)},
        unused="drop",
    )
    (question,) = plan.questions
    assert [c.rule for c in question.candidates] == ['{ torch = "mlp.gate.score_bias", flax = "mlp/gate/bias" }']


def test_names_of_one_tied_module_stay_together() -> None:
    """conv1 and net.0 are one module, so its weight and its bias have one first name."""
    rng = np.random.default_rng(0)
    conv, bias = rng.normal(size=(D, 5, 3)).astype("f4"), rng.normal(size=D).astype("f4")
    source = {"conv1.weight": conv, "conv1.bias": bias, "net.0.weight": conv, "net.0.bias": bias}
    like = {"Conv_0": {"kernel": np.zeros((3, 5, D), "f4"), "bias": np.zeros(D, "f4")}}
    assert gx.plan(source, like, source_side="torch", to="flax").complete
