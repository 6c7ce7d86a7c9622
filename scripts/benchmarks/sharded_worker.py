"""One of the processes of `bench.py sharded`: joins the others, loads its shards, says what it took, compares them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import memory
from benchmarks.sharded import HEAD


def main() -> None:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh

    contender, job = sys.argv[1], json.loads(sys.argv[2])
    jax.config.update("jax_num_cpu_devices", job["devices"])
    if job["count"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{job['port']}",
            job["count"],
            job["index"],
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"127.0.0.1:{job['port']}",
            heartbeat_timeout_seconds=60,
            shutdown_timeout_seconds=60,
        )
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    load = (_ours if contender == "ours" else _theirs)(job["path"], mesh)
    multihost_utils.sync_global_devices("ready")
    before = _forget_peak()
    start = time.perf_counter()
    made, more = load()
    jax.block_until_ready(made)
    seconds = time.perf_counter() - start
    peak = memory().get("VmHWM") if before else None
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): a for path, a in _leaves(made)}
    own = sum(shard.data.nbytes for array in flat.values() for shard in array.addressable_shards)
    multihost_utils.sync_global_devices("loaded")
    checked, wrong = _compared(job["path"], flat)
    told = {"seconds": seconds, "before": before, "peak": peak, "own": own, "checked": checked, "wrong": wrong, **more}
    print(json.dumps(told), flush=True)


def _leaves(tree: Any) -> Any:
    import jax

    return jax.tree_util.tree_leaves_with_path(tree)


def _forget_peak() -> int | None:
    """What is resident, from here on the peak; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory().get("VmRSS")


def _specs(name: str) -> tuple[Any, Any]:
    """How a torch tensor is cut, and the Flax leaf that it becomes: the same values on the same devices."""
    from jax.sharding import PartitionSpec as P

    if name.endswith("norm.weight"):
        return P("model"), P("model")
    if name.startswith("embed"):
        return P("model", "data"), P("model", "data")
    return P("model", "data"), P("data", "model")


def _flax_name(name: str) -> str:
    stem = name.removesuffix(".weight").replace(".", "/")
    return f"{stem}/{'embedding' if 'embed' in stem else 'scale' if 'norm' in stem else 'kernel'}"


def _has_heads(name: str) -> bool:
    return name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")


def _ours(path: str, mesh: Any) -> Any:
    import jax

    import graftax as gx
    from graftax import api  # noqa: F401
    from graftax.tree import nest
    from graftax.types import Receipt

    like: dict[str, Any] = {}
    specs: dict[str, Any] = {}
    for name, spec in gx.open_checkpoint(path).items():
        shape = spec.shape[::-1] if len(spec.shape) == 2 and not name.startswith("embed") else spec.shape
        if _has_heads(name):
            shape = (shape[0], shape[1] // HEAD, HEAD)
        like[_flax_name(name)] = jax.ShapeDtypeStruct(shape, "bfloat16")
        specs[_flax_name(name)] = _specs(name)[1]

    def load() -> Any:
        receipt = Receipt()
        made = gx.port(path, nest(like), sharding=gx.on_mesh(mesh, specs), receipt=receipt)
        return made, {"read": receipt.bytes_read, "needed": receipt.bytes_needed, "over": len(receipt.over_read)}

    return load


def _theirs(path: str, mesh: Any) -> Any:
    import jax
    import orbax.checkpoint.experimental.v1 as ocp
    from jax.sharding import NamedSharding

    import graftax as gx

    like = {
        name: jax.ShapeDtypeStruct(spec.shape, "bfloat16", sharding=NamedSharding(mesh, _specs(name)[0]))
        for name, spec in gx.open_checkpoint(path).items()
    }

    def load() -> Any:
        with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
            return ocp.load(path, like), {}

    return load


def _compared(path: str, flat: dict[str, Any]) -> tuple[int, str]:
    """(values compared, the first leaf that differs): every shard against what NumPy cuts from the file."""
    import numpy as np
    from safetensors import safe_open

    checked = 0
    with safe_open(path, "flax") as file:
        for name in file.keys():  # noqa: SIM118
            array = flat.get(_flax_name(name))
            given = np.asarray(file.get_tensor(name)).view(np.uint16)
            if array is None:
                array, want = flat[name], given
            else:
                want = given.T if given.ndim == 2 and not name.startswith("embed") else given
                want = want.reshape(array.shape)
            for shard in array.addressable_shards:
                if not np.array_equal(np.asarray(shard.data).view(np.uint16), want[shard.index]):
                    return checked, f"{name} differs at {shard.index}"
                checked += shard.data.size
    return checked, ""


if __name__ == "__main__":
    main()
