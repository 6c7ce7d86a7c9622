"""Faults of the models with attention: encoder, ViT, decoder."""

from __future__ import annotations

from ..zoo.decoder import DecoderSettings, gemma
from ..zoo.encoder import EncoderSettings
from ..zoo.vit import ViTSettings
from . import base
from .making import Making

ENCODER_PATHS = {
    "linen": {
        "words": "word_embed", "positions": "position_embed", "types": "type_embed", "first_norm": "embed_norm",
        "q": "layers_{i}/query", "k": "layers_{i}/key", "v": "layers_{i}/value", "o": "layers_{i}/out",
        "norm1": "layers_{i}/attention_norm", "fc1": "layers_{i}/fc1", "fc2": "layers_{i}/fc2",
        "norm2": "layers_{i}/mlp_norm", "block": "layers_{i}", "pooler": "pooler", "attention": "layers_{i}",
    },
    "nnx": {
        "words": "tokens", "positions": "positions", "types": "segments", "first_norm": "embed_norm",
        "q": "blocks/{i}/attn/q", "k": "blocks/{i}/attn/k", "v": "blocks/{i}/attn/v", "o": "blocks/{i}/attn/o",
        "norm1": "blocks/{i}/norm1", "fc1": "blocks/{i}/wi", "fc2": "blocks/{i}/wo", "norm2": "blocks/{i}/norm2",
        "block": "blocks/{i}", "pooler": "pooler", "attention": "blocks/{i}/attn",
    },
}  # fmt: skip


def encoder(api: str) -> Making:
    m = Making("encoder", api, ENCODER_PATHS[api])
    s = EncoderSettings()
    split = api == "linen"

    def mixed(i: int) -> list[str]:
        return [m.path("o", i), m.path("attention", i)]

    for i in range(s.depth):
        for role in "qkvo":
            same = ("reshape before transpose",) if split else ()
            change = base.untransposed_heads(role == "o") if split else base.untransposed
            m.kernel("kernel not transposed", role, change, i, also=same)
            m.kernel("head order", role, base.heads_inner(s.heads, 0 if role == "o" else 1), i)
        m.swap(m.path("q", i), m.path("k", i))
        m.swap(m.path("norm1", i), m.path("norm2", i))
        for role in ("fc1", "fc2"):
            m.kernel("reshape before transpose", role, base.reshaped, i)
            m.kernel("bfloat16 weights", role, base.rounded, i)
            m.initial(role, "kernel", i)
        m.initial("norm2", "scale", i)
        m.kernel("weights differ", "v", lambda a: a * 1.01, i, also=("scale factor",))
    m.kernel("kernel not transposed", "pooler", base.untransposed)
    m.swap(m.path("fc1", 0), m.path("fc1", 1))
    m.initial("words", "embedding")
    m.kernel("bfloat16 weights", "words", base.rounded, name="embedding")
    for epsilon in (1e-5, 1e-6):
        m.blocks("epsilon", lambda i: [m.path("norm1", i), m.path("norm2", i)], range(s.depth), epsilon=epsilon)
    m.wrong("epsilon", "1e-6 everywhere", [m.path("first_norm"), m.path("norm1", 0)], s.but(epsilon=1e-6))
    for right, wrong in (("gelu", "gelu_tanh"), ("gelu_tanh", "gelu"), ("gelu", "quick_gelu"), ("relu", "gelu")):
        m.blocks(
            "activation", lambda i: [m.path("fc2", i)], range(s.depth), activation=wrong, right=s.but(activation=right)
        )
    for scale in (1.0, s.width**-0.5, 1 / s.head_dim):
        m.blocks("attention scale", mixed, range(s.depth), scale=scale)
    for mask in ("inverted", "ignored", "queries"):
        m.blocks("attention mask", mixed, range(s.depth), mask=mask)
    counted = s.but(positions="mask", pos_offset=1, left_padded=True)
    where = [m.path("positions")]
    for text, wrong, right in (
        ("arange under left padding", counted.but(positions="arange", pos_offset=0), counted),
        ("arange + 1 under left padding", counted.but(positions="arange"), counted),
        ("counted, without the offset", counted.but(pos_offset=0), counted),
        ("counted, one too far", counted.but(pos_offset=2), counted),
        ("one too far", s.but(pos_offset=1), s),
        ("two too far", s.but(pos_offset=2), s),
        ("offset forgotten", s, s.but(pos_offset=2)),
        ("counted for arange", s.but(positions="mask", pos_offset=1, left_padded=True), s.but(left_padded=True)),
    ):
        m.wrong("position ids", text, where, wrong, right)
    for right, wrong in ((24**0.5, 1.0), (1.0, 24**0.5), (1.0, 24.0), (24**0.5, 5.0)):
        scaled = s.but(embed_scale=right)
        m.wrong(
            "embedding scale", f"{wrong:.2f} for {right:.2f}", [m.path("first_norm")], scaled.but(embed_scale=wrong),
            scaled, also=("scale factor",),
        )  # fmt: skip
    m.blocks("missing residual", lambda i: [m.path("norm2", i)], range(s.depth), residual=False)
    m.blocks("scale factor", lambda i: [m.path("norm2", i)], range(s.depth), gain=0.5)
    m.blocks("fast variance", lambda i: [m.path("norm1", i)], range(s.depth), fast=True, loud=True)
    m.blocks("bfloat16 accumulation", lambda i: [m.path("fc1", i)], range(s.depth), dtype="bfloat16")
    return m


# ---------------------------------------------------------------- ViT

VIT_PATHS = {
    "linen": {
        "patch": "patch_embedding", "norm1": "block_{i}/ln1", "attention": "block_{i}/attn",
        "q": "block_{i}/attn/query", "k": "block_{i}/attn/key", "v": "block_{i}/attn/value",
        "o": "block_{i}/attn/out", "norm2": "block_{i}/ln2",
        "fc1": "block_{i}/fc1", "fc2": "block_{i}/fc2", "block": "block_{i}", "final": "norm", "head": "head",
    },
    "nnx": {
        "patch": "patch", "norm1": "layers/{i}/norm1", "attention": "layers/{i}/attention",
        "q": "layers/{i}/attention/query", "k": "layers/{i}/attention/key", "v": "layers/{i}/attention/value",
        "o": "layers/{i}/attention/out", "norm2": "layers/{i}/norm2", "fc1": "layers/{i}/linear1",
        "fc2": "layers/{i}/linear2", "block": "layers/{i}", "final": "final_norm", "head": "classifier",
    },
}  # fmt: skip


def vit(api: str) -> Making:
    m = Making("vit", api, VIT_PATHS[api])
    s = ViTSettings()

    def inside(i: int) -> list[str]:
        return [m.path("attention", i), m.path("attention", i) + "/**"]

    def behind(i: int) -> list[str]:
        return [m.path("block", i), m.path("norm1", i + 1) if i + 1 < s.depth else m.path("final")]

    for i in range(s.depth):
        for role in "qkvo":
            change = base.untransposed_heads(role == "o")
            m.kernel("kernel not transposed", role, change, i, layers=inside(i), also=("reshape before transpose",))
            change = base.heads_inner(s.heads, 0 if role == "o" else 1)
            m.kernel("head order", role, change, i, layers=inside(i))
        m.swap(m.path("q", i), m.path("k", i), inside(i))
        m.swap(m.path("norm1", i), m.path("norm2", i))
        m.kernel("reshape before transpose", "fc1", base.reshaped, i)
        m.kernel("bfloat16 weights", "v", base.rounded, i, layers=inside(i))
        m.initial("fc2", "kernel", i)
        m.initial("q", "kernel", i, layers=inside(i))
    m.kernel("reshape before transpose", "patch", base.reshaped)
    for axes in ((0, 1), (0,), (1,)):
        m.kernel("kernel flipped", "patch", base.flipped(*axes), text=f" over {axes}")
    m.kernel("kernel axes swapped", "patch", base.spatial_swapped)
    for epsilon in (1e-5, 1e-12):
        m.blocks("epsilon", lambda i: [m.path("norm1", i), m.path("norm2", i)], range(s.depth), epsilon=epsilon)
    for right, wrong in (("gelu", "gelu_tanh"), ("gelu", "quick_gelu"), ("relu", "gelu")):
        m.blocks(
            "activation", lambda i: [m.path("fc2", i)], range(s.depth), activation=wrong, right=s.but(activation=right)
        )
    for gain in (6**0.5, 6**-0.5, 0.5):
        m.blocks("attention scale", inside, range(s.depth), gain_scores=gain)
    up = s.but(trained=(3, 2), grid=(4, 3))
    for text, right, wrong in (
        *((name, s, s.but(resize=name)) for name in ("antialias", "nearest", "cubic", "corners", "transposed")),
        *((f"{name}, upwards", up, up.but(resize=name)) for name in ("nearest", "cubic", "corners", "transposed")),
    ):
        m.wrong("position embedding resize", text, [m.path("norm1", 0)], wrong, right)
    m.blocks("missing residual", behind, range(s.depth), residual=False)
    m.blocks("fast variance", lambda i: [m.path("norm1", i)], (0,), fast=True, loud=True)
    m.blocks("bfloat16 accumulation", lambda i: [m.path("fc1", i)], range(s.depth), dtype="bfloat16")
    return m


# ---------------------------------------------------------------- decoder

DECODER_PATHS = {
    "linen": {
        "embed": "embedder", "norm1": "layers_{i}/attention_norm", "attention": "layers_{i}/attention",
        "q": "layers_{i}/attention/query", "k": "layers_{i}/attention/key", "v": "layers_{i}/attention/value",
        "o": "layers_{i}/attention/out", "norm2": "layers_{i}/mlp_norm", "gate": "layers_{i}/gate",
        "up": "layers_{i}/up", "down": "layers_{i}/down", "block": "layers_{i}", "final": "final_norm",
        "head": "lm_head",
    },
    "nnx": {
        "embed": "embed", "norm1": "layers/{i}/norm1", "attention": "layers/{i}", "q": "layers/{i}/wq",
        "k": "layers/{i}/wk", "v": "layers/{i}/wv", "o": "layers/{i}/wo", "norm2": "layers/{i}/norm2",
        "gate": "layers/{i}/gate", "up": "layers/{i}/up", "down": "layers/{i}/down", "block": "layers/{i}",
        "final": "final_norm", "head": "head",
    },
}  # fmt: skip


def decoder(api: str) -> Making:
    m = Making("decoder", api, DECODER_PATHS[api])
    s = DecoderSettings()
    odd = gemma(s)
    split = api == "linen"

    def mixed(i: int) -> list[str]:
        """Functional code between the projections and the output projection."""
        return [m.path("o", i), m.path("attention", i)]

    def behind(i: int) -> list[str]:
        return [m.path("block", i), m.path("norm1", i + 1) if i + 1 < s.depth else m.path("final")]

    for i in range(s.depth):
        for role in "qo":
            change = base.untransposed_heads(role == "o") if split else base.untransposed
            m.kernel("kernel not transposed", role, change, i, also=("reshape before transpose",) if split else ())
        for role, heads in (("q", s.heads), ("k", s.kv_heads), ("o", s.heads)):
            m.kernel("head order", role, base.heads_inner(heads, 0 if role == "o" else 1), i)
        for role in ("k", "v", "gate", "down"):
            m.kernel("reshape before transpose", role, base.reshaped, i)
        m.swap(m.path("gate", i), m.path("up", i))
        m.swap(m.path("k", i), m.path("v", i))
        m.swap(m.path("norm1", i), m.path("norm2", i))
        m.kernel("bfloat16 weights", "up", base.rounded, i)
        m.initial("down", "kernel", i)
        m.initial("norm1", "scale", i)
    for epsilon in (1e-5, 1e-8, 1e-3):
        m.blocks("epsilon", lambda i: [m.path("norm1", i), m.path("norm2", i)], range(s.depth), epsilon=epsilon)
    for right, wrong in (("silu", "gelu"), ("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")):
        m.blocks(
            "activation", lambda i: [m.path("down", i)], range(s.depth), activation=wrong, right=s.but(activation=right)
        )
    for right in (s, odd):
        text = "" if right is s else " (gemma)"
        for wrong in (
            {"interleave": True}, {"theta": 500.0}, {"theta": 1e6}, {"q_offset": 1}, {"q_offset": -1}, {"scale": 1.0},
            {"scale": s.width**-0.5}, {"mask": "strict"}, {"mask": "ignored"}, {"mask": "inverted"}, {"window": 4},
            {"window": 6}, {"grouping": "tile"},
        ):  # fmt: skip
            (name,) = wrong
            blocks = () if name in ("mask", "window") else range(s.depth)  # these are made once for all layers
            m.blocks(MIXING[name], mixed, blocks, right=right, text=text, **wrong)
            value = wrong[name]
            m.wrong(MIXING[name], f"{name}={value}{text}", mixed(0), right.but(**wrong), right)
        m.wrong("attention scale", f"none{text}", mixed(0), right.but(scale=1.0), right.but(scale=0.2))
    m.wrong("sliding window", "forgotten", mixed(0), s.but(window=None), s.but(window=4))
    m.wrong("sliding window", "one too far", mixed(0), s.but(window=5), s.but(window=4))
    for right, wrong in ((2.0, None), (None, 2.0), (2.0, 3.0), (5.0, 2.0)):
        capped = s.but(softcap=right)
        last = ["", m.path("head"), "(output)"]
        m.wrong("logit softcap", f"{wrong} for {right}", last, capped.but(softcap=wrong), capped)
        capped = s.but(attention_softcap=right)
        m.wrong(
            "logit softcap", f"of scores, {wrong} for {right}", mixed(0), capped.but(attention_softcap=wrong), capped
        )
    for right, wrong in ((24**0.5, 1.0), (1.0, 24**0.5), (24**0.5, 24.0)):
        for tied in (False, True):
            scaled = s.but(embed_scale=right, tied=tied)
            m.wrong(
                "embedding scale", f"{wrong:.2f} for {right:.2f}{', tied' if tied else ''}", [m.path("norm1", 0)],
                scaled.but(embed_scale=wrong), scaled, also=("scale factor",),
            )  # fmt: skip
    for i in range(s.depth):
        m.wrong(
            "zero-centred norm", f"plain norms in block {i}", [m.path("norm1", i)],
            odd.but_block(i, zero_centred=False), odd,
        )  # fmt: skip
        m.wrong(
            "zero-centred norm", f"zero-centred norms in block {i}", [m.path("norm1", i)],
            s.but_block(i, zero_centred=True), s,
        )  # fmt: skip
    m.blocks("missing residual", behind, range(s.depth), residual=False)
    m.blocks("scale factor", behind, range(s.depth), gain=0.5)
    m.blocks("bfloat16 accumulation", lambda i: [m.path("gate", i)], range(s.depth), dtype="bfloat16")
    return m


MIXING = {
    "interleave": "rotary interleave", "theta": "rotary theta", "q_offset": "rotary offset",
    "scale": "attention scale", "mask": "attention mask", "window": "sliding window", "grouping": "key-value heads",
}  # fmt: skip
