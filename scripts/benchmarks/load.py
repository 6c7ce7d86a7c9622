"""A file into jax, every kernel transposed: graftax, jax.device_put of a map, and the script that people write.

All in this process, one after the other, what was made freed in between; the file is in the page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks import checkpoints
from benchmarks.measuring import Contender, Group, Sample, measure
from benchmarks.settings import Settings

BASELINE = "device_put(memmap.T)"
SMOKE_SCALE = 0.002
EVERY = 0.005  # seconds between looks at the memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace, settings: Settings) -> list[Group]:
    import jax

    import graftax as gx

    jax.device_put(np.zeros(4)).block_until_ready()  # starts it
    groups: list[Group] = []
    for name in ("gpt2", "llama"):
        made = checkpoints.make(name, settings.folder, settings.scale * (SMOKE_SCALE if settings.smoke else 1))
        plan = gx.plan(made.source, made.like)
        contenders = [
            _contender("graftax", lambda made=made: checkpoints.flat(gx.port(made.source, made.like)), made, True),
            _contender("graftax, planned", lambda p=plan, m=made: checkpoints.flat(p.run(m.source)), made, True),
            _contender(BASELINE, lambda made=made: _mapped(made), made, True),
            _contender("safetensors, .T, asarray", lambda made=made: _naive(made), made),
        ]
        title = f"Into jax: {made.title}"
        groups.append(
            measure(title, contenders, BASELINE, settings.repeats, settings.seed, made.nbytes, True, settings.say)
        )
    return groups


def _contender(
    name: str, load: Callable[[], dict[str, Any]], made: checkpoints.Made, required: bool = False
) -> Contender:
    import jax

    def run() -> Sample:
        gc.collect()
        _give_back()
        truth = checkpoints.read(made.truth)
        before = _anonymous()
        with _peak() as peak:
            start = time.perf_counter()
            found = jax.block_until_ready(load())
            seconds = time.perf_counter() - start
        checked = checkpoints.check({path: np.asarray(leaf) for path, leaf in found.items()}, truth)
        return Sample(seconds, anonymous=peak[0], before=before, checked=checked)

    return Contender(name, run, required)


# ---------------------------------------------------------------- contenders


def _mapped(made: checkpoints.Made) -> dict[str, Any]:
    import jax

    with made.source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(made.source, np.uint8, "r", 8 + length)
    out: dict[str, Any] = {}
    for leaf in made.leaves:
        if leaf.flax:
            begin, end = header[leaf.torch]["data_offsets"]
            array = data[begin:end].view(_dtype(leaf)).reshape(leaf.shape)
            out[leaf.flax] = jax.device_put(array if leaf.axes is None else array.transpose(leaf.axes))
    return out


def _naive(made: checkpoints.Made) -> dict[str, Any]:
    import jax.numpy as jnp
    from safetensors import safe_open

    out: dict[str, Any] = {}
    with safe_open(made.source, "np") as file:
        for leaf in made.leaves:
            if leaf.flax:
                array = file.get_tensor(leaf.torch)
                out[leaf.flax] = jnp.asarray(array if leaf.axes is None else array.transpose(leaf.axes))
    return out


def _dtype(leaf: checkpoints.Leaf) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if leaf.dtype == "BF16" else np.dtype(checkpoints.DTYPE_NAMES[leaf.dtype])


# ---------------------------------------------------------------- memory


def _give_back() -> None:
    """What malloc keeps of what was freed would be memory that the next one need not touch first."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _anonymous() -> int | None:
    """Bytes of this process that no file backs; None where the system does not say."""
    try:
        with open("/proc/self/status", "rb") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(b"RssAnon")), None)
    except OSError:
        return None


@contextmanager
def _peak() -> Iterator[list[int | None]]:
    """The most of `_anonymous` that was seen until the end of the block."""
    found = [_anonymous()]
    over = threading.Event()

    def watch() -> None:
        while found[0] is not None and not over.wait(EVERY):
            found[0] = max(found[0], _anonymous() or 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        if found[0] is not None:
            found[0] = max(found[0], _anonymous() or 0)
