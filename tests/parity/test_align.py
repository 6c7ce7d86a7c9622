"""Activation layouts."""

from __future__ import annotations

import numpy as np
import pytest

from graftax.adapters.layouts import Layout, declared, with_layout
from graftax.errors import UsageError
from graftax.ops import Rearrange, Scale
from graftax.parity.align import Alignment, Features, alignment_of
from graftax.parity.pairing import ModulePair
from graftax.plans import Entry
from graftax.tree import Module, TensorSpec

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("have", "want", "make"),
    [
        ((2, 3, 5), (2, 3, 5), lambda x: x),
        ((2, 3, 5, 7), (2, 5, 7, 3), lambda x: x.transpose(0, 2, 3, 1)),
        ((4, 2, 6), (2, 4, 6), lambda x: x.transpose(1, 0, 2)),
        ((2, 4, 6), (2, 4, 3, 2), lambda x: x.reshape(2, 4, 3, 2)),
        ((2, 4, 3, 2), (2, 4, 6), lambda x: x.reshape(2, 4, 6)),
        ((2, 3, 5, 7), (2, 35, 3), lambda x: x.transpose(0, 2, 3, 1).reshape(2, 35, 3)),
        ((2, 3, 4, 5), (2, 4, 15), lambda x: x.transpose(0, 2, 1, 3).reshape(2, 4, 15)),
        ((8, 6), (2, 4, 6), lambda x: x.reshape(2, 4, 6)),
        ((1, 4, 6), (2, 4, 6), lambda x: np.broadcast_to(x, (2, 4, 6))),
        ((1, 4), (4,), lambda x: x[0]),
    ],
)
def test_shapes_tell(have, want, make):
    x = array(*have)
    turn = Alignment().turn(x, want)
    assert turn is not None
    assert (turn(x) == make(x)).all()


def test_what_does_not_fit_is_not_forced_to():
    assert Alignment().turn(array(2, 5, 12), (10, 4, 3)) is None
    assert Alignment().turn(array(2, 3), (2, 4)) is None


def test_equal_sizes_follow_the_prior_and_values_only_if_they_agree():
    x = array(2, 4, 4, 4)
    last = x.transpose(0, 2, 3, 1)
    conv, plain = Alignment(channels_first=True), Alignment()
    assert (conv.turn(x, x.shape)(x) == last).all()
    assert (plain.turn(x, x.shape)(x) == x).all()
    assert (plain.turn(x, x.shape, last)(x) == last).all(), "the values agree with channels last"
    assert (plain.turn(x, x.shape, last + 1)(x) == x).all(), "they agree with nothing: the prior"


def test_torch_batch_second_is_found_by_value_where_lengths_are_equal():
    x = array(3, 3, 6)
    turn = Alignment().turn(x, x.shape, x.transpose(1, 0, 2))
    assert (turn(x) == x.transpose(1, 0, 2)).all()


def test_features_of_a_flattened_map():
    """torch flattens (C, H, W), Flax (H, W, C): the plan's kernel says which feature is which."""
    entry = Entry(
        ("fc.weight",), ("fc/kernel",), (Rearrange("o (c h w) -> (h w c) o", (("c", 3), ("h", 2), ("w", 2))),)
    )
    module = Module("fc", "Linear", ("torch.nn.modules.linear.Linear",), {}, {"weight": "fc.weight"})
    found = alignment_of(ModulePair("fc", "fc", (entry,)), module, {"fc.weight": TensorSpec((5, 12), "float32")})
    x = array(4, 3, 2, 2)
    turn = found.turn(x.reshape(4, 12), (4, 12), x.transpose(0, 2, 3, 1).reshape(4, 12) * 9)
    assert (turn(x.reshape(4, 12)) == x.transpose(0, 2, 3, 1).reshape(4, 12)).all()
    wrong = x.reshape(4, 12)
    assert (found.turn(wrong, (4, 12), wrong)(wrong) != wrong).any(), "torch's own order is a fault, not a layout"
    y = array(4, 5)
    assert (found.turn(y, (4, 5), None, outward=True)(y) == y).all()


def test_rows_permuted_and_scaled():
    """Rotary halves are interleaved on one side, and the query's scale is folded into its kernel."""
    ops = (Rearrange("(h two d) i -> i (h d two)", (("h", 2), ("two", 2), ("d", 3))), Scale(0.5))
    entry = Entry(("q.weight",), ("q/kernel",), ops)
    module = Module("q", "Linear", ("torch.nn.modules.linear.Linear",), {}, {"weight": "q.weight"})
    found = alignment_of(ModulePair("q", "q", (entry,)), module, {"q.weight": TensorSpec((12, 7), "float32")})
    y = array(4, 12)
    want = 0.5 * y.reshape(4, 2, 2, 3).transpose(0, 1, 3, 2).reshape(4, 12)
    assert np.allclose(found.turn(y, (4, 12), None, outward=True)(y), want)
    assert np.allclose(found.turn(y, (4, 2, 6), None, outward=True)(y), want.reshape(4, 2, 6))
    x = array(4, 7)
    assert (found.turn(x, (4, 7))(x) == x).all()


def test_embedding_ids_are_not_features():
    ops = (Rearrange("v (h d) -> v h d", (("h", 2), ("d", 3))),)
    module = Module("e", "Embedding", ("torch.nn.modules.sparse.Embedding",), {}, {"weight": "e.weight"})
    entry = Entry(("e.weight",), ("e/embedding",), ops)
    found = alignment_of(ModulePair("e", "e", (entry,)), module, {"e.weight": TensorSpec((9, 6), "float32")})
    assert found.inward == Features()
    assert found.outward.order is None


def test_declared_layouts():
    x = array(2, 3, 5, 7)
    for text in ("NCHW -> NHWC", "NCHW->NHWC", "N C H W -> N H W C", "batch ch row col -> batch row col ch"):
        assert (Layout.parse(text)(x) == x.transpose(0, 2, 3, 1)).all()
    layout = Layout.parse("NCHW -> NHWC")
    assert (layout.inverse(layout(x)) == x).all()
    ids = np.arange(6).reshape(2, 3)
    nest = {"image": x, "ids": ids, "train": False, "deep": (x, None)}
    turned = with_layout(nest, declared("NCHW -> NHWC"))
    assert turned["image"].shape == turned["deep"][0].shape == (2, 5, 7, 3)
    assert turned["ids"] is ids
    assert turned["train"] is False
    one = with_layout(nest, declared({"deep/0": "NCHW -> NHWC"}))
    assert one["image"] is x
    assert one["deep"][0].shape == (2, 5, 7, 3)
    assert with_layout(nest, None) is nest
    for wrong in ("NCHW", "NCHW -> NHW", "NCCW -> NCWC", "-> "):
        with pytest.raises(UsageError, match="is not axes"):
            Layout.parse(wrong)
