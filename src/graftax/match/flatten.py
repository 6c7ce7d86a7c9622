"""The flatten trap: a Linear that takes (or makes) a flattened convolution map has the same shape in both channel
orders.

Files do not show the order, so such a Linear is a question. Its width is a multiple of a convolution's channels, and
nothing else in the checkpoint makes that width, or nothing else takes those channels. A norm of that width belongs to
it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftax.match.names import Lexicon, concepts
from graftax.match.sides import Module, Shape, Token

LEAST = 2  # positions of the smallest map
_SCALE_SHIFT = 4  # a Linear may make two or three vectors for each channel, so fewer positions are no map there
_IMAGE = 4  # an input may have as many channels itself
_FUSED = (2, 3)  # how many parts one Linear inside of blocks may make
_OFFERED = 3  # how many channel counts are offered
_DECODES = frozenset(("dec", "deconv", "gen", "generator", "up", "upsample"))
_VECTORS = ("weight", "bias", "mean", "var")


@dataclass(frozen=True, slots=True)
class Suspect:
    """A Linear whose inputs (or outputs, if `out`) may be `channels` x positions; or a norm (`norm`) of that width.
    `others`: further channel counts that fit; `seen`: channels, height and width that a trace shows (0: not known)."""

    channels: int
    positions: int
    out: bool
    norm: bool = False
    others: tuple[int, ...] = ()
    seen: tuple[int, int, int] | None = None

    @property
    def width(self) -> int:
        return self.channels * self.positions

    @property
    def vector(self) -> bool:
        """True if the rows are reordered, and any vectors with them."""
        return self.out or self.norm

    def maps(self) -> list[tuple[int, int, int]]:
        """(channels, height, width) for each channel count that fits. Without a trace, the map is square if its
        positions allow it."""
        found: list[tuple[int, int, int]] = []
        if self.seen is not None and self.seen[1]:
            return [self.seen]
        for channels in (self.channels, *self.others) if self.seen is None else self.seen[:1]:
            positions = self.width // channels
            side = math.isqrt(positions)
            found.append((channels, side, side) if side * side == positions else (channels, positions, 1))
        return found


@dataclass(frozen=True, slots=True)
class _Linear:
    """One matrix of a module, for each shape that its instances have."""

    module: Module
    out: int
    inp: int
    inner: bool


class _Before:
    """The numbered siblings right before each Linear: fc1 makes the width that fc2 takes."""

    def __init__(self, linears: Iterable[_Linear]) -> None:
        self.first: dict[tuple[object, ...], tuple[int, ...]] = {}
        for linear in linears:
            mark, numbers = _mark(linear.module, linear.out), _ints(linear.module.tokens)
            self.first[mark] = min(numbers, self.first.get(mark, numbers))

    def sibling(self, linear: _Linear) -> bool:
        first = self.first.get(_mark(linear.module, linear.inp))
        return first is not None and first < _ints(linear.module.tokens)


@dataclass(slots=True)
class _Convs:
    """The channels that convolutions make and take, and those that no other convolution takes or makes."""

    made: set[int]
    taken: set[int]
    ends: set[int]
    starts: set[int]


def suspects(
    modules: Sequence[Module], families: Iterable[Module], lex: Lexicon, embeds: frozenset[int] = frozenset()
) -> Mapping[int, Suspect]:
    """id of a module -> its suspect. `modules`: those outside of repeated blocks; `families`: the others; `embeds`: ids
    of lookup tables."""
    inner = list(families)
    everything = [*modules, *inner]
    convs = _channels(everything)
    if not convs.made:
        return {}
    linears = [_Linear(m, o, i, False) for m in modules for o, i in _matrices(m)]
    linears += [_Linear(m, o, i, True) for m in inner for o, i in _matrices(m)]
    tables = {shape[-1] for m in everything for shape in _shapes(m, "value") if shape}
    tables |= {linear.inp for linear in linears if id(linear.module) in embeds}
    linears = [linear for linear in linears if id(linear.module) not in embeds]
    before = _Before(linears)
    known = _made_widths(linears, convs, tables, lex)
    inputs = {linear.inp for linear in linears}
    found: dict[int, Suspect] = {}
    for linear in linears:
        if linear.inp not in known and not before.sibling(linear):
            _suspect(found, linear.module, linear.inp, convs.made, convs.ends - inputs)
    # Channels that no convolution takes must be taken by a Linear, though something else may explain its width as well.
    taken = {c for c in convs.ends if any(s.width % c == 0 for s in found.values())}
    free = convs.ends - inputs
    outs = {linear.out for linear in linears}
    for linear in linears if free else ():
        loose = free - taken if linear.inp in outs else free
        if loose and id(linear.module) not in found and linear.inp not in tables:
            _suspect(found, linear.module, linear.inp, loose, loose)
    flat = {s.width for s in found.values()}
    _unflattened(found, linears, known, convs, flat, lex)
    wide = {s.width: s for s in reversed(found.values())}
    for module in everything:  # norms of such a width
        like = wide.get(_vector(module))
        if like is not None and like.width not in convs.made | tables and id(module) not in found:
            found[id(module)] = Suspect(like.channels, like.positions, False, True, like.others)
    return found


def _suspect(found: dict[int, Suspect], module: Module, width: int, channels: set[int], first: set[int]) -> None:
    """Record a Linear whose inputs are several positions of some of the channels; those in `first` come first."""
    fits = [c for c in channels if width % c == 0 and width // c >= LEAST]
    best = sorted((c for c in fits if c in first), reverse=True) or sorted(fits, reverse=True)
    if best:
        found[id(module)] = Suspect(best[0], width // best[0], False, False, tuple(best[1:_OFFERED]))


def _made_widths(linears: Sequence[_Linear], convs: _Convs, tables: set[int], lex: Lexicon) -> set[int]:
    """The widths that something other than a flatten makes: channels, tables, and earlier Linears."""
    known = convs.made | tables
    outs = {linear.out for linear in linears}
    fused = {linear.out // n for linear in linears if linear.inner for n in _FUSED if linear.out % n == 0}
    while True:
        grown = {
            linear.out
            for linear in linears
            if linear.out not in known
            and (linear.inp in known or linear.inp not in outs)
            and not _maybe_map(linear, convs.taken, lex)
        }
        if not grown:
            return known | {n for n in fused if any(linear.inner and linear.inp == n for linear in linears)}
        known |= grown


def _unflattened(
    found: dict[int, Suspect],
    linears: Sequence[_Linear],
    known: set[int],
    convs: _Convs,
    flat: set[int],
    lex: Lexicon,
) -> None:
    """Find Linears whose outputs become a map: no other Linear takes them as they are, and a convolution takes such
    channels. A norm between the two does not change that."""
    eaten = {linear.inp for linear in linears if id(linear.module) not in found}
    for linear in linears:
        if id(linear.module) in found or linear.out in eaten or linear.inner:
            continue
        starts = {c for c in convs.starts if c > _IMAGE}
        fits = _multiple(linear.out, starts) or _multiple(linear.out, convs.taken)
        if not fits or linear.out // fits < _SCALE_SHIFT:
            continue
        first = linear.inp not in known  # it takes a latent, which nothing in the checkpoint makes
        if first or linear.out in flat or fits in starts or _maybe_map(linear, convs.taken, lex):
            found[id(linear.module)] = Suspect(fits, linear.out // fits, True)


def _shapes(module: Module, role: str) -> list[Shape]:
    column = module.roles.get(role)
    return sorted(set(column.shapes.values())) if column is not None else []


def _matrices(module: Module) -> list[tuple[int, int]]:
    column = module.roles.get("weight")
    if column is None or column.kind == "raw":
        return []
    return [(shape[0], shape[1]) for shape in _shapes(module, "weight") if len(shape) == 2]


def _channels(modules: Sequence[Module]) -> _Convs:
    made: set[int] = set()
    taken: set[int] = set()
    alone: set[int] = set()
    count: Counter[int] = Counter()
    for module in modules:
        bias = next(iter(_shapes(module, "bias")), None)
        for shape in _shapes(module, "weight"):
            if not 3 <= len(shape) <= 5:
                continue
            out, inp = shape[:2]
            if bias == (inp,) and out != inp:
                out, inp = inp, out  # a transposed convolution: (in, out)
            made.add(out)
            taken.add(inp)
            count[out] += 1
            if inp == 1:
                alone.add(out)
    made, taken = {n for n in made if n > 1}, {n for n in taken if n > 1}
    depthwise = {n for n in alone if count[n] > 1}  # these take as many channels as they make
    return _Convs(made, taken, made - taken - depthwise, taken - made)


def _vector(module: Module) -> int:
    """The width of a norm, that of its vectors if it has nothing else; 0 for other modules."""
    shapes = [shape for role in _VECTORS for shape in _shapes(module, role)]
    weight = _shapes(module, "weight")
    return shapes[0][0] if weight and all(len(s) == 1 and s == shapes[0] for s in shapes) else 0


def _multiple(width: int, channels: set[int]) -> int:
    """The largest channel count that divides `width` into at least LEAST positions; 0 if there is none."""
    return max((c for c in channels if width % c == 0 and width // c >= LEAST), default=0)


def _maybe_map(linear: _Linear, taken: set[int], lex: Lexicon) -> bool:
    """True if the outputs may become a map for a decoder's convolutions."""
    fits = _multiple(linear.out, taken)
    words = set(concepts(linear.module.tokens, lex))
    if linear.inner or linear.out // (fits or linear.out + 1) < _SCALE_SHIFT:
        return False
    return bool(words & _DECODES) and not {"up", "in"} <= words  # the first matrix of an mlp is called `up` too


def _mark(module: Module, width: int) -> tuple[object, ...]:
    return (module.outer, _template(module.tokens), width)


def _template(tokens: tuple[Token, ...]) -> tuple[object, ...]:
    return tuple(0 if isinstance(token, int) else token for token in tokens)


def _ints(tokens: tuple[Token, ...]) -> tuple[int, ...]:
    return tuple(token for token in tokens if isinstance(token, int))
