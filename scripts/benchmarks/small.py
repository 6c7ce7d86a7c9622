"""Thousands of small tensors into jax, against safetensors.flax.load_file, which transposes nothing.

All in this process, one after the other; what counts is the work a tensor makes, not its bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import checkpoints
from benchmarks.measuring import Contender, Group, NotRun, Sample, call, measure
from benchmarks.settings import Settings

BASELINE = "safetensors.flax, no .T"
SMOKE_SCALE = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace, settings: Settings) -> list[Group]:
    import jax
    from safetensors.flax import load_file

    import graftax as gx

    made = checkpoints.make("resnet", settings.folder, settings.scale * (SMOKE_SCALE if settings.smoke else 1))
    plan = gx.plan(made.source, made.like)

    def right(tree: Any) -> int:
        return checkpoints.check(checkpoints.flat(tree), checkpoints.read(made.truth))

    def contender(name: str, load: Callable[[], Any], check: Callable[[Any], int], required: bool = False) -> Contender:
        return call(name, lambda: jax.block_until_ready(load()), check, required)

    contenders = [
        contender(BASELINE, lambda: load_file(made.source), lambda found: _as_stored(found, made), True),
        contender("graftax, planned before", lambda: plan.run(made.source), right, True),
        contender("graftax, planning too", lambda: gx.port(made.source, made.like), right, True),
        contender("safetensors.numpy, .T", lambda: _naive(made, _numpy), right),
        contender("torch.load, .T", lambda: _naive(made, _torch), right)
        if importlib.util.find_spec("torch")
        else Contender("torch.load, .T", _no_torch),
    ]
    title = f"Into jax: {made.title}"
    group = measure(title, contenders, BASELINE, settings.repeats, settings.seed, made.nbytes, True, settings.say)
    return [group]


def _as_stored(found: dict[str, Any], made: checkpoints.Made) -> int:
    """The values of the file itself; without the integers, which jax narrows."""
    source = checkpoints.read(made.source)
    wanted = {leaf.torch: source[leaf.torch] for leaf in made.leaves if leaf.flax}
    return checkpoints.check({name: np.asarray(found[name]) for name in wanted}, wanted)


def _naive(made: checkpoints.Made, load: Callable[[checkpoints.Made], dict[str, Any]]) -> dict[str, Any]:
    """What a script that somebody wrote for this one model does."""
    import jax.numpy as jnp

    arrays = load(made)
    return {
        leaf.flax: jnp.asarray(arrays[leaf.torch] if leaf.axes is None else arrays[leaf.torch].transpose(leaf.axes))
        for leaf in made.leaves
        if leaf.flax
    }


def _numpy(made: checkpoints.Made) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(made.source)


def _torch(made: checkpoints.Made) -> dict[str, Any]:
    import torch

    return {name: value.numpy() for name, value in torch.load(made.bin, weights_only=True).items()}


def _no_torch() -> Sample:
    raise NotRun("torch is not installed")
