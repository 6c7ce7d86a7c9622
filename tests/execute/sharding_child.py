"""Run by test_sharding_processes.py as one of several processes: loads one checkpoint into shards together with the
others, and says as JSON what came of it. What `--injure` says happens in process `--victim`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import graftax as gx
from graftax.errors import FormatError, GraftaxError
from graftax.execute.streamed import Stream
from graftax.types import Receipt

WIDTH, HEADS, LAYERS = 32, 4, 3
RULES: list[dict[str, Any]] = [
    {
        "torch": "layers.{i}.qkv.weight",
        "flax": ["l{i}/q/kernel", "l{i}/k/kernel", "l{i}/v/kernel"],
        "heads": HEADS,
        "fused": "block",
    },
    {"torch": "layers.{i}.fc.weight", "flax": "fc/kernel", "layout": "linear", "stack": {"i": 0}},
    {"torch": "layers.{i}.norm.weight", "flax": "l{i}/norm/scale"},
    {"torch": "tied.weight", "flax": "tied/kernel", "layout": "linear"},
]


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    out = {"tied.weight": rng.standard_normal((8, WIDTH), np.float32)}
    for i in range(LAYERS + 1):
        out[f"layers.{i}.qkv.weight"] = rng.standard_normal((3 * WIDTH, WIDTH), np.float32)
        out[f"layers.{i}.fc.weight"] = rng.standard_normal((4 * WIDTH, WIDTH), np.float32)
        out[f"layers.{i}.norm.weight"] = rng.standard_normal(WIDTH, np.float32)
    return out


def like() -> dict[str, Any]:
    def leaf(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, "float32")

    layer = {name: {"kernel": leaf(WIDTH, HEADS, WIDTH // HEADS)} for name in "qkv"} | {"norm": {"scale": leaf(WIDTH)}}
    out: dict[str, Any] = {f"l{i}": layer for i in range(LAYERS + 1)}
    return out | {"fc": {"kernel": leaf(LAYERS + 1, WIDTH, 4 * WIDTH)}, "tied": {"kernel": leaf(WIDTH, 8)}}


SPECS = {"**": P(), "**/q/kernel": P("data", "model"), "**/k/kernel": P(None, "model", "data")}
SPECS |= {"**/v/kernel": P("model"), "fc/kernel": P("model", "data"), "tied/kernel": P(None, "data")}


def digests(tree: Any) -> dict[str, str]:
    """leaf, and where a shard lies in it -> the digest of its bytes."""
    out: dict[str, str] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(str(key.key) for key in path)
        for shard in array.addressable_shards:
            where = [index.indices(n)[:2] for index, n in zip(shard.index, array.shape, strict=True)]
            out[f"{name} {where}"] = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
    return out


def strike(kind: str) -> None:
    """From the third leaf on, what is loaded here fails or ends the process."""
    inner, count = Stream.sharded, 0

    def sharded(self: Stream, target: str, sharding: Any, reader: Any = None) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            print(json.dumps({"struck": time.time()}), flush=True)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "bug":
                raise ZeroDivisionError("in the user's own code")
            raise FormatError("the tensor is torn")
        return inner(self, target, sharding, reader)

    Stream.sharded = sharded


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "data"))
        self.tied = nnx.Linear(WIDTH, 8, use_bias=False, kernel_init=init, rngs=rngs)
        self.table = nnx.Param(jax.numpy.arange(64.0).reshape(8, 8), out_sharding=("data", None))


def load(args: argparse.Namespace, mesh: Any) -> Any:
    """What the case loads, as a tree of jax arrays; the receipt."""
    source, receipt = args.folder / "model.safetensors", Receipt()
    mine = args.index == args.victim
    if args.case == "module":  # in place, one leaf kept where it lies, on all processes
        with jax.set_mesh(mesh):
            net = nnx.jit(lambda: Net(nnx.Rngs(0)))()
        given = {"tied.weight": gx.open_checkpoint(source).read("tied.weight")}
        old = net.table[...]
        gx.load_into(net, given, missing="keep", receipt=receipt)
        assert net.table[...] is not old
        return {"tied": {"kernel": net.tied.kernel[...]}, "table": net.table[...]}, receipt
    rules, specs = RULES, SPECS
    if args.injure == "plan" and mine:
        rules = [RULES[0] | {"heads": 5}, *RULES[1:]]
    if args.injure == "differ" and mine:
        specs = SPECS | {"tied/kernel": P()}
    if args.injure == "file" and mine:
        source = args.folder / "torn.safetensors"
    if args.injure in ("bytes", "kill", "bug") and mine:
        strike(args.injure)
    return gx.port(source, like(), rules=rules, sharding=gx.on_mesh(mesh, specs), receipt=receipt), receipt


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("index", "count", "port", "devices"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--case", default="tree")
    parser.add_argument("--injure", default="")
    parser.add_argument("--victim", type=int, default=-1)
    args = parser.parse_args()
    if args.case == "write":
        save_file(tensors(), args.folder / "model.safetensors", {"format": "pt"})
        return
    jax.config.update("jax_num_cpu_devices", args.devices)
    if args.count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.count,
            args.index,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"127.0.0.1:{args.port}",
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=10,
        )
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "model"))
    said: dict[str, Any] = {"ready": time.time()}
    try:
        made, receipt = load(args, mesh)
        said |= {"digests": digests(made), "read": receipt.bytes_read, "needed": receipt.bytes_needed}
        said |= {"over": receipt.over_read}
    except GraftaxError as error:
        said |= {"error": str(error), "kind": type(error).__name__, "at": time.time()}
    except ZeroDivisionError as error:
        said |= {"error": str(error), "kind": type(error).__name__, "at": time.time()}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
