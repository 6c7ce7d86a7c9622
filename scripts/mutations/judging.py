"""What the planner makes of a mutation: a verdict, and how many true answers it takes to an exact plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from graftax.errors import GraftaxError
from graftax.match.names import Lexicon
from graftax.match.planning import make_plan
from graftax.ops import apply_chain, same_bits
from graftax.plans import Candidate, Entry, Plan, PlanOptions
from graftax.rules import apply_rules, load_rules, rule_line
from graftax.tree import Checkpoint, Storage, TensorSpec
from mutations.cases import Arrays, Case

MOST = 12  # answers after which a mutation counts as not settled


@dataclass(slots=True)
class Verdict:
    """exact; asked (settled by `answers` of the offered rules, where `settled`); WRONG: complete, and a leaf differs,
    at once or after true answers; assumed: wrong under a call order that the plan states."""

    word: str
    questions: int = 0
    answers: int = 0
    settled: bool = False
    wrong: list[str] = field(default_factory=list[str])


def checkpoint(label: str, arrays: Arrays, side: Any, values: bool) -> Checkpoint:
    specs = {name: TensorSpec(array.shape, str(array.dtype)) for name, array in arrays.items()}
    return Checkpoint(label, side, specs, Storage(arrays.__getitem__ if values else None))


def solve(case: Case, rules: str = "", lex: Lexicon | None = None) -> Plan:
    """The plan of a case, tensors that go nowhere dropped."""
    source, like = checkpoint("source", case.torch, "torch", True), checkpoint("like", case.flax, "flax", False)
    options = PlanOptions(unused="drop", rules=f"rules = [\n{rules}]\n" if rules else None)
    if lex is None:
        return make_plan(source, like, options)
    with _words(lex):
        return make_plan(source, like, options)


class _words:
    """The planner with other words than its own, while it lasts."""

    def __init__(self, lex: Lexicon) -> None:
        self.lex = lex

    def __enter__(self) -> None:
        from graftax.match import names

        self.kept = names._standard
        names._standard = lru_cache(lambda _=0: self.lex)

    def __exit__(self, *_: object) -> None:
        from graftax.match import names

        names._standard = self.kept


def differing(case: Case, entries: tuple[Entry, ...]) -> list[str]:
    """The leaves of like that the entries fill with something else than they must."""
    wrong: list[str] = []
    for entry in entries:
        if entry.unfilled:
            wrong += [f"{name} is made up" for name in entry.targets if id(case.flax[name]) not in case.gone]
            continue
        found = apply_chain(entry.ops, tuple(case.torch[name] for name in entry.sources))
        for name, array in zip(entry.targets, found, strict=True):
            if not same_bits(np.asarray(array), case.flax[name]) or id(case.flax[name]) in case.gone:
                wrong.append(f"{entry.sources} -> {name}: {entry.evidence}")
    return wrong


def verdict(case: Case, lex: Lexicon | None = None, answering: bool = True) -> Verdict:
    """The verdict on one mutation."""
    plan = solve(case, "", lex)
    out = Verdict("asked", len(plan.questions))
    rules: list[str] = []
    while True:
        out.wrong = differing(case, plan.entries)
        if plan.complete or (out.wrong and not rules):
            break
        answer = _true_answer(case, plan) if answering and len(rules) < MOST else None
        if answer is None or answer in rules:
            return out
        rules.append(answer)
        out.answers += 1
        plan = solve(case, "".join(f"{rule},\n" for rule in rules), lex)
    if not out.wrong:
        out.settled = bool(rules)
        out.word = "asked" if rules else "exact"
    elif case.assumed and any("call order" in assumption.text for assumption in plan.assumptions):
        out.word = "assumed"
    elif plan.complete:
        out.word = "WRONG"
    else:
        out.word = "wrong leaf"
    return out


def _true_answer(case: Case, plan: Plan) -> str | None:
    """The rule of the first candidate that is true; where none is and leaves are gone, the rule that says so."""
    for question in plan.questions:
        for candidate in question.candidates:
            if _true(case, candidate):
                return candidate.rule
    gone = [name for name, array in case.flax.items() if id(array) in case.gone]
    waiting = {name for question in plan.questions for name in question.targets}
    gone = [name for name in gone if name in waiting]
    return ", ".join(rule_line(flax=name, missing="zeros") for name in gone) if gone else None


def _true(case: Case, candidate: Candidate) -> bool:
    source, like = checkpoint("source", case.torch, "torch", True), checkpoint("like", case.flax, "flax", False)
    try:
        found = apply_rules(load_rules([candidate.rule]), source, like, "torch", "flax")
    except GraftaxError:
        return False
    entries = found.proposal.entries
    if not entries or found.proposal.failures:
        return False
    silent = {id(item.entry) for item in found.named}
    return not differing(case, tuple(e for e in entries if id(e) not in silent)) and all(
        _same_values(case.torch, case.flax, e) for e in entries if id(e) in silent
    )


def _same_values(torch: Mapping[str, Any], flax: Mapping[str, Any], entry: Entry) -> bool:
    """For a rule that leaves the layout open: the same values, in whatever order."""
    one = np.sort(np.concatenate([torch[name].ravel() for name in entry.sources]))
    other = np.sort(np.concatenate([flax[name].ravel() for name in entry.targets]))
    return np.array_equal(one, other)
