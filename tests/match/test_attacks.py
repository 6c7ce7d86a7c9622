"""Pairs made so that a guess gives a wrong plan: no plan from files or live models is ever wrong, nor holds a wrong
entry, nor is wrong after true answers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def attacks(script: Callable[[str], ModuleType]) -> ModuleType:
    """scripts/attack_plans.py as a module."""
    return script("attack_plans")


def _run(attacks: ModuleType, count: int, live: int, seed: int, kinds: str = "", **more: Any) -> Any:
    tally = attacks.run(count, live, seed, kinds, **more)
    assert not tally.faults, "\n".join(tally.faults)
    return tally


def test_attacks_from_files_give_no_wrong_plan(attacks: ModuleType) -> None:
    tally = _run(attacks, 3 * len(attacks.FILES), 0, 100_000)
    assert tally.total["right"] >= 30


def test_attacks_with_live_models_give_no_wrong_plan(attacks: ModuleType) -> None:
    _run(attacks, 0, 4, 100_000, "^live_(raw_uses|scanned|call_order|transposed)")


def test_the_same_seed_gives_the_same_attack(attacks: ModuleType) -> None:
    for kind in attacks.FILES:
        one, two = attacks.attack(kind, 7), attacks.attack(kind, 7)
        assert [*one.torch] == [*two.torch]
        assert all(np.array_equal(array, two.flax[path]) for path, array in one.flax.items())


def test_a_wrong_plan_would_be_seen(attacks: ModuleType) -> None:
    """The judge itself: values that no plan can know of."""
    one = attacks.attack("norms_by_place", 0)
    assert attacks.judged(one).word == "right"
    leaves = one.torch if one.back else one.flax
    name = next(iter(leaves))
    leaves[name] = leaves[name][::-1].copy()
    assert attacks.judged(one).word == "WRONG"


@pytest.mark.slow
def test_a_thousand_attacks_give_no_wrong_plan(attacks: ModuleType) -> None:
    _run(attacks, 880, 120, 0)
