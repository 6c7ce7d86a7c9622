#!/usr/bin/env python3
"""What a parity check costs: time, memory, and a model larger than memory.

    python scripts/bench_parity.py [time] [memory] [large] [--api linen] [--json out.json]

time     an encoder of 12 layers (hidden 256, batch 4 x 128), a correct port: the seconds of one warm eager Flax forward
         F, of tracing it alone, and of the full diagnosis without compilation and without the search for causes
memory   how far the peak of the process rises during that check, against the size of the activations it looks at
large    a model of 2 GB of weights: the peak of the process that checks it, which must stay under 3 GB
Each runs in a process of its own. Exit status 1 if a limit is passed: 10 F, 3 F, 3 x activations, 3 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LIMITS = {"diagnosis_in_F": 10.0, "trace_in_F": 3.0, "memory_in_activations": 3.0, "large_peak_GB": 3.0}
LAYERS, WIDTH, HEADS, INNER, BATCH, LENGTH, WORDS = 12, 256, 8, 1024, 4, 128, 1000
APART = ("compile", "flax compile", "causes", "prepare")
"""Steps of a report that are not the diagnosis: reported apart."""


def encoder(api: str) -> Any:
    """(torch module, what check_parity takes, inputs, weights) of the zoo's encoder at the size of the benchmark."""
    import numpy as np
    from tests.parity.zoo import KINDS
    from tests.parity.zoo.base import both, torch_module
    from tests.parity.zoo.encoder import EncoderSettings

    import graftax as gx

    settings = EncoderSettings(
        vocabulary=WORDS, positions_in_all=LENGTH, width=WIDTH, heads=HEADS, inner=INNER, depth=LAYERS
    )
    kind, rng = KINDS["encoder"], np.random.default_rng(0)
    ids = rng.integers(1, WORDS, (BATCH, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH)[None] < np.array([128, 100, 60, 30])[:, None]).astype(np.int32)
    batch = both(ids * mask, mask, ids % 2)
    module = torch_module(kind, settings, 0)
    inputs = gx.Inputs(torch=(batch.torch, {}), flax=(batch.flax, {}))
    if api == "linen":
        like = gx.linen(kind.linen(settings), *batch.flax)
        weights = gx.port(module, like)
        return module, like, inputs, weights, lambda: like.module.apply(weights, *batch.flax)
    from flax import nnx

    like = nnx.eval_shape(lambda: kind.nnx(settings, nnx.Rngs(0)))
    model = gx.port(module, like, rngs=0)
    return module, model, inputs, None, lambda: model(*batch.flax)


def warm(call: Any, runs: int = 5) -> float:
    """Median seconds of a call after two that compile."""
    import jax

    times: list[float] = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return median(times[2:])


def measure_time(api: str) -> dict[str, Any]:
    import jax

    import graftax as gx

    with jax.default_matmul_precision("highest"):
        module, model, inputs, weights, call = encoder(api)
        forward = warm(call)
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            report = gx.check_parity(module, model, inputs, weights)
            runs.append((time.perf_counter() - start, report.seconds))
            assert report.ok, str(report)
    whole, seconds = runs[-1]
    apart = sum(seconds.get(name, 0.0) for name in APART)
    diagnosis = whole - apart
    trace = seconds.get("flax", 0.0)
    return {
        "api": api,
        "forward_seconds": forward,
        "check_seconds": [round(run[0], 3) for run in runs],
        "steps": {name: round(value, 3) for name, value in seconds.items()},
        "diagnosis_in_F": diagnosis / forward,
        "trace_in_F": trace / forward,
    }


def measure_memory(api: str) -> dict[str, Any]:
    """The rise of the resident peak over what is there before the check, once everything is compiled."""
    import graftax as gx

    module, model, inputs, weights, _ = encoder(api)
    gx.check_parity(module, model, inputs, weights)
    held = activations(module, inputs)
    before = resident()
    with Peak() as peak:
        report = gx.check_parity(module, model, inputs, weights)
    assert report.ok, str(report)
    return {
        "api": api,
        "activations_MB": held / 1e6,
        "risen_MB": (peak.highest - before) / 1e6,
        "memory_in_activations": (peak.highest - before) / held,
    }


def activations(module: Any, inputs: Any) -> int:
    """Bytes of all distinct outputs of modules in one float32 forward."""
    import torch

    seen: dict[int, Any] = {}

    def keep(_: Any, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen[output.data_ptr()] = output

    hooks = [part.register_forward_hook(keep) for part in module.modules()]
    with torch.no_grad():
        module(*inputs.torch[0])
    for hook in hooks:
        hook.remove()
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The highest resident size while it is entered, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.highest, self.done = resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.003):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


LARGE_WIDTH, LARGE_DEPTH = 2048, 125
"""125 square Linear layers of 2048: 2.1 GB in float32."""


def write_large(path: Path) -> None:
    """The torch weights as safetensors, layer by layer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = path
    folder.mkdir()
    index: dict[str, str] = {}
    for i in range(LARGE_DEPTH):
        rng = np.random.default_rng(i)
        name, file = f"layers.{i}.weight", f"model-{i + 1:05}-of-{LARGE_DEPTH:05}.safetensors"
        scale = np.float32(LARGE_WIDTH**-0.5)
        save_file({name: rng.standard_normal((LARGE_WIDTH, LARGE_WIDTH), np.float32) * scale}, folder / file)
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def measure_large(api: str) -> dict[str, Any]:
    """torch on the meta device, weights from its checkpoint; Flax abstract, ported by the plan."""
    import numpy as np
    import torch
    from flax import linen as fn
    from flax import nnx

    import graftax as gx

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (torch.nn.Linear(LARGE_WIDTH, LARGE_WIDTH, bias=False) for _ in range(LARGE_DEPTH))
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    class Linen(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(LARGE_DEPTH):
                x = fn.tanh(fn.Dense(LARGE_WIDTH, use_bias=False, name=f"layers_{i}")(x))
            return x

    class NNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            kinds = (nnx.Linear(LARGE_WIDTH, LARGE_WIDTH, use_bias=False, rngs=rngs) for _ in range(LARGE_DEPTH))
            self.layers = nnx.List(kinds)

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = nnx.tanh(layer(x))
            return x

    x = np.random.default_rng(0).normal(size=(4, LARGE_WIDTH)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_large(Path(folder) / "large")
        with torch.device("meta"):
            module = Torch().eval()
        model = gx.linen(Linen(), x) if api == "linen" else nnx.eval_shape(lambda: NNX(nnx.Rngs(0)))
        before = resident()
        start = time.perf_counter()
        with Peak() as peak:
            report = gx.check_parity(module, model, x, source=str(Path(folder) / "large"))
        seconds = time.perf_counter() - start
    assert report.ok, str(report)
    weights = 4 * LARGE_DEPTH * LARGE_WIDTH**2 / 1e9
    return {
        "api": api,
        "weights_GB": weights,
        "layers": len(report.layers),
        "before_GB": before / 1e9,
        "seconds": seconds,
        "large_peak_GB": peak.highest / 1e9,
    }


PARTS = {"time": measure_time, "memory": measure_memory, "large": measure_large}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="time, memory, large; all if none is named")
    parser.add_argument("--api", choices=("linen", "nnx"), action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts, apis = options.parts or list(PARTS), options.api or ["linen", "nnx"]
    if options.child:
        print(json.dumps(PARTS[parts[0]](apis[0])))
        return 0
    found: list[dict[str, Any]] = []
    missed = 0
    for part in parts:
        for api in apis:
            command = [sys.executable, __file__, part, "--api", api, "--child"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{part} {api}: failed\n{done.stderr[-1500:]}")
                missed += 1
                continue
            row = {"part": part, **json.loads(done.stdout.splitlines()[-1])}
            found.append(row)
            print(
                f"{part}: " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )
            for name, limit in LIMITS.items():
                if row.get(name, 0.0) > limit:
                    print(f"  over the limit: {name} {row[name]:.3g} > {limit}")
                    missed += 1
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
