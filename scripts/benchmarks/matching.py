"""What planning costs, by the number of tensors: seconds and memory, each size in a process of its own.

With --against also what another library takes for the same names, on the sizes that it can finish. Seconds are those
of the processor: a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from benchmarks.models import SIZES, decoder

SCRIPTS = Path(__file__).resolve().parents[1]
OTHER = "weightbridge==0.0.4"
OTHER_LAYERS = (1, 2, 4, 8, 16)  # of the deep model; each in a process with a time limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=3, help="runs of a size, of which the fastest counts")
    parser.add_argument("--only", default="", help="sizes whose name holds this")
    parser.add_argument("--against", action="store_true", help=f"time {OTHER} too; it is installed apart")
    parser.add_argument("--env", type=Path, help="folder for its environment (default: a temporary one)")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each of its sizes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"graftax": rows, "weightbridge": rows}; a row: name, tensors, seconds, megabytes, complete."""
    sizes = [name for name in SIZES if args.only in name]
    out: dict[str, Any] = {"graftax": [_row("plan", name, str(args.repeat)) for name in sizes]}
    if args.against:
        with tempfile.TemporaryDirectory() as scratch:
            folder: Path = args.env or Path(scratch) / "env"
            out["weightbridge"] = _against(folder, args.limit)
    return out


def show(result: dict[str, Any]) -> None:
    for row in result["graftax"]:
        state = "" if row["complete"] else "   NOT complete"
        print(f"{row['name']:22} {row['tensors']:7,} tensors {row['seconds']:8.3f} s {row['megabytes']:7.0f} MB{state}")
    for row in result.get("weightbridge", ()):
        took = f"{row['seconds']:8.3f} s" if "seconds" in row else ""
        ours = f"   graftax {row['graftax_seconds']:.3f} s"
        print(f"weightbridge           {row['tensors']:7,} tensors {took}{ours}   {row.get('failed', '')}".rstrip())


# ---------------------------------------------------------------- graftax


def _row(*command: str) -> dict[str, Any]:
    """What this module prints when it is run with `command`."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from benchmarks import matching; matching.child(sys.argv[2:])"
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPTS), *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def child(arguments: list[str]) -> None:
    """Plan one size in this process, and print what it took."""
    _, name, repeat = arguments
    layers, experts = SIZES[name] if name in SIZES else (int(name), 0)
    print(json.dumps({"name": name, **_measured(layers, experts, int(repeat))}))


def _measured(layers: int, experts: int, repeat: int) -> dict[str, Any]:
    """Seconds of the fastest run; megabytes that the first run adds to the process at its peak."""
    import time

    from graftax.planning import Options, make_plan

    make_plan(*decoder(2), Options())  # imports are no part of it
    ends = decoder(layers, experts)
    before = _peak()
    times: list[float] = []
    megabytes = 0.0
    complete = True
    for n in range(repeat if len(ends[0]) < 50_000 else 1):
        start = time.process_time()
        plan = make_plan(*ends, Options())
        times.append(time.process_time() - start)
        megabytes = _peak() - before if n == 0 else megabytes
        complete = complete and plan.complete
        del plan
    return {"tensors": len(ends[0]), "seconds": min(times), "megabytes": megabytes, "complete": complete}


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


def _against(folder: Path, limit: float) -> list[dict[str, Any]]:
    """Its seconds for models of a few layers, until one takes longer than the limit."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", OTHER], check=True)
    rows: list[dict[str, Any]] = []
    for layers in OTHER_LAYERS:
        ends = decoder(layers)
        sides = json.dumps([{name: spec.shape for name, spec in end.items()} for end in ends])
        row: dict[str, Any] = {"layers": layers, "tensors": len(ends[0])}
        rows.append(row)
        row["graftax_seconds"] = _row("plan", str(layers), "3")["seconds"]
        try:
            done = subprocess.run(
                [str(python), "-c", _TIMED], input=sides, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            row["failed"] = f"more than {limit:g} s"
            break
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        row |= json.loads(done.stdout.splitlines()[-1])
    return rows
