"""Every reading gives the leaf's shape, no two give the same array, and the usual one comes first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax.layers import leaf_connections
from graftax.layers.readings import LeafKinds, named, readings
from graftax.ops import apply_chain, bind_chain, invert_chain
from graftax.tree import TensorSpec

Shape = tuple[int, ...]
SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_reading_moves_every_value_to_a_place_of_its_own(source: Shape, random: object) -> None:
    target = list(source)
    random.shuffle(target)  # type: ignore[attr-defined]
    array = np.arange(math.prod(source), dtype=np.float32).reshape(source)
    made = [apply_chain(ops, (array,))[0] for ops in readings(source, tuple(target))]
    assert made
    assert all(one.shape == tuple(target) and sorted(one.ravel()) == sorted(array.ravel()) for one in made)


@pytest.mark.parametrize(
    ("source", "target", "maps", "first"),
    [
        ((5, 3), (3, 5), (), lambda w: w.T),
        ((4, 4), (4, 4), (), lambda w: w.T),
        ((5, 3, 2, 2), (2, 2, 3, 5), (), lambda w: w.transpose(2, 3, 1, 0)),
        ((6, 5), (5, 2, 3), (), lambda w: w.T.reshape(5, 2, 3)),
        ((5, 6), (2, 3, 5), (), lambda w: w.T.reshape(2, 3, 5)),
        ((1, 4, 6), (4, 6), (), lambda w: w[0]),
        ((7,), (7,), (), lambda w: w),
    ],
)
def test_the_usual_reading_comes_first(source: Shape, target: Shape, maps: tuple[Shape, ...], first: object) -> None:
    array = np.arange(math.prod(source), dtype=np.float32).reshape(source)
    ops = next(iter(readings(source, target, maps)))
    np.testing.assert_array_equal(apply_chain(ops, (array,))[0], first(array))  # type: ignore[operator]


def test_a_flattened_map_is_read_in_every_order_of_its_axes() -> None:
    array = np.arange(10 * 24, dtype=np.float32).reshape(10, 24)
    made = [apply_chain(ops, (array,))[0] for ops in readings((10, 24), (24, 10), [(4, 3, 2)])]
    want = array.reshape(10, 4, 3, 2).transpose(2, 3, 1, 0).reshape(24, 10)
    assert any(np.array_equal(one, want) for one in made)


def test_readings_invert() -> None:
    spec = TensorSpec((6, 4), "float32")
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    for ops in readings((6, 4), (4, 2, 3)):
        bound, _ = bind_chain(ops, (spec,))
        there = apply_chain(bound, (array,))
        np.testing.assert_array_equal(apply_chain(invert_chain(bound), there)[0], array)


def test_shapes_that_do_not_fit_have_no_reading() -> None:
    assert not list(readings((5, 3), (4, 4)))


SIZES = st.sampled_from([1, 2, 3, 4, 5])


@given(st.lists(SIZES, min_size=1, max_size=4), st.permutations(range(4)), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_what_the_layer_table_connects_has_a_name(shape: list[int], order: list[int], split: int) -> None:
    """Matching offers every layout that the table gives for a weight and a kernel: one source, two doors."""
    target = tuple(shape[axis] for axis in order if axis < len(shape))
    whole = (
        target
        if split + 1 >= len(target)
        else (*target[:split], target[split] * target[split + 1], *target[split + 2 :])
    )
    for source in {tuple(shape), whole, whole[::-1]}:
        specs = TensorSpec(source, "float32"), TensorSpec(target, "float32")
        if math.prod(source) != math.prod(target) or 1 in (*source, *target):
            continue
        array = np.arange(math.prod(source)).reshape(source)
        ways = named(source, target, LeafKinds("weight", "free", "kernel"))
        known = {apply_chain(ops, (array,))[0].tobytes() for ops in ways.values()}
        for connection in leaf_connections("weight", specs[0], "kernel", specs[1]):
            if connection.layer in ("Linear", "Conv", "ConvTranspose") and connection.variant != "linear, split":
                (made,) = apply_chain(connection.entries[0].ops, (array,))
                assert made.tobytes() in known, (source, target, connection.variant)
