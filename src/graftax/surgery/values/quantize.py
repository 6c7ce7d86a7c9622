"""Symmetric fake quantization, one scale for each output channel, or for each group of its inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar

from graftax.errors import PlanError, UsageError, option, worded
from graftax.layers import LeafRole
from graftax.surgery.values import base
from graftax.surgery.values.base import dtype_of, refuse_not_finite, refuse_overflow, require_floating, traced
from graftax.tree import TensorSpec

if TYPE_CHECKING:
    from graftax.surgery.values.base import Array

BITS = (2, 16)
"""Fewest and most bits."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Symmetric fake quantization. With m the largest magnitude among the values that share a scale, and n =
    2^(bits-1) - 1, w becomes round(w n / m) m / n, halves to even. The dtype stays; where all are zero they stay zero.

    axis   the axes that keep their own scale; None: those that the role says are outputs, or a stack
    group  so many input channels share a scale, in the order of the flat input; None: all of them
    role   what the axes of the leaf are, filled in by surgery; None: nothing tells; `...`: the leaf's own name may

    A leaf with NaN or infinity has no scale and is refused, as is one that is not floating or that has no inputs.
    """

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = False
    bits: int
    axis: tuple[int, ...] | None = None
    group: int | None = None
    role: LeafRole | EllipsisType | None = field(default=..., compare=False)

    @property
    def text(self) -> str:
        axis = "" if self.axis is None else f", axis={self.axis[0] if len(self.axis) == 1 else self.axis}"
        return f"quantized({self.bits}{axis}{'' if self.group is None else f', group={self.group}'})"

    @property
    def needs_role(self) -> bool:
        """True if the role of the leaf decides what shares a scale."""
        return self.axis is None or self.group is not None

    def as_data(self) -> dict[str, Any]:
        parts = self.role.axes if isinstance(self.role, LeafRole) else ()
        axes = [[[part.name, part.kind, part.size] for part in one] for one in parts]
        axis = None if self.axis is None else list(self.axis)
        return {"kind": "quantized", "bits": self.bits, "axis": axis, "group": self.group, "axes": axes}

    def check(self, path: str, spec: TensorSpec) -> None:
        require_floating(spec, self.text)
        if spec.size:
            self.cut(path, spec)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        from graftax.ops.casting import cast_array

        require_floating(spec, self.text)
        if not spec.size:
            return np.empty(spec.shape, dtype_of(spec))
        refuse_not_finite(old, self.text, "scale")
        cut = self.cut(path, spec)
        out = np.empty(spec.shape, dtype_of(spec))
        source, result = (array.reshape(cut.split).transpose(cut.order) for array in (old, out))
        overflowed = 0
        for piece in _pieces(source.shape, cut.own):
            wide = source[piece].astype(np.float64)
            shape = wide.shape
            made = _quantized(wide.reshape(cut.grouped(shape)), cut.shared(), self.bits).reshape(shape)
            result[piece], count = cast_array(made, spec.dtype, "propagate")
            overflowed += count.overflowed
        refuse_overflow(overflowed, spec, self.text)
        return out

    def traced(self, path: str, spec: TensorSpec, leaf: Any) -> Any:
        """Gradients pass straight through."""
        require_floating(spec, self.text)
        cut = self.cut(path, spec)
        back = tuple(sorted(range(len(cut.order)), key=cut.order.__getitem__))

        def made(xp: Any, wide: Any) -> Any:
            turned = wide.reshape(cut.split).transpose(cut.order)
            new = _traced_quantized(xp, turned.reshape(cut.grouped(turned.shape)), cut.shared(), self.bits)
            return new.reshape(turned.shape).transpose(back).reshape(spec.shape)

        return traced(spec, (leaf,), made, lambda _, change: change)

    def cut(self, path: str, spec: TensorSpec) -> Cut:
        """Which values share a scale. PlanError, or UsageError for an axis that does not exist, if that is unclear or
        makes no sense for this leaf."""
        role = self.role if not isinstance(self.role, EllipsisType) else _role_of_name(path, spec)
        if role is not None and tuple(math.prod(a.size for a in one) for one in role.axes) != spec.shape:
            role = None
        if self.axis is None:
            if role is None or not spec.shape:
                raise _unknown(self, spec)
            return _by_role(self, role, spec)
        rank = len(spec.shape)
        own = tuple(axis % rank if -rank <= axis < rank else axis for axis in self.axis)
        for axis in own:
            if not 0 <= axis < rank:
                raise PlanError(f"{self.text}: {spec} has no axis {axis}")
        if len(set(own)) < len(own):
            raise PlanError(f"{self.text}: {spec} has {rank} axes, and an axis is named twice")
        return _by_axis(self, own, role, spec)


# ---------------------------------------------------------------- what shares a scale


@dataclass(frozen=True, slots=True)
class Cut:
    """The leaf with its named axes apart (`split`), in an order in which `own` axes come first, each index of which has
    its own scales; then `inputs` axes, of which `group` values in a row share a scale (None: all); then the rest."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    own: int
    inputs: int
    group: int | None

    def grouped(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a piece with its inputs in groups: (own..., groups, inputs of a group, rest...)."""
        inputs = math.prod(shape[self.own : self.own + self.inputs])
        size = self.group or max(inputs, 1)
        return (*shape[: self.own], inputs // size, size, *shape[self.own + self.inputs :])

    def shared(self) -> tuple[int, ...]:
        """The axes of `grouped` along which values share a scale."""
        return tuple(range(self.own + 1, len(self.split) - self.inputs + 2))


def _by_role(value: Quantized, role: LeafRole, spec: TensorSpec) -> Cut:
    parts = role.parts
    if not any(part.kind in ("in", "k") for part in parts):
        raise _no_inputs(value, role, spec)
    own = [n for n, part in enumerate(parts) if part.kind in ("stack", "out")]
    places = {part.name: n for n, part in enumerate(parts) if part.kind == "in"}
    inputs = [places[name] for name in role.inputs]
    rest = [n for n, part in enumerate(parts) if part.kind == "k"]
    split = tuple(part.size for part in parts)
    return _checked(value, Cut(split, (*own, *inputs, *rest), len(own), len(inputs), value.group), spec)


def _by_axis(value: Quantized, own: Sequence[int], role: LeafRole | None, spec: TensorSpec) -> Cut:
    """`axis` says what keeps its own scale. Groups run along the only other axis, or along the inputs of the role."""
    other = [n for n in range(len(spec.shape)) if n not in own]
    inputs = other
    if value.group is not None and len(other) != 1:
        merged = role is None or any(len(axes) > 1 for axes in role.axes)
        if role is None or merged or not set(role.of_kind("in")) <= set(other):
            raise PlanError(
                f"{value.text}: {spec} has {len(other)} axes besides those of {option('axis')}, and which of them are "
                "input channels is not known",
                next=f"Leave out {option('axis')} and give {option('like')}, a live module that tells.",
            )
        places = {axes[0].name: n for n, axes in enumerate(role.axes)}
        inputs = [places[name] for name in role.inputs]
    elif (
        value.group is not None and role is not None and role.of_kind("in") and not set(other) & set(role.of_kind("in"))
    ):
        raise PlanError(
            f"{value.text}: groups run along input channels, each of which {option('axis')} gives its own scale",
            next=f"The axes of this leaf are {', '.join(role.names)}.",
        )
    rest = [n for n in other if n not in inputs]
    return _checked(value, Cut(spec.shape, (*own, *inputs, *rest), len(own), len(inputs), value.group), spec)


def _checked(value: Quantized, cut: Cut, spec: TensorSpec) -> Cut:
    inputs = math.prod(cut.split[n] for n in cut.order[cut.own : cut.own + cut.inputs])
    if cut.group is not None and inputs % cut.group:
        raise PlanError(f"{value.text}: {spec} has {inputs} input channels, which groups of {cut.group} do not divide")
    return cut


def _role_of_name(path: str, spec: TensorSpec) -> LeafRole | None:
    """The role that the leaf's own name shows."""
    from graftax.layers import role_of
    from graftax.tree import Checkpoint
    from graftax.tree.sides import side_of_names

    return role_of(Checkpoint("", side_of_names((path,)), {path: spec}), path)


# ---------------------------------------------------------------- refusals


def _no_inputs(value: Quantized, role: LeafRole, spec: TensorSpec) -> PlanError:
    what = f"{spec}, the {role.leaf} of a {role.layer}," if role.layer else str(spec)
    ways = f"What is left is a scale for each of its {spec.size} values, which changes nothing: select matrices only."
    return PlanError(f"{value.text}: {what} has no input channels that could share a scale", next=ways)


def _unknown(value: Quantized, spec: TensorSpec) -> PlanError:
    """The error for a leaf whose role is unknown: it shows every reading and the axes that keep their scales in it."""
    if not spec.shape:
        return PlanError(f"{value.text}: {spec} is one value, which has no channels", next="Select matrices only.")
    ways = [f"{_axis_text(axis)}, {_scales(axis, spec.shape)} ({what})" for axis, what in _readings(len(spec.shape))]
    return PlanError(
        f"{value.text}: it is not known which axes of {spec} are outputs, each of which has a scale of its own",
        next=f"Give {option('like')}, a live module that tells, or say {'; or '.join(ways)}.",
    )


def _readings(rank: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """The usual readings of a leaf of this rank: the axes that keep their own scale, and what the leaf would be."""
    if rank == 1:
        yield (), "the inputs of one output"
        return
    if rank == 2:
        yield (0,), "(out, in), as torch stores a matrix; an embedding"
        yield (-1,), "(in, out), as Flax stores a matrix"
        return
    yield (0,), "(out, in, k..), a torch convolution"
    if rank == 3:
        yield (0, 1), "a stack of (out, in)"
        yield (1, 2), "(in, heads, head_dim)"
    elif rank > 3:
        yield (0, *range(2, rank)), "a stack of (in, heads, head_dim)"
    yield (0, -1), "a stack of (in, out)"
    yield (-1,), "(k.., in, out), a Flax convolution; (heads, head_dim, out)"


def _axis_text(axis: tuple[int, ...]) -> str:
    inner = ", ".join(map(str, axis))
    written = inner.replace(" ", "") or "'()'"
    return worded(f"--axis={written}", f"axis={inner if len(axis) == 1 else f'({inner})'}")


def _scales(axis: tuple[int, ...], shape: Sequence[int]) -> str:
    count = math.prod(shape[n] for n in axis)
    return "1 scale" if count == 1 else f"{count} scales"


# ---------------------------------------------------------------- the arithmetic


def _pieces(shape: Sequence[int], own: int) -> Iterator[tuple[slice, ...]]:
    """Slices of the `own` leading axes that cover them, each of at most NEAR values or one channel."""
    room = max(1, base.NEAR // max(1, math.prod(shape[own:])))
    steps: list[int] = []
    for size in reversed(shape[:own]):
        steps.append(max(1, min(size, room)))
        room = max(1, room // max(1, size))
    ranges = [
        [slice(at, min(at + step, size)) for at in range(0, size, step)]
        for size, step in zip(shape[:own], reversed(steps), strict=True)
    ]
    yield from itertools.product(*ranges)


def _quantized(wide: Array, shared: tuple[int, ...], bits: int) -> Array:
    """Values in float64 that share a scale along the axes `shared`. A power of two is factored out first, so that
    nothing overflows and every step is exact but the last quotient. The largest value stays bit for bit, in a float64
    leaf too, so that the scale is the same the next time."""
    import numpy as np

    levels = float(2 ** (bits - 1) - 1)
    most = np.abs(wide).max(axis=shared, keepdims=True, initial=0.0)
    most, exponent = np.frexp(most)
    unit = np.where(most > 0, most, 1.0)
    codes = np.rint(np.ldexp(wide, -exponent) * levels / unit)
    made = np.where(np.abs(codes) == levels, np.copysign(unit, codes), codes * unit / levels)
    return np.ldexp(made, exponent)


def _traced_quantized(xp: Any, wide: Any, shared: tuple[int, ...], bits: int) -> Any:
    """The same for jax. XLA may divide by a multiplication with the reciprocal, so the code is only near: its remainder
    corrects it, which is exact for a leaf of 32 bits or fewer. The last divisor is no constant for the same reason; a
    last bit of float64 there would not show in a narrower dtype: the quotient is never that near to the middle of two
    of its values."""
    levels = float(2 ** (bits - 1) - 1)
    most = xp.max(xp.abs(wide), axis=shared, keepdims=True, initial=0.0)
    unit = xp.where(most > 0, most, 1.0)
    near = xp.rint(wide * levels / unit)
    left = 2 * (wide * levels - near * unit)
    odd = near - 2 * xp.floor(near / 2)
    up = (left > unit) | ((left == unit) & (odd == 1))
    down = (left < -unit) | ((left == -unit) & (odd == 1))
    codes = xp.copysign(xp.where(up, near + 1, xp.where(down, near - 1, near)), wide)
    made = codes * unit / xp.where(codes == codes, levels, codes)
    return xp.where(xp.abs(codes) == levels, xp.copysign(unit, codes), made)


def axes_of(axis: Any) -> tuple[int, ...] | None:
    """The argument `axis` as a tuple. UsageError if it is no whole number and no tuple of them."""
    given = (axis,) if not isinstance(axis, (tuple, list)) else tuple(axis)
    if axis is None:
        return None
    for one in given:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise UsageError(f"quantized: axis must be a whole number or a tuple of them, not {axis!r}")
    return tuple(int(one.__index__()) for one in given)
