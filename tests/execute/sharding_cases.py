"""Loading straight into shards, on eight host devices: test_sharding.py runs this file in a process of its own."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import graftax as gx
from graftax.errors import GraftaxError, PlanError, StorageError, UsageError
from graftax.execute import device_placement, reading, sharded, streamed
from graftax.types import Receipt

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="test_sharding.py runs this with eight devices")

AUTO = (AxisType.Auto, AxisType.Auto)
RULES = """rules = [
  { torch = "fc.weight", flax = "fc/kernel", layout = "linear" },
  { torch = "fc.bias", flax = "fc/bias" },
  { torch = "qkv.weight", flax = ["q/kernel", "k/kernel", "v/kernel"], heads = 4, fused = "block" },
  { torch = "layers.{i}.w.weight", flax = "layers/w/kernel", layout = "linear", stack = {i = 0} },
  { torch = "temperature", flax = "temperature" },
]"""


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "fc.weight": normal(16, 24),
        "fc.bias": normal(16),
        "qkv.weight": normal(3 * 32, 24).astype(ml_dtypes.bfloat16),
        **{f"layers.{i}.w.weight": normal(8, 12) for i in range(4)},
        "temperature": np.asarray(2.5, np.float32),
    }


def abstract() -> dict[str, Any]:
    def leaf(*shape: int, dtype: Any = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "fc": {"kernel": leaf(24, 16), "bias": leaf(16)},
        **{name: {"kernel": leaf(24, 4, 8, dtype="bfloat16")} for name in "qkv"},
        "layers": {"w": {"kernel": leaf(4, 12, 8)}},
        "temperature": leaf(),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharding") / "model.safetensors"
    save_file(tensors(), path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> Any:
    return gx.port(source, abstract(), rules=RULES, sharding="host")


@pytest.fixture(params=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> Any:
    if request.param == "auto":
        return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    return jax.make_mesh((4, 2), ("data", "model"))


SPECS = {
    "fc": {"kernel": P("data", "model"), "bias": P("model")},
    "q": {"kernel": P(None, "data", "model")},
    "k": {"kernel": P("data", "model")},
    "v": {"kernel": P(("data", "model"))},
    "layers": {"w": {"kernel": P("data", None, "model")}},
    "temperature": P(),
}


def same(made: Any, whole: Any, placed: Any = None) -> None:
    """Bit for bit, and (given the tree of shardings) laid out so."""
    flat, tree = jax.tree.flatten(made)
    assert tree == jax.tree.structure(whole)
    for array, want in zip(flat, jax.tree.leaves(whole), strict=True):
        assert array.dtype == want.dtype
        assert np.asarray(array).tobytes() == np.asarray(want).tobytes()
    if placed is not None:
        for array, sharding in zip(flat, jax.tree.leaves(placed), strict=True):
            assert array.sharding == sharding
            assert array.committed


def shardings(mesh: Any, specs: Any = SPECS) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


# ---------------------------------------------------------------- what the user gives


def test_a_tree_of_shardings(source: Path, whole: Any, mesh: Any) -> None:
    made = gx.port(source, abstract(), rules=RULES, sharding=shardings(mesh))
    same(made, whole, shardings(mesh))


def test_a_mesh_with_specs(source: Path, whole: Any, mesh: Any) -> None:
    made = gx.port(source, abstract(), rules=RULES, sharding=gx.on_mesh(mesh, SPECS))
    same(made, whole, shardings(mesh))
    with jax.set_mesh(mesh):
        made = gx.port(source, abstract(), rules=RULES, sharding=SPECS)
    same(made, whole, shardings(mesh))
    with pytest.raises(UsageError, match="without a mesh"):
        gx.port(source, abstract(), rules=RULES, sharding=SPECS)


def test_one_sharding_for_all(source: Path, whole: Any, mesh: Any) -> None:
    everywhere = NamedSharding(mesh, P())
    made = gx.port(source, abstract(), rules=RULES, sharding=everywhere)
    same(made, whole, jax.tree.map(lambda _: everywhere, whole))
    second = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    same(gx.port(source, abstract(), rules=RULES, sharding=second), whole, jax.tree.map(lambda _: second, whole))


def test_selectors_and_prefixes_the_more_exact_wins(source: Path, whole: Any, mesh: Any) -> None:
    one, two, rest = (NamedSharding(mesh, spec) for spec in (P("data"), P(None, "model"), P()))
    made = gx.port(
        source, abstract(), rules=RULES, sharding={"fc/kernel": two, "fc": rest, "**/kernel": one, "**": rest}
    )
    same(made, whole)
    assert made["fc"]["kernel"].sharding == two
    assert made["fc"]["bias"].sharding == rest
    assert made["layers"]["w"]["kernel"].sharding == one
    assert made["temperature"].sharding == rest
    mixed = gx.port(source, abstract(), rules=RULES, sharding={"**": rest, "temperature": "host"})
    assert isinstance(mixed["temperature"], np.ndarray)
    assert mixed["fc"]["bias"].sharding == rest


def test_logical_names_and_rules(source: Path, whole: Any, mesh: Any) -> None:
    specs = {"**": P(), "fc/kernel": P("embed", "mlp"), "q/kernel": P("embed", "heads", "mlp")}
    rules = {"embed": "data", "mlp": "model", "heads": None}
    made = gx.port(source, abstract(), rules=RULES, sharding=gx.on_mesh(mesh, specs, rules))
    same(made, whole)
    assert made["fc"]["kernel"].sharding == NamedSharding(mesh, P("data", "model"))
    assert made["q"]["kernel"].sharding == NamedSharding(mesh, P("data", None, "model"))
    # As in Linen: of several rules the first whose mesh axis the leaf does not use yet.
    ordered = [("embed", "data"), ("mlp", "data"), ("mlp", "model"), ("heads", None)]
    made = gx.port(source, abstract(), rules=RULES, sharding=gx.on_mesh(mesh, specs, ordered))
    assert made["fc"]["kernel"].sharding == NamedSharding(mesh, P("data", "model"))


def test_a_plan_runs_into_shards(source: Path, whole: Any, mesh: Any, tmp_path: Path) -> None:
    plan = gx.plan(source, abstract(), rules=RULES)
    same(plan.run(source, sharding=shardings(mesh)), whole, shardings(mesh))
    plan.save(tmp_path / "plan.json")
    loaded = gx.load_plan(tmp_path / "plan.json")
    same(loaded.run(source, sharding=gx.on_mesh(mesh, SPECS)), whole, shardings(mesh))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"fc": P("data")}, PlanError, "sharding= does not cover this leaf"),
        ({"**": P(), "fd/kernel": P()}, PlanError, r"fd/kernel.*matches nothing.*\n.*fc/kernel"),
        ({"**": P("tensor")}, PlanError, "axis tensor is neither a mesh axis nor in the rules"),
        ({"**": P(), "fc/bias": P(None, "model")}, PlanError, r"fc/bias: .*more axes than float32\[16\]"),
        ({"**": P(), "layers/w/kernel": P(None, None, "data", "model")}, PlanError, "more axes"),
        ({"**": P(), "fc/kernel": P("data", "data")}, PlanError, "fc/kernel.*duplicate"),
        ({"**": P(), "fc/kernel": P(P.UNCONSTRAINED)}, PlanError, "leaves an axis open|UNCONSTRAINED"),
        ({"**": P(), "fc": 3}, UsageError, r"sharding='3' at fc \(int\) is not a sharding"),
        ({}, UsageError, "empty"),
        ("hots", UsageError, "'hots'.*Accepted"),
    ],
    ids=["uncovered", "unmatched", "axis", "rank", "rank2", "twice", "open", "number", "empty", "word"],
)
def test_what_is_refused(source: Path, mesh: Any, given: Any, error: type[GraftaxError], words: str) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        gx.port(source, abstract(), rules=RULES, sharding=gx.on_mesh(mesh, given) if given else given)


def test_all_uneven_shapes_are_named_at_once(source: Path, mesh: Any) -> None:
    rows = jax.make_mesh((5,), ("r",), devices=jax.devices()[:5])
    with pytest.raises(PlanError, match=r"6 of 7 leaves") as caught:
        gx.port(source, abstract(), rules=RULES, sharding=gx.on_mesh(rows, {"temperature": P(), "**": P("r")}))
    first = str(caught.value.failures[0])
    assert "fc/kernel: float32[24,16] cannot be cut by PartitionSpec('r') on mesh axes r=5" in first
    assert "axis 0 has 24 rows, which 5 shards do not divide evenly" in first


def test_a_mesh_alone_needs_names_in_like(source: Path, mesh: Any) -> None:
    with pytest.raises(UsageError, match="no axis names"):
        gx.port(source, abstract(), rules=RULES, sharding=mesh)
    with pytest.raises(UsageError, match="rules do not fit the mesh"):
        gx.on_mesh(mesh, P("x"), {"x": "tensor"})
    with pytest.raises(UsageError, match=r"takes a jax\.sharding\.Mesh"):
        gx.on_mesh("mesh")


def test_torch_is_not_laid_out(mesh: Any) -> None:
    import torch

    net = torch.nn.Linear(4, 8)
    with pytest.raises(UsageError, match="torch tensors"):
        gx.port(net.state_dict(), net, sharding=NamedSharding(mesh, P()))
    with pytest.raises(UsageError, match="torch tensors"):
        gx.load_into(net, net.state_dict(), sharding=NamedSharding(mesh, P()))


# ---------------------------------------------------------------- as like


def test_like_with_shardings_is_followed(source: Path, whole: Any, mesh: Any) -> None:
    placed = shardings(mesh)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract(), placed
    )
    made = gx.port(source, like, rules=RULES)
    same(made, whole, placed)
    arrays = jax.tree.map(lambda s, w: jax.device_put(jnp.zeros_like(w), s), placed, whole)
    again = gx.port(source, arrays, rules=RULES)
    same(again, whole, placed)
    jax.tree.map(lambda a, b: a + b, again, arrays)  # they mix
    assert all(leaf.sharding.mesh is mesh for leaf in jax.tree.leaves(again))


def test_loaded_arrays_mix_with_those_of_like(mesh: Any) -> None:
    like = {
        "a": {"kernel": jax.device_put(jnp.eye(8), NamedSharding(mesh, P("data", None)))},
        "b": {"kernel": jax.device_put(jnp.eye(8), NamedSharding(mesh, P(None, "model")))},
    }
    given = {f"{name}.weight": np.arange(64, dtype=np.float32).reshape(8, 8) for name in "ab"}
    rules = ['{ torch = "*.weight", flax = "*/kernel", layout = "linear" }']
    made = gx.port(given, like, rules=rules)
    a, b, ours, theirs = made["a"]["kernel"], made["b"]["kernel"], like["a"]["kernel"], like["b"]["kernel"]
    for left, right, want in ((a, b, None), (a, theirs, a), (ours, b, b)):
        product = left @ right
        assert want is None or np.array_equal(product, want)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(16, name="up", kernel_init=init)(x)
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None))
        return nn.Dense(8, name="down", kernel_init=init)(x)


def block_source() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = {"up.weight": (16, 8), "up.bias": (16,), "down.weight": (8, 16), "down.bias": (8,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_linen_boxes_are_honoured(mesh: Any) -> None:
    given = block_source()
    like = gx.linen(Block(), jnp.zeros((2, 8)))
    rules = (("embed", "data"), ("mlp", "model"))
    made = gx.port(given, like, sharding=gx.on_mesh(mesh, rules=rules))
    assert isinstance(made["params"]["up"]["kernel"], nn.LogicallyPartitioned)
    bare = nn.unbox(made)["params"]
    assert bare["up"]["kernel"].sharding == NamedSharding(mesh, P("data", "model"))
    assert bare["down"]["kernel"].sharding == NamedSharding(mesh, P("model", None))
    assert bare["up"]["bias"].sharding == NamedSharding(mesh, P())
    assert np.array_equal(bare["up"]["kernel"], given["up.weight"].T)
    if mesh.axis_types == AUTO:  # Linen itself cannot be called under an explicit mesh with boxes
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            followed = nn.meta.unbox(gx.port(given, like))["params"]
        assert followed["up"]["kernel"].sharding == NamedSharding(mesh, P("data", "model"))
    # What Flax gives for the same boxes.
    boxes = jax.eval_shape(Block().init, jax.random.key(0), jnp.zeros((2, 8)))
    specs = nn.get_partition_spec(boxes)
    theirs: Any = nn.logical_to_mesh_sharding(specs, mesh, (*rules, ("model", "model")))  # pyright: ignore
    assert theirs["params"]["up"]["kernel"] == bare["up"]["kernel"].sharding
    assert nn.unbox(gx.port(given, like, sharding=theirs))["params"]["down"]["kernel"].sharding.spec == P("model", None)


def test_names_that_no_rule_knows_are_refused(mesh: Any) -> None:
    like = gx.linen(Block(), jnp.zeros((2, 8)))
    with pytest.raises(PlanError, match=r"params/up/kernel: axis embed is neither"):
        gx.port(block_source(), like, sharding=gx.on_mesh(mesh, rules={"mlp": "model"}))
    if mesh.axis_types == AUTO:
        with jax.set_mesh(mesh), pytest.raises(PlanError, match=r"axis embed, mlp is neither"):
            gx.port(block_source(), like)
    plain = gx.port(block_source(), like)  # no mesh anywhere: jax's default device, as ever
    assert nn.unbox(plain)["params"]["up"]["kernel"].sharding.device_set == {jax.devices()[0]}


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        self.up = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("model", None))
        self.down = nnx.Linear(16, 8, kernel_init=init, rngs=rngs)


def check_net(up: Any, down: Any, given: dict[str, Any], mesh: Any) -> None:
    assert up.sharding == NamedSharding(mesh, P("data", "model"))
    assert up.sharding.mesh == mesh
    assert down.sharding == NamedSharding(mesh, P("model", None))
    assert np.array_equal(up, given["up.weight"].T)
    assert np.array_equal(down, given["down.weight"].T)


def test_nnx_abstract_models_are_followed(mesh: Any) -> None:
    given = block_source()
    like = nnx.get_abstract_model(lambda: Net(nnx.Rngs(0)), mesh)
    state = gx.port(given, like)
    check_net(state["up"]["kernel"][...], state["down"]["kernel"][...], given, mesh)
    module = nnx.merge(like[0], state)
    check_net(module.up.kernel[...], module.down.kernel[...], given, mesh)
    with jax.set_mesh(mesh):
        net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
        made = gx.port(given, net)
    check_net(made.up.kernel[...], made.down.kernel[...], given, mesh)
    made = gx.port(given, net, sharding=mesh)
    check_net(made.up.kernel[...], made.down.kernel[...], given, mesh)


def test_an_abstract_mesh_needs_a_real_one() -> None:
    explicit = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(explicit):
        net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert type(net.up.kernel.sharding.mesh).__name__ == "AbstractMesh"
    made = gx.port(block_source(), net, sharding=explicit)
    assert made.up.kernel[...].sharding == NamedSharding(explicit, P("data", "model"))
    with pytest.raises(PlanError, match="no mesh is given"):
        gx.port(block_source(), net)
    other = jax.make_mesh((2, 4), ("data", "model"))
    with jax.set_mesh(other), pytest.raises(PlanError, match="another mesh"):
        gx.port(block_source(), net)


def test_nnx_logical_rules(mesh: Any) -> None:
    class Logical(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
            self.fc = nnx.Linear(8, 16, use_bias=False, kernel_init=init, rngs=rngs)

    rules = (("embed", "data"), ("mlp", "model"))
    given = {"fc.weight": np.arange(128, dtype=np.float32).reshape(16, 8)}
    with nnx.logical_axis_rules(rules):
        like = nnx.get_abstract_model(lambda: Logical(nnx.Rngs(0)), mesh)
    state = gx.port(given, like)
    assert state["fc"]["kernel"][...].sharding == NamedSharding(mesh, P("data", "model"))
    with nnx.use_eager_sharding(False):
        bare = nnx.eval_shape(lambda: Logical(nnx.Rngs(0)))
        made = gx.port(given, bare, sharding=gx.on_mesh(mesh, rules=rules))
        with pytest.raises(PlanError, match="axis embed, mlp is neither"):
            gx.port(given, bare, sharding=mesh)
    assert made.fc.kernel[...].sharding == NamedSharding(mesh, P("data", "model"))
    assert np.array_equal(made.fc.kernel[...], given["fc.weight"].T)


def test_stacked_nnx_layers(mesh: Any) -> None:
    class Layers(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            @nnx.split_rngs(splits=4)
            @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "data"})
            def make(rngs: nnx.Rngs) -> nnx.Linear:
                init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
                return nnx.Linear(8, 6, use_bias=False, kernel_init=init, rngs=rngs)

            self.layers = make(rngs)

    given = {f"layers.{i}.weight": np.random.default_rng(i).random((6, 8), np.float32) for i in range(4)}
    with nnx.use_eager_sharding(False):
        like = nnx.eval_shape(lambda: Layers(nnx.Rngs(0)))
    made = gx.port(given, like, sharding=mesh)
    kernel = made.layers.kernel[...]
    assert kernel.sharding == NamedSharding(mesh, P("data", None, "model"))
    assert np.array_equal(kernel, np.stack([w.T for w in given.values()]))


def test_load_into_keeps_where_a_module_lies(mesh: Any, tmp_path: Path) -> None:
    given = block_source()
    save_file(given, tmp_path / "m.safetensors")
    with jax.set_mesh(mesh):
        net = Net(nnx.Rngs(0))
    old = net.up.kernel[...]
    receipt = Receipt()
    assert gx.load_into(net, tmp_path / "m.safetensors", receipt=receipt) is net
    check_net(net.up.kernel[...], net.down.kernel[...], given, mesh)
    assert receipt.bytes_needed == receipt.bytes_read == 4 * (128 + 16 + 128 + 8)
    assert (net.up.kernel[...] + old).sharding == old.sharding
    other = NamedSharding(mesh, P(None, "data"))
    gx.load_into(net, given, sharding={"**/kernel": other, "**/bias": NamedSharding(mesh, P())})
    assert net.up.kernel[...].sharding == other
    with pytest.raises(PlanError, match="cannot be cut"):
        gx.load_into(net, given, sharding=NamedSharding(jax.make_mesh((3,), ("x",), devices=jax.devices()[:3]), P("x")))
    assert net.up.kernel[...].sharding == other


# ---------------------------------------------------------------- kinds of leaves


def test_casts_fills_and_kept_leaves(mesh: Any) -> None:
    given = {"fc.weight": np.linspace(-1, 1, 128, dtype=np.float32).reshape(16, 8)}
    placed = NamedSharding(mesh, P("data", "model"))
    table = jax.device_put(jnp.arange(32.0).reshape(8, 4), placed)
    like = {
        "fc": {"kernel": jax.device_put(jnp.zeros((8, 16), jnp.bfloat16), placed)},
        "table": {"extra": table},
    }
    receipt = Receipt()
    made = gx.port(given, like, dtype="like", missing="keep", receipt=receipt)
    assert made["fc"]["kernel"].sharding == made["table"]["extra"].sharding == placed
    assert np.array_equal(made["fc"]["kernel"], given["fc.weight"].T.astype(ml_dtypes.bfloat16))
    assert np.array_equal(made["table"]["extra"], table)
    pointers = [{s.data.unsafe_buffer_pointer() for s in a.addressable_shards} for a in (table, made["table"]["extra"])]
    assert not pointers[0] & pointers[1]  # memory of its own
    assert receipt.casts.total == 128
    made = gx.port(given, like, dtype="float16", missing="zeros")
    assert made["fc"]["kernel"].dtype == jnp.float16
    assert not np.asarray(made["table"]["extra"]).any()
    assert made["table"]["extra"].sharding == placed


def test_wide_dtypes_need_x64(mesh: Any) -> None:
    given = {"m/w": np.linspace(0, 1, 8), "m/n": np.arange(8, dtype=np.int64)}
    like = {name: jax.ShapeDtypeStruct((8,), array.dtype) for name, array in given.items()}
    spread = NamedSharding(mesh, P("data"))
    with pytest.raises(PlanError, match=r"m/w: jax cannot hold float64 without jax_enable_x64"):
        gx.port(given, like, sharding=spread)
    made = gx.port(given, like, sharding={"m/w": "host", "m/n": "host"})
    assert made["m/w"].dtype == np.float64
    with jax.enable_x64(True):
        made = gx.port(given, like, sharding=spread)
        assert made["m/w"].sharding == spread
        assert made["m/w"].dtype == np.float64
        assert np.array_equal(made["m/w"], given["m/w"])
        assert np.array_equal(made["m/n"], given["m/n"])


def test_packed_leaves(mesh: Any) -> None:
    codes = np.arange(64, dtype=np.int8).reshape(8, 8) % 15 - 7
    like = {"m/w": jax.ShapeDtypeStruct((8, 8), jnp.int4, sharding=NamedSharding(mesh, P("data", "model")))}
    made = gx.port({"m/w": codes.astype(ml_dtypes.int4)}, like)
    assert made["m/w"].dtype == jnp.int4
    assert made["m/w"].sharding.spec == P("data", "model")
    assert np.array_equal(np.asarray(made["m/w"]).astype(np.int8), codes)


def test_host_memory_can_be_asked_for(source: Path, whole: Any, mesh: Any) -> None:
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    for kind in sorted(kinds):
        placed = jax.tree.map(lambda spec, kind=kind: NamedSharding(mesh, spec, memory_kind=kind), SPECS)
        same(gx.port(source, abstract(), rules=RULES, sharding=placed), whole, placed)


# ---------------------------------------------------------------- what is read


def test_bytes_read_are_those_needed(tmp_path: Path, mesh: Any) -> None:
    rng = np.random.default_rng(0)
    given = {f"l{i}.weight": rng.random((512, 768), np.float32) for i in range(3)}
    save_file(given, tmp_path / "m.safetensors")
    total = sum(array.nbytes for array in given.values())
    like = {f"l{i}": {"kernel": jax.ShapeDtypeStruct((768, 512), "float32")} for i in range(3)}
    for spec in (P("data", "model"), P("model", "data"), P(), P(None, "data"), P("data")):
        receipt = Receipt()
        made = gx.port(tmp_path / "m.safetensors", like, sharding=gx.on_mesh(mesh, spec), receipt=receipt)
        assert np.array_equal(made["l1"]["kernel"], given["l1.weight"].T)
        assert receipt.bytes_read == receipt.bytes_needed == total, spec
        assert not receipt.over_read
    assert f"read: {total:,} bytes" in receipt.text
    assert receipt.as_json()["bytes_read"] == total


@pytest.mark.parametrize("workers", [2, 5])
def test_threads_make_what_one_makes(source: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves in like's order, what was measured, counted and read; and the first error."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    opened = gx.open_checkpoint(source)

    def port(given: Any, count: int) -> tuple[Any, Receipt]:
        monkeypatch.setattr(device_placement, "workers_for", lambda sizes: count)
        receipt = Receipt()
        ruled = RULES.replace('layout = "linear" },', 'layout = "linear", scale = 0.3 },', 1)
        return gx.port(
            given, abstract(), rules=ruled, dtype="bfloat16", sharding=gx.on_mesh(mesh, SPECS), receipt=receipt
        ), receipt

    for given in (opened, replace(opened, storage=replace(opened.storage, span=None))):
        (one, counted), (several, found) = port(given, 1), port(given, workers)
        same(several, one)
        assert list(several) == list(one)
        assert found == counted
        assert found.casts.total
        assert not found.lossless

    def broken(name: str) -> Any:
        if name in ("layers.2.w.weight", "qkv.weight"):
            raise StorageError(f"{name} is gone")
        return opened.read(name)

    texts = []
    for count in (1, workers):
        with pytest.raises(StorageError) as error:
            port(replace(opened, storage=replace(opened.storage, span=None, reader=broken)), count)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_what_several_boxes_take_is_needed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are repeated, in a process that holds one part of the inputs."""
    array = np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096)
    save_file({"k.weight": array}, tmp_path / "m.safetensors")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("r", "c"))
    inner = streamed.sharding_boxes
    mine = {box for box in inner((4096, 8, 32), NamedSharding(mesh, P("c", "r"))) if box[0][0] == 0}
    monkeypatch.setattr(streamed, "sharding_boxes", lambda *a: {b: d for b, d in inner(*a).items() if b in mine})
    monkeypatch.setattr(streamed, "assemble", lambda shape, sharding, parts, dtype: jnp.zeros(shape))
    receipt = Receipt()
    rule = {"torch": "k.weight", "flax": "k/kernel", "ops": "(h d) i -> i h d", "repeat": {"h": 4}}
    like = {"k": {"kernel": jax.ShapeDtypeStruct((4096, 8, 32), "float32")}}
    sharding = {"k": {"kernel": NamedSharding(mesh, P("c", "r"))}}
    gx.port(tmp_path / "m.safetensors", like, rules=[rule], sharding=sharding, receipt=receipt)
    assert receipt.bytes_needed == array.nbytes // 4
    assert (receipt.bytes_read > 2 * receipt.bytes_needed) == bool(receipt.over_read)


def test_a_sharded_folder_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    given = {f"l{i}.weight": rng.random((512, 768), np.float32) for i in range(3)}
    gx.port_file(given, given, tmp_path / "m", to="torch", shard_size="2MB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    rows: list[bool] = []
    inner = sharded.fill_by_rows
    monkeypatch.setattr(sharded, "fill_by_rows", lambda *a: (rows.append(inner(*a)), rows[-1])[1])
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    like = {f"l{i}": {"kernel": jax.ShapeDtypeStruct((768, 512), "float32")} for i in range(3)}
    receipt = Receipt()
    made = gx.port(tmp_path / "m", like, sharding=gx.on_mesh(mesh, P("data", "model")), receipt=receipt)
    assert rows == [True] * 3
    for i in range(3):
        assert np.array_equal(made[f"l{i}"]["kernel"], given[f"l{i}.weight"].T)
    assert receipt.bytes_read == receipt.bytes_needed == 3 * 512 * 768 * 4


def test_tensors_that_are_held_whole_are_held_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {f"l{i}.weight": np.full((64, 48), i, np.float32) for i in range(6)}
    np.savez_compressed(tmp_path / "m.npz", **given)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(device_placement, "workers_for", lambda sizes: 4)
    opened: list[int] = []
    inner = reading.Reader.opened
    monkeypatch.setattr(
        reading.Reader, "opened", lambda self, entry: (opened.append(threading.get_ident()), inner(self, entry))[1]
    )
    mesh = Mesh(np.array(jax.devices()), ("a",))
    like = {f"l{i}": {"kernel": jax.ShapeDtypeStruct((48, 64), "float32")} for i in range(6)}
    made = gx.port(tmp_path / "m.npz", like, sharding=gx.on_mesh(mesh, P("a")))
    assert all(np.array_equal(made[f"l{i}"]["kernel"], given[f"l{i}.weight"].T) for i in range(6))
    assert len(opened) == 6
    assert len(set(opened)) == 1


def test_over_read_is_reported_with_its_reason(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((512, 768), np.float32)
    save_file({"l.weight": array}, tmp_path / "m.safetensors")
    file = gx.open_checkpoint(tmp_path / "m.safetensors")
    like = {"l": {"kernel": jax.ShapeDtypeStruct((768, 512), "float32")}}
    specs = {"l/kernel": P(("data", "model"))}
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    # As the first of four processes sees it: with two of the eight devices.
    inner = streamed.sharding_boxes
    receipts: list[Receipt] = []
    for given in (file, replace(file, storage=replace(file.storage, span=None))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streamed, "sharding_boxes", lambda *a: dict(list(inner(*a).items())[:2]))
            patch.setattr(streamed, "assemble", lambda shape, sharding, parts, dtype: jnp.zeros(shape))
            receipts.append(Receipt())
            gx.port(given, like, sharding=gx.on_mesh(mesh, specs), receipt=receipts[-1])
    for receipt in receipts:
        assert receipt.bytes_needed == array.nbytes // 4
        assert receipt.bytes_needed * 3 < receipt.bytes_read <= array.nbytes
    assert "runs of 384 bytes" in receipts[0].over_read["l/kernel"]
    assert "cannot be read by position" in receipts[1].over_read["l/kernel"]
    assert "l/kernel: " in receipts[0].text


def test_warnings_are_errors_nowhere(source: Path, mesh: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gx.port(source, abstract(), rules=RULES, sharding=gx.on_mesh(mesh, SPECS))
