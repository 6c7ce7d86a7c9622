"""A contender in a process of its own: what it takes, and the peak of its memory, sampled from outside.

A worker is a module with a table of functions and `serve(WORKERS)` at its end. A function is given the job, imports
what it needs and returns the job proper; `serve` times that alone, tells this side, and only then checks what it made:

    {"seconds": 1.5, "before": 61000000}     the job is done; a line is waited for: memory is no more looked at
    {"checked": 354823168}                   and every value is right
    {"not_run": "no module named x"} or {"wrong": "h/0/attn/c_attn/kernel differs"} in the place of either
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring import NotRun, Sample, Wrong

SCRIPTS = Path(__file__).resolve().parents[1]
STEP = 0.004  # seconds between two looks at a process's memory

Job = Mapping[str, Any]
Made = Any
Worker = Callable[[Job], tuple[Callable[[], Made], Callable[[Made], int]]]
"""job -> (the work that is timed, the check of what it made: how many values it compared)"""


def memory(pid: int | str = "self") -> dict[str, int]:
    """RssAnon, RssShmem, VmHWM and their like in bytes; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    fields = (line.split() for line in text.splitlines() if line.startswith(("Rss", "Vm")))
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in fields}


def anonymous(fields: Mapping[str, int]) -> int:
    """Memory that no file backs."""
    return fields.get("RssAnon", 0) + fields.get("RssShmem", 0)


class _Watch:
    """Looks at the memory of a process until it is told to stop."""

    def __init__(self, pid: int) -> None:
        self.anonymous = self.resident = 0
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(STEP):
            found = memory(self._pid)
            self.anonymous = max(self.anonymous, anonymous(found))
            self.resident = max(self.resident, found.get("VmHWM", 0))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class Child:
    """A command as a contender's `run`. spoken: it is a worker that `serve`s, else its whole process is the job, and
    `check` says whether what it left is right. prepare is run before it, and neither is timed; `limit` in seconds."""

    command: Sequence[str | Path]
    spoken: bool = True
    prepare: Callable[[], None] = lambda: None
    check: Callable[[], int] = lambda: 0
    limit: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    def __call__(self) -> Sample:
        self.prepare()
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPTS)} | dict(self.environment),
        )
        said, errors, watch, late = _followed(process, self.spoken, self.limit)
        took = time.perf_counter() - start
        if late:
            raise NotRun(f"took more than {self.limit:g} s")
        if process.returncode and not ("not_run" in said or "wrong" in said):
            last = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise NotRun(f"failed: {last[0][:300]}")
        if "not_run" in said:
            raise NotRun(said["not_run"])
        if "wrong" in said:
            raise Wrong(said["wrong"])
        return Sample(
            said.get("seconds", took),
            took,
            watch.anonymous or None,
            said.get("before"),
            watch.resident or None,
            said.get("checked", 0) + self.check(),
        )


def _followed(process: subprocess.Popen[bytes], spoken: bool, limit: float) -> tuple[dict[str, Any], str, _Watch, bool]:
    """(what it said, its standard error, its memory, whether it was ended for taking too long)."""
    watch = _Watch(process.pid)
    errors: list[bytes] = []
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # pyright: ignore
    reader.start()
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit, end)
    timer.start()
    said: dict[str, Any] = {}
    try:
        for line in process.stdout:
            if spoken and line.startswith(b'{"'):
                said |= json.loads(line)
                watch.stop()
                with contextlib.suppress(OSError):  # it may have ended
                    process.stdin.write(b"\n")
                    process.stdin.flush()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
    finally:
        timer.cancel()
        watch.stop()
        reader.join()
    return said, b"".join(errors).decode("utf-8", "replace"), watch, late.is_set()


def worker(module: str, name: str, job: Job, python: str | Path = sys.executable) -> list[str | Path]:
    """The command that runs the worker `name` of benchmarks.`module`."""
    return [python, "-m", f"benchmarks.{module}", name, json.dumps(dict(job))]


# ---------------------------------------------------------------- on the other side


def serve(workers: Mapping[str, Worker]) -> None:
    """Do the job that the command line names, and say what it took."""
    name, job = sys.argv[1], json.loads(sys.argv[2])
    try:
        work, check = workers[name](job)
        before = anonymous(memory())
        start = time.perf_counter()
        made = work()
        _say(seconds=time.perf_counter() - start, before=before)
        sys.stdin.readline()  # the other side has stopped looking at the memory
        _say(checked=check(made))
    except (ImportError, NotRun) as error:
        _say(not_run=str(error))
    except Wrong as error:
        _say(wrong=str(error))


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)
