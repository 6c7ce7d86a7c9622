"""Weights that differ from those the plan makes from torch's: find the known mistake that gives exactly these bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations, product

import ml_dtypes  # pyright: ignore[reportMissingImports]
import numpy as np

from graftax.parity.causes.fresh import constant, looks_fresh
from graftax.parity.causes.fused import Fused, other_readings, rule_line
from graftax.parity.causes.numbers import Array, is_number, nice, relative
from graftax.parity.causes.reorder import Known, axis_order, blocks_moved, name_order

_EPS = 2.0**-22  # a product or sum in float32 that was rounded once
_NOISE = 0.3  # below this relative error two tensors are equal but for noise


@dataclass(frozen=True, slots=True, eq=False)
class FlaxLeaf:
    """One Flax leaf.

    path, have, want  the leaf, its values, and the values that the plan makes from torch's
    torch     path -> the torch tensors from which it is made
    others    path -> the right values of other leaves; theirs: path -> the values that they have
    initial   the values of Flax's initialiser, if known
    known     numbers of heads and maps that occur; stacked: the axis that counts layers, if any
    fused     the entry, if it takes a fused tensor apart
    role      the last name of the path, such as 'kernel'
    """

    path: str
    have: Array
    want: Array
    torch: Mapping[str, Array] = field(default_factory=dict[str, Array])
    others: Mapping[str, Array] = field(default_factory=dict[str, Array])
    theirs: Mapping[str, Array] = field(default_factory=dict[str, Array])
    initial: Array | None = None
    known: Known = field(default_factory=Known)
    stacked: int | None = None
    fused: Fused | None = None

    @property
    def role(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kernel(self) -> bool:
        """Is it a kernel, (*k, in, out) or (in, H, h), by name and shape, not an embedding table or a bias?"""
        return self.have.ndim >= 2 and self.role not in ("embedding", "bias")


@dataclass(frozen=True, slots=True)
class WeightMistake:
    """A name of `CAUSES`, the finding, and the fix."""

    name: str
    detail: str
    fix: str


def same(a: Array, b: Array) -> bool:
    """Every bit equal, NaN included; 0.0 and -0.0 count as equal."""
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=is_number(a) and is_number(b)))


def diagnose(leaf: FlaxLeaf) -> WeightMistake | None:
    """Why a leaf differs: the first hypothesis that gives exactly its values; if none does, 'weights differ' with
    counts. None if the leaf does not differ."""
    if same(leaf.have, leaf.want):
        return None
    if leaf.have.shape != leaf.want.shape:
        return WeightMistake(
            "weights differ",
            f"shape mismatch: {leaf.path} is {leaf.have.shape}, should be {leaf.want.shape}",
            "port again",
        )
    for hypothesis in HYPOTHESES:
        found = hypothesis(leaf)
        if found is not None:
            return found
    return _differ(leaf)


# ---------------------------------------------------------------- hypotheses, in this order


def _initial(leaf: FlaxLeaf) -> WeightMistake | None:
    if leaf.initial is not None and same(leaf.have, leaf.initial):
        return _unported(leaf, "holds its initial value")
    value = constant(leaf.have)
    if value is not None and constant(leaf.want) is None:
        return _unported(leaf, f"is {value:g} everywhere")
    return None


def _unported(leaf: FlaxLeaf, text: str) -> WeightMistake:
    return WeightMistake(
        "initial value", f"{leaf.path} {text}: no torch tensor reached it", f"port {_sources(leaf)} into it"
    )


def _sources(leaf: FlaxLeaf) -> str:
    return ", ".join(leaf.torch) or "the torch tensor"


def _axes(leaf: FlaxLeaf) -> WeightMistake | None:
    """Axes permuted and flipped."""
    have, want = leaf.have, leaf.want
    if have.ndim < 2 or have.ndim > 5 or not _same_values(have, want):
        return None
    for axes in permutations(range(have.ndim)):
        turned = want.transpose(axes)
        if turned.shape != have.shape:
            continue
        for flips in product((1, -1), repeat=have.ndim):
            candidate = turned[tuple(slice(None, None, step) for step in flips)]
            if (axes != tuple(range(have.ndim)) or -1 in flips) and _matches(have, candidate):
                return _axes_found(leaf, axes, flips)
    return None


def _axes_found(leaf: FlaxLeaf, axes: tuple[int, ...], flips: tuple[int, ...]) -> WeightMistake:
    rank, plain = leaf.have.ndim, tuple(range(leaf.have.ndim))
    flipped = [axis for axis, step in enumerate(flips) if step < 0]
    if axes == plain:
        text = f"{leaf.path} is reversed along {_listed(flipped)}"
        return WeightMistake("kernel flipped", text, f"reverse axes {flipped}: kernel[{_slices(flips)}]")
    also = f", and reversed along {_listed(flipped)}" if flipped else ""
    untouched = any(same(leaf.have, tensor) for tensor in leaf.torch.values())
    moved = [axis for axis in plain if axes[axis] != axis]
    split = rank == 3 or (rank == 2 and leaf.role == "bias")
    if split and not flipped and moved[1:] == [moved[0] + 1] and leaf.have.shape[moved[0]] in leaf.known.heads:
        text = f"axes {moved[0]} and {moved[1]} of {leaf.path} {leaf.have.shape}, heads and values, are swapped"
        return WeightMistake("head order", text, "cut into (heads, values), the heads first")
    if rank == 2 or untouched:
        text = f"{leaf.path} {leaf.have.shape} holds the torch tensor untransposed, and its shape does not show it"
        fix = "transpose it: kernel = weight.T" if rank == 2 else _turn(axes)
        return WeightMistake("kernel not transposed", text + also, fix)
    text = f"axes {axes} of {leaf.path} stand where {plain} should{also}"
    return WeightMistake("kernel axes swapped", text, _turn(axes))


def _turn(axes: tuple[int, ...]) -> str:
    back = tuple(axes.index(axis) for axis in range(len(axes)))
    return f"put the axes back: kernel.transpose{back}"


def _listed(axes: list[int]) -> str:
    return f"ax{'is' if len(axes) == 1 else 'es'} {', '.join(map(str, axes))}"


def _slices(flips: tuple[int, ...]) -> str:
    return ", ".join("::-1" if step < 0 else ":" for step in flips)


def _reshaped(leaf: FlaxLeaf) -> WeightMistake | None:
    """The torch tensor reshaped to the Flax shape without the transpose that must come first."""
    have, want = leaf.have, leaf.want
    if have.ndim < 2 or not _same_values(have, want):
        return None
    for name, tensor in leaf.torch.items():
        if tensor.shape == have.shape and same(tensor, have):
            text = f"{leaf.path} holds {name} {tensor.shape} untransposed"
            return WeightMistake("kernel not transposed", text, "transpose it first")
    candidates = [want.reshape(int(np.prod(want.shape[:at])), -1).T for at in range(1, want.ndim)]
    if want.ndim >= 3:
        candidates.append(np.moveaxis(want, (-1, -2), (0, 1)))
        candidates.append(np.moveaxis(want, -1, 0))
    candidates += [tensor for tensor in leaf.torch.values() if tensor.size == have.size]
    for tensor in candidates:
        if _matches(have, tensor.reshape(have.shape)):
            text = f"{leaf.path} {have.shape} is the torch tensor reshaped without being transposed"
            return WeightMistake("reshape before transpose", text, f"transpose first, then reshape to {have.shape}")
    return None


def _rows(leaf: FlaxLeaf) -> WeightMistake | None:
    """One axis in another order."""
    have, want = leaf.have, leaf.want
    if not _same_values(have, want):
        return None
    for axis in range(have.ndim):
        order = axis_order(have, want, axis)
        if order is None:
            continue
        known = Known(leaf.known.heads, leaf.known.maps, stacked=leaf.stacked == axis)
        found = name_order(order, known, leaf.kernel and axis < have.ndim - 1)
        if found is not None:
            text = f"{leaf.path}, axis {axis}: {found.text}"
            return WeightMistake(found.name, text, f"reorder axis {axis} of {leaf.path} as the plan does")
        text = f"{leaf.path}, axis {axis}: {blocks_moved(order)} of {len(order)} rows are in other places"
        return WeightMistake("weights differ", text, "port again")
    return _heads_and_values(leaf)


def _heads_and_values(leaf: FlaxLeaf) -> WeightMistake | None:
    """A kernel (in, H, h), (H, h, out) or a bias (H, h) whose axes H and h were filled in the order (h, H)."""
    have, want = leaf.have, leaf.want
    for at in range(have.ndim - 1):
        shape = have.shape
        merged = (*shape[:at], shape[at + 1], shape[at], *shape[at + 2 :])
        for candidate in (np.swapaxes(want, at, at + 1).reshape(shape), np.swapaxes(want.reshape(merged), at, at + 1)):
            if _matches(have, candidate):
                text = f"axes {at} and {at + 1} of {leaf.path} {shape} were filled in the other order"
                return WeightMistake("head order", text, "cut into (heads, values), the heads first")
    flat = have.reshape(*have.shape[:1], -1), want.reshape(*want.shape[:1], -1)
    if have.ndim == 3:
        order = axis_order(*flat, 1)
        found = None if order is None else name_order(order, leaf.known, False)
        if found is not None:
            text = f"{leaf.path}, heads and values together: {found.text}"
            return WeightMistake(found.name, text, "reorder as the plan does")
    return None


def _other_layer(leaf: FlaxLeaf) -> WeightMistake | None:
    if constant(leaf.have) is not None:
        return None
    for path, tensor in leaf.others.items():
        if path == leaf.path or not _matches(leaf.have, tensor):
            continue
        partner = leaf.theirs.get(path)
        if partner is not None and same(partner, leaf.want):
            text = f"{leaf.path} holds the values of {path}, and {path} holds the values of {leaf.path}"
            return WeightMistake("swapped layers", text, f"swap {leaf.path} and {path}")
        return WeightMistake(
            "swapped layers", f"{leaf.path} holds the values of {path}", f"port {_sources(leaf)} into it"
        )
    for name, tensor in leaf.torch.items():
        if tensor.size == leaf.have.size and same(leaf.have, tensor.reshape(leaf.have.shape)):
            return WeightMistake(
                "kernel not transposed", f"{leaf.path} holds {name} untransposed", "transpose it as the plan does"
            )
    return None


def _rounded(leaf: FlaxLeaf) -> WeightMistake | None:
    for dtype, name in ((ml_dtypes.bfloat16, "bfloat16 weights"), (np.float16, "weights differ")):
        with np.errstate(over="ignore"):
            rounded = leaf.want.astype(np.float32).astype(dtype).astype(np.float32)
        if _matches(leaf.have.astype(np.float32), rounded):
            text = f"{leaf.path} was rounded to {np.dtype(dtype).name} on the way"
            return WeightMistake(name, text, "keep float32: no .bfloat16(), .half() or param_dtype on the way")
    return None


def _of_torch(leaf: FlaxLeaf) -> bool:
    """Does every value occur in the torch tensors from which the leaf is made?"""
    theirs = [tensor.reshape(-1) for tensor in leaf.torch.values() if tensor.dtype == leaf.have.dtype]
    return bool(theirs) and bool(np.isin(leaf.have, np.concatenate(theirs)).all())


def _scaled(leaf: FlaxLeaf) -> WeightMistake | None:
    have, want = leaf.have.astype(np.float64), leaf.want.astype(np.float64)
    size = float((want * want).sum())
    if size and constant(leaf.want) is None:
        factor = float((have * want).sum()) / size
        if factor and abs(factor - 1) > 1e-6 and relative(have, want * factor) < _EPS:
            text = f"{leaf.path} is {nice(factor)} x its right value"
            named = _scale_name(leaf, factor)
            return WeightMistake(named, text, f"divide it by {nice(factor)}")
    step = float(np.median(have - want))
    if abs(step) == 1.0 and float(np.abs(have - want - step).max()) < _EPS * max(1.0, float(np.abs(want).max())):
        text = f"every value of {leaf.path} is 1 too {'large' if step > 0 else 'small'}"
        return WeightMistake(
            "zero-centred norm", text, f"{'subtract' if step > 0 else 'add'} 1: one side stores scale - 1"
        )
    return None


def _scale_name(leaf: FlaxLeaf, factor: float) -> str:
    width, table = leaf.have.shape[-1], leaf.role == "embedding"
    if table and min(abs(factor / np.sqrt(width) - 1), abs(factor * np.sqrt(width) - 1)) < 1e-5:
        return "embedding scale"
    heads = {leaf.have.shape[-1]} | {width // heads for heads in leaf.known.heads if width % heads == 0}
    roots = [abs(factor * np.sqrt(head) - 1) for head in heads] + [abs(factor / np.sqrt(head) - 1) for head in heads]
    if not table and leaf.known.heads and min(roots, default=1.0) < 1e-5:
        return "attention scale"
    return "scale factor"


def _fused(leaf: FlaxLeaf) -> WeightMistake | None:
    """Rows of the fused tensor that belong to other parts by the plan."""
    if leaf.fused is None or leaf.path not in leaf.fused.entry.targets:
        return None
    now = leaf.fused.order
    for order, made in other_readings(leaf.fused, leaf.path, list(leaf.torch.values())):
        if _matches(leaf.have, made):
            planned = "" if now is None else f", the plan reads it {now.text} ({leaf.fused.decided})"
            text = f"{leaf.path} holds rows of {_sources(leaf)} read {order.text}{planned}"
            fix = "one of the two orders is wrong: port again, or correct the rule that the check gets"
            return WeightMistake("fused order", text, f"{fix}: {rule_line(leaf.fused.entry, order)}")
    return None


def _fresh(leaf: FlaxLeaf) -> WeightMistake | None:
    if _of_torch(leaf):
        return None
    name = looks_fresh(leaf.have, leaf.want, leaf.role == "embedding")
    return None if name is None else _unported(leaf, f"looks newly drawn by {name}")


def _differ(leaf: FlaxLeaf) -> WeightMistake:
    have, want = leaf.have, leaf.want
    count = int(np.count_nonzero(~((have == want) | ((have != have) & (want != want)))))
    off = relative(have, want)
    text = f"{leaf.path}: {count:,} of {have.size:,} values differ"
    if _of_torch(leaf):
        text += f"; all of them occur in {_sources(leaf)}, at other places"
    if not np.isfinite(have.astype(np.float64)).all():
        text += "; some are not finite"
    elif _same_values(have, want):
        text += "; they are the right values in another order"
    elif count < have.size and off < np.inf:
        text += f", with a relative error of {off:.2g} in all"
    elif off < _NOISE:
        text += f": noise, with a relative error of {off:.2g}"
    return WeightMistake("weights differ", text, f"port {_sources(leaf)} again")


HYPOTHESES: tuple[Callable[[FlaxLeaf], WeightMistake | None], ...] = (
    _initial, _axes, _reshaped, _rows, _fused, _other_layer, _rounded, _scaled, _fresh,
)  # fmt: skip
"""Tried in this order. Each needs the exact bits, except `_scaled` and `_fresh`."""


# ---------------------------------------------------------------- comparing


def _matches(have: Array, candidate: Array) -> bool:
    """Are the arrays equal? A few values are compared first."""
    if have.shape != candidate.shape:
        return False
    probe = np.random.Generator(np.random.Philox(3)).integers(0, 1 << 30, size=(have.ndim, 16))
    at = tuple(probe[axis] % size for axis, size in enumerate(have.shape))
    return bool(np.array_equal(have[at], candidate[at], equal_nan=is_number(have))) and same(have, candidate)


def _same_values(have: Array, want: Array) -> bool:
    """Do the arrays hold the same values in any order, judged by sums over their bits?"""
    plain = is_number(have) or have.dtype.kind in "biu"
    if have.size != want.size or have.dtype != want.dtype or not plain:
        return False
    sums: list[tuple[int, int]] = []
    for array in (have, want):
        flat = np.ascontiguousarray(array).reshape(-1)
        bits = (flat + flat.dtype.type(0)).view(f"u{flat.dtype.itemsize}").astype(np.uint64)  # -0.0 counts as 0.0
        sums.append((int(bits.sum(dtype=np.uint64)), int((bits * bits).sum(dtype=np.uint64))))
    return sums[0] == sums[1]


def slices(leaf: FlaxLeaf, axis: int, index: int) -> FlaxLeaf:
    """One layer of a stacked leaf. The other layers of the stack become its `others`."""

    def cut(array: Array | None) -> Array | None:
        fits = array is not None and array.ndim == leaf.have.ndim and array.shape[axis] == leaf.have.shape[axis]
        return np.take(array, index, axis) if fits and array is not None else None

    have, want = np.take(leaf.have, index, axis), np.take(leaf.want, index, axis)
    others = dict(_neighbours(leaf.path, leaf.want, axis))
    theirs = dict(_neighbours(leaf.path, leaf.have, axis))
    torch = {name: tensor for name, tensor in leaf.torch.items() if tensor.size == have.size}
    return FlaxLeaf(f"{leaf.path}[{index}]", have, want, torch, others, theirs, cut(leaf.initial), leaf.known)


def _neighbours(path: str, stack: Array, axis: int) -> Iterator[tuple[str, Array]]:
    for index in range(stack.shape[axis]):
        yield f"{path}[{index}]", np.take(stack, index, axis)
