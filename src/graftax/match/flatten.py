"""The flatten trap: a Linear fed by (or feeding) a flattened convolution map has one shape in both channel orders.

Files do not show it, so such a Linear is a question: its width is a multiple of a convolution's channels, and nothing
else in the checkpoint makes that width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftax.match.names import Lexicon, concepts
from graftax.match.sides import Module, Token

LEAST = 4  # positions of the smallest map that counts as one: a concatenation of two or three tensors is none
_INSIDE = frozenset(("mlp", "attn", "up", "down", "q", "k", "v", "o", "gate"))
_DECODES = frozenset(("dec", "deconv", "gen", "generator", "up", "upsample"))


@dataclass(frozen=True, slots=True)
class Suspect:
    """A Linear whose inputs (or outputs, where `out`) may be `channels` x positions."""

    channels: int
    positions: int
    out: bool

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Height and width, where the map is square."""
        side = math.isqrt(self.positions)
        return (side, side) if side * side == self.positions else None


def suspects(modules: Sequence[Module], families: Iterable[Module], lex: Lexicon) -> Mapping[int, Suspect]:
    """id of module -> why. `modules`: those outside of repeated blocks; `families`: the others."""
    inner = list(families)
    made, taken = _channels([*modules, *inner])
    if not made:
        return {}
    linears = [(m, s) for m in modules if (s := _matrix(m)) is not None]
    widths = {n for m in (*modules, *inner) for n in _own_widths(m)} | made
    for module in inner:
        shape = _matrix(module)
        if shape is not None:
            widths.add(shape[0])
    grown = True
    while grown:
        grown = False
        for module, (out, inp) in linears:
            if out not in widths and inp in widths and not _maybe_map(module, out, taken, lex):
                widths.add(out)
                grown = True
    found: dict[int, Suspect] = {}
    for module, (_, inp) in linears:
        if set(concepts(module.tokens, lex)) & _INSIDE:
            continue
        channels = _multiple(inp, made)
        if inp not in widths and channels and not _after_sibling(module, inp, linears):
            found[id(module)] = Suspect(channels, inp // channels, False)
    eaten = {inp for module, (_, inp) in linears if id(module) not in found} | {
        n for m in (*modules, *inner) for n in _own_widths(m)
    }
    for module, (out, _) in linears:
        channels = _multiple(out, taken)
        if id(module) not in found and channels and out not in eaten and _maybe_map(module, out, taken, lex):
            found[id(module)] = Suspect(channels, out // channels, True)
    return found


def _matrix(module: Module) -> tuple[int, int] | None:
    column = module.roles.get("weight")
    if column is None or column.stack or column.kind == "raw":
        return None
    shape = next(iter(column.shapes.values()))
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _channels(modules: Iterable[Module]) -> tuple[set[int], set[int]]:
    """(channels that convolutions make, channels that they take)."""
    made: set[int] = set()
    taken: set[int] = set()
    for module in modules:
        column = module.roles.get("weight")
        for shape in set(column.shapes.values()) if column is not None and not column.stack else ():
            if 3 <= len(shape) <= 5:
                made.add(shape[0])
                taken.add(shape[1])
                bias = module.roles.get("bias")
                if bias is not None and next(iter(bias.shapes.values())) == (shape[1],) and shape[0] != shape[1]:
                    made.remove(shape[0])  # a transposed convolution: (in, out)
                    made.add(shape[1])
                    taken.add(shape[0])
    return {n for n in made if n > 1}, {n for n in taken if n > 1}


def _own_widths(module: Module) -> list[int]:
    """Widths that a norm or a table shows."""
    out: list[int] = []
    for role in ("weight", "value"):
        column = module.roles.get(role)
        if column is not None:
            shape = next(iter(column.shapes.values()))
            if len(shape) == 1 and "mean" not in module.roles:
                out.append(shape[0])
            if role == "value" and shape:
                out.append(shape[-1])
    return out


def _multiple(width: int, channels: set[int]) -> int:
    """The largest channel count of which `width` is a multiple, LEAST positions at least; 0 for none."""
    return max((c for c in channels if width % c == 0 and width // c >= LEAST), default=0)


def _maybe_map(module: Module, out: int, taken: set[int], lex: Lexicon) -> bool:
    """The outputs may be unflattened for a decoder's convolutions."""
    words = set(concepts(module.tokens, lex))
    return bool(_multiple(out, taken)) and bool(words & _DECODES)


def _after_sibling(module: Module, width: int, linears: Sequence[tuple[Module, tuple[int, int]]]) -> bool:
    """The numbered sibling before it makes this width: fc1 -> fc2."""
    for other, (out, _) in linears:
        alike = out == width and other is not module and _template(other.tokens) == _template(module.tokens)
        if alike and _ints(other.tokens) < _ints(module.tokens):
            return True
    return False


def _template(tokens: tuple[Token, ...]) -> tuple[object, ...]:
    return tuple(0 if isinstance(token, int) else token for token in tokens)


def _ints(tokens: tuple[Token, ...]) -> tuple[int, ...]:
    return tuple(token for token in tokens if isinstance(token, int))
