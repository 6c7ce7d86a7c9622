"""A Linear after a flatten: the columns of the torch weight run over (C, H, W), the rows of the Flax kernel over (H, W,
C)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from graftax.errors import LayoutError, escape
from graftax.ops import Concat, Op, Rearrange, RearrangeEach, Split
from graftax.rules.model import Rule
from graftax.tree import Side, TensorSpec, natural_key

Shape = tuple[int, ...]
SPATIAL = ("d", "h", "w")
"""The order of Flax's maps, channels last: (D, H, W, C). Axes of other names keep their written order."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What the convolutions of a checkpoint show about C. outputs: their output channels; seen: these and all other
    channel counts of the maps, from inputs and norms; last: the output channels of the last convolution, if the
    convolutions form a chain in which each takes what the one before makes; why: which convolution that is."""

    outputs: tuple[int, ...] = ()
    seen: frozenset[int] = frozenset()
    last: int | None = None
    why: str = ""


NO_TAIL = Tail()


def conv_tail(specs: Mapping[str, TensorSpec], side: Side) -> Tail:
    """The convolutions of a checkpoint: weights of rank 3 to 5, torch (O, I, *k) or Flax (*k, I, O), in natural order
    of their names. The order counts only if the channels agree with it at every step."""
    leaf = "weight" if side == "torch" else "kernel"
    found: list[tuple[str, int, int]] = []
    seen: set[int] = set()
    for name in sorted(specs, key=natural_key):
        shape = specs[name].shape
        last = name.rpartition("." if side == "torch" else "/")[2]
        rank = len(shape)
        if rank == 1 and last in ("running_mean", "mean"):
            seen.add(shape[0])  # a norm may follow a concatenation of maps
        if not 3 <= rank <= 5:
            continue
        given, taken = shape[:2] if side == "torch" else shape[:-3:-1]
        seen |= {given, taken}
        if last == leaf:
            found.append((name, taken, given))
    outputs = tuple(dict.fromkeys(given for _, _, given in found))
    chain = all(a[2] == b[1] for a, b in pairwise(found))
    if not found or not chain:
        return Tail(outputs, frozenset(seen))
    name, _, end = found[-1]
    return Tail(outputs, frozenset(seen), end, f"{name}, the last of {len(found)} convolutions that follow each other")


def flatten_ops(
    rule: Rule, left: Shape | None, right: Shape | None, tail: Tail
) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """The ops that reorder and transpose a weight (O, C*H*W) to a kernel (H*W*C, O), and their assumptions. torch may
    have flattened in any order (W H C); Flax flattens (H, W, C). Values that are joined with the map (`+`) stay where
    they are.

    Only C matters if H and W stay neighbours. If the rule gives no size of C, the convolutions decide it, which is an
    assumption. LayoutError if the sizes do not fit or C is open.
    """
    known = left if left is not None else right
    if known is None or len(known) != 2:
        raise LayoutError(f"flatten is for a Linear's weight of two axes, not for {known}")
    columns = left[1] if left is not None else known[0]
    joined = next((size for name, size in rule.flatten if name == "+"), None) or 0
    first = rule.flatten[0][0] == "+"
    rule = replace(rule, flatten=tuple(axis for axis in rule.flatten if axis[0] != "+"))
    columns -= joined
    names = [name.lower() for name, _ in rule.flatten]
    sizes = {name.lower(): size for name, size in rule.flatten if size is not None}
    assumes: tuple[str, ...] = ()
    unknown = [name for name in names if name not in sizes]
    if "c" in unknown and len(unknown) > 1:
        sizes["c"], why = _channels(rule, columns, tail)
        assumes = (f"flattened from C={sizes['c']} channels: {why}",)
    _fit(rule, names, sizes, columns)
    place = names.index("c")
    before, after = names[:place], names[place + 1 :]
    spatial = [*before, *after]
    turned = sorted(spatial, key=SPATIAL.index) if set(spatial) <= set(SPATIAL) else spatial  # as Flax orders them
    moved = turned != spatial
    parts = [_tokens(part, sizes, columns, moved or bool(rest)) for part, rest in ((before, after), (after, before))]
    order = [*parts[0], "c", *parts[1]], [*(turned if moved else (*parts[0], *parts[1])), "c"]
    if tail.outputs and sizes["c"] not in tail.seen:
        raise LayoutError(_no_such_channels(sizes["c"], tail))
    fixed = tuple(sorted((name, sizes[name]) for name in order[0]))
    turn = Rearrange(f"o ({' '.join(order[0])}) -> ({' '.join(order[1])}) o", fixed)
    if not joined:
        return (turn,), assumes
    parts = [(columns, turn.pattern, fixed), (joined, "o i -> i o", ())]
    sizes, patterns, known_sizes = zip(*(parts[::-1] if first else parts), strict=True)
    return (Split(1, sizes), RearrangeEach(patterns, known_sizes), Concat(0, sizes)), assumes


def _no_such_channels(channels: int, tail: Tail) -> str:
    known = ", ".join(map(str, sorted(set(tail.outputs))))
    return (
        f"flatten says C={channels}, but no convolution of the checkpoint has {channels} channels (they have {known}); "
        "if the map is joined or split from theirs, write ops = 'o (c h w) -> (h w c) o' with c, h and w"
    )


def _fit(rule: Rule, names: Sequence[str], sizes: dict[str, int], columns: int) -> None:
    """Set the size of the one axis that is left open, and check that all sizes together make the columns."""
    unknown = [name for name in names if name not in sizes]
    product = math.prod(sizes.values())
    if columns % product or (not unknown and product != columns):
        said = " x ".join(
            f"{name}={sizes[name.lower()]}" if name.lower() in sizes else name for name, _ in rule.flatten
        )
        need = f"a multiple of {product}" if unknown else str(product)
        raise LayoutError(f"axis 1 has {columns} columns; flatten {said} needs {need}")
    if len(unknown) == 1:
        sizes[unknown[0]] = columns // product


def _tokens(names: Sequence[str], sizes: dict[str, int], columns: int, others: bool) -> list[str]:
    """The axes of the pattern. Neighbouring spatial axes are separate if their sizes are known, else one axis, which
    moves the same way."""
    unknown = [name for name in names if name not in sizes]
    if not unknown:
        return list(names)
    if others:
        raise LayoutError(f"flatten needs the size of {', '.join(name.upper() for name in unknown)} too")
    merged = "".join(names)
    sizes[merged] = columns // sizes["c"]
    return [merged]


def _channels(rule: Rule, columns: int, tail: Tail) -> tuple[int, str]:
    """The channel count that was flattened, and the reason: it is the only one that divides the columns, or it ends the
    chain."""
    fits = sorted(c for c in tail.outputs if c > 0 and columns % c == 0)
    if tail.last in fits:
        return tail.last, escape(tail.why)
    if len(fits) == 1:
        return fits[0], f"the only channels of a convolution that divide its {columns} columns"
    text = " ".join(name for name, _ in rule.flatten)
    example = text.replace("C", f"C={fits[-1] if fits else columns}", 1)
    found = f"no convolution's channels divide {columns}"
    if fits:
        found = f"the channels of {len(fits)} convolutions divide {columns} ({', '.join(map(str, fits))})"
    raise LayoutError(f"flatten = {text!r} leaves C open: {found}; write its size, such as flatten = {example!r}")
