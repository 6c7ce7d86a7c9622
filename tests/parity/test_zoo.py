"""The models themselves: every variant's port, made by gx.plan, gives torch's output in float32's own precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .zoo import APIS, KINDS, port

UNIT = 2.0**-24
CASES = [
    pytest.param(name, settings, api, id=f"{name} {place} [{api}]", marks=[pytest.mark.slow] if place else [])
    for name, kind in KINDS.items()
    for place, settings in enumerate(kind.variants())
    for api in APIS
]


def leaves(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("name", "settings", "api"), CASES)
def test_the_correct_port_is_correct(name: str, settings: Any, api: str) -> None:
    made = port(KINDS[name], settings, api, seed=0)
    exact, ours, theirs = (leaves(made.run_torch(torch.float64)), leaves(made.run_torch()), leaves(made.run_flax()))
    for want, floor, got in zip(exact, ours, theirs, strict=True):
        assert distance(got, want) <= 5 * max(distance(floor, want), UNIT)
