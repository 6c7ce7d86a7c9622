"""Renamed, cut, padded and stacked variations of solved pairs: no plan is ever wrong, most stay exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from graftax.match.names import Lexicon

LEAST = {"0.3": 85, "0.7": 70, "1": 50}  # percent of exact plans, by the probability of a synonym


def _run(mutate: ModuleType, zoo: Path, count: int, seed: int, lex: Lexicon | None = None) -> dict[str, Counter[str]]:
    table = mutate.run(mutate.load_cases(zoo), list(mutate.KINDS), count, seed, lex, False)
    assert sum(row["WRONG"] for row in table.values()) == 0
    return dict(table)


def _exact(table: dict[str, Counter[str]], p: str) -> float:
    rows = [row for kind, row in table.items() if kind in (f"torch-{p}", f"flax-{p}", f"both-{p}")]
    done = sum(n for row in rows for verdict, n in row.items() if verdict != "questions")
    return 100 * sum(row["exact"] for row in rows) / done


def test_a_few_hundred_mutations_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    _run(mutate, zoo, 300, 11)


def test_mutations_without_synonyms_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    _run(mutate, zoo, 150, 12, Lexicon.empty())


def test_the_same_seed_gives_the_same_mutations(mutate: ModuleType, zoo: Path) -> None:
    cases = mutate.load_cases(zoo)
    one, two = (list(mutate.mutations(cases, list(mutate.KINDS), 30, 5)) for _ in range(2))
    assert [(kind, case.name, list(case.torch), list(case.flax)) for kind, case in one] == [
        (kind, case.name, list(case.torch), list(case.flax)) for kind, case in two
    ]


@pytest.mark.slow
def test_five_thousand_mutations_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    table = _run(mutate, zoo, 5000, 0)
    for p, least in LEAST.items():
        assert _exact(table, p) >= least


@pytest.mark.slow
def test_two_thousand_mutations_without_synonyms_are_never_wrong(mutate: ModuleType, zoo: Path) -> None:
    _run(mutate, zoo, 2000, 1, Lexicon.empty())
