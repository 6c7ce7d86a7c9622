"""gx.quantized shares scales as the roles of a leaf's axes say: on either side, stacked, split, in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import graftax as gx
from graftax.errors import PlanError, UsageError
from graftax.execute.opening import open_tree
from graftax.layers import LeafRole, Part, connect, role_of
from graftax.ops import apply_chain, same_bits
from graftax.tree.dtypes import spec_of

from ..layers.cases import CASES
from ..layers.harness import Case

RNG = np.random.default_rng(0)


def weight(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Normal values whose size differs along every axis, so that a scale along the wrong one shows."""
    out = RNG.standard_normal(shape)
    for axis in range(len(shape)):
        sizes = np.exp(RNG.standard_normal(shape[axis]))
        out = out * sizes.reshape([-1 if n == axis else 1 for n in range(len(shape))])
    return out.astype(dtype)


def quantized(array: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
    return gx.replace({"kernel": array}, "kernel", gx.quantized(*args, **options))["kernel"]


def by_hand(matrix: np.ndarray, bits: int = 4) -> np.ndarray:
    """(in, out), one scale for each output."""
    levels = 2 ** (bits - 1) - 1
    wide = matrix.astype(np.float64)
    most = np.abs(wide).max(0, keepdims=True)
    return (np.round(wide * levels / np.where(most, most, 1)) * most / levels).astype(matrix.dtype)


# ---------------------------------------------------------------- commutes with port


def one_of_each() -> list[Case]:
    """A case for each layer and form of the table."""
    return list({(case.layer, case.variant): case for case in reversed(CASES)}.values())


def test_it_commutes_with_port() -> None:
    """The quantized torch leaf, moved by index ops, is the quantized Flax leaf."""
    assert len(moved("linen", one_of_each())) > 12


@pytest.mark.slow
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_it_commutes_with_port_in_every_case(api: str) -> None:
    assert len(moved(api, CASES)) > 40


def moved(api: str, cases: list[Case]) -> set[str]:
    """The names of the cases in which a leaf was compared."""
    compared: set[str] = set()
    for case in cases:
        make = getattr(case, api)
        if make is None or case.layout or case.rule:
            continue
        shape = (case.x[0], *case.x[2:], case.x[1]) if case.channels else case.x
        x = np.zeros(shape, "float32") if case.make_x is None else case.make_x(case.rng)
        if api == "linen":
            flax = open_tree(gx.linen(make(), x, method=case.on_flax))
        else:
            module = lambda make=make: make(nnx.Rngs(0))  # noqa: E731
            flax = open_tree(module() if case.concrete else nnx.eval_shape(module))
        source = open_tree(case.torch())
        ends = [Part("", t.side, t.live.modules[""].leaves, t.specs, t.live.modules[""]) for t in (source, flax)]
        for entry in (entry for connection in connect(*ends)[:1] for entry in connection.entries):
            roles = [role_of(source, entry.sources[0]), *(role_of(flax, path) for path in entry.targets)]
            if len(entry.sources) > 1 or not entry.exact or not all(has_inputs(role) for role in roles):
                continue
            old = weight(*source[entry.sources[0]].shape)
            before, after = apply_chain(entry.ops, (put(roles[0], old),)), apply_chain(entry.ops, (old,))
            for path, first, array, role in zip(entry.targets, before, after, roles[1:], strict=True):
                assert same_bits(first, put(role, array)), (case.name, path)
                compared.add(case.name)
    return compared


def has_inputs(role: LeafRole | None) -> bool:
    return role is not None and any(axis.kind == "in" for axis in role.parts)


def put(role: LeafRole | None, old: np.ndarray) -> np.ndarray:
    return replace(gx.quantized(3), role=role).apply("leaf", spec_of(old), old)


def test_it_commutes_with_port_of_whole_models() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 8)
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.up = torch.nn.ConvTranspose1d(8, 6, 3)
            self.fc = torch.nn.Linear(8, 8)

    class Flax(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            fn.Embed(7, 8, name="embed")(jnp.zeros((1,), int))
            fn.MultiHeadDotProductAttention(2, name="attention")(x, x)
            fn.ConvTranspose(6, (3,), transpose_kernel=True, name="up")(x)
            return fn.Dense(8, name="fc")(x)

    module, like = Model(), gx.linen(Flax(), jax.ShapeDtypeStruct((2, 3, 8), "float32"))
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(weight(*parameter.shape))
    chosen = ["embed.weight", "attention.{in_proj_weight,out_proj.weight}", "up.weight", "fc.weight"]
    state = gx.replace(module.state_dict(), chosen, gx.quantized(3), like=module, expect=5)
    plan = gx.plan(module, like)
    first = plan.run(state)
    after = gx.replace(plan.run(module), "**/{kernel,embedding}", gx.quantized(3), like=like, expect=7)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(after), strict=True):
        assert same_bits(np.asarray(a), np.asarray(b))


# ---------------------------------------------------------------- closed forms


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_stacks_heads_and_groups_are_loops(bits: int, layers: int, into: int, heads: int, size: int) -> None:
    group, width = into, 2 * into
    stack = weight(layers, width, heads * size)
    each = np.stack([quantized(one, bits) for one in stack])
    assert same_bits(quantized(stack, bits, axis=(0, -1)), each)  # scanned equals unscanned
    matrix = stack[0]
    split = matrix.reshape(width, heads, size)
    assert same_bits(quantized(split, bits, axis=(1, 2)), each[0].reshape(split.shape))  # split equals joined
    merged = np.ascontiguousarray(matrix.T).reshape(heads, size, width)
    assert same_bits(quantized(merged, bits, axis=-1), quantized(matrix.T.copy(), bits).reshape(merged.shape))
    loop = np.concatenate([quantized(matrix[at : at + group], bits) for at in range(0, width, group)])
    assert same_bits(quantized(matrix, bits, group=group), loop)  # a group at a time
    assert same_bits(quantized(matrix, bits, axis=-1, group=group), loop)
    once = quantized(matrix, bits, group=group)
    assert same_bits(quantized(once, bits, group=group), once)  # idempotent
    np.testing.assert_array_equal(quantized(matrix, bits, group=1), matrix)


def test_one_scale_in_all() -> None:
    old = weight(4, 5)
    np.testing.assert_array_equal(quantized(old, 4, axis=()), by_hand(old.reshape(-1, 1)).reshape(4, 5))


LIVE = gx.linen(fn.MultiHeadDotProductAttention(2), *[jax.ShapeDtypeStruct((2, 3, 8), "float32")] * 2)


def test_groups_follow_the_flat_input() -> None:
    """Heads merged into the output: groups of the flat input may span heads, as in the joined matrix."""
    tree = {"out": {"kernel": weight(2, 4, 8)}}
    flat = quantized(tree["out"]["kernel"].reshape(8, 8), 4, group=2)
    out = gx.replace({"params": tree}, "**/out/kernel", gx.quantized(4, group=2), like=LIVE)
    assert same_bits(out["params"]["out"]["kernel"], flat.reshape(2, 4, 8))
    bare = gx.replace(tree, "out/kernel", gx.quantized(4, axis=-1, group=2), like=LIVE)  # like has `params/` in front
    assert same_bits(bare["out"]["kernel"], flat.reshape(2, 4, 8))


def test_groups_of_a_convolution_take_all_its_positions() -> None:
    like = nnx.eval_shape(lambda: nnx.Conv(4, 3, (5,), rngs=nnx.Rngs(0)))
    old = weight(5, 4, 3)
    out = gx.replace({"kernel": old}, "kernel", gx.quantized(4, group=2), like=like)["kernel"]
    for at in (0, 2):
        assert same_bits(out[:, at : at + 2], by_hand(old[:, at : at + 2].reshape(10, 3)).reshape(5, 2, 3))


def test_a_module_tells_its_own_roles() -> None:
    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    out = gx.replace(module, "{query,key,value,out}/kernel", gx.quantized(4), expect=4)
    old, new = np.asarray(module.query.kernel), np.asarray(out.query.kernel)
    assert same_bits(new, by_hand(old.reshape(8, 8)).reshape(old.shape))
    graphdef, state = nnx.split(module)
    assert same_bits(np.asarray(gx.replace((graphdef, state), "query/kernel", gx.quantized(4))["query"]["kernel"]), new)


def test_a_part_of_a_leaf_keeps_the_roles_of_its_axes() -> None:
    like = nnx.eval_shape(lambda: nnx.vmap(lambda r: nnx.Linear(6, 4, rngs=r))(nnx.Rngs(0).split(3)))
    old = weight(3, 6, 4)
    edited = lambda path: gx.replace({"kernel": old}, path, gx.quantized(4), like=like)["kernel"]  # noqa: E731
    out = edited("kernel[1]")
    assert same_bits(out[1], by_hand(old[1]))
    assert same_bits(out[[0, 2]], old[[0, 2]])
    column = edited("kernel[:, :, 2]")
    assert same_bits(column[:, :, 2], np.stack([by_hand(one[:, [2]])[:, 0] for one in old]))
    with pytest.raises(PlanError, match="no input channels"):
        edited("kernel[:, 2]")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tree", "path", "options", "words"),
    [
        ({"a": {"bias": weight(4)}}, "a/bias", {}, "no input channels.*changes nothing"),
        ({"ln": {"scale": weight(4)}}, "ln/scale", {}, "no input channels"),
        ({"a": {"bias": weight(4)}}, "a/bias", {"axis": 0}, "changes nothing"),
        ({"pos": weight(4, 5)}, "pos", {}, r"like.*axis=0, 4 scales \(\(out, in\).*axis=-1, 5 scales"),
        ({"a": {"kernel": weight(4, 5, 6)}}, "a/kernel", {}, r"axis=\(1, 2\), 30 scales .*axis=\(0, -1\), 24 scales"),
        ({"a": {"kernel": weight(4, 5, 6)}}, "a/kernel", {"group": 2}, "is not known"),
        ({"a": {"kernel": weight(4, 5, 6)}}, "a/kernel", {"axis": -1, "group": 2}, "2 axes besides .*like="),
        ({"a": {"kernel": weight(4, 5)}}, "a/kernel", {"group": 3}, "4 input channels, which groups of 3"),
        ({"a": {"kernel": weight(4, 5)}}, "a/kernel", {"axis": 0, "group": 5}, "axes of this leaf are in, out"),
        ({"a": {"kernel": weight(4, 5)}}, "a/kernel", {"axis": (0, -2)}, "named twice"),
        ({"a": {"kernel": weight(4, 5)}}, "a/kernel", {"axis": (0, 2)}, "no axis 2"),
        ({"c.weight": torch.ones(4, 5), "c.bias": torch.ones(5)}, "c.weight", {}, "is not known"),
    ],
)
def test_what_is_unclear_is_refused(tree: Any, path: str, options: Any, words: str) -> None:
    import re

    with pytest.raises(PlanError) as caught:
        gx.replace(tree, path, gx.quantized(4, **options))
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_like_must_fit_and_be_live() -> None:
    tree = {"params": {"query": {"kernel": weight(8, 2, 4)}, "other": {"kernel": weight(8, 2, 4)}}}
    with pytest.raises(PlanError, match="no such leaf"):
        gx.replace(tree, "**/other/kernel", gx.quantized(4), like=LIVE)
    with pytest.raises(PlanError, match=r"has a leaf of shape \(8, 2, 4\)"):
        gx.replace({"params": {"query": {"kernel": weight(8, 4, 2)}}}, "**/kernel", gx.quantized(4), like=LIVE)
    with pytest.raises(UsageError, match="no live modules"):
        gx.replace(tree, "**/query/kernel", gx.quantized(4), like=tree)


def test_the_readings_are_right() -> None:
    """Each offered axis quantizes, and -1 on a kernel of rank 3 is that of a convolution."""
    old = weight(4, 5, 6)
    for axis in (0, (0, 1), (1, 2), (0, -1), -1):
        assert quantized(old, 4, axis=axis).shape == old.shape
    np.testing.assert_array_equal(quantized(old, 4, axis=-1), by_hand(old.reshape(20, 6)).reshape(4, 5, 6))
    tree = {"wi": old}
    with pytest.raises(PlanError, match=r"say axis=\(\), 1 scale \("):
        gx.replace(tree, "wi[0, 1]", gx.quantized(4))
    row = gx.replace(tree, "wi[0, 1]", gx.quantized(4, axis=()))["wi"][0, 1]
    np.testing.assert_array_equal(row, by_hand(old[0, 1][:, None])[:, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: gx.quantized(4, axis=1.5),
        lambda: gx.quantized(4, axis=(0, "o")),
        lambda: gx.quantized(4, group=0),
        lambda: gx.quantized(4, group=2.0),
    ],
)
def test_arguments_are_checked(make: Any) -> None:
    with pytest.raises(UsageError):
        make()
