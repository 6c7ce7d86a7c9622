"""Find the leaves that a selector picks, and the value that each of them takes.

A selector is a path, a glob, a predicate `(path, leaf) -> bool`, an nnx filter (a Variable type, or an object from
nnx.All, nnx.Not and the like), or a list of selectors. Failures are collected, not raised; only an object that is not a
selector raises UsageError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from graftax.errors import Failure, PlanError, UsageError, escape
from graftax.tree import Side, glob_pattern, is_glob, match_paths, nearest, subtree

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
class SelectableTree:
    """The tree as selectors see it.

    paths, leaf_of  the paths, and the leaf at a path
    filter_paths    nnx filter -> the paths that it passes; None: the tree has no Variables
    other_names     another name of a shared leaf -> the name that is listed
    optimizer       path of an optimizer state's leaf -> how many of its parts are the optimizer's own (3 of
                    opt_state/0/mu/Dense_0/kernel); a selector reaches these leaves only if it names one of those parts
    """

    label: str
    side: Side
    paths: Collection[str]
    leaf_of: LeafOf
    filter_paths: FilterPaths | None = None
    other_names: Callable[[], Mapping[str, str]] = dict
    optimizer: Mapping[str, int] = field(default_factory=dict[str, int])

    def unnamed(self, path: str) -> str:
        """The path of an optimizer state's leaf with the optimizer's own parts replaced by placeholders. A selector
        that still matches it names only weights, not a part of the optimizer state."""
        parts = path.split("/")
        own = self.optimizer[path]
        return "/".join(["\x1a"] * own + parts[own:])


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


def pick(tree: SelectableTree, selector: Selector) -> tuple[list[str], list[Failure]]:
    """(the paths that a selector picks, in the tree's order, the failures if it picks none)."""
    if isinstance(selector, (list, tuple)):
        found: set[str] = set()
        failures: list[Failure] = []
        for item in cast("list[Any]", selector):
            paths, failed = pick(tree, item)
            found.update(paths)
            failures += failed
        return [path for path in tree.paths if path in found], failures
    if isinstance(selector, str):
        return _pick_text(tree, selector)
    if _is_filter(selector):
        if tree.filter_paths is None:
            raise UsageError(
                f"{selector_text(selector)} selects in NNX trees, and {escape(tree.label)} is none",
                next="Use a path, a glob ('**/kernel') or a predicate (path, leaf) -> bool.",
            )
        paths = tree.filter_paths(selector)
    else:
        paths = [path for path in tree.paths if _passes(tree, selector, path)]
    if paths:
        return paths, []
    return [], [Failure(f"{selector_text(selector)} selects none of {len(tree.paths)} leaves")]


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


def _pick_text(tree: SelectableTree, selector: str) -> tuple[list[str], list[Failure]]:
    side = tree.side
    if selector in tree.paths:
        return [selector], []
    paths = list(tree.paths)
    try:
        found = _reached(tree, selector)
    except PlanError as error:  # the collection was left out, and several collections match
        return [], [Failure(str(error).partition("\n")[0], next=str(error).partition("\n")[2])]
    if found:
        return found, []
    return [], [_nothing(tree, paths, selector, side)]


def _reached(tree: SelectableTree, selector: str) -> list[str]:
    """The weights that a text matches, and the optimizer state if the text names a part of it."""
    if not tree.optimizer:
        return match_paths(list(tree.paths), selector, tree.side)
    found = set(match_paths([path for path in tree.paths if path not in tree.optimizer], selector, tree.side))
    if is_glob(selector):
        whole = glob_pattern(selector, "/").fullmatch
        found |= {path for path in tree.optimizer if whole(path) and not whole(tree.unnamed(path))}
    return [path for path in tree.paths if path in found]


def _nothing(tree: SelectableTree, paths: list[str], selector: str, side: Side) -> Failure:
    """Why a text selector matches nothing: it names a subtree or another name of a shared leaf; else the nearest
    paths."""
    shown = selector_text(selector)
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
    near = nearest(selector, paths) or listed(paths)
    return Failure(f"{shown} matches nothing", next=f"Near: {near}" if near else "The tree has no leaves.")


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


def choose(tree: SelectableTree, edits: Iterable[Edit], expect: int | None) -> tuple[dict[str, Any], list[Failure]]:
    """path -> value in the tree's order, and everything that does not hold.

    An exact path wins over a glob, a predicate or a filter. Two selectors of one rank that pick the same leaf are a
    failure. `expect` counts all the leaves that are picked.
    """
    if expect is not None and (isinstance(expect, bool) or not hasattr(expect, "__index__")):
        raise UsageError(f"expect={escape(repr(expect), 40)} is not a whole number")
    failures: list[Failure] = []
    exact: dict[str, Edit] = {}
    wide: dict[str, Edit] = {}
    for edit in edits:
        paths, failed = pick(tree, edit.selector)
        failures += failed
        chosen = exact if _is_exact(tree, edit.selector) else wide
        for path in paths:
            other = chosen.setdefault(path, edit)
            if other is not edit:
                text = f"is selected twice, by {selector_text(other.selector)} and by {selector_text(edit.selector)}"
                failures.append(Failure(text, key=path, next="Narrow one of them; an exact path wins over a glob."))
    picked = {path: exact.get(path) or wide[path] for path in tree.paths if path in exact or path in wide}
    if expect is not None and len(picked) != expect and (picked or not failures):
        failures.append(
            Failure(
                "wrong number of selected leaves",
                expected=str(expect),
                found=str(len(picked)),
                next=f"They are: {listed(picked)}" if picked else "",
            )
        )
    return {path: edit.value for path, edit in picked.items()}, failures


def _is_exact(tree: SelectableTree, selector: Selector) -> bool:
    return isinstance(selector, str) and (selector in tree.paths or not is_glob(selector))
