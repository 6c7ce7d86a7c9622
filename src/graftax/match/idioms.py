"""Names that have a meaning only beside their siblings: wi_0 with wi_1, w1 with w2 and w3, gate with experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from graftax.match.names import Lexicon, Name, concepts
from graftax.match.sides import Module, Token
from graftax.match.words import ALONE, FIRST_SECOND, IN_BLOCK, NUMBERED

_EXPERT, _GATE, _ROUTER = "expert", "gate", "router"


_HALVES = {1: "up", 2: "down"}
_PLAIN = frozenset(["dense", "linear", "proj", "fc"])


def refined(modules: Sequence[Module], names: dict[int, Name], lex: Lexicon, experts: bool, root: bool = False) -> None:
    """Refine the names (by id of module) of numbered siblings that the table knows, of the two Linears of a
    feed-forward part, and of a router. `experts`: True if this side has experts."""
    if not lex.synonyms:
        return
    groups: defaultdict[tuple[Token, ...], dict[int, Module]] = defaultdict(dict)
    halves: defaultdict[tuple[Token, ...], list[tuple[int, Module]]] = defaultdict(list)
    paths = {module.tokens for module in modules}
    shared = next((n for n, level in enumerate(zip(*paths, strict=False)) if len(set(level)) > 1), -1)
    shared = len(next(iter(paths))) - 1 if len(paths) == 1 else shared
    for module in modules:
        tokens = module.tokens
        half = tokens[:-1] if tokens and tokens[-1] in _PLAIN else tokens
        if half and isinstance(half[-1], int):
            groups[half[:-1]][half[-1]] = module
            inside = not root or "mlp" in names[id(module)].concepts or any(c.stack for c in module.roles.values())
            if inside and len(half) > 1 and half[-2] in FIRST_SECOND:
                halves[half[:-1]].append((half[-1], module))
        if not root and tokens in IN_BLOCK:
            _say(names, module, {IN_BLOCK[tokens]}, set())  # type: ignore[index]
        if tokens and len(tokens) == shared + 1 and not module.outer and tokens[-1] in ALONE:
            _say(names, module, set(ALONE[str(tokens[-1])].split()), set())
        elif (
            tokens
            and tokens[-1] == _GATE
            and ((experts and not has_experts([module], lex)) or _flatter(module, modules))
        ):
            _say(names, module, {_ROUTER}, {_GATE})
    for members in halves.values():
        _name_halves(members, names, lex)
    _name_way_back(modules, names, lex)
    _name_fourth(modules, names, lex)
    for prefix, members in groups.items():
        word = prefix[-1] if prefix else ""
        numbers = tuple(sorted(members))
        meant = _numbered_parts(word, members)
        if meant is not None:
            for number, concept in zip(numbers, meant, strict=True):
                _say(names, members[number], {concept, *lex.implies.get(concept, ())}, {"up", "in"})
        elif len(numbers) == 2 and _there_and_back(members[numbers[0]], members[numbers[1]]):
            for number, concept in zip(numbers, ("up", "down"), strict=True):
                name = names[id(members[number])]
                if not name.concepts & {"attn", "conv"}:
                    _say(names, members[number], {concept, *lex.implies.get(concept, ())}, set())


def _flatter(module: Module, modules: Sequence[Module]) -> bool:
    """True if the module's matrix lacks an axis that two or more matrices beside it have: these hold all experts, and
    the gate chooses among them."""
    rank, beside = _rank(module), module.tokens[:-1]
    near = [_rank(other) for other in modules if other is not module and other.tokens[: len(beside)] == beside]
    return bool(beside) and sum(found == rank + 1 for found in near) > 1 and rank >= 2


def _rank(module: Module) -> int:
    """The number of axes of the module's weight, stacked ones included."""
    column = module.roles.get("weight") or module.roles.get("value")
    return len(column.stack) + len(next(iter(column.shapes.values()))) if column is not None else 0


def _name_halves(members: Sequence[tuple[int, Module]], names: dict[int, Name], lex: Lexicon) -> None:
    """Name fc1 and fc2 (or one of them) in a block as the feed-forward part's first and second Linear, unless their
    shapes or another word contradict it."""
    if any(number not in _HALVES for number, _ in members):
        return
    for number, module in members:
        column, half = module.roles.get("weight"), _HALVES[number]
        if column is None or column.kind == "norm" or _matrix(module) is None:
            continue
        shapes = set(column.shapes.values())
        inwards = (half == "up") == (column.kind != "kernel")
        # A checkpoint may store (in, out), so the shapes need not agree if the part is named.
        sure = "mlp" in names[id(module)].concepts
        fits = all(len(s) == 2 and (sure or (s[0] >= s[1] if inwards else s[0] <= s[1])) for s in shapes)
        if fits and not names[id(module)].concepts & {"attn", "conv", "up", "down", "gate", "q", "k", "v", "o"}:
            _say(names, module, {half, "in" if half == "up" else "out", *lex.implies.get(half, ())}, set())


def _numbered_parts(word: Token, members: Mapping[int, Module]) -> tuple[str, ...] | None:
    """What the numbered matrices of a gated part are, by the only row of the table that their shapes confirm: the
    second Linear takes what the others make. Square matrices confirm every row, so they decide nothing."""
    numbers = tuple(sorted(members))
    rows = [found for words, known, found in NUMBERED if word in words and numbers == known]
    if len(rows) < 2:
        return rows[0] if rows else None
    columns = [next(iter(members[number].roles.values())) for number in numbers]
    shapes = [next(iter(column.shapes.values())) for column in columns]
    fits = [row for row in rows if shapes.count(shapes[row.index("down")]) == 1 and len(set(shapes)) == 2]
    return fits[0] if len(fits) == 1 else None


def _name_fourth(modules: Sequence[Module], names: dict[int, Name], lex: Lexicon) -> None:
    """Beside q, k and v, the only other matrix is their output projection, if its name says no more than that it is a
    matrix, or the last."""
    together: defaultdict[tuple[Token, ...], list[Module]] = defaultdict(list)
    for module in modules:
        column = module.roles.get("weight")
        if column is not None and column.kind != "norm" and all(len(s) > 1 for s in column.shapes.values()):
            together[module.tokens[: module.cuts[-2]] if len(module.cuts) > 1 else ()].append(module)
    for prefix, members in together.items():
        said = [names[id(module)].concepts for module in members]
        rest = [n for n, found in enumerate(said) if not found & {"q", "k", "v", "qkv", "kv"}]
        parts = {part for found in said for part in found & {"q", "k", "v", "qkv", "kv"}}
        complete = any(needed <= parts for needed in ({"q", "k", "v"}, {"q", "kv"}, {"qkv"}))
        if len(rest) == 1 and complete:
            module = members[rest[0]]
            own = set(concepts(module.tokens[len(prefix) :], lex))
            if own <= {"linear", "proj", "out", "layer", "final", "post"}:
                _say(names, module, {"o", *lex.implies.get("o", ())}, set())


def _name_way_back(modules: Sequence[Module], names: dict[int, Name], lex: Lexicon) -> None:
    """The only matrix that takes what the first matrix of the feed-forward part makes, and makes what the first takes,
    is its second, if its name says that it is an output."""
    matrices = [(module, shape) for module in modules if (shape := _matrix(module)) is not None]
    there = [shape for m, shape in matrices if "up" in names[id(m)].concepts and len(shape) in (2, 3)]
    turned = (*there[0][:-2], *there[0][:-3:-1]) if len(there) == 1 else ()
    back = [m for m, shape in matrices if len(there) == 1 and shape == turned != there[0]]
    if len(back) == 1 and "out" in names[id(back[0])].concepts and not names[id(back[0])].concepts & {"attn", "conv"}:
        _say(names, back[0], {"down", *lex.implies.get("down", ())}, set())


def _say(names: dict[int, Name], module: Module, new: set[str], old: set[str]) -> None:
    name = names[id(module)]
    names[id(module)] = replace(name, concepts=(name.concepts - old) | new)


def _matrix(module: Module) -> tuple[int, ...] | None:
    """The shape of the weight of a module that has no other leaf but a bias."""
    column = module.roles.get("weight")
    return None if column is None or set(module.roles) - {"weight", "bias"} else next(iter(column.shapes.values()))


def _there_and_back(first: Module, second: Module) -> bool:
    """True if the second matrix takes what the first makes, and makes what the first takes."""
    one, other = _matrix(first), _matrix(second)
    if one is None or other is None:
        return False
    return 2 <= len(one) == len(other) <= 4 and one != other and sorted(one) == sorted(other)


def has_experts(modules: Iterable[Module], lex: Lexicon) -> bool:
    """True if some path of this side names experts."""
    return any(_EXPERT in concepts((*m.outer, *m.tokens), lex) for m in modules)
