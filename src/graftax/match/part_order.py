"""The order in which names list the parts of a fused tensor: gate_up against up_gate, qkv against kqv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache

from graftax.layers.patterns import FUSED
from graftax.match.choose import Choice
from graftax.match.names import lexicon
from graftax.match.pairs import Label, Link, Pair
from graftax.match.sides import Module

_TOGETHER = tuple(
    frozenset(group.split()) for group in ("q k v", "gate up", "mean mu var logvar", "real imag", "scale shift", "x z")
)
"""Parts that lie together in one tensor."""
_BEFORE, _AFTER = ("", "w", "to", "in", "c"), ("", "proj")
"""What may stand before and after joined parts: toqkv, wqkv, qkvproj."""


def in_said_order(choice: Choice, pair: Pair) -> Choice:
    """The choice for a leaf of a pair. It is open if both names list the same parts in different orders."""
    one, other = said_order(pair.torch), said_order(pair.flax)
    if one == other or set(one) != set(other):
        return choice
    kind = "order" if choice.label is not None else choice.kind
    open_ = (choice.label,) if choice.label is not None else choice.open
    return replace(choice, label=None, open=open_, kind=kind, parts=f"{' '.join(one)} -> {' '.join(other)}")


def said_order(module: Module) -> tuple[str, ...]:
    """The parts that the module's name lists, in its order; () if it lists none."""
    for end in reversed(module.cuts or (len(module.tokens),)):
        start = max((cut for cut in module.cuts if cut < end), default=0)
        found = _order(tuple(token for token in module.tokens[start:end] if isinstance(token, str)))
        if found:
            return found
    return ()


def said_parts(module: Module) -> tuple[str, ...]:
    """The parts that the module's name lists, or the one that it is."""
    words = [token for token in module.tokens if isinstance(token, str)]
    one = (known[word] for word in reversed(words) for known in _words() if word in known)
    return said_order(module) or tuple(next(([part] for part in one), []))


@lru_cache(maxsize=4096)
def _order(words: tuple[str, ...]) -> tuple[str, ...]:
    """The parts that the words of one name list: gate, up; also joined, as in kqv, upgate, toqkv."""
    for known in _words():
        found: list[str] = []
        for word in words:
            texts = (word.removeprefix(a).removesuffix(b) for a in _BEFORE for b in _AFTER)
            found += next(filter(None, (_cut(text, known) for text in texts)), ())
        if len(found) > 1 and len(set(found)) == len(found):
            return tuple(found)
    return ()


def _cut(text: str, known: Mapping[str, str]) -> tuple[str, ...]:
    """The parts whose words make up the text; () if other text is left."""
    if text in known:
        return (known[text],)
    for size in range(len(text) - 1, 0, -1):
        if text[:size] in known and (rest := _cut(text[size:], known)):
            return (known[text[:size]], *rest)
    return ()


@cache
def _words() -> Sequence[Mapping[str, str]]:
    """For each group: every word that means one of its parts."""
    out = [{part: part for part in group} for group in _TOGETHER]
    for word, meant in lexicon().synonyms.items():
        for group, known in zip(_TOGETHER, out, strict=True):
            found = group.intersection(meant)
            known |= dict.fromkeys([word], *found) if len(found) == 1 else {}
    return out


# ---------------------------------------------------------------- what a rule says of it

Keys = dict[str, object]


def order_keys(pair: Pair, link: Link, label: Label, parts: str) -> list[Keys]:
    """What a rule for this leaf may state if the parts stand in the two orders `parts`: one item for every axis and
    every share of the rows that fits, the likeliest first. The leaves of a pair have the same items, in one order."""
    main = max(pair.links, key=lambda other: _rank(other))
    axes = _axes(main, label[1] if main is link else next(iter(sorted(main.labels)))[1])
    shape = _shape(main)
    out: list[Keys] = []
    for axis, keys in axes:
        for shares in _shares(parts.partition(" -> ")[0].split(), shape, axis):
            said = keys if main is link else {}
            out.append({"parts": parts, **said, **shares})
    return out


def _shape(link: Link) -> tuple[int, ...]:
    """The shape of one instance of the torch leaf."""
    shape = next(iter(link.torch.shapes.values()))
    stacked = [axis % len(shape) for axis in next(iter(sorted(link.labels)))[0]] if link.flax.stack else []
    return tuple(n for axis, n in enumerate(shape) if axis not in stacked)


def _rank(link: Link) -> int:
    return len(_shape(link))


def _axes(link: Link, reading: str) -> list[tuple[int, Keys]]:
    """The axes along which the parts may lie, each with what the rule states to name it."""
    rank = _rank(link)
    if reading in ("linear", "conv"):
        return [(0, {})]
    if reading == "conv_transpose default":
        return [(1, {})]
    if reading.startswith(FUSED):
        sizes = next(
            dict(getattr(c[0], "sizes", ())) for (label, _, _), c in link.chains.items() if label[1] == reading
        )
        return [(0, {"fused": "interleaved", "heads": sizes["h"]} if reading.startswith(FUSED[1]) else {})]
    if rank > 1 and reading in ("identity", "swap"):
        lead = [f"a{axis}" for axis in range(rank - 2)]
        last = (("o", "i"), ("i", "o"))
        turn = reading == "swap"
        texts = [f"{' '.join([*lead, a, b])} -> {' '.join([*lead, *((b, a) if turn else (a, b))])}" for a, b in last]
        found: list[tuple[int, Keys]] = [(rank - 2, _said(texts[0])), (rank - 1, _said(texts[1]))]
        return found[::-1] if link.torch.kind == "kernel" else found
    return [(0, {})]


def _said(ops: str) -> Keys:
    return {"ops": ops, "layout": None}


def _shares(parts: Sequence[str], shape: tuple[int, ...], axis: int) -> list[dict[str, int]]:
    """The shares of the rows that the parts may have: equal ones, or those of queries as wide as the input and of fewer
    keys and values."""
    rows = shape[axis]
    out: list[dict[str, int]] = []
    if set(parts) == {"q", "k", "v"} and len(shape) == 2:
        wide = shape[1 - axis]
        each, odd = divmod(rows - wide, 2)
        if not odd and 0 < each < wide and wide % each == 0:
            out.append({part: wide // each if part == "q" else 1 for part in parts})
    return [*out, {}] if rows % len(parts) == 0 else out
