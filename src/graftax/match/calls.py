"""The order of calls in live modules. A counter in a name (`Dense_0`) counts constructions, not calls.

`Dense(..)(relu(Dense(..)(x)))` constructs the outer layer first and calls it last. If the calls are traced, the
counters are replaced by the order of calls, because the numbers of the other side are in that order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.tree import Checkpoint, Side

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True, slots=True)
class Calls:
    """renames: leaf -> its path with numbers in the order of calls, for leaves whose numbers are not; traced: paths of
    modules whose number is known to be in the order of calls, as it is or by `renames`."""

    renames: Mapping[str, str] = field(default_factory=dict[str, str])
    traced: frozenset[str] = frozenset()
    side: Side = "flax"

    def counts(self, leaf: str) -> bool:
        """True if the numbers in the names of the modules that hold this leaf are known to follow the order of
        calls."""
        parts = leaf.split("/")[1:] if self.side == "flax" else leaf.split(".")
        names = ["/".join(parts[:n]) if self.side == "flax" else ".".join(parts[:n]) for n in range(1, len(parts))]
        counted = [name for name in names if _NUMBERED.fullmatch(name)]
        return bool(counted) and all(name in self.traced for name in counted)


NO_CALLS = Calls()


def flax_calls(end: Checkpoint) -> Calls:
    """What the trace of a live Linen module shows about its automatic names, which are a class and a counter."""
    return _calls(end, "flax", {path: module.settings.get("order") for path, module in end.live.modules.items()})


def torch_calls(end: Checkpoint, order: Mapping[str, int]) -> Calls:
    """What the trace of a live torch module shows about its numbers (`order`: path -> place in the order of first
    calls): names that are a number or end in one. Only modules of one kind in one place are compared."""
    return _calls(end, "torch", order)


def _calls(end: Checkpoint, side: Side, order: Mapping[str, object]) -> Calls:
    separator = "/" if side == "flax" else "."
    groups: defaultdict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for path, module in end.live.modules.items():
        parent, _, last = path.rpartition(separator)
        found = _NUMBERED.fullmatch(last)
        if found is not None and module.leaves and (side == "torch" or found[1] == f"{module.kind}_"):
            groups[(parent, found[1])].append((int(found[2]), path))
    fresh: dict[str, str] = {}
    traced: set[str] = set()
    for (_, word), members in groups.items():
        places = {path: place for _, path in members if isinstance(place := order.get(path), int)}
        if len(places) < len(members):
            continue
        traced |= places.keys()
        called = sorted(places, key=places.__getitem__)
        fresh |= {
            other: f"{word}{number}"
            for (number, path), other in zip(sorted(members), called, strict=True)
            if path != other
        }
    return Calls(_renamed(end, separator, fresh) if fresh else {}, frozenset(traced), side)


def _renamed(end: Iterable[str], separator: str, fresh: Mapping[str, str]) -> dict[str, str]:
    """leaf -> its path, with the last parts of the modules in `fresh` replaced."""
    out: dict[str, str] = {}
    for leaf in end:
        parts = leaf.split(separator)
        skip = 1 if separator == "/" else 0  # the collection
        new = list(parts)
        for i in range(skip, len(parts)):
            new[i] = fresh.get(separator.join(parts[skip : i + 1]), parts[i])
        if new != parts:
            out[leaf] = separator.join(new)
    return out
