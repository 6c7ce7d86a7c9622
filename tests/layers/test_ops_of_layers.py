"""Ops that rows make: rotary rows, fused projections, block-diagonal expansion, one pattern a tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftax.errors import LayoutError
from graftax.layers import block_diagonal_ops, fused_ways, leaf_connections
from graftax.ops import (
    Concat,
    Op,
    Rearrange,
    RearrangeEach,
    Split,
    apply_chain,
    bind_chain,
    chain_text,
    infer_chain,
    invert_chain,
    op_from_json,
    op_to_json,
    same_bits,
)
from graftax.tree import TensorSpec
from graftax.tree.dtypes import numpy_dtype

RNG = np.random.default_rng(0)


def f32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "float32")


def there_and_back(ops, *arrays):
    specs = tuple(TensorSpec(a.shape, a.dtype.name) for a in arrays)
    bound, out = bind_chain(ops, specs)
    made = apply_chain(bound, arrays)
    assert [a.shape for a in made] == [s.shape for s in out]
    assert all(op_from_json(op_to_json(op)) == op for op in bound)
    back = apply_chain(invert_chain(bound), made)
    assert infer_chain(invert_chain(bound), out) == specs
    assert all(same_bits(a, b) for a, b in zip(back, arrays, strict=True))
    return made


# ---------------------------------------------------------------- rotary


def rotate(x: np.ndarray, halves: bool, rotary: int) -> np.ndarray:
    """Rotary positions on (T, heads, head): pairs (2i, 2i + 1), or (i, i + rotary / 2)."""
    angles = np.arange(len(x))[:, None] * 10.0 ** (-2 * np.arange(rotary // 2) / rotary)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned, rest = x[..., :rotary], x[..., rotary:]
    a, b = (turned[..., : rotary // 2], turned[..., rotary // 2 :]) if halves else (turned[..., ::2], turned[..., 1::2])
    new = (a * cos - b * sin, a * sin + b * cos)
    out = np.concatenate(new, -1) if halves else np.stack(new, -1).reshape(turned.shape)
    return np.concatenate([out, rest], -1)


def rotary_ops(shape: tuple[int, ...], heads: int, rotary: int) -> tuple[Op, ...]:
    """Rows of a query or key weight (rows, in), or of its bias or per-head norm scale (rows), from interleaved rotary
    pairs to halves: W.reshape(H, h/2, 2, D).swapaxes(1, 2); only the first `rotary` rows of each head move."""
    head = shape[0] // heads
    tail = "" if len(shape) == 1 else " i"
    fixed = (("h", heads), ("p", 2))
    if rotary == head:
        return (Rearrange(f"(h d p){tail} -> (h p d){tail}", fixed),)
    return (
        Rearrange(f"(h d){tail} -> h d{tail}", fixed[:1]),
        Split(1, (rotary, head - rotary)),
        RearrangeEach((f"h (d p){tail} -> h (p d){tail}", ""), (fixed, ())),
        Concat(1, (rotary, head - rotary)),
        Rearrange(f"h d{tail} -> (h d){tail}", (("d", head), ("h", heads))),
    )


@pytest.mark.parametrize(("heads", "kv", "head", "rotary"), [(4, 2, 6, 6), (4, 4, 4, 4), (2, 1, 8, 4), (1, 1, 2, 2)])
@pytest.mark.parametrize("leave_scale", [False, True])
def test_interleaved_to_halves_keeps_the_scores(heads, kv, head, rotary, leave_scale):
    width, x = 5, RNG.standard_normal((7, 5))
    leaves = {
        name: (RNG.standard_normal((n * head, width)), RNG.standard_normal(n * head), RNG.standard_normal(head))
        for name, n in (("q", heads), ("k", kv))
    }

    def scores(halves: bool, moved: dict) -> np.ndarray:
        out = []
        for name, n in (("q", heads), ("k", kv)):
            weight, bias, scale = moved[name]
            y = (x @ weight.T + bias).reshape(7, n, head)
            y = y / np.sqrt((y * y).mean(-1, keepdims=True)) * scale
            out.append(np.repeat(rotate(y, halves, rotary), heads // n, 1))
        return np.einsum("thd,shd->hts", *out)

    moved = {}
    for name, n in (("q", heads), ("k", kv)):
        weight, bias, scale = leaves[name]
        given = ((weight, n), (bias, n), (scale, 1))
        made = [there_and_back(rotary_ops(a.shape, count, rotary), a)[0] for a, count in given]
        moved[name] = (made[0], made[1], scale if leave_scale else made[2])
    error = np.abs(scores(True, moved) - scores(False, leaves)).max()
    if leave_scale and rotary > 2:
        assert error > 0.1  # the norm's scale has to move with the rows
    else:
        assert error < 1e-12


# ---------------------------------------------------------------- fused


def test_fused_ops_that_cannot_be():
    assert set(fused_ways([(12, 5)], [(5, 4)] * 3, None, True)) == {"block"}  # the heads are not known
    assert set(fused_ways([(18, 5)], [(5, 3, 2), (5, 2, 3), (5, 3, 2)], None, True)) == {"block"}
    assert not fused_ways([(12, 5)], [(5, 4)] * 2, 2, True)


@pytest.mark.parametrize("fused", ["block", "interleaved"])
@pytest.mark.parametrize(("heads", "kv", "head"), [(2, 2, 3), (4, 2, 3), (6, 2, 2)])
@pytest.mark.parametrize("flat", [False, True])
def test_fused_ops_go_back(fused, heads, kv, head, flat):
    counts = (heads, kv, kv)
    rows = sum(counts) * head
    for lead, shape in (((5,), (rows, 5)), ((5,), (5, rows)), ((), (rows,))):
        targets = [(*lead, n * head) if flat else (*lead, n, head) for n in counts]
        made = there_and_back(fused_ways([shape], targets, heads, True)[fused].ops, RNG.standard_normal(shape))
        assert [a.shape for a in made] == targets


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([(4, 6, 5)], [(4, 5, 3)] * 2), ([(4, 5, 6)], [(4, 5, 3)] * 2), ([(4, 6)], [(4, 3)] * 2),
     ([(2, 3, 5)], [(5, 3)] * 2),
     ([(3, 5)] * 2, [(2, 5, 3)]), ([(3, 5)] * 2, [(5, 2, 3)]), ([(6, 5)] * 2, [(2, 2, 5, 3)]), ([(3, 5)] * 2, [(5, 6)]),
     ([(4, 3, 5)] * 2, [(4, 5, 6)]), ([(6, 5, 1)], [(1, 5, 2)] * 3), ([(6, 5, 3)], [(3, 5, 2)] * 3)],
)  # fmt: skip
def test_every_way_to_lay_parts_together_fits_and_goes_back(sources, targets):
    ways = fused_ways(sources, targets, 0, len(targets) == 3)
    assert ways
    effects = set()
    for way in ways.values():
        made = there_and_back(way.ops, *(RNG.permutation(np.arange(np.prod(s))).reshape(s) for s in sources))
        assert [a.shape for a in made] == targets
        numbers = np.arange(np.prod(sources[0]) * len(sources)).reshape(len(sources), *sources[0])
        effects.add(b"".join(a.tobytes() for a in apply_chain(way.ops, tuple(numbers))))
    assert len(effects) == len(ways)


# ---------------------------------------------------------------- block-diagonal expansion


@pytest.mark.parametrize(("shape", "groups"), [((4, 3, 2), 2), ((6, 1, 2, 3), 3), ((4, 2, 1, 2, 3), 4), ((3, 2, 2), 1)])
def test_block_diagonal(shape, groups):
    weight = RNG.standard_normal(shape).astype(np.float32)
    (made,) = there_and_back(block_diagonal_ops(shape, groups), weight)
    i, o = shape[0] // groups, shape[1]
    for g in range(groups):
        for h in range(groups):
            block = made[g * i : (g + 1) * i, h * o : (h + 1) * o]
            assert same_bits(block, weight[g * i : (g + 1) * i]) if g == h else not block.any()


# ---------------------------------------------------------------- RearrangeEach


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4
    )
)
def test_each_tensor_by_its_own_pattern(choices):
    patterns = ("", "a b -> b a", "(a b) c -> c a b", "a -> 1 a")
    arrays, chosen, sizes = [], [], []
    for which, a, b, c in choices:
        shape = ((a, b), (a, b), (a * b, c), (a,))[which]
        arrays.append(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape))
        chosen.append(patterns[which])
        sizes.append((("b", b),) if which == 2 else ())
    made = there_and_back((RearrangeEach(tuple(chosen), tuple(sizes)),), *arrays)
    for (which, a, b, c), before, after in zip(choices, arrays, made, strict=True):
        if which == 2:
            assert same_bits(after, before.reshape(a, b, c).transpose(2, 0, 1))
        else:
            assert same_bits(after, (before, before.T, None, before[None])[which])


def test_each_says_what_does_not_fit():
    op = RearrangeEach(("a b -> b a", ""))
    assert chain_text((op,)) == "a b -> b a, as it is"
    with pytest.raises(LayoutError, match="2 tensors, got 1"):
        op.infer((f32(2, 3),))
    with pytest.raises(LayoutError, match="2 tensors, got 1"):
        op.bind((f32(2, 3),))
    with pytest.raises(LayoutError):
        op.infer((f32(2, 3, 4), f32(1)))
    with pytest.raises(LayoutError, match="1 sets of sizes"):
        RearrangeEach(("a b -> b a", ""), ((),)).infer((f32(2, 3), f32(1)))


# ---------------------------------------------------------------- every bit, there and back


@st.composite
def pairs(draw):
    """(torch shapes, Flax shapes) of a Linear, one with heads, a convolution or a transposed one; sizes from 1."""
    size = st.integers(1, 4)
    o, i = draw(size), draw(size)
    kind = draw(st.sampled_from(["linear", "out", "in", "conv", "transposed"]))
    k = tuple(draw(st.lists(size, min_size=1, max_size=3)))
    h = draw(size)
    return {
        "linear": ((o, i), (i, o)),
        "out": ((h * o, i), (i, h, o)),
        "in": ((o, h * i), (h, i, o)),
        "conv": ((o, i, *k), (*k, i, o)),
        "transposed": ((i, o, *k), (*k, i, o)),
    }[kind]


@given(pairs(), st.integers(0, 2**32 - 1), st.sampled_from(["float32", "bfloat16", "float16", "int8"]))
def test_layouts_keep_every_bit(shapes, seed, dtype):
    torch_spec, flax_spec = (TensorSpec(shape, dtype) for shape in shapes)
    found = leaf_connections("weight", torch_spec, "kernel", flax_spec)
    assert found
    raw = np.random.default_rng(seed).integers(0, 256, torch_spec.nbytes, dtype=np.uint8)
    array = raw.view(numpy_dtype(dtype)).reshape(torch_spec.shape)
    for connection in found:
        (entry,) = connection.entries
        assert infer_chain(entry.ops, (torch_spec,)) == (flax_spec,)
        (there,) = apply_chain(entry.ops, (array,))
        assert there.shape == flax_spec.shape
        assert sorted(there.tobytes()) == sorted(array.tobytes())
        (back,) = apply_chain(invert_chain(entry.ops), (there,))
        assert same_bits(back, array)
