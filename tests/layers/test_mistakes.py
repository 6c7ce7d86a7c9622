"""The usual mistakes, each of the right shape: the parity of this folder sees every one of them."""

from __future__ import annotations

import numpy as np
import pytest

from .cases import CASES
from .harness import carry, from_flax, relative, start

BY_NAME = {case.name: case for case in CASES}


def swap(array: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.swapaxes(array, a, b).copy()


MISTAKES = [
    ("linear square", "a Linear left untransposed", {"kernel": lambda k, t: t["weight"]}),
    ("embedding 4x4", "an Embedding transposed", {"embedding": lambda k, t: k.T}),
    ("conv2d equal", "a convolution with height and width swapped", {"kernel": lambda k, t: swap(k, 0, 1)}),
    ("conv2d equal", "a convolution with in and out swapped", {"kernel": lambda k, t: swap(k, 2, 3)}),
    ("conv3d equal", "a 3d kernel by .T", {"kernel": lambda k, t: t["weight"].T}),
    ("conv_transpose2d equal default", "not flipped", {"kernel": lambda k, t: k[::-1, ::-1]}),
    ("conv_transpose2d equal default", "the other mode", {"kernel": lambda k, t: t["weight"].transpose(2, 3, 1, 0)}),
    ("conv_transpose2d equal kernel", "flipped", {"kernel": lambda k, t: k[::-1, ::-1]}),
    ("heads out, cubic", "split before the transpose", {"kernel": lambda k, t: t["weight"].reshape(k.shape)}),
    ("heads out, square", "heads by reshape alone", {"kernel": lambda k, t: t["weight"].reshape(k.shape)}),
    ("heads in, square", "merged heads by reshape alone", {"kernel": lambda k, t: t["weight"].reshape(k.shape)}),
    ("flatten cube", "NCHW columns left as they are", {"kernel": lambda k, t: t["weight"].T}),
    ("hf conv1d square", "a Conv1D transposed", {"kernel": lambda k, t: k.T}),
    (
        "attention heads of one", "in_proj cut without a transpose",
        {f"{n}/kernel": (lambda k, t, i=i: t["in_proj_weight"].reshape(3, *k.shape)[i])
         for i, n in enumerate(("query", "key", "value"))},
    ),
    (
        "attention 4 in 2", "out projection untransposed",
        {"out/kernel": lambda k, t: t["out_proj.weight"].reshape(k.shape)},
    ),
    ("fused interleaved, equal", "read as blocks", {
        f"{n}/kernel": (lambda k, t, i=i: t["weight"].reshape(3, -1, 4)[i].T.reshape(k.shape))
        for i, n in enumerate(("query", "key", "value"))
    }),
    ("layer norm over 4x4", "axes swapped", {"scale": lambda k, t: k.T}),
    ("GRU with b_hn", "b_hn dropped", {"hn/bias": lambda k, t: np.zeros_like(k)}),
    ("GRU with b_hn", "b_hn outside the reset gate", {
        "hn/bias": lambda k, t: np.zeros_like(k), "in/bias": lambda k, t: (t["bias_ih_l0"] + t["bias_hh_l0"])[6:]
    }),
    ("LSTM cell, optimized", "gates i, f, o, g", {
        f"{a}/kernel": (lambda k, t, n=n, w=w: t[w].reshape(4, 3, 3)[n].T)
        for a, n, w in (("ig", 3, "weight_ih"), ("io", 2, "weight_ih"), ("hg", 3, "weight_hh"), ("ho", 2, "weight_hh"))
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "changes"), MISTAKES, ids=[f"{m[0]}: {m[1]}" for m in MISTAKES])
def test_a_mistake_of_the_right_shape_shows(name, what, changes):
    run = start(BY_NAME[name], "linen")
    flax = carry(run.connection, run.arrays)
    for role, change in changes.items():
        (path,) = [p for p in flax if p.endswith(f"/{role}")]
        wrong = np.ascontiguousarray(change(flax[path], run.arrays))
        assert wrong.shape == flax[path].shape, "a mistake that a shape check would catch"
        flax[path] = wrong
    assert relative(from_flax(run.case, run.side.run(flax)), run.want) > 0.01, what
