"""connect and leaf_connections: what fits, what speaks for it, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from graftax.errors import LayoutError, PlanError, RulesError
from graftax.layers import Part, connect, known_kind, layouts, leaf_connections, settled
from graftax.ops import apply_chain, invert_chain, same_bits
from graftax.tree import Module, TensorSpec

TORCH = ("torch.nn.modules.linear.{}", "torch.nn.modules.module.Module")


def spec(*shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(shape, dtype)


def part(side: str, module: Module | None = None, **shapes: tuple[int, ...]) -> Part:
    """Roles with '.' and '/' written as '__' and '_of_'."""
    named = {role.replace("__", "." if side == "torch" else "/"): shape for role, shape in shapes.items()}
    return Part("m", side, {r: r for r in named}, {r: TensorSpec(s, "float32") for r, s in named.items()}, module)


def torch_module(kind: str, **settings: object) -> Module:
    return Module("m", kind, (f"torch.nn.modules.x.{kind}", "torch.nn.modules.module.Module"), settings)


def flax_module(kind: str, **settings: object) -> Module:
    return Module("m", kind, (f"flax.linen.x.{kind}", "flax.linen.module.Module"), settings)


def ways(found) -> list[tuple[str, str]]:
    return [(c.variant, c.by) for c in found]


# ---------------------------------------------------------------- evidence


def test_rectangular_linear_is_settled_by_its_shape_and_convention():
    found = connect(part("torch", weight=(3, 5), bias=(3,)), part("flax", kernel=(5, 3), bias=(3,)))
    assert ways(found) == [("linear", "convention")]
    assert "Linear" in found[0].evidence[0]


def test_square_linear_has_two_readings_the_convention_first():
    found = connect(part("torch", weight=(4, 4)), part("flax", kernel=(4, 4)))
    assert ways(found) == [("linear", "convention"), ("conv1d (in, out)", "shapes")]
    assert [c.rule for c in found] == ['layout = "linear"', 'layout = "identity"']
    assert settled(found) is found[0]


def test_a_live_torch_linear_settles_the_square():
    found = connect(part("torch", torch_module("Linear"), weight=(4, 4)), part("flax", kernel=(4, 4)))
    assert ways(found) == [("linear", "modules")]
    assert found[0].evidence[0] == "the live module is Linear"
    assert found[0].entries[0].evidence == ("the live module is Linear",)


def test_a_live_dense_alone_does_not_say_how_torch_stores():
    found = connect(part("torch", weight=(4, 4)), part("flax", flax_module("Dense"), kernel=(4, 4)))
    assert ways(found) == [("linear", "convention"), ("conv1d (in, out)", "shapes")]


def test_rectangular_in_out_is_read_as_stored():
    found = connect(part("torch", weight=(5, 3), bias=(3,)), part("flax", kernel=(5, 3), bias=(3,)))
    assert ways(found) == [("conv1d (in, out)", "shapes")]


def test_square_transposed_convolution_is_a_question():
    torch, flax = part("torch", weight=(3, 3, 2, 2), bias=(3,)), part("flax", kernel=(2, 2, 3, 3), bias=(3,))
    assert ways(connect(torch, flax)) == [("conv", "convention"), ("conv_transpose default", "shapes")]
    live = part("torch", torch_module("ConvTranspose2d"), weight=(3, 3, 2, 2), bias=(3,))
    found = connect(live, flax)
    assert ways(found) == [("conv_transpose", "shapes"), ("conv_transpose default", "shapes")]
    assert settled(found) is None
    for mode, variant in ((True, "conv_transpose"), (False, "conv_transpose default")):
        said = part("flax", flax_module("ConvTranspose", transpose_kernel=mode), kernel=(2, 2, 3, 3), bias=(3,))
        assert ways(connect(torch, said)) == [(variant, "modules")]


def test_the_length_of_a_bias_tells_a_transposed_convolution():
    found = connect(part("torch", weight=(4, 6, 3, 3), bias=(6,)), part("flax", kernel=(3, 3, 6, 4), bias=(6,)))
    assert ways(found) == [("conv_transpose", "shapes")]
    found = connect(part("torch", weight=(4, 6, 3, 3), bias=(4,)), part("flax", kernel=(3, 3, 6, 4), bias=(4,)))
    assert ways(found) == [("conv", "convention")]


def test_grouped_transposed_convolution_by_its_bias():
    found = connect(part("torch", weight=(4, 3, 2), bias=(6,)), part("flax", kernel=(2, 4, 6), bias=(6,)))
    assert ways(found) == [("conv_transpose default", "shapes")]
    assert "block-diagonal" in found[0].evidence[0]


def test_a_grouped_one_without_a_bias_is_not_taken_for_granted():
    assert connect(part("torch", weight=(4, 3, 2)), part("flax", kernel=(2, 4, 6))) == []
    live = part("torch", torch_module("ConvTranspose1d", groups=2), weight=(4, 3, 2))
    assert ways(connect(live, part("flax", kernel=(2, 4, 6)))) == [("conv_transpose default", "shapes")]


def test_a_lone_rnn_and_its_cell():
    torch = part("torch", torch_module("LSTM"), weight_ih_l0=(12, 5), weight_hh_l0=(12, 3))
    flax = part("flax", flax_module("RNN"), **{f"cell__{role}": shape for role, shape in LSTM_CELL.items()})
    assert ways(connect(torch, flax)) == [("one cell", "modules")]


def test_wide_kernels_of_three_axes_may_be_heads_or_a_convolution():
    heads = connect(part("torch", weight=(6, 5)), part("flax", kernel=(5, 2, 3)))
    assert ways(heads) == [("linear, out split", "convention")]
    conv = connect(part("torch", weight=(3, 5, 2)), part("flax", kernel=(2, 5, 3)))
    assert ways(conv) == [("conv", "convention")]
    both = connect(part("torch", weight=(6, 3)), part("flax", kernel=(3, 3, 2)))
    assert ways(both) == [("linear, out split", "convention"), ("linear, heads first", "convention")]
    assert settled(both) is None
    assert [c.rule for c in both] == ['ops = "(h d) i -> i h d"', 'ops = "(h d) i -> h i d"']


def test_axes_of_length_one_make_no_ambiguity():
    assert ways(connect(part("torch", weight=(3, 3)), part("flax", kernel=(3, 1, 3)))) == [
        ("linear, out split", "convention")
    ]


def test_an_embedding_is_never_transposed():
    found = connect(part("torch", weight=(4, 4)), part("flax", embedding=(4, 4)))
    assert ways(found) == [("embedding", "convention")]
    assert found[0].entries[0].ops == ()
    assert connect(part("torch", weight=(4, 5)), part("flax", embedding=(5, 4))) == []


def test_kinds_that_do_not_go_together_do_not_connect():
    linear = part("torch", torch_module("Linear"), weight=(4, 4))
    assert connect(linear, part("flax", flax_module("Embed"), embedding=(4, 4))) == []
    embed = part("torch", torch_module("Embedding"), weight=(4, 4))
    assert connect(embed, part("flax", flax_module("Dense"), kernel=(4, 4))) == []


def test_a_users_class_of_a_known_name_is_no_evidence():
    own = Module("m", "Linear", ("my.models.Linear", "torch.nn.modules.module.Module"))
    assert known_kind(own, "torch") == ""
    derived = Module("m", "Mine", ("my.Mine", "torch.nn.modules.linear.Linear", "torch.nn.modules.module.Module"))
    assert known_kind(derived, "torch") == "Linear"
    assert known_kind(Module("m", "Conv1D", ("transformers.pytorch_utils.Conv1D",)), "torch") == "Conv1D"
    assert known_kind(None, "flax") == ""


def test_batch_norm_drops_its_counter_and_gets_it_back():
    torch = part("torch", weight=(3,), bias=(3,), running_mean=(3,), running_var=(3,))
    counter = {"num_batches_tracked": "num_batches_tracked"}
    torch = Part("m", "torch", {**torch.leaves, **counter}, {**torch.specs, "num_batches_tracked": spec(dtype="int64")})
    (found,) = connect(torch, part("flax", scale=(3,), bias=(3,), mean=(3,), var=(3,)))
    (entry,) = [e for e in found.entries if e.dropped]
    assert "momentum=None" in str(entry.dropped)
    (back,) = apply_chain(invert_chain(entry.ops), ())
    assert back.dtype == np.int64
    assert back.shape == ()


# ---------------------------------------------------------------- partial, single leaves


def test_a_bias_on_one_side_only_connects_partially():
    torch, flax = part("torch", weight=(3, 5)), part("flax", kernel=(5, 3), bias=(3,))
    assert connect(torch, flax) == []
    (found,) = connect(torch, flax, partial=True)
    assert found.left == ("bias",)
    assert [e.targets for e in found.entries] == [("kernel",)]


@pytest.mark.parametrize(
    ("roles", "shapes", "layout", "want"),
    [
        (("weight", "kernel"), ((3, 5), (5, 3)), None, "linear"),
        (("weight", "kernel"), ((4, 4), (4, 4)), "linear", "linear"),
        (("weight", "kernel"), ((4, 4), (4, 4)), "identity", "conv1d (in, out)"),
        (("weight", "kernel"), ((3, 3, 2), (2, 3, 3)), "conv", "conv"),
        (("weight", "kernel"), ((3, 3, 2), (2, 3, 3)), "conv_transpose", "conv_transpose"),
        (("weight", "kernel"), ((3, 3, 2), (2, 3, 3)), "conv_transpose default", "conv_transpose default"),
        (("weight", "scale"), ((3,), (3,)), None, "layer norm"),
        (("weight", "embedding"), ((4, 4), (4, 4)), "identity", "embedding"),
        (("running_var", "var"), ((3,), (3,)), None, "batch norm"),
        (("bias", "bias"), ((6,), (2, 3)), None, "linear, split"),
        (("bias", "bias"), ((6,), (6,)), "conv", "bias"),
        (("cls_token", "cls"), ((1, 1, 5), (1, 1, 5)), None, "identity"),
    ],
)
def test_one_leaf(roles, shapes, layout, want):
    found = leaf_connections(roles[0], spec(*shapes[0]), roles[1], spec(*shapes[1]), layout=layout)
    assert found[0].variant == want
    assert settled(found) is found[0]
    assert found[0].entries[0].sources == (roles[0],)


def test_an_unknown_layout_is_named_with_the_known_ones():
    with pytest.raises(RulesError, match=r"diagonal.*linear"):
        leaf_connections("weight", spec(4, 4), "kernel", spec(4, 4), layout="diagonal")
    assert {"linear", "conv", "identity", "conv_transpose", "conv_transpose default"} <= set(layouts())


def test_a_layout_that_does_not_fit_gives_nothing():
    assert leaf_connections("weight", spec(3, 5), "kernel", spec(3, 5), layout="linear") == []


def test_packed_types_do_not_go_through_a_layout():
    packed = spec(4, 4, dtype="int4")
    assert leaf_connections("weight", packed, "kernel", packed, layout="linear") == []
    assert leaf_connections("weight", packed, "kernel", packed, layout="identity")


def test_scalars_and_vectors_stay_what_they_are():
    (found,) = leaf_connections("weight", spec(1), "negative_slope", spec())
    (out,) = apply_chain(found.entries[0].ops, (np.float32([0.25]),))
    assert out.shape == ()
    (back,) = apply_chain(invert_chain(found.entries[0].ops), (out,))
    assert same_bits(back, np.float32([0.25]))


# ---------------------------------------------------------------- bare parameters


@pytest.mark.parametrize(
    ("torch", "flax", "shapes", "want"),
    [
        ("pos_embed", "pos_embedding", ((1, 7, 5), (1, 7, 5)), [("identity", "convention")]),
        ("pos_embed", "pos_embedding", ((7, 5), (1, 7, 5)), [("identity", "convention")]),
        ("cls_token", "cls", ((1, 1, 5), (5,)), [("identity", "convention")]),
        ("gamma", "layer_scale", ((5,), (5,)), [("identity", "convention")]),
        ("weight", "table", ((5,), (5,)), [("identity", "convention")]),
        ("weight", "w", ((3, 5), (5, 3)), [("linear", "shapes")]),
        ("weight", "w", ((3, 5), (3, 5)), [("identity", "shapes")]),
        ("weight", "w", ((4, 4), (4, 4)), [("identity", "shapes"), ("linear", "shapes")]),
        ("proj", "kernel", ((4, 4), (4, 4)), [("identity", "shapes"), ("linear", "shapes")]),
        ("weight", "w", ((3, 5, 2), (2, 5, 3)), [("conv", "shapes")]),
        ("logit_scale", "logit_scale", ((), ()), [("identity", "convention")]),
        ("weight", "negative_slope", ((3,), (3,)), [("prelu of slopes", "convention")]),
        ("weight", "negative_slope", ((1,), (1,)), [("prelu of slopes", "convention")]),
        ("pos_embed", "pos_embedding", ((7, 5), (5, 7)), []),
        ("bias", "bias_table", ((5,), (6,)), []),
    ],
)
def test_bare(torch, flax, shapes, want):
    found = leaf_connections(torch, spec(*shapes[0]), flax, spec(*shapes[1]))
    assert ways(found) == want


def test_a_bare_parameter_keeps_its_order_and_its_own_axes_of_one():
    values = np.arange(35, dtype=np.float32).reshape(1, 7, 1, 5)
    (found,) = leaf_connections("rel_pos", spec(1, 7, 1, 5), "rel_pos", spec(7, 5))
    (out,) = apply_chain(found.entries[0].ops, (values,))
    assert same_bits(out, values.reshape(7, 5))
    (back,) = apply_chain(invert_chain(found.entries[0].ops), (out,))
    assert same_bits(back, values)


# ---------------------------------------------------------------- refusals

ATTENTION = {
    "query__kernel": (4, 2, 2), "key__kernel": (4, 2, 2), "value__kernel": (4, 2, 2), "out__kernel": (2, 2, 4),
}  # fmt: skip
LSTM_CELL = {f"{g}__kernel": (5, 3) for g in ("ii", "if", "ig", "io")} | {
    f"{g}__kernel": (3, 3) for g in ("hi", "hf", "hg", "ho")
}
IN_PROJ = {"in_proj_weight": (12, 4), "out_proj__weight": (4, 4)}


@pytest.mark.parametrize(
    ("torch", "flax", "words"),
    [
        (part("torch", weight=(3,)), part("flax", negative_slope=()), ["PReLU", "one scalar slope", "jnp.where"]),
        (
            part("torch", **IN_PROJ, bias_k=(1, 1, 4), bias_v=(1, 1, 4)), part("flax", **ATTENTION),
            ["bias_k and bias_v", "no learned extra key", "Append them"],
        ),
        (
            part("torch", torch_module("MultiheadAttention", add_zero_attn=True), **IN_PROJ),
            part("flax", **ATTENTION), ["add_zero_attn", "Append a zero key"],
        ),
        (
            part("torch", torch_module("MultiheadAttention"), **IN_PROJ),
            part("flax", flax_module("MultiHeadAttention", num_heads=2, num_kv_heads=1), **ATTENTION), ["num_kv_heads"],
        ),
        (
            part("torch", weight_ih_l0=(12, 5), weight_hh_l0=(12, 2), weight_hr_l0=(2, 3)), part("flax", **LSTM_CELL),
            ["proj_size", "weight_hr", "Write a cell"],
        ),
        (
            part("torch", torch_module("ConvTranspose1d", groups=2), weight=(4, 3, 2)), part("flax", kernel=(2, 3, 4)),
            ["grouped ConvTranspose", "no groups", "all output channels"],
        ),
        (
            part("torch", torch_module("ConvTranspose1d", groups=2), weight=(4, 3, 2)), part("flax", kernel=(2, 4, 3)),
            ["grouped ConvTranspose"],
        ),
        (
            part("torch", torch_module("Embedding", max_norm=1.0), weight=(4, 3)), part("flax", embedding=(4, 3)),
            ["max_norm", "Rescale the rows"],
        ),
        (
            part("torch", torch_module("InstanceNorm2d"), weight=(3,), bias=(3,), running_mean=(3,), running_var=(3,)),
            part("flax", flax_module("InstanceNorm"), scale=(3,), bias=(3,)), ["track_running_stats", "BatchNorm"],
        ),
        (
            part("torch", weight_orig=(3, 5), weight_u=(3,), weight_v=(5,)), part("flax", kernel=(5, 3)),
            ["spectral_norm", "remove_parametrizations"],
        ),
        (
            part("torch", torch_module("ConvTranspose1d"), weight_orig=(3, 5, 2), weight_u=(5,), weight_v=(6,)),
            part("flax", kernel=(2, 5, 3)), ["spectral_norm of a ConvTranspose", "remove_parametrizations"],
        ),
        (
            part("torch", torch_module("Linear"), weight_g=(3, 1), weight_v=(3, 5)),
            part("flax", flax_module("WeightNorm", feature_axes=-1), layer_instance__kernel=(5, 3)),
            ["without a scale", "use_scale"],
        ),
        (
            part("torch", torch_module("Linear"), weight=(3, 5)),
            part("flax", flax_module("DenseGeneral", batch_dims=(0,)), kernel=(2, 5, 3)), ["batch dimensions", "stack"],
        ),
    ],
)  # fmt: skip
def test_refused(torch, flax, words):
    with pytest.raises(LayoutError) as caught:
        connect(torch, flax)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 1


def test_weight_norm_along_another_axis_is_refused():
    scale = "WeightNorm_0/ConvTranspose_0~1kernel~1scale"
    shapes = {"ConvTranspose_0/kernel": (2, 3, 3), scale: (3,)}
    flax = Part("m", "flax", {r: r for r in shapes}, {r: TensorSpec(s, "float32") for r, s in shapes.items()},
                flax_module("WeightNorm", feature_axes=-1))  # fmt: skip
    torch = part("torch", torch_module("ConvTranspose1d"), weight_g=(3, 1, 1), weight_v=(3, 3, 2))
    found = connect(torch, flax)  # by shape alone it may have transpose_kernel=True, where the axes agree
    assert ways(found) == [("conv_transpose, kept", "shapes")]
    shapes["ConvTranspose_0/kernel"] = (2, 3, 5)
    shapes[scale] = (5,)
    torch = part("torch", torch_module("ConvTranspose1d"), weight_g=(3, 1, 1), weight_v=(3, 5, 2))
    flax = Part("m", "flax", flax.leaves, {r: TensorSpec(s, "float32") for r, s in shapes.items()}, flax.module)
    with pytest.raises(LayoutError, match="INPUT"):
        connect(torch, flax)


def test_a_users_own_parameters_of_refused_names_are_not_refused():
    for name in ("bias_k", "weight_hr_l0"):
        assert ways(leaf_connections(name, spec(1, 1, 4), name, spec(1, 1, 4))) == [("identity", "convention")]


def test_a_hidden_bias_of_a_gru_is_refused_by_value():
    torch = part("torch", weight_ih_l0=(9, 5), weight_hh_l0=(9, 3), bias_ih_l0=(9,), bias_hh_l0=(9,))
    flax = part("flax", dense_i__kernel=(5, 9), dense_h__kernel=(3, 9), dense_i__bias=(9,))
    (found,) = connect(torch, flax)
    entry = next(e for e in found.entries if len(e.sources) == 2)
    ones = np.ones(9, np.float32)
    with pytest.raises(PlanError, match=r"b_hn.*Linen"):
        apply_chain(entry.ops, (ones, ones))
    zeroed = np.float32([1] * 6 + [0] * 3)
    (out,) = apply_chain(entry.ops, (ones, zeroed))
    assert out.tolist() == [2] * 6 + [1] * 3


# ---------------------------------------------------------------- cells in order


def cells(*prefixes: str, i: int = 4, h: int = 2, second: int = 4) -> Part:
    """OptimizedLSTMCells of NNX, the first two of `i` inputs, the others of `second`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n, prefix in enumerate(prefixes):
        shapes |= {
            f"{prefix}__dense_i__kernel": (i if n < 2 else second, 4 * h),
            f"{prefix}__dense_h__kernel": (h, 4 * h),
        }
    return part("flax", **shapes)


def lstm(layers: int, i: int = 4, h: int = 2) -> Part:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for tail in ("", "_reverse"):
            shapes |= {f"weight_ih_l{layer}{tail}": (4 * h, i if layer == 0 else 2 * h)}
            shapes |= {f"weight_hh_l{layer}{tail}": (4 * h, h)}
    return part("torch", **shapes)


def order_of(connection) -> list[str]:
    pairs = {e.sources[0]: e.targets[0].partition("/")[0] for e in connection.entries if "_ih_" in e.sources[0]}
    return [pairs[name] for name in sorted(pairs, key=lambda n: (n.split("_l")[1][0], n))]


def test_cells_by_number_not_by_text():
    names = [f"c_{n}" for n in (8, 9, 10, 11)]
    found = connect(lstm(2), cells(*names))
    assert order_of(found[0]) == names
    assert found[0].assumes == ("cells are numbered layer by layer, forward before backward",)
    assert found[1].by == "shapes"
    assert order_of(found[1]) == ["c_8", "c_10", "c_9", "c_11"]


def test_cells_numbered_direction_by_direction_by_shape():
    flax = part("flax", **{
        f"c_{n}__{leaf}": shape for n, i in enumerate((5, 4, 5, 4))
        for leaf, shape in (("dense_i__kernel", (i, 8)), ("dense_h__kernel", (2, 8)))
    })  # fmt: skip
    (found,) = connect(lstm(2, i=5), flax)
    assert order_of(found) == ["c_0", "c_2", "c_1", "c_3"]
    assert "direction by direction" in found.assumes[0]


@pytest.mark.parametrize("names", [("forward_rnn", "backward_rnn"), ("fwd", "bwd"), ("rnn", "rnn_reverse")])
def test_a_word_for_the_direction_comes_before_the_alphabet(names):
    (found,) = connect(lstm(1), cells(*names))
    assert order_of(found) == list(names)
    assert found.assumes == ()


def test_cells_without_an_order_in_their_names_are_a_question():
    found = connect(lstm(1), cells("left", "right"))
    assert [order_of(c) for c in found] == [["left", "right"], ["right", "left"]]
    assert settled(found) is None
    assert connect(lstm(2), cells("a", "b", "c", "d")) == []


def test_an_incomplete_stack_connects_to_nothing():
    whole = lstm(2)
    some = {role: path for role, path in whole.leaves.items() if "l1_reverse" not in role}
    assert connect(Part("m", "torch", some, whole.specs), cells("c_0", "c_1", "c_2", "c_3")) == []
    assert connect(whole, cells("c_0", "c_1", "c_2")) == []
