"""Make a `Rule` from a table of a rules file. Every key, every type and every combination is checked, and all faults
are reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from graftax.errors import Failure, RulesError, escape
from graftax.layers import layouts
from graftax.rules.axes import OWN, OpsText, parse_ops
from graftax.rules.model import KNOWN_BLOCKS, LIST, Rule
from graftax.rules.schema import KEYS
from graftax.rules.template import Template, index_names, parse_template
from graftax.tree import Side, nearest

_RANGE = re.compile(r"\s*([0-9]{1,9})\s*\.\.\s*([0-9]{1,9})\s*", re.ASCII)
_MOST = 1_000_000


class Faults(list[tuple[str, str]]):
    """What is wrong with a table, and what to do about it."""

    def say(self, text: str, hint: str = "") -> None:
        self.append((text, hint))


def make_rule(data: Any, label: str, line: str) -> tuple[Rule | None, list[Failure]]:
    """The rule of one table, or all its faults. `label`, `line`: its place, for messages and evidence."""
    where = Rule(label, line).where
    if not isinstance(data, Mapping):
        found = type(data).__name__
        return None, [Failure("a rule is a table", label, where, '{ torch = "...", flax = "..." }', found)]
    table = {str(key): value for key, value in cast("Mapping[Any, Any]", data).items()}
    given, texts = _typed(table)
    rule: Rule | None = None
    if texts:
        texts += _strange(table)
    else:
        rule, texts = _made(given, table, label, line)
    failures = [Failure(text, label, where, next=hint) for text, hint in texts]
    return (None if failures else rule), failures


_AS_GIVEN = ("flatten", "parts", "heads", "kv_heads", "scale", "offset", "repeat", "pad", "drop", "fill", "missing")


def _typed(table: Mapping[str, Any]) -> tuple[dict[str, Any], Faults]:
    given: dict[str, Any] = {}
    faults = Faults()
    for name, check in KEYS.items():
        try:
            given |= {name: check(table[name])} if table.get(name) is not None else {}
        except ValueError as error:
            faults.say(f"`{name}` is {escape(repr(table[name]), 80)}", f"It should be {error}.")
    return given, faults


def _strange(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Unknown keys of a table with other faults: the keys that neither a template nor `ops` names."""
    texts = " ".join(str(table.get(name, "")) for name in ("torch", "flax", "source", "target", "ops"))
    words = set(re.findall(r"\w+", texts))
    return [_unknown(name, KEYS) for name in table if name not in KEYS and name not in words]


def _unknown(name: str, known: Iterable[str]) -> tuple[str, str]:
    return f"{escape(name)!r} is no key of a rule", _near(name, known)


def _near(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known, 2)
    return f"Near: {near}." if near else f"Known: {', '.join(known)}."


def _made(given: Mapping[str, Any], table: Mapping[str, Any], label: str, line: str) -> tuple[Rule | None, Faults]:
    faults = Faults()
    extras = {key: value for key, value in table.items() if key not in KEYS}
    left, right = _ends(given, faults)
    templates = _templates(left, faults), _templates(right, faults)
    if faults:
        faults += _strange(table)
        return None, faults
    _alike(templates, faults)
    indices = set(index_names(templates[0])) | set(index_names(templates[1]))
    ops = _ops(given, indices, faults)
    parts = given.get("parts", ((), ()))
    ranges, sizes = _extras(extras, indices, ops, parts[0], faults)
    _together(given, left, right, faults)
    if faults:
        return None, faults
    stack = _stack(given, templates, ops, faults)
    fused = _fused(given, left, right, stack, ops, faults)
    layout = given.get("layout", "")
    if "transpose" in given:
        layout = "linear" if given["transpose"] else "identity"
    if layout and layout not in layouts():
        faults.say(f"`layout` is {escape(layout)!r}", _near(layout, layouts()))
    if faults:
        return None, faults
    rule = Rule(
        label,
        line,
        left,
        right,
        index_names(templates[0]),
        index_names(templates[1]),
        "source" in given or "target" in given,
        ops=ops,
        layout=layout,
        fused=fused,
        stack=stack,
        ranges=ranges,
        sizes=sizes,
        table=table,
        **{name: given[name] for name in _AS_GIVEN if name in given},
    )
    return rule, faults


def _ends(given: Mapping[str, Any], faults: Faults) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The templates of the left and of the right end."""
    used = [name for name in ("torch", "flax", "source", "target") if name in given]
    if not used:
        faults.say("it names no key", 'Give `torch` and `flax`, such as { torch = "fc.weight", flax = "fc/kernel" }.')
    elif {"torch", "flax"} & set(used) and {"source", "target"} & set(used):
        faults.say(f"it mixes {' and '.join(used)}", "`source` and `target` are for ends that are one side.")
    return given.get("torch", given.get("source", ())), given.get("flax", given.get("target", ()))


def _templates(texts: Sequence[str], faults: Faults) -> tuple[Template, ...]:
    """The templates. Their side is guessed from the separator, which matters here only for `**`."""
    out: list[Template] = []
    for text in texts:
        side: Side = "flax" if "/" in text else "torch"
        try:
            out.append(parse_template(text, side))
        except RulesError as error:
            faults.say(str(error))
    return tuple(out)


# ---------------------------------------------------------------- index ranges and axis sizes


def _extras(
    extras: Mapping[str, Any], indices: set[str], ops: OpsText | None, parts: Sequence[str], faults: Faults
) -> tuple[dict[str, Sequence[int]], dict[str, int]]:
    ranges: dict[str, Sequence[int]] = {}
    sizes: dict[str, int] = {}
    axes = ops.axes if ops else frozenset[str]()
    twice = [name for name in parts if name in axes or name in indices]
    faults += [(f"{escape(name)!r} is a part, and an axis or an index too", "Give it another name.") for name in twice]
    for name, value in extras.items():
        if name in indices:
            numbers = _range(value)
            if numbers is None:
                hint = f'Write {name} = "3..60" (both ends are in), {name} = 3 or {name} = [0, 2, 4], each number once.'
                faults.say(f"`{escape(name)}` is {escape(repr(value), 80)}", hint)
            else:
                ranges[name] = numbers
        elif name in axes or name in parts:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                faults.say(f"`{escape(name)}` is {escape(repr(value), 80)}", "The length of an axis is a number.")
            else:
                sizes[name] = value
        else:
            faults.append(_unknown(name, [*KEYS, *indices, *axes, *parts]))
    if 0 < len(sized := [name for name in parts if name in sizes]) < len(parts):
        faults.say(f"`parts` has the size of {escape(', '.join(sized))} alone", "Give the size of each part, or none.")
    return ranges, sizes


def _range(value: Any) -> Sequence[int] | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return (value,)
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[Any]", value)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in items)
        if items and whole and len(set(items)) == len(items):
            return tuple(items)
    if isinstance(value, str) and (found := _RANGE.fullmatch(value)):
        first, last = int(found[1]), int(found[2])
        if first <= last and last - first < _MOST:
            return range(first, last + 1)
    return None


# ---------------------------------------------------------------- what goes with what


def _ops(given: Mapping[str, Any], indices: set[str], faults: Faults) -> OpsText | None:
    if "ops" not in given:
        return None
    try:
        parsed = parse_ops(given["ops"], frozenset(indices | {LIST}))
    except RulesError as error:
        faults.say(f"`ops`: {error}")
        return None
    if parsed.left is None:
        strange = [name for name in parsed.right_names if name not in OWN]
        if strange:
            hint = "Without '->' the axes are the tensor's own (o i, o i k, o i kh kw) and the indices; "
            text = f"`ops` = {escape(given['ops'])!r} does not say where {escape(', '.join(strange))} come from"
            faults.say(text, hint + "write both sides: '(h d) i -> i h d'.")
    return parsed


_APART = (
    ("ops", "layout"), ("ops", "transpose"), ("ops", "flatten"), ("layout", "transpose"), ("layout", "flatten"),
    ("transpose", "flatten"), ("fused", "flatten"), ("heads", "flatten"), ("drop", "missing"), ("fill", "missing"),
)  # fmt: skip


def _together(given: Mapping[str, Any], left: Sequence[str], right: Sequence[str], faults: Faults) -> None:
    for one, other in _APART:
        if one in given and other in given:
            faults.say(f"`{one}` and `{other}` exclude each other", "Leave one out.")
    heads, kv_heads = given.get("heads"), given.get("kv_heads")
    if kv_heads is not None and (heads is None or heads % kv_heads):
        faults.say(f"`kv_heads` = {kv_heads} shares out no `heads`", "Give `heads`, a multiple of it.")
    if heads is not None and given.get("fused") in ("sum", "tied"):
        faults.say(f"`heads` and `fused` = {given['fused']!r} exclude each other", "Leave one out.")
    if left and right:
        for name in ("drop", "missing"):
            if name in given:
                faults.say(f"`{name}` is for a key of one side alone", "Name one side, or leave it out.")
        if "fill" in given and "pad" not in given:
            faults.say("`fill` is for a key of one side alone, or the value of `pad`", "Name one side only.")
        return
    idle = [n for n in given if n not in ("torch", "flax", "source", "target", "drop", "fill", "missing")]
    if not {"drop", "fill", "missing"} & set(given) and (left or right):
        hint = 'Name the other side, or say drop = "reason", fill = 0.0 or missing = "zeros".'
        faults.say("it names one side only", hint)
    elif idle:
        faults.say(f"`{idle[0]}` needs both sides", "Name the other side, or leave it out.")


def _alike(templates: tuple[tuple[Template, ...], tuple[Template, ...]], faults: Faults) -> None:
    """Check that the templates of one side have the same indices, and that all templates have the same wildcards."""
    for side in templates:
        for other in side[1:]:
            if set(other.names) != set(side[0].names):
                faults.say(f"{escape(side[0].text)!r} and {escape(other.text)!r} have different indices")
    every = [template for side in templates for template in side]
    for other in every[1:]:
        if other.wilds != every[0].wilds:
            hint = "The k-th * of one side corresponds to the k-th of the other, ** to **."
            faults.say(f"{escape(every[0].text)!r} and {escape(other.text)!r} have different wildcards", hint)


def _stack(
    given: Mapping[str, Any],
    templates: tuple[tuple[Template, ...], tuple[Template, ...]],
    ops: OpsText | None,
    faults: Faults,
) -> dict[str, int]:
    """index -> axis, from `stack` and `ops`; it must hold every index that only one side has."""
    left, right = (set(index_names(side)) for side in templates)
    if not templates[0] or not templates[1]:
        return {}
    many = len(templates[0]) != 1, len(templates[1]) != 1
    lists: set[str] = {LIST} if many[0] != many[1] else set()
    loose = (left - right) | (right - left) | lists
    shared = left & right
    stack: dict[str, int] = dict(given.get("stack", {}))
    if "" in stack:
        names = (left ^ right) or lists
        if len(names) != 1:
            faults.say("`stack` is one number", f"Name the index: {_each(sorted(loose))}.")
            return {}
        stack = {names.pop(): stack[""]}
    for name in stack:
        if name not in loose:
            why = "is on both sides" if name in shared else "is no index of the templates"
            known = f"Indices that can be stacked: {', '.join(sorted(loose)) or 'none'}."
            faults.say(f"`stack` names {escape(name)!r}, which {why}", known)
    placed: Mapping[str, bool] = ops.placed if ops else {}
    for name, on_left in placed.items():
        if name in stack:
            faults.say(f"{escape(name)!r} is in `stack` and in `ops`", "Say it once.")
        elif name in shared:
            faults.say(f"`ops` names {escape(name)!r}, which is on both sides", "It is stacked on neither.")
        elif name != LIST and on_left != (name in right):
            word = "right" if name in left else "left"
            faults.say(f"`ops` has {escape(name)!r} on the wrong side of '->'", f"It belongs on the {word}.")
    listed = LIST in stack or LIST in placed
    to_right, to_left = bool(left - right) or (listed and many[0]), bool(right - left) or (listed and many[1])
    if to_right and to_left:
        words = [", ".join(sorted(names)) or LIST for names in (left - right, right - left)]
        hint = "A number has one name on both sides; stack one way in one rule."
        faults.say(f"{words[0]} is on the left only and {words[1]} is on the right only", hint)
    elif open_ := [] if faults else sorted(((left - right) | (right - left)) - set(stack) - set(placed)):
        faults.say(f"index {', '.join(open_)} is on one side only", f"Say on which axis it is stacked: {_each(open_)}.")
    return stack


def _each(names: Iterable[str]) -> str:
    return "stack = {" + ", ".join(f"{name} = 0" for name in names) + "}"


def _fused(
    given: Mapping[str, Any],
    left: Sequence[str],
    right: Sequence[str],
    stack: Mapping[str, int],
    ops: OpsText | None,
    faults: Faults,
) -> str:
    fused = given.get("fused", "")
    listed = LIST in stack or (ops is not None and LIST in ops.placed)
    if not left or not right:
        return ""
    if "parts" in given:
        if len(left) > 1 or len(right) > 1 or fused in ("tied", "sum"):
            hint = "It is for one tensor on each side; the order of a list is the order of its parts."
            faults.say(f"`parts` excludes a list{' and `fused` = ' + repr(fused) if fused else ''}", hint)
        if fused == "interleaved" and "heads" not in given:
            faults.say("`parts` that are interleaved need `heads`", "It is the number of runs in which they lie.")
        return fused
    if len(left) > 1 and len(right) > 1:
        if fused != "sum" or stack:
            hint = 'Write a rule for each pair; fused = "sum" alone adds a list and splits the sum in blocks.'
            faults.say("both sides are lists", hint)
    elif len(left) == len(right) == 1:
        if fused:
            faults.say(f"`fused` = {fused!r}, but both sides are one tensor", "Give a list on one side.")
        if listed:
            faults.say("`list` is stacked, but neither side is a list")
    elif fused and listed:
        faults.say("`fused` and a stacked `list` exclude each other", "Leave one out.")
    elif not fused and not listed:
        one = (left if len(left) == 1 else right)[0]
        if re.split(r"[./]", one)[-1] in KNOWN_BLOCKS:
            return "block"
        several = max(len(left), len(right))
        hint = 'Say fused = "block", "interleaved", "tied" or "sum", or stack = {list = 0}.'
        faults.say(f"it does not say how {several} tensors lie in one", hint)
    elif fused == "sum" and len(left) == 1:
        faults.say("`fused` = 'sum' adds a list of torch tensors into one", "Give the list on the left.")
    return fused
