"""Find the containers of weights in a tree with training state: one that holds all of them, or several that the user
must choose from.

`training_tree` decides which parts are training state; this module works on the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from graftax.tree import TensorSpec
from graftax.tree.training_state import is_usual, words_of

Parts = tuple[str, ...]
Node = dict[str, Any]
"""name -> Node or TensorSpec"""

_COPY = frozenset({"ema", "avg", "average", "averaged", "polyak", "shadow", "swa", "target"})
_OF_COPY = frozenset({"params", "parameters", "weights", "model", "variables", "net", "network", "state", "dict"})


@dataclass(slots=True)
class StateSearch:
    left: dict[Parts, str] = field(default_factory=dict[Parts, str])
    copies: list[Parts] = field(default_factory=list[Parts])
    doubtful: dict[Parts, list[Parts]] = field(default_factory=dict[Parts, "list[Parts]"])
    rooted: set[Parts] = field(default_factory=set[Parts])  # nodes whose moments repeat the names of all containers


def leaves_in(node: Node, above: Parts = ()) -> Iterator[tuple[Parts, TensorSpec]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves_in(value, (*above, name))
        else:
            yield (*above, name), value


def is_small(spec: TensorSpec) -> bool:
    return all(n <= 1 for n in spec.shape)


def is_copy(name: str) -> bool:
    words = words_of(name)
    return bool(words & _COPY) and words <= _COPY | _OF_COPY


def copies_in(kept: Node, run: bool) -> list[str]:
    """The containers that hold the same weights: the trained ones, and averages of them."""
    named = [k for k, v in kept.items() if isinstance(v, dict) and is_copy(k)]
    if not named or not (run or "params" in kept):
        return []
    first = next((k for k, v in kept.items() if isinstance(v, dict) and k not in named and is_usual(k)), None)
    if first is None:
        return []
    sets = {k: {(_bare(leaf), spec.shape) for leaf, spec in leaves_in(kept[k])} for k in (first, *named)}
    same = [k for k in named if len(sets[k] & sets[first]) * 2 > len(sets[k] | sets[first])]
    return [first, *same] if same else []


def add_runs(kept: Node, at: Parts, found: StateSearch) -> None:
    """Record networks in training that stand side by side (actor and critic), or a network beside a copy of it. Each is
    a container."""
    left: dict[str, set[Parts]] = {}
    for path in found.left:
        if path[: len(at)] == at and len(path) > len(at) + 1:
            left.setdefault(path[len(at)], set()).add(path)
    runs = [name for name in kept if name in left]
    if not runs:
        return
    sets = {name: _network(value, (*at, name), found) for name, value in kept.items() if isinstance(value, dict)}

    def is_rival(name: str) -> bool:
        if name in runs or is_usual(name) or is_copy(name) or isinstance(kept[name].get("params"), dict):
            return True
        return any(len(sets[name] & sets[run]) * 2 > len(sets[name] | sets[run]) for run in runs)

    rivals = [name for name in sets if sets[name] and is_rival(name)]
    if len(rivals) < 2:
        return
    for name in rivals:
        path = (*at, name)
        if not any(copy[: len(path)] == path for copy in found.copies):
            found.copies.append(_only_container(kept[name], path, found))


def _network(node: Node, at: Parts, found: StateSearch) -> set[tuple[Parts, tuple[int, ...]]]:
    """The weights below `at`, by their paths inside the container that holds all of them."""
    inside = _only_container(node, at, found)
    return {
        (_bare((*at, *leaf)[len(inside) :]), spec.shape)
        for leaf, spec in leaves_in(node)
        if not any((*at, *leaf)[:stop] in found.left for stop in range(len(at), len(at) + len(leaf) + 1))
        and not is_small(spec)
    }


def _only_container(node: Node, at: Parts, found: StateSearch) -> Parts:
    """The container that holds all weights below `at`, as deep as container names go."""
    while True:
        kept = [name for name, value in node.items() if (*at, name) not in found.left and value != {}]
        child = node[kept[0]] if len(kept) == 1 else None
        if not isinstance(child, dict) or not (is_usual(kept[0]) or any(path[: len(at)] == at for path in found.left)):
            return at
        at, node = (*at, kept[0]), child
        if at[-1] == "params" and not isinstance(node.get("params"), dict):
            return at


def _bare(leaf: Parts) -> Parts:
    return leaf[1:] if leaf[0] == "params" else leaf


def prefix_of(root: Node, found: StateSearch) -> Parts:
    """The container of all weights. The search goes as deep as something was left out."""
    at: Parts = ()
    node = root
    while any(path[: len(at)] == at for path in found.left):
        kept = [name for name, value in node.items() if (*at, name) not in found.left and value != {}]
        child = node[kept[0]] if len(kept) == 1 else None
        if not isinstance(child, dict) or (kept[0] == "params" and not isinstance(child.get("params"), dict)):
            break
        if at in found.rooted and not is_usual(kept[0]):
            break
        at, node = (*at, kept[0]), child
    return at
