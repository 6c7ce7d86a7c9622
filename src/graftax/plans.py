"""Plans: what goes where, and how. Pure data made from names, shapes and dtypes, separate from its execution.

An entry is a group and the unit of meaning: sources -> ops -> targets. Every key stands in exactly one entry a side, so
the resolved plan inverts: swap the sides, reverse the ops.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from graftax.errors import Failure, GraftaxError, PlanError, UsageError, counted, escape, option, worded
from graftax.ops import Drop, Fill, Keep, Op, Specs, bind_chain, chain_text, invert_chain
from graftax.tree import Checkpoint, Key, Side, TensorSpec


@dataclass(frozen=True, slots=True)
class End:
    """One side of a plan: what it is called, its names and specs, what its containers need to come back, and what
    stands beside the weights and takes no part (name -> what it is)."""

    label: str
    side: Side
    specs: Mapping[str, TensorSpec]
    real_keys: Mapping[str, Key] = field(default_factory=dict[str, Key])
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    left: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, checkpoint: Checkpoint, side: Side) -> End:
        specs, keys, containers = checkpoint.specs, checkpoint.real_keys, checkpoint.containers
        return cls(checkpoint.label, side, specs, keys, containers, checkpoint.left)


@dataclass(frozen=True, slots=True)
class Entry:
    """sources -> ops -> targets, and what decided it, the strongest evidence first."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    evidence: tuple[str, ...] = ()

    @property
    def dropped(self) -> str | None:
        """Why the source goes nowhere, for an entry that drops it."""
        return self.ops[-1].reason if self.ops and isinstance(self.ops[-1], Drop) else None

    @property
    def lost(self) -> bool:
        """Dropped for good: nothing says what it should be on the way back."""
        last = self.ops[-1] if self.ops else None
        return isinstance(last, Drop) and last.fill is None and not last.keep

    @property
    def unfilled(self) -> bool:
        """The targets come from no source: filled with a constant or kept from like."""
        return bool(self.ops) and isinstance(self.ops[0], (Fill, Keep))

    @property
    def exact(self) -> bool:
        return all(op.exact for op in self.ops)

    @property
    def text(self) -> str:
        return f"{', '.join(self.sources) or '()'} -> {', '.join(self.targets) or '()'}: {chain_text(self.ops)}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to a question: the rule line that picks it (paste-ready; several inline tables, where it takes more
    than one rule) and what speaks for it."""

    rule: str
    sources: tuple[str, ...] = ()
    evidence: str = ""

    def __str__(self) -> str:
        rules = ",\n      ".join(escape(rule, 400) for rule in re.split(r"(?<= }), (?={ )", self.rule))
        return f"{rules}{f'   # {escape(self.evidence, 200)}' if self.evidence else ''}"


@dataclass(frozen=True, slots=True)
class Question:
    """What inference cannot know. `kind` is a word (match, layout, flatten, fused, stack, shape, missing, unused);
    `targets` and `sources` are the leaves that wait for the answer; each candidate carries the rule line that settles
    it."""

    kind: str
    text: str
    targets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def __str__(self) -> str:
        from graftax.plan_text import fold_names

        waiting = [name for name in fold_names(self.targets) if name not in self.text]
        also = f" (also waiting: {', '.join(waiting[:6])}{', ...' * (len(waiting) > 6)})" if waiting else ""
        lines = [escape(self.text, 600) + also]
        lines += [f"    {candidate}" for candidate in self.candidates[:10]]
        if len(self.candidates) > 10:
            lines.append(f"    ... and {len(self.candidates) - 10} more candidates")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "text": self.text,
            "targets": list(self.targets),
            "sources": list(self.sources),
            "candidates": [
                {"rule": c.rule, "sources": list(c.sources), "evidence": c.evidence} for c in self.candidates[:10]
            ],
        }


PARITY = "graftax verify, or gx.check_parity: one input through both models"
"""The check that proves what only the models' outputs show."""


@dataclass(frozen=True, slots=True)
class Assumption:
    """What no file can show and the plan relies on, with the check that proves it."""

    text: str
    check: str
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{escape(self.text, 400)} (to prove it: {escape(self.check, 200)})"

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "check": self.check, "targets": list(self.targets)}


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a producer found: entries for what is settled, questions for what is not. `reads` says which values were
    read while planning, and why; `broken` holds the keys (no ops) that a failure speaks for already."""

    entries: tuple[Entry, ...] = ()
    questions: tuple[Question, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    failures: tuple[Failure, ...] = ()
    reads: tuple[str, ...] = ()
    broken: tuple[Entry, ...] = ()

    def joined(self, other: Proposal) -> Proposal:
        """Both proposals as one."""
        return Proposal(
            self.entries + other.entries,
            self.questions + other.questions,
            self.assumptions + other.assumptions,
            self.failures + other.failures,
            self.reads + other.reads,
            self.broken + other.broken,
        )


@lru_cache(maxsize=65536)
def _bound(ops: tuple[Op, ...], specs: Specs) -> tuple[tuple[Op, ...], Specs]:
    return bind_chain(ops, specs)


Runner = Callable[..., Any]
Replanner = Callable[["Plan", str], "Plan"]


@dataclass(slots=True, eq=False)
class Plan:
    """What goes where, and how; `print` it to review it. `complete` when nothing is open and everything fits.

    entries, questions, assumptions, failures, reads: as producers found them. `runner` and `replanner` are set by the
    library's front (they read values and infer again); a plan without them is still data.
    """

    source: End
    like: End
    entries: tuple[Entry, ...] = ()
    questions: tuple[Question, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    failures: tuple[Failure, ...] = ()
    reads: tuple[str, ...] = ()
    runner: Runner | None = field(default=None, repr=False)
    replanner: Replanner | None = field(default=None, repr=False)

    # ------------------------------------------------------------ state

    @property
    def complete(self) -> bool:
        """Every leaf of like is filled, every source accounted for, every shape and dtype fits, nothing is open."""
        return not self.questions and not self.failures

    @property
    def lossless(self) -> bool:
        """Every entry gives back every bit on the way back, whatever the values; dropped tensors apart."""
        return all(entry.exact for entry in self.entries if entry.dropped is None)

    def require_complete(self, way_out: str = "") -> None:
        """PlanError with every question and failure, unless the plan is complete. `way_out`: what to do about it, where
        that is not to write rules."""
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

    def run(self, source: Any, **options: Any) -> Any:
        """The tree that this plan makes of `source`, in like's own kind of container. PlanError if incomplete.

        options: sharding, rngs and receipt, as in `graftax.port`.
        """
        self.require_complete()
        if self.runner is None:
            raise UsageError("this plan has no runner; use gx.plan, gx.load_plan or execute.run_plan")
        return self.runner(self, source, **options)

    def answer(self, question: Question | int, choice: Candidate | int | str) -> Plan:
        """Settle a question by one of its candidates (the object, its index, or a rule line) and plan again: answering
        one narrows the others. Changes this plan in place and returns it. UsageError for an index that is not there."""
        asked = self._asked(question)
        if not isinstance(choice, (str, Candidate)):
            choice = cast("Candidate", _item(asked.candidates, choice, "candidate"))
        rule = choice.rule if isinstance(choice, Candidate) else choice
        if self.replanner is None:
            raise UsageError("a plan read from a file cannot be answered; plan again with the rule", next=rule)
        new = self.replanner(self, rule)
        for name in ("entries", "questions", "assumptions", "failures", "reads", "replanner", "runner"):
            setattr(self, name, getattr(new, name))
        return self

    def _asked(self, question: Question | int) -> Question:
        return question if isinstance(question, Question) else _item(self.questions, question, "question")

    @property
    def inverse(self) -> Plan:
        """The plan back: sides swapped, ops reversed and inverted. PlanError if incomplete.

        A tensor that was dropped for good (no fill was stated) is left out, never made up, and an assumption names it.
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
                "load_state_dict names what it misses",
                (name,),
            )
            for name, why in lost.items()
        )
        source = replace(self.source, specs=left)
        assumptions = (*self.assumptions, *noted)
        return Plan(self.like, source, tuple(entries), (), assumptions, (), self.reads, self.runner)

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
        """A plan of the proposal's entries, every op bound to its shapes and every misfit collected.

        Keys of either side that no entry and no question mentions become questions, unless `partial`.
        """
        failures = list(proposal.failures)
        entries: list[Entry] = []
        for entry in proposal.entries:
            bound = _fit(entry, source, like)
            if isinstance(bound, Failure):
                failures.append(bound)
            entries.append(entry if isinstance(bound, Failure) else bound)
        failures += _counted(entries, source, like)
        questions = list(proposal.questions)
        if not partial:
            questions += _leftover((*entries, *proposal.broken), questions, source, like)
        return cls(
            source, like, tuple(entries), tuple(questions), proposal.assumptions, tuple(failures), proposal.reads
        )

    # ------------------------------------------------------------ text

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{len(self.questions)} questions, {len(self.failures)} misfits"
        return f"Plan({self.source.label!r} -> {self.like.label!r}, {len(self.entries)} entries, {state})"

    def __str__(self) -> str:
        from graftax.plan_text import plan_text

        return plan_text(self)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data; `Plan.from_json` reads it."""
        from graftax.plan_json import plan_as_json

        return plan_as_json(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all. StorageError where that fails; PlanError where an op is a Python
        function."""
        from graftax.plan_json import save_plan

        save_plan(self, path)

    @classmethod
    def from_json(cls, data: Any, label: str = "plan") -> Plan:
        """The plan that `as_json` gave. RulesError where the data is not one; everything is validated again."""
        from graftax.plan_json import plan_from_json

        return plan_from_json(data, label)


# ---------------------------------------------------------------- checks


def _item(items: Sequence[Any], index: Any, what: str) -> Any:
    """items[index]. UsageError that lists what there is."""
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise UsageError(f"{escape(repr(index), 60)} ({type(index).__name__}) is no {what} and no index of one")
    if -len(items) <= index < len(items):
        return items[index]
    shown = [f"{i}: {str(item).splitlines()[0]}" for i, item in enumerate(items[:5])]
    shown += [f"... and {len(items) - 5} more"] * (len(items) > 5)
    raise UsageError(
        f"there is no {what} {index}: there are {len(items)}" if items else f"there is no {what}", next="\n".join(shown)
    )


def _fit(entry: Entry, source: End, like: End) -> Entry | Failure:
    """The entry with bound ops, or why it does not fit."""
    try:
        given = tuple([source.specs[name] for name in entry.sources])
        wanted = tuple([like.specs[name] for name in entry.targets])
    except KeyError as error:
        (name,) = error.args
        end = source if name in entry.sources and name not in source.specs else like
        return Failure(f"{escape(end.label)} has no such key", key=name, next="Check the spelling in the rule.")
    try:
        ops, found = _bound(entry.ops, given)
        if found == wanted:
            return entry if ops is entry.ops else Entry(entry.sources, entry.targets, ops, entry.evidence)
    except GraftaxError as error:
        why = f"It was decided by: {'; '.join(entry.evidence)}." if entry.evidence else ""
        return Failure(str(error), file=source.label, key=_ends_text(entry), next=why)
    text = _ends_text(entry)
    if len(found) != len(wanted):
        return Failure("the ops give another number of tensors", "", text, str(len(wanted)), str(len(found)))
    for name, want, have in zip(entry.targets, wanted, found, strict=True):
        if want.shape != have.shape:
            hint = "Its transpose would fit." if want.shape == have.shape[::-1] and len(want.shape) > 1 else ""
            return Failure(f"the shape of {escape(name)} does not fit", source.label, text, str(want), str(have), hint)
        if want.dtype != have.dtype:
            return Failure(f"the dtype of {escape(name)} differs", source.label, text, want.dtype, have.dtype)
    return Entry(entry.sources, entry.targets, ops, entry.evidence)


def _ends_text(entry: Entry) -> str:
    return f"{', '.join(entry.sources) or '()'} -> {', '.join(entry.targets) or '()'}"


def _counted(entries: Iterable[Entry], source: End, like: End) -> list[Failure]:
    """A failure for every key that stands in more than one entry of its side."""
    entries = tuple(entries)
    out: list[Failure] = []
    for counts, end in (
        (Counter(n for e in entries for n in e.sources), source),
        (Counter(n for e in entries for n in e.targets), like),
    ):
        out += [
            Failure(f"stands in {count} entries of the plan", end.label, name, "1", str(count))
            for name, count in counts.items()
            if count > 1
        ]
    return out


def _without_candidates(question: Question) -> str:
    """What to do about a question that offers no answer."""
    if question.candidates:
        return ""
    policies = {
        "missing": f"{option('missing', 'zeros')} or {option('missing', 'keep')}",
        "unused": option("unused", "drop"),
        "shape": f"{option('missing', 'keep')} with {option('unused', 'drop')}, which leaves like's own values",
    }
    return f"Write a rule, or give {policies.get(question.kind, ' or '.join(map(option, ('missing', 'unused'))))}."


def _leftover(entries: Iterable[Entry], questions: Iterable[Question], source: End, like: End) -> list[Question]:
    """A question for every key of either side that nothing mentions."""
    entries, questions = tuple(entries), tuple(questions)
    filled = {n for e in entries for n in e.targets} | {n for q in questions for n in q.targets}
    used = {n for e in entries for n in e.sources} | {n for q in questions for n in q.sources}
    out = [
        Question("missing", f"missing key: {name} {spec}: no source tensor fills it", targets=(name,))
        for name, spec in like.specs.items()
        if name not in filled
    ]
    return out + [
        Question("unused", f"unexpected key: {name} {spec}: no leaf of like takes it", sources=(name,))
        for name, spec in source.specs.items()
        if name not in used
    ]


def with_ops(entry: Entry, *ops: Op) -> Entry:
    """The entry with `ops` after its own."""
    return replace(entry, ops=(*entry.ops, *ops))
