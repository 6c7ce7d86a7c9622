"""Port a trained torch checkpoint into Flax Linen and into NNX, without torch, and prove that nothing was lost.

    python scripts/quickstart.py [--out out/quickstart]

Reads fixtures/digits.safetensors (a small CNN, trained in torch on scikit-learn's digits) and the held-out images with
torch's logits. Prints the plan, the accuracy before and after, image by image, and the largest logit difference; writes
the ported weights; then replaces one kernel by a constant and shows what changed. Exits 1 if a prediction differs from
torch's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # thousands of parameters: a GPU only adds start-up time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import graftax as gx

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
SOURCE = FIXTURES / "digits.safetensors"
KERNEL = "params/Dense_1/kernel"
"""The leaf that the surgery replaces: the last layer's kernel, (48, 10)."""


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def score(logits: np.ndarray, labels: np.ndarray) -> str:
    right = int((logits.argmax(1) == labels).sum())
    return f"{right} of {len(labels)} right ({right / len(labels):.2%})"


def compare(name: str, logits: np.ndarray, torch_logits: np.ndarray, labels: np.ndarray) -> bool:
    """Print the line of one framework; True if every image gets the class that torch gave it."""
    same = logits.argmax(1) == torch_logits.argmax(1)
    print(
        f"  {name:<6} {score(logits, labels)}, same class as torch for {int(same.sum())} of {len(same)} images, "
        f"largest logit difference {np.abs(logits - torch_logits).max():.1e}"
    )
    return bool(same.all())


def changed(old: Any, new: Any) -> list[str]:
    """The paths of the leaves that differ."""
    pairs = zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True)
    return [
        "/".join(str(part.key) for part in path) for (path, a), b in pairs if a is not b and not np.array_equal(a, b)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder for the ported weights")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with np.load(FIXTURES / "digits_test.npz") as data:
        images, labels, torch_logits = data["images"], data["labels"], data["logits"]
    x = jnp.asarray(images.transpose(0, 2, 3, 1))  # torch (N, C, H, W) -> Flax (N, H, W, C)
    torch_here = "installed, not used" if importlib.util.find_spec("torch") else "not installed"
    print(f"graftax quickstart. Source: {SOURCE.name}, {len(gx.open_checkpoint(SOURCE))} tensors. torch: {torch_here}.")

    heading("1. Plan: torch -> Linen")
    linen = gx.examples.digits_linen()
    like = gx.linen(linen, x[:1])  # shapes only: nothing is initialised
    rules = FIXTURES / "digits_linen.toml"
    print(gx.plan(SOURCE, like, rules=rules))

    heading("2. Port: torch -> Linen, torch -> NNX")
    variables = gx.port(SOURCE, like, rules=rules)
    abstract = nnx.eval_shape(gx.examples.digits_nnx)
    model = gx.port(SOURCE, abstract, rules=FIXTURES / "digits_nnx.toml")
    model.eval()
    with jax.default_matmul_precision("highest"):
        linen_logits = np.asarray(linen.apply(variables, x))
        nnx_logits = np.asarray(model(x))
    print(f"  torch  {score(torch_logits, labels)} (stored when it was trained)")
    same = compare("Linen", linen_logits, torch_logits, labels)
    same &= compare("NNX", nnx_logits, torch_logits, labels)
    for name, tree, its_rules in (("linen", like, rules), ("nnx", abstract, FIXTURES / "digits_nnx.toml")):
        target = out / f"digits_{name}.safetensors"
        gx.port_file(SOURCE, tree, target, rules=its_rules)
        print(f"  wrote  {target} ({target.stat().st_size:,} bytes)")

    heading(f"3. Replace: {KERNEL} by a constant")
    replaced = gx.replace(variables, KERNEL, gx.constant(0.5), expect=1)
    paths = changed(variables, replaced)
    print(f"  changed {len(paths)} of {len(jax.tree.leaves(variables))} leaves: {', '.join(paths)}")
    print(f"  before  {score(linen_logits, labels)}")
    print(f"  after   {score(np.asarray(linen.apply(replaced, x)), labels)}: equal weights, so only the bias decides")
    same &= paths == [KERNEL]

    print("\nEvery image has the class that torch gave it." if same else "\nNOT the same as torch.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
