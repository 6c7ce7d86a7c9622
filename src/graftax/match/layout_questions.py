"""Questions about layouts: leaves whose partner is known and whose reading is open.

Leaves of one module share a question, and so do modules that are open in the same way (every transposed convolution
of a decoder). Its answers are the ways that all of them have in common, then the mixed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from graftax.match.choose import Choice, usual
from graftax.match.flatten import Suspect
from graftax.match.pairings import MOST
from graftax.match.pairs import Label, Link, Pair, Scope
from graftax.match.part_order import order_keys
from graftax.match.rendering import column_rule, group_rule, reading_keys
from graftax.match.settle import Settled, open_links
from graftax.match.sides import paths_of
from graftax.plans import Candidate, Question
from graftax.plans.names import fold_names

Ways = list[tuple[str, str]]
"""(rule line, what it says) for every way in which a leaf may be read."""


@dataclass(frozen=True, slots=True)
class _Open:
    """Leaves that one answer settles: their paths, and (rule lines, what they say) for every way to read them. `text`:
    the rest of the question, after the names of the leaves; leaves of one text and of equal kinds may share a
    question."""

    kind: str
    text: str
    kinds: tuple[str, str]
    torch: tuple[str, ...]
    flax: tuple[str, ...]
    ways: tuple[tuple[str, str], ...]


def layout_questions(settled: Iterable[Settled], sides: tuple[str, str], turned: bool) -> list[Question]:
    """The questions about open layouts. `turned`: the torch end is like."""
    groups: dict[object, list[list[_Open]]] = {}
    for item in settled:
        for found in (*_leaves(item, sides), *_fused(item, sides)):
            chunks = groups.setdefault((found.kind, found.text, found.kinds, tuple(said for _, said in found.ways)), [])
            if not chunks or len(found.ways) ** (len(chunks[-1]) + 1) > MOST:
                chunks.append([])
            chunks[-1].append(found)
    return [_question(chunk, turned) for chunks in groups.values() for chunk in chunks]


def _question(leaves: Sequence[_Open], turned: bool) -> Question:
    """One question about leaves that have the same ways."""
    torch, flax = ([path for one in leaves for path in (one.flax if end else one.torch)] for end in (False, True))
    targets, sources = (torch, flax) if turned else (flax, torch)
    picks = product(range(len(leaves[0].ways)), repeat=len(leaves))
    found: list[Candidate] = []
    for pick in sorted(picks, key=lambda pick: (len(set(pick)), pick)):
        chosen = [one.ways[i] for one, i in zip(leaves, pick, strict=True)]
        said = chosen[0][1]
        if len(set(pick)) > 1:
            ends = [(one.torch if turned else one.flax)[0] for one in leaves]
            said = ", ".join(f"{name}: {way[1]}" for name, way in zip(ends, chosen, strict=True))
        found.append(Candidate(", ".join(rule for rule, _ in chosen), tuple(sources), said))
    names = ", ".join(fold_names(targets)[:4])
    return Question(leaves[0].kind, f"{names}: {leaves[0].text}", tuple(targets), tuple(sources), tuple(found[:MOST]))


def _leaves(item: Settled, sides: tuple[str, str]) -> Iterable[_Open]:
    """The open leaves of taken pairs. Stacks that are open in the same way are one, and so are leaves of one module."""
    groups: dict[object, list[tuple[Pair, Link, Choice, Ways]]] = {}
    for pair, link, choice in open_links(item):
        ways = leaf_ways(item.scope, pair, link, choice, sides)
        said: object = len(ways) if choice.trap is not None else tuple(said for _, said in ways)
        mark = choice.open if choice.kind == "stack" else (id(pair), choice.kind, said)
        groups.setdefault(mark, []).append((pair, link, choice, ways))
    for leaves in groups.values():
        torch, flax = paths_of(leaf[1].torch for leaf in leaves), paths_of(leaf[1].flax for leaf in leaves)
        _, link, choice, ways = leaves[0]
        if choice.kind != "stack":  # else a line for one leaf settles the axis of all
            each = zip(*(leaf[3] for leaf in leaves), strict=True)
            ways = [(", ".join(rule for rule, _ in way), way[0][1]) for way in each]
        yield _Open(
            "flatten" if choice.trap is not None else choice.kind,
            _text(choice, len(ways)),
            (link.torch.kind, link.flax.kind),
            torch,
            flax,
            tuple(ways),
        )


def _text(choice: Choice, count: int) -> str:
    trap = choice.trap
    if trap is not None:
        return (
            f"its width is {trap.size}; if {_FLOWS[trap.out]}, its values "
            f"must be reordered from (C, H, W), or from any other order that torch uses, such as {_other_order(trap)}"
        )
    if choice.kind == "order":
        return (
            f"the two names list its parts in different orders ({choice.parts}), and no file shows whether they lie so"
        )
    if choice.kind == "padding":
        return "the sides have as many features but not as many rows, and one may have added rows of zeros"
    what = "stack axes" if choice.kind == "stack" else "layouts"
    return f"the shape fits {count} {what}, and nothing tells which is right"


def leaf_ways(
    scope: Scope, pair: Pair, link: Link, choice: Choice, sides: tuple[str, str], silent: bool = False
) -> Ways:
    """Every way in which the leaf may be read, the likeliest first; one that says nothing if it is decided. `silent`:
    the line for a decided Linear states no layout, because it may take a flattened map."""
    ends = scope, link
    if choice.label is not None:
        linear = choice.label == ((), "linear")
        return [(column_rule(*ends, None if silent and linear else choice.label, sides), "")]
    out: Ways = []
    matrix = any(len(shape) == 2 for shape in link.torch.shapes.values())
    for label in choice.open:
        moves = [*order_keys(pair, link, label, choice.parts), {}] if choice.parts else [{}]
        for more, each in product(moves, choice.trap.rule_keys(matrix) if choice.trap is not None else ()):
            rule = column_rule(*ends, label, sides, {**more, **each})
            out.append((rule, "the values are a flattened map (C, H, W)"))
        labels = [known for known in link.labels if known == label or (not label[1] and known[0] == label[0])]
        for known, more in product(sorted(labels, key=usual)[:2], moves):
            rule = column_rule(*ends, known, sides, reading_keys(known, link, choice.kind != "order", True) | more)
            said = f"it is stacked on axis {', '.join(map(str, known[0]))}" if known[0] else _layout(known, rule)
            if choice.parts:
                lie = f"its parts change places ({choice.parts})" if more else "its parts lie in one order"
                said = lie if choice.kind == "order" else f"{said}, and {lie}"
            out.append((rule, said))
    return list(dict(out).items())


def _layout(label: Label, rule: str) -> str:
    """The layout of a candidate, in the word that its rule line states."""
    stated = "conv_transpose" if label[1] == "conv" and 'layout = "conv_transpose"' in rule else label[1]
    return f"the layout is {stated}"


_FORMS = {"block": "the parts lie one after the other", "interleaved": "the parts lie head by head"}
_FLOWS = {False: "a flattened convolution map feeds it", True: "its outputs become a convolution's map"}


def _other_order(trap: Suspect) -> str:
    """What a rule says if torch permutes the map first."""
    channels, height, width = trap.maps()[0]
    return "(w h c)" if trap.vector or trap.raw is not None else f'flatten = "W={width} H={height} C={channels}"'


def _fused(item: Settled, sides: tuple[str, str]) -> Iterable[_Open]:
    """Fused tensors whose parts may lie in several ways. A line for one leaf settles the other leaves of its module."""
    for group in item.groups:
        links = [link for link in group.links if not link.known]
        if links:
            torch = paths_of(column for link in links for column in link.torch)
            flax = paths_of(column for link in links for column in link.flax)
            known = {variant: _FORMS.get(variant, f"the layout is {variant}") for variant in links[0].variants}
            ways = [(group_rule(item.scope, links[0], variant, sides), said) for variant, said in known.items()]
            text = "nothing tells how the parts lie in the fused tensor"
            yield _Open("fused", text, ("", ""), torch, flax, tuple(ways))
