"""Two live modules of one side: how a leaf of one lies in the other.

The layer table connects torch with Flax. Within a side, a leaf goes through a layer of the other side that the table
connects to both modules: what one setting of ConvTranspose stores flipped, the other does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import permutations

from graftax.errors import GraftaxError
from graftax.layers.base import Part
from graftax.layers.connect import connect, known_kind, own_layout, rows_for
from graftax.ops import Op, Rearrange, apply_chain, invert_chain
from graftax.tree import Module, Side, TensorSpec

_BETWEEN = {"torch": ("kernel", "embedding"), "flax": ("weight",)}
"""The leaf of the other side that a matrix goes through."""
_SETTINGS = {"ConvTranspose": {"transpose_kernel": True}}
"""Settings without which a layer of the other side does not show its layout."""
_APART = frozenset(("order", "input_shape", "output_shape", "inner_shapes"))
"""What a trace adds to the settings of a module."""
_NO_LAYOUT = frozenset(("dtype", "precision", "bias", "dropout", "deterministic", "causal", "inplace", "name"))
"""Words of settings of a user's own class that say nothing about the axes of its weights."""


def table_kind(module: Module | None, side: Side) -> str:
    """The kind in the layer table whose layout a live module surely has; "" if there is none."""
    return "" if own_layout(module, side) else known_kind(module, side)


def one_class(one: Module, other: Module) -> bool:
    """True if both modules run one class, or a class that is defined twice in the same way."""
    if one.code or other.code:
        return one.kind == other.kind and one.code == other.code and one.calls == other.calls
    return one.bases[:1] == other.bases[:1] and one.calls == other.calls


def alike_settings(one: Module, other: Module) -> bool:
    """True if no setting tells the layouts of two modules of one class of the user's apart."""
    return _telling(one) == _telling(other)


def _telling(module: Module) -> dict[str, object]:
    """The settings that may say how the weights lie: flags and words. Numbers show in the shapes."""
    return {
        name: value
        for name, value in module.settings.items()
        if isinstance(value, (bool, str)) and name not in _APART and _NO_LAYOUT.isdisjoint(name.split("_"))
    }


def conversions(
    side: Side,
    one: Module,
    other: Module,
    roles: tuple[str, str],
    specs: tuple[TensorSpec, TensorSpec],
    as_is: tuple[Op, ...] = (),
) -> list[tuple[Op, ...]]:
    """Every way that the layer table gives from a leaf of `one` to a leaf of `other`, without those of equal effect;
    [] if it connects them in none. as_is: the ops that stand for their effect."""
    import numpy as np

    kinds = table_kind(one, side), table_kind(other, side)
    if not all(kinds):
        return []
    numbers = np.arange(specs[0].size).reshape(specs[0].shape)
    found: dict[bytes, tuple[Op, ...]] = {}
    plain = apply_chain(as_is, (numbers,))[0]
    for between in _layers_between(side, *kinds):
        for spec in _shapes(specs[0]):
            for role in _BETWEEN[side]:
                middle = Part("", _OTHER[side], {role: role}, {role: spec}, between)
                ends = [
                    list(_chains(side, middle, Part("", side, {name: name}, {name: leaf}, module)))
                    for name, leaf, module in zip(roles, specs, (one, other), strict=True)
                ]
                for back in ends[0]:
                    for on in ends[1]:
                        chain = _joined((*invert_chain(back), *on))
                        try:
                            (made,) = apply_chain(chain, (numbers,))
                        except (GraftaxError, ValueError):
                            continue
                        found.setdefault(made.tobytes(), as_is if np.array_equal(made, plain) else chain)
    return list(found.values())


_OTHER: dict[Side, Side] = {"torch": "flax", "flax": "torch"}


@lru_cache(maxsize=512)
def _layers_between(side: Side, one: str, other: str) -> tuple[Module, ...]:
    """The layers of the other side that rows of the table connect to both kinds, as live modules."""
    sets = [
        {name for row in rows_for(*((kind, "") if side == "torch" else ("", kind))) if row.torch and row.linen
         for name in ((*row.linen, *row.nnx) if side == "torch" else row.torch)}
        for kind in (one, other)
    ]  # fmt: skip
    base = "flax.nnx" if side == "torch" else "torch.nn"
    both = sorted(sets[0] & sets[1])
    return tuple(Module("", kind, (f"{base}.{kind}",), _SETTINGS.get(kind, {})) for kind in both)


def _shapes(spec: TensorSpec) -> Iterator[TensorSpec]:
    """The shapes that the leaf may have on the other side: its axes in any order, without those of length one, and
    merged into a matrix."""
    shape = spec.shape
    plain = tuple(size for size in shape if size != 1)
    orders: Iterable[tuple[int, ...]] = permutations(shape) if len(shape) <= 5 else ()
    seen = dict.fromkeys((*orders, *(permutations(plain) if len(plain) <= 5 else ())))
    for k in range(1, len(shape)):
        pair = math.prod(shape[:k]), math.prod(shape[k:])
        seen |= {pair: None, pair[::-1]: None}
    yield from (TensorSpec(found, spec.dtype) for found in seen)


def _chains(side: Side, middle: Part, end: Part) -> Iterator[tuple[Op, ...]]:
    """The chains from the middle leaf to the leaf of `end` that the two modules settle."""
    try:
        found = connect(*((end, middle) if side == "torch" else (middle, end)), partial=True)
    except GraftaxError:
        return
    for connection in found:
        if connection.by == "modules" and len(connection.entries) == 1:
            ops = connection.entries[0].ops
            yield invert_chain(ops) if side == "torch" else ops


def _joined(chain: tuple[Op, ...]) -> tuple[Op, ...]:
    """The chain with neighbouring permutations as one; without what changes nothing."""
    out: list[Op] = []
    for op in chain:
        last = out[-1] if out else None
        if isinstance(op, Rearrange) and isinstance(last, Rearrange) and "(" not in f"{op.pattern}{last.pattern}":
            (first, middle), (again, end) = last.pattern.split(" -> "), op.pattern.split(" -> ")
            if middle == again:
                out[-1] = Rearrange(f"{first} -> {end}")
                continue
        out.append(op)
    return tuple(op for op in out if not (isinstance(op, Rearrange) and len(set(op.pattern.split(" -> "))) == 1))
