"""Names that mean something only beside their siblings: wi_0 beside wi_1, w1 beside w2 and w3, gate beside experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from graftax.match.names import Lexicon, Name, concepts
from graftax.match.sides import Module, Token
from graftax.match.words import ALONE, NUMBERED

_EXPERT, _GATE, _ROUTER = "expert", "gate", "router"


def refined(modules: Sequence[Module], names: dict[int, Name], lex: Lexicon, experts: bool) -> None:
    """Change the names (by id of module) of numbered siblings that the table knows, of a feed-forward part's two
    Linears, and of a router. `experts`: this side has experts somewhere."""
    if not lex.synonyms:
        return
    groups: defaultdict[tuple[Token, ...], dict[int, Module]] = defaultdict(dict)
    for module in modules:
        tokens = module.tokens
        if tokens and isinstance(tokens[-1], int):
            groups[tokens[:-1]][tokens[-1]] = module
        elif len(tokens) == 1 and not module.outer and tokens[0] in ALONE:
            _say(names, module, set(ALONE[str(tokens[0])].split()), set())
        elif experts and tokens and tokens[-1] == _GATE and not has_experts([module], lex):
            _say(names, module, {_ROUTER}, {_GATE})
    for prefix, members in groups.items():
        word = prefix[-1] if prefix else ""
        numbers = tuple(sorted(members))
        meant = next((found for words, known, found in NUMBERED if word in words and numbers == known), None)
        if meant is not None:
            for number, concept in zip(numbers, meant, strict=True):
                _say(names, members[number], {concept, *lex.implies.get(concept, ())}, {"up", "in"})
        elif len(numbers) == 2 and _there_and_back(members[numbers[0]], members[numbers[1]]):
            for number, concept in zip(numbers, ("up", "down"), strict=True):
                name = names[id(members[number])]
                if not name.concepts & {"attn", "conv"}:
                    _say(names, members[number], {concept, *lex.implies.get(concept, ())}, set())


def _say(names: dict[int, Name], module: Module, new: set[str], old: set[str]) -> None:
    name = names[id(module)]
    names[id(module)] = replace(name, concepts=(name.concepts - old) | new)


def _there_and_back(first: Module, second: Module) -> bool:
    """Two matrices of which the second takes what the first gives, and gives what it takes."""
    shapes: list[tuple[int, ...]] = []
    for module in (first, second):
        column = module.roles.get("weight")
        if column is None or set(module.roles) - {"weight", "bias"}:
            return False
        shapes.append(next(iter(column.shapes.values())))
    return (
        2 <= len(shapes[0]) == len(shapes[1]) <= 4 and shapes[0] != shapes[1] and sorted(shapes[0]) == sorted(shapes[1])
    )


def has_experts(modules: Iterable[Module], lex: Lexicon) -> bool:
    """Some path of this side holds experts."""
    return any(_EXPERT in concepts((*m.outer, *m.tokens), lex) for m in modules)
