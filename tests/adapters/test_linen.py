"""Linen variables and modules as checkpoints, and back."""

from __future__ import annotations

import time
from collections import OrderedDict
from types import MappingProxyType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax import adapters
from graftax.errors import FormatError, GraftaxError, PlanError, UsageError
from graftax.execute import opening
from graftax.tree import TensorSpec

NAMES = [
    *("bool", "int4", "int8", "int16", "int32", "int64", "uint4", "uint8", "uint16", "uint32", "uint64", "float16"),
    *("bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "complex64", "complex128"),
]


def array_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    size = int(np.prod(shape)) * dtype.itemsize
    top = {"bool": 2, "int4": 8, "uint4": 16}.get(name, 256)
    return np.random.default_rng(1).integers(0, top, size, np.uint8).view(dtype).reshape(shape)


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _=None):
        return nn.LayerNorm(epsilon=1e-5)(nn.Dense(self.width)(x)), None


class Many(nn.Module):
    """Setup and compact, shared, scanned, rematerialised, mapped modules, called against the order of their names."""

    def setup(self):
        self.embed = nn.Embed(7, 4)
        self.layers = [nn.Dense(4), nn.Dense(4)]
        self.never_called = nn.Dense(9)

    @nn.compact
    def __call__(self, ids, train: bool = False):
        x = self.embed(ids)
        for layer in self.layers[::-1]:
            x = layer(x)
        x = self.layers[0](x)
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(4, name="scanned")(x, None)
        x, _ = nn.remat(Block)(4, name="again")(x)
        mapped = nn.vmap(Block, variable_axes={"params": 1}, split_rngs={"params": True})
        x = mapped(4, name="mapped")(jnp.stack([x, x]))[0][0]
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.RNN(nn.LSTMCell(4))(x)
        x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4)])(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return self.embed.attend(x)


@pytest.fixture(scope="module")
def many():
    return opening.open_tree(adapters.linen(Many(), jax.ShapeDtypeStruct((2, 3), jnp.int32), train=True))


def test_a_module_shows_the_paths_that_init_gives(many):
    variables = jax.eval_shape(lambda: Many().init(jax.random.key(0), jnp.zeros((2, 3), jnp.int32)))
    assert dict(many) == dict(opening.open_tree(variables))
    assert many.side == "flax"
    assert not many.has_values


def test_leaves_come_in_the_order_of_init():
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, name="a")(nn.Dense(2, name="z")(x))

    variables = Late().init(jax.random.key(0), jnp.zeros((1, 2)))
    traced = opening.open_tree(adapters.linen(Late(), jnp.zeros((1, 2))))
    assert list(traced) == list(opening.open_tree(variables))
    assert next(iter(traced)) == "params/z/kernel"
    rebuilt = traced.live.rebuild({path: np.zeros(spec.shape, spec.dtype) for path, spec in traced.items()})
    assert type(rebuilt) is dict
    assert list(rebuilt["params"]) == ["z", "a"]


def test_modules_come_in_call_order_with_their_class(many):
    order = [path for path in many.live.modules if "/" not in path]
    assert order == [
        *("", "embed", "layers_1", "layers_0", "scanned", "again", "mapped", "MultiHeadDotProductAttention_0"),
        *("RNN_0", "LSTMCell_0", "Sequential_0", "Dense_0", "Dense_1", "Dropout_0", "BatchNorm_0"),
    ]
    assert [module.settings["order"] for module in many.live.modules.values()] == list(range(len(many.live.modules)))
    assert many.live.modules["scanned"].kind == "Block"
    assert many.live.modules["layers_1"].kind == "Dense"
    assert "flax.linen.linear.Dense" in many.live.modules["layers_1"].bases


def test_setting_up_is_not_calling():
    class Inner(nn.Module):
        def setup(self):
            self.dense = nn.Dense(2)

        def __call__(self, x):
            return self.dense(x)

    class Outer(nn.Module):
        def setup(self):
            self.late, self.early = Inner(), Inner()

        def __call__(self, x):
            assert self.late.dense is not None  # sets it up
            return self.late(self.early(x))

    modules = opening.open_tree(adapters.linen(Outer(), jnp.zeros((1, 2)))).live.modules
    assert list(modules) == ["", "early", "early/dense", "late", "late/dense"]


def test_modules_list_every_leaf_below_them(many):
    assert many.live.modules["BatchNorm_0"].leaves == {
        "scale": "params/BatchNorm_0/scale",
        "bias": "params/BatchNorm_0/bias",
        "mean": "batch_stats/BatchNorm_0/mean",
        "var": "batch_stats/BatchNorm_0/var",
    }
    attention = many.live.modules["MultiHeadDotProductAttention_0"]
    assert attention.leaves["query/kernel"] == "params/MultiHeadDotProductAttention_0/query/kernel"
    assert set(many.live.modules[""].leaves.values()) == set(many)
    for module in many.live.modules.values():
        assert all(path in many for path in module.leaves.values())
        assert all(role and path.endswith(role) for role, path in module.leaves.items())


def test_settings_are_plain_data(many):
    norm = many.live.modules["scanned/LayerNorm_0"].settings
    assert norm["epsilon"] == 1e-5
    assert norm["param_dtype"] == "float32"
    attention = many.live.modules["MultiHeadDotProductAttention_0"].settings
    assert attention["num_heads"] == 2
    assert attention["input_shape"] == (2, 3, 4)
    assert attention["output_shape"] == (2, 3, 4)
    conv = adapters.linen(nn.Conv(6, (3, 3), padding=[(1, 1), (1, 1)], dtype=jnp.bfloat16), jnp.zeros((1, 8, 8, 2)))
    shown = opening.open_tree(conv).live.modules[""].settings
    assert shown["padding"] == ((1, 1), (1, 1))
    assert shown["kernel_size"] == (3, 3)
    assert shown["dtype"] == "bfloat16"
    half = adapters.linen(nn.Dense(6, dtype=np.dtype("float16"), param_dtype=np.float64), jnp.zeros((1, 2)))
    shown_half = opening.open_tree(half).live.modules[""].settings
    assert (shown_half["dtype"], shown_half["param_dtype"]) == ("float16", "float64")
    assert shown["output_shape"] == (1, 8, 8, 6)


def test_stacked_leaves_show_the_shape_inside_their_module(many):
    assert many["params/scanned/Dense_0/kernel"].shape == (3, 4, 4)
    assert many.live.modules["scanned/Dense_0"].settings["inner_shapes"] == {"kernel": (4, 4), "bias": (4,)}
    assert many["params/mapped/Dense_0/kernel"].shape == (4, 2, 4)
    assert many.live.modules["mapped/Dense_0"].settings["inner_shapes"]["kernel"] == (4, 4)
    assert "inner_shapes" not in many.live.modules["again/Dense_0"].settings


def test_a_lone_layer_has_its_leaves_at_the_top():
    checkpoint = opening.open_tree(adapters.linen(nn.Dense(3), jnp.zeros((1, 2))))
    assert dict(checkpoint) == {
        "params/kernel": TensorSpec((2, 3), "float32"),
        "params/bias": TensorSpec((3,), "float32"),
    }
    assert checkpoint.live.modules[""].leaves == {"kernel": "params/kernel", "bias": "params/bias"}


def test_nothing_of_a_huge_module_is_computed():
    start = time.process_time()
    huge = adapters.linen(nn.Dense(10**6), jax.ShapeDtypeStruct((1, 10**6), jnp.float32))
    assert opening.open_tree(huge)["params/kernel"].size == 10**12
    assert time.process_time() - start < 20


def test_method_rngs_flags_and_abstract_inputs():
    class Coder(nn.Module):
        def setup(self):
            self.enc, self.dec = nn.Dense(2), nn.Dense(3)

        def encode(self, x, train):
            assert train is True  # a flag is not traced
            return self.enc(x)

        def decode(self, x):
            return self.dec(x)

    example = np.zeros((1, 4), np.float32)
    encoder = opening.open_tree(adapters.linen(Coder(), example, train=True, method=Coder.encode, rngs=0))
    assert set(encoder) == {"params/enc/kernel", "params/enc/bias"}
    decoder = opening.open_tree(adapters.linen(Coder(), example, method="decode", rngs={"params": 1}))
    assert set(decoder) == {"params/dec/kernel", "params/dec/bias"}


def test_boxes_add_no_level_and_come_back():
    init = nn.with_partitioning(nn.initializers.ones, ("data", None))
    logical = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    module = nn.Dense(3, kernel_init=init, bias_init=logical)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2)))
    for thing in (variables, adapters.linen(module, jnp.zeros((1, 2)))):
        checkpoint = opening.open_tree(thing)
        assert checkpoint["params/kernel"] == TensorSpec((2, 3), "float32")
        new = checkpoint.live.rebuild(
            {"params/kernel": np.full((2, 3), 5, np.float32), "params/bias": np.zeros(3, np.float32)}
        )
        assert isinstance(new["params"]["kernel"], nn.Partitioned)
        assert isinstance(new["params"]["bias"], nn.LogicallyPartitioned)
        assert new["params"]["kernel"].names == ("data", None)
        assert new["params"]["kernel"].value.sum() == 30
    assert variables["params"]["kernel"].value.sum() == 6


def test_boxes_open_under_a_mesh_without_a_constraint():
    mesh = jax.make_mesh((1,), ("data",))
    box = nn.Partitioned(jax.ShapeDtypeStruct((2, 3), jnp.float32), ("data", None), mesh=mesh)
    assert opening.open_tree({"params": {"kernel": box}})["params/kernel"].shape == (2, 3)


def test_weight_and_spectral_norm_keep_slashes_inside_a_key():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(4))(nn.WeightNorm(nn.Dense(4))(x), update_stats=True)

    checkpoint = opening.open_tree(adapters.linen(Normed(), jnp.zeros((1, 3))))
    assert checkpoint["params/WeightNorm_0/Dense_1~1kernel~1scale"].shape == (4,)
    assert checkpoint["batch_stats/SpectralNorm_0/Dense_0~1kernel~1u"].shape == (1, 4)
    new = checkpoint.live.rebuild({path: np.zeros(spec.shape, spec.dtype) for path, spec in checkpoint.items()})
    assert "Dense_1/kernel/scale" in new["params"]["WeightNorm_0"]


def test_caches_are_no_weights():
    module = nn.MultiHeadDotProductAttention(2, decode=True)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3, 4)))
    assert "cache" in variables
    for thing in (variables, freeze(variables), adapters.linen(module, jnp.zeros((1, 3, 4)))):
        assert {path.partition("/")[0] for path in opening.open_tree(thing)} == {"params"}
    checkpoint = opening.open_tree(variables)
    new = checkpoint.live.rebuild({path: checkpoint.read(path) for path in checkpoint})
    assert new["cache"] is variables["cache"]
    traced = opening.open_tree(adapters.linen(module, jnp.zeros((1, 3, 4))))
    assert set(traced.live.rebuild({path: checkpoint.read(path) for path in checkpoint})) == {"params"}


def test_a_module_that_fails_is_the_users_failure():
    class Broken(nn.Module):
        def __call__(self, x):
            raise ValueError("no such head")

    with pytest.raises(GraftaxError, match=r"Broken failed.*ValueError: no such head") as caught:
        opening.open_tree(adapters.linen(Broken(), 1))
    assert caught.value.exit_code == 70


def test_a_bare_module_says_what_to_write():
    with pytest.raises(UsageError, match=r"gx\.linen\(Dense\(\.\.\.\), example_input\)"):
        opening.open_tree(nn.Dense(3))
    with pytest.raises(UsageError, match="is a class"):
        opening.open_tree(nn.Dense)
    with pytest.raises(UsageError, match="the class Dense"):
        adapters.linen(nn.Dense, jnp.zeros(3))


# ---------------------------------------------------------------- trees of arrays


def test_collections_bare_params_and_frozen_dicts():
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}}, "batch_stats": {"n": {"mean": np.ones(3)}}}
    assert set(opening.open_tree(variables)) == {"params/Dense_0/kernel", "batch_stats/n/mean"}
    assert set(opening.open_tree(variables["params"])) == {"Dense_0/kernel"}
    frozen = opening.open_tree(freeze(variables))
    assert set(frozen) == set(opening.open_tree(variables))
    assert frozen.containers == {"": "FrozenDict"}
    new = frozen.live.rebuild({path: frozen.read(path) for path in frozen})
    assert isinstance(new, FrozenDict)


def test_containers_keep_type_and_key_order():
    tree = OrderedDict(
        z={"b": jnp.ones(2), "a": [jnp.zeros(1), (np.ones(3, np.float32),)]}, y={3: jnp.ones(4), "k": None}
    )
    checkpoint = opening.open_tree(tree)
    assert list(checkpoint) == ["z/b", "z/a/0", "z/a/1/0", "y/3"]
    assert checkpoint.real_keys == {"z/a/0": 0, "z/a/1": 1, "z/a/1/0": 0, "y/3": 3}
    assert checkpoint.containers == {"z/a": "list", "z/a/1": "tuple"}
    new = checkpoint.live.rebuild({path: checkpoint.read(path) + 1 for path in checkpoint})
    assert type(new) is OrderedDict
    assert list(new) == ["z", "y"]
    assert list(new["z"]) == ["b", "a"]
    assert isinstance(new["z"]["a"], list)
    assert isinstance(new["z"]["a"][1], tuple)
    assert list(new["y"]) == [3, "k"]
    assert new["y"]["k"] is None
    assert float(new["y"][3].sum()) == 8
    assert float(tree["y"][3].sum()) == 4


def test_two_keys_of_one_path_are_refused():
    with pytest.raises(FormatError, match="two leaves have the path 'blocks/1'"):
        opening.open_tree({"blocks": {"1": jnp.ones(1), 1: jnp.ones(1)}})


def test_a_slash_in_a_key_is_escaped():
    checkpoint = opening.open_tree({"params": {"a/b": jnp.ones(1), "a": {"b": jnp.ones(2)}, "t~": jnp.ones(3)}})
    assert list(checkpoint) == ["params/a~1b", "params/a/b", "params/t~0"]


@pytest.mark.parametrize(
    ("leaf", "words"),
    [(3.0, "params/a is a float, not an array"), ("x", "is a str"), (object(), "is an object")],
)
def test_leaves_that_are_no_arrays_are_refused(leaf, words):
    with pytest.raises(UsageError, match=words):
        opening.open_tree({"params": {"a": leaf}})


def test_dtypes_that_no_checkpoint_holds_are_all_listed():
    with pytest.raises(FormatError, match="2 leaves") as caught:
        opening.open_tree({"params": {"a": np.array(["x"]), "b": np.array([None]), "c": np.ones(1)}})
    assert [failure.key for failure in caught.value.failures] == ["params/a", "params/b"]


@pytest.mark.parametrize("key", [None, 1.5, True, b"x"])
def test_keys_that_no_path_can_hold_are_refused(key):
    with pytest.raises(UsageError, match="a key of type"):
        opening.open_tree({"params": {key: jnp.ones(1)}})


def test_random_keys_are_left_alone():
    tree = {"params": {"w": jnp.ones(1)}, "rng": {"key": jax.random.key(0)}}
    checkpoint = opening.open_tree(tree)
    assert list(checkpoint) == ["params/w"]
    assert checkpoint.live.rebuild({"params/w": np.zeros(1, np.float32)})["rng"]["key"] is tree["rng"]["key"]


def test_other_objects_say_what_is_accepted():
    for thing in (3, None, jnp.ones(3), object(), set()):
        with pytest.raises(UsageError, match="not a tree of weights"):
            opening.open_tree(thing)
    with pytest.raises(UsageError, match="empty dict"):
        opening.open_tree({})


def test_flat_names_tell_the_side_unless_leaves_are_jaxs():
    one = np.ones((2, 2), np.float32)
    assert opening.open_tree({"params/fc/kernel": one}).side == "flax"
    assert list(opening.open_tree({"params/fc/kernel": one})) == ["params/fc/kernel"]
    assert opening.open_tree({"fc.weight": one, "fc.bias": one}).side == "torch"
    assert opening.open_tree({"kernel": one}).side == "flax"
    assert opening.open_tree({"w": one}).side is None
    assert opening.open_tree({"w": jnp.ones(2)}).side == "flax"
    new = opening.open_tree({"fc.weight": one, "fc.bias": one}).live.rebuild({"fc.weight": one, "fc.bias": one})
    assert isinstance(new["fc.weight"], np.ndarray)
    assert new["fc.weight"] is not one


def test_abstract_trees_have_no_values_and_rebuild_as_arrays():
    tree = jax.eval_shape(lambda: freeze({"params": {"w": jnp.ones((2, 3), jnp.bfloat16)}}))
    checkpoint = opening.open_tree(tree)
    assert checkpoint["params/w"] == TensorSpec((2, 3), "bfloat16")
    assert not checkpoint.has_values
    new = checkpoint.live.rebuild({"params/w": np.ones((2, 3), ml_dtypes.bfloat16)})
    assert isinstance(new, FrozenDict)
    assert isinstance(new["params"]["w"], jax.Array)
    mixed = opening.open_tree({"params": {"w": tree["params"]["w"], "b": jnp.ones(3)}})
    assert mixed.read("params/b").tolist() == [1, 1, 1]
    with pytest.raises(PlanError, match="no values"):
        mixed.read("params/w")


def test_read_arrays_cannot_be_written():
    for leaf in (jnp.ones(3), np.ones(3, np.float32)):
        array = opening.open_tree({"params": {"w": leaf}}).read("params/w")
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
    assert leaf.flags.writeable


def test_deleted_arrays_are_named():
    array = jnp.ones(3)
    checkpoint = opening.open_tree({"params": {"w": array}})
    array.delete()
    with pytest.raises(UsageError, match="params/w was deleted"):
        checkpoint.read("params/w")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1, 4, 1)])
def test_every_dtype_survives_bit_for_bit(name, shape):
    array = array_of(name, shape)
    checkpoint = opening.open_tree({"params": {"w": array}})
    assert checkpoint["params/w"] == TensorSpec(shape, name)
    new = checkpoint.live.rebuild({"params/w": checkpoint.read("params/w")})["params"]["w"]
    assert new.dtype.name == name
    assert new.shape == shape
    assert np.asarray(new).tobytes() == array.tobytes()


@pytest.mark.parametrize(("name", "value"), [("int64", 2**40), ("uint64", 2**63), ("float64", 1 / 3)])
def test_what_jax_would_narrow_stays_on_the_host(name, value):
    leaf = np.array([value], name)
    new = adapters.to_jax(leaf)
    assert isinstance(new, np.ndarray)
    assert new.dtype.name == name
    assert new[0] == leaf[0]
    assert not np.shares_memory(new, leaf)
    with jax.enable_x64(True):
        assert isinstance(adapters.to_jax(leaf), jax.Array)
        assert adapters.to_jax(leaf).dtype.name == name


def test_big_endian_and_strided_arrays_arrive_as_they_are():
    leaf = np.arange(12, dtype=">f4").reshape(3, 4).T
    checkpoint = opening.open_tree({"params": {"w": leaf}})
    assert checkpoint["params/w"] == TensorSpec((4, 3), "float32")
    array = checkpoint.read("params/w")
    assert array.dtype.isnative
    assert np.array_equal(array, leaf)
    assert np.array_equal(checkpoint.live.rebuild({"params/w": array})["params"]["w"], leaf)


@settings(deadline=None)
@given(st.integers(0, 5000), st.booleans())
def test_jax_arrays_never_share_what_the_caller_can_write(offset, writable):
    held = np.zeros(offset + 4096, np.uint8)[offset:].view(np.float32)
    held[:] = 1
    given_array = held[:] if writable else held.view()
    given_array.flags.writeable = writable
    made = adapters.to_jax(given_array)
    rebuilt = opening.open_tree({"w": jnp.zeros(1024)}).live.rebuild({"w": given_array})["w"]
    held[:] = 2
    assert float(made.sum()) == 1024
    assert float(rebuilt.sum()) == 1024


def test_sharding_follows_like():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    array = np.arange(4, dtype=np.float32)
    for leaf in (jax.device_put(jnp.zeros(4), sharding), jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)):
        new = opening.open_tree({"params": {"w": leaf}}).live.rebuild({"params/w": array})["params"]["w"]
        assert new.sharding == sharding
        assert new.committed
    loose = opening.open_tree({"params": {"w": jnp.zeros(4)}}).live.rebuild({"params/w": array})["params"]["w"]
    assert not loose.committed
    told = opening.open_tree({"params": {"w": jnp.zeros(4)}}).live.rebuild({"params/w": array}, sharding=sharding)
    assert told["params"]["w"].sharding == sharding
    host = opening.open_tree({"params": {"w": jnp.zeros(4)}}).live.rebuild({"params/w": array}, sharding="host")
    assert type(host["params"]["w"]) is np.ndarray


def test_rebuild_takes_the_dtypes_it_is_given_and_map_does_not():
    tree = {"params": {"w": jnp.zeros(3)}}
    half = {"params/w": np.ones(3, np.float16)}
    assert opening.open_tree(tree).live.rebuild(half)["params"]["w"].dtype == jnp.float16
    with pytest.raises(PlanError, match="float16"):
        adapters.map_leaves(tree, half)


def test_rebuild_lists_what_does_not_fit():
    checkpoint = opening.open_tree({"params": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}})
    with pytest.raises(PlanError) as caught:
        checkpoint.live.rebuild({
            "params/w": np.zeros((3, 2), np.float32), "params/b": np.zeros(4), "params/c": np.zeros(1),
        })  # fmt: skip
    assert [failure.key for failure in caught.value.failures] == ["params/w", "params/b", "params/c"]
    with pytest.raises(PlanError, match="not an array"):
        checkpoint.live.rebuild({"params/b": 0.5})


def test_rebuild_takes_the_dtypes_that_a_plan_has_settled():
    checkpoint = opening.open_tree({"params": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}})
    tree = checkpoint.live.rebuild({"params/w": np.zeros((2, 3), np.float16), "params/b": np.ones(3, np.float32)})
    assert tree["params"]["w"].dtype == jnp.float16


# ---------------------------------------------------------------- map and assign


def test_map_touches_one_leaf_and_nothing_else():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P())
    box = nn.Partitioned(jax.device_put(jnp.ones((2, 2)), sharding), ("a", "b"))
    tree = {"params": {"z": box, "a": jnp.ones(3), "n": np.ones(2)}, "other": [jnp.ones(1)]}
    new = adapters.map_leaves(tree, {"params/z": np.zeros((2, 2), np.float32), "params/n": np.zeros(2)})
    assert list(new["params"]) == ["z", "a", "n"]
    assert new["params"]["z"].names == ("a", "b")
    assert new["params"]["z"].value.sharding == sharding
    assert new["params"]["a"] is tree["params"]["a"]
    assert new["other"][0] is tree["other"][0]
    assert isinstance(new["params"]["n"], np.ndarray)
    assert tree["params"]["z"].value.sum() == 4
    assert tree["params"]["n"].sum() == 2
    frozen = adapters.map_leaves(
        freeze({"params": {"w": jnp.ones(2), "v": jnp.ones(1)}}), {"params/w": np.zeros(2, "f4")}
    )
    assert isinstance(frozen, FrozenDict)
    flat = adapters.map_leaves({"a/kernel": jnp.ones(2), "a/bias": jnp.ones(1)}, {"a/kernel": np.zeros(2, "f4")})
    assert list(flat) == ["a/kernel", "a/bias"]


def test_map_of_other_mappings():
    tree = MappingProxyType({"params": MappingProxyType({"w": jnp.ones(2)})})
    new = adapters.map_leaves(tree, {"params/w": np.zeros(2, np.float32)})
    assert type(new) is MappingProxyType
    assert type(new["params"]) is MappingProxyType


def test_variables_are_not_changed_in_place():
    with pytest.raises(UsageError, match="cannot be changed in place"):
        adapters.assign({"params": {"w": jnp.ones(2)}}, {"params/w": np.zeros(2, np.float32)})
    with pytest.raises(UsageError, match="pass the variables"):
        adapters.map_leaves(adapters.linen(nn.Dense(2), jnp.zeros((1, 2))), {})


def test_live_leaves_are_the_objects_themselves():
    tree = {"params": {"w": nn.Partitioned(jnp.ones(2), ("a",))}}
    assert adapters.live_leaves(tree)["params/w"] is tree["params"]["w"].value
    assert adapters.live_leaves(opening.open_tree(tree))["params/w"] is tree["params"]["w"].value


def test_a_checkpoint_is_itself():
    checkpoint = opening.open_tree({"params": {"w": jnp.ones(2)}})
    assert opening.open_tree(checkpoint) is checkpoint
