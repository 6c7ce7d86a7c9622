"""Run by test_sharded.py in a process of its own, with eight host devices: prints what it compared."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent.parent))
from execute import chains
from graftax.errors import PlanError
from graftax.execute import gather, sharded
from graftax.execute.memory import allocate
from graftax.execute.meter import evaluate
from graftax.execute.pushdown import NotLocal
from graftax.ops import apply_chain
from graftax.tree import TensorSpec

MESHES = [
    Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")),
    Mesh(np.array(jax.devices()), ("a",)),
    Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("b", "a")),
]


def a_sharding(rng: random.Random, shape: tuple[int, ...]) -> Any:
    mesh = rng.choice(MESHES)
    names: list[Any] = list(mesh.axis_names)
    parts: list[Any] = [None] * len(shape)
    for axis in rng.sample(range(len(shape)), len(shape)):
        fits = [name for name in names if shape[axis] % mesh.shape[name] == 0]
        if fits and rng.random() < 0.8:
            parts[axis] = rng.choice(fits)
            names.remove(parts[axis])
    return NamedSharding(mesh, P(*parts))


def stored(array: np.ndarray[Any, Any]) -> gather.Stored:
    raw = array.reshape(-1).view(np.uint8)

    def read(start: int, buffer: memoryview) -> None:
        buffer[:] = raw[start : start + len(buffer)].data

    return gather.Stored(TensorSpec(array.shape, "float32"), read)


def main(seed: int, count: int) -> None:
    rng = random.Random(seed)
    compared = cut = 0
    scratch = allocate(1 << 20)
    sharded.LONG_RUN = 64  # the tensors are small: some are read tile by tile for all shards, some are not
    for _ in range(count):
        given = chains.sources(rng)
        specs = tuple(TensorSpec(a.shape, "float32") for a in given)
        ops, _ = chains.chain(rng, specs)
        ops, made = chains.bound(ops, given)
        try:
            whole = apply_chain(ops, given)
        except PlanError:
            continue
        target = rng.randrange(len(made))
        spec = made[target]
        if spec.dtype != "float32":
            continue
        sharding = a_sharding(rng, spec.shape)
        boxes = list(sharded.sharding_boxes(spec.shape, sharding))
        try:
            parts = sharded.fill_boxes(ops, specs, target, spec, boxes, [stored(a) for a in given], scratch, evaluate)
        except NotLocal:
            continue
        array = sharded.assemble(spec.shape, sharding, parts)
        assert array.sharding == sharding
        assert np.array_equal(np.asarray(array), whole[target]), (ops, spec, sharding)
        compared += 1
        cut += len(boxes) > 1
    print(f"compared {compared} cut {cut}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
