"""Check a plan: every entry fits its shapes and dtypes, and every key is in exactly one entry of its side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache

from graftax.errors import Failure, GraftaxError, escape
from graftax.ops import Op, Specs, bind_chain
from graftax.plans.entries import End, Entry
from graftax.plans.names import NUMBER, fold_names
from graftax.plans.questions import Question


@lru_cache(maxsize=65536)
def _bound(ops: tuple[Op, ...], specs: Specs) -> tuple[tuple[Op, ...], Specs]:
    return bind_chain(ops, specs)


def fit(entry: Entry, source: End, like: End) -> Entry | Failure:
    """The entry with bound ops, or why it does not fit."""
    try:
        given = tuple([source.specs[name] for name in entry.sources])
        wanted = tuple([like.specs[name] for name in entry.targets])
    except KeyError as error:
        (name,) = error.args
        end = source if name in entry.sources and name not in source.specs else like
        return Failure(f"{escape(end.label)} has no such key", key=name, next="Check the spelling in the rule.")
    try:
        # The memo must not keep the arrays that surgery puts into leaves.
        bind = bind_chain if entry.replaced else _bound
        ops, found = bind(entry.ops, given)
        if found == wanted:
            return entry if ops is entry.ops else Entry(entry.sources, entry.targets, ops, entry.evidence)
    except GraftaxError as error:
        why = f"Evidence: {'; '.join(entry.evidence)}." if entry.evidence else ""
        return Failure(str(error), file=source.label, key=_ends_text(entry), next=why)
    text = _ends_text(entry)
    if len(found) != len(wanted):
        return Failure("the ops give a different number of tensors", "", text, str(len(wanted)), str(len(found)))
    for name, want, have in zip(entry.targets, wanted, found, strict=True):
        if want.shape != have.shape:
            hint = "Its transpose would fit." if want.shape == have.shape[::-1] and len(want.shape) > 1 else ""
            return Failure(f"the shape of {escape(name)} does not fit", source.label, text, str(want), str(have), hint)
        if want.dtype != have.dtype:
            return Failure(f"the dtype of {escape(name)} differs", source.label, text, want.dtype, have.dtype)
    return Entry(entry.sources, entry.targets, ops, entry.evidence)


def _ends_text(entry: Entry) -> str:
    return f"{', '.join(entry.sources) or '()'} -> {', '.join(entry.targets) or '()'}"


def keys_twice(entries: Iterable[Entry], source: End, like: End) -> list[Failure]:
    """A failure for every key that is in more than one entry of its side."""
    entries = tuple(entries)
    out: list[Failure] = []
    for counts, end in (
        (Counter(n for e in entries for n in e.sources), source),
        (Counter(n for e in entries for n in e.targets), like),
    ):
        out += [
            Failure(f"is in {count} entries of the plan", end.label, name, "1", str(count))
            for name, count in counts.items()
            if count > 1
        ]
    return out


def unmentioned(entries: Iterable[Entry], questions: Iterable[Question], source: End, like: End) -> list[Question]:
    """Questions for the keys of either side that no entry and no question mentions: one for all keys of one spec that
    differ only in their numbers."""
    entries, questions = tuple(entries), tuple(questions)
    filled = {n for e in entries for n in e.targets} | {n for q in questions for n in q.targets}
    used = {n for e in entries for n in e.sources} | {n for q in questions for n in q.sources}
    out: list[Question] = []
    for names in _columns(like, filled):
        text = _column_text("missing key", names, like, "no source tensor fills {}")
        out.append(Question("missing", text, targets=names))
    for names in _columns(source, used):
        text = _column_text("unexpected key", names, source, "no leaf of like takes {}")
        out.append(Question("unused", text, sources=names))
    return out


def _columns(end: End, known: Collection[str]) -> list[tuple[str, ...]]:
    """The keys that are not known; those of one spec that differ only in their numbers are together."""
    out: dict[object, list[str]] = {}
    for name, spec in end.specs.items():
        if name not in known:
            out.setdefault((NUMBER.sub("\0", name), spec), []).append(name)
    return list(map(tuple, out.values()))


def _column_text(what: str, names: tuple[str, ...], end: End, why: str) -> str:
    first, several = names[0], len(names) > 1
    name = fold_names(names)[0] if several else first
    return f"{what}{'s' if several else ''}: {name} {end.specs[first]}: {why.format('them' if several else 'it')}"
