"""Plain containers for trees that come from no live object."""

from __future__ import annotations

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import torch

from graftax import adapters
from graftax.execute import opening
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.dtypes import pack


def end(side, specs, **more):
    return Checkpoint("end", side, {path: TensorSpec(shape, dtype) for path, (shape, dtype) in specs.items()}, **more)


def test_torch_gives_an_ordered_dict_of_tensors():
    like = end("torch", {"b.weight": ((2, 3), "bfloat16"), "a.bias": ((2,), "float32")})
    arrays = {"b.weight": np.asarray(jnp.ones((2, 3), jnp.bfloat16)), "a.bias": np.ones(2, np.float32)}
    made = adapters.plain_tree(like, arrays)
    assert type(made) is OrderedDict
    assert list(made) == ["b.weight", "a.bias"]
    assert made["b.weight"].dtype == torch.bfloat16
    assert type(adapters.plain_tree(like, arrays, host=True)["b.weight"]) is np.ndarray


def test_flax_gives_nested_dicts_with_the_keys_and_lists_of_the_tree():
    tree = {"blocks": [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}], "x": {3: jnp.ones(1)}, "~/": (jnp.ones(1),)}
    like = opening.open_tree(tree)
    made = adapters.plain_tree(like, {path: like.read(path) for path in like})
    assert jax.tree.structure(made) == jax.tree.structure(tree)
    assert isinstance(made["blocks"][0]["w"], jax.Array)
    assert made["blocks"][1]["w"].sum() == 0
    host = adapters.plain_tree(like, {path: like.read(path) for path in like}, host=True)
    assert type(host["x"][3]) is np.ndarray
    assert host["x"][3].flags.writeable


def test_long_lists_keep_their_order_and_broken_ones_stay_dicts():
    tree = {"b": [jnp.full(1, i) for i in range(12)]}
    like = opening.open_tree(tree)
    made = adapters.plain_tree(like, {path: like.read(path) for path in like})
    assert [int(leaf[0]) for leaf in made["b"]] == list(range(12))
    some = {path: like.read(path) for path in like if path != "b/3"}
    assert 11 in adapters.plain_tree(like, some)["b"]


def test_packed_leaves_come_out_of_their_bytes():
    codes = np.asarray(jnp.array([1, -2, 3], jnp.int4))
    like = end("flax", {"w": ((3,), "int4")})
    made = adapters.plain_tree(like, {"w": pack(codes, 4)})
    assert made["w"].dtype == jnp.int4
    assert made["w"].astype(jnp.int32).tolist() == [1, -2, 3]


def test_results_share_memory_only_with_what_was_given_away():
    like = end("flax", {"w": ((1024,), "float32")})
    for adopt in (False, True):
        mine = np.ones(1024, np.float32)
        made = adapters.plain_tree(like, {"w": mine}, host=True, adopt=adopt)
        assert (made["w"] is mine) is adopt
