"""Values that are computed from the old leaf: add_normal, scaled, mean, mix, rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graftax.errors import PlanError
from graftax.surgery.values.base import (
    in_pieces,
    moments,
    pieces,
    refuse_not_finite,
    refuse_overflow,
    require_floating,
    total,
    traced,
)
from graftax.surgery.values.fills import draws
from graftax.tree import TensorSpec

if TYPE_CHECKING:
    from graftax.surgery.values.base import Array


@dataclass(frozen=True, slots=True)
class Scaled:
    """The leaf times `factor`, multiplied in float64 and rounded once. NaN and infinity stay (infinity x 0 is NaN)."""

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = True
    factor: float

    @property
    def text(self) -> str:
        return f"scaled({self.factor:.12g})"

    def check(self, path: str, spec: TensorSpec) -> None:
        require_floating(spec, self.text)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        return in_pieces(spec, self.text, (old,), lambda _, wide: wide * self.factor)

    def traced(self, path: str, spec: TensorSpec, leaf: Any) -> Any:
        require_floating(spec, self.text)
        return traced(spec, (leaf,), lambda _, wide: wide * self.factor, lambda _, change: change * self.factor)


@dataclass(frozen=True, slots=True)
class AddNormal:
    """The leaf plus the numbers that `Normal` would give it, added in float64, rounded once. NaN and infinity stay.

    relative  the numbers are multiplied by the standard deviation of the leaf: of all its values about their mean,
              divided by their count, in float64. A leaf with NaN or infinity has none and is refused
    """

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = False
    stddev: float
    seed: int
    relative: bool = False

    @property
    def text(self) -> str:
        return f"add_normal({self.stddev:.12g}, seed={self.seed}{', relative=True' if self.relative else ''})"

    def check(self, path: str, spec: TensorSpec) -> None:
        require_floating(spec, self.text)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        require_floating(spec, self.text)
        stddev = self.stddev
        if self.relative:
            refuse_not_finite(old, self.text, "standard deviation")
            stddev *= moments(old, spread=True)[1]
            if not math.isfinite(stddev):
                raise PlanError(f"{self.text}: the standard deviation of the leaf overflows float64")
        return self._adding(path, stddev)(spec, old)

    def in_order(self, path: str) -> Callable[[TensorSpec, Any], Array] | None:
        return None if self.relative else self._adding(path, self.stddev)

    def _adding(self, path: str, stddev: float) -> Callable[[TensorSpec, Any], Array]:
        draw = draws(self.seed, path)
        return lambda spec, old: in_pieces(spec, self.text, (old,), lambda count, wide: wide + draw(count) * stddev)

    def traced(self, path: str, spec: TensorSpec, leaf: Any) -> Any:
        """The noise counts as a constant: gradients are those of the leaf."""
        import numpy as np

        require_floating(spec, self.text)
        drawn = np.empty(spec.size, np.float64)
        draw = draws(self.seed, path)
        for piece in pieces(spec.size):
            drawn[piece] = draw(piece.stop - piece.start)
        noise = drawn.reshape(spec.shape) * (1.0 if self.relative else self.stddev)

        def added(xp: Any, wide: Any) -> Any:
            if not self.relative:
                return wide + noise
            return wide + _rounded_product(xp, noise, self.stddev * _traced_spread(xp, wide))

        return traced(spec, (leaf,), added, lambda _, change: change)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of all values of the leaf everywhere, summed in float64 and rounded once. A leaf with NaN or infinity
    has no mean and is refused, as is one that is not floating."""

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = False

    @property
    def text(self) -> str:
        return "mean()"

    def check(self, path: str, spec: TensorSpec) -> None:
        require_floating(spec, self.text)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        require_floating(spec, self.text)
        refuse_not_finite(old, self.text, "mean")
        mean = moments(old, spread=False)[0]
        if not math.isfinite(mean):
            raise PlanError(f"{self.text}: the sum of the leaf's values overflows float64")
        return in_pieces(spec, self.text, (), lambda count: np.full(count, mean))

    def traced(self, path: str, spec: TensorSpec, leaf: Any) -> Any:
        require_floating(spec, self.text)

        def filled(xp: Any, wide: Any) -> Any:
            return xp.broadcast_to(_traced_mean(xp, wide), wide.shape)

        return traced(spec, (leaf,), filled, lambda xp, change: xp.broadcast_to(xp.mean(change), change.shape))


def _traced_mean(xp: Any, wide: Any) -> Any:
    """The mean of a float64 array, in the order of `moments`."""
    from graftax.surgery.values.base import PIECE

    flat = wide.reshape(-1)
    if flat.size > PIECE:
        rows = -(-flat.size // PIECE)
        flat = xp.concatenate([flat, xp.zeros(rows * PIECE - flat.size, wide.dtype)]).reshape(rows, PIECE)
        flat = total(xp, flat)
    added = total(xp, flat) if flat.size else xp.zeros((), wide.dtype)
    # XLA would divide by a constant as a multiplication with its reciprocal.
    return added / xp.where(added == added, float(max(wide.size, 1)), added)


def _traced_spread(xp: Any, wide: Any) -> Any:
    off = wide - _traced_mean(xp, wide)
    return xp.sqrt(_traced_mean(xp, _rounded_product(xp, off, off)))


def _rounded_product(xp: Any, a: Any, b: Any) -> Any:
    """a b, rounded before anything is added to it: XLA would fuse the two, and round once. Nothing else stops it:
    neither optimization_barrier nor reduce_precision does."""
    product = a * b
    return xp.where(product == product, product, xp.nan)


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """old + t (donor - old), in float64, rounded once. At t = 0 it is the leaf, at t = 1 the donor, both bit for bit;
    outside of 0 to 1 it goes beyond them (task arithmetic). Where both are equal the value stays, infinity too.

    donor   an array of NumPy or jax of the leaf's shape and dtype, or a FromCheckpoint
    """

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = False
    donor: Any
    t: float

    @property
    def text(self) -> str:
        from graftax.errors import escape

        shown = getattr(self.donor, "text", None)
        return f"mix({shown if isinstance(shown, str) else escape(type(self.donor).__name__)}, {self.t:.12g})"

    def check(self, path: str, spec: TensorSpec) -> None:
        require_floating(spec, self.text)
        if (check := getattr(self.donor, "check", None)) is not None:
            check(path, spec)

    def _other(self, path: str, spec: TensorSpec) -> Any:
        """The donor's values. PlanError if they do not fit the leaf."""
        from graftax.surgery.donors import FromCheckpoint, PartOfDonor
        from graftax.tree.dtypes import spec_of

        from_other = isinstance(self.donor, (FromCheckpoint, PartOfDonor))
        other = self.donor.apply(path, spec, None) if from_other else self.donor
        if spec_of(other) != spec:
            raise PlanError(f"{self.text}: the donor is {spec_of(other)}, the leaf {spec}")
        return other

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        require_floating(spec, self.text)
        other = np.asarray(self._other(path, spec))
        if self.t in (0.0, 1.0):
            return np.array(other if self.t else old, order="C", copy=True)

        def mixed(_: int, wide: Any, beyond: Any) -> Any:
            return np.where(beyond == wide, wide, wide + self.t * (beyond - wide))

        return in_pieces(spec, self.text, (old, other), mixed)

    def traced(self, path: str, spec: TensorSpec, leaf: Any) -> Any:
        from graftax.adapters.jax_arrays import is_tracer, to_jax

        require_floating(spec, self.text)
        other = self._other(path, spec)
        other = other if is_tracer(other) else to_jax(other)
        if self.t in (0.0, 1.0):
            return other if self.t else leaf

        def mixed(xp: Any, wide: Any, beyond: Any) -> Any:
            return xp.where(beyond == wide, wide, wide + _rounded_product(xp, self.t, beyond - wide))

        return traced(
            spec,
            (leaf, other),
            mixed,
            lambda _, change, other_change: change * (1 - self.t) + other_change * self.t,
        )


@dataclass(frozen=True, slots=True)
class Rounded:
    """The leaf rounded to a narrower floating dtype, to nearest even, and back: what storing it there would lose. A
    finite value that the dtype cannot hold is refused, as is infinity where it has none."""

    reads: ClassVar[bool] = True
    local: ClassVar[bool] = True
    dtype: str

    @property
    def text(self) -> str:
        return f'rounded("{self.dtype}")'

    def check(self, path: str, spec: TensorSpec) -> None:
        from graftax.ops.floats import widens

        require_floating(spec, self.text)
        if widens(spec.dtype, self.dtype):
            raise PlanError(
                f"{self.text}: {self.dtype} holds every {spec.dtype}, so nothing would change",
                next="Give a narrower dtype, or select wider leaves.",
            )

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Array:
        import numpy as np

        from graftax.ops.casting import cast_array

        self.check(path, spec)
        out = np.empty(spec.shape, old.dtype)
        flat, before = out.reshape(-1), np.ascontiguousarray(old).reshape(-1)
        overflowed = 0
        for piece in pieces(spec.size):
            narrow, count = cast_array(before[piece], self.dtype, "propagate")
            overflowed += count.overflowed
            flat[piece], back = cast_array(narrow, spec.dtype, "propagate")
            overflowed += back.overflowed
        refuse_overflow(overflowed, spec, self.text, self.dtype)
        return out

    def traced(self, path: str, spec: TensorSpec, leaf: Any) -> Any:
        """Gradients pass straight through."""
        from graftax.adapters.traced import nearest_of
        from graftax.ops.floats import FLOATS

        self.check(path, spec)

        def there_and_back(xp: Any, wide: Any) -> Any:
            return nearest_of(wide, FLOATS[self.dtype]).astype(self.dtype).astype(wide.dtype)

        return traced(spec, (leaf,), there_and_back, lambda _, change: change)
