"""Rules port arrays torch -> Flax as the definition says, and back bit for bit; the dimensions are distinct."""

from __future__ import annotations

import numpy as np
import pytest

from graftax.errors import PlanError

from .harness import abstract, both_ways, checkpoint, failures, outcome, run, tensors


def heads(w, n):  # (n d, i) -> (i, n, d)
    return w.reshape(n, -1, w.shape[1]).transpose(2, 0, 1)


def test_the_examples_of_the_design():
    text = """rules = [
      { torch = "layers.{i}.attn.in_proj_weight", flax = ["layers/{i}/q/kernel", "layers/{i}/k/kernel", "layers/{i}/v/kernel"], heads = 4, fused = "block" },
      { torch = "layers.{4*c+1}.mlp.fc1.weight", flax = "cycle/mlp_1/kernel", stack = {c = 0} },
      { torch = "layers.{l}.experts.{e}.w1.weight", flax = "moe/wi_0", ops = "e l i o", l = "3..5" },
      { torch = "conv.weight", flax = "conv/kernel" },
      { torch = "fc.weight", flax = "fc/kernel", flatten = "C H W" },
    ]"""  # noqa: E501
    torch = {f"layers.{i}.attn.in_proj_weight": (36, 10) for i in range(2)}
    torch |= {f"layers.{4 * c + 1}.mlp.fc1.weight": (7, 6) for c in range(3)}
    torch |= {f"layers.{n}.experts.{e}.w1.weight": (5, 6) for n in range(3, 6) for e in range(4)}
    torch |= {"conv.weight": (8, 3, 2, 5), "fc.weight": (10, 8 * 6)}

    def wanted(t):
        out = {}
        for i in range(2):
            for name, part in zip("qkv", np.split(t[f"layers.{i}.attn.in_proj_weight"], 3), strict=True):
                out[f"layers/{i}/{name}/kernel"] = heads(part, 4)
        out["cycle/mlp_1/kernel"] = np.stack([t[f"layers.{n}.mlp.fc1.weight"].T for n in (1, 5, 9)])
        out["moe/wi_0"] = np.stack(
            [np.stack([t[f"layers.{n}.experts.{e}.w1.weight"].T for n in range(3, 6)]) for e in range(4)]
        )
        out["conv/kernel"] = t["conv.weight"].transpose(2, 3, 1, 0)
        out["fc/kernel"] = t["fc.weight"].reshape(10, 8, 2, 3).transpose(2, 3, 1, 0).reshape(48, 10)
        return out

    both_ways(text, torch, wanted)


@pytest.mark.parametrize("written", ["params/fc/kernel", "fc/kernel"])
def test_the_collection_may_be_left_out(written):
    both_ways(
        [{"torch": "fc.weight", "flax": written}],
        {"fc.weight": (3, 4)},
        lambda t: {"params/fc/kernel": t["fc.weight"].T},
    )


@pytest.mark.parametrize(
    ("keys", "shape", "wanted"),
    [
        ({"layout": "linear"}, (4, 4), lambda w: w.T),
        ({"layout": "identity"}, (4, 4), lambda w: w),
        ({"transpose": True}, (4, 4), lambda w: w.T),
        ({"transpose": False}, (4, 4), lambda w: w),
        ({}, (4, 4), lambda w: w.T),
        ({}, (4, 6), lambda w: w.T),
        ({}, (7, 3, 5), lambda w: w.transpose(2, 1, 0)),
        ({}, (4, 4, 4), lambda w: w.transpose(2, 1, 0)),
        ({}, (7, 3, 5, 2), lambda w: w.transpose(2, 3, 1, 0)),
        ({}, (7, 3, 5, 2, 4), lambda w: w.transpose(2, 3, 4, 1, 0)),
        ({"layout": "conv"}, (3, 3, 3, 3), lambda w: w.transpose(2, 3, 1, 0)),
        ({"layout": "conv_transpose"}, (3, 3, 3, 3), lambda w: w.transpose(2, 3, 1, 0)),
        ({"layout": "conv_transpose default"}, (3, 3, 3, 3), lambda w: w.transpose(2, 3, 0, 1)[::-1, ::-1]),
        ({"ops": "i o"}, (4, 6), lambda w: w.T),
        ({"ops": "o i"}, (4, 6), lambda w: w),
        ({"ops": "o i -> i o"}, (4, 6), lambda w: w.T),
        ({"ops": "i kw kh o"}, (7, 3, 5, 2), lambda w: w.transpose(1, 3, 2, 0)),
        ({"ops": "(h d) i -> i h d", "h": 2}, (6, 5), lambda w: heads(w, 2)),
        ({"ops": "(h d) i -> h i d", "heads": 2}, (6, 5), lambda w: w.reshape(2, 3, 5).transpose(0, 2, 1)),
        ({"ops": "o (h d) -> h d o", "d": 3}, (4, 6), lambda w: w.T.reshape(2, 3, 4)),
        ({"ops": "o (h d) -> (d h) o", "d": 3}, (4, 6), lambda w: w.reshape(4, 2, 3).transpose(2, 1, 0).reshape(6, 4)),
        ({"scale": 0.5}, (4, 6), lambda w: w.T * np.float32(0.5)),
        ({"pad": "o"}, (4, 6), lambda w: np.pad(w, ((0, 3), (0, 0))).T),
        ({"pad": 0}, (4, 6), lambda w: np.pad(w, ((0, 3), (0, 0))).T),
        ({"pad": {"o": 3}}, (4, 6), lambda w: np.pad(w, ((0, 3), (0, 0))).T),
        ({"pad": {-1: [1, 2]}, "fill": 7}, (4, 6), lambda w: np.pad(w, ((0, 0), (1, 2)), constant_values=7).T),
        ({"repeat": {"o": 3}}, (4, 6), lambda w: np.repeat(w, 3, 0).T),
        ({"repeat": "i"}, (4, 6), lambda w: np.repeat(w, 2, 1).T),
        ({"repeat": {"o": 2}, "pad": "i"}, (4, 6), lambda w: np.pad(np.repeat(w, 2, 0), ((0, 0), (0, 3))).T),
        ({"repeat": "h", "ops": "(h d) i -> i h d", "h": 2}, (6, 5), lambda w: np.repeat(heads(w, 2), 4, 1)),
        ({"repeat": {"h": 4}, "ops": "(h d) i -> i (h d)", "h": 2}, (6, 5),
         lambda w: np.repeat(heads(w, 2), 4, 1).reshape(5, 24)),
        ({"flatten": "C=2 H=3 W=5"}, (4, 30), lambda w: w.reshape(4, 2, 3, 5).transpose(2, 3, 1, 0).reshape(30, 4)),
        ({"flatten": "2 3 5"}, (4, 30), lambda w: w.reshape(4, 2, 3, 5).transpose(2, 3, 1, 0).reshape(30, 4)),
        ({"flatten": {"C": 2, "H": 3, "W": 5}}, (4, 30),
         lambda w: w.reshape(4, 2, 3, 5).transpose(2, 3, 1, 0).reshape(30, 4)),
        ({"flatten": "C=2 H W"}, (4, 30), lambda w: w.reshape(4, 2, 15).transpose(2, 1, 0).reshape(30, 4)),
        ({"flatten": "C L=15"}, (4, 30), lambda w: w.reshape(4, 2, 15).transpose(2, 1, 0).reshape(30, 4)),
        ({"flatten": "H C=2 W=5"}, (4, 30), lambda w: w.reshape(4, 3, 2, 5).transpose(1, 3, 2, 0).reshape(30, 4)),
        ({"flatten": "H W C=2"}, (4, 30), lambda w: w.T),
        ({"flatten": "W=5 H C=2"}, (4, 30), lambda w: w.reshape(4, 5, 3, 2).transpose(2, 1, 3, 0).reshape(30, 4)),
        ({"flatten": "C=2 W=5 H=3"}, (4, 30), lambda w: w.reshape(4, 2, 5, 3).transpose(3, 2, 1, 0).reshape(30, 4)),
        ({"flatten": "W=5 C=2 H=3"}, (4, 30), lambda w: w.reshape(4, 5, 2, 3).transpose(3, 1, 2, 0).reshape(30, 4)),
        ({"flatten": "T=5 F=3 C=2"}, (4, 30), lambda w: w.T),
    ],
)  # fmt: skip
def test_one_weight_to_one_kernel(keys, shape, wanted):
    both_ways(
        [{"torch": "a.weight", "flax": "a/kernel", **keys}],
        {"a.weight": shape},
        lambda t: {"a/kernel": wanted(t["a.weight"])},
    )


def test_rows_that_only_torch_has():
    """A vocabulary padded in torch, heads repeated in torch: checked, and put back."""
    weight = np.arange(24, dtype=np.float32).reshape(4, 6)
    for keys, wide in (
        ({"pad": "o"}, np.pad(weight, ((0, 3), (0, 0)))),
        ({"repeat": "o"}, np.repeat(weight, 3, 0)),
    ):
        rules = [{"torch": "a.weight", "flax": "a/kernel", **keys}]
        made = run(rules, {"a.weight": wide}, "torch", {"a/kernel": (6, 4)}, "flax")
        assert np.array_equal(made["a/kernel"], weight.T)
        assert np.array_equal(run(rules, made, "flax", {"a.weight": wide.shape}, "torch")["a.weight"], wide)
        wide[-1, -1] = 7
        with pytest.raises(PlanError):
            run(rules, {"a.weight": wide}, "torch", {"a/kernel": (6, 4)}, "flax")


def test_offset_of_a_zero_centred_norm():
    rules = [{"torch": "n.weight", "flax": "n/scale", "offset": 1.0}]
    both_ways(rules, {"n.weight": (5,)}, lambda t: {"n/scale": t["n.weight"] + np.float32(1)})


STACKED = {f"h.{n}.fc.weight": (5, 6) for n in range(4)}


@pytest.mark.parametrize(
    ("keys", "axis"),
    [
        ({"stack": {"l": 0}}, 0), ({"stack": {"l": 1}}, 1), ({"stack": {"l": 2}}, 2), ({"stack": {"l": -1}}, 2),
        ({"stack": {"l": -2}}, 1), ({"stack": -3}, 0), ({"ops": "l i o"}, 0), ({"ops": "i l o"}, 1),
        ({"ops": "o i -> i o l"}, 2), ({"stack": 0, "layout": "linear"}, 0),
    ],
)  # fmt: skip
def test_a_stack_on_any_axis(keys, axis):
    rules = [{"torch": "h.{l}.fc.weight", "flax": "h/fc/kernel", **keys}]
    both_ways(rules, STACKED, lambda t: {"h/fc/kernel": np.stack([a.T for a in t.values()], axis)})


def test_more_than_ten_layers_stack_in_the_order_of_their_numbers():
    shapes = {f"h.{n}.b": (2,) for n in sorted(range(12), key=str)}
    rules = [{"torch": "h.{l}.b", "flax": "b", "stack": {"l": 0}}]
    both_ways(rules, shapes, lambda t: {"b": np.stack([t[f"h.{n}.b"] for n in range(12)])})


@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (0, 2), (2, 0), (-1, 0), (3, 1), (-2, -1)])
def test_two_stacked_indices(axes):
    shapes = {f"l.{n}.e.{e}.w": (5, 6) for n in range(2) for e in range(3)}
    rules = [{"torch": "l.{l}.e.{e}.w", "flax": "w", "stack": {"l": axes[0], "e": axes[1]}, "layout": "linear"}]

    def wanted(t):
        out = np.empty((2, 3, 6, 5), np.float32)
        for n in range(2):
            for e in range(3):
                out[n, e] = t[f"l.{n}.e.{e}.w"].T
        at = [axis % 4 for axis in axes]
        return {"w": np.moveaxis(out, (0, 1), at)}

    both_ways(rules, shapes, wanted)


def test_one_index_stacked_and_one_shared():
    shapes = {f"l.{n}.e.{e}.w": (5, 6) for n in range(2) for e in range(3)}
    rules = [{"torch": "l.{l}.e.{e}.w", "flax": "l_{l+1}/w", "ops": "e i o"}]
    both_ways(
        rules, shapes, lambda t: {f"l_{n + 1}/w": np.stack([t[f"l.{n}.e.{e}.w"].T for e in range(3)]) for n in range(2)}
    )


def test_numbers_counted_through_groups():
    """Layers counted through against stages of blocks, and twelve layers as three cycles of four."""
    rules = [{"torch": "l.{4*i+j+1}.w", "flax": "s{i}/b{j}/w"}]
    both_ways(
        rules,
        {f"l.{n + 1}.w": (3,) for n in range(12)},
        lambda t: {f"s{n // 4}/b{n % 4}/w": t[f"l.{n + 1}.w"] for n in range(12)},
    )
    rules = [{"torch": "l.{4*c+j}.w", "flax": "mlp_{j}/w", "ops": "c i o"}]
    both_ways(
        rules,
        {f"l.{n}.w": (3, 5) for n in range(12)},
        lambda t: {f"mlp_{j}/w": np.stack([t[f"l.{4 * c + j}.w"].T for c in range(3)]) for j in range(4)},
    )


def test_a_torch_tensor_that_is_stacked():
    rules = [{"torch": "experts.w1", "flax": "e/{e}/wi/kernel", "ops": "e i o -> i o"}]
    both_ways(rules, {"experts.w1": (3, 5, 6)}, lambda t: {f"e/{e}/wi/kernel": t["experts.w1"][e] for e in range(3)})
    rules = [{"torch": "l.{l}.w1", "flax": "l/{l}/e/{e}/wi", "stack": {"e": -1}, "layout": "linear"}]
    both_ways(
        rules,
        {f"l.{n}.w1": (5, 6, 3) for n in range(2)},
        lambda t: {f"l/{n}/e/{e}/wi": t[f"l.{n}.w1"][:, :, e].T for n in range(2) for e in range(3)},
    )


def qkv(prefix="a/", leaf="kernel"):
    return [f"{prefix}{name}/{leaf}" for name in ("q", "k", "v")]


@pytest.mark.parametrize("split", [True, False])
def test_fused_in_blocks(split):
    rules = [
        {"torch": "a.qkv.weight", "flax": qkv(), "fused": "block", "heads": 3},
        {"torch": "a.qkv.bias", "flax": qkv(leaf="bias"), "fused": "block"},
    ]

    def wanted(t):
        out = {}
        for k, name in enumerate(qkv()):
            part = t["a.qkv.weight"][12 * k : 12 * k + 12]
            out[name] = heads(part, 3) if split else part.T
            bias = t["a.qkv.bias"][12 * k : 12 * k + 12]
            out[name.replace("kernel", "bias")] = bias.reshape(3, 4) if split else bias
        return out

    both_ways(rules, {"a.qkv.weight": (36, 7), "a.qkv.bias": (36,)}, wanted)


def test_in_proj_is_known_to_be_blocks():
    rules = [{"torch": "a.in_proj_weight", "flax": qkv()}, {"torch": "a.in_proj_bias", "flax": qkv(leaf="bias")}]

    def wanted(t):
        out = {}
        for k, name in enumerate(qkv()):
            out[name] = t["a.in_proj_weight"][4 * k : 4 * k + 4].T
            out[name.replace("kernel", "bias")] = t["a.in_proj_bias"][4 * k : 4 * k + 4]
        return out

    both_ways(rules, {"a.in_proj_weight": (12, 4), "a.in_proj_bias": (12,)}, wanted)


@pytest.mark.parametrize("layout", ["split", "flat", "ops"])
def test_grouped_heads_in_blocks(layout):
    rows = {"q": 12, "k": 6, "v": 6}
    rule = {"torch": "a.qkv.weight", "flax": qkv(), "fused": "block"}
    if layout == "ops":
        rule["ops"] = "(h d) i -> h i d"

    def wanted(t):
        out, start = {}, 0
        for name, n in rows.items():
            part = t["a.qkv.weight"][start : start + n]
            start += n
            split = part.reshape(-1, 3, 7)
            out[f"a/{name}/kernel"] = {
                "split": split.transpose(2, 0, 1), "flat": part.T, "ops": split.transpose(0, 2, 1)
            }[layout]  # fmt: skip
        return out

    both_ways([rule], {"a.qkv.weight": (24, 7)}, wanted)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kv", [4, 2])
def test_fused_and_interleaved(split, kv):
    """(h 3 d), and with grouped heads (kv (q.. k v) d)."""
    each = 4 // kv

    def wanted(t):
        out = {}
        for leaf, rest in (("weight", (7,)), ("bias", ())):
            wide = t[f"a.qkv.{leaf}"].reshape(kv, each + 2, 3, *rest)
            parts = {"q": wide[:, :each], "k": wide[:, each : each + 1], "v": wide[:, each + 1 :]}
            for name, part in parts.items():
                flat = part.reshape(-1, *rest)
                if leaf == "weight":
                    out[f"a/{name}/kernel"] = heads(flat, len(flat) // 3) if split else flat.T
                else:
                    out[f"a/{name}/bias"] = flat.reshape(-1, 3) if split else flat
        return out

    shape = kv * (each + 2) * 3
    rules = [
        {"torch": "a.qkv.weight", "flax": qkv(), "fused": "interleaved", "heads": 4},
        {"torch": "a.qkv.bias", "flax": qkv(leaf="bias"), "fused": "interleaved", "heads": 4, "kv_heads": kv},
    ]
    both_ways(rules, {"a.qkv.weight": (shape, 7), "a.qkv.bias": (shape,)}, wanted)


PARTS = ["a/q/kernel", "a/k/kernel", "a/v/kernel"]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("fused", ["block", "interleaved"])
def test_a_fused_convolution_has_no_axis_of_heads(rank, fused):
    """A kernel of three axes is no (in, heads, head_dim): `heads` counts the runs of rows."""
    ones = (1,) * rank

    def wanted(t):
        w = t["qkv.weight"].reshape(*((2, 3, 4) if fused == "interleaved" else (3, 2, 4)), 7)
        parts = w.swapaxes(0, 1) if fused == "interleaved" else w
        return {name: part.reshape(8, 7).T.reshape(*ones, 7, 8) for name, part in zip(PARTS, parts, strict=True)}

    rule = {"torch": "qkv.weight", "flax": PARTS, "fused": fused, "heads": 2}
    both_ways([rule], {"qkv.weight": (24, 7, *ones)}, wanted)


def test_a_list_of_numbers_states_their_order():
    rule = {"torch": "h.{l}.w", "flax": "h/w", "stack": {"l": 0}, "layout": "identity", "l": [2, 0, 1]}
    torch = {f"h.{n}.w": (2, 3) for n in range(3)}
    both_ways([rule], torch, lambda t: {"h/w": np.stack([t[f"h.{n}.w"] for n in (2, 0, 1)])})
    rule = {"torch": "h.w", "flax": "h_{l}/w", "stack": {"l": 0}, "layout": "identity", "l": [2, 0, 1]}
    both_ways([rule], {"h.w": (3, 2)}, lambda t: {f"h_{n}/w": t["h.w"][place] for place, n in enumerate((2, 0, 1))})


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        ({"parts": "gate up -> up gate"}, [*range(6, 12), *range(6)]),
        ({"parts": "q k v -> k v q"}, [*range(4, 12), *range(4)]),
        ({"parts": "q k v -> v q k", "q": 4, "k": 1, "v": 1}, [10, 11, *range(10)]),
        ({"parts": "q k v -> k q v", "fused": "interleaved", "heads": 2}, [2, 3, 0, 1, 4, 5, 8, 9, 6, 7, 10, 11]),
        ({"parts": "a b -> b a", "fused": "interleaved", "heads": 6}, [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]),
    ],
)
def test_fused_parts_in_another_order(keys, order):
    ends = {"torch": "fc.weight", "flax": "fc/kernel"}, {"torch": "fc.bias", "flax": "fc/bias"}
    torch = {"fc.weight": (12, 5), "fc.bias": (12,)}
    wanted = lambda t: {"fc/kernel": t["fc.weight"][order].T, "fc/bias": t["fc.bias"][order]}  # noqa: E731
    both_ways([end | keys for end in ends], torch, wanted)
    stacked = [{"torch": "h.{l}.w", "flax": "h/kernel", "stack": {"l": 1}, "layout": "linear"} | keys]
    layers = {f"h.{n}.w": (12, 5) for n in range(2)}
    both_ways(stacked, layers, lambda t: {"h/kernel": np.stack([t[f"h.{n}.w"][order].T for n in range(2)], 1)})


@pytest.mark.parametrize(("ops", "axis"), [("e i o -> e i o", 2), ("e o i -> e i o", 1)])
def test_parts_of_experts_that_take_turns(ops, axis):
    rule = {"torch": "m.gate_up", "flax": ["m/wi_0", "m/wi_1"], "fused": "interleaved", "heads": 4, "ops": ops}

    def wanted(t):
        w = t["m.gate_up"] if axis == 2 else t["m.gate_up"].swapaxes(1, 2)
        return {"m/wi_0": w[..., ::2], "m/wi_1": w[..., 1::2]}

    both_ways([rule], {"m.gate_up": (2, 6, 8) if axis == 2 else (2, 8, 6)}, wanted)


@pytest.mark.parametrize("order", ["i h d", "h i d", "h d i"])
def test_heads_that_the_layout_shows_need_not_be_said(order):
    rule = {"torch": "a.qkv.weight", "flax": PARTS, "fused": "interleaved", "ops": f"(h d) i -> {order}", "d": 3}

    def wanted(t):
        w = t["a.qkv.weight"].reshape(4, 3, 3, 7)
        axes = tuple({"h": 0, "d": 1, "i": 2}[name] for name in order.split())
        return {name: w[:, n].transpose(axes) for n, name in enumerate(PARTS)}

    both_ways([rule], {"a.qkv.weight": (36, 7)}, wanted)


def test_heads_of_a_fused_weight_that_is_stored_in_out():
    rules = [
        {"torch": "c.weight", "flax": qkv(), "fused": "block", "layout": "identity"},
        {"torch": "c.bias", "flax": qkv(leaf="bias"), "fused": "block", "layout": "identity"},
    ]
    both_ways(
        rules,
        {"c.weight": (5, 18), "c.bias": (18,)},
        lambda t: (
            {n: p.reshape(5, 2, 3) for n, p in zip(qkv(), np.split(t["c.weight"], 3, 1), strict=True)}
            | {n: p.reshape(2, 3) for n, p in zip(qkv(leaf="bias"), np.split(t["c.bias"], 3), strict=True)}
        ),
    )


def test_a_fused_weight_that_is_stored_in_out():
    rules = [{"torch": "c_attn.weight", "flax": qkv(), "fused": "block", "layout": "identity"}]
    both_ways(
        rules, {"c_attn.weight": (5, 12)}, lambda t: dict(zip(qkv(), np.split(t["c_attn.weight"], 3, 1), strict=True))
    )
    rules = [{"torch": "c_attn.weight", "flax": qkv(), "fused": "block", "ops": "i (h d) -> i h d"}]
    both_ways(
        rules,
        {"c_attn.weight": (5, 12)},
        lambda t: {n: p.reshape(5, 2, 2) for n, p in zip(qkv(), np.split(t["c_attn.weight"], 3, 1), strict=True)},
    )


@pytest.mark.parametrize("fused", ["block", "interleaved"])
def test_several_torch_tensors_in_one_kernel(fused):
    names = ["a.q.weight", "a.k.weight", "a.v.weight"]
    rules = [{"torch": names, "flax": "a/qkv/kernel", "fused": fused, "heads": 2}]

    def wanted(t):
        parts = [t[name] for name in names]
        if fused == "block":
            return {"a/qkv/kernel": np.concatenate(parts).T}
        wide = np.stack([part.reshape(2, 3, 7) for part in parts], 1)
        return {"a/qkv/kernel": wide.reshape(18, 7).T}

    both_ways(rules, dict.fromkeys(names, (6, 7)), wanted)


def test_a_list_stacked_on_an_axis():
    names = ["a.k.weight", "a.v.weight"]
    rules = [{"torch": names, "flax": "kv_einsum/w", "stack": 0, "ops": "(h d) i -> h i d"}]
    both_ways(
        rules,
        dict.fromkeys(names, (6, 7)),
        lambda t: {"kv_einsum/w": np.stack([t[n].reshape(2, 3, 7).transpose(0, 2, 1) for n in names])},
    )
    rules = [{"torch": ["l.{l}.k.w", "l.{l}.v.w"], "flax": "kv", "ops": "l i list o"}]
    both_ways(
        rules,
        {f"l.{n}.{x}.w": (6, 7) for x in "kv" for n in range(3)},
        lambda t: {"kv": np.stack([np.stack([t[f"l.{n}.{x}.w"].T for x in "kv"], 1) for n in range(3)])},
    )
    rules = [{"torch": "kv", "flax": ["k", "v"], "stack": {"list": 1}, "layout": "linear"}]
    both_ways(rules, {"kv": (6, 2, 7)}, lambda t: {n: t["kv"][:, k].T for k, n in enumerate("kv")})


def test_fused_and_stacked():
    rules = [{"torch": "l.{l}.qkv.weight", "flax": qkv("s/"), "fused": "block", "stack": {"l": 1}, "heads": 2}]

    def wanted(t):
        out = {}
        for k, name in enumerate(qkv("s/")):
            out[name] = np.stack([heads(w[6 * k : 6 * k + 6], 2) for w in t.values()], 1)
        return out

    both_ways(rules, {f"l.{n}.qkv.weight": (18, 7) for n in range(4)}, wanted)
    names = ["l.{l}.q.weight", "l.{l}.k.weight"]
    rules = [{"torch": names, "flax": "s/qk/kernel", "fused": "block", "stack": {"l": 0}}]
    both_ways(
        rules,
        {f"l.{n}.{x}.weight": (6, 7) for x in "qk" for n in range(4)},
        lambda t: {
            "s/qk/kernel": np.stack([np.concatenate([t[f"l.{n}.{x}.weight"] for x in "qk"]).T for n in range(4)])
        },
    )


@pytest.mark.parametrize("width", [4, 9])
def test_one_tensor_is_a_table_and_a_head_each_in_its_layout(width):
    rule = {"torch": "wte.weight", "flax": ["wte/embedding", "head/kernel"], "fused": "tied"}
    both_ways(
        [rule],
        {"wte.weight": (9, width)},
        lambda t: {"wte/embedding": t["wte.weight"], "head/kernel": t["wte.weight"].T},
    )


def test_tied_names():
    arrays = tensors({"wte.weight": (5, 4)})
    arrays["head.weight"] = arrays["wte.weight"].copy()
    rules = [{"torch": ["wte.weight", "head.weight"], "flax": "wte/embedding", "fused": "tied"}]
    made = run(rules, arrays, "torch", {"wte/embedding": (5, 4)}, "flax")
    assert np.array_equal(made["wte/embedding"], arrays["wte.weight"])
    back = run(rules, made, "flax", {name: a.shape for name, a in arrays.items()}, "torch")
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_the_sum_of_two_biases():
    arrays = tensors({f"l.{n}.{x}": (5,) for n in range(2) for x in ("b_ih", "b_hh")})
    rules = [{"torch": ["l.{l}.b_ih", "l.{l}.b_hh"], "flax": "b", "fused": "sum", "stack": {"l": 0}}]
    made = run(rules, arrays, "torch", {"b": (2, 5)}, "flax")
    assert np.array_equal(made["b"], [arrays[f"l.{n}.b_ih"] + arrays[f"l.{n}.b_hh"] for n in range(2)])
    back = run(rules, made, "flax", {name: a.shape for name, a in arrays.items()}, "torch")
    assert np.array_equal(back["l.1.b_ih"], made["b"][1])
    assert not back["l.1.b_hh"].any()


def test_the_sum_of_two_biases_gate_by_gate():
    arrays = tensors({f"l.{n}.{x}": (12,) for n in range(2) for x in ("b_ih", "b_hh")})
    gates = {f"c{n}/{g}/bias": (3,) for n in range(2) for g in "ifgo"}
    rules = [{"torch": ["l.{n}.b_ih", "l.{n}.b_hh"], "flax": [f"c{{n}}/{g}/bias" for g in "ifgo"], "fused": "sum"}]
    made = run(rules, arrays, "torch", gates, "flax")
    for n in range(2):
        summed = arrays[f"l.{n}.b_ih"] + arrays[f"l.{n}.b_hh"]
        assert np.array_equal(np.concatenate([made[f"c{n}/{g}/bias"] for g in "ifgo"]), summed)
    back = run(rules, made, "flax", {name: a.shape for name, a in arrays.items()}, "torch")
    assert np.array_equal(back["l.1.b_ih"], arrays["l.1.b_ih"] + arrays["l.1.b_hh"])
    assert not back["l.1.b_hh"].any()


def test_drop_fill_and_missing_in_both_directions():
    rules = [
        {"torch": "fc.weight", "flax": "fc/kernel"},
        {"torch": "rotary.{i}.inv_freq", "drop": "recomputed"},
        {"torch": "**.num_batches", "drop": "a counter", "fill": 3},
        {"flax": "new/bias", "fill": 0.25},
        {"flax": "head/kernel", "missing": "keep"},
    ]
    torch = {"fc.weight": (3, 4), "rotary.0.inv_freq": (2,), "rotary.1.inv_freq": (2,), "a.b.num_batches": ()}
    flax = {"fc/kernel": (4, 3), "new/bias": (6,), "head/kernel": (2, 2)}
    forth = outcome(rules, abstract(torch, "torch"), abstract(flax, "flax"))
    assert not forth.proposal.failures
    assert forth.missing == {"head/kernel": "keep"}
    dropped = {e.sources[0]: e.dropped for e in forth.proposal.entries if e.dropped}
    assert dropped == dict.fromkeys(("rotary.0.inv_freq", "rotary.1.inv_freq"), "recomputed") | {
        "a.b.num_batches": "a counter"
    }
    filled = next(e for e in forth.proposal.entries if e.targets == ("new/bias",))
    assert filled.ops[0].apply(())[0].tolist() == [0.25] * 6
    back = outcome(rules, abstract(flax, "flax"), abstract(torch, "torch"))
    assert not back.proposal.failures
    assert {e.sources for e in back.proposal.entries} == {("fc/kernel",), ("new/bias",), ()}
    counter = next(e for e in back.proposal.entries if e.targets == ("a.b.num_batches",))
    assert counter.ops[0].apply(())[0] == 3
    assert back.missing == {}


def test_wildcards_rename_a_subtree_and_change_the_separator():
    rules = [
        {"torch": "encoder.**.weight", "flax": "params/enc/**/kernel"},
        {"torch": "encoder.**.bias", "flax": "params/enc/**/bias"},
        {"torch": "head_*.w{i}.x", "flax": "heads/*/{i}"},
    ]
    torch = {"encoder.a.0.weight": (3, 4), "encoder.a.0.bias": (3,), "encoder.weight": (2, 5), "head_x.w1.x": (2,)}
    both_ways(
        rules,
        torch,
        lambda t: {
            "params/enc/a/0/kernel": t["encoder.a.0.weight"].T,
            "params/enc/kernel": t["encoder.weight"].T,
            "params/enc/a/0/bias": t["encoder.a.0.bias"],
            "heads/x/1": t["head_x.w1.x"],
        },
    )


def test_names_with_separators_and_braces_inside():
    rules = [{"torch": "a.{{x}}.w{*}", "flax": "a~1b/{{x}}~0/w"}]
    both_ways(rules, {"a.{x}.w*": (2, 3)}, lambda t: {"a~1b/{x}~0/w": t["a.{x}.w*"]})


def test_both_ends_on_one_side():
    flax = tensors({f"h_{n}/fc/kernel": (5, 6) for n in range(3)} | {"x/scale": (4, 4)})
    rules = [
        {"source": "h_{l}/fc/kernel", "target": "h/fc/kernel", "stack": {"l": 0}},
        {"source": "x/scale", "target": "y/scale"},
    ]
    made = run(rules, flax, "flax", {"h/fc/kernel": (3, 5, 6), "y/scale": (4, 4)}, "flax")
    assert np.array_equal(made["h/fc/kernel"], np.stack([flax[f"h_{n}/fc/kernel"] for n in range(3)]))
    assert np.array_equal(made["y/scale"], flax["x/scale"])
    back = [
        {"target": "h_{l}/fc/kernel", "source": "h/fc/kernel", "stack": {"l": 0}},
        {"source": "y/scale", "target": "x/scale"},
    ]
    again = run(back, made, "flax", {name: a.shape for name, a in flax.items()}, "flax")
    assert all(np.array_equal(again[name], flax[name]) for name in flax)


def test_source_and_target_between_two_sides_are_one_direction():
    rules = [{"source": "a.weight", "target": "b/kernel"}]
    assert np.array_equal(
        run(rules, tensors({"a.weight": (3, 4)}), "torch", {"b/kernel": (4, 3)}, "flax")["b/kernel"],
        tensors({"a.weight": (3, 4)})["a.weight"].T,
    )
    found = outcome([{"source": "b/kernel", "target": "a.weight"}], abstract({"b/kernel": (4, 4)}, "flax"),
                    abstract({"a.weight": (4, 4)}, "torch"))  # fmt: skip
    assert "Write `torch` and `flax`" in str(found.proposal.failures[0])


def test_the_plan_says_which_line_decided(tmp_path):
    path = tmp_path / "R.toml"
    path.write_text('# a comment\nrules = [\n\n  { torch = "a.weight", flax = "a/kernel" },\n]\n')
    found = outcome(path, abstract({"a.weight": (4, 4)}, "torch"), abstract({"a/kernel": (4, 4)}, "flax"))
    assert found.proposal.entries[0].evidence[0] == "R.toml line 4"


# ---------------------------------------------------------------- rules alone


def alone(rules, arrays, side, to):
    source = checkpoint(arrays, side)
    found = outcome(rules, source, None, to)
    assert not found.proposal.failures, [str(f) for f in found.proposal.failures]
    return found


ALONE = [
    {"torch": "fc.weight", "flax": "fc/kernel"},
    {"torch": "fc.bias", "flax": "fc/bias"},
    {"torch": "emb.weight", "flax": "emb/embedding"},
    {"torch": "conv.weight", "flax": "conv/kernel", "layout": "conv"},
    {"torch": "up.weight", "flax": "up/kernel", "layout": "conv_transpose default"},
    {"torch": "q.weight", "flax": "q/kernel", "ops": "(h d) i -> i h d", "h": 2},
    {"torch": "h.{l}.w", "flax": "h/w", "ops": "l i o"},
    {"torch": "qkv.weight", "flax": ["q2/kernel", "k2/kernel", "v2/kernel"], "fused": "block"},
    {"torch": "kv.weight", "flax": "kv/kernel", "ops": "(h d) i -> i h d", "h": 2, "repeat": {"h": 3}},
    {
        "torch": "gqa.weight",
        "flax": ["q3", "k3", "v3"],
        "fused": "block",
        "heads": 4,
        "kv_heads": 2,
        "ops": "(h d) i -> i h d",
    },
    {"torch": ["x.weight", "y.weight"], "flax": "xy/kernel", "fused": "block"},
    {"torch": "n.weight", "flax": "n/scale", "scale": 2.0},
    {"torch": "flat.weight", "flax": "flat/kernel", "flatten": "C=2 H W"},
    {"torch": "moe", "flax": "moe/{e}", "stack": {"e": 0}, "ops": "o i -> i o"},
]
TORCH = {
    "fc.weight": (3, 4), "fc.bias": (3,), "emb.weight": (5, 2), "conv.weight": (4, 2, 3), "up.weight": (4, 2, 3, 3),
    "q.weight": (6, 5), "h.0.w": (3, 2), "h.1.w": (3, 2), "qkv.weight": (12, 5), "gqa.weight": (16, 5),
    "kv.weight": (6, 5),
    "x.weight": (3, 2), "y.weight": (3, 2), "n.weight": (7,), "flat.weight": (3, 8), "moe": (3, 4, 5),
}  # fmt: skip


def test_rules_alone_say_what_comes_out_and_back():
    arrays = tensors(TORCH)
    found = alone(ALONE, arrays, "torch", "flax")
    assert set(found.targets) == {t for e in found.proposal.entries for t in e.targets}
    made = run(ALONE, arrays, "torch", {name: spec.shape for name, spec in found.targets.items()}, "flax")
    assert np.array_equal(made["fc/kernel"], arrays["fc.weight"].T)
    assert np.array_equal(made["kv/kernel"], np.repeat(heads(arrays["kv.weight"], 2), 3, 1))
    assert [found.targets[name].shape for name in ("q3", "k3", "v3")] == [(5, 4, 2), (5, 2, 2), (5, 2, 2)]
    assert np.array_equal(made["moe/2"], arrays["moe"][2].T)
    back = alone(ALONE, made, "flax", "torch")
    assert {name: spec.shape for name, spec in back.targets.items()} == TORCH
    again = run(ALONE, made, "flax", TORCH, "torch")
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("rule", "shape", "text"),
    [
        ({"torch": "a.w", "flax": "a/wi"}, (3, 4), "write layout"),
        ({"torch": "a.weight", "flax": ["q/kernel", "k/kernel"], "fused": "block", "heads": 2}, (4, 4), "write ops"),
        ({"torch": "a.weight", "flax": "q/kernel", "heads": 2}, (4, 4), "write ops"),
        ({"flax": "x", "fill": 0}, (3, 4), "without a `like`"),
        ({"torch": "a.weight", "flax": "a/kernel", "pad": "o"}, (3, 4), "write how many"),
    ],
)
def test_rules_alone_that_say_too_little(rule, shape, text):
    source = abstract({rule.get("torch", "a.weight"): shape}, "torch")
    found = outcome([rule], source, None, "flax").proposal
    assert len(found.failures) == 1
    assert text in str(found.failures[0])


def test_no_failure_hides_behind_an_entry():
    """A group that does not fit is no entry, and its keys raise no further question."""
    found = failures(
        [{"torch": "a.weight", "flax": "a/kernel"}, {"torch": "b.weight", "flax": "b/kernel"}],
        {"a.weight": (3, 4), "b.weight": (3, 4)},
        {"a/kernel": (4, 3), "b/kernel": (5, 3)},
    )
    assert [f.key for f in found] == ["b.weight -> b/kernel"]
