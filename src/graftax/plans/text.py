"""A plan as text: one line per column, so that hundreds of leaves fit a screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from graftax.errors import escape, some
from graftax.ops import chain_text
from graftax.plans.entries import Entry
from graftax.plans.names import NUMBER, fold_names
from graftax.plans.proof import entries_hash

if TYPE_CHECKING:
    from graftax.plans.plan import Plan


def columns(entries: Iterable[Entry]) -> list[tuple[Entry, list[Entry]]]:
    """Entries that form one column: they differ only in numbers, which count alike on both sides. (first, all), in the
    plan's order. Entries that cross (fc1 -> Dense_1, fc2 -> Dense_0) are columns of their own."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        key = (
            tuple(dict.fromkeys(NUMBER.sub("\0", name) for name in entry.sources)),
            tuple(dict.fromkeys(NUMBER.sub("\0", name) for name in entry.targets)),
            chain_text(entry.ops),
            entry.evidence,
        )
        groups.setdefault(key, []).append(entry)
    out: list[tuple[Entry, list[Entry]]] = []
    for group in groups.values():
        out += [(group[0], group)] if _straight(group) else [(entry, [entry]) for entry in group]
    return out


def _straight(group: Sequence[Entry]) -> bool:
    """True if the order by the sources' numbers is the order by the targets' numbers."""
    if any(not entry.sources or not entry.targets for entry in group):
        return True
    by_source = sorted(group, key=lambda entry: _numbers(entry.sources))
    return by_source == sorted(by_source, key=lambda entry: _numbers(entry.targets))


def _numbers(names: Sequence[str]) -> list[list[int]]:
    return [[int(n) for n in NUMBER.findall(name)] for name in names]


def column_rows(plan: Plan) -> list[dict[str, str | int]]:
    """One row per column: sources, targets, ops, how many entries, and the evidence."""
    rows: list[dict[str, str | int]] = []
    for first, group in columns(plan.entries):
        rows.append(
            {
                "sources": ", ".join(fold_names(n for entry in group for n in entry.sources)) or "()",
                "targets": ", ".join(fold_names(n for entry in group for n in entry.targets)) or "()",
                "ops": chain_text(first.ops),
                "count": len(group),
                "evidence": escape("; ".join(first.evidence), 200),
            }
        )
    return rows


def lossless_text(plan: Plan) -> str:
    """`lossless: yes`, or the entries that are not lossless."""
    replaced = sum(entry.replaced for entry in plan.entries)
    lossy = [entry for entry in plan.entries if not (entry.exact or entry.replaced) and entry.dropped is None]
    dropped = sum(entry.dropped is not None for entry in plan.entries)
    counts = [f"{n} {what}" for n, what in ((dropped, "dropped"), (replaced, "replaced")) if n]
    aside = f" ({', '.join(counts)}, listed above)" if counts else ""
    if not lossy:
        return f"lossless: yes{aside}"
    names = fold_names(n for entry in lossy for n in entry.targets)
    return f"lossless: but for {len(lossy)} of {len(plan.entries)} entries, measured when run: {some(names, 6)}{aside}"


def left_out(left: Mapping[str, str], shown: int = 12) -> str:
    """What an end holds besides the weights, in one line: `opt_state (an optimizer's state, 9 leaves), step`."""
    names = [f"{escape(name)} ({escape(what, 60)})" for name, what in list(left.items())[:shown]]
    return ", ".join(names) + (f" and {len(left) - shown} more" if len(left) > shown else "")


def left_out_lines(plan: Plan) -> list[str]:
    """A line for each end of a plan that holds more than its weights."""
    ends = (plan.source, plan.like)
    return [
        f"left out of {escape(end.label)} (only its weights are ported): {left_out(end.left)}"
        for end in ends
        if end.left
    ]


def plan_text(plan: Plan) -> str:
    """The whole plan: columns, what was left out and what was read, questions, assumptions, misfits, and whether it is
    lossless."""
    lines = [
        f"{escape(plan.source.label)} ({plan.source.side}, {len(plan.source.specs)} tensors)"
        f" -> {escape(plan.like.label)} ({plan.like.side}, {len(plan.like.specs)} leaves)"
    ]
    rows = column_rows(plan)
    for row in rows:
        many = f"   x{row['count']}" if row["count"] != 1 else ""
        why = f"   {row['evidence']}" if row["evidence"] else ""
        lines.append(f"  {row['sources']} -> {row['targets']}   {row['ops']}{many}{why}")
    lines += left_out_lines(plan)
    if plan.reads:
        lines += ["read while planning:", *(f"  {escape(read, 300)}" for read in plan.reads)]
    if plan.assumptions:
        lines += ["assumptions:", *(f"  {assumption}" for assumption in plan.assumptions)]
    if plan.questions:
        lines += [f"questions ({len(plan.questions)}):", *(f"  {question}" for question in plan.questions)]
    if plan.failures:
        lines += [f"misfits ({len(plan.failures)}):", *(f"  {failure}" for failure in plan.failures)]
    if plan.proof is not None and plan.proof.plan == entries_hash(plan.entries):
        lines.append(f"proof: {plan.proof}")
        lines += [f"  settled: {escape(fact, 400)}" for fact in plan.proof.facts]
    lines.append(lossless_text(plan))
    lines.append("complete: yes" if plan.complete else "complete: no")
    return "\n".join(lines)


def by_reason(reasons: Mapping[str, str], shown: int) -> list[tuple[str, int, str]]:
    """Names that share a reason, folded: (reason, how many, 'bn{1..9}.num_batches_tracked, ... and 3 more')."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    out: list[tuple[str, int, str]] = []
    for reason, names in groups.items():
        folded = fold_names(names)
        more = f" and {len(folded) - shown} more" if len(folded) > shown else ""
        out.append((reason, len(names), ", ".join(folded[:shown]) + more))
    return out
