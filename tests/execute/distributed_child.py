"""Run by test_distributed_runs.py as one of several processes: ports one checkpoint together with the others, and says
as JSON what came of it. What `--injure` says happens in process `--victim` at its `--at`-th piece of work."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import type_handlers

import graftax as gx
from graftax.errors import FormatError, GraftaxError
from graftax.execute import distributed
from graftax.execute.streamed import Stream

LIMITS = {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}


def join(index: int, count: int, port: int, devices: int) -> None:
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        index,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"127.0.0.1:{port}",
        **LIMITS,
    )


def injured(kind: str, at: int) -> None:
    """From the `at`-th piece of work on, what is made here fails or ends the process."""
    done = 0

    def strike() -> None:
        nonlocal done
        done += 1
        if done == at:
            print(json.dumps({"struck": time.time()}), flush=True)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise FormatError("the tensor is torn")

    if kind in ("full", "kill-orbax"):  # the disk is full, or a kill, inside Orbax

        async def serialize(*args: Any, **more: Any) -> Any:
            print(json.dumps({"struck": time.time()}), flush=True)
            if kind == "kill-orbax":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        type_handlers.ArrayHandler.serialize = serialize
        return
    before(distributed.Peers, "look", strike) if kind == "kill" else before_values(strike)


def before_values(action: Callable[[], None]) -> None:
    for name in ("_filled", "sharded"):
        before(Stream, name, action)


def before(owner: Any, name: str, action: Callable[[], None]) -> None:
    """`owner.name` does `action` first."""
    method = getattr(owner, name)

    def both(*args: Any) -> Any:
        action()
        return method(*args)

    setattr(owner, name, both)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("index", "count", "port"):
        parser.add_argument(name, type=int)
    for name in ("source", "like", "out"):
        parser.add_argument(name)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--injure", default="")
    parser.add_argument("--victim", type=int, default=-1)
    parser.add_argument("--at", type=int, default=1)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--devices", type=int, default=1)
    given = parser.parse_args()
    join(given.index, given.count, given.port, given.devices)
    if given.slow:
        before_values(lambda: time.sleep(given.slow))
    if given.victim == given.index:
        injured(given.injure, given.at)
    began = time.time()
    try:
        receipt = gx.port_file(given.source, given.like, given.out, **given.options)
    except GraftaxError as error:
        told = {"error": type(error).__name__, "text": str(error), "raised": time.time()}
        print(json.dumps(told), flush=True)
        sys.exit(error.exit_code)
    told = receipt.as_json() | {"text": receipt.text}
    print(json.dumps({"receipt": told, "began": began, "ended": time.time()}), flush=True)


if __name__ == "__main__":
    main()
