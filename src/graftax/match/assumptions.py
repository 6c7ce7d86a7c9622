"""Assumptions: what no file shows but the plan relies on, and the check that would prove it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from graftax.layers import known_kind, overriding
from graftax.match.calls import torch_calls
from graftax.match.engine import Result
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon, concepts, lexicon
from graftax.match.orders import counted_blocks, counted_part, path_of
from graftax.match.pairs import Pair
from graftax.match.sides import module_path, paths_of, tokens_of
from graftax.match.words import COLLECTIONS
from graftax.ops import Offset, Rearrange
from graftax.plans import PARITY, Assumption, Entry
from graftax.plans.names import fold_names
from graftax.tree import Checkpoint, Side, split_path, split_words, whole_words

CALL_ORDER = "call order"
_SHOWN = 3  # names that one assumption lists


def _about(
    targets: Iterable[str], text: str, check: str = PARITY, named: Callable[[str], str] = str
) -> list[Assumption]:
    """The assumption `text` about these targets, if there are any, with some of their names in place of `{}`. `named`:
    the part of a target that is shown."""
    found = tuple(dict.fromkeys(targets))
    names = fold_names(list(dict.fromkeys(map(named, found))))
    some = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return [Assumption(text.replace("{}", some), check, found)] if found else []


# ---------------------------------------------------------------- the order of calls


def call_orders(result: Result, ends: Ends) -> list[Assumption]:
    """The assumptions behind pairs that a counter decides: that the order of construction is the order of calls or, if
    only the Flax calls are traced, that torch's numbers follow the order of calls."""
    constructed: list[Pair] = []
    registered: list[Pair] = []
    live = ends.traces.torch_trace is not None
    calls = None
    blocks = [pair for item in result.settled if counted_blocks(item.scope) for pair in item.taken]
    for pair in (*result.call_order, *blocks):
        if not ends.calls.counts(path_of(pair.flax)):
            constructed.append(pair)
            continue
        if live and ends.kinds.ends is not None:
            calls = calls or torch_calls(ends.kinds.ends[0], ends.traces.torch.order)
        if calls is None or not calls.counts(path_of(pair.torch)):
            registered.append(pair)
    text = (
        f"{CALL_ORDER}: the numbers of {{}} count constructions, and the plan assumes that calls have the same order; "
        "they may not: Dense(8)(Dense(8)(x)) constructs the outer layer first and calls it last"
    )
    check = f"{PARITY}; or give the live model as gx.linen(...), whose calls are traced"
    other = (
        f"{CALL_ORDER}: the Flax calls are traced, but torch's are not; the plan assumes that torch calls the modules "
        "for {} in the order of their numbers"
    )
    return [
        *_about(_targets(constructed), text, check, counted_part),
        *_about(_targets(registered), other, named=counted_part),
    ]


def stack_orders(result: Result) -> list[Assumption]:
    """The assumptions behind stacks of layers that are all alike: only the path tells which layers they hold."""
    out: list[Assumption] = []
    for item in result.settled:
        if item.scope.why:
            out += _about(
                _targets(item.taken), f"layers: {item.scope.why}; all of them fit in another order too ({{}})"
            )
    return out


def _targets(pairs: Iterable[Pair]) -> tuple[str, ...]:
    return paths_of(link.flax for pair in pairs for link in pair.links)


# ---------------------------------------------------------------- what values mean

_DIGITS = re.compile(r"[0-9]+")
_FUSED = frozenset(("qkv", "kv"))
_ROPE = frozenset(("rope", "rotary"))
_FREQUENCIES = (frozenset(("rope",)), frozenset(("rotary",)), frozenset(("inv", "freq")), frozenset(("freqs", "cis")))
_POSITIONS = frozenset(("pos", "rel"))
_TABLES = frozenset(("table", "tables", "bias", "biases", "enc", "encs"))
_ATTENTION = frozenset(("MultiheadAttention", "MultiHeadDotProductAttention", "SelfAttention", "MultiHeadAttention"))
_VECTORS = frozenset(("weight", "scale"))
_MORE = frozenset(("bias", "running_mean", "mean", "b"))


_TEXTS = {
    "rotary": "if positions rotate queries and keys ({}), both models rotate the same pairs of rows (row i with row"
    " i + half, or neighbours)",
    "scales": "no scale, such as 1 / sqrt(head_dim), is folded into {} on only one side",
    "norms": "for {}, both models multiply by the scale, or both by 1 + scale",
    "fused": "{} hold q, k and v in the same order on both sides: one after the other, or head by head",
    "gates": "{} hold the gates of a cell in the same order on both sides",
}
"""What is assumed of the entries of one kind -> how the plan states it."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One end: its modules that have a bias or statistics, and for each leaf the framework kind of the live module that
    holds it."""

    side: Side
    more: frozenset[str]
    kinds: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, end: Checkpoint, side: Side) -> _Side:
        at = "/" if side == "flax" else "."
        more = {module_path(name, side) for name in end if name.rpartition(at)[2] in _MORE}
        kinds: dict[str, set[str]] = {}
        for module in end.live.modules.values():
            kind = known_kind(module, side)
            for leaf in module.leaves.values() if kind else ():
                kinds.setdefault(leaf, set()).add(kind)
        return cls(side, frozenset(more), {leaf: frozenset(found) for leaf, found in kinds.items()})

    def words(self, path: str, lex: Lexicon) -> frozenset[str]:
        return frozenset(concepts(tokens_of(path, self.side), lex))

    def vector(self, path: str) -> bool:
        """True for the scale of a module that has nothing else."""
        last = path.rpartition("/" if self.side == "flax" else ".")[2]
        return last in _VECTORS and module_path(path, self.side) not in self.more


def unseen(
    entries: Iterable[Entry], source: Checkpoint, like: Checkpoint, sides: tuple[Side, Side]
) -> tuple[Assumption, ...]:
    """What the plan assumes about the meaning of values. There is one assumption each for rotary embeddings, scales of
    norms, scales folded into weights, and the order of parts or gates in a tensor that is fused on both sides. None if
    both ends are of one side, or if framework modules on both sides show what they do."""
    if sides[0] == sides[1]:
        return ()
    lex = lexicon()
    ends = _Side.of(source, sides[0]), _Side.of(like, sides[1])
    seen: defaultdict[str, list[Entry]] = defaultdict(list)
    for group in _alike(entries):
        seen[_kind(group[0], source, ends, lex)] += group
    queries = [*seen["q"], *seen["q and k"], *seen["fused"]]
    rotated = [*queries, *seen["k"]] if queries and (seen["q and k"] or seen["k"] or seen["fused"]) else []
    seen["scales"], seen["rotary"] = queries, _rotating(rotated, source, like, ends) if rotated else []
    return tuple(said for kind, text in _TEXTS.items() for said in _about(_filled(seen[kind]), f"{kind}: {text}"))


def _filled(entries: Iterable[Entry]) -> Iterable[str]:
    return (name for entry in entries for name in entry.targets)


def overridden(
    entries: Iterable[Entry], source: Checkpoint, like: Checkpoint, sides: tuple[Side, Side]
) -> tuple[Assumption, ...]:
    """One assumption for each class of a live module that overrides the call of a layer: that it uses its weights as
    the layer does. None if both ends run the same class."""
    ends = [_overrides(end, side) for end, side in zip((source, like), sides, strict=True)]
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries if any(ends) else ():
        here, there = ({end[name] for name in names if name in end}
                       for end, names in zip(ends, (entry.sources, entry.targets), strict=True))  # fmt: skip
        for item in here | there if entry.targets and here != there else ():
            found.setdefault(item, []).append(entry)
    text = (
        "forward: {0} overrides the forward of {1}; the plan assumes that it uses {{}} as {1} does, but it may "
        "normalise, scale or shift them first"
    )
    return tuple(said for item, some in found.items() for said in _about(_filled(some), text.format(*item)))


def _overrides(end: Checkpoint, side: Side) -> dict[str, tuple[str, str]]:
    """leaf -> (the class whose call runs, the layer that it overrides), for the innermost live module that holds the
    leaf."""
    out: dict[str, tuple[str, str] | None] = {}
    for module in sorted(end.live.modules.values(), key=lambda module: len(module.leaves), reverse=True):
        out |= dict.fromkeys(module.leaves.values(), overriding(module, side))
    return {leaf: item for leaf, item in out.items() if item is not None}


def _alike(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    """Groups of entries whose names differ only in their numbers; each group is judged once."""
    groups: dict[tuple[str, str, int, int], list[Entry]] = {}
    strip = _DIGITS.sub
    for entry in entries:
        if entry.sources and entry.targets:
            first = strip("", entry.sources[0]), strip("", entry.targets[0])
            groups.setdefault((*first, len(entry.sources), len(entry.targets)), []).append(entry)
    return groups.values()


def _kind(entry: Entry, source: Checkpoint, ends: tuple[_Side, _Side], lex: Lexicon) -> str:
    """What the entry is, as far as assumptions are about it: a projection to queries ("q") or to keys ("k"), tensors
    that are fused on both sides ("gates": those of a cell), or a norm that has only a scale. Else ''."""
    first = tuple(zip(ends, (entry.sources[0], entry.targets[0]), strict=True))
    kinds = [end.kinds.get(path, frozenset()) for end, path in first]
    words = [end.words(path, lex) for end, path in first]
    rank = len(source[entry.sources[0]].shape)
    if rank and len(entry.targets) == 1 and all("gates" in whole_words(path) for _, path in first):
        return "gates"
    if rank == 1 and all(end.vector(path) for end, path in first):
        offset = any(isinstance(op, Offset) for op in entry.ops)
        return "norms" if "norm" in words[0] | words[1] and not all(kinds) and not offset else ""
    if rank < 2 or all(kind & _ATTENTION for kind in kinds):
        return ""
    both = zip(ends, (entry.sources, entry.targets), strict=True)
    said = frozenset[str]().union(*(end.words(name, lex) for end, paths in both for name in paths))
    if all(map(_is_fused, words)) and len(entry.targets) == 1 and not _sorted_out(entry):
        return "fused"
    if any(map(_is_fused, words)):
        return "q and k"
    return " and ".join(part for part in "qk" if part in said)


def _is_fused(words: frozenset[str]) -> bool:
    """True for one projection to queries, keys and values."""
    return bool(words & _FUSED) or {"q", "k", "v"} <= words or {"attn", "in", "proj"} <= words


def _sorted_out(entry: Entry) -> bool:
    """True if the ops state how the parts lie, so that whoever chose the ops has decided it."""
    return any(isinstance(op, Rearrange) and "t" in dict(op.sizes) for op in entry.ops)


def _rotating(projections: list[Entry], source: Checkpoint, like: Checkpoint, ends: tuple[_Side, _Side]
              ) -> list[Entry]:  # fmt: skip
    """The projections to queries and keys that positions may rotate. Left out are those that config.json excludes. If
    config.json says nothing about positions, those are left out that have a table of positions in their part of the
    model and no stored frequencies beside it."""
    config: dict[str, Any] = {**(like.config or {}), **(source.config or {})}
    kind = config.get("position_embedding_type")
    if isinstance(kind, str) and kind:
        return projections if whole_words(kind) & _ROPE else []
    if any(whole_words(str(name)) & _ROPE and value not in (None, False) for name, value in config.items()):
        return projections
    if config.get("alibi") is True:
        return []
    still: set[int] = set()
    turned: set[int] = set()
    for n, (end, checkpoint) in enumerate(zip(ends, (source, like), strict=True)):
        paths = [(id(entry), _parts(path, end.side)) for entry in projections
                 for path in (entry.targets if n else entry.sources)]  # fmt: skip
        names = {_DIGITS.sub("", name): name for name in checkpoint}
        for name in names.values():
            words = whole_words(name)
            frequencies = any(some <= words for some in _FREQUENCIES)
            if frequencies or _is_table(name, checkpoint, end.side, words):
                (turned if frequencies else still).update(_around(_parts(name, end.side), paths, frequencies))
    return [entry for entry in projections if id(entry) in turned or id(entry) not in still]


def _is_table(name: str, end: Checkpoint, side: Side, words: frozenset[str]) -> bool:
    """True for a tensor that is learned per position, or per distance of two positions, and whose name says so in one
    word: a part that is called `pos` or `rel` may be any head."""
    if "alibi" in words:
        return True
    spec = end[name]
    return len(spec.shape) > 1 and spec.floating and any(map(_names_table, _parts(name, side)))


def _names_table(part: str) -> bool:
    found, words = frozenset(concepts(split_words(part), lexicon())), whole_words(part)
    told = "embed" in found or bool(words & _TABLES) or found >= _POSITIONS
    return bool(found & _POSITIONS) and "head" not in found and told


def _around(table: tuple[str, ...], paths: Iterable[tuple[int, tuple[str, ...]]], anywhere: bool) -> set[int]:
    """Those of `paths` that lie in the innermost part of the model that holds the table and at least one of them. The
    layers of a list are one part: the first may hold the table of all. A table in a part that holds more than
    embeddings (another tower) counts for that part alone, unless `anywhere`."""
    paths = list(paths)
    inner = list(takewhile(lambda part: not _DIGITS.search(part), table[:-1]))
    for depth in range(len(inner), -1, -1):
        found = {key for key, path in paths if list(path[:depth]) == inner[:depth]}
        if found:
            return found
        held = frozenset(concepts(split_words(inner[depth - 1]), lexicon()))
        if not anywhere and not held & (_POSITIONS | {"embed"}):
            break
    return set()


def _parts(path: str, side: Side) -> tuple[str, ...]:
    """The parts of a path without its collection."""
    parts = split_path(path, side)
    return parts[1:] if side == "flax" and parts[0] in COLLECTIONS else parts
