"""The flatten trap: a Linear that takes (or makes) a flattened convolution map has the same shape in both channel
orders.

Files do not show the order, so such a Linear is a question. Its width is a multiple of a convolution's channels, and
nothing else in the checkpoint makes that width, or nothing else takes those channels. If it is no multiple, and nothing
makes it, the map may be joined with other values. A norm of that width belongs to it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graftax.match.cutting import parse
from graftax.match.names import Lexicon, concepts
from graftax.match.sides import Module, Shape, view
from graftax.tree import TensorSpec

LEAST = 2  # positions of the smallest map
_SCALE_SHIFT = 4  # a Linear may make two or three vectors for each channel, so fewer positions are no map there
_IMAGE = 4  # an input may have as many channels itself
_FUSED = (2, 3)  # how many parts one Linear inside of blocks may make
_OFFERED = 3  # how many channel counts are offered
_DECODES = frozenset(("dec", "deconv", "gen", "generator", "up", "upsample"))
CELL = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)(?:_l\d+)?(?:_reverse)?")
"""The leaves of torch's recurrent layers."""
_TABLES = frozenset(("embed", "embedding", "embeddings", "pos", "position", "token", "tokens", "table", "cls", "index"))
_VECTORS = ("weight", "bias", "mean", "var")


@dataclass(frozen=True, slots=True)
class Suspect:
    """A Linear whose inputs (or outputs, if `out`) may be `channels` x positions; or a norm (`norm`) of that width.
    `others`: further channel counts that fit; `seen`: channels, height and width that a trace shows (0: not known);
    `rest`: how many other values are joined with the map; `raw`: of a bare matrix, which is not transposed, the axis of
    the map; `makes`: of a Linear that may take a map, the map that its outputs may become instead."""

    channels: int
    positions: int
    out: bool
    norm: bool = False
    others: tuple[int, ...] = ()
    seen: tuple[int, int, int] | None = None
    rest: int = 0
    raw: int | None = None
    makes: Suspect | None = None

    @property
    def width(self) -> int:
        return self.channels * self.positions + self.rest

    @property
    def size(self) -> str:
        joined = f" and {self.rest} other values" if self.rest else ""
        return f"{self.channels} channels x {self.positions} positions{joined}"

    @property
    def vector(self) -> bool:
        """True if the rows may be reordered, and any vectors with them."""
        return self.out or self.norm or self.makes is not None

    def each(self, matrix: bool) -> list[Suspect]:
        """What is suspected of a matrix or of a vector, one after the other."""
        both = [replace(self, makes=None), *([self.makes] if self.makes else [])]
        both = both[::-1] if self.rest else both  # what nothing makes is a latent rather than a joined map
        return [one for one in both if matrix or one.vector]

    def rule_keys(self, matrix: bool) -> list[dict[str, object]]:
        """What a rule says of a matrix or of a vector, for each map that fits."""
        return [keys for one in self.each(matrix) for sizes in one.maps() for keys in one._keys(matrix, *sizes)]

    def _keys(self, matrix: bool, c: int, h: int, w: int) -> list[dict[str, object]]:
        map_, rest = f"C={c} H={h} W={w}", f"+{self.rest}"
        if not self.vector and self.raw is None:
            return [{"flatten": said} for said in ((f"{map_} {rest}", f"{rest} {map_}") if self.rest else (map_,))]
        if self.rest:
            return []
        ops = "(c h w) i -> i (h w c)" if matrix else "(c h w) -> (h w c)"
        if self.raw is not None:
            ops = "i (c h w) -> i (h w c)" if self.raw else "(c h w) i -> (h w c) i"
        return [{"ops": ops, "c": c, "h": h, "w": w}]

    def maps(self) -> list[tuple[int, int, int]]:
        """(channels, height, width) for each channel count that fits. Without a trace, the map is square if its
        positions allow it."""
        found: list[tuple[int, int, int]] = []
        if self.seen is not None and self.seen[1]:
            return [self.seen]
        for channels in (self.channels, *self.others) if self.seen is None else self.seen[:1]:
            positions = (self.width - self.rest) // channels
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
            mark, numbers = _mark(linear.module, linear.out), tuple(linear.module.numbers.values())
            self.first[mark] = min(numbers, self.first.get(mark, numbers))

    def sibling(self, linear: _Linear) -> bool:
        first = self.first.get(_mark(linear.module, linear.inp))
        return first is not None and first < tuple(linear.module.numbers.values())


@dataclass(slots=True)
class _Convs:
    """The channels that convolutions make and take, and those that no other convolution takes or makes."""

    made: set[int]
    taken: set[int]
    ends: set[int]
    starts: set[int]


def suspects(
    modules: Sequence[Module],
    families: Iterable[Module],
    lex: Lexicon,
    embeds: frozenset[int] = frozenset(),
    live: bool = False,
) -> Mapping[int, Suspect]:
    """id of a module -> its suspect. `modules`: those outside of repeated blocks; `families`: the others; `embeds`: ids
    of lookup tables; `live`: a live model shows that a bare matrix is multiplied, so that a map may be joined there."""
    inner = list(families)
    everything = [*modules, *inner]
    convs = _channels(everything)
    if not convs.made:
        return {}
    linears = [_Linear(m, o, i, False) for m in modules for o, i in _matrices(m)]
    linears += [_Linear(m, o, i, True) for m in inner for o, i in _matrices(m)]
    bare = {id(module): shape for module in everything if (shape := _bare(module))}
    tables = {shape[-1] for m in everything if id(m) not in bare for shape in _shapes(m, "value") if shape}
    tables |= {linear.inp for linear in linears if id(linear.module) in embeds}
    linears = [linear for linear in linears if id(linear.module) not in embeds]
    before = _Before(linears)
    known = _made_widths(linears, convs, tables, lex)
    others = {width for shape in bare.values() for width in shape}
    inputs = {linear.inp for linear in linears}
    found: dict[int, Suspect] = {}
    for linear in linears:
        if linear.inp not in known | others and not before.sibling(linear):
            _suspect(found, linear.module, linear.inp, convs.made, convs.ends - inputs)
            if id(linear.module) not in found and not linear.inner:
                _joined(found, linear.module, linear.inp, convs)
    # Channels that no convolution takes must be taken by a Linear, though something else may explain its width as well.
    taken = {c for c in convs.ends if any(s.width % c == 0 for s in found.values())}
    free = convs.ends - inputs
    outs = {linear.out for linear in linears}
    for linear in linears if free else ():
        loose = free - taken if linear.inp in outs else free
        if loose and id(linear.module) not in found and linear.inp not in tables | others:
            _suspect(found, linear.module, linear.inp, loose, loose)
    for module in modules:
        _suspect_bare(found, module, convs, known, live)
    flat = {s.width for s in found.values()}
    _unflattened(found, linears, known, convs, flat, lex)
    wide = {s.width: s for s in reversed(found.values())}
    for module in everything:  # norms of such a width
        like = wide.get(_vector(module))
        if like is not None and like.width not in convs.made | tables and id(module) not in found:
            found[id(module)] = replace(like, out=False, norm=True, makes=None)
    return found


def recurrent_inputs(specs: Mapping[str, TensorSpec], matrix: str, lex: Lexicon) -> Suspect | None:
    """The map that may be the inputs of a recurrent layer, whose `matrix` takes them; None if something else makes that
    width. `specs`: the torch tensors."""
    width = specs[matrix].shape[-1]
    own = matrix.rpartition(".")[0]
    cells = {name for name in specs if CELL.fullmatch(name.rpartition(".")[2])}
    others = [specs[name].shape[-1] for name in cells if "weight_hh" in name and name.rpartition(".")[0] != own]
    if width in (*others, *(2 * hidden for hidden in others)):
        return None
    modules = [module for family in view(parse(specs, "torch", cells, {}), {}) for module in family.modules]
    convs = _channels(modules)
    linears = [_Linear(m, o, i, False) for m in modules for o, i in _matrices(m)]
    tables = {shape[-1] for m in modules for shape in _shapes(m, "value") if shape}
    found: dict[int, Suspect] = {}
    if convs.made and modules and width not in _made_widths(linears, convs, tables, lex):
        _suspect(found, modules[0], width, convs.made, convs.ends - {linear.inp for linear in linears})
    return next(iter(found.values()), None)


def _suspect(found: dict[int, Suspect], module: Module, width: int, channels: set[int], first: set[int]) -> None:
    """Record a Linear whose inputs are several positions of some of the channels; those in `first` come first."""
    fits = [c for c in channels if width % c == 0 and width // c >= LEAST]
    best = sorted((c for c in fits if c in first), reverse=True) or sorted(fits, reverse=True)
    if best:
        found[id(module)] = Suspect(best[0], width // best[0], False, False, tuple(best[1:_OFFERED]))


def _bare(module: Module) -> Shape:
    """The shape of a matrix that no layer of the framework holds, and no table: either axis may be its inputs. () for
    others."""
    column = module.roles.get("value") or module.roles.get("weight")
    apart = column is None or column.leaf == "weight" or not _TABLES.isdisjoint(module.tokens)
    shapes = set() if column is None or apart else set(column.shapes.values())
    shape = shapes.pop() if len(shapes) == 1 else ()
    return shape if len(shape) == 2 else ()


def _suspect_bare(found: dict[int, Suspect], module: Module, convs: _Convs, known: set[int], live: bool) -> None:
    """Record a bare matrix that may take a map: nothing else makes, or adds to, the width of one of its axes."""
    shape = _bare(module)
    if not shape:
        return
    vectors = {s[0] for other in module.roles.values() for s in other.shapes.values() if len(s) == 1}
    for axis, width in enumerate(shape):
        if id(module) not in found and width not in (known | (vectors - {shape[1 - axis]})):
            _suspect(found, module, width, convs.made, convs.ends)
            if id(module) not in found and not axis and live:
                _joined(found, module, width, convs)
            if id(module) in found:
                found[id(module)] = replace(found[id(module)], raw=axis)


def _joined(found: dict[int, Suspect], module: Module, width: int, convs: _Convs) -> None:
    """Record a matrix whose inputs may be a map joined with other values."""
    ends = convs.ends or convs.made
    channels = min({c for c in ends if c > _IMAGE} or ends)
    if width > LEAST * channels:
        positions, rest = divmod(width, channels)
        found[id(module)] = Suspect(channels, positions, False, rest=rest)


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
    takers: defaultdict[int, set[int]] = defaultdict(set)
    for linear in linears:
        if id(linear.module) not in found:
            takers[linear.inp].add(id(linear.module))
    for linear in linears:
        mine = found.get(id(linear.module))
        eaten = takers[linear.out] - {id(linear.module)}
        if eaten or linear.inner or (mine is not None and not mine.rest and linear.out != linear.inp):
            continue
        starts = {c for c in convs.starts if c > _IMAGE}
        fits = _multiple(linear.out, starts) or _multiple(linear.out, convs.taken)
        if not fits or linear.out // fits < _SCALE_SHIFT:
            continue
        first = linear.inp not in known  # it takes a latent, which nothing in the checkpoint makes
        if first or linear.out in flat or fits in starts or _maybe_map(linear, convs.taken, lex):
            made = Suspect(fits, linear.out // fits, True)
            found[id(linear.module)] = made if mine is None else replace(mine, makes=made)


def _shapes(module: Module, role: str) -> list[Shape]:
    column = module.roles.get(role)
    return sorted(set(column.shapes.values())) if column is not None else []


def _matrices(module: Module) -> list[tuple[int, int]]:
    column = module.roles.get("weight")
    if column is None or column.kind == "raw" or _bare(module):
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
            if not 3 <= len(shape) <= 5 or (bias is not None and len(bias) != 1):
                continue  # a bias with several axes is no convolution's
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
    return (module.outer, module.unnumbered, width)
