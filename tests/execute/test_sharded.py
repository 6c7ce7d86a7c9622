"""Shards of a target hold what cutting the whole target gives, on eight host devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def child(seed: int, count: int) -> dict[str, int]:
    """What was counted: chains, shardings compared, those with several boxes, those of which only a part was asked,
    those whose boxes share the rows that are read."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("sharded_child.py")
    done = subprocess.run(
        [sys.executable, str(script), str(seed), str(count)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def test_random_chains_on_random_meshes() -> None:
    counted = child(0, 300)
    assert counted["compared"] > 700
    assert counted["cut"] > 300
    assert counted["part"] > 200
    assert counted["rows"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_chains_on_random_meshes(seed: int) -> None:
    counted = child(seed, 12000)
    assert counted["chains"] > 10000
    assert counted["compared"] > 27000
