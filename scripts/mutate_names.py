#!/usr/bin/env python3
"""Rename solved model pairs in many ways and see that no renaming makes the plan wrong.

    python scripts/mutate_names.py [CASES] [--count 5000] [--seed 0] [--kinds both-0.7,missing] [--no-words] [-v]

CASES: a folder of cases, each with torch.safetensors and truth.safetensors; without it, the small made pairs alone. A
mutation renames leaves of one side or both, removes, adds or stacks tensors; the truth moves with it. Verdicts: exact;
asked (with how many of the offered rules make it exact); assumed (wrong under a call order that the plan states as an
assumption, and that no file shows); wrong leaf (asked, and an entry is wrong); WRONG (complete, and a leaf differs, at
once or after true answers), which must never happen. Exit status 1 if anything is WRONG.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from graftax.match.names import Lexicon
from mutations.cases import Case, load_cases
from mutations.judging import verdict
from mutations.kinds import KINDS

__all__ = ["KINDS", "Tally", "load_cases", "main", "mutations", "run"]

WORDS = ("exact", "asked", "assumed", "wrong leaf", "WRONG")


@dataclass(slots=True)
class Tally:
    """Verdicts by kind; for what was asked, how many questions and how many answers."""

    kinds: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    questions: list[int] = field(default_factory=list[int])
    answers: list[int] = field(default_factory=list[int])
    unsettled: int = 0

    @property
    def total(self) -> Counter[str]:
        return sum(self.kinds.values(), Counter())

    def exact(self, pattern: str) -> float:
        """Percent of exact plans among the kinds whose name matches."""
        rows = sum((row for kind, row in self.kinds.items() if re.fullmatch(pattern, kind)), Counter())
        return 100 * rows["exact"] / max(1, rows.total())

    @property
    def asked(self) -> int:
        return len(self.questions)

    @property
    def median_questions(self) -> float:
        """Of the cases in which something is asked."""
        return median(self.questions) if self.questions else 0

    @property
    def one_answer(self) -> float:
        """Percent of the cases in which something is asked that one answer settles."""
        return 100 * sum(n == 1 for n in self.answers) / max(1, self.asked)


def mutations(cases: Sequence[Case], kinds: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, Case]]:
    """`count` mutations of the cases, the kinds in turn; those that do not apply are drawn again."""
    rng = random.Random(seed)
    made = tried = 0
    while made < count and tried < 40 * count:
        kind = kinds[tried % len(kinds)]
        tried += 1
        found = next((found for _ in range(8) if (found := KINDS[kind](rng.choice(cases), rng)) is not None), None)
        if found is not None:
            made += 1
            yield kind, found


def run(
    cases: Sequence[Case],
    kinds: Sequence[str],
    count: int,
    seed: int,
    lex: Lexicon | None = None,
    verbose: bool = False,
    answering: bool = True,
) -> Tally:
    """The verdicts on `count` mutations; prints what is WRONG. `answering`: questions are answered by true rules that
    they offer."""
    tally = Tally()
    for kind, case in mutations(cases, kinds, count, seed):
        found = verdict(case, lex, answering)
        tally.kinds[kind][found.word] += 1
        if found.questions and found.word in ("asked", "WRONG"):
            tally.questions.append(found.questions)
            if found.settled:
                tally.answers.append(found.answers)
            else:
                tally.unsettled += 1
        if found.word == "WRONG" or (verbose and found.wrong):
            print(f"{found.word}: {kind} of {case.name}: {len(found.wrong)} leaves: {found.wrong[0]}")
        if verbose and found.word == "asked" and not found.settled:
            print(f"not settled: {kind} of {case.name}: {found.questions} questions, {found.answers} answers")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="kinds whose name matches")
    parser.add_argument("--only", default="", help="cases whose name matches")
    parser.add_argument("--no-words", action="store_true", help="with the synonym table emptied")
    parser.add_argument("--no-answers", action="store_true", help="do not answer the questions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    cases = [case for case in load_cases(args.cases) if re.search(args.only, case.name)]
    kinds = [kind for kind in KINDS if re.search(args.kinds, kind)]
    lex = Lexicon.empty() if args.no_words else None
    tally = run(cases, kinds, args.count, args.seed, lex, args.verbose, not args.no_answers)
    if args.json:
        summary = {"median_questions": tally.median_questions, "one_answer_percent": tally.one_answer}
        print(json.dumps({**asdict(tally), **summary}))
    else:
        _print(tally)
    return 1 if tally.total["WRONG"] else 0


def _print(tally: Tally) -> None:
    for kind, row in tally.kinds.items():
        shown = ", ".join(f"{word} {row[word]}" for word in WORDS if row[word])
        print(f"{kind:24} {100 * row['exact'] / row.total():5.1f} % exact of {row.total()}: {shown}")
    print(", ".join(f"{word} {tally.total[word]}" for word in WORDS))
    for name in ("", "other-"):
        shown = ", ".join(f"p={p} {tally.exact(f'{name}(torch|flax|both)-{p}'):.0f} %" for p in ("0.3", "0.7", "1"))
        print(f"exact with {'words of other authors' if name else 'synonyms'}: {shown}")
    print(
        f"asked {tally.asked}: median questions {tally.median_questions:g}, settled by one answer "
        f"{tally.one_answer:.0f} %, not settled by what is offered {tally.unsettled}"
    )


if __name__ == "__main__":
    sys.exit(main())
