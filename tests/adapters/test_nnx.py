"""NNX Modules, State and (GraphDef, State) as checkpoints, and back."""

from __future__ import annotations

import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from graftax import adapters
from graftax.adapters import settings
from graftax.adapters.nnx_tree import _rank
from graftax.errors import PlanError, UsageError
from graftax.execute import opening
from graftax.tree import TensorSpec


class Scale(nnx.Variable):
    """A user's own kind of weight."""


class Block(nnx.Module):
    def __init__(self, rngs):
        self.lin = nnx.Linear(4, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, epsilon=1e-3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.z_first = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.normed = nnx.WeightNorm(nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.head_table = self.embed.embedding
        self.shared = self.blocks[0].lin
        self.own = Scale(jnp.ones(3))
        self.named = nnx.Dict(a=nnx.Param(jnp.ones(2)))
        self.table = nnx.data({"x": [nnx.Param(jnp.ones(2)), nnx.Param(jnp.zeros(2))]})
        self.raw = jnp.arange(3.0)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs)
        self.attention.init_cache((1, 3, 4))
        self.seen = nnx.Intermediate(jnp.ones(9))
        self.none = nnx.Linear(2, 2, use_bias=False, rngs=rngs)


@pytest.fixture
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def abstract():
    return nnx.eval_shape(lambda: Net(nnx.Rngs(0)))


def arrays_of(checkpoint, value=2.0):
    return {path: np.full(spec.shape, value, spec.dtype) for path, spec in checkpoint.items()}


def test_weights_are_params_statistics_user_types_and_raw_arrays(net):
    checkpoint = opening.open_tree(net)
    assert checkpoint.side == "flax"
    assert checkpoint["z_first/kernel"] == TensorSpec((3, 4), "float32")
    assert {"own", "raw", "named/a", "table/x/0", "table/x/1", "blocks/1/bn/mean"} <= set(checkpoint)
    assert "none/bias" not in checkpoint
    assert not [path for path in checkpoint if any(word in path for word in ("rngs", "cache", "seen", "count"))]


def test_keys_that_are_no_text_are_kept(net):
    checkpoint = opening.open_tree(net)
    assert checkpoint["normed/scales/kernel"].shape == (5,)
    assert checkpoint["spectral/batch_stats/kernel~1u"].shape == (1, 5)
    assert checkpoint.real_keys == {
        "blocks/0": 0,
        "blocks/1": 1,
        "table/x/0": 0,
        "table/x/1": 1,
        "normed/scales/kernel": ("kernel",),
        "spectral/batch_stats/kernel~1u": ("kernel", "u"),
        "spectral/batch_stats/kernel~1sigma": ("kernel", "sigma"),
    }


def test_shared_params_appear_once_with_their_other_paths(net):
    checkpoint = opening.open_tree(net)
    assert checkpoint.storage.aliases == {
        "head_table": "embed/embedding",
        "shared/kernel": "blocks/0/lin/kernel",
        "shared/bias": "blocks/0/lin/bias",
    }
    assert not set(checkpoint.storage.aliases) & set(checkpoint)
    new = checkpoint.live.rebuild(arrays_of(checkpoint))
    assert new.head_table is new.embed.embedding
    assert new.shared is new.blocks[0].lin


def test_modules_come_in_the_order_of_attributes(net):
    modules = opening.open_tree(net).live.modules
    assert [path for path in modules if "/" not in path] == [
        *("", "z_first", "blocks", "normed", "spectral", "embed", "named", "attention", "none"),
    ]
    assert modules["blocks/1/bn"].kind == "BatchNorm"
    assert "flax.nnx.nn.normalization.BatchNorm" in modules["blocks/1/bn"].bases
    assert modules["blocks/1/bn"].settings["epsilon"] == 1e-3
    assert modules["blocks/1/bn"].settings["param_dtype"] == "float32"
    assert modules["blocks/1/bn"].leaves == {role: f"blocks/1/bn/{role}" for role in ("bias", "mean", "scale", "var")}
    assert modules["attention"].settings["num_heads"] == 2
    assert modules["attention"].leaves["query/kernel"] == "attention/query/kernel"
    assert modules["normed"].leaves["scales/kernel"] == "normed/scales/kernel"
    assert modules[""].leaves["head_table"] == "embed/embedding"


def test_many_blocks_keep_their_order():
    class Deep(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(12)])

    checkpoint = opening.open_tree(Deep())
    assert list(checkpoint)[0::2] == [f"blocks/{i}/bias" for i in range(12)]
    assert list(checkpoint.live.modules)[2:] == [f"blocks/{i}" for i in range(12)]


def test_rebuild_gives_a_new_module_and_keeps_the_rest(net):
    checkpoint = opening.open_tree(net)
    before = jax.tree.map(np.asarray, {path: checkpoint.read(path).copy() for path in checkpoint})
    net.blocks[0].drop(jnp.ones(4))  # advances the random state
    checkpoint = opening.open_tree(net)
    new = checkpoint.live.rebuild(arrays_of(checkpoint))
    assert type(new) is Net
    assert new is not net
    assert float(new.z_first.kernel[0, 0]) == 2
    assert new.normed.scales[("kernel",)].tolist() == [2] * 5
    assert new.raw.tolist() == [2] * 3
    assert int(new.blocks[0].drop.rngs.count[...]) == int(net.blocks[0].drop.rngs.count[...]) == 1
    assert new.attention.cached_key[...].shape == net.attention.cached_key[...].shape
    assert new.seen[...].sum() == 9
    assert {path: opening.open_tree(net).read(path).tolist() for path in before} == {
        path: array.tolist() for path, array in before.items()
    }
    new.blocks[0].drop(jnp.ones(4))
    new.z_first.kernel[...] = jnp.zeros((3, 4))
    assert int(net.blocks[0].drop.rngs.count[...]) == 1
    assert np.array_equal(net.z_first.kernel[...], before["z_first/kernel"])


def test_a_rebuilt_module_runs(net):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.lin = nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.lin(x)

    concrete, like = Small(nnx.Rngs(1)), nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    source = opening.open_tree(concrete)
    new = opening.open_tree(like).live.rebuild({path: source.read(path) for path in source})
    x = jnp.ones((1, 2))
    assert np.array_equal(new(x), concrete(x))
    assert np.array_equal(nnx.jit(lambda m, x: m(x))(new, x), nnx.jit(lambda m, x: m(x))(concrete, x))


def test_abstract_modules_have_the_same_leaves_and_no_values(net, abstract):
    like = opening.open_tree(abstract)
    assert {path: str(spec) for path, spec in like.items()} == {
        path: str(spec) for path, spec in opening.open_tree(net).items()
    }
    assert not like.has_values
    assert like.live.modules.keys() == opening.open_tree(net).live.modules.keys()
    assert like.storage.aliases == opening.open_tree(net).storage.aliases
    assert like.real_keys == opening.open_tree(net).real_keys


def test_nothing_of_a_huge_module_is_computed():
    start = time.process_time()
    huge = nnx.eval_shape(lambda: nnx.Linear(10**6, 10**6, rngs=nnx.Rngs(0)))
    assert opening.open_tree(huge)["kernel"].size == 10**12
    assert time.process_time() - start < 20


def test_abstract_random_state_is_made_from_rngs(abstract):
    like = opening.open_tree(abstract)
    arrays = arrays_of(like)
    with pytest.warns(UserWarning, match=r"stay abstract .*rngs=nnx\.Rngs"):
        quiet = like.live.rebuild(arrays)
    assert isinstance(quiet.blocks[0].drop.rngs.key.get_raw_value(), jax.ShapeDtypeStruct)
    with pytest.warns(UserWarning, match="cached_key"):  # a cache is no random state: it is named and left
        new = like.live.rebuild(arrays, rngs=nnx.Rngs(7))
    key, other = new.blocks[0].drop.rngs.key[...], new.blocks[1].drop.rngs.key[...]
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert not np.array_equal(jax.random.key_data(key), jax.random.key_data(other))
    assert int(new.blocks[0].drop.rngs.count[...]) == 0
    assert new.blocks[0].drop(jnp.ones(4)).shape == (4,)
    assert new.raw.tolist() == [2] * 3
    assert new.normed.scales[("kernel",)].tolist() == [2] * 5


def test_seeds_and_stacked_random_state():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    like = opening.open_tree(nnx.eval_shape(lambda: nnx.Dict(d=make(nnx.Rngs(0)), w=nnx.Param(jnp.ones(1)))))
    new = like.live.rebuild(arrays_of(like), rngs=3)
    assert new.d.rngs.key[...].shape == (3,)


def test_state_and_split(net, abstract):
    state = nnx.state(net)
    split = nnx.split(net)
    for thing in (state, split):
        checkpoint = opening.open_tree(thing)
        assert set(checkpoint) == set(opening.open_tree(net))
        new = checkpoint.live.rebuild(arrays_of(checkpoint))
        assert isinstance(new, nnx.State)
        assert new["blocks"][0]["lin"]["kernel"][...].sum() == 32
        assert isinstance(new["blocks"][0]["lin"]["kernel"], nnx.Param)
        assert isinstance(new["own"], Scale)
        assert net.blocks[0].lin.kernel[...].sum() != 32
    assert opening.open_tree(split).live.modules["blocks/0/bn"].kind == "BatchNorm"
    assert opening.open_tree(split).storage.aliases["head_table"] == "embed/embedding"
    merged = nnx.merge(split[0], opening.open_tree(split).live.rebuild(arrays_of(checkpoint)))
    assert merged.head_table is merged.embed.embedding
    params = opening.open_tree((split[0], nnx.state(net, nnx.Param)))
    assert "blocks/0/bn/mean" not in params
    assert "blocks/0/bn/scale" in params
    assert opening.open_tree(nnx.to_pure_dict(state)).real_keys["blocks/0"] == 0
    with pytest.raises(UsageError, match="one State"):
        opening.open_tree(nnx.split(net, nnx.Param, ...))
    with pytest.raises(UsageError, match="GraphDef"):
        opening.open_tree(split[0])


def test_optimizer_state_is_no_weight():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    class Trainer(nnx.Module):
        def __init__(self):
            self.model, self.optimizer = model, optimizer

    assert set(opening.open_tree(Trainer())) == {"model/kernel", "model/bias"}


def test_every_kind_of_value_survives(net):
    class Odd(nnx.Module):
        def __init__(self):
            self.host = nnx.Param(np.array([2**40], np.int64))
            self.half = nnx.Param(jnp.ones(3, jnp.bfloat16))
            self.tiny = nnx.Param(jnp.ones(3, jnp.float8_e4m3fn))
            self.step = nnx.Variable(3)
            self.scalar = nnx.Param(jnp.float32(0.25))
            self.typed_key = nnx.Variable(jax.random.key(0))

    module = Odd()
    checkpoint = opening.open_tree(module)
    assert {path: str(spec) for path, spec in checkpoint.items()} == {
        "half": "bfloat16[3]", "host": "int64[1]", "scalar": "float32[]", "tiny": "float8_e4m3fn[3]",
    }  # fmt: skip
    new = checkpoint.live.rebuild({path: checkpoint.read(path) for path in checkpoint})
    assert new.host.get_raw_value().tolist() == [2**40]
    assert new.half[...].dtype == ml_dtypes.bfloat16
    assert new.step.get_raw_value() == 3
    assert float(new.scalar[...]) == 0.25


def test_array_references_are_read_and_written():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with_refs = nnx.with_vars(module, ref=True) if hasattr(nnx, "with_vars") else nnx.vars_as(module, ref=True)
    checkpoint = opening.open_tree(with_refs)
    assert set(checkpoint) == {"kernel", "bias"}
    assert np.array_equal(checkpoint.read("kernel"), module.kernel[...])
    new = checkpoint.live.rebuild(arrays_of(checkpoint, 4))
    mapped = adapters.map_leaves(with_refs, {"kernel": np.full((2, 3), 3, np.float32)})
    assert (new.kernel[...].sum(), mapped.kernel[...].sum()) == (24, 18)
    assert np.array_equal(with_refs.kernel[...], module.kernel[...])
    adapters.assign(with_refs, arrays_of(checkpoint, 5))
    assert with_refs.kernel[...].sum() == 30
    assert (new.kernel[...].sum(), mapped.kernel[...].sum()) == (24, 18)


def test_the_state_of_a_lone_layer():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    checkpoint = opening.open_tree(state)
    assert checkpoint.side == "flax"
    new = adapters.map_leaves(state, {"kernel": np.zeros((2, 3), np.float32)})
    assert isinstance(new, nnx.State)
    assert isinstance(new["kernel"], nnx.Param)
    assert new["bias"].get_raw_value() is state["bias"].get_raw_value()


def test_a_param_without_an_array_is_refused():
    class Odd(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(1.5)

    with pytest.raises(UsageError, match="w is a float, not an array"):
        opening.open_tree(Odd())


def test_sharding_and_metadata_are_kept():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    module = nnx.Linear(2, 4, kernel_init=nnx.with_metadata(nnx.initializers.ones, tag="mine"), rngs=nnx.Rngs(0))
    module.kernel.set_value(jax.device_put(jnp.ones((2, 4)), sharding))
    checkpoint = opening.open_tree(module)
    new = checkpoint.live.rebuild(arrays_of(checkpoint))
    assert new.kernel[...].sharding == sharding
    assert new.kernel.get_metadata("tag") == "mine"


# ---------------------------------------------------------------- in place, and leaf by leaf


def test_assign_sets_the_same_variables(net):
    held = [net.z_first.kernel, net.head_table, net.blocks[0].bn.mean, net.own]
    adapters.assign(net, arrays_of(opening.open_tree(net), 4))
    assert [net.z_first.kernel, net.embed.embedding, net.blocks[0].bn.mean, net.own] == held
    for variable in held:
        assert np.all(variable[...] == 4)
    assert net.raw.tolist() == [4] * 3
    assert net.normed.scales[("kernel",)].tolist() == [4] * 5
    assert net.table["x"][1][...].tolist() == [4, 4]
    assert net.shared.kernel is net.blocks[0].lin.kernel


def test_assign_of_a_part_leaves_the_rest(net):
    before = net.embed.embedding[...]
    count = net.blocks[0].drop.rngs.count
    adapters.assign(net, {"own": np.zeros(3, np.float32)})
    assert net.own[...].tolist() == [0, 0, 0]
    assert net.embed.embedding[...] is before
    assert net.blocks[0].drop.rngs.count is count


def test_assign_copies_what_it_is_given(net):
    array = np.ones(3, np.float32)
    adapters.assign(net, {"own": array})
    array[:] = 9
    assert net.own[...].tolist() == [1, 1, 1]


@pytest.mark.parametrize("path", ["own", "raw", "normed/scales/kernel"])
def test_assign_checks_everything_first(net, path):
    before = net.z_first.bias[...]
    with pytest.raises(PlanError, match=path):
        adapters.assign(net, {"z_first/bias": np.ones(4, np.float32), path: np.ones((2, 2), np.float32)})
    assert net.z_first.bias[...] is before


def test_assign_needs_values(abstract):
    with pytest.raises(UsageError, match=r"no values.*[\s\S]*gx\.port"):
        adapters.assign(abstract, {"own": np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match="cannot be changed in place"):
        adapters.assign(nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))), {})


def test_map_gives_a_new_module_with_the_same_other_arrays(net):
    new = adapters.map_leaves(net, {"blocks/1/lin/kernel": np.zeros((4, 4), np.float32)})
    assert type(new) is Net
    assert new.blocks[1].lin.kernel[...].sum() == 0
    assert net.blocks[1].lin.kernel[...].sum() != 0
    old, kept = adapters.live_leaves(net), adapters.live_leaves(new)
    assert list(old) == list(kept)
    assert [path for path in old if old[path] is not kept[path]] == ["blocks/1/lin/kernel"]
    assert new.blocks[0].lin.kernel is not net.blocks[0].lin.kernel  # one module never changes with the other
    assert new.head_table is new.embed.embedding


def test_map_of_a_raw_array_and_of_states(net):
    new = adapters.map_leaves(net, {"normed/scales/kernel": np.zeros(5, np.float32)})
    assert new.normed.scales[("kernel",)].sum() == 0
    assert net.normed.scales[("kernel",)].sum() == 5
    for thing in (nnx.state(net), nnx.split(net)):
        state = adapters.map_leaves(thing, {"own": np.zeros(3, np.float32)})
        assert isinstance(state, nnx.State)
        assert isinstance(state["own"], Scale)
        assert state["own"][...].sum() == 0
        assert state["raw"] is net.raw
        assert state["embed"]["embedding"].get_raw_value() is net.embed.embedding.get_raw_value()
    assert net.own[...].sum() == 3


def test_items_with_numbers_are_no_settings() -> None:
    """nnx.List of flax 0.12.1 has its items under numbers, that of 0.12.8 under text."""
    assert settings.collect([(0, 3), ("1", 4), ("_hidden", 5), ("size", 6)]) == {"1": 4, "size": 6}
    inner = types.SimpleNamespace(z=1, a=2)
    for key in (0, "0"):
        holder = types.SimpleNamespace()
        vars(holder)[key] = inner
        assert [_rank(holder, (0, name)) for name in ("z", "a")] == [(0, 0), (0, 1)]
