"""What planning costs, by the number of tensors: seconds and memory, each size in a process of its own.

With --against also what another library takes for the same names, on the sizes that it can finish. Seconds are those
of the processor: a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.measuring import Group, NotRun, Row, Sample
from benchmarks.models import SIZES, decoder
from benchmarks.settings import Settings

SCRIPTS = Path(__file__).resolve().parents[1]
OTHER_LAYERS = (1, 2, 4, 8, 16)  # of the deep model; each in a process with a time limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="", help=f"sizes whose name holds this: {', '.join(SIZES)}")
    parser.add_argument(
        "--against", action="store_true", help=f"time {environments.WEIGHTBRIDGE} too, in --envs FOLDER"
    )
    parser.add_argument("--envs", type=Path, help="make the environments of other libraries here")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a contender is given up")


def run(args: argparse.Namespace, settings: Settings) -> list[Group]:
    """A group a size; the runs of a size are of one process, and the first one's memory counts."""
    sizes = {name: size for name, size in SIZES.items() if args.size in name}
    if settings.smoke:
        sizes = {"deep 46": (5, 0)}
    groups = [_group(name, *size, settings) for name, size in sizes.items()]
    if args.against:
        groups += _against(args.envs or settings.folder / "envs", args.limit, settings)
    return groups


def _group(name: str, layers: int, experts: int, settings: Settings) -> Group:
    settings.say(f"planning: {name}")
    found = _planned(layers, experts, settings.repeats)
    wrong = "" if found["complete"] else "the plan is not complete"
    row = Row("graftax", True, _samples(found), wrong=wrong)
    return Group(f"Planning: {name}, {found['tensors']:,} tensors", "graftax", [row])


def _samples(found: dict[str, Any]) -> list[Sample]:
    peak = int(found["megabytes"] * 2**20)
    return [Sample(seconds, anonymous=None if i else peak) for i, seconds in enumerate(found["seconds"])]


# ---------------------------------------------------------------- graftax


def _planned(layers: int, experts: int, repeat: int) -> dict[str, Any]:
    """What `_measured` gives, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.matching", str(layers), str(experts), str(repeat)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _measured(layers: int, experts: int, repeat: int) -> dict[str, Any]:
    """Seconds of every run; megabytes that the first run adds to the process at its peak."""
    import time

    from graftax.match.planning import make_plan
    from graftax.plans import PlanOptions

    make_plan(*decoder(2), PlanOptions())  # imports are no part of it
    ends = decoder(layers, experts)
    before = _peak()
    times: list[float] = []
    megabytes = 0.0
    complete = True
    for n in range(repeat if len(ends[0]) < 50_000 else 1):
        start = time.process_time()
        plan = make_plan(*ends, PlanOptions())
        times.append(time.process_time() - start)
        megabytes = _peak() - before if n == 0 else megabytes
        complete = complete and plan.complete
        del plan
    return {"tensors": len(ends[0]), "seconds": times, "megabytes": megabytes, "complete": complete}


def _peak() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------- the other library

_TIMED = """
import json, sys, time
import numpy as np
import weightbridge
torch, flax = ({n: np.zeros(s, "float32") for n, s in side.items()} for side in json.load(sys.stdin))
start = time.process_time()
failed = ""
try:
    weightbridge.adapt(torch, flax, "pytorch", "flax", ".", "/")
except Exception as error:
    failed = str(error).partition("\\n")[0]
print(json.dumps({"seconds": time.process_time() - start, **({"failed": failed} if failed else {})}))
"""


def _against(folder: Path, limit: float, settings: Settings) -> list[Group]:
    """Models of a few layers, until it takes longer than the limit for one."""
    try:
        python = environments.weightbridge(folder)
    except NotRun as error:
        return [Group("Planning against another library", "graftax", [Row("weightbridge", False, not_run=str(error))])]
    groups: list[Group] = []
    for layers in OTHER_LAYERS[: 1 if settings.smoke else None]:
        group = _group(f"{layers} layers", layers, 0, settings)
        other = Row("weightbridge", False)
        group.rows.append(other)
        groups.append(group)
        ends = decoder(layers)
        sides = json.dumps([{name: spec.shape for name, spec in end.items()} for end in ends])
        try:
            done = subprocess.run(
                [str(python), "-c", _TIMED], input=sides, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            other.not_run = f"took more than {limit:g} s"
            break
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        said = json.loads(done.stdout.splitlines()[-1])
        if "failed" in said:
            other.not_run = f"failed after {said['seconds']:.2f} s: {said['failed'][:120]}"
        else:
            other.samples.append(Sample(said["seconds"]))
    return groups


if __name__ == "__main__":
    print(json.dumps(_measured(*map(int, sys.argv[1:]))))
