"""Loading straight into shards: sharding_cases.py, run in a process with eight host devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_cases_on_eight_devices() -> None:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    cases = Path(__file__).with_name("sharding_cases.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider", "-m", "", "-rs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
