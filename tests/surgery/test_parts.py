"""Parts of a leaf, for every kind of tree: the elements that the index reaches change, every other bit stays."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import graftax as gx
from graftax.adapters import live_leaves, to_torch
from graftax.adapters.torch_arrays import to_numpy
from graftax.errors import PlanError
from graftax.surgery import replace_checkpoint
from graftax.tree import LeafIndex, TensorSpec
from graftax.tree.dtypes import numpy_dtype
from graftax.tree.leaf_index import split_index

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "bool", "int4")
SHAPES = {"a/kernel": (3, 4), "a/bias": (4,), "b/kernel": (2, 3, 2), "b/scale": ()}


def bits(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Any bits at all: NaN payloads, -0.0, subnormals."""
    kind = numpy_dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, kind.itemsize), np.uint8)
    if dtype == "bool":
        return (raw[..., 0] % 2).astype(bool)
    if dtype == "int4":
        return (raw[..., 0] % 8).astype(kind)
    return raw.reshape(-1).view(kind).reshape(shape).copy()


def params(dtype: str, seed: int = 0, make: Callable[[Any], Any] = jnp.asarray) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i, (path, shape) in enumerate(SHAPES.items()):
        module, name = path.split("/")
        out.setdefault(module, {})[name] = make(bits(shape, dtype, seed + i))
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    a: Any
    b: Any
    name: str = dataclasses.field(default="net", metadata={"static": True})


class Module(nnx.Module):
    def __init__(self, tree: dict[str, Any]) -> None:
        for name, leaves in tree.items():
            setattr(self, name, nnx.Dict({role: nnx.Param(leaf) for role, leaf in leaves.items()}))


def torch_tree(dtype: str, seed: int) -> Any:
    tree = params("int8" if dtype == "int4" else dtype, seed, np.asarray)
    pairs = [(f"{module}.{role}", leaf) for module, leaves in tree.items() for role, leaf in leaves.items()]
    return OrderedDict((key, to_torch(leaf)) for key, leaf in pairs)


def train_state(dtype: str, seed: int) -> Any:
    tree = params(dtype if dtype in ("float32", "bfloat16", "float16") else "float32", seed)
    return TrainState.create(apply_fn=len, params=tree, tx=optax.adam(1.0))


TREES: dict[str, Callable[[str, int], Any]] = {
    "dict": params,
    "numpy": lambda dtype, seed: params(dtype, seed, np.asarray),
    "FrozenDict": lambda dtype, seed: freeze(params(dtype, seed)),
    "State": lambda dtype, seed: nnx.state(Module(params(dtype, seed))),
    "Module": lambda dtype, seed: Module(params(dtype, seed)),
    "dataclass": lambda dtype, seed: Net(**params(dtype, seed)),
    "TrainState": train_state,
    "optimizer": lambda dtype, seed: train_state(dtype, seed).opt_state,
    "nnx optimizer": lambda dtype, seed: nnx.Optimizer(Module(params("float32", seed)), optax.adam(1.0), wrt=nnx.Param),
    "state_dict": torch_tree,
}
INDICES = [
    "",
    "[0]",
    "[-1]",
    "[:, 1]",
    "[..., -1]",
    "[1:3, ::2]",
    "[::-1]",
    "[..., 1:, 0]",
    "[0:1]",
    "[...]",
    "[-2:, ..., 1]",
]


def raw(leaf: Any) -> np.ndarray:
    """The bytes of a leaf, those of an element on the last axis."""
    array = to_numpy(leaf) if isinstance(leaf, torch.Tensor) else np.asarray(leaf)
    return np.frombuffer(array.tobytes(), np.uint8).reshape(*array.shape, array.dtype.itemsize)


if importlib.util.find_spec("equinox"):
    import equinox

    class Equinox(equinox.Module):
        a: Any
        b: Any
        name: str = equinox.field(static=True, default="net")

    TREES["equinox"] = lambda dtype, seed: Equinox(**params(dtype, seed))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TREES)), st.sampled_from(DTYPES), st.sampled_from(INDICES), st.integers(0, 9), st.data())
def test_only_the_elements_of_a_part_change(kind: str, dtype: str, text: str, seed: int, data: st.DataObject) -> None:
    """Also without an index: of whole leaves. Every other leaf is the same object."""
    tree = TREES[kind](dtype, seed)
    leaves, index = live_leaves(tree), part_of(text)
    before = {key: raw(leaf) for key, leaf in leaves.items()}
    path = data.draw(st.sampled_from(sorted(leaves)))
    sep = "." if kind == "state_dict" else "/"
    head, _, name = path.rpartition(sep)
    selector = data.draw(
        st.sampled_from([path, f"{head}{sep}{{{name},other}}", f"**{sep}{name}", f"{head[:-1]}?{sep}*"])
    )
    try:
        picked = gx.select(tree, selector)
    except PlanError:  # a glob that matches optimizer state only
        assume(False)
    touched = {key: touched_by(index, leaves[key].shape) for key in picked}
    if any(not mask.any() for mask in touched.values()):
        with pytest.raises(PlanError, match=r"axis|axes"):
            gx.replace(tree, f"{selector}{text or '[...]'}", gx.zeros())
        return
    kinds = {str(leaves[key].dtype) for key in picked}
    one = data.draw(st.sampled_from([ones_like] + [gx.constant(1)] * ("int4" not in kinds)))
    out = gx.replace(tree, f"{selector}{text}", one, expect=len(picked))
    after = live_leaves(out)
    assert list(after) == list(leaves)
    assert type(out) is type(tree)
    for key, new in after.items():
        old = leaves[key]
        assert np.array_equal(raw(old), before[key])  # the tree that was given
        if key not in touched:
            assert new is old or (kind == "state_dict" and new.data_ptr() == old.data_ptr())
            continue
        mask = touched[key]
        assert (type(new), new.dtype, tuple(new.shape)) == (type(old), old.dtype, tuple(old.shape))
        assert np.array_equal(raw(new)[~mask], before[key][~mask])
        assert np.array_equal(raw(new)[mask].reshape(-1), np.tile(raw(ones_like(old))[*[0] * old.ndim], mask.sum()))


def ones_like(leaf: Any) -> np.ndarray:
    return np.ones(tuple(leaf.shape), numpy_dtype(str(leaf.dtype).removeprefix("torch.")))


def touched_by(index: LeafIndex, shape: Any) -> np.ndarray:
    mask = np.zeros(tuple(shape), bool)
    with contextlib.suppress(IndexError):
        mask[index.key] = True
    return mask


def part_of(text: str) -> LeafIndex:
    found = split_index(f"x{text or '[...]'}")
    assert found is not None
    return found[1]


# ---------------------------------------------------------------- what a value sees


def kernel(**more: Any) -> dict[str, Any]:
    return {"params": {"a": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)}, **more}}


def test_a_value_sees_the_part_as_its_leaf() -> None:
    tree = kernel()
    old = np.asarray(tree["params"]["a"]["kernel"])

    def edited(value: Any, text: str = "[:, 3]") -> np.ndarray:
        return np.asarray(gx.replace(tree, f"**/kernel{text}", value, expect=1)["params"]["a"]["kernel"])

    np.testing.assert_array_equal(edited(gx.normal(1.0, 3))[:, 3], edited(gx.normal(1.0, 3), "[:,3]")[:, 3])
    part = TensorSpec((3,), "float32")
    drawn = gx.normal(1.0, 3).apply("params/a/kernel[:, 3]", part, None)
    np.testing.assert_array_equal(edited(gx.normal(1.0, 3))[:, 3], drawn)
    np.testing.assert_array_equal(edited(gx.scaled(2))[:, 3], 2 * old[:, 3])
    np.testing.assert_array_equal(edited(lambda leaf: leaf[::-1])[:, 3], old[::-1, 3])
    np.testing.assert_array_equal(edited(gx.quantized(2), "[:, 1:3]"), edited(by_hand(old[:, 1:3]), "[:, 1:3]"))
    seen: list[Any] = []
    edited(lambda leaf: seen.append(leaf) or leaf, "[1:, 0]")
    assert isinstance(seen[0], jax.Array)
    assert seen[0].shape == (2,)


def by_hand(part: np.ndarray) -> np.ndarray:
    most = np.abs(part).max(0, keepdims=True)
    return (np.round(part / most) * most).astype(part.dtype)


def test_a_donor_of_the_whole_leaf_gives_the_same_part_of_itself() -> None:
    tree, other = kernel(), {"a.weight": torch.arange(100.0, 112.0).reshape(4, 3)}
    out = gx.replace(tree, "**/kernel[1]", gx.from_checkpoint(other, "a.weight"))["params"]["a"]["kernel"]
    np.testing.assert_array_equal(out[1], other["a.weight"].numpy().T[1])
    np.testing.assert_array_equal(out[::2], tree["params"]["a"]["kernel"][::2])
    donor = gx.replace(kernel(), "**/kernel", gx.constant(7))
    out = gx.replace(tree, "**/kernel[:, 0]", gx.from_checkpoint(donor))["params"]["a"]["kernel"]
    np.testing.assert_array_equal(out[:, 0], [7, 7, 7])
    out = gx.replace(tree, "**/kernel[:, 0]", gx.mix(donor, 0.5))["params"]["a"]["kernel"]
    np.testing.assert_array_equal(out[:, 0], [3.5, 5.5, 7.5])
    inside = jax.jit(lambda tree: gx.replace(tree, "**/kernel[:, 0]", gx.mix(donor, 0.5)))(tree)
    np.testing.assert_array_equal(inside["params"]["a"]["kernel"], out)
    column = {"column": np.array([1, 2, 3], np.float32)}
    out = gx.replace(tree, "**/kernel[:, 0]", gx.from_checkpoint(column))["params"]["a"]["kernel"]
    np.testing.assert_array_equal(out[:, 0], column["column"])


def test_a_square_torch_tensor_for_a_part_of_a_kernel_is_asked_about() -> None:
    square = torch.arange(4.0).reshape(2, 2)
    with pytest.raises(PlanError, match="more than one way"):
        gx.replace(kernel(), "**/kernel[:2, :2]", square)
    out = gx.replace(kernel(), "**/kernel[:2, :2]", square.numpy())["params"]["a"]["kernel"]
    np.testing.assert_array_equal(out[:2, :2], square)


@pytest.mark.parametrize(
    ("selector", "value", "words"),
    [
        ("**/kernel[3]", gx.zeros(), r"params/a/kernel: \[3\] is out of range: axis 0 has 3.*shape \(3, 4\).*0 to 2"),
        ("**/kernel[-4]", gx.zeros(), r"\[-4\] is out of range.*0 to 2"),
        ("**/kernel[3:]", gx.zeros(), r"\[3:\] selects no element: axis 0 has 3"),
        ("a/*[:, 3]", gx.zeros(), r"params/a/bias: \[:, 3\] has 2 indices, the leaf has 1 axis"),
        ("**/kernel[0]", np.zeros(3, np.float32), r"kernel\[0\]: .*expected float32\[4\], found float32\[3\]"),
        ("**/kernel[0]", 0.5, r"kernel\[0\]: got a bare number.*constant\(0.5\)"),
        ("**/kernel[0]", lambda leaf: leaf[:2], r"kernel\[0\]: the function gave"),
        ("**/kernel[None, 0]", gx.zeros(), r"matches nothing.*whole numbers, slices"),
        ("**/kernel[[0, 1]]", gx.zeros(), r"matches nothing.*whole numbers, slices"),
        ("a[0]", gx.zeros(), r"'a\[0\]' names a subtree"),
        ("[a]", gx.zeros(), r"'\[a\]' matches subtrees only"),
        ("params[0]/*", gx.zeros(), r"'params\[0\]/\*' matches nothing"),
        ("**/kernle[0]", gx.zeros(), r"'\*\*/kernle\[0\]' matches nothing"),
    ],
)
def test_what_is_refused(selector: str, value: Any, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        gx.replace(kernel(), selector, value)
    assert re.search(words, str(caught.value), re.DOTALL), caught.value
    assert len(caught.value.failures) == 1


def test_expect_counts_leaves() -> None:
    tree = kernel(b={"kernel": jnp.ones((2, 2))})
    gx.replace(tree, "**/kernel[0]", gx.zeros(), expect=2)
    gx.replace(tree, {"a/kernel[0]": gx.zeros(), "a/kernel[1]": gx.zeros()}, expect=1)
    gx.replace(tree, ["a/kernel[0]", "a/kernel[1]"], gx.zeros(), expect=1)
    with pytest.raises(PlanError, match="expected 1, found 2"):
        gx.replace(tree, "**/kernel[0]", gx.zeros(), expect=1)


# ---------------------------------------------------------------- readings, and several edits of one leaf


def test_a_bracket_that_is_also_a_character_class_is_refused_with_both_readings() -> None:
    tree = {"kernel": jnp.ones(3), "kernel2": jnp.ones(3)}
    with pytest.raises(PlanError, match=r"part \[2\] of kernel, or with a character class as kernel2"):
        gx.replace(tree, "kernel[2]", gx.zeros())
    out = gx.replace(tree, "kernel[2]", gx.zeros(), exclude="kernel2")  # as the message says
    assert out["kernel"].tolist() == [1, 1, 0]
    assert out["kernel2"] is tree["kernel2"]
    assert gx.select(tree, "kernel2") == ["kernel2"]
    assert gx.select(tree, "kernel[2-2]") == ["kernel2"]
    assert gx.select(tree, "kernel[1]") == ["kernel[1]"]


def test_an_exact_path_that_ends_in_a_bracket_wins() -> None:
    tree = {"params": {"w": jnp.ones(3), "w[2]": jnp.ones(3), "w2": jnp.ones(3)}}
    for selector in ("params/w[2]", "w[2]"):
        assert gx.select(tree, selector) == ["params/w[2]"]
    assert gx.select(tree, "w[1]") == ["params/w[1]"]


def test_what_select_gives_selects_the_same() -> None:
    tree = kernel(b={"kernel": jnp.ones((2, 2))})
    for selector in ("**/kernel[:, 1]", "**/{kernel,bias}[..., 0:2]", ["a/bias", "b/kernel[0]"]):
        found = gx.select(tree, selector)
        for a, b in zip(
            *(jax.tree.leaves(gx.replace(tree, each, gx.normal(1, 0))) for each in (selector, found)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert gx.select(tree, "**/kernel[:,1]") == ["params/a/kernel[:, 1]", "params/b/kernel[:, 1]"]


def test_several_parts_of_a_leaf() -> None:
    tree = kernel()
    old = np.asarray(tree["params"]["a"]["kernel"])

    def edited(edits: Any, **options: Any) -> np.ndarray:
        return np.asarray(gx.replace(tree, edits, **options)["params"]["a"]["kernel"])

    for order in (1, -1):
        # Parts that do not overlap.
        pairs = [("**/kernel[0]", gx.zeros()), ("**/kernel[1:, 0]", gx.constant(9))][::order]
        want = old.copy()
        want[0], want[1:, 0] = 0, 9
        np.testing.assert_array_equal(edited(dict(pairs)), want)
        # An exact path goes over a glob, and each value is made from the old leaf.
        pairs = [("**/kernel", gx.scaled(10)), ("a/kernel[0]", gx.scaled(2))][::order]
        np.testing.assert_array_equal(edited(dict(pairs), expect=1), old * [[2], [10], [10]])
        pairs = [("**/kernel[:, 0]", gx.constant(8)), ("a/kernel[0]", gx.constant(9))][::order]
        assert edited(dict(pairs))[:2, :2].tolist() == [[9, 9], [8, 5]]
        pairs = [("**/kernel[0]", gx.constant(1j)), ("a/kernel", gx.scaled(2))][::order]  # the first is not even made
        np.testing.assert_array_equal(edited(dict(pairs)), 2 * old)


@pytest.mark.parametrize(
    "edits",
    [
        {"**/kernel[0]": gx.zeros(), "a/*[:, 0]": gx.zeros()},
        {"a/kernel[0]": gx.zeros(), "params/a/kernel[0:1]": gx.zeros()},
        {"a/kernel[0]": gx.zeros(), "params/a/kernel": gx.zeros()},
        {("a/kernel[0]", "a/kernel[:, 1]"): gx.zeros()},
        {("a/kernel", "a/kernel[:, 1]"): gx.zeros()},
    ],
)
def test_parts_of_one_rank_that_overlap_are_refused(edits: Any) -> None:
    with pytest.raises(PlanError, match=r"params/a/kernel: is selected twice in part: .* overlap"):
        gx.replace(kernel(), {**edits, "a/bias": gx.zeros()} if "a/*[:, 0]" not in edits else edits)


def test_tied_tensors_take_one_new_part() -> None:
    weight = torch.arange(6.0).reshape(3, 2)
    tree = OrderedDict([("embed.weight", weight), ("head.weight", weight)])
    out = gx.replace(tree, "*.weight[0]", gx.normal(1, 0), expect=2)
    assert torch.equal(out["embed.weight"], out["head.weight"])
    with pytest.raises(PlanError, match="shares its memory"):
        gx.replace(tree, "head.weight[0]", gx.zeros())


def test_thousands_of_paths_with_an_index_are_quick() -> None:
    import time

    tree = {"params": {f"block_{i}": {"kernel": np.ones((2, 3))} for i in range(3000)}}
    paths = gx.select(tree, "**/kernel[0]")
    start = time.process_time()
    assert gx.select(tree, paths) == paths
    assert time.process_time() - start < 3


# ---------------------------------------------------------------- exclude


def test_exclude() -> None:
    tree = kernel(b={"kernel": jnp.ones((2, 2))}, head={"kernel": jnp.ones((2, 2))})
    assert gx.select(tree, "**/kernel", exclude="head/**") == ["params/a/kernel", "params/b/kernel"]
    assert gx.select(tree, "**", exclude=["**/bias", lambda path, leaf: "head" in path]) == [
        "params/a/kernel",
        "params/b/kernel",
    ]
    out = gx.replace(tree, {"**/kernel": gx.zeros(), "b/kernel[0]": gx.constant(1)}, exclude="{a,head}/**", expect=1)
    assert out["params"]["b"]["kernel"].tolist() == [[1, 1], [0, 0]]
    assert out["params"]["a"]["kernel"] is tree["params"]["a"]["kernel"]
    for exclude, words in (
        ("hed/**", r"exclude: 'hed/\*\*' matches nothing"),
        ("head", r"exclude: 'head' names a subtree.*'head/\*\*'"),
        ("head/kernel[0]", "exclude: .*part of a leaf"),
        ("**/kernel", "everything that .* selects is excluded"),
    ):
        with pytest.raises(PlanError) as caught:
            gx.select(tree, "**/kernel", exclude=exclude)
        assert re.search(words, str(caught.value), re.DOTALL)


def test_exclude_reaches_optimizer_state() -> None:
    state = train_state("float32", 0)
    found = gx.select(state, "opt_state/**/mu/**", exclude="**/bias")
    assert found == ["opt_state/0/mu/a/kernel", "opt_state/0/mu/b/kernel", "opt_state/0/mu/b/scale"]


def test_an_index_inside_braces() -> None:
    tree = kernel(b={"kernel": jnp.ones((2, 2)), "kernel2": jnp.ones(2)})
    assert gx.select(tree, "{a/kernel[0],b/kernel}") == ["params/a/kernel[0]", "params/b/kernel"]
    assert gx.select(tree, "a/{kernel[:, 1],bias}") == ["params/a/kernel[:, 1]", "params/a/bias"]
    with pytest.raises(PlanError, match=r"'b/kernel.2.' can be read in two ways"):
        gx.select(tree, "{a/bias,b/kernel[2]}")
    with pytest.raises(PlanError, match=r"z: \[0\] has 1 index, the leaf has 0 axes"):
        gx.replace({"z": np.array(1.0)}, "z[0]", gx.zeros())
    with pytest.raises(PlanError, match=r"'c/kernel.0.' matches nothing"):
        gx.select(tree, "{a/bias,c/kernel[0]}")


def test_a_number_names_no_part_of_an_optimizer() -> None:
    """`**/0/**` means the first layer: of opt_state/0/mu/1/kernel it names nothing but the weights."""
    weights = {"blocks": {"0": {"kernel": jnp.ones(2)}, "1": {"kernel": jnp.ones(2)}}}
    tree = {"params": weights, "opt_state": optax.adam(1.0).init(weights)}
    assert gx.select(tree, "**/0/**") == ["params/blocks/0/kernel"]
    assert gx.select(tree, "opt_state/0/mu/*/1/*") == ["opt_state/0/mu/blocks/1/kernel"]
    assert gx.select(tree, lambda path, leaf: "/0/" in path) == ["params/blocks/0/kernel"]


# ---------------------------------------------------------------- under jit, in files, over devices


def test_parts_inside_jit() -> None:
    tree = kernel()
    edits = {"a/kernel[0]": gx.scaled(3), "a/kernel[1:, ::2]": gx.constant(5), "a/bias[-1]": gx.normal(1, 0)}
    inside, outside = jax.jit(lambda tree: gx.replace(tree, edits))(tree), gx.replace(tree, edits)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_array_equal(a, b)
    gradient = jax.grad(lambda tree: jnp.sum(gx.replace(tree, edits)["params"]["a"]["kernel"]))(tree)
    np.testing.assert_array_equal(gradient["params"]["a"]["kernel"], [[3, 3, 3, 3], [0, 1, 0, 1], [0, 1, 0, 1]])
    row = jax.jit(lambda x: gx.replace(tree, "a/kernel[2]", x * 2))(jnp.ones(4))["params"]["a"]["kernel"]
    np.testing.assert_array_equal(row[2], [2, 2, 2, 2])
    for value in (gx.quantized(3), gx.mean(), gx.rounded("float8_e4m3fn"), lambda part: part * 2):
        inside = jax.jit(lambda tree: gx.replace(tree, "a/kernel[:2]", value))(tree)["params"]["a"]["kernel"]  # noqa: B023
        np.testing.assert_array_equal(inside, gx.replace(tree, "a/kernel[:2]", value)["params"]["a"]["kernel"])
    with pytest.raises(PlanError, match="a traced value"):
        jax.jit(lambda x: gx.replace({"w": torch.ones(3, 4)}, "w[0]", x))(jnp.ones(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_parts_in_a_file(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.safetensors"
    arrays = {"fc.weight": bits((3, 4), dtype, 0), "fc.bias": bits((4,), dtype, 1)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    assert gx.select(path, "*.weight[0]") == gx.select(str(path), "fc.weight[0]") == ["fc.weight[0]"]
    _, tensors, report = replace_checkpoint(gx.open_checkpoint(path), {"*.weight[1, ::2]": gx.constant(1)})
    new = dict(tensors)
    touched = np.zeros((3, 4), bool)
    touched[1, ::2] = True
    assert np.array_equal(raw(new["fc.weight"])[~touched], raw(arrays["fc.weight"])[~touched])
    assert (new["fc.weight"][touched].astype(float) == 1).all()
    assert raw(new["fc.bias"]).tobytes() == raw(arrays["fc.bias"]).tobytes()
    (change,) = [change for change in report.changes if change.selected]
    assert change.changed in (1, 2)


def test_a_part_of_packed_codes() -> None:
    codes = np.array([[-8, 7, 1], [2, 3, 4]], ml_dtypes.int4)
    out = gx.replace({"q": jnp.asarray(codes)}, "q[0, 1:]", np.array([5, 6], ml_dtypes.int4))["q"]
    assert np.asarray(out).astype(int).tolist() == [[-8, 5, 6], [2, 3, 4]]
    with pytest.raises(PlanError, match="int4, several codes to a byte"):
        gx.replace({"q": jnp.asarray(codes)}, "q[0]", gx.zeros())


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, graftax as gx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
def placed(array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))
def addresses(leaf):
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
old = np.arange(64.0, dtype=np.float32).reshape(8, 8)
tree = {"a": {"kernel": placed(old, P("y", "x"))}, "b": {"kernel": placed(old, P(None, "x"))}, "c": placed(old, P())}
read = []
kind = type(tree["c"])
plain = kind.__array__
def counted(self, *args, **kw):
    read.append(self.shape)
    return plain(self, *args, **kw)
kind.__array__ = counted
for text, value, want in (
    ("[6:2:-1, 3]", lambda leaf: leaf * 10, lambda part: part * 10),
    ("[0]", gx.scaled(2), lambda part: part * 2),
    ("[..., -1]", gx.constant(9), lambda part: part * 0 + 9),
):
    edit = {f"{path}{text}": value for path in ("a/kernel", "b/kernel", "c")}
    out = gx.replace(tree, edit, expect=3)
    for path in ("a", "b", "c"):
        new, was = (t[path] if path == "c" else t[path]["kernel"] for t in (out, tree))
        expected = old.copy()
        expected[eval(f"np.s_{text}")] = want(old[eval(f"np.s_{text}")])
        shards = [np.asarray(s.data) for s in new.addressable_shards]
        assert all((got == expected[s.index]).all() for got, s in zip(shards, new.addressable_shards)), (path, text)
        assert new.sharding == was.sharding and new.committed
        kept = [a == b for a, b in zip(addresses(new), addresses(was))]
        hit = [not np.array_equal(old[s.index], expected[s.index]) for s in new.addressable_shards]
        assert all(same != changed for same, changed in zip(kept, hit)), (path, text)
read.clear()
out = gx.replace(tree, "a/kernel[0, 0]", gx.scaled(2))
assert out["b"]["kernel"] is tree["b"]["kernel"] and out["c"] is tree["c"]
assert all(shape != (8, 8) for shape in read), read
read.clear()
from flax import nnx
net = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
net.kernel.set_value(placed(old, P("x", "y")))
for text in ("", "[1]"):
    out = gx.replace(net, f"kernel{text}", gx.zeros())
    assert out.kernel.get_value().sharding == net.kernel.get_value().sharding
    out = gx.replace(tree, f"b/kernel{text}", gx.zeros())
    assert out["b"]["kernel"].sharding == tree["b"]["kernel"].sharding
    assert out["a"]["kernel"] is tree["a"]["kernel"] and out["c"] is tree["c"]
assert read == [], read
print("ok")
"""


def test_a_part_of_a_sharded_leaf_touches_its_own_shards_only() -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
