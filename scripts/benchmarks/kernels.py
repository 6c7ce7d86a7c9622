"""Copies that turn tensors around, against memcpy of the same bytes, and convolution kernels against NumPy and jax.

Every destination is touched before: what a first touch costs is no part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.measuring import Contender, Group, Wrong, call, measure
from benchmarks.settings import Settings

MATRICES = (("float32", (3072, 4096)), ("uint16", (4096, 6144)), ("uint8", (6144, 8192)))
"""dtype -> a kernel of about 50 MB."""
CONV = (512, 512, 3, 3)
TO_FLAX = (2, 3, 1, 0)
REQUIRED = ("graftax", "numpy")
SMOKE = 16  # times smaller on each of the first two axes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace, settings: Settings) -> list[Group]:
    return list(_groups(settings))


def _groups(settings: Settings) -> Iterator[Group]:
    rng = np.random.default_rng(settings.seed)
    for dtype, shape in MATRICES:
        source = _values(rng, shape, dtype, settings)
        title = f"Transpose {list(source.shape)} of {dtype}, {source.nbytes / 1e6:,.3g} MB"
        yield _measured(title, "memcpy", [_memcpy(source), *_copies(source, (1, 0), ("graftax", "numpy"))], settings)
    for dtype in ("float32", "bfloat16"):
        source = _values(rng, CONV, dtype, settings)
        contenders = _copies(source, TO_FLAX, ("graftax", "numpy", "jax.device_put of the view"))
        yield _measured(f"Convolution kernel {list(source.shape)}, {dtype}, to Flax", "numpy", contenders, settings)


def _measured(title: str, baseline: str, contenders: list[Contender], settings: Settings) -> Group:
    return measure(title, contenders, baseline, 3 * settings.repeats, settings.seed, 0, True, settings.say)


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, settings: Settings) -> np.ndarray[Any, Any]:
    import ml_dtypes

    factor = SMOKE if settings.smoke else 1
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    extents = (shape[0] // factor, shape[1] // factor, *shape[2:])
    return rng.integers(0, 255, (*extents[:-1], extents[-1] * kind.itemsize), np.uint8).view(kind)


def _memcpy(source: np.ndarray[Any, Any]) -> Contender:
    out = np.zeros_like(source)
    return call("memcpy", lambda: np.copyto(out, source), lambda _: _equal(out, source), True)


def _copies(source: np.ndarray[Any, Any], order: tuple[int, ...], names: tuple[str, ...]) -> list[Contender]:
    """The ways to lay `source` out in another order of its axes."""
    import jax

    from graftax.execute import strided

    view = source.transpose(order)
    out = np.zeros(view.shape, view.dtype)

    def into(copy: Callable[[Any, Any], None]) -> Callable[[], Any]:
        def job() -> Any:
            copy(out, view)
            return out

        return job

    ways: dict[str, Callable[[], Any]] = {
        "graftax": into(strided.copy),
        "numpy": into(np.copyto),
        "jax.device_put of the view": lambda: jax.device_put(view).block_until_ready(),
    }
    return [call(name, ways[name], lambda made: _equal(np.asarray(made), view), name in REQUIRED) for name in names]


def _equal(made: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> int:
    if made.shape != wanted.shape or np.ascontiguousarray(made).tobytes() != np.ascontiguousarray(wanted).tobytes():
        raise Wrong("other values than NumPy's")
    if made.flags.writeable:
        made[...] = np.zeros((), made.dtype)  # the next one has to write all of it
    return wanted.size
