"""Rule lines: the lines that a user pastes to settle one column."""

from __future__ import annotations

import re
from collections.abc import Mapping

from graftax.layers.patterns import LAYOUTS, PADDED
from graftax.match.flatten import Suspect
from graftax.match.groups import LAYERS, GroupLink
from graftax.match.pairs import Label, Link, Scope
from graftax.ops import Op, Rearrange
from graftax.rules.key_templates import Line, rule_templates
from graftax.rules.text import rule_line

_LAYOUTS = frozenset(("identity", *LAYOUTS))


def column_rule(
    scope: Scope,
    link: Link,
    label: Label | None,
    sides: tuple[str, str],
    open_: bool = False,
    asked: bool = False,
    more: Mapping[str, object] = {},
) -> str:
    """The rule line that pairs two columns with the reading `label`. It is one rule, or one per instance if the numbers
    of the two sides have no simple relation. `sides`: the words for the ends; `open_`: the reading is open; `asked`:
    only the reading is asked for, so that the line must name it; `more`: what else it states."""
    lines: list[str] = []
    for made in rule_templates(scope.keys, scope.crowd, [link.torch], [link.flax]):
        keys = _ends(made, sides)
        if label is not None:
            keys |= _reading_keys(label[1], link, open_, asked) | dict(more)
            if made.stack and label[0]:
                keys["stack"] = dict(zip(made.stack, label[0], strict=False))
            elif label[0]:
                keys = {**keys, "layout": None, **_of_one(link, label)}
        lines.append(rule_line(**keys))
    return ", ".join(lines)


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


def _ends(made: Line, sides: tuple[str, str]) -> dict[str, object]:
    """The templates of both sides, and the ranges of their indices."""
    ends = {side: found[0] if len(found) == 1 else list(found)
            for side, found in zip(sides, (made.torch, made.flax), strict=True)}  # fmt: skip
    return {**ends, **made.ranges}


def flatten_rules(scope: Scope, link: Link, label: Label, trap: Suspect, sides: tuple[str, str],
                  more: Mapping[str, object]) -> list[str]:  # fmt: skip
    """The rule lines that state a map flattened channels first in torch and channels last in Flax, one for each number
    of channels that fits."""
    out: list[str] = []
    matrix = any(len(shape) == 2 for shape in link.torch.shapes.values())
    for each in trap.rule_keys(matrix):
        lines: list[str] = []
        for made in rule_templates(scope.keys, scope.crowd, [link.torch], [link.flax]):
            keys = {**_ends(made, sides), **more, **each}
            if made.stack and label[0]:
                keys["stack"] = dict(zip(made.stack, label[0], strict=False))
            lines.append(rule_line(**keys))
        out.append(", ".join(lines))
    return out


def group_rule(scope: Scope, link: GroupLink, variant: str, sides: tuple[str, str]) -> str:
    """The rule line that states how the parts of a group lie in the fused tensor."""
    lines: list[str] = []
    for made in rule_templates(scope.keys, scope.crowd, link.torch, link.flax):
        way = link.ways[variant]
        stack = {made.stack[0] if name == LAYERS else name: axis for name, axis in way.stack.items()}
        keys = {**_ends(made, sides), **way.keys, **({"stack": stack} if stack else {})}
        lines.append(rule_line(**keys))
    return ", ".join(lines)


def _reading_keys(reading: str, link: Link, open_: bool, asked: bool) -> dict[str, object]:
    shape = next(iter(link.torch.shapes.values()))
    if reading == "conv" and {label[1] for label in link.labels} >= {"conv", "conv_transpose default"} and open_:
        return {"layout": "conv_transpose"}  # with transpose_kernel=True the axes move as in a plain convolution
    if reading.endswith(PADDED):
        return {"layout": reading.removesuffix(PADDED), "pad": "o"}
    if reading in _LAYOUTS:
        return {"layout": reading} if len(shape) > 1 or asked else {}
    chain = next(chain for (label, _, _), chain in link.chains.items() if label[1] == reading)
    return _ops_keys(chain[0]) if chain else {}


def _ops_keys(op: Op) -> dict[str, object]:
    """`ops` for one Rearrange, with the sizes of its groups."""
    if not isinstance(op, Rearrange):
        return {}
    grouped = {name for group in re.findall(r"\(([^)]*)\)", op.pattern) for name in group.split()}
    return {"ops": op.pattern, **{name: size for name, size in op.sizes if name in grouped}}
