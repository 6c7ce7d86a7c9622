"""Hostile pairs: what nothing decides is asked, what has one defensible answer is found, nothing is ever wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import graftax as gx

D, F, H = 32, 64, 8
LIN, CONV = "o i -> i o", "o i a b -> a b i o"
IN = f"(h d) i -> i h d|d={H}"
L = "{i:0..2}"
Case = list[Any]


def flipped(w: Any) -> Any:
    return (w.transpose(*range(2, w.ndim), 0, 1)[tuple(slice(None, None, -1) for _ in range(w.ndim - 2))],)


def square(*names: tuple[str, str], width: int = D, bias: bool = False) -> Case:
    rows: Case = [(f"{a}.weight", f"{b}/kernel", (width, width), LIN) for a, b in names]
    return rows + ([(f"{a}.bias", f"{b}/bias", (width,)) for a, b in names] if bias else [])


def tower(t: str, f: str) -> Case:
    return [
        *square((f"{t}.layers.{L}.q", f"{f}/layers_{{i}}/q"), (f"{t}.layers.{L}.k", f"{f}/layers_{{i}}/k")),
        (f"{t}.layers.{L}.ln.weight", f"{f}/layers_{{i}}/ln/scale", (D,)),
    ]


def fused(t: str, woven: bool) -> Case:
    """A fused projection of unnamed order against q, k and v."""

    def parts(w: Any) -> Any:
        rows = w.reshape(4, 3, H, D).transpose(1, 0, 2, 3) if woven else w.reshape(3, 4, H, D)
        return tuple(rows[n].transpose(2, 0, 1) for n in range(3))

    keys = [f"params/attention/{role}/kernel" for role in ("query", "key", "value")]
    return [([t], keys, [(3 * D, D)], parts), *square(("mlp.fc", "params/mlp/fc"))]


def grouped(woven: bool) -> Case:
    """A fused projection with a bias, of more heads of queries than of keys and values, against q, k and v."""
    heads, groups, h = 4, 2, 5
    sizes = (heads, groups, groups)

    def parts(w: Any) -> Any:
        if woven:  # every group: its heads of queries, then one of keys and one of values
            rows = w.reshape(groups, heads // groups + 2, h, -1)
            cut = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
        else:
            cut = np.split(w.reshape(sum(sizes), h, -1), np.cumsum(sizes)[:-1])
        return tuple(part.reshape(n, h, -1) for part, n in zip(cut, sizes, strict=True))

    def kernels(w: Any) -> Any:
        return tuple(part.transpose(2, 0, 1) for part in parts(w))

    def biases(b: Any) -> Any:
        return tuple(part[:, :, 0] for part in parts(b))

    return [
        ([f"attn.qkv.{t}"], [f"params/attn/{r}/{f}" for r in ("query", "key", "value")], [shape], how)
        for t, f, shape, how in (
            ("weight", "kernel", (sum(sizes) * h, D), kernels),
            ("bias", "bias", (sum(sizes) * h,), biases),
        )
    ]


def stacked_heads(axis: int) -> Case:
    """q, k and v, each split into heads, in one bare tensor; there are as many heads as parts."""

    def one(*w: Any) -> Any:
        return (np.stack([x.reshape(3, 3, 9).transpose(0, 2, 1) for x in w], axis),)

    return [([f"attn.{role}_proj.weight" for role in "qkv"], ["params/attn/qkv/w"], (9, 9), one)]


def joined(woven: bool) -> Case:
    """q, k and v against one fused kernel of unnamed order."""

    def one(*w: Any) -> Any:
        three = np.stack([x.reshape(4, H, D) for x in w])
        rows = three.transpose(1, 0, 2, 3) if woven else three
        return (rows.reshape(3 * D, D).T,)

    keys = [f"attn.{role}_proj.weight" for role in "qkv"]
    return [(keys, ["params/attn/qkv/kernel"], (D, D), one)]


def flattened(order: str) -> Case:
    return [
        ("conv.weight", "params/Conv_0/kernel", (8, 3, 3, 3), CONV),
        ("conv.bias", "params/Conv_0/bias", (8,)),
        ("fc.weight", "params/Dense_0/kernel", (10, 8 * 16), order),
        ("fc.bias", "params/Dense_0/bias", (10,)),
    ]


def layers_stacked(count: int, width: int, axis: int) -> Case:
    keys = [f"layers.{n}.fc.weight" for n in range(count)]
    return [(keys, ["params/layers/fc/kernel"], (width, width), lambda *a: (np.stack([x.T for x in a], axis),))]


FIRST, LAST = "o (c h w) -> (h w c) o|c=8 h=4 w=4", "o (c h w) -> (c h w) o|c=8 h=4 w=4"

ASKED: dict[str, Case] = {
    "names blanked": square(*((f"a.{L}.{x}", f"params/b_{{i}}/{y}") for x, y in zip("mnrs", "cdzx", strict=True))),
    "q and k without meaning": square(
        (f"layers.{L}.alpha", "params/layers_{i}/one"), (f"layers.{L}.beta", "params/layers_{i}/two")
    ),
    "q and k without meaning, biases": square(("b.alpha", "params/b/one"), ("b.beta", "params/b/two"), bias=True),
    "two identical towers": [*tower("first_net", "params/red"), *tower("second_net", "params/blue")],
    "two identical heads": [*square(("head_one", "params/red")), *square(("head_two", "params/blue"))],
    "three projections, two unnamed": square(
        (f"l.{L}.q", "params/l_{i}/q"), (f"l.{L}.xa", "params/l_{i}/left"), (f"l.{L}.xb", "params/l_{i}/right")
    ),
    "heads as many as their width": [
        (f"attn.{L}.q_proj.weight", "layers/{i}/attn/q_proj/w", (F, 96), "(h d) i -> i h d|d=8")
    ],
    "fused in blocks": fused("attn.qkv.weight", False),
    "fused head by head": fused("attn.qkv.weight", True),
    "fused in blocks, grouped heads": grouped(False),
    "fused group by group": grouped(True),
    "stacked heads, axis 0": stacked_heads(0),
    "stacked heads, axis 1": stacked_heads(1),
    "joined in blocks": joined(False),
    "fused in one leaf, in blocks": [
        ("attn.qkv.weight", "params/attn/qkv/kernel", (3 * D, D), "(t h d) i -> i t h d|t=3 d=8")
    ],
    "fused in one leaf, head by head": [
        ("attn.qkv.weight", "params/attn/qkv/kernel", (3 * D, D), "(h t d) i -> i t h d|t=3 d=8")
    ],
    "square transposed convolution, flipped": [("up.weight", "params/ConvTranspose_0/kernel", (8, 8, 2, 2), flipped)],
    "square transposed convolution, not flipped": [("up.weight", "params/ConvTranspose_0/kernel", (8, 8, 2, 2), CONV)],
    "square transposed 1-D convolution": [("deconv.weight", "params/deconv/kernel", (8, 8, 3), flipped)],
    "a stack as long as its layers are wide, axis 0": layers_stacked(6, 6, 0),
    "a stack as long as its layers are wide, axis 1": layers_stacked(6, 6, 1),
    "a stack as long as its layers are wide, axis 2": layers_stacked(6, 6, 2),
    "flattened map, channels first": flattened(FIRST),
    "flattened map, channels last": flattened(LAST),
    "auto-named q, k and v": square(
        (f"l.{L}.q_proj", "params/l_{i}/Dense_0"),
        (f"l.{L}.k_proj", "params/l_{i}/Dense_1"),
        (f"l.{L}.v_proj", "params/l_{i}/Dense_2"),
    ),
    "a square of a kind that nothing tells": [("block.alpha.weight", "block/alpha/w", (D, D), LIN)],
    "a bare square parameter against a kernel": [("scope.proj", "params/scope/proj/kernel", (D, D), "")],
    "a bilinear map": [
        ("scorer.biaffine.weight", "params/scorer/biaffine/kernel", (5, D, D), "o a b -> a b o"),
        ("scorer.biaffine.bias", "params/scorer/biaffine/bias", (5,)),
    ],
    "a convolution's window as a Linear": [
        ("patch.weight", "params/patch/kernel", (D, 3, 4, 4), "o i a b -> (a b i) o")
    ],
    "norms that only number one side's place": [
        *[
            (f"l.{L}.{a}.weight", f"params/l_{{i}}/{b}/scale", (D,))
            for a, b in (("foo_norm", "LN_x"), ("bar_norm", "LN_y"))
        ]
    ],
}


def stored_in_out() -> Case:
    """Rectangular siblings show that this checkpoint stores (in, out); its square one is stored so, too."""
    rows: Case = [
        (f"h.{L}.{a}.weight", f"params/h_{{i}}/{a}/kernel", s, "")
        for a, s in (("c_attn", (D, 3 * D)), ("c_fc", (D, F)), ("c_proj", (D, D)))
    ]
    rows += [
        (f"h.{L}.{a}.bias", f"params/h_{{i}}/{a}/bias", (n,)) for a, n in (("c_attn", 96), ("c_fc", F), ("c_proj", D))
    ]
    return [*rows, ("lm_head.weight", "params/lm_head/kernel", (99, D), LIN)]


def prefixed(rows: Case, torch: str = "", flax: str = "") -> Case:
    out: Case = []
    for a, b, *rest in rows:
        keys = (
            f"{torch}{a}" if isinstance(a, str) else a,
            b.replace("params/", f"params/{flax}", 1) if isinstance(b, str) else b,
        )
        out.append((*keys, *rest))
    return out


BASE: Case = [
    ("embed.weight", "params/embed/embedding", (99, D)),
    *square((f"layers.{L}.q_proj", "params/layers_{i}/query"), (f"layers.{L}.k_proj", "params/layers_{i}/key")),
    *[(f"layers.{L}.fc{n}.weight", f"params/layers_{{i}}/fc{n}/kernel", s, LIN) for n, s in ((1, (F, D)), (2, (D, F)))],
    *[(f"layers.{L}.norm{n}.weight", f"params/layers_{{i}}/norm{n}/scale", (D,)) for n in (1, 2)],
    ("norm.weight", "params/norm/scale", (D,)),
]

DECIDED: dict[str, Case] = {
    "stored (in, out), betrayed by rectangular siblings": stored_in_out(),
    "square embedding": [("embed.weight", "params/embed/embedding", (D, D)), *square(("fc", "params/fc"))],
    "square embedding under a bare name": [("embed_tokens.weight", "embedder/input_embedding", (D, D))],
    "convolution cube": [("conv.weight", "params/conv/kernel", (3, 3, 3, 3), CONV)],
    "convolution cube in three dimensions": [("conv.weight", "params/conv/kernel", (3,) * 5, "o i a b c -> a b c i o")],
    "square convolution": [("conv.weight", "params/conv/kernel", (8, 8, 3, 3), CONV)],
    "numbers that sort wrongly as text": [
        ("layers.{i:0..11}.fc.weight", "params/layers_{i}/fc/kernel", (D, D), LIN),
        ("layers.{i:0..11}.ln.weight", "params/layers_{i}/ln/scale", (D,)),
    ],
    "an offset on one side": [
        ("layers.{i:0..3}.fc.weight", "params/layers_{i+1}/fc/kernel", (D, D), LIN),
        ("layers.{i:0..3}.ln.weight", "params/layers_{i+1}/ln/scale", (D,)),
    ],
    "a wrapper on the torch side": prefixed(BASE, torch="module.model."),
    "a compiled model": prefixed(BASE, torch="_orig_mod."),
    "a wrapper on the Flax side": prefixed(BASE, flax="backbone/"),
    "a wrapper on both sides": prefixed(BASE, torch="net.", flax="encoder_module/"),
    "equal names at two depths": [
        ("norm.weight", "params/norm/scale", (D,)),
        ("encoder.norm.weight", "params/encoder/norm/scale", (D,)),
        ("encoder.encoder.norm.weight", "params/encoder/encoder/norm/scale", (D,)),
    ],
    "leading axes of length one": [
        ("cls_token", "params/cls_token", (D,), "d -> 1 1 d"),
        ("pos_embed", "params/pos_embed", (1, 17, D), "1 n d -> n d"),
    ],
    "a scalar": [
        ("logit_scale", "params/logit_scale", ()),
        ("scope.temperature", "params/scope/temperature", (1,), "1 -> "),
    ],
    "merged numbers": [("stages.{s:0..1}.{j:0..2}.fc.weight", None, None)],
    "a Linear as a 1x1 convolution": [("head.weight", "params/head/kernel", (10, D), "o i -> 1 1 i o")],
    "a 1x1 convolution as a Linear": [("head.weight", "params/head/kernel", (10, D, 1, 1), "o i 1 1 -> i o")],
    "depthwise convolution": [("conv1d.weight", "params/conv1d/kernel", (96, 1, 4), "o i k -> k i o")],
    "heads that GQA shows": [
        (f"l.{L}.{a}_proj.weight", f"layers/{{i}}/{a}_proj/w", (n, D), IN) for a, n in (("q", D), ("k", 16), ("v", 16))
    ],
    "old weight norm under torch's names": [
        ("conv.weight_g", "params/conv/weight_g", (1, 1, 16)),
        ("conv.weight_v", "params/conv/weight_v", (D, 16, 16)),
    ],
    "parametrized weight norm": [
        ("conv.parametrizations.weight.original0", "params/conv/weight_g", (1, 1, 16)),
        ("conv.parametrizations.weight.original1", "params/conv/weight_v", (D, 16, 16)),
    ],
    "batch norm with statistics": [
        ("bn.weight", "params/BatchNorm_0/scale", (D,)),
        ("bn.bias", "params/BatchNorm_0/bias", (D,)),
        ("bn.running_mean", "batch_stats/BatchNorm_0/mean", (D,)),
        ("bn.running_var", "batch_stats/BatchNorm_0/var", (D,)),
    ],
    "gate and up that differ only by name": [
        (f"l.{L}.mlp.{a}_proj.weight", f"params/l_{{i}}/mlp/{a}/kernel", (F, D), LIN) for a in ("gate", "up")
    ],
    "self and cross attention": [
        (f"l.{L}.{s}_attn.{a}_proj.weight", f"params/l_{{i}}/{t}_attention/{b}/kernel", (D, D), LIN)
        for s, t in (("self", "self"), ("encoder", "cross"))
        for a, b in zip("qkv", ("query", "key", "value"), strict=True)
    ],
    "pre and post norms": [
        (f"l.{L}.{a}_layernorm.weight", f"params/l_{{i}}/{b}/scale", (D,))
        for a, b in (("input", "attn_norm"), ("post_attention", "mlp_norm"))
    ],
    "text and image towers": [*tower("text_model", "params/language"), *tower("vision_model", "params/visual")],
}
DECIDED["merged numbers"] = [
    row
    for s in range(2)
    for j in range(3)
    for row in (
        (f"stages.{s}.{j}.fc.weight", f"params/blocks_{3 * s + j}/fc/kernel", (D, D), LIN),
        (f"stages.{s}.{j}.ln.weight", f"params/blocks_{3 * s + j}/ln/scale", (D,)),
    )
]


def projection_first() -> Case:
    """Flax calls a block's projection before its convolutions: in half of the blocks the numbers start one later."""
    rows: Case = []
    width = 8
    for k, (stage, j) in enumerate(((1, 0), (1, 1), (2, 0), (2, 1))):
        out, t, f = 16 * stage, f"layer{stage}.{j}", f"params/Block_{k}"
        if j == 0:
            rows.append((f"{t}.downsample.0.weight", f"{f}/Conv_0/kernel", (out, width, 1, 1), CONV))
        first = 1 - j
        rows.append((f"{t}.conv1.weight", f"{f}/Conv_{first}/kernel", (out, width, 3, 3), CONV))
        rows.append((f"{t}.conv2.weight", f"{f}/Conv_{first + 1}/kernel", (out, out, 3, 3), CONV))
        width = out
    return rows


def two_stacks() -> Case:
    """Two kinds of layers, numbered through on one side and stacked apart on the other."""

    def turned(*a: Any) -> Any:
        return (np.stack([x.T for x in a]),)

    rows: Case = []
    for kind, layers in (("dense", range(2)), ("moe", range(2, 5))):
        f = f"params/{kind}_layers"
        rows.append(([f"layers.{n}.attn.q.weight" for n in layers], [f"{f}/attn/q/kernel"], (D, D), turned))
        rows.append(([f"layers.{n}.norm.weight" for n in layers], [f"{f}/norm/scale"], (D,), lambda *a: (np.stack(a),)))
        name, shape = ("up", (F, D)) if kind == "dense" else ("router", (4, D))
        rows.append(([f"layers.{n}.mlp.{name}.weight" for n in layers], [f"{f}/mlp/{name}/kernel"], shape, turned))
    return rows


def layers_and_experts(order: str) -> Case:
    """Layers and experts stacked in one leaf, on any two axes."""
    axes = tuple("leio".index(axis) for axis in order)
    rows: Case = []
    for name, role, shape in (("w1", "wi_0", (F, D)), ("w3", "wi_1", (F, D)), ("w2", "wo", (D, F))):
        keys = [f"layers.{n}.moe.experts.{e}.{name}.weight" for n in range(3) for e in range(5)]

        def both(*a: Any) -> Any:
            return (np.stack([np.stack([a[5 * n + e].T for e in range(5)]) for n in range(3)]).transpose(axes),)

        rows.append((keys, [f"params/layers/moe/{role}"], shape, both))
    norms = [f"layers.{n}.ln.weight" for n in range(3)]
    return [*rows, (norms, ["params/layers/ln/scale"], (D,), lambda *a: (np.stack(a),))]


def cycles() -> Case:
    """Twelve layers numbered through; on the other side three cycles of four, the three stacked."""

    def turned(*a: Any) -> Any:
        return (np.stack([x.T for x in a]),)

    rows: Case = []
    for r in range(4):
        parts = (("attn.q", (D, D)), ("attn.o", (D, D))) if r == 3 else (("mix.a", (F, D)), ("mix.b", (D, F)))
        keys = [f"layers.{4 * c + r}" for c in range(3)]
        for name, shape in parts:
            flax = f"params/cycle/layer_{r}/{name.replace('.', '/')}/kernel"
            rows.append(([f"{key}.{name}.weight" for key in keys], [flax], shape, turned))
        norms = [f"{key}.norm.weight" for key in keys]
        rows.append((norms, [f"params/cycle/layer_{r}/norm/scale"], (D,), lambda *a: (np.stack(a),)))
    return rows


DECIDED |= {
    "cycles of four layers": cycles(),
    "a projection that is called first": projection_first(),
    "two kinds of layers, stacked apart": two_stacks(),
    "layers, then experts": layers_and_experts("leio"),
    "experts, then layers": layers_and_experts("elio"),
    "layers first, experts inside": layers_and_experts("lieo"),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", ASKED)
def test_what_nothing_decides_is_asked_and_one_line_settles_it(
    pairing: Callable[..., Any], name: str, reverse: bool
) -> None:
    pair = pairing(ASKED[name])
    found = pair.infer(reverse=reverse)
    verdict, loose = pair.judge(found, reverse)
    assert verdict == "asks"
    assert loose == [], "every open leaf stands in a question"
    assert all(len(question.candidates) >= 1 for question in found.questions)
    settled, answers, _ = pair.settle(reverse)
    assert settled == "exact"
    assert answers <= 8


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", DECIDED)
def test_what_has_one_defensible_answer_is_found(pairing: Callable[..., Any], name: str, reverse: bool) -> None:
    pair = pairing(DECIDED[name])
    found = pair.infer(reverse=reverse)
    assert pair.judge(found, reverse) == ("exact", []), [str(q) for q in found.questions]


def test_an_extra_head_of_constants_is_not_tied(pairing: Callable[..., Any]) -> None:
    """A zero bias and a unit scale are bit-identical to others without being tied: they stay left over."""
    pair = pairing([*BASE, ("fc.weight", "params/fc/kernel", (5, D), LIN), ("fc.bias", "params/fc/bias", (5,))])
    pair.torch["fc.bias"] = pair.flax["params/fc/bias"] = np.zeros(5, "f4")
    pair.torch["norm.weight"] = pair.flax["params/norm/scale"] = np.ones(D, "f4")
    pair.torch |= {"extra.weight": np.ones(D, "f4"), "extra.bias": np.zeros(5, "f4")}
    found = pair.infer()
    assert pair.judge(found)[0] == "exact"
    assert not {"extra.weight", "extra.bias"} & {name for entry in found.entries for name in entry.sources}


def test_tied_names_are_one_entry_and_the_reading_is_recorded(pairing: Callable[..., Any]) -> None:
    pair = pairing(BASE)
    pair.torch["lm_head.weight"] = pair.torch["embed.weight"]
    found = pair.infer()
    assert pair.judge(found)[0] == "exact"
    (entry,) = [e for e in found.entries if "params/embed/embedding" in e.targets]
    assert set(entry.sources) == {"embed.weight", "lm_head.weight"}
    assert found.reads


def test_a_decoder_whose_weight_is_tied_brings_its_zero_bias(pairing: Callable[..., Any]) -> None:
    pair = pairing(
        [("embed.weight", "params/embed/embedding", (99, D)), ("predictions.bias", "params/predictions/bias", (99,))]
    )
    pair.torch["predictions.bias"] = pair.flax["params/predictions/bias"] = np.zeros(99, "f4")
    pair.torch |= {
        "predictions.decoder.weight": pair.torch["embed.weight"],
        "predictions.decoder.bias": np.zeros(99, "f4"),
    }
    plan = gx.plan(pair.torch, pair.flax, source_side="torch", to="flax")
    assert plan.complete, str(plan)
    assert {entry.targets: set(entry.sources) for entry in plan.entries} == {
        ("params/embed/embedding",): {"embed.weight", "predictions.decoder.weight"},
        ("params/predictions/bias",): {"predictions.bias", "predictions.decoder.bias"},
    }


@pytest.mark.parametrize("extra", ["classifier.weight", "aux.layers.0.q_proj.weight", "teacher.norm.weight"])
def test_an_extra_head_is_left_over(pairing: Callable[..., Any], extra: str) -> None:
    pair = pairing(prefixed(BASE, torch="model."))
    shape = {"classifier.weight": (7, D), "aux.layers.0.q_proj.weight": (D, D)}.get(extra, (D,))
    pair.torch[extra] = np.random.default_rng(1).standard_normal(shape).astype("f4")
    found = pair.infer()
    assert pair.judge(found)[0] == "exact"
    assert extra not in {name for entry in found.entries for name in entry.sources}


def test_a_missing_tensor_is_not_replaced_by_an_unrelated_one(pairing: Callable[..., Any]) -> None:
    for name in list(pairing(BASE).torch):
        pair = pairing(BASE)
        pair.torch["stray.adapter.weight"] = pair.torch.pop(name)
        verdict, _ = pair.judge(pair.infer())
        assert verdict == "asks", name


def test_a_word_for_the_tower_does_not_make_a_stray_parameter_fit(pairing: Callable[..., Any]) -> None:
    """vision.embeddings.scratch and vision/embeddings/class_embedding share only where they stand."""
    pair = pairing(
        [
            ("vision_model.embeddings.class_embedding", "params/vision_model/embeddings/class_embedding", (D,)),
            *tower("vision_model", "params/vision_model"),
            *[
                (f"vision_model.head.fc{n}.weight", f"params/vision_model/head/fc{n}/kernel", (5 + n, D), LIN)
                for n in range(3)
            ],
        ]
    )
    pair.torch["vision_model.embeddings.scratch"] = pair.torch.pop("vision_model.embeddings.class_embedding")
    assert pair.judge(pair.infer())[0] == "asks"


def test_numbers_that_run_against_their_shapes_settle_nothing(pairing: Callable[..., Any]) -> None:
    """conv_a and conv_b are named in another order: rectangular ones show it, so the square ones are asked."""
    pair = pairing(
        [
            ("l.conv1.weight", "params/l/Conv_1/kernel", (16, 8, 3, 3), CONV),
            ("l.conv2.weight", "params/l/Conv_0/kernel", (8, 16, 3, 3), CONV),
            ("l.conv3.weight", "params/l/Conv_3/kernel", (8, 8, 3, 3), CONV),
            ("l.conv4.weight", "params/l/Conv_2/kernel", (8, 8, 3, 3), CONV),
        ]
    )
    assert pair.judge(pair.infer())[0] == "asks"


def test_known_buffers_are_dropped_with_the_reason(pairing: Callable[..., Any]) -> None:
    pair = pairing(BASE)
    pair.torch |= {"bn.num_batches_tracked": np.zeros((), "i8"), "embed.position_ids": np.arange(4)[None]}
    dropped = [entry for entry in pair.infer().entries if entry.dropped]
    assert {entry.sources[0] for entry in dropped} == {"bn.num_batches_tracked", "embed.position_ids"}
    assert all(entry.dropped for entry in dropped)


def test_rules_settle_part_and_a_bias_follows_its_weight(pairing: Callable[..., Any]) -> None:
    """A rule for one of two anonymous parts: its bias follows, and the other part stays a question until it is
    answered, for the two may be strangers."""
    pair = pairing(square(("b.alpha", "params/b/one"), ("b.beta", "params/b/two"), bias=True))
    rules = [f'{{ torch = "b.{a}.weight", flax = "params/b/{b}/kernel", layout = "linear" }}' for a, b in PARTS]
    found = pair.infer(rules=f"rules = [\n{rules[0]},\n]\n")
    assert pair.judge(found) == ("asks", [])
    assert any(entry.targets == ("params/b/one/bias",) for entry in found.entries)
    assert pair.judge(pair.infer(rules=f"rules = [\n{rules[0]},\n{rules[1]},\n]\n")) == ("exact", [])


PARTS = (("alpha", "one"), ("beta", "two"))


def test_same_side_ports(pairing: Callable[..., Any]) -> None:
    from graftax.match import infer
    from graftax.plans import Proposal
    from graftax.tree import Checkpoint

    pair = pairing(BASE)
    left, _ = pair.ends()
    names = {name: f"backbone.{name.replace('layers', 'blocks').replace('q_proj', 'query')}" for name in left}
    right = Checkpoint("other", "torch", {names[name]: spec for name, spec in left.specs.items()})
    found = infer(left, right, "torch", "torch", Proposal())
    assert not found.questions
    assert {entry.sources[0]: entry.targets[0] for entry in found.entries} == names
    assert all(entry.ops == () for entry in found.entries)
