"""One side has more layers of the same list than the other: the numbers tell which are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx

PARTS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "single layers": {"weight": ("kernel", (4, 4))},
    "layers with a bias": {"weight": ("kernel", (4, 4)), "bias": ("bias", (4,))},
    "blocks": {"attn.q.weight": ("attn/q/kernel", (8, 8)), "attn.o.weight": ("attn/o/kernel", (8, 8)),
               "norm.weight": ("norm/scale", (8,))},
}  # fmt: skip


@pytest.mark.parametrize(("here", "there"), [(2, 3), (1, 3), (2, 5), (5, 6), (4, 2)])
@pytest.mark.parametrize("name", PARTS)
def test_a_list_that_goes_on_is_filled_number_by_number(name: str, here: int, there: int) -> None:
    rng = np.random.default_rng(0)
    source: dict[str, Any] = {}
    like: dict[str, Any] = {}
    for part, (leaf, shape) in PARTS[name].items():
        source |= {f"enc.{i}.{part}": rng.standard_normal(shape).astype("f4") for i in range(here)}
        like |= {f"enc/{i}/{leaf}": np.full(shape, 9, "f4") for i in range(there)}
    plan = gx.plan(source, like, to="flax", missing="keep", unused="drop")
    assert plan.complete, str(plan)
    made = plan.run(source)
    for part, (leaf, shape) in PARTS[name].items():
        for i in range(there):
            want = source[f"enc.{i}.{part}"].T if i < here else np.full(shape, 9, "f4")
            assert np.array_equal(made[f"enc/{i}/{leaf}"], want)


def test_numbers_with_a_gap_tell_nothing() -> None:
    source = {f"enc.{i}.weight": np.zeros((4, 4), "f4") for i in (0, 2)}
    like = {f"enc/{i}/kernel": np.zeros((4, 4), "f4") for i in range(3)}
    assert not gx.plan(source, like, to="flax", missing="keep").complete
