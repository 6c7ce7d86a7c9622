"""Plans: what goes where, and how. A plan is data made from names, shapes and dtypes, separate from its execution.

An entry is a group and the unit of meaning: sources -> ops -> targets. Every key is in exactly one entry of its side,
so the resolved plan has an inverse: swap the sides, reverse the ops.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from graftax.errors import Failure, PlanError, UsageError, counted, escape, option, worded
from graftax.ops import invert_chain
from graftax.plans.check import fit, keys_twice, unmentioned
from graftax.plans.entries import End, Entry
from graftax.plans.options import PlanOptions
from graftax.plans.proof import Proof, entries_hash, valid
from graftax.plans.questions import Assumption, Candidate, Proposal, Question
from graftax.plans.serialization import damaged_plan, parts_of_json, plan_as_json, read_json, write_json
from graftax.plans.text import plan_text
from graftax.tree import Checkpoint


@dataclass(frozen=True, slots=True)
class MadeFrom:
    """What a plan was made from: both opened ends, and the options with the parsed rules."""

    source: Checkpoint
    like: Checkpoint | None
    options: PlanOptions


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where, and how; `print` it to review it. `complete` if nothing is open and everything fits.

    A plan is data: it can be compared, pickled, saved and loaded, and nothing changes it. Only `made_from` is not data:
    it refers to both ends in this process, so that `answer` can plan again and `run` can return like's own kind of
    container. It is None for a plan that was loaded, unpickled or inverted. `parted`: the leaf that running both models
    could not decide because they differ before it; '' if there is none.
    """

    source: End
    like: End
    entries: tuple[Entry, ...] = ()
    questions: tuple[Question, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    failures: tuple[Failure, ...] = ()
    reads: tuple[str, ...] = ()
    proof: Proof | None = None
    parted: str = ""
    made_from: MadeFrom | None = field(default=None, repr=False, compare=False)

    def __copy__(self) -> Plan:
        return self  # nothing changes a plan

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __hash__(self) -> int:
        return hash((self.source.label, self.like.label, self.entries, self.questions))

    def __getstate__(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _PICKLED)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        for name, value in zip((*_PICKLED, "made_from"), (*state, None), strict=True):
            object.__setattr__(self, name, value)

    # ------------------------------------------------------------ state

    @property
    def complete(self) -> bool:
        """True if every leaf of like is filled, every source is used or dropped, every shape and dtype fits, and
        nothing is open."""
        return not self.questions and not self.failures

    @property
    def lossless(self) -> bool:
        """True if every entry gives back every bit on the way back, for any values; dropped tensors do not count."""
        return all(entry.exact for entry in self.entries if entry.dropped is None)

    def require_complete(self, way_out: str = "") -> None:
        """PlanError with every question and failure, unless the plan is complete. `way_out`: the next step, if it is
        not to write rules."""
        if self.complete:
            return
        open_ = [Failure(str(question), next=_without_candidates(question)) for question in self.questions]
        counts = [counted(len(self.questions), "open question")] if self.questions else []
        counts += [counted(len(self.failures), "misfit")] if self.failures else []
        raise PlanError(
            f"the plan for {escape(self.source.label)} -> {escape(self.like.label)} has {' and '.join(counts)}:",
            failures=(*self.failures, *open_),
            questions=self.questions,
            next=way_out
            or (
                worded(
                    "Put one of the lines shown into a rules file (--rules R.toml); --suggest R.toml writes them all.",
                    "Put one of the lines shown into rules=, or answer: plan = gx.plan(...).answer(0, 0) takes the "
                    "first line of the first question.",
                )
                if any(question.candidates for question in self.questions)
                else ""
            ),
        )

    # ------------------------------------------------------------ doing

    def run(self, source: Any, sharding: Any = None, rngs: Any = None, receipt: Any = None) -> Any:
        """The tree that this plan makes from `source`, in like's own kind of container if it knows like. sharding, rngs
        and receipt: as in `graftax.port`. PlanError if the plan is incomplete.
        """
        self.require_complete()
        return _front().run_plan(self, source, sharding, rngs, receipt)

    def answer(self, question: Question | int, choice: Candidate | int | str) -> Plan:
        """A new plan in which one candidate settles a question (the object, its index, or a rule line). This plan is
        not changed. An answer to one question narrows the others.

        UsageError if the index does not exist, or if the plan was loaded from a file.
        """
        asked = self._asked(question)
        if not isinstance(choice, (str, Candidate)):
            choice = cast("Candidate", _item(asked.candidates, choice, "candidate"))
        rule = choice.rule if isinstance(choice, Candidate) else choice
        if self.made_from is None:
            raise UsageError(
                "this plan does not know its source and like any more: it was loaded, unpickled or inverted",
                next=f"Plan again with this rule: {rule}",
            )
        return _front().plan_again(self.made_from, rule)

    def _asked(self, question: Question | int) -> Question:
        return question if isinstance(question, Question) else _item(self.questions, question, "question")

    @property
    def inverse(self) -> Plan:
        """The plan in the other direction: sides swapped, ops reversed and inverted. PlanError if the plan is
        incomplete.

        A tensor that was dropped for good (no fill is stated) is left out, never made up, and an assumption names it.
        """
        self.require_complete()
        entries: list[Entry] = []
        lost: dict[str, str] = {}
        for entry in self.entries:
            if entry.lost:
                lost.update(dict.fromkeys(entry.sources, entry.dropped or ""))
            else:
                entries.append(Entry(entry.targets, entry.sources, invert_chain(entry.ops), entry.evidence))
        left = {name: spec for name, spec in self.source.specs.items() if name not in lost}
        noted = tuple(
            Assumption(
                f"{name} is left out on the way back: it was dropped ({why})",
                "load_state_dict names the missing keys",
                (name,),
            )
            for name, why in lost.items()
        )
        source = replace(self.source, specs=left)
        assumptions = (*self.assumptions, *noted)
        proof = valid(self.proof, self.entries)
        proof = None if proof is None else replace(proof, plan=entries_hash(entries))
        return Plan(self.like, source, tuple(entries), (), assumptions, (), self.reads, proof)

    # ------------------------------------------------------------ making

    @classmethod
    def build(
        cls,
        source: End,
        like: End,
        proposal: Proposal,
        *,
        partial: bool = False,
    ) -> Plan:
        """A plan of the proposal's entries, with every op bound to its shapes and every misfit collected.

        Unless `partial`, keys of either side that no entry and no question mentions become questions.
        """
        failures = list(proposal.failures)
        entries: list[Entry] = []
        for entry in proposal.entries:
            bound = fit(entry, source, like)
            if isinstance(bound, Failure):
                failures.append(bound)
            entries.append(entry if isinstance(bound, Failure) else bound)
        failures += keys_twice(entries, source, like)
        questions = list(proposal.questions)
        if not partial:
            questions += unmentioned((*entries, *proposal.broken), questions, source, like)
        return cls(
            source, like, tuple(entries), tuple(questions), proposal.assumptions, tuple(failures), proposal.reads
        )

    # ------------------------------------------------------------ text

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{len(self.questions)} questions, {len(self.failures)} misfits"
        return f"Plan({self.source.label!r} -> {self.like.label!r}, {len(self.entries)} entries, {state})"

    def __str__(self) -> str:
        return plan_text(self)

    def as_json(self, candidates: int | None = 10) -> dict[str, Any]:
        """The plan as JSON data, each question with at most `candidates` candidates (None: all). `Plan.from_json` reads
        it."""
        return plan_as_json(self, candidates)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all. StorageError if that fails; PlanError if an op is a Python
        function."""
        write_json(self.as_json(candidates=None), Path(path))

    @classmethod
    def from_json(cls, data: Any, label: str = "plan") -> Plan:
        """The plan that `as_json` gave. RulesError if the data is not a plan; everything is validated again."""
        with damaged_plan(label):
            parts = parts_of_json(data)
            # A failure may hold keys that no entry names; without failures, every key must be named.
            plan = cls.build(*parts.ends, parts.proposal, partial=bool(parts.failures))
        found = tuple(failure for failure in plan.failures if failure not in parts.failures)
        return replace(plan, failures=(*parts.failures, *found), proof=valid(parts.proof, plan.entries))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan saved at `path`. StorageError if it cannot be read, RulesError if it is not a plan."""
        return cls.from_json(read_json(Path(path)), str(path))


_PICKLED = tuple(f.name for f in fields(Plan) if f.name != "made_from")


def _front() -> Any:
    """The library's front, which opens trees and infers plans. It is above plans in the import order, so a plan looks
    it up by name when needed, as `graftax` looks up its own names."""
    return importlib.import_module("graftax.api")


# ---------------------------------------------------------------- checks


def _item(items: Sequence[Any], index: Any, what: str) -> Any:
    """items[index]. UsageError that lists the items."""
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise UsageError(f"{escape(repr(index), 60)} ({type(index).__name__}) is no {what} and no index of one")
    if -len(items) <= index < len(items):
        return items[index]
    shown = [f"{i}: {str(item).splitlines()[0]}" for i, item in enumerate(items[:5])]
    shown += [f"... and {len(items) - 5} more"] * (len(items) > 5)
    raise UsageError(
        f"there is no {what} {index}: there are {len(items)}" if items else f"there is no {what}", next="\n".join(shown)
    )


def _without_candidates(question: Question) -> str:
    """The next step for a question without candidates."""
    if question.candidates:
        return ""
    policies = {
        "missing": f"{option('missing', 'zeros')} or {option('missing', 'keep')}",
        "unused": option("unused", "drop"),
        "shape": f"{option('missing', 'keep')} with {option('unused', 'drop')}, which leaves like's own values",
    }
    return f"Write a rule, or give {policies.get(question.kind, ' or '.join(map(option, ('missing', 'unused'))))}."
