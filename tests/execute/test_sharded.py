"""Shards of a target hold what cutting the whole target gives, on eight host devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def child(seed: int, count: int) -> tuple[int, int]:
    """(shardings compared, of these with several boxes)."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("sharded_child.py")
    done = subprocess.run(
        [sys.executable, str(script), str(seed), str(count)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.split()
    return int(words[1]), int(words[3])


def test_random_chains_on_random_meshes() -> None:
    compared, cut = child(0, 150)
    assert compared > 80
    assert cut > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_chains_on_random_meshes(seed: int) -> None:
    assert child(seed, 3000)[0] > 1500
