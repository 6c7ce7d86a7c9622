"""An entry that names decided needs these names: without the words that its evidence states, on both sides or on one,
the plan gives the same entry or asks, and never another entry."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from graftax.match.names import concepts, lexicon
from graftax.tree import split_words

SAID = re.compile(r"both names mean: ([^;(]*?)(?:, and both are .*)?(?: \(|$)")
LETTERS = {".": "xyz", "/": "mnp"}
Case = Any


def words_of(evidence: tuple[str, ...]) -> frozenset[str]:
    """The words that the evidence of an entry states."""
    found = (SAID.match(text) for text in evidence)
    return frozenset(word for match in found if match for word in match[1].split(", "))


def blanked(arrays: dict[str, Any], separator: str, words: frozenset[str]) -> dict[str, Any] | None:
    """The side without the parts of its paths that mean one of the words; each gets letters, the same ones everywhere.
    None where two names would meet."""
    table: dict[str, str] = {}
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        *parts, leaf = name.split(separator)
        new: list[str] = []
        for part in parts:
            stem = part.rstrip("0123456789_")
            if stem not in table:
                meant = words & set(concepts(split_words(stem), lexicon())) if stem else words & set()
                table[stem] = f"{LETTERS[separator][len(table) % 3]}{len(table)}q" if meant else stem
            new.append(table[stem] + part[len(stem) :])
        path = separator.join((*new, leaf))
        if path in out:
            return None
        out[path] = array
    return None if out.keys() == arrays.keys() else out


def without(case: Case, solve: Callable[..., Any], rng: random.Random) -> Iterator[tuple[str, Case]]:
    """(the words taken, the case without them) for every set of words that decided an entry, in some order."""
    said = sorted({words_of(entry.evidence) for entry in solve(case).entries} - {frozenset()}, key=sorted)
    rng.shuffle(said)
    for words in said:
        torch, flax = blanked(case.torch, ".", words), blanked(case.flax, "/", words)
        for left, right in ((torch, flax), (torch, case.flax), (case.torch, flax)):
            if left is not None and right is not None:
                yield ", ".join(sorted(words)), replace(case, torch=left, flax=right)


def check(cases: list[Case], each: int) -> None:
    from mutations.judging import differing, solve  # scripts are importable once one is loaded

    rng, made, wrong = random.Random(0), 0, []
    for case in cases:
        if differing(case, solve(case).entries):
            continue  # what is wrong already is no matter of evidence
        for words, less in islice(without(case, solve, rng), each):
            made += 1
            wrong += [f"{case.name} without {words}: {line}" for line in differing(less, solve(less).entries)[:1]]
    assert made
    assert not wrong, "\n".join(wrong)


def test_the_words_of_an_entry_are_found_and_taken(mutate: ModuleType) -> None:
    from mutations.judging import solve

    case = mutate.load_cases(None)[0]
    less = next(less for words, less in without(case, solve, random.Random(0)) if "gate" in words)
    assert not any("gate_proj" in name for name in (*less.torch, *less.flax))
    assert {id(array) for array in less.torch.values()} == {id(array) for array in case.torch.values()}


def test_made_pairs_without_the_words_of_an_entry(mutate: ModuleType) -> None:
    check(mutate.load_cases(None), 40)


def test_a_few_pairs_of_the_zoo_without_the_words_of_an_entry(mutate: ModuleType, zoo: Path) -> None:
    check(mutate.load_cases(zoo)[::4], 6)


@pytest.mark.slow
def test_every_pair_of_the_zoo_without_the_words_of_an_entry(mutate: ModuleType, zoo: Path) -> None:
    check(mutate.load_cases(zoo), 60)


def test_a_made_pair_without_words_that_is_wrong_would_be_seen(mutate: ModuleType) -> None:
    from mutations.judging import differing, solve

    case = mutate.load_cases(None)[0]
    words, less = next(without(case, solve, random.Random(0)))
    name = next(target for entry in solve(less).entries for target in entry.targets)
    less.flax[name] = np.ascontiguousarray(less.flax[name][::-1])
    assert differing(less, solve(less).entries), words
