"""Make a plan: first the user's rules, then inference, then the policies for what is left, then dtypes.

Producers propose entries. This module settles the sides, the leftovers and the dtypes, and proves that everything fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from graftax.errors import Failure, PlanError, UsageError, escape, option
from graftax.match import infer
from graftax.match.assumptions import overridden, unseen
from graftax.match.bare_rules import merged
from graftax.match.missing_keys import settle_leftovers
from graftax.match.quantized import refuse_quantized
from graftax.match.unmerged import refuse_unmerged
from graftax.match.whole_layers import by_table
from graftax.ops import CONDITIONS, Cast, Fill, Same, apply_chain, infer_chain
from graftax.plans import Assumption, End, Entry, Plan, PlanOptions, Proposal, with_ops
from graftax.plans.options import Dtype
from graftax.plans.plan import MadeFrom
from graftax.rules import RuleOutcome, apply_rules, load_rules
from graftax.rules.state import Named
from graftax.tree import DTYPES, Checkpoint, Side, Storage, TensorSpec, match_paths, nearest
from graftax.tree.gc_paused import gc_paused
from graftax.tree.placeholders import refuse_placeholders
from graftax.tree.sides import OTHER, Signs

Prover = Callable[[Proposal, Sequence[Named]], Proposal]
"""(what the rules decided, the rules that state only what belongs together) -> entries for the leaves that running both
models proves."""


@gc_paused()  # with a hundred thousand entries, garbage collection would take a quarter of the time
def make_plan(source: Checkpoint, like: Checkpoint | None, options: PlanOptions, prove: Prover | None = None) -> Plan:
    """The plan for `source` -> `like`. It holds its questions and misfits; they are not raised.

    like=None: the rules alone state what comes out. prove: decides leaves before anything is inferred. Raises
    UsageError, RulesError, PlanError (sides, quantized source).
    """
    options.check()
    refuse_quantized(source)
    refuse_placeholders(source.specs, escape(source.label))
    rules = load_rules(options.rules)
    given = like
    source_side, like_side = _sides(source, like, options, bool(rules.rules))
    ruled = apply_rules(rules, source, like, source_side, like_side)
    if like is None:
        like = _like_of_rules(source, ruled, like_side)
        found = Proposal()
    else:
        open_ = (*ruled.named, *(Named(item.rule, entry) for item in ruled.unlaid for entry in item.entries))
        proved = Proposal() if prove is None else prove(ruled.proposal, open_)
        ruled = _without_guesses(ruled, proved)
        tabled = proved.joined(by_table(source, like, source_side, like_side, ruled.proposal.joined(proved)))
        known = ruled.proposal.joined(tabled)
        spoken = replace(known, entries=known.entries + known.broken)  # nothing else may take these keys
        refuse_unmerged(source, like, (name for e in spoken.entries for name in (*e.sources, *e.targets)))
        found = tabled.joined(infer(source, like, source_side, like_side, spoken, None, ruled.named, ruled.missing))
    proposal = merged(ruled.proposal, found, ruled.named)
    sides = source_side, like_side
    spoken = {name for entry in ruled.proposal.entries for name in entry.targets}
    proposal = settle_leftovers(proposal, source, like, sides, ruled.missing, options.missing, options.unused, spoken)
    assumed = *_by_names(source, like, options), *proposal.assumptions, *unseen(proposal.entries, source, like, sides)
    assumed += overridden(proposal.entries, source, like, sides)
    proposal = replace(proposal, assumptions=assumed)
    proposal, specs = _settle_dtypes(proposal, source, like, options)
    ends = End.of(source, source_side), replace(End.of(like, like_side), specs=specs)
    plan = Plan.build(*ends, proposal)
    made_from = MadeFrom(source, given, replace(options, rules=rules))
    return replace(plan, failures=plan.failures + _conditions(plan.entries, source), made_from=made_from)


def _without_guesses(ruled: RuleOutcome, proved: Proposal) -> RuleOutcome:
    """What the rules settle, without the layouts that silent rules leave to inference, where they are proved."""
    held = {name for entry in proved.entries for name in entry.targets}
    done = {id(item.entry) for item in ruled.named if held.intersection(item.entry.targets)}
    keys = {item.failure.key for item in ruled.named if id(item.entry) in done and item.failure is not None}
    laid = [item for item in ruled.unlaid if held.issuperset(name for e in item.entries for name in e.targets)]
    filled = {name for item in laid for entry in item.entries for name in entry.targets}
    answered = [failure for item in laid for failure in item.failures]
    if not done and not laid:
        return ruled
    left = [failure for failure in ruled.proposal.failures if failure.key not in keys]
    proposal = replace(
        ruled.proposal,
        entries=tuple(entry for entry in ruled.proposal.entries if id(entry) not in done),
        broken=tuple(e for e in ruled.proposal.broken if id(e) not in done and not filled.issuperset(e.targets)),
        failures=tuple(failure for failure in left if not any(failure is other for other in answered)),
    )
    return replace(ruled, proposal=proposal, named=tuple(n for n in ruled.named if id(n.entry) not in done))


# ---------------------------------------------------------------- sides


def _sides(source: Checkpoint, like: Checkpoint | None, options: PlanOptions, ruled: bool) -> tuple[Side, Side]:
    """The sides of both ends: as stated, as declared, or as all names show. UsageError if nothing shows a side, or if
    the stated side is not the declared one. If the names of a source show nothing, its side is the opposite of a stated
    `to` (`_by_names` records that), or of what the rules alone describe."""
    found: list[Side | None] = []
    said: tuple[tuple[Checkpoint | None, Side | None, str], ...]
    said = (source, options.source_side, "source_side"), (like, options.to, "to")
    for end, stated, name in said:
        if end is not None and stated is not None and end.side is not None and stated != end.side:
            raise UsageError(
                f"{option(name, stated)}, but {escape(end.label)} is a {end.side} tree",
                next=f"Leave it out, or give {'a like' if end is like else 'a source'} of that side.",
            )
        found.append(stated or (end.side if end is not None else None))
    source_side, like_side = found
    if source_side is None and like_side is not None and ((like is None and ruled) or _silent(source, options)):
        source_side = OTHER[like_side]
    if like is None:
        like_side = like_side or (OTHER[source_side] if source_side else None)
    if source_side is None:
        raise _undecided(source, "source_side")
    if like_side is None:
        raise _undecided(like or source, "to")
    return source_side, like_side


def _silent(source: Checkpoint, options: PlanOptions) -> bool:
    """True if nothing in the source shows its side, so that only a stated `to` decides."""
    return options.to is not None and source.side_by == "names" and Signs.of(source).silent


def _undecided(end: Checkpoint, name: str) -> UsageError:
    """The error for an end whose side nothing shows: what was found, and the option `name` that states the side."""
    names = ", ".join(escape(name) for name in list(end)[:4]) + (", ..." if len(end) > 4 else "")
    signs = Signs.of(end).text
    if end.side_by == "metadata":
        declared = end.storage.metadata.get("format")
        says = f"its metadata say format={escape(declared)}" if declared else "its arrays are jax's"
        whose = "are the other side's" if declared else "may be torch's"
        what = f"contradicts itself: {says}, its names {whose}: {names} ({signs})"
    else:
        what = f"declares no side, and its names do not show whether it is torch or Flax: {names} ({signs})"
    ways = f"{option(name, 'torch')} or {option(name, 'flax')}"
    return UsageError(f"{escape(end.label)} {what}", next=f"Say what it is: {ways}.")


def _by_names(source: Checkpoint, like: Checkpoint | None, options: PlanOptions) -> list[Assumption]:
    """An assumption for each end whose side only its names decided, and for a source whose side is the opposite of
    `to`."""
    out: list[Assumption] = []
    if source.side is None and options.source_side is None and options.to is not None and _silent(source, options):
        other, named = OTHER[options.to], option("to", options.to)
        text = f"side: {escape(source.label)} shows no side; with {named} the plan assumes that it is {other}"
        out.append(Assumption(text, f"{option('source_side', other)} states it"))
    for end, name in ((source, "source_side"), (like, "to")):
        if end is not None and end.side is not None and end.side_by == "names":
            shown = f"{'Flax' if end.side == 'flax' else end.side} ({Signs.of(end).text})"
            text = f"side: {escape(end.label)} does not say whether it is torch or Flax; its names look like {shown}"
            out.append(Assumption(text, f"{option(name, end.side)} states it"))
    return out


def _like_of_rules(source: Checkpoint, ruled: RuleOutcome, side: Side) -> Checkpoint:
    """The tree that the rules alone describe."""
    if not ruled.targets and not ruled.proposal.failures:
        raise UsageError("nothing says what to produce: give --like, --plan, or rules that name the targets")
    return Checkpoint(label="the rules", side=side, specs=dict(ruled.targets), storage=Storage(format="rules"))


# ---------------------------------------------------------------- dtypes


def _settle_dtypes(
    proposal: Proposal, source: Checkpoint, like: Checkpoint, options: PlanOptions
) -> tuple[Proposal, Mapping[str, TensorSpec]]:
    """Casts after the ops, as the user asked, and like's specs with the dtypes that come out.

    Without a policy, a floating dtype that differs from like's is a misfit, and the failure shows both options.
    """
    policies = _policies(list(like), options.dtype, like.side or options.to or "flax")
    specs = dict(like.specs)
    entries: list[Entry] = []
    failures: list[Failure] = []
    for entry in proposal.entries:
        if entry.unfilled or not entry.targets:
            entries.append(_with_wanted_fill(entry, specs, policies))
            continue
        dtypes = _dtypes_out(entry, source)
        casts: list[Cast] = []
        for name, have in zip(entry.targets, dtypes, strict=False):
            if name not in specs:
                continue  # Plan.build names the key that like does not have
            policy, spec = policies.get(name), specs[name]
            want = _wanted(policy, have, spec)
            if want != spec.dtype:
                specs[name] = TensorSpec(spec.shape, want)
            if want == have:
                continue
            if policy is None or DTYPES[have][1] != "f" or DTYPES[want][1] != "f":
                failures.append(_dtype_failure(entry, name, have, want, policy, source))
                specs[name] = TensorSpec(spec.shape, have)  # the shape is judged apart
            else:
                casts.append(Cast(have, want, options.overflow))
        if casts and len(set(casts)) == 1 and len(casts) == len(entry.targets):
            entry = with_ops(entry, casts[0])
        elif casts:
            text = "its targets have different dtypes: " + ", ".join(specs[n].dtype for n in entry.targets)
            failures.append(Failure(text, like.label, ", ".join(entry.targets), next="Give them one dtype."))
        entries.append(entry)
    return replace(proposal, entries=tuple(entries), failures=proposal.failures + tuple(failures)), specs


def _policies(paths: Sequence[str], dtype: Dtype | Mapping[str, Dtype] | None, side: Side) -> dict[str, str | None]:
    if not isinstance(dtype, Mapping):
        return dict.fromkeys(paths, dtype)
    out: dict[str, str | None] = dict.fromkeys(paths)
    exact = [selector for selector in dtype if selector in out]
    for selector in (*(s for s in dtype if s not in out), *exact):
        found = match_paths(paths, selector, side)
        if not found:
            near = nearest(selector, paths)
            text = f"dtype selector {escape(selector)!r} matches nothing"
            raise PlanError(text, next=f"Near: {near}" if near else "")
        for path in found:
            out[path] = dtype[selector]
    return out


def _wanted(policy: str | None, have: str, spec: TensorSpec) -> str:
    if policy == "source":
        return have
    if policy in (None, "like") or DTYPES[have][1] != "f":
        return spec.dtype
    return policy


def _with_wanted_fill(entry: Entry, specs: dict[str, TensorSpec], policies: Mapping[str, str | None]) -> Entry:
    """A filled leaf gets the dtype that a policy names, else like's."""
    if not entry.targets or not isinstance(entry.ops[0], Fill):
        return entry
    (name,), fill = entry.targets, entry.ops[0]
    policy = policies.get(name)
    if policy in (None, "like", "source") or DTYPES[fill.dtype][1] != "f":
        return entry
    specs[name] = TensorSpec(specs[name].shape, policy)
    return replace(entry, ops=(replace(fill, dtype=policy), *entry.ops[1:]))


def _dtypes_out(entry: Entry, source: Checkpoint) -> list[str]:
    """The dtype of each target; that of the first source if the ops do not fit (Plan.build says why)."""
    given = [source.specs[name] for name in entry.sources if name in source.specs]
    first = given[0].dtype if given else "float32"
    if len({spec.dtype for spec in given}) < 2:
        return [first] * len(entry.targets)
    try:
        return [spec.dtype for spec in infer_chain(entry.ops, tuple(given))]
    except PlanError:
        return [first] * len(entry.targets)


def _dtype_failure(entry: Entry, name: str, have: str, want: str, policy: str | None, source: Checkpoint) -> Failure:
    floats = DTYPES[have][1] == "f" and DTYPES[want][1] == "f"
    ways = (
        f"{option('dtype', 'like')} casts to like's dtype, {option('dtype', 'source')} keeps the source's."
        if floats
        else f"A cast touches floating leaves only: {option('dtype', 'source')} keeps it, or change the dtype in like."
    )
    text = (
        "the dtype differs" if policy is None else f"the dtype differs, and {option('dtype', policy)} does not cover it"
    )
    return Failure(text, source.label, f"{', '.join(entry.sources)} -> {name}", want, have, ways)


# ---------------------------------------------------------------- conditions


def _conditions(entries: Iterable[Entry], source: Checkpoint) -> tuple[Failure, ...]:
    """Failures of ops that are valid only for some values. They are found while planning, before data moves."""
    if not source.has_values:
        return ()
    out: list[Failure] = []
    for entry in entries:
        checked = [i for i, op in enumerate(entry.ops) if isinstance(op, CONDITIONS) and not isinstance(op, Same)]
        if not checked or not all(name in source for name in entry.sources):
            continue
        try:
            apply_chain(entry.ops[: checked[-1] + 1], tuple(source.read(name) for name in entry.sources))
        except PlanError as error:
            out.append(Failure(str(error), source.label, entry.text))
    return tuple(out)
