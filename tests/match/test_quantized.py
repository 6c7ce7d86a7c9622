"""Quantized sources are refused by scheme; what only looks a little like one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftax.errors import PlanError
from graftax.formats import Output, open_path, save
from graftax.match.quantized import MARKED, SCALED, SCHEMES, find_quantized, refuse_quantized
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.dtypes import spec_of

F8 = "float8_e4m3fn"


def checkpoint(tensors: dict[str, str], config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of these names and dtypes."""
    return Checkpoint("x", None, {name: TensorSpec((4, 4), dtype) for name, dtype in tensors.items()}, config=config)


# What the writers of each scheme put into a file: (scheme, tensors, the tensors of codes)
QUANTIZED: list[tuple[str, dict[str, str], list[str]]] = [
    (
        "GPTQ",
        {"l.g_idx": "int32", "l.qweight": "int32", "l.qzeros": "int32", "l.scales": "float16", "l.bias": "float16"},
        ["l.qweight"],
    ),
    ("GPTQ or AWQ", {"l.qweight": "int32", "l.qzeros": "int32", "l.scales": "float16"}, ["l.qweight"]),
    (
        "bitsandbytes 4-bit",
        {
            "l.weight": "uint8",
            "l.weight.absmax": "float32",
            "l.weight.quant_map": "float32",
            "l.weight.quant_state.bitsandbytes__nf4": "uint8",
        },
        ["l.weight"],
    ),
    ("bitsandbytes int8", {"l.weight": "int8", "l.SCB": "float32", "l.weight_format": "uint8"}, ["l.weight"]),
    ("FP8 with inverse scales", {"l.weight": F8, "l.weight_scale_inv": "float32"}, ["l.weight"]),
    ("FP8 with inverse scales", {"l.weight": "uint8", "l.weight_scale_inv": "float32"}, ["l.weight"]),
    (
        "MXFP4 blocks",
        {"e.gate_up_proj_blocks": "uint8", "e.gate_up_proj_scales": "uint8", "e.gate_up_proj_bias": "bfloat16"},
        ["e.gate_up_proj_blocks"],
    ),
    (
        "compressed-tensors, packed",
        {"l.weight_packed": "int32", "l.weight_scale": "bfloat16", "l.weight_shape": "int64"},
        ["l.weight_packed"],
    ),
    ("codes with scales", {"l.weight": F8, "l.weight_scale": "float32", "l.input_scale": "float32"}, ["l.weight"]),
    (
        "affine codes with zero points",
        {"l.weight": "int8", "l.weight_zero_point": "int8"},
        ["l.weight"],
    ),
    ("codes with scales", {"l.weight": "uint8", "l.weight_scale": F8, "l.weight_scale_2": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": "int8", "l.weight_scales": "float16"}, ["l.weight"]),
    ("codes with scales", {"l.weight": "uint32", "l.scales": "float16", "l.biases": "float16"}, ["l.weight"]),
    ("codes with scales", {"l.weight": "int8", "l.scale": "float32"}, ["l.weight"]),
    ("codes with scales", {"params/l/kernel": "int8", "params/l/scale": "float32"}, ["params/l/kernel"]),
    ("codes with scales", {"params/l/kernel": "int4", "params/l/kernel_scale": "float32"}, ["params/l/kernel"]),
    ("codes with scales", {"params/e/embedding": "int8", "params/e/scale": "float32"}, ["params/e/embedding"]),
    ("codes with scales", {"l.weight": F8, "l.scale_weight": "float32", "l.scale_input": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.scale_input": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.w_scale": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.dequantScale": "bfloat16"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.weight.scale": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.weight_quantizer._scale": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.weights_scaling_factor": "float32"}, ["l.weight"]),
    ("codes with scales", {"l.weight": F8, "l.scale_0": "float8_e8m0fnu"}, ["l.weight"]),
    ("codes with scales", {"a.in_proj_weight": F8, "a.in_proj_weight_scale": "float32"}, ["a.in_proj_weight"]),
    ("codes with scales", {"e.gate_up_proj": F8, "e.gate_up_proj_scale": "float32"}, ["e.gate_up_proj"]),
    ("codes with scales", {"params/l/kernel": F8, "params/l/kernel/scale": "float32"}, ["params/l/kernel"]),
    ("codes with scales", {"params/l/kernel": F8, "params/l/scale_kernel": "float32"}, ["params/l/kernel"]),
    ("scaled fp8", {"m.l.weight": F8, "m.scaled_fp8": F8}, ["m.l.weight"]),
    ("HQQ", {"l.W_q": "uint8", "l.scale": "float16", "l.zero": "float16"}, ["l.W_q"]),
    ("HQQ", {"l.W_q": "float16", "l.meta.scale": "float16"}, ["l.W_q"]),
    ("AQLM", {"l.codes": "int16", "l.codebooks": "float16", "l.scales": "float16"}, ["l.codes"]),
    ("EXL2", {"l.q_weight": "int32", "l.q_scale": "int32", "l.q_scale_max": "float16"}, ["l.q_weight"]),
    ("QuIP#", {"l.Qidxs": "int64", "l.SU": "float16", "l.SV": "float16"}, ["l.Qidxs"]),
    ("Quanto", {"l.weight._data": "int8", "l.weight._scale": "float16"}, ["l.weight._data"]),
    ("Qwix", {"l/kernel/array/qvalue": "int8", "l/kernel/array/scale": "float32"}, ["l/kernel/array/qvalue"]),
    ("torch.ao, affine", {"l.scale": "float32", "l.zero_point": "int64"}, ["l.scale"]),
]


@pytest.mark.parametrize(("scheme", "tensors", "codes"), QUANTIZED)
def test_a_quantized_source_is_refused_by_scheme(scheme: str, tensors: dict[str, str], codes: list[str]):
    plain = {"head.weight": "float16", "norm.scale": "float32"}
    for order in (tensors, dict(reversed(tensors.items()))):
        found = find_quantized(checkpoint(plain | order))
        assert [item.codes for item in found] == codes
        with pytest.raises(PlanError) as caught:
            refuse_quantized(checkpoint(plain | order))
        assert caught.value.exit_code == 1
        assert [failure.key for failure in caught.value.failures] == codes
        assert "Dequantize it first" in str(caught.value)
    assert find_quantized(checkpoint(tensors))[0].scheme == scheme


def test_every_row_has_a_case():
    assert {SCALED, MARKED, *(row.name for row in SCHEMES)} == {scheme for scheme, *_ in QUANTIZED}


@pytest.mark.parametrize(
    "tensors",
    [
        {"logit_scale": "float32", "visual.proj": "float32"},
        {"params/logit_scale": "float32", "params/logit": "float32"},
        {"norm.weight": "float32", "norm.scale": "float32"},
        {"bn.weight": "float32", "bn.bias": "float32", "bn.num_batches_tracked": "int64"},
        {"params/LayerNorm_0/scale": "float32", "params/LayerNorm_0/bias": "float32"},
        {"params/Dense_0/kernel": "bfloat16", "params/Dense_0/scale": "float32"},
        {"b.layer_scale": "float32", "b.layer_scale_1.gamma": "float32", "b.layer": "float32"},
        {"attn.attn_scale": "float32", "attn.attn": "float16"},
        {"l.weight": "bfloat16", "l.weight_scale": "float32"},
        {"position_ids": "int64", "position": "int32"},
        {"embeddings.position_ids": "int32", "embeddings.weight": "float32", "embeddings.scale": "float32"},
        {"l.weight": F8, "l.bias": "bfloat16"},
        {"params/WeightNorm_0/Dense_0~1kernel~1scale": "float32", "params/Dense_0/kernel": "float32"},
        {"mask": "bool", "mask_scale": "float32"},
        {"rows.scales": "float32", "rows.weight": "float64"},
        {"codes": "int32", "scale": "float32"},
        {"text_projection": F8, "logit_scale": "float32"},
        {"attn.in_proj_weight": F8, "attn.scale": "float32"},
        {"attn.weight": F8, "attn.norm.scale": "float32", "attn.0.scale": "float32"},
        {"attn.qkv.weight": F8, "attn.logit_scale": "float32", "attn.relative_position_index": "int32"},
        {"ln/scale": "float32", "ln/bias": F8, "dense/kernel": F8},
        {"ln/scale": F8, "ln/bias": F8, "dense/kernel": F8},
        {"l.weight": F8, "l.upscale": "float32", "l.scaler": "float32"},
        {"attn.mask": "uint8", "attn.scale": "float32"},
        {"unscaled_fp8": F8, "l.weight": F8},
    ],
)
def test_no_false_alarm(tensors: dict[str, str]):
    assert find_quantized(checkpoint(tensors)) == ()
    refuse_quantized(checkpoint(tensors))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
        ({"quantization_config": {"bits": 4}}, "unnamed"),
    ],
)
def test_config_json_says_so(tmp_path: Path, config: dict[str, Any], name: str):
    array = np.ones((2, 2), np.float32)
    save(tmp_path / "x.safetensors", Output({"l.weight": spec_of(array)}, [("l.weight", array)], "torch"))
    refuse_quantized(open_path(tmp_path / "x.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=f"quantized \\({name}\\)") as caught:
        refuse_quantized(open_path(tmp_path / "x.safetensors"))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("value", [None, {}, False, "none"])
def test_an_empty_quantization_config_says_nothing(value: Any):
    refuse_quantized(checkpoint({"l.weight": "float32"}, {"quantization_config": value, "heads": 4}))


def test_all_tensors_are_listed_and_names_are_safe():
    tensors = {f"l{i}\x1b.{name}": "int8" for i in range(50) for name in ("weight", "weight_scale")}
    with pytest.raises(PlanError) as caught:
        refuse_quantized(checkpoint(tensors))
    assert len(caught.value.failures) == 50
    assert "\x1b" not in str(caught.value)


def test_a_large_plain_checkpoint_is_looked_through_quickly():
    import time

    large = checkpoint({f"layers.{i}.{n}": "bfloat16" for i in range(25_000) for n in ("a", "weight", "scale", "b")})
    start = time.process_time()
    assert find_quantized(large) == ()
    assert time.process_time() - start < 10
