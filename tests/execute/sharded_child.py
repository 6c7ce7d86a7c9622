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
from graftax.execute import fill_tile, sharded
from graftax.execute.loop_nests import NotLocal
from graftax.execute.memory import allocate
from graftax.execute.meter import evaluate
from graftax.execute.pushdown import push
from graftax.ops import apply_chain
from graftax.ops.checked_ops import Repeat
from graftax.tree import TensorSpec

MESHES = [
    Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")),
    Mesh(np.array(jax.devices()), ("a",)),
    Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("b", "a")),
    Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c")),
]
MESHES_A_CHAIN = 3


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


def stored(array: np.ndarray[Any, Any], read_bytes: list[int], apart: bool) -> fill_tile.Stored:
    raw = array.reshape(-1).view(np.uint8)

    def read(start: int, buffer: memoryview) -> None:
        buffer[:] = raw[start : start + len(buffer)].data
        read_bytes[0] += len(buffer)

    def scatter(start: int, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            read(start, buffer)
            start += len(buffer)

    return fill_tile.Stored(TensorSpec(array.shape, "float32"), read, scatter if apart else None)


def main(seed: int, count: int) -> None:
    rng = random.Random(seed)
    chained = compared = cut = part = rows = 0
    fill_by_rows = sharded.fill_by_rows

    def counted(wanted: Any, *rest: Any) -> bool:
        nonlocal rows
        wanted = list(wanted)
        done = fill_by_rows(wanted, *rest)
        rows += done and len(wanted) > 1
        return done

    sharded.fill_by_rows = counted
    for number in range(count):
        given = chains.sources(rng)
        specs = tuple(TensorSpec(a.shape, "float32") for a in given)
        ops, _ = chains.chain(rng, specs)
        ops, made = chains.bound(ops, given)
        try:
            whole = apply_chain(ops, given)
        except PlanError:
            continue
        chained += 1
        # The tensors are small: with these some are read run by run, some in windows, some in several windows.
        fill_tile.SHORT = sharded.SHORT = rng.choice([8, 64, 128 << 10])
        fill_tile._SKIPPED = rng.choice([8, 64, 16 << 10])
        scratch = allocate(sharded.SHORT + rng.choice([256, 4096, 1 << 20]))
        for _ in range(MESHES_A_CHAIN):
            target = rng.randrange(len(made))
            spec = made[target]
            sharding = a_sharding(rng, spec.shape)
            boxes = list(sharded.sharding_boxes(spec.shape, sharding))
            mine = rng.sample(boxes, rng.randrange(1, len(boxes) + 1))  # what one of several processes holds
            read = [0]
            apart = rng.random() < 0.5
            sources = [stored(a, read, apart) for a in given]
            try:
                pieces = {box: push(ops, specs, target, box) for box in mine}
                parts, needed = sharded.fill_boxes(ops, specs, target, spec, pieces, sources, scratch, evaluate)
            except NotLocal:
                continue
            for box in mine:
                want = whole[target][tuple(slice(*edge) for edge in box)]
                assert np.array_equal(parts[box], want), (ops, spec, sharding, box)
                assert parts[box].dtype == want.dtype
            repeats = any(isinstance(op, Repeat) for op in ops)  # a row that two shards take counts twice
            assert repeats or read[0] >= needed, (ops, spec, sharding, read, needed)
            if len(mine) == len(boxes) and number % 50 == 0 and spec.dtype == "float32":
                array = sharded.assemble(spec.shape, sharding, parts, np.float32)
                assert array.sharding == sharding
                assert np.array_equal(np.asarray(array), whole[target])
            compared += 1
            cut += len(boxes) > 1
            part += len(mine) < len(boxes)
    print(f"chains {chained} compared {compared} cut {cut} part {part} rows {rows}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
