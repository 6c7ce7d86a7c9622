"""Both models of a plan, run to decide and to prove it."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftax.errors import Failure, GraftaxError, RulesError, UsageError, escape, option
from graftax.ops import Drop, Keep, apply_chain, bind_chain, invert_chain
from graftax.plans import Assumption, Entry, Plan, PlanOptions, Proof, Proposal, Question
from graftax.plans.proof import entries_hash
from graftax.probe.flax_side import is_flax
from graftax.probe.inputs import Inputs, inputs_of
from graftax.probe.limits import BYTES, DRAWN, DRAWN_MOST, GIVEN, GROSS, NEAR, RULED
from graftax.rules.state import Named
from graftax.tree import DTYPES, Checkpoint, TensorSpec


@dataclass(slots=True)
class BothModels:
    """The two live models of a plan.

    flipped  the plan goes from Flax to torch
    inputs   None: they are drawn from the example of gx.linen
    settled  what running showed, after `prove`
    """

    module: Any
    model: Any
    source: Checkpoint
    like: Checkpoint
    flipped: bool
    inputs: Inputs | None
    settled: Any = None
    proved: frozenset[str] = field(default_factory=frozenset[str])

    @property
    def is_torch(self) -> bool:
        """True if one of the two is a torch model, the other a Flax model: torch's float64 run is what parity is judged
        against."""
        return is_torch(self.module) and not is_torch(self.model)

    def prove(self, ruled: Proposal, named: Sequence[Named]) -> Proposal:
        """Entries for every leaf that running decides. RulesError if it refutes a rule."""
        from graftax.probe.settle import settle

        loose = {id(item.entry) for item in named}
        fixed = [e for e in ruled.entries if id(e) not in loose and e.targets and not _kept(e)]
        forced = [self._turned(entry) for entry in fixed]
        limits = DRAWN if self.inputs is None else GIVEN
        self.settled = settle(self.module, self.model, self.inputs, limits)
        given = self.like if self.flipped else self.source
        odd = [n for n, entry in enumerate(forced) if not self._as_found(entry, given)]
        if odd or (forced and not self.settled.proved):
            ruled_by = settle(self.module, self.model, self.inputs, RULED if self.settled.proved else limits, forced)
            if self.settled.proved and not ruled_by.proved:
                self._refute([fixed[n] for n in odd], [forced[n] for n in odd])
            self.settled = ruled_by
        if not self.settled.entries:
            return Proposal()
        entries = tuple(self._back(entry) for entry in self.settled.entries)
        if self.settled.partly:
            if self.inputs is None:  # inputs that nobody gave may lie in another way than the model takes them
                return Proposal()
            taken = {name for entry in ruled.entries for name in (*entry.sources, *entry.targets)}
            return Proposal(tuple(e for e in entries if not taken & {*e.sources, *e.targets}))
        self._check_named(entries, named)
        entries = tuple(_with_rules(entry, named) for entry in entries)
        taken = {name for e in ruled.entries if id(e) not in loose for name in (*e.sources, *e.targets)}
        entries = tuple(e for e in entries if not taken & {*e.sources, *e.targets})
        self.proved = frozenset(name for e in (*entries, *fixed) for name in e.targets)
        return self._without_ops(taken).joined(Proposal(entries))

    def _without_ops(self, taken: Collection[str]) -> Proposal:
        """Questions about leaves that were found, and for which graftax has no op; nothing else may take them."""
        questions: list[Question] = []
        broken: list[Entry] = []
        for item in self.settled.unsaid:
            targets, sources = (item.keys, (item.path,)) if self.flipped else ((item.path,), item.keys)
            if item.no_op and not set(taken) & {*targets, *sources}:
                text = f"{item.text}. Make the weight plain first (torch: remove_parametrizations)"
                questions.append(Question("layout", text, targets, sources))
                broken.append(Entry(sources, targets, (), ("found by running both models",)))
        return Proposal((), tuple(questions), broken=tuple(broken))

    def noted(self, plan: Plan) -> Plan:
        """The plan with its proof; assumptions about leaves that are proved are facts."""
        settled = self.settled
        if settled is None:
            return plan
        if not settled.proved:
            return replace(self._not_proved(plan), parted=settled.dead_leaf)
        plan = self._with_unsaid(self._without_buffers(plan))
        known = [a for a in plan.assumptions if a.targets and self.proved.issuperset(a.targets)]
        left = tuple(a for a in plan.assumptions if a not in known)
        proof = Proof(
            len(self.proved),
            settled.open,
            float(settled.error),
            (*dict.fromkeys(_fact(assumption) for assumption in known), *map(_exchanged, settled.symmetries)),
            settled.models,
            settled.inputs,
            entries_hash(plan.entries),
        )
        return replace(plan, assumptions=left, proof=proof)

    def _without_buffers(self, plan: Plan) -> Plan:
        """The plan without questions about buffers of torch that no leaf of Flax holds: the models agree without them,
        so Flax computes the same values, or nothing depends on them."""
        from graftax.adapters import open_live

        kind, end, other = ("missing", self.like, plan.source) if self.flipped else ("unused", self.source, plan.like)
        if not self.is_torch or all(question.kind != kind for question in plan.questions):
            return plan
        ran = end if end.live.object is self.module else open_live(self.module)
        integers = not self.flipped and all(map(_floats, other.specs.values()))

        def computed(name: str) -> bool:
            if name not in ran.live.buffers:
                return False
            return self._ran_with(name, end, ran) if _floats(end.specs[name]) else integers

        gone: set[str] = set()
        questions: list[Question] = []
        for question in plan.questions:
            names, others = question.sources, question.targets
            if self.flipped:
                names, others = others, names
            if question.kind == kind and not others and all(map(computed, names)):
                gone.update(names)
            else:
                questions.append(question)
        made = tuple(self._buffer(name, end.specs[name]) for name in end if name in gone)
        return replace(plan, entries=(*plan.entries, *made), questions=tuple(questions))

    def _buffer(self, name: str, spec: TensorSpec) -> Entry:
        """The entry of a buffer that no leaf holds: dropped, or kept on the way back."""
        evidence = ("proved by running both models",)
        if self.flipped:
            return Entry((), (name,), (Keep(spec.shape, spec.dtype),), evidence)
        reason = "a buffer that no leaf holds; the models agree without it"
        return Entry((name,), (), (Drop(reason, spec.shape, spec.dtype),), evidence)

    def _ran_with(self, name: str, end: Checkpoint, ran: Checkpoint) -> bool:
        """Did the module that ran have these values of a floating buffer, and did all that depends on it show?"""
        import numpy as np

        if self.settled.open or not end.has_values:
            return False
        if end is ran:
            return True
        return not self.module.state_dict()[name].is_meta and np.array_equal(end.read(name), ran.read(name))

    def _with_unsaid(self, plan: Plan) -> Plan:
        """The plan with a question for each leaf that was found, but that no ops write. What names gave such a leaf is
        kept only if it is what was found."""
        entries, questions = list(plan.entries), list(plan.questions)
        for item in self.settled.unsaid:
            if item.no_op:  # asked already
                continue
            wanted = set(item.keys if self.flipped else (item.path,))
            holders = [entry for entry in entries if wanted & set(entry.targets)]
            if holders and all(item.made_by(self._turned(entry)) for entry in holders):
                continue
            entries = [entry for entry in entries if entry not in holders]
            asked = [question for question in questions if wanted & set(question.targets)]
            if asked:
                told = {id(q): replace(q, text=f"{q.text}; {item.text}") for q in asked}
                questions = [told.get(id(question), question) for question in questions]
            else:
                targets = tuple(dict.fromkeys((*wanted, *(name for e in holders for name in e.targets))))
                sources = (item.path,) if self.flipped else item.keys
                questions.append(Question("layout", item.text, targets, sources))
        return replace(plan, entries=tuple(entries), questions=tuple(questions))

    def _not_proved(self, plan: Plan) -> Plan:
        """The plan with what running showed of it."""
        settled = self.settled
        where = f"; the models part at {escape(settled.dead_end, 200)}" if settled.dead_end else ""
        where += f", where {escape(settled.dead_leaf)} is used" if settled.dead_leaf else ""
        check = "gx.check_parity names the layer where the models differ"
        if settled.differs:
            text = f"{escape(settled.stopped, 300)}{where}"
            return replace(plan, assumptions=(*plan.assumptions, Assumption(text, check)))
        entries = [self._turned(entry) for entry in plan.entries if entry.targets and not _kept(entry)]
        error, wrong = settled.tried(entries) if plan.complete else (None, "")
        if error is not None and error <= NEAR:
            return replace(
                plan, proof=Proof(sum(len(e.targets) for e in entries), error=error, plan=entries_hash(plan.entries))
            )
        stopped = escape(settled.stopped, 300)
        if settled.partly and settled.entries and self.inputs is not None:
            found = sum(len(entry.targets) for entry in settled.entries)
            stopped += (
                f" ({found} of {len(plan.like.specs)} leaves were found before; names and shapes settle the others)"
            )
        if wrong or (self.inputs is not None and error is not None and error > GROSS):
            what = f"{escape(wrong)} has its axes in another order" if wrong else "the outputs are far off"
            failure = Failure(
                f"running both models refutes this plan: on redrawn weights {what}{where}",
                plan.source.label,
                plan.like.label,
                next=f"{check}; a rule says what holds; inputs=False does not run the models.",
            )
            return replace(plan, failures=(*plan.failures, failure))
        if error is None and self.inputs is None and not settled.broke:
            return plan
        off = "" if error is None else f"; with this plan the outputs are off by {error:.1e} of the largest"
        text = f"running did not decide the plan: {stopped}{where}{off}"
        return replace(plan, assumptions=(*plan.assumptions, Assumption(text, check)))

    # ------------------------------------------------------------ directions

    def _turned(self, entry: Entry) -> Entry:
        """A rule's entry from torch to Flax."""
        if not self.flipped:
            return entry
        return self._inverted(entry, self.source)

    def _back(self, entry: Entry) -> Entry:
        """A found entry in the direction of the plan."""
        return self._inverted(entry, self.like) if self.flipped else entry

    @staticmethod
    def _inverted(entry: Entry, given: Checkpoint) -> Entry:
        ops, _ = bind_chain(entry.ops, tuple(given.specs[name] for name in entry.sources))
        return Entry(entry.targets, entry.sources, invert_chain(ops), entry.evidence)

    # ------------------------------------------------------------ rules

    def _as_found(self, rule: Entry, given: Checkpoint) -> bool:
        """Does a rule say what running found?"""
        holds = [found for found in self.settled.entries if set(found.targets) & set(rule.targets)]
        return {name for e in holds for name in e.targets} >= set(rule.targets) and all(
            same_effect(rule, found, given.specs) for found in holds
        )

    def _refute(self, rules: Sequence[Entry], forced: Sequence[Entry]) -> None:
        """RulesError: the models agree without these rules, and do not with them."""
        failures: list[Failure] = []
        for rule, entry in zip(rules, forced, strict=True):
            holds = [found for found in self.settled.entries if set(found.targets) & set(entry.targets)]
            lines = ", ".join(self._line(self._back(found)) for found in holds)
            failures.append(
                Failure(
                    "running both models refutes this rule: with it no plan makes the outputs agree; without it they "
                    f"agree to {self.settled.error:.0e}",
                    key=_of_rule(rule.evidence[0] if rule.evidence else "", rule),
                    next=f"What holds: {lines}" if lines else "",
                )
            )
        raise RulesError("rules that the models contradict:", failures)

    def _check_named(self, entries: Iterable[Entry], named: Sequence[Named]) -> None:
        """RulesError if a rule says that leaves belong together, and running shows otherwise."""
        by_target = {target: entry for entry in entries for target in entry.targets}
        failures: list[Failure] = []
        for item in named:
            found = list(dict.fromkeys(by_target[name] for name in item.entry.targets if name in by_target))
            wrong = [entry for entry in found if not set(item.entry.sources) & set(entry.sources)]
            if not wrong and (item.rule.fused or item.rule.stack) and item.entry.ops:
                specs = self.source.specs
                wrong = [entry for entry in found if not same_parts(item.entry, entry, specs)]
            if wrong:
                lines = ", ".join(self._line(entry) for entry in wrong)
                failures.append(
                    Failure(
                        "running both models refutes this rule: without it the outputs agree to "
                        f"{self.settled.error:.0e}",
                        key=_of_rule(item.rule.where, item.entry),
                        next=f"What holds: {lines}",
                    )
                )
        if failures:
            raise RulesError("rules that the models contradict:", failures)

    def _line(self, entry: Entry) -> str:
        """The rule line of an entry; its text if no rule says it."""
        from graftax.rules.of_plan import RuleWriter

        sides = (self.source.side or "torch", self.like.side or "flax")
        lines = RuleWriter(self.source, self.like, sides).lines([entry])
        return ", ".join(lines) if lines else escape(entry.text, 300)


def _with_rules(entry: Entry, named: Sequence[Named]) -> Entry:
    """The entry with the rules that say so, without its layout, as its first evidence."""
    said = [item.rule.evidence for item in named if set(item.entry.targets) & set(entry.targets)]
    return replace(entry, evidence=(*dict.fromkeys(said), *entry.evidence))


def _floats(spec: TensorSpec) -> bool:
    return DTYPES[spec.dtype][1] == "f"


def _of_rule(where: str, entry: Entry) -> str:
    return f"{where} ({escape(entry.text, 200)})" if where else escape(entry.text, 200)


def _kept(entry: Entry) -> bool:
    return any(isinstance(op, (Keep, Drop)) for op in entry.ops)


def _fact(assumption: Assumption) -> str:
    return f"{assumption.text}: proved"


def _exchanged(pair: tuple[str, str]) -> str:
    one, other = map(escape, pair)
    return f"{one} and {other} are interchangeable: exchanged, they make the same outputs; the first order is taken"


def same_parts(rule: Entry, found: Entry, specs: Mapping[str, TensorSpec]) -> bool:
    """Do two entries put the same elements of the sources into each leaf that both fill, and into each slice of a
    stacked one, in whatever order? So much a rule says that leaves the layout open."""
    import numpy as np

    from graftax.ops import Stack

    start, numbered = 0, {}
    for name in sorted({*rule.sources, *found.sources}):
        numbered[name] = np.arange(start, start + specs[name].size, dtype=np.float64).reshape(specs[name].shape)
        start += specs[name].size
    axis = next((op.axis for op in reversed(rule.ops) if isinstance(op, Stack)), None)
    for pair in _made(rule, found, numbered):
        parts = [np.moveaxis(a, axis, 0) if axis is not None else a[None] for a in pair]
        flat = [np.sort(part.reshape(len(part), -1), axis=1) for part in parts]
        if not np.array_equal(flat[0], flat[1]):
            return False
    return True


def same_effect(rule: Entry, found: Entry, specs: Mapping[str, TensorSpec]) -> bool:
    """Do two entries give every leaf that both fill the same values, for any values? Tried on random ones."""
    import numpy as np

    random = np.random.default_rng(0)
    drawn = {
        name: random.standard_normal(specs[name].shape).astype(np.float32)
        for name in sorted({*rule.sources, *found.sources})
        if name in specs
    }
    return all(np.array_equal(one, other) for one, other in _made(rule, found, drawn))


def _made(rule: Entry, found: Entry, arrays: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """What both entries make of these arrays, for each leaf that both fill; two that differ if one of them cannot."""
    import numpy as np

    try:
        one, other = (
            dict(zip(e.targets, apply_chain(e.ops, tuple(arrays[n] for n in e.sources)), strict=True))
            for e in (rule, found)
        )
    except (GraftaxError, KeyError, ValueError):
        return [(np.zeros(1), np.ones(1))]
    return [(one[name], other[name]) for name in sorted(one.keys() & other.keys())]


def both_models(source: Checkpoint, like: Checkpoint | None, options: PlanOptions) -> BothModels | None:
    """The live models of both ends; None if there are not two, or `inputs` is False. `options.source_model` is the live
    model of a source that is a file.

    UsageError if inputs are given and a model is missing.
    """
    given = options.inputs
    if like is None or given is False:
        return None
    ends = [source.live.object if options.source_model is None else options.source_model, like.live.object]
    flipped = is_flax(ends[0]) and is_torch(ends[1])
    origin, flax_end = ends[::-1] if flipped else ends
    both_torch = is_torch(origin) and is_torch(flax_end) and given is not None  # torch has no example to draw from
    if not both_torch and not ((is_torch(origin) or is_flax(origin)) and is_flax(flax_end)):
        if given is None:
            return None
        lacking = [
            end.label
            for end, live in zip((source, like), ends, strict=True)
            if not is_torch(live) and not is_flax(live)
        ]
        ways = (
            f"{option('source_model', 'M:F')} names the live model of a source that is a file; like is then live too."
        )
        raise UsageError(f"inputs need both models live; {', '.join(map(escape, lacking))} has only weights", next=ways)
    if not _room(source, given):
        return None
    inputs = None if given is None else inputs_of(given, options.layout)
    torch_tree, flax_tree = (like, source) if flipped else (source, like)
    for end, tree in ((origin, torch_tree), (flax_end, flax_tree)):
        if not set(tree.specs) <= _keys(end):
            if given is None:
                return None
            raise UsageError(
                f"the live model and {escape(tree.label)} have other keys",
                next="Give the model whose weights they are.",
            )
    return BothModels(origin, flax_end, source, like, flipped, inputs)


def _room(source: Checkpoint, given: Any) -> bool:
    """Is there memory to run both models? UsageError if there is not, and inputs are given."""
    size = sum(spec.size for spec in source.specs.values())
    if given is None:
        return size <= DRAWN_MOST
    needed, there = size * BYTES, _memory()
    if there is not None and needed > there:
        raise UsageError(
            f"running both models takes about {needed / 2**30:.1f} GiB ({BYTES} bytes for each of {size:,} weights), "
            f"and the machine has {there / 2**30:.1f} GiB",
            next="Prove a small configuration of the same code, and port with gx.suggest(plan): docs/proof.md. "
            "inputs=False does not run the models.",
        )
    return True


def _memory() -> int | None:
    """The machine's memory in bytes; None if it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _keys(model: Any) -> set[str]:
    """The keys of a model's weights and buffers."""
    if is_torch(model):
        return set(model.state_dict())
    from graftax.adapters import open_live

    return set(open_live(model, None, None).specs)


def is_torch(obj: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.nn.Module)
