"""Train the digits network in torch and write it to fixtures/: the checkpoint that the quickstart and the tests port.

    python scripts/train_digits.py [--out fixtures] [--epochs 40]

Needs the `test` extra (torch, scikit-learn). A run takes seconds on a CPU; the same versions give the same weights.
Writes digits.pt and digits.safetensors (the state_dict), digits_test.npz (held-out images, labels and torch's logits)
and digits.json (how it was made, the accuracy, SHA-256 of each file).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from graftax.examples import digits_torch

SEED = 0
BATCH = 64
REQUIRED = 0.97
"""Share of held-out images that must be classified correctly; below it nothing is written."""


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images (N, 1, 8, 8) float32 in [0, 1], training labels, test labels (N,) int64.

    A quarter is held out, stratified by label."""
    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[:, None]
    return tuple(
        train_test_split(images, data.target.astype(np.int64), test_size=0.25, random_state=SEED, stratify=data.target)
    )


def train(images: np.ndarray, labels: np.ndarray, epochs: int) -> torch.nn.Module:
    """The network after `epochs` passes with Adam and a cosine schedule, in eval mode."""
    torch.manual_seed(SEED)
    model = digits_torch().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def write(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, out: Path, epochs: int) -> float:
    """Write the fixture files and return the accuracy on `images`."""
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    right = int((logits.argmax(1) == labels).sum())
    accuracy = right / len(labels)
    if accuracy < REQUIRED:
        raise SystemExit(f"test accuracy {accuracy:.4f} is below {REQUIRED}; nothing was written")

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "digits.pt", "wb") as file:  # a file object: torch would put the file's name into the archive
        torch.save(model.state_dict(), file)
    (out / "digits.safetensors").write_bytes(safetensors.torch.save(dict(model.state_dict()), {"format": "pt"}))
    np.savez(out / "digits_test.npz", images=images, labels=labels, logits=logits)
    names = ("digits.pt", "digits.safetensors", "digits_test.npz")
    record = {
        "made_by": "scripts/train_digits.py",
        "data": "scikit-learn load_digits, 8x8 grey images divided by 16, a stratified quarter held out",
        "model": "graftax.examples.digits_torch",
        "seed": SEED,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_images": len(labels),
        "test_correct": right,
        "test_accuracy": round(accuracy, 6),
        "torch": torch.__version__.partition("+")[0],
        "scikit-learn": sklearn.__version__,
        "sha256": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names},
    }
    (out / "digits.json").write_text(json.dumps(record, indent=2) + "\n")
    return accuracy


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "fixtures")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation: the same bits on every run
    torch.use_deterministic_algorithms(True)
    x_train, x_test, y_train, y_test = split()
    accuracy = write(train(x_train, y_train, args.epochs), x_test, y_test, args.out, args.epochs)
    print(f"test accuracy {accuracy:.4f} on {len(y_test)} images; wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
