"""A slice pushed back through a chain of ops gives what cutting the whole array gives."""

from __future__ import annotations

import random

import numpy as np
import pytest

from graftax.errors import PlanError
from graftax.execute.loop_nests import NotLocal
from graftax.execute.pushdown import push
from graftax.ops import apply_chain
from graftax.ops.index_ops import Concat, Split
from graftax.ops.norm_ops import FoldWeightNorm
from graftax.ops.rearrange import Rearrange
from graftax.ops.value_ops import Sum
from graftax.tree import TensorSpec

from . import chains


def compare(seed: int, count: int) -> int:
    """`count` random chains, three random slices each; gives how many could not be pushed down."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(count):
        given = chains.sources(rng)
        ops, _ = chains.chain(rng, tuple(TensorSpec(a.shape, "float32") for a in given))
        ops, specs = chains.bound(ops, given)
        try:
            whole = apply_chain(ops, given)
        except PlanError:  # a crop of rows that are not zero
            continue
        for _ in range(3):
            target = rng.randrange(len(specs))
            box = chains.box(rng, specs[target].shape)
            want = whole[target][tuple(slice(*edge) for edge in box)]
            try:
                pieces = push(ops, tuple(TensorSpec(a.shape, "float32") for a in given), target, box)
            except NotLocal:
                refused += 1
                continue
            got = chains.made(pieces, given, want.shape, want.dtype)
            assert np.array_equal(got, want), (ops, given[0].shape, target, box)
    return refused


def test_random_slices_of_random_chains() -> None:
    assert compare(0, 700) < 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_thousand_slices(seed: int) -> None:
    assert compare(seed, 3400) < 150


def test_a_transposed_kernel_is_one_piece() -> None:
    [piece] = push((Rearrange("o i -> i o"),), (TensorSpec((6, 4), "float32"),), 0, [(1, 3), (0, 6)])
    [leaf] = piece.leaves()
    assert (piece.extents, piece.strides, leaf.strides, leaf.offset) == ((2, 6), (6, 1), (1, 4), 1)


def test_a_head_split_of_fused_qkv_reads_only_its_rows() -> None:
    ops = (Split(0, (8, 8, 8)), Rearrange("(h d) i -> i h d", (("h", 2),)))
    spec = TensorSpec((24, 5), "float32")
    [piece] = push(ops, (spec,), 1, [(0, 5), (1, 2), (0, 4)])
    [leaf] = piece.leaves()
    assert piece.count == 20
    assert leaf.offset == (8 + 4) * 5


def test_a_concat_is_cut_at_its_border() -> None:
    spec = TensorSpec((3, 2), "float32")
    pieces = push((Concat(0, (3, 3)),), (spec, spec), 0, [(2, 5), (0, 2)])
    assert sorted((p.count, next(p.leaves()).source) for p in pieces) == [(2, 0), (4, 1)]


def test_a_norm_needs_the_whole_tensor() -> None:
    specs = (TensorSpec((3, 1), "float32"), TensorSpec((3, 2), "float32"))
    with pytest.raises(NotLocal, match="whole"):
        push((FoldWeightNorm(0),), specs, 0, [(0, 1), (0, 2)])


def test_terms_of_a_sum_that_lie_apart_are_not_local() -> None:
    spec = TensorSpec((4,), "float32")
    ops = (Concat(0, (4, 4)), Split(0, (3, 5)), Split(0, (3,)))
    with pytest.raises(NotLocal):
        push((*ops[:1], Split(0, (3, 3, 2)), Sum(((0, 1), (2,)))), (spec, spec), 0, [(0, 3)])


def test_too_many_pieces_is_said_and_not_made() -> None:
    spec = TensorSpec((40, 3), "float32")
    with pytest.raises(NotLocal, match="too many"):
        push((Concat(0, (40,) * 9),), (spec,) * 9, 0, [(0, 360), (0, 3)], most=5)
