"""Lists of parts on one side, one list of blocks on the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import graftax as gx

PARTS = {
    "attn": {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8)},
    "mlp": {"fc1": (16, 8), "fc2": (8, 16)},
    "norm1": {"": (8,)},
    "norm2": {"": (8,)},
}
NORMS = {"norm1": "attn_norm", "norm2": "mlp_norm"}
LISTS = {"attn": "attns", "mlp": "mlps", "norm1": "norms1", "norm2": "norms2"}
LONGER = {"attn": "attn_layers", "mlp": "mlp_layers", "norm1": "attn_norms", "norm2": "mlp_norms"}

Path = Callable[[int, str], str]


def flat(i: int, part: str) -> str:
    """Attention and feed-forward parts in turns, each with its norm."""
    return f"layers/{2 * i + (part in ('mlp', 'norm2'))}/{'norm' if part in NORMS else 'fn'}"


FORMS: dict[str, Path] = {
    "a list for each part": lambda i, part: f"{LISTS[part]}/{i}",
    "under other names": lambda i, part: f"{LONGER[part]}/{i}",
    "one flat list": flat,
    "numbers inside": lambda i, part: f"layers/{i}/{int(part in ('mlp', 'norm2'))}/{'norm' if part in NORMS else 'fn'}",
}


def blocks(i: int, part: str) -> str:
    return f"layers_{i}/{NORMS.get(part, part)}"


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("swapped", [False, True], ids=["lists in torch", "lists in flax"])
@pytest.mark.parametrize("name", FORMS)
def test_lists_of_parts_are_read_as_blocks(name: str, swapped: bool, count: int) -> None:
    rng = np.random.default_rng(0)
    torch: dict[str, Any] = {"emb.weight": rng.standard_normal((20, 8)).astype("f4")}
    flax: dict[str, Any] = {"emb/embedding": torch["emb.weight"]}
    left, right = (blocks, FORMS[name]) if swapped else (FORMS[name], blocks)
    for i in range(count):
        for part, leaves in PARTS.items():
            for leaf, shape in leaves.items():
                value = rng.standard_normal(shape).astype("f4")
                names = (f"{path(i, part)}/{leaf}".strip("/") for path in (left, right))
                one, other = names
                torch[f"{one.replace('/', '.')}.weight"] = value
                flax[f"{other}/{'kernel' if leaf else 'scale'}"] = value.T
    plan = gx.plan(torch, flax, to="flax")
    assert plan.complete, str(plan)
    made = plan.run(torch)
    assert all(np.array_equal(made[path], leaf) for path, leaf in flax.items())
