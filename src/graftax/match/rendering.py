"""Rule lines: the lines that a user pastes to settle one column."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from graftax.layers.patterns import LAYOUTS, PADDED
from graftax.match.groups import LAYERS, GroupLink
from graftax.match.pairs import Label, Link, Scope
from graftax.match.sides import Column
from graftax.ops import Op, Rearrange
from graftax.rules.key_templates import Line, rule_templates
from graftax.rules.text import rule_line

_LAYOUTS = frozenset(("identity", *LAYOUTS))


def column_rule(
    scope: Scope, link: Link, label: Label | None, sides: tuple[str, str], stated: Mapping[str, object] | None = None
) -> str:
    """The rule line that pairs two columns with the reading `label`. It is one rule, or one per instance if the numbers
    of the two sides have no simple relation. `sides`: the words for the ends; `stated`: what it says of the reading
    (default: what `reading_keys` gives)."""
    keys = dict(stated or {})
    if stated is None and label is not None:
        keys = reading_keys(label, link)

    def more(made: Line) -> dict[str, object]:
        if label is None or not label[0]:
            return keys
        if made.stack:
            return {**keys, "stack": dict(zip(made.stack, label[0], strict=False))}
        return {**keys, "layout": None, **_of_one(link, label)}

    return _lines(scope, [link.torch], [link.flax], sides, more)


def group_rule(scope: Scope, link: GroupLink, variant: str, sides: tuple[str, str]) -> str:
    """The rule line that states how the parts of a group lie in the fused tensor."""
    way = link.ways[variant]

    def more(made: Line) -> dict[str, object]:
        stack = {made.stack[0] if name == LAYERS else name: axis for name, axis in way.stack.items()}
        return {**way.keys, **({"stack": stack} if stack else {})}

    return _lines(scope, link.torch, link.flax, sides, more)


def _lines(
    scope: Scope,
    torch: Sequence[Column],
    flax: Sequence[Column],
    sides: tuple[str, str],
    more: Callable[[Line], Mapping[str, object]],
) -> str:
    """The rules that name these columns, with what each states: the templates of both sides, the ranges of their
    indices, and `more`."""
    out: list[str] = []
    for made in rule_templates(scope.keys, scope.crowd, torch, flax):
        ends = (found[0] if len(found) == 1 else list(found) for found in (made.torch, made.flax))
        out.append(rule_line(**dict(zip(sides, ends, strict=True)), **made.ranges, **more(made)))
    return ", ".join(out)


def _of_one(link: Link, label: Label) -> dict[str, object]:
    """`ops` for stacks of one, which a rule states as axes of length 1."""
    shape = next(iter(link.torch.shapes.values()))
    chain = next(chain for (known, _, _), chain in link.chains.items() if known == label)
    names = " ".join("abcdefgh"[: len(shape)])
    first = chain[0] if chain and isinstance(chain[0], Rearrange) else Rearrange(f"{names} -> {names}")
    left, right = first.pattern.split(" -> ")
    groups = re.findall(r"\([^)]*\)|\S+", left if link.flax.stack else right)
    for axis in sorted(axis % (len(groups) + len(label[0])) for axis in label[0]):
        groups.insert(axis, "1")
    ends = (" ".join(groups), right) if link.flax.stack else (left, " ".join(groups))
    return _ops_keys(Rearrange(" -> ".join(ends), first.sizes))


def reading_keys(label: Label, link: Link, open_: bool = False, asked: bool = False) -> dict[str, object]:
    """What a rule states of a reading. `open_`: the reading is open; `asked`: only the reading is asked for, so that
    the line must name it."""
    reading = label[1]
    shape = next(iter(link.torch.shapes.values()))
    if reading == "conv" and {other[1] for other in link.labels} >= {"conv", "conv_transpose default"} and open_:
        return {"layout": "conv_transpose"}  # with transpose_kernel=True the axes move as in a plain convolution
    if reading.endswith(PADDED):
        return {"layout": reading.removesuffix(PADDED), "pad": "o"}
    if reading in _LAYOUTS:
        return {"layout": reading} if len(shape) > 1 or asked else {}
    chain = next(chain for (other, _, _), chain in link.chains.items() if other[1] == reading)
    return _ops_keys(chain[0]) if chain else {}


def _ops_keys(op: Op) -> dict[str, object]:
    """`ops` for one Rearrange, with the sizes of its groups."""
    if not isinstance(op, Rearrange):
        return {}
    grouped = {name for group in re.findall(r"\(([^)]*)\)", op.pattern) for name in group.split()}
    return {"ops": op.pattern, **{name: size for name, size in op.sizes if name in grouped}}
