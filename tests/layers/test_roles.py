"""Roles: what the axes of a leaf are, by live modules of every kind, stacked or not, and by names alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx

import graftax as gx
from graftax.execute.opening import open_tree
from graftax.layers import LAYERS, role_of

X = jax.ShapeDtypeStruct((2, 5, 8), "float32")


class Block(fn.Module):
    @fn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        x = fn.Dense(8, name="fc")(fn.LayerNorm(name="ln")(x))
        return fn.MultiHeadDotProductAttention(2, name="attention")(x, x), None


class Net(fn.Module):
    layers: int = 3
    axis: int = 0

    @fn.compact
    def __call__(self, x: Any) -> Any:
        scan = fn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.layers)
        x, _ = scan(name="scan")(x, None)
        experts = fn.vmap(
            fn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=4
        )
        experts(7, name="experts")(x)
        fn.DenseGeneral((2, 4), batch_dims=(0,), name="batched")(x)
        fn.DenseGeneral(6, axis=(-2, -1), name="merged")(x)
        fn.Conv(6, (3,), feature_group_count=2, name="conv")(x)
        fn.ConvTranspose(6, (3,), transpose_kernel=True, name="up")(x)
        fn.ConvTranspose(6, (3,), name="up_default")(x)
        fn.Embed(9, 8, name="embed")(jnp.zeros((2, 3), int))
        fn.RNN(fn.GRUCell(6), name="rnn")(x)
        return x


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.conv = torch.nn.Conv2d(4, 6, 3, groups=2)
        self.up = torch.nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.rnn = torch.nn.LSTM(3, 4, proj_size=2)
        self.embed = torch.nn.Embedding(3, 4)
        self.ln = torch.nn.LayerNorm((2, 3))
        self.unlisted = torch.nn.BCELoss(torch.ones(2, 3))
        self.bilinear = torch.nn.Bilinear(2, 3, 4)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs)
        self.einsum = nnx.Einsum("bsd,ndh->bsnh", (2, 8, 4), rngs=rngs)
        self.batched = nnx.LinearGeneral(3, 4, batch_axis={0: 2}, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(3, 4, rngs=rngs)
        self.stack = nnx.vmap(lambda r: nnx.Linear(3, 4, rngs=r))(nnx.Rngs(0).split(5))
        self.kernel = nnx.Param(jnp.ones((3, 4)))


@pytest.fixture(scope="module")
def trees() -> dict[str, Any]:
    made = {"linen": gx.linen(Net(), X), "torch": Torch(), "nnx": nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))}
    return {name: open_tree(tree) for name, tree in made.items()}


ROLES = {
    "linen": {
        "params/scan/fc/kernel": ("stack", "in", "out"),
        "params/scan/fc/bias": ("stack", "out"),
        "params/scan/ln/scale": ("stack", "features"),
        "params/scan/attention/query/kernel": ("stack", "in", "heads", "head_dim"),
        "params/scan/attention/out/kernel": ("stack", "heads", "head_dim", "out"),
        "params/experts/kernel": ("stack", "in", "out"),
        "params/batched/kernel": ("stack", "in", "heads", "head_dim"),
        "params/merged/kernel": ("heads", "head_dim", "out"),
        "params/conv/kernel": ("k", "in", "out"),
        "params/up/kernel": ("k", "out", "in"),
        "params/up_default/kernel": ("k", "in", "out"),
        "params/embed/embedding": ("entries", "features"),
        "params/GRUCell_0/in/kernel": ("in", "out"),
    },
    "torch": {
        "fc.weight": ("out", "in"),
        "conv.weight": ("out", "in", "k", "k"),
        "up.weight": ("(groups in)", "out", "k"),
        "attention.in_proj_weight": ("(qkv heads head_dim)", "in"),
        "attention.out_proj.weight": ("out", "(heads head_dim)"),
        "rnn.weight_ih_l0": ("out", "in"),
        "rnn.weight_hr_l0": ("out", "in"),
        "embed.weight": ("entries", "features"),
        "ln.weight": ("features", "features"),
        "unlisted.weight": None,
        "bilinear.weight": ("out", "in1", "in2"),
    },
    "nnx": {
        "attention/query/kernel": ("in", "heads", "head_dim"),
        "attention/out/kernel": ("heads", "head_dim", "out"),
        "conv/kernel": ("k", "k", "in", "out"),
        "einsum/kernel": ("heads", "in", "head_dim"),
        "batched/kernel": ("stack", "in", "out"),
        "cell/dense_i/kernel": ("in", "out"),
        "stack/kernel": ("stack", "in", "out"),
        "stack/bias": ("stack", "out"),
        "kernel": None,  # a class of the user's own: its parameter's name shows nothing
    },
}


@pytest.mark.parametrize(("side", "path"), [(side, path) for side, rows in ROLES.items() for path in rows])
def test_live_modules_tell(trees: dict[str, Any], side: str, path: str) -> None:
    role = role_of(trees[side], path)
    assert (role and role.names) == ROLES[side][path]
    if role is not None:
        sizes = [int(np.prod([axis.size for axis in axes])) for axes in role.axes]
        assert tuple(sizes) == trees[side][path].shape


def test_heads_of_an_output_projection_are_inputs(trees: dict[str, Any]) -> None:
    role = role_of(trees["linen"], "params/scan/attention/out/kernel")
    assert role is not None
    assert role.inputs == ("heads", "head_dim")
    assert role.layer == "MultiheadAttention"
    assert (role.of_kind("stack"), role.of_kind("in"), role.of_kind("out")) == ((0,), (1, 2), (3,))
    part = role.indexed((1, slice(0, 1)))
    assert part is not None
    assert part.names == ("heads", "head_dim", "out")
    assert [axis.size for axis in part.parts] == [1, 4, 8]
    assert role.indexed((..., slice(2, 5))).names == role.names  # type: ignore[union-attr]


def test_a_part_of_a_merged_axis_has_no_role(trees: dict[str, Any]) -> None:
    role = role_of(trees["torch"], "attention.out_proj.weight")
    assert role is not None
    assert role.indexed((slice(None), slice(0, 4))) is None
    assert role.indexed((slice(0, 3),)).names == role.names  # type: ignore[union-attr]


@pytest.mark.parametrize(("layers", "axis", "place"), [(3, 1, 1), (8, 0, 0), (8, 1, 1), (8, -1, 2)])
def test_the_leaves_around_tell_where_a_scan_stacked(layers: int, axis: int, place: int) -> None:
    """With 8 layers of 8 inputs the shape alone fits two places; -1 is another axis of each leaf."""
    if axis == -1:

        class Plain(fn.Module):
            @fn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                return fn.Dense(8, use_bias=False, name="fc")(x)[..., :8], None

        class Outer(fn.Module):
            @fn.compact
            def __call__(self, x: Any) -> Any:
                return fn.scan(Plain, variable_axes={"params": -1}, split_rngs={"params": True}, length=3)(name="scan")(
                    x, None
                )[0]

        tree = open_tree(gx.linen(Outer(), X))
    else:
        tree = open_tree(gx.linen(Net(layers, axis), X))
    role = role_of(tree, "params/scan/fc/kernel")
    assert role is not None
    assert role.of_kind("stack") == (place,)


def test_a_stack_that_may_lie_on_two_axes_has_no_role() -> None:
    stack = nnx.eval_shape(lambda: nnx.vmap(lambda r: nnx.Linear(4, 5, use_bias=False, rngs=r))(nnx.Rngs(0).split(4)))
    assert role_of(open_tree(stack), "kernel") is None


def test_a_subclass_that_computes_itself_has_no_role() -> None:
    class Turned(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T.T

    assert role_of(open_tree(Turned(3, 3)), "weight") is None
    assert role_of(open_tree(torch.nn.Linear(3, 3)), "weight") is not None


@pytest.mark.parametrize(
    ("tree", "path", "names"),
    [
        ({"fc": {"kernel": np.ones((2, 3), "f4")}}, "fc/kernel", ("in", "out")),
        ({"embed": {"embedding": np.ones((2, 3), "f4")}}, "embed/embedding", ("entries", "features")),
        ({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}, "fc.weight", ("out", "in")),
        ({"c.weight": torch.ones(2, 3), "c.bias": torch.ones(3)}, "c.weight", None),  # (in, out) as in GPT-2
        ({"m.a.weight": torch.ones(3, 3), "m.a.bias": torch.ones(3), "m.b.weight": torch.ones(3, 5),
          "m.b.bias": torch.ones(5)}, "m.a.weight", None),  # its neighbour is (in, out)
        ({"fc": {"kernel": np.ones((2, 3, 4), "f4")}}, "fc/kernel", None),
        ({"pos": np.ones((2, 3), "f4")}, "pos", None),
        ({"fc": {"weight": np.ones((2, 3), "f4")}}, "fc/weight", None),
        ({"ln": {"scale": np.ones(3, "f4")}}, "ln/scale", ("features",)),
    ],
)  # fmt: skip
def test_names_tell_where_they_leave_no_doubt(tree: Any, path: str, names: Any) -> None:
    role = role_of(open_tree(tree), path)
    assert (role and role.names) == names


def test_every_class_has_its_axes_in_one_row() -> None:
    """A leaf that two rows described would have the role of the row that stands first."""
    for side in ("torch", "flax"):
        for kind in {k for layer in LAYERS for k in (layer.torch if side == "torch" else layer.flax)}:
            rows = [
                layer.name
                for layer in LAYERS
                if kind in (layer.torch if side == "torch" else layer.flax)
                and any(axes.side == side and (not axes.kinds or kind in axes.kinds) for axes in layer.axes)
            ]
            norms = {"InstanceNorm", "BatchNorm"}  # one description for all norms
            assert len(rows) < 2 or set(rows) <= norms or kind in ("RNN", "Bidirectional"), (kind, rows)
