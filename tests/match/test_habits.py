"""One architecture under the naming habits of the field: every pair has one answer, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

D, H, F = 32, 8, 64
LIN = "o i -> i o"
IN = f"(h d) i -> i h d|d={H}"
OUT = f"o (h d) -> h d o|d={H}"
BIAS = f"(h d) -> h d|d={H}"
CONV = "o i a b -> a b i o"
L = "{i:0..2}"


def dense(torch: str, flax: str, shape: tuple[int, ...], how: str = LIN) -> list[Any]:
    return [(f"{torch}.weight", f"{flax}/kernel", shape, how), (f"{torch}.bias", f"{flax}/bias", shape[:1])]


def norm(torch: str, flax: str, width: int, bias: bool = True) -> list[Any]:
    rows: list[Any] = [(f"{torch}.weight", f"{flax}/scale", (width,))]
    return rows + ([(f"{torch}.bias", f"{flax}/bias", (width,))] if bias else [])


def batch_norm(torch: str, flax: str, width: int) -> list[Any]:
    return [
        *norm(torch, f"params/{flax}", width),
        (f"{torch}.running_mean", f"batch_stats/{flax}/mean", (width,)),
        (f"{torch}.running_var", f"batch_stats/{flax}/var", (width,)),
    ]


def stacked(one: Any, axis: int) -> Any:
    return lambda *arrays: (np.stack([one(a) for a in arrays], axis),)


def each(key: str, count: int = 3) -> list[str]:
    return [key.replace("#", str(i)) for i in range(count)]


def decoder(attn: dict[str, str], mlp: dict[str, str], norms: dict[str, str], ends: dict[str, str]) -> list[Any]:
    """A gated decoder with grouped heads: torch's usual names against the given Flax ones."""
    t = f"model.layers.{L}"
    return [
        ("model.embed_tokens.weight", ends["embed"], (99, D)),
        *[(f"{t}.self_attn.{a}_proj.weight", attn[a], (n, D), IN) for a, n in (("q", D), ("k", 16), ("v", 16))],
        (f"{t}.self_attn.o_proj.weight", attn["o"], (D, D), OUT),
        *[
            (f"{t}.mlp.{a}_proj.weight", mlp[a], s, LIN)
            for a, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))
        ],
        (f"{t}.input_layernorm.weight", norms["first"], (D,)),
        (f"{t}.post_attention_layernorm.weight", norms["second"], (D,)),
        ("model.norm.weight", ends["norm"], (D,)),
        ("lm_head.weight", ends["head"], (99, D), LIN),
    ]


def dense_general() -> list[Any]:
    a = "params/blocks_{i}/attention"
    return decoder(
        {"q": f"{a}/query/kernel", "k": f"{a}/key/kernel", "v": f"{a}/value/kernel", "o": f"{a}/out/kernel"},
        {
            "gate": "params/blocks_{i}/mlp/wi_0/kernel",
            "up": "params/blocks_{i}/mlp/wi_1/kernel",
            "down": "params/blocks_{i}/mlp/wo/kernel",
        },
        {"first": "params/blocks_{i}/attention_norm/scale", "second": "params/blocks_{i}/ffn_norm/scale"},
        {"embed": "params/tok_embed/embedding", "norm": "params/ln_f/scale", "head": "params/output_head/kernel"},
    )


def numbered_gates() -> list[Any]:
    a, m = "layers/{i}/attention", "layers/{i}/feed_forward"
    return decoder(
        {"q": f"{a}/wq/kernel", "k": f"{a}/wk/kernel", "v": f"{a}/wv/kernel", "o": f"{a}/wo/kernel"},
        {"gate": f"{m}/w1/kernel", "up": f"{m}/w3/kernel", "down": f"{m}/w2/kernel"},
        {"first": "layers/{i}/pre_attention_norm/scale", "second": "layers/{i}/pre_ffw_norm/scale"},
        {"embed": "tok_embeddings/embedding", "norm": "norm/scale", "head": "output/kernel"},
    )


def einsums() -> list[Any]:
    def both(k: Any, v: Any) -> Any:
        return (np.stack([x.reshape(2, H, D).transpose(0, 2, 1) for x in (k, v)]),)

    t = f"model.layers.{L}"
    return [
        ("model.embed_tokens.weight", "embedder/input_embedding", (99, D)),
        (f"{t}.self_attn.q_proj.weight", "layers/{i}/attn/q_einsum/w", (D, D), f"(h d) i -> h i d|d={H}"),
        (
            [f"{t}.self_attn.k_proj.weight", "model.layers.{i}.self_attn.v_proj.weight"],
            ["layers/{i}/attn/kv_einsum/w"],
            (16, D),
            both,
        ),
        (f"{t}.self_attn.o_proj.weight", "layers/{i}/attn/attn_vec_einsum/w", (D, D), OUT),
        (f"{t}.mlp.gate_proj.weight", "layers/{i}/mlp/gate_proj/kernel", (F, D), LIN),
        (f"{t}.mlp.up_proj.weight", "layers/{i}/mlp/up_proj/kernel", (F, D), LIN),
        (f"{t}.mlp.down_proj.weight", "layers/{i}/mlp/down_proj/kernel", (D, F), LIN),
        (f"{t}.input_layernorm.weight", "layers/{i}/pre_attention_norm/scale", (D,)),
        (f"{t}.post_attention_layernorm.weight", "layers/{i}/pre_ffw_norm/scale", (D,)),
        ("model.norm.weight", "final_norm/scale", (D,)),
    ]


def scanned(axis: int) -> list[Any]:
    def heads(count: int) -> Any:
        return stacked(lambda x: x.reshape(count, H, D).transpose(2, 0, 1), axis)

    t, f = "model.layers.#", "params/decoder/layers"
    turned = stacked(lambda x: x.T, axis)
    rows: list[Any] = [("model.embed_tokens.weight", "params/token_embedder/embedding", (99, D))]
    for name, role, width in (("q", "query", D), ("k", "key", 16), ("v", "value", 16)):
        rows.append(
            (
                each(f"{t}.self_attn.{name}_proj.weight"),
                [f"{f}/self_attention/{role}/kernel"],
                (width, D),
                heads(width // H),
            )
        )
    out = stacked(lambda x: x.T.reshape(D // H, H, D), axis)
    rows.append((each(f"{t}.self_attn.o_proj.weight"), [f"{f}/self_attention/out/kernel"], (D, D), out))
    for name, role, shape in (("gate", "wi_0", (F, D)), ("up", "wi_1", (F, D)), ("down", "wo", (D, F))):
        rows.append((each(f"{t}.mlp.{name}_proj.weight"), [f"{f}/mlp/{role}/kernel"], shape, turned))
    for name, role in (("input", "pre"), ("post_attention", "post")):
        rows.append(
            (
                each(f"{t}.{name}_layernorm.weight"),
                [f"{f}/{role}_self_attention_layer_norm/scale"],
                (D,),
                stacked(lambda x: x, axis),
            )
        )
    return [
        *rows,
        ("model.norm.weight", "params/decoder/decoder_norm/scale", (D,)),
        ("lm_head.weight", "params/decoder/logits_dense/kernel", (99, D), LIN),
    ]


def vision_blocks() -> list[Any]:
    t, f = f"vit.encoder.layer.{L}", "params/Transformer/encoderblock_{i}"
    heads = [
        row
        for role in ("query", "key", "value")
        for row in (
            (f"{t}.attention.attention.{role}.weight", f"{f}/MultiHeadDotProductAttention_0/{role}/kernel", (D, D), IN),
            (f"{t}.attention.attention.{role}.bias", f"{f}/MultiHeadDotProductAttention_0/{role}/bias", (D,), BIAS),
        )
    ]
    return [
        ("vit.embeddings.cls_token", "params/cls", (1, 1, D)),
        ("vit.embeddings.position_embeddings", "params/pos_embedding", (1, 17, D)),
        *dense("vit.embeddings.patch_embeddings.projection", "params/embedding", (D, 3, 8, 8), CONV),
        *heads,
        *dense(f"{t}.attention.output.dense", f"{f}/MultiHeadDotProductAttention_0/out", (D, D), OUT),
        *dense(f"{t}.intermediate.dense", f"{f}/MlpBlock_0/Dense_0", (F, D)),
        *dense(f"{t}.output.dense", f"{f}/MlpBlock_0/Dense_1", (D, F)),
        *norm(f"{t}.layernorm_before", f"{f}/LayerNorm_0", D),
        *norm(f"{t}.layernorm_after", f"{f}/LayerNorm_1", D),
        *norm("vit.layernorm", "params/Transformer/encoder_norm", D),
        *dense("classifier", "params/head", (10, D)),
    ]


def encoder_decoder() -> list[Any]:
    roles = tuple(zip("qkvo", ("query", "key", "value", "out"), strict=True))
    rows: list[Any] = [("shared.weight", "params/token_embedder/embedding", (99, D))]
    for side, attn, at in (("encoder", "attention", 1), ("decoder", "self_attention", 2)):
        t, f = f"{side}.block.{L}.layer", f"params/{side}/layers_{{i}}"
        rows.append(
            (
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                f"params/{side}/relpos_bias/rel_embedding",
                (8, 4),
                "a b -> b a",
            )
        )
        rows += [(f"{t}.0.SelfAttention.{a}.weight", f"{f}/{attn}/{b}/kernel", (D, D), LIN) for a, b in roles]
        for name, shape in (("wi_0", (F, D)), ("wi_1", (F, D)), ("wo", (D, F))):
            rows.append((f"{t}.{at}.DenseReluDense.{name}.weight", f"{f}/mlp/{name}/kernel", shape, LIN))
        rows.append((f"{side}.final_layer_norm.weight", f"params/{side}/{side}_norm/scale", (D,)))
    rows += [
        (
            f"decoder.block.{L}.layer.1.EncDecAttention.{a}.weight",
            f"params/decoder/layers_{{i}}/encoder_decoder_attention/{b}/kernel",
            (D, D),
            LIN,
        )
        for a, b in roles
    ]
    for n, name in enumerate(("pre_attention_layer_norm", "pre_mlp_layer_norm")):
        rows.append(
            (f"encoder.block.{L}.layer.{n}.layer_norm.weight", f"params/encoder/layers_{{i}}/{name}/scale", (D,))
        )
    for n, part in enumerate(("self_attention", "cross_attention", "mlp")):
        rows.append(
            (
                f"decoder.block.{L}.layer.{n}.layer_norm.weight",
                f"params/decoder/layers_{{i}}/pre_{part}_layer_norm/scale",
                (D,),
            )
        )
    return [*rows, ("lm_head.weight", "params/decoder/logits_dense/kernel", (99, D), LIN)]


def bottlenecks() -> list[Any]:
    rows: list[Any] = [
        ("conv1.weight", "params/conv_init/kernel", (8, 3, 7, 7), CONV),
        *batch_norm("bn1", "bn_init", 8),
    ]
    width, count = 8, 0
    for stage, inner in enumerate((8, 16), 1):
        for j in range(2):
            t, f = f"layer{stage}.{j}", f"Block_{count}"
            shapes = ((inner, width, 1), (inner, inner, 3), (4 * inner, inner, 1))
            for n, (o, i, k) in enumerate(shapes):
                rows.append((f"{t}.conv{n + 1}.weight", f"params/{f}/Conv_{n}/kernel", (o, i, k, k), CONV))
                rows += batch_norm(f"{t}.bn{n + 1}", f"{f}/BatchNorm_{n}", o)
            if j == 0:
                shape = (4 * inner, width, 1, 1)
                rows.append((f"{t}.downsample.0.weight", f"params/{f}/conv_proj/kernel", shape, CONV))
                rows += batch_norm(f"{t}.downsample.1", f"{f}/norm_proj", 4 * inner)
            width, count = 4 * inner, count + 1
    return [*rows, *dense("fc", "params/Dense_0", (10, width))]


def experts() -> list[Any]:
    t, f = f"model.layers.{L}", "params/layers_{i}"
    rows: list[Any] = [
        *[
            (f"{t}.self_attn.{a}_proj.weight", f"{f}/attention/{b}/kernel", (n, D), IN)
            for a, b, n in (("q", "query", D), ("k", "key", 16), ("v", "value", 16))
        ],
        (f"{t}.self_attn.o_proj.weight", f"{f}/attention/out/kernel", (D, D), OUT),
        (f"{t}.block_sparse_moe.gate.weight", f"{f}/moe/router/kernel", (4, D), LIN),
        *norm(f"{t}.input_layernorm", f"{f}/pre_attention_norm", D, bias=False),
        *norm(f"{t}.post_attention_layernorm", f"{f}/pre_ffn_norm", D, bias=False),
    ]
    for i in range(3):
        for a, b, shape in (("w1", "wi_0", (F, D)), ("w3", "wi_1", (F, D)), ("w2", "wo", (D, F))):
            keys = each(f"model.layers.{i}.block_sparse_moe.experts.#.{a}.weight", 4)
            rows.append((keys, [f"params/layers_{i}/moe/{b}"], shape, stacked(lambda x: x.T, 0)))
    return rows


def fused_attention() -> list[Any]:
    rows: list[Any] = []
    for i in range(2):
        t, f = f"encoder.layers.{i}", f"params/encoder/layers_{i}"
        keys = [f"{f}/self_attention/{role}" for role in ("query", "key", "value")]
        rows += [
            (
                f"{t}.self_attn.in_proj_weight",
                [f"{k}/kernel" for k in keys],
                [(3 * D, D)],
                lambda w: tuple(x.T.reshape(D, 4, H) for x in np.split(w, 3)),
            ),
            (
                f"{t}.self_attn.in_proj_bias",
                [f"{k}/bias" for k in keys],
                [(3 * D,)],
                lambda b: tuple(x.reshape(4, H) for x in np.split(b, 3)),
            ),
            *dense(f"{t}.self_attn.out_proj", f"{f}/self_attention/out", (D, D), OUT),
            *dense(f"{t}.linear1", f"{f}/linear1", (F, D)),
            *dense(f"{t}.linear2", f"{f}/linear2", (D, F)),
            *norm(f"{t}.norm1", f"{f}/norm1", D),
            *norm(f"{t}.norm2", f"{f}/norm2", D),
        ]
    return rows


def sequence() -> list[Any]:
    sizes = ((784, 128), (128, 64), (64, 64), (64, 10))
    return [row for n, (i, o) in enumerate(sizes) for row in dense(f"net.{2 * n}", f"params/Dense_{n}", (o, i))]


def deconvolution() -> list[Any]:
    def flipped(w: Any) -> Any:
        return (w.transpose(2, 3, 0, 1)[::-1, ::-1],)

    return [
        *dense("down1.conv1", "params/down1/conv1", (8, 3, 3, 3), CONV),
        *dense("down2.conv1", "params/down2/conv1", (16, 8, 3, 3), CONV),
        ("up1.up.weight", "params/up1/ConvTranspose_0/kernel", (16, 8, 2, 2), flipped),
        ("up1.up.bias", "params/up1/ConvTranspose_0/bias", (8,)),
        *dense("up1.conv1", "params/up1/conv1", (8, 16, 3, 3), CONV),
    ]


HABITS = {
    "DenseGeneral": dense_general(),
    "numbered gates": numbered_gates(),
    "einsums": einsums(),
    "scanned on axis 0": scanned(0),
    "scanned on axis 1": scanned(1),
    "vision blocks": vision_blocks(),
    "encoder and decoder": encoder_decoder(),
    "bottlenecks": bottlenecks(),
    "stacked experts": experts(),
    "fused attention": fused_attention(),
    "sequence": sequence(),
    "deconvolution": deconvolution(),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_matched_bit_for_bit(pairing: Any, habit: str, reverse: bool) -> None:
    pair = pairing(HABITS[habit])
    found = pair.infer(reverse=reverse)
    assert pair.judge(found, reverse) == ("exact", []), [str(q) for q in found.questions]
    assert all(entry.evidence for entry in found.entries)


LONG = "encoder and decoder"


@pytest.mark.parametrize("habit", [*(h for h in HABITS if h != LONG), pytest.param(LONG, marks=pytest.mark.slow)])
def test_nothing_is_wrong_without_synonyms(pairing: Any, habit: str) -> None:
    from graftax.match.names import Lexicon

    pair = pairing(HABITS[habit])
    assert pair.judge(pair.infer(lex=Lexicon.empty()))[0] != "WRONG"


def test_auto_names_state_that_they_count_calls(pairing: Any) -> None:
    assumed = [a.text for a in pairing(vision_blocks()).infer().assumptions]
    assert any("call order" in text for text in assumed)
    assert not pairing(dense_general()).infer().assumptions
