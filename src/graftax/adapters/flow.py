"""Track which axes of a feature map the entries of a tensor's axes run over. The traces of both frameworks use this.

A value is a tuple of *dims*. A dim is a tuple of the *atoms* that it runs over, outermost first: a flattened map of 8
channels has the dims (n) (c h w). None is an unknown value. Atoms of length 1 are left out, because they have no order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from graftax.tree import Axes, Trace

T = TypeVar("T")
SPATIAL = {1: ("w",), 2: ("h", "w"), 3: ("d", "h", "w")}
"""Names of the spatial axes of a convolution, in the order of its kernel."""
BATCH = "n"
OUT, LEAF = "out:", "leaf:"
"""Prefixes of atom names: the output axis of a matrix (followed by its leaf), and a leaf's own axis."""


@dataclass(frozen=True, slots=True)
class Atom:
    """One axis: its name, its length if known, and which part of the whole axis it is."""

    name: str
    size: int | None = None
    part: tuple[int, ...] = ()


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def channels(count: int, batch: Dim, sizes: Sequence[int | None], first: bool = True) -> Dims:
    """The dims of a convolution's output: batch, channels and its spatial axes, channels first or last."""
    spatial = tuple(dim(name, size) for name, size in zip(SPATIAL[len(sizes)], sizes, strict=True))
    made = dim("c", count)
    return (batch, made, *spatial) if first else (batch, *spatial, made)


def dim(name: str, size: int | None) -> Dim:
    return () if size == 1 else (Atom(name, size),)


def resized(of: Dim, size: int | None) -> Dim | None:
    """A dim with another length if it is one axis; None if it is several."""
    if size == 1 or not of:
        return () if size == 1 or size is None else None
    return (replace(of[0], size=size),) if len(of) == 1 else None


def joined(a: Dims, b: Dims) -> Dims | None:
    """The dims of an elementwise operation on two values. An axis that one value lacks (length 1) comes from the
    other."""
    if len(a) < len(b):
        a, b = b, a
    out: list[Dim] = list(a[: len(a) - len(b)])
    for one, other in zip(a[len(out) :], b, strict=True):
        if not one or not other or _names(one) == _names(other):
            out.append(one or other)
        elif _named(one) == _named(other):
            return None
        else:
            out.append(max(one, other, key=_named))
    return tuple(out)


def concatenated(parts: Sequence[Dims | None], axis: int) -> Dims | None:
    """Maps concatenated along their channels; None if they are something else."""
    maps = [part for part in parts if part is not None]
    if not maps or len(maps) < len(parts) or len({len(part) for part in maps}) > 1:
        return None
    at = axis % len(maps[0])
    along = [part[at][0] for part in maps if len(part[at]) == 1 and part[at][0].name == "c" and not part[at][0].part]
    sizes = [atom.size for atom in along if atom.size is not None]
    return (*maps[0][:at], dim("c", sum(sizes)), *maps[0][at + 1 :]) if len(sizes) == len(maps) else None


def _names(of: Dim) -> list[tuple[str, tuple[int, ...]]]:
    return [(atom.name, atom.part) for atom in of]


def _named(of: Dim) -> int:
    """A rank for joining: 0 for a leaf's own axis, which takes the axes of its partner; 1 for the output of a matrix; 2
    for others. Two axes of rank 2 cannot be joined, because nothing shows which one it is."""
    if len(of) != 1 or not of[0].name.startswith((LEAF, OUT)):
        return 2
    return int(of[0].name.startswith(OUT))


Target = int | Dim
"""The new length of an axis, -1, or the axes whose lengths multiply to it (`x.shape[0]`)."""


def reshaped(dims: Dims, targets: Sequence[Target]) -> Dims | None:
    """The dims after a row-major reshape; None if an axis is cut in a way that the lengths do not determine."""
    atoms = [atom for of in dims for atom in of]
    free = next((i for i, target in enumerate(targets) if target == -1), None)
    left = list(targets if free is None else targets[:free])
    right = [] if free is None else list(targets[free + 1 :])
    head: list[Dim] = []
    for n, target in enumerate(left):
        last = free is None and all(other in (1, ()) for other in left[n + 1 :])
        found = _take(atoms, target, False, last, len(atoms))
        if found is None:
            return None
        head.append(found)
    tail: list[Dim] = []
    atoms.reverse()
    for n, target in enumerate(reversed(right)):
        alone = n + 1 == len(right) and len(dims) > 1  # everything except the batch
        found = _take(atoms, target, True, alone and bool(atoms) and atoms[-1].name == BATCH, len(atoms) - 1)
        if found is None:
            return None
        tail.append(found[::-1])
    atoms.reverse()
    if free is None:
        return None if atoms else tuple(map(_whole, head))
    return tuple(map(_whole, (*head, tuple(atoms), *reversed(tail))))


def _whole(of: Dim) -> Dim:
    """Neighbouring parts of one axis, joined to that axis."""
    out: list[Atom] = []
    for atom in of:
        out.append(atom)
        while len(out) > 1 and _halves(out[-2], out[-1]):
            two, one = out.pop(), out.pop()
            size = None if one.size is None or two.size is None else one.size * two.size
            out.append(Atom(one.name, size, one.part[:-1]))
    return tuple(out)


def _halves(a: Atom, b: Atom) -> bool:
    return a.name == b.name and a.part[:-1] == b.part[:-1] and (a.part[-1:], b.part[-1:]) == ((0,), (1,))


def _take(atoms: list[Atom], target: Target, back: bool, rest: bool, most: int) -> Dim | None:
    """Take the atoms of one axis off the start of `atoms`, which run from the last to the first if `back`. rest: if
    lengths are unknown, take `most` atoms."""
    if target in (1, ()):
        return ()
    mine = tuple(atoms[:most] if isinstance(target, int) else atoms[: len(target)])
    if not isinstance(target, int):
        whole = sorted(map(str, _names(mine))) == sorted(map(str, _names(target)))
    elif rest and any(atom.size is None for atom in mine):
        whole = target % math.prod(atom.size for atom in mine if atom.size is not None) == 0
    else:
        return _counted(atoms, target, back)
    del atoms[: len(mine)]
    return mine if whole else None


def _counted(atoms: list[Atom], left: int, back: bool) -> Dim | None:
    """Take atoms whose lengths multiply to `left` off the start; the last of them may be a part of its axis."""
    taken: list[Atom] = []
    while left > 1:
        atom = atoms.pop(0) if atoms else Atom("")
        if atom.size is None:
            return None
        if left % atom.size == 0:
            taken.append(atom)
            left //= atom.size
        elif atom.size % left == 0:
            taken.append(replace(atom, size=left, part=(*atom.part, int(back))))
            atoms.insert(0, replace(atom, size=atom.size // left, part=(*atom.part, int(not back))))
            left = 1
        else:
            return None
    return tuple(taken)


# ---------------------------------------------------------------- findings about leaves


@dataclass(slots=True)
class Notes:
    """What a trace finds out about leaves. A leaf that is used in two different ways becomes unknown."""

    columns: dict[str, Axes | None] = field(default_factory=dict[str, "Axes | None"])
    rows: dict[str, Axes | None] = field(default_factory=dict[str, "Axes | None"])
    beside: dict[str, set[str]] = field(default_factory=dict[str, "set[str]"])
    summed: dict[str, int | None] = field(default_factory=dict[str, "int | None"])
    marked: dict[str, tuple[frozenset[int], int] | None] = field(
        default_factory=dict[str, "tuple[frozenset[int], int] | None"]
    )

    def product(self, matrix: Dims | None, at: int) -> None:
        """Record that a product with the input sums over axis `at` of `matrix`, if that is a whole leaf."""
        leaves = {atom.name.rpartition(":")[0] for of in matrix or () for atom in of}
        of = matrix[at] if matrix is not None and len(matrix) == 2 else ()
        name = leaves.pop() if len(leaves) == 1 else ""
        if name.startswith(LEAF) and len(of) == 1 and not of[0].part:
            leaf, axis = name.removeprefix(LEAF), int(of[0].name.rpartition(":")[2])
            _note(self.summed, leaf, axis)

    def mark(self, leaf: str, dims: Sequence[Dim] | None) -> None:
        """Record that a module sees these axes of its leaf: those with a length other than 1, and how many."""
        atoms = [atom for of in dims or () for atom in of]
        whole = dims is not None and all(f"{LEAF}{leaf}" == atom.name.rpartition(":")[0] for atom in atoms)
        axes = frozenset(int(atom.name.rpartition(":")[2]) for atom in atoms if whole)
        _note(self.marked, leaf, (axes, len(dims)) if whole and dims is not None else None)

    def inputs(self, leaf: str, of: Dim | None) -> None:
        """Record that a matrix takes these axes."""
        _note(self.columns, leaf, None if of is None else _axes(of))

    def vector(self, leaf: str, of: Dim | None) -> None:
        """Record that a vector is added to these axes, or multiplies them."""
        if of is not None and len(of) == 1 and of[0].name.startswith(OUT) and not of[0].part:
            self.beside.setdefault(of[0].name.removeprefix(OUT), set()).add(leaf)
        else:
            _note(self.rows, leaf, None if of is None else _axes(of))

    def into_map(self, feature: Dim, spatial: Sequence[Dim]) -> None:
        """Record that a convolution takes a map with these axes: axes that a matrix made are its rows."""
        parts: list[tuple[tuple[int, ...], str, int | None]] = []
        leaves: set[str] = set()
        for name, of in (("c", feature), *zip(SPATIAL[len(spatial)], spatial, strict=True)):
            for atom in of:
                leaves.add(atom.name)
                parts.append((atom.part, name, atom.size))
        if len(leaves) != 1 or len({name for _, name, _ in parts}) < len(parts):
            return
        leaf = leaves.pop()
        if leaf.startswith(OUT):
            axes = tuple((name, size) for _, name, size in sorted(parts))
            for one in (leaf.removeprefix(OUT), *self.beside.get(leaf.removeprefix(OUT), ())):
                _note(self.rows, one, axes)

    def trace(self, order: dict[str, int] | None = None) -> Trace:
        columns, rows = ({leaf: axes for leaf, axes in table.items() if axes} for table in (self.columns, self.rows))
        summed = {leaf: axis for leaf, axis in self.summed.items() if axis is not None}
        return Trace(order or {}, columns, rows, summed=summed)


def _note(table: dict[str, T | None], leaf: str, found: T | None) -> None:
    table[leaf] = found if table.get(leaf, found) == found else None


def _axes(of: Dim) -> Axes | None:
    """The axes of a map by their names, if each is whole; None for the output of a matrix, which is not a map."""
    names = [atom.name for atom in of]
    if len(of) == 1 and names[0].startswith(OUT) and not of[0].part:
        return (("x", of[0].size),)
    if any(atom.part for atom in of) or len(set(names)) < len(names) or not set(names) <= {"c", "d", "h", "w"}:
        return None
    return tuple((atom.name, atom.size) for atom in of) if "c" in names else None
