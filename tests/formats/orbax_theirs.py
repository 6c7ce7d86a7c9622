"""Makes checkpoints as users of Orbax do, on eight devices, in the folder that is named: `test_orbax` runs it in a
process of its own. expected.npz holds the values of each, as `NAME:path`."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from graftax.tree import flatten, join_path

root = sys.argv[1]
expected = {}


def note(name, tree):
    for keys, leaf in flatten(tree):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        value = np.asarray(leaf)  # npz has no bfloat16
        expected[f"{name}:{join_path(keys)}"] = value.view("V2") if value.dtype == jnp.bfloat16 else value


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(11)])
        self.bn = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


mesh = Mesh(np.array(jax.devices()), ("x",))
sharded = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("x")))
halves = jax.device_put(jnp.arange(8, dtype=jnp.bfloat16), NamedSharding(mesh, PartitionSpec("x")))
replicated = jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec()))
mixed = {"a": {"b": sharded, "c": np.arange(2, dtype=np.int64) + 2**40, "h": halves}, "r": replicated}
variables = linen.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
state = nnx.state(Model(nnx.Rngs(0)))
pure = nnx.to_pure_dict(state)

standard = ocp.StandardCheckpointer()
lists = {"l": [jnp.ones(1), (jnp.zeros(2),)], "step": 3, "rate": 2.5}
for name, tree in {"linen": variables, "nnx_state": state, "nnx_pure": pure, "sharded": mixed, "lists": lists}.items():
    standard.save(f"{root}/{name}", tree)
    standard.wait_until_finished()
note("linen", variables)
note("nnx_state", pure)
note("nnx_pure", pure)
note("sharded", mixed)
note("lists", lists)
odd = {"a": {"b": sharded}, "none": None, "empty": {}, "text": "hello"}
ocp.PyTreeCheckpointer().save(f"{root}/pytree", odd)
ocp.PyTreeCheckpointer(use_ocdbt=False).save(f"{root}/folders", odd)
ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)).save(f"{root}/zarr3", args=ocp.args.PyTreeSave(mixed))
for name in ("pytree", "folders"):
    note(name, {"a": {"b": sharded}})
note("zarr3", mixed)
boxed = {"params": {"w": nnx.Param(jnp.ones(2)), "v": nnx.Param(jnp.zeros(3))}}
standard.save(f"{root}/boxed", boxed)
standard.wait_until_finished()
note("boxed", {"params": {"w": np.ones(2, np.float32), "v": np.zeros(3, np.float32)}})

with ocp.CheckpointManager(f"{root}/one_step") as manager:
    manager.save(7, args=ocp.args.StandardSave(variables))
with ocp.CheckpointManager(f"{root}/steps") as manager:
    for step in (9, 10):
        manager.save(step, args=ocp.args.StandardSave(variables))
options = ocp.CheckpointManagerOptions(step_prefix="run", step_format_fixed_length=5)
with ocp.CheckpointManager(f"{root}/prefixed", options=options) as manager:
    manager.save(7, args=ocp.args.StandardSave(variables))
with ocp.CheckpointManager(f"{root}/items", item_names=("params", "opt_state", "meta")) as manager:
    tree = ocp.args.StandardSave(variables)
    moments = ocp.args.StandardSave({"mu": np.ones(2)})
    manager.save(3, args=ocp.args.Composite(params=tree, opt_state=moments, meta=ocp.args.JsonSave({"a": 1})))
with ocp.CheckpointManager(f"{root}/two_items", item_names=("encoder", "decoder")) as manager:
    manager.save(3, args=ocp.args.Composite(encoder=tree, decoder=tree))
for name in ("one_step", "prefixed", "items"):
    note(name, variables)
np.savez(f"{root}/expected.npz", **expected)
