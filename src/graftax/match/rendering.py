"""Rule lines: the lines that a user pastes to settle one column."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from graftax.match.flatten import Suspect
from graftax.match.groups import Group, GroupLink, heads_of
from graftax.match.numbers import NUMBER
from graftax.match.pairs import Label, Link, Scope
from graftax.match.sides import Column, Key, Module, Token
from graftax.ops import Op, Rearrange
from graftax.rules.template import escape_key
from graftax.rules.text import rule_line

_INDICES = "lmnpqrs"
_LAYOUTS = frozenset(("linear", "identity", "conv", "conv_transpose default"))


def column_rule(
    scope: Scope,
    torch: Module,
    flax: Module,
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
    for shared in _parts(scope, link.torch, link.flax):
        t_path, f_path, stack = templates(scope, torch, flax, link.torch, link.flax, shared)
        keys: dict[str, object] = {sides[0]: t_path, sides[1]: f_path}
        if label is not None:
            keys |= _reading_keys(label[1], link, open_, asked) | dict(more)
            if stack and label[0]:
                keys["stack"] = dict(zip(stack, label[0], strict=False))
        lines.append(rule_line(**keys))
    return ", ".join(lines)


def flatten_rules(scope: Scope, torch: Module, flax: Module, link: Link, label: Label, trap: Suspect,
                  sides: tuple[str, str], more: Mapping[str, object]) -> list[str]:  # fmt: skip
    """The rule lines that state a map flattened channels first in torch and channels last in Flax, one for each number
    of channels that fits."""
    out: list[str] = []
    for c, h, w in trap.maps():
        lines: list[str] = []
        for shared in _parts(scope, link.torch, link.flax):
            t_path, f_path, stack = templates(scope, torch, flax, link.torch, link.flax, shared)
            keys: dict[str, object] = {sides[0]: t_path, sides[1]: f_path, **more}
            if trap.vector:
                matrix = any(len(shape) == 2 for shape in link.torch.shapes.values())
                keys["ops"] = "(c h w) i -> i (h w c)" if matrix else "(c h w) -> (h w c)"
                keys |= {"c": c, "h": h, "w": w}
            else:
                keys["flatten"] = f"C={c} H={h} W={w}"
            if stack and label[0]:
                keys["stack"] = dict(zip(stack, label[0], strict=False))
            lines.append(rule_line(**keys))
        out.append(", ".join(lines))
    return out


def group_rule(scope: Scope, group: Group, link: GroupLink, variant: str, sides: tuple[str, str]) -> str:
    """The rule line that states how the parts of a group lie in the fused tensor."""
    lines = [
        _group_rule(scope, group, link, variant, sides, shared) for shared in _parts(scope, link.torch[0], link.flax[0])
    ]
    return ", ".join(lines)


def _group_rule(
    scope: Scope, group: Group, link: GroupLink, variant: str, sides: tuple[str, str], shared: list[tuple[Key, Key]]
) -> str:
    lists: list[list[str]] = [[], []]
    for i, module in enumerate(group.torch):
        for j, other in enumerate(group.flax):
            t_path, f_path, _ = templates(scope, module, other, link.torch[i], link.flax[j], shared)
            lists[0] += [t_path] if j == 0 else []
            lists[1] += [f_path] if i == 0 else []
    keys: dict[str, object] = {
        side: paths[0] if len(paths) == 1 else paths for side, paths in zip(sides, lists, strict=True)
    }
    if variant.startswith("stack "):
        keys["stack"] = {"list": int(variant.removeprefix("stack "))}
        inner = next(iter(link.variants[variant].values()))[:-1]
        if any("(" in op.pattern for op in inner if isinstance(op, Rearrange)):
            keys |= _ops_keys(inner[0])
    else:
        keys["fused"] = variant
        if variant == "interleaved":
            keys["heads"] = heads_of(next(iter(link.variants[variant].values())))
    return rule_line(**keys)


def _reading_keys(reading: str, link: Link, open_: bool, asked: bool) -> dict[str, object]:
    shape = next(iter(link.torch.shapes.values()))
    if reading.startswith("fused "):
        pattern, parts = next(
            (chain[0].pattern, dict(chain[0].sizes))
            for (label, _, _), chain in link.chains.items()
            if label[1] == reading and isinstance(chain[0], Rearrange)
        )
        return {"ops": pattern, **parts}
    if reading == "conv" and {label[1] for label in link.labels} >= {"conv", "conv_transpose default"} and open_:
        return {"layout": "conv_transpose"}  # with transpose_kernel=True the axes move as in a plain convolution
    if reading in _LAYOUTS:
        return {"layout": reading} if len(shape) > 1 or asked else {}
    if reading.startswith("heads "):
        target = next(chain[0] for (label, _, _), chain in link.chains.items() if label[1] == reading)
        return {"ops": reading.removeprefix("heads "), **dict(getattr(target, "sizes", ()))}
    chain = next(chain for (label, _, _), chain in link.chains.items() if label[1] == reading)
    return _ops_keys(chain[0]) if chain else {}


def _ops_keys(op: Op) -> dict[str, object]:
    """`ops` for one Rearrange, with the sizes of its groups."""
    if not isinstance(op, Rearrange):
        return {}
    grouped = {name for group in re.findall(r"\(([^)]*)\)", op.pattern) for name in group.split()}
    return {"ops": op.pattern, **{name: size for name, size in op.sizes if name in grouped}}


def _parts(scope: Scope, left: Column, right: Column) -> list[list[tuple[Key, Key]]]:
    """The instances of two columns, as one template can name them: all together, or each by itself."""
    shared = [(t, f) for t, f in scope.keys if t in left.paths and f in right.paths]
    shared = shared or [(t, f) for t, f in scope.keys if t in left.paths or f in right.paths] or scope.keys
    simple = len(shared) < 2 or (
        any(_indices([t for t, _ in shared], [f for _, f in shared]))
        and all(_holds(right.paths[f], f) for _, f in shared if f in right.paths)
    )
    return [shared] if simple and not _crowded(scope, left, right) else [[keys] for keys in shared]


def skeleton(path: str) -> str:
    """The path without its numbers."""
    return NUMBER.sub("\0", path)


def _crowded(scope: Scope, left: Column, right: Column) -> bool:
    """True if a template would also name leaves of blocks of another kind."""
    return any(
        sum(map(len, column.paths.values())) < scope.crowd.get(skeleton(next(iter(column.paths.values()))[0]), 0)
        for column in (left, right)
    )


def _holds(paths: Sequence[str], key: Key) -> bool:
    """True if the numbers of the instance are in its path. They are not if they count calls and the path counts
    constructions."""
    numbers = iter(NUMBER.findall(paths[0]))
    return all(any(int(number) == part for number in numbers) for part in key)


def templates(
    scope: Scope, torch: Module, flax: Module, left: Column, right: Column, shared: list[tuple[Key, Key]]
) -> tuple[str, str, tuple[str, ...]]:
    """Both path templates, and the names of the indices that only one side has (stacked). `shared`: the instances that
    the templates name; if it is one of several, its numbers stay as they are."""
    t_key, f_key = shared[0]
    alone = len(shared) == 1 and (len(scope.keys) > 1 or _crowded(scope, left, right))
    t_index, f_index = ([], []) if alone else _indices([t for t, _ in shared], [f for _, f in shared])
    extra_t, extra_f = len(left.stack), len(right.stack)
    stack = tuple(_INDICES[len(t_key) + n] for n in range(extra_t or extra_f))
    t_path = _template(
        left.paths.get(t_key) or next(iter(left.paths.values())), torch, t_index, stack if extra_t else ()
    )
    f_path = _template(
        right.paths.get(f_key) or next(iter(right.paths.values())), flax, f_index, stack if extra_f else ()
    )
    return t_path, f_path, stack


def _template(paths: Sequence[str], module: Module, index: Sequence[str], stack: Sequence[str]) -> str:
    """The first path with its block numbers replaced by indices."""
    path = paths[0]
    numbers: list[Token] = [t for t in (*module.outer, *module.tokens) if not isinstance(t, str)]
    names = iter([*index, *stack])
    out: list[str] = []
    end = 0
    counting = [isinstance(token, tuple) for token in numbers]
    if stack:
        # The module's tokens do not hold a stacked number, so every number that varies among the paths counts.
        rows = [NUMBER.findall(p) for p in paths]
        varies = [len({row[i] for row in rows}) > 1 for i in range(len(rows[0]))]
        spots = [i for i, moves in enumerate(varies) if moves][: len(stack)]
        plain = iter(numbers)
        counting = [True if i in spots else isinstance(next(plain, 0), tuple) for i in range(len(rows[0]))]
    for n, found in enumerate(NUMBER.finditer(path)):
        if n < len(counting) and counting[n]:
            name = next(names, None)
            if name is not None:
                out.append(escape_key(path[end : found.start()]) + "{" + name + "}")
                end = found.end()
    return "".join(out) + escape_key(path[end:])


def _indices(torch: list[Key], flax: list[Key]) -> tuple[list[str], list[str]]:
    """The relation of the numbers of both sides: equal, an offset, or (major, minor) as one consecutive number."""
    names = list(_INDICES)
    p, q = len(torch[0]), len(flax[0])
    if p == q:
        offsets = [{b[i] - a[i] for a, b in zip(torch, flax, strict=True)} for i in range(p)]
        if all(len(o) == 1 for o in offsets):
            left: list[str] = []
            right: list[str] = []
            for i, (offset,) in enumerate(map(tuple, offsets)):
                left.append(names[i] if offset >= 0 else f"{names[i]}+{-offset}")
                right.append(names[i] if offset <= 0 else f"{names[i]}+{offset}")
            return left, right
    for one, two, turned in ((torch, flax, False), (flax, torch, True)):
        if len(one[0]) == 2 and len(two[0]) == 1:
            found = _counted(one, [key[0] for key in two])
            if found is not None:
                first, width = found
                pair = [_plus(names[0], one[0][0]), _plus(names[1], one[0][1])]
                through = [f"{width}*{names[0]}+{names[1]}" + (f"+{first}" if first else "")]
                return (through, pair) if turned else (pair, through)
    # There is no simple relation: the numbers of the first instance stay as they are.
    return ([], [])


def _plus(name: str, offset: int) -> str:
    return f"{name}+{offset}" if offset else name


def _counted(pairs: list[Key], singles: list[int]) -> tuple[int, int] | None:
    """(first, width) where single = width x (major - major_0) + minor - minor_0 + first."""
    major, minor = pairs[0]
    first = singles[0]
    widths = {(s - first - (b - minor)) // (a - major) for (a, b), s in zip(pairs, singles, strict=True) if a != major}
    if len(widths) != 1:
        return None
    (width,) = widths
    exact = all(s == width * (a - major) + (b - minor) + first for (a, b), s in zip(pairs, singles, strict=True))
    return (first, width) if exact and width > 0 and first >= 0 else None
