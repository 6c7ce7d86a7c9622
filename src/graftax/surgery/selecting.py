"""Find the leaves that a selector picks, and the value that each of them takes.

A selector is a path, a glob, a predicate `(path, leaf) -> bool`, an nnx filter (a Variable type, or an object from
nnx.All, nnx.Not and the like), or a list of selectors. A path or a glob may end in an index: then it picks that part of
each leaf. Failures are collected, not raised; only an object that is not a selector raises UsageError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, cast

from graftax.errors import Failure, PlanError, UsageError, escape, option
from graftax.tree import LeafIndex, Side, glob_pattern, is_glob, match_paths, nearest, subtree
from graftax.tree.leaf_index import cover, overlap, split_index
from graftax.tree.selectors import expand_braces

Selector = Any
LeafOf = Callable[[str], Any]
FilterPaths = Callable[[Any], list[str]]
_SHOWN = 6  # paths listed in a message


@dataclass(frozen=True, slots=True)
class Edit:
    """One selector, and the new value of the leaves that it picks."""

    selector: Selector
    value: Any


@dataclass(frozen=True, slots=True)
class Picked:
    """One leaf that a selector picks, or the part of it at `index`. exact: the selector wrote out its path."""

    path: str
    index: LeafIndex | None = None
    exact: bool = False

    @property
    def text(self) -> str:
        return self.path if self.index is None else f"{self.path}{self.index.text}"


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The value of a leaf that takes new values in some of its parts and keeps the others.

    items  (index, value), of which None is the whole leaf; a later item goes over an earlier one. Each value is made
           from the old leaf.
    """

    items: tuple[tuple[LeafIndex | None, Any], ...]


@dataclass(frozen=True, slots=True)
class SelectableTree:
    """The tree as selectors see it.

    paths, leaf_of  the paths, and the leaf at a path
    shape_of        the shape of the leaf at a path
    filter_paths    nnx filter -> the paths that it passes; None: the tree has no Variables
    other_names     another name of a shared leaf -> the name that is listed
    optimizer       path of an optimizer state's leaf -> how many of its parts are the optimizer's own (3 of
                    opt_state/0/mu/Dense_0/kernel); a selector reaches these leaves only if it names one of those parts
    """

    label: str
    side: Side
    paths: Collection[str]
    leaf_of: LeafOf
    shape_of: Callable[[str], Sequence[int]]
    filter_paths: FilterPaths | None = None
    other_names: Callable[[], Mapping[str, str]] = dict
    optimizer: Mapping[str, int] = field(default_factory=dict[str, int])

    def unnamed(self, path: str) -> str:
        """The path of an optimizer state's leaf with the names of the optimizer's own parts replaced by placeholders. A
        selector that still matches it names only weights, not a part of the optimizer state. A number is no name:
        `**/0/**` means layers."""
        parts = path.split("/")
        own = self.optimizer[path]
        return "/".join([part if part.isdecimal() else "\x1a" for part in parts[:own]] + parts[own:])


def edits_of(selector: Selector, value: Any) -> tuple[Edit, ...]:
    """The edits that the arguments of `replace` describe. UsageError if they contradict each other."""
    if isinstance(selector, Mapping):
        if value is not None:
            raise UsageError(
                "both a {selector: value} dict and a value were given",
                next="Put the value into the dict, or leave it out.",
            )
        items = cast("Mapping[Any, Any]", selector).items()
        edits = tuple(Edit(key, item) for key, item in items)
    else:
        edits = (Edit(selector, value),)
    if not edits:
        raise UsageError("there is nothing to replace: the dict of selectors is empty")
    for edit in edits:
        check_selector(edit.selector)
        if edit.value is None:
            raise UsageError(
                f"no value for {selector_text(edit.selector)}",
                next="Give an array, gx.constant(v) or another value, or a function of the old leaf.",
            )
    return edits


def check_selector(selector: Selector) -> None:
    if isinstance(selector, (list, tuple)):
        if not selector:
            raise UsageError("an empty list of selectors")
        for item in cast("list[Any]", selector):
            check_selector(item)
    elif isinstance(selector, str):
        if not selector:
            raise UsageError("an empty selector", next="Every leaf is '**'.")
    elif not (callable(selector) or selector is ...):
        raise UsageError(
            f"{escape(repr(selector), 80)} is no selector",
            next="Use a path, a glob ('**/kernel'), a predicate (path, leaf) -> bool, an nnx filter, or a list.",
        )


def selector_text(selector: Selector) -> str:
    """A selector as a message shows it."""
    if isinstance(selector, str):
        return escape(repr(selector))
    if isinstance(selector, (list, tuple)):
        return "[" + ", ".join(selector_text(item) for item in cast("list[Any]", selector)) + "]"
    if selector is ...:
        return "..."
    name = getattr(selector, "__qualname__", None)
    return escape(name if isinstance(name, str) else repr(selector), 80)


# ---------------------------------------------------------------- one selector

_NONE: frozenset[str] = frozenset()


def pick(
    tree: SelectableTree, selector: Selector, excluded: Collection[str] = _NONE
) -> tuple[list[Picked], list[Failure]]:
    """(the leaves that a selector picks, without the excluded ones, in the tree's order; the failures, among them that
    it picks none)."""
    if isinstance(selector, str):
        selector = _with_indices(tree, selector)
    if isinstance(selector, (list, tuple)):
        found: dict[str, dict[LeafIndex | None, Picked]] = {}
        failures: list[Failure] = []
        for item in cast("list[Any]", selector):
            picked, failed = pick(tree, item, excluded)
            failures += failed
            for one in picked:
                same = found.setdefault(one.path, {}).get(one.index)
                found[one.path][one.index] = one if same is None or one.exact else same
        return [one for path in tree.paths for one in found.get(path, {}).values()], failures
    if isinstance(selector, str):
        picked, failures = _pick_text(tree, selector, excluded)
    else:
        picked, failures = [Picked(path) for path in _pick_paths(tree, selector)], []
    kept = [one for one in picked if one.path not in excluded]
    if kept or failures:
        return kept, failures
    if picked:
        paths = listed(one.path for one in picked)
        return [], [Failure(f"everything that {selector_text(selector)} selects is excluded: {paths}")]
    return [], [Failure(f"{selector_text(selector)} selects none of {len(tree.paths)} leaves")]


def _with_indices(tree: SelectableTree, selector: str) -> str | list[str]:
    """The list of selectors that braces at the end stand for, if one of them ends in an index: `{a[0],b}` is a[0] and
    b, and each must match. Every other selector as it is."""
    if not selector.endswith("}") or "]" not in selector or selector in tree.paths:
        return selector
    ways = expand_braces(selector)
    return ways if any(map(split_index, ways)) else selector


def excluded_from(tree: SelectableTree, exclude: Selector) -> tuple[frozenset[str], list[Failure]]:
    """(the paths that `exclude` keeps out of a selection, failures). A selector that matches nothing is a failure: a
    misspelled one would let through what it was meant to keep. Optimizer state needs no naming here."""
    if exclude is None:
        return _NONE, []
    check_selector(exclude)
    picked, failures = pick(replace(tree, optimizer={}), exclude)
    failures = [replace(failure, what=f"exclude: {failure.what}") for failure in failures]
    for one in picked:
        if one.index is not None:
            failures.append(Failure(f"exclude: {escape(one.text)} is a part of a leaf", next="Exclude whole leaves."))
    return frozenset(one.path for one in picked), failures


def _pick_paths(tree: SelectableTree, selector: Any) -> list[str]:
    """The paths that an nnx filter or a predicate passes."""
    if not _is_filter(selector):
        return [path for path in tree.paths if _passes(tree, selector, path)]
    if tree.filter_paths is None:
        raise UsageError(
            f"{selector_text(selector)} selects in NNX trees, and {escape(tree.label)} is none",
            next="Use a path, a glob ('**/kernel') or a predicate (path, leaf) -> bool.",
        )
    return tree.filter_paths(selector)


def _passes(tree: SelectableTree, predicate: Callable[[str, Any], Any], path: str) -> bool:
    leaf = tree.leaf_of(path)
    if not predicate(path, leaf):
        return False
    return path not in tree.optimizer or not predicate(tree.unnamed(path), leaf)


def _is_filter(selector: Any) -> bool:
    """Is it a filter of nnx: a type, `...`, or an object of its filterlib? Any other callable is a predicate."""
    if selector is ... or isinstance(selector, type):
        return True
    filters = sys.modules.get("flax.nnx.filterlib")
    return filters is not None and type(selector).__module__ == filters.__name__


def _pick_text(tree: SelectableTree, selector: str, excluded: Collection[str]) -> tuple[list[Picked], list[Failure]]:
    """What a text selects: as a path, as a glob, or as either with an index at its end."""
    split = split_index(selector)
    whole, failures = _read(tree if split is None else _may_match(tree, selector, split[0]), selector)
    if split is None or any(one.exact for one in whole):
        return whole, failures or ([] if whole else [_nothing(tree, selector)])
    base, index = split
    inside, failed = _read(tree, base)
    inside, left = _without(inside, excluded)
    whole, dropped = _without(whole, excluded)
    if inside and failures:  # the class matches, in several collections
        return [], failures
    if inside and whole:
        return [], [_two_readings(selector, index, inside, whole)]
    if whole or not (inside or left or failed):
        return [*whole, *dropped], failures or ([] if whole or dropped else [_nothing_with_index(tree, base, selector)])
    parts = [replace(one, index=index) for one in (*inside, *left)]
    return parts, failed or _misfits(tree, inside, index)


def _may_match(tree: SelectableTree, selector: str, base: str) -> SelectableTree:
    """The leaves that a selector with an index may match with a character class. Behind a base that is a path these are
    few: the characters of an index lie between ' ' and ';', also those of a range (`, -`). Thousands of paths with an
    index are then quick."""
    if base not in tree.paths:
        return tree
    names = [selector, *(f"{base}{chr(code)}" for code in range(ord(" "), ord(";") + 1))]
    return replace(tree, paths=[name for plain in names for name in (plain, f"params/{plain}") if name in tree.paths])


def _read(tree: SelectableTree, selector: str) -> tuple[list[Picked], list[Failure]]:
    """The leaves that a text matches as a path or a glob; a failure if its collection is in doubt."""
    if selector in tree.paths:
        return [Picked(selector, exact=True)], []
    try:
        found = _reached(tree, selector)
    except PlanError as error:  # the collection was left out, and several collections match
        return [], [Failure(str(error).partition("\n")[0], next=str(error).partition("\n")[2])]
    exact = not is_glob(selector) or found == [f"params/{selector}"]
    return [Picked(path, exact=exact) for path in found], []


def _without(picked: list[Picked], excluded: Collection[str]) -> tuple[list[Picked], list[Picked]]:
    """(those that stay, those that are excluded)."""
    return [one for one in picked if one.path not in excluded], [one for one in picked if one.path in excluded]


def _misfits(tree: SelectableTree, picked: Iterable[Picked], index: LeafIndex) -> list[Failure]:
    """The leaves that do not have such a part."""
    failures: list[Failure] = []
    for one in picked:
        try:
            index.ranges(tree.shape_of(one.path))
        except PlanError as error:
            what, _, then = str(error).partition("\n")
            failures.append(Failure(what, key=one.path, next=then))
    return failures


def _two_readings(selector: str, index: LeafIndex, inside: list[Picked], whole: list[Picked]) -> Failure:
    """A bracket at the end that may be an index or a character class."""
    paths = [one.path for one in whole]
    names = paths[0] if len(paths) == 1 else f"{{{','.join(paths)}}}"
    return Failure(
        f"{selector_text(selector)} can be read in two ways: as the part {index.text} of "
        f"{listed(one.path for one in inside)}, or with a character class as {listed(paths)}",
        next=f"For the part: {option('exclude', escape(names, 400))}. For the other: select {escape(names, 400)!r}.",
    )


def _reached(tree: SelectableTree, selector: str) -> list[str]:
    """The weights that a text matches, and the optimizer state if the text names a part of it."""
    if not tree.optimizer:
        return match_paths(list(tree.paths), selector, tree.side)
    found = set(match_paths([path for path in tree.paths if path not in tree.optimizer], selector, tree.side))
    if is_glob(selector):
        whole = glob_pattern(selector, "/").fullmatch
        found |= {path for path in tree.optimizer if whole(path) and not whole(tree.unnamed(path))}
    return [path for path in tree.paths if path in found]


def _nothing(tree: SelectableTree, selector: str, written: str = "") -> Failure:
    """Why a text selector matches nothing: it names a subtree or another name of a shared leaf; else the nearest
    paths. written: the selector with its index."""
    shown, side, paths = selector_text(written or selector), tree.side, list(tree.paths)
    sep = "/" if side == "flax" else "."
    inside = selector.rstrip(sep)
    for prefix in (inside, f"params{sep}{inside}"):
        below = subtree(paths, prefix, side)
        if below:
            what = f"{shown} names a subtree of {_count(below)}, not a leaf"
            return Failure(what, next=f"Its leaves are '{escape(inside)}{sep}**': {listed(below)}.")
    shared = tree.other_names().get(selector)
    if shared is not None and shared in tree.paths:
        return Failure(f"{shown} is another name of a shared leaf", next=f"Select {escape(shared)!r}.")
    kept = [path for path in _matched(paths, selector, side) if path in tree.optimizer]
    if kept:
        what = f"{shown} matches optimizer state only: {listed(kept)}"
        return Failure(what, next="Name a part of it, as in 'opt_state/**' or '**/mu/**'.")
    if is_glob(selector):
        below = _matched(paths, f"{inside}{sep}**", side)
        if below:
            what = f"{shown} matches subtrees only: '*' stays in one part of a path"
            return Failure(what, next=f"'{escape(inside)}{sep}**' reaches their leaves: {listed(below)}.")
        other = "." if sep == "/" else "/"
        turned = _matched(paths, selector.replace(other, sep), side) if other in selector else []
        if turned:
            hint = f"The parts of these names are separated by '{sep}': {escape(selector.replace(other, sep))!r}."
            return Failure(f"{shown} matches nothing", next=hint)
    before = [selector[:i] for i, char in enumerate(selector) if char == "[" and i and selector.endswith("]")]
    if any(base in paths or _matched(paths, base, side) for base in before):
        hint = "A part of a leaf is whole numbers, slices and '...', as in '[2]', '[:, 3]' and '[..., 1:4]'."
        return Failure(f"{shown} matches nothing", next=hint)
    near = nearest(selector, paths) or listed(paths)
    return Failure(f"{shown} matches nothing", next=f"Near: {near}" if near else "The tree has no leaves.")


def _nothing_with_index(tree: SelectableTree, base: str, selector: str) -> Failure:
    """Why neither reading of a bracket at the end matches: the class may match modules, not leaves."""
    sep = "/" if tree.side == "flax" else "."
    modules = _matched(list(tree.paths), f"{selector}{sep}**", tree.side)
    return _nothing(tree, selector) if modules else _nothing(tree, base, selector)


def _matched(paths: list[str], pattern: str, side: Side) -> list[str]:
    try:
        return match_paths(paths, pattern, side)
    except PlanError:
        return []


def listed(paths: Iterable[str]) -> str:
    """The first paths, as text for a message."""
    names = list(paths)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(escape(name) for name in names[:_SHOWN]) + more


def _count(paths: list[str]) -> str:
    return f"{len(paths)} leaves" if len(paths) != 1 else "1 leaf"


# ---------------------------------------------------------------- all edits


def choose(
    tree: SelectableTree, edits: Iterable[Edit], expect: int | None, exclude: Selector = None
) -> tuple[dict[str, Any], list[Failure]]:
    """path -> value in the tree's order, and everything that does not hold. The value of a leaf of which only parts are
    picked, or of which parts take other values than the rest, is `Parts`.

    An exact path wins over a glob, a predicate or a filter. Two selectors of one rank that pick the same leaf, or parts
    of it that overlap, are a failure. `expect` counts all the leaves that are picked.
    """
    if expect is not None and (isinstance(expect, bool) or not hasattr(expect, "__index__")):
        raise UsageError(f"expect={escape(repr(expect), 40)} is not a whole number")
    excluded, failures = excluded_from(tree, exclude)
    chosen: dict[str, list[tuple[Picked, Edit]]] = {}
    for edit in edits:
        picked, failed = pick(tree, edit.selector, excluded)
        failures += failed
        for one in picked:
            chosen.setdefault(one.path, []).append((one, edit))
    made: dict[tuple[Any, ...], Parts] = {}
    values: dict[str, Any] = {}
    for path in tree.paths:
        if path in chosen:
            value, failed = _value_of(path, chosen[path], tree.shape_of, made)
            failures += failed
            values |= {} if value is None else {path: value}
    if expect is not None and len(chosen) != expect and (chosen or not failures):
        failures.append(
            Failure(
                "wrong number of selected leaves",
                expected=str(expect),
                found=str(len(chosen)),
                next=f"They are: {listed(path for path in tree.paths if path in chosen)}" if chosen else "",
            )
        )
    return values, failures


def _value_of(
    path: str,
    picks: list[tuple[Picked, Edit]],
    shape_of: Callable[[str], Sequence[int]],
    made: dict[tuple[Any, ...], Parts],
) -> tuple[Any, list[Failure]]:
    """The value of one leaf from everything that picks it (None if it has no such part), and the failures of picks that
    cannot both hold. made: the `Parts` so far, so that leaves with the same new parts share one."""
    if len(picks) == 1 and picks[0][0].index is None:
        return picks[0][1].value, []
    shape = tuple(shape_of(path))
    try:
        reach = [tuple(map(range, shape)) if one.index is None else one.index.ranges(shape) for one, _ in picks]
    except PlanError:  # `pick` has listed it
        return None, []
    failures: list[Failure] = []
    hidden: set[int] = set()
    for i, j in combinations(range(len(picks)), 2):
        (first, by), (second, other) = picks[i], picks[j]
        if not _meet(first, second, reach[i], reach[j]):
            continue
        if first.exact == second.exact:
            failures.append(_twice(path, first, by, second, other))
        else:
            over, under = (i, j) if first.exact else (j, i)
            hidden |= {under} if cover(reach[over], reach[under]) else set()
    order = sorted((i for i in range(len(picks)) if i not in hidden), key=lambda i: picks[i][0].exact)
    items = tuple((picks[i][0].index, picks[i][1].value) for i in order)
    if len(items) == 1 and items[0][0] is None:
        return items[0][1], failures
    return made.setdefault(tuple((index, id(value)) for index, value in items), Parts(items)), failures


def _meet(first: Picked, second: Picked, a: Sequence[range], b: Sequence[range]) -> bool:
    """Do two picks of one leaf reach a common element? Two of the whole leaf do, even if it is empty."""
    return (first.index is None and second.index is None) or overlap(a, b)


def _twice(path: str, first: Picked, by: Edit, second: Picked, other: Edit) -> Failure:
    if first.index is None and second.index is None:
        text = f"is selected twice, by {selector_text(by.selector)} and by {selector_text(other.selector)}"
        return Failure(text, key=path, next="Narrow one of them; an exact path wins over a glob.")
    parts = " and ".join("the whole leaf" if one.index is None else one.index.text for one in (first, second))
    text = f"is selected twice in part: {parts} overlap ({selector_text(by.selector)}, {selector_text(other.selector)})"
    return Failure(text, key=path, next="Select parts that do not overlap; an exact path wins over a glob.")
