"""What the planner makes of an attack.

right        complete, and equal to the truth
assumed      complete and wrong, under an assumption that names every wrong leaf and says what no file shows
asked        it asks, and true answers among the first ten lead to the truth
stuck        it asks or has misfits, and no true answer is offered
refused      an error
wrong-entry  it asks, and an entry that is settled is wrong
asked-WRONG  true answers lead to a complete plan that is wrong
WRONG        complete, and different from the truth
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks.pairs import Array, Attack
from graftax.errors import GraftaxError
from graftax.match.planning import make_plan
from graftax.ops import apply_chain, same_bits
from graftax.plans import Entry, Plan, PlanOptions
from graftax.tree import Checkpoint
from mutations.judging import checkpoint

if TYPE_CHECKING:
    from attacks.live import Live

WORDS = ("right", "assumed", "asked", "stuck", "refused", "wrong-entry", "asked-WRONG", "WRONG")
FAULTS = ("wrong-entry", "asked-WRONG", "WRONG")
ANSWERS, CANDIDATES, PLANS = 12, 10, 80  # plans made for one step

Planner = Callable[[Sequence[str]], Plan]
Wrong = Callable[[Plan], list[str]]


@dataclass(slots=True)
class Verdict:
    """`first`: what the first candidates lead to, taken in turn: right, WRONG or stuck; '' where nothing is asked."""

    word: str
    first: str = ""
    questions: int = 0
    answers: int = 0
    wrong: list[str] = field(default_factory=list[str])
    text: str = ""


def verdict(attack: Attack, answering: bool = True) -> Verdict:
    """The verdict on one attack from files. `answering`: the questions are answered too."""
    ends = _ends(attack)

    def plan(rules: Sequence[str]) -> Plan:
        text = "rules = [\n" + "".join(f"{rule},\n" for rule in rules) + "]\n" if rules else None
        return make_plan(*ends, PlanOptions(rules=text, **attack.options))

    return judge(plan, lambda made: differing(attack, made), attack.excused, answering)


def judge(plan: Planner, wrong: Wrong, excused: str = "", answering: bool = True) -> Verdict:
    """The verdict on what `plan(rules)` makes; `wrong(plan)` lists the leaves that its entries fill falsely."""
    try:
        made = plan([])
    except GraftaxError as error:
        return Verdict("refused", text=str(error))
    found = wrong(made)
    out = Verdict("right", "", len(made.questions), 0, found, str(made))
    if made.complete:
        if found:
            out.word = "assumed" if _excused(made, found, excused) else "WRONG"
        return out
    if found and not _excused(made, found, excused):
        out.word = "wrong-entry"
        return out
    out.word = "stuck"
    if answering and made.questions:
        _answer(out, plan, wrong, made, excused)
    return out


def _answer(out: Verdict, plan: Planner, wrong: Wrong, made: Plan, excused: str) -> None:
    """Answer truly, then by first candidates; the verdict takes what they lead to."""
    end, rules, all_first = _walk(plan, wrong, made, CANDIDATES)
    out.answers = len(rules)
    if end is not None and end.complete:
        out.wrong = wrong(end)
        out.word = "asked" if not out.wrong or _excused(end, out.wrong, excused) else "asked-WRONG"
        out.text = out.text if out.word == "asked" else f"{out.text}\nafter {rules}:\n{end}"
    if all_first:
        out.first = {"asked": "right", "asked-WRONG": "WRONG"}.get(out.word, "stuck")
        return
    end, _, _ = _walk(plan, wrong, made, 0)
    if end is None or not end.complete:
        out.first = "stuck"
    else:
        out.first = "WRONG" if wrong(end) else "right"


def _walk(plan: Planner, wrong: Wrong, made: Plan, among: int) -> tuple[Plan | None, list[str], bool]:
    """Answer the questions one at a time: by the first true one `among` the candidates, or (0) by the first. Gives the
    last plan, the answers, and whether each was its question's first."""
    rules: list[str] = []
    all_first = True
    while not made.complete and len(rules) < ANSWERS:
        step = _step(plan, wrong, made, rules, among)
        if step is None:
            return made, rules, all_first
        made, rule, first = step
        rules.append(rule)
        all_first = all_first and first
    return made, rules, all_first


def _step(plan: Planner, wrong: Wrong, made: Plan, rules: list[str], among: int) -> tuple[Plan, str, bool] | None:
    left = PLANS
    for number, question in enumerate(made.questions):
        for place, candidate in enumerate(question.candidates[: among or 1]):
            if candidate.rule in rules:
                continue
            left -= 1
            if left < 0:
                return None
            try:
                again = plan([*rules, candidate.rule])
            except GraftaxError:
                continue
            if len(again.failures) > len(made.failures):
                continue
            if not among:
                return again, candidate.rule, True
            settled = {name for entry in again.entries for name in entry.targets} & {*question.targets}
            if not question.targets:
                settled = {name for entry in again.entries for name in entry.sources} & {*question.sources}
            if settled and not any(name in said for said in wrong(again) for name in settled):
                return again, candidate.rule, place == 0 and number == 0
    return None


def _excused(made: Plan, wrong: Sequence[str], excused: str) -> bool:
    """True if an assumption of the kind that no file decides names each wrong leaf."""
    if not excused:
        return False
    named = {name for said in made.assumptions if re.search(excused, said.text) for name in said.targets}
    everywhere = any(re.search(excused, said.text) and not said.targets for said in made.assumptions)
    return everywhere or all(any(name in line for name in named) for line in wrong)


# ---------------------------------------------------------------- files


def _ends(attack: Attack) -> tuple[Checkpoint, Checkpoint]:
    sides: tuple[Any, Any] = ("flax", "torch") if attack.back else ("torch", "flax")
    return checkpoint("source", attack.source, sides[0], True), checkpoint("like", attack.like, sides[1], False)


def differing(attack: Attack, made: Plan) -> list[str]:
    """The leaves of like that the plan's entries fill with something else than they must."""
    wrong: list[str] = []
    for entry in made.entries:
        if entry.unfilled:
            wrong += [f"{name} is made up: {_evidence(entry)}" for name in entry.targets if name not in attack.gone]
            continue
        found = apply_chain(entry.ops, tuple(attack.source[name] for name in entry.sources))
        for name, array in zip(entry.targets, found, strict=True):
            if name in attack.gone or not _equal(np.asarray(array), attack.like[name], attack.loose):
                wrong.append(f"{', '.join(entry.sources)} -> {name}: {_evidence(entry)}")
    return wrong


def _evidence(entry: Entry) -> str:
    return "; ".join((entry.text.rpartition(": ")[2], *entry.evidence))


def _equal(one: Array, other: Array, loose: bool) -> bool:
    if one.shape != other.shape:
        return False
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-5)) if loose else same_bits(one, other)


def live_verdict(attack: Live, answering: bool = True) -> Verdict:
    """The verdict on an attack with live models."""
    import graftax as gx

    files = attack.attack
    source = attack.torch or checkpoint("source", files.torch, "torch", True)
    like: Any = checkpoint("like", files.flax, "flax", False)
    if attack.flax is not None:
        like = gx.linen(attack.flax[0], *attack.flax[1])

    if files.back:
        source, like = checkpoint("source", files.flax, "flax", True), attack.torch

    def plan(rules: Sequence[str]) -> Plan:
        return gx.plan(source, like, rules=list(rules) or None, **files.options)

    return judge(plan, lambda made: differing(files, made), files.excused, answering)
