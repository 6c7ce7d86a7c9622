"""Renamed, cut, padded and stacked variations of solved pairs: no plan is ever wrong, most stay exact, and few answers
settle what is asked."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graftax.match.names import Lexicon

LEAST = {"0.3": 85, "0.7": 70, "1": 50}  # percent of exact plans, by the probability of a synonym


def _run(mutate: ModuleType, zoo: Path | None, count: int, seed: int, lex: Lexicon | None = None, **kw: Any) -> Any:
    tally = mutate.run(mutate.load_cases(zoo), list(mutate.KINDS), count, seed, lex, **kw)
    assert tally.total["WRONG"] == 0
    assert tally.total.total() >= 0.9 * count
    return tally


def test_mutations_of_made_pairs_are_never_wrong(mutate: ModuleType) -> None:
    _run(mutate, None, 150, 10)


def test_a_few_hundred_mutations_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    tally = _run(mutate, zoo, 300, 11)
    assert tally.median_questions <= 2
    assert tally.one_answer >= 60


def test_mutations_without_synonyms_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    _run(mutate, zoo, 120, 12, Lexicon.empty(), answering=False)


def test_the_same_seed_gives_the_same_mutations(mutate: ModuleType, zoo: Path) -> None:
    cases = mutate.load_cases(zoo)
    one, two = (list(mutate.mutations(cases, list(mutate.KINDS), 30, 5)) for _ in range(2))
    assert [(kind, case.name, list(case.torch), list(case.flax)) for kind, case in one] == [
        (kind, case.name, list(case.torch), list(case.flax)) for kind, case in two
    ]


def test_a_wrong_plan_would_be_seen(mutate: ModuleType) -> None:
    """The judge itself: values that the plan cannot know of are WRONG, or wrong leaves where something is asked."""
    import numpy as np

    case = mutate.load_cases(None)[0]
    name = "params/layers_1/self_attn/query/kernel"
    spoilt = {**case.flax, name: np.ascontiguousarray(case.flax[name][::-1])}
    case.flax = spoilt
    assert mutate.verdict(case).word == "WRONG"


@pytest.mark.slow
def test_five_thousand_mutations_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    tally = _run(mutate, zoo, 5000, 0)
    for p, least in LEAST.items():
        assert tally.exact(f"(torch|flax|both)-{p}") >= least
    assert tally.median_questions <= 2
    assert tally.one_answer >= 60


@pytest.mark.slow
def test_two_thousand_mutations_without_synonyms_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    _run(mutate, zoo, 2000, 1, Lexicon.empty(), answering=False)
