"""Arithmetic on arrays inside jit, grad and vmap that gives the bits of the same arithmetic on the host: in float64,
whatever jax_enable_x64 says, and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class FloatFormat(Protocol):
    """A row of `ops.FLOATS`."""

    @property
    def bits(self) -> int: ...
    @property
    def mantissa(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def top(self) -> float: ...
    @property
    def ieee(self) -> bool: ...


def computed(
    leaves: tuple[Any, ...], function: Callable[..., Any], tangent: Callable[..., Any], form: FloatFormat
) -> Any:
    """function(jnp, *leaves in float64), rounded to the dtype of the first leaf.

    form      the format of that dtype
    tangent   (jnp, *changes of the leaves, in their dtypes) -> the change of the result: the derivative. It is stated,
              because a rounding has none of its own

    A leaf with a traced value may stand beside concrete ones. XLA takes subnormal numbers for zero.
    """
    import jax
    from jax import numpy as jnp

    first = leaves[0]

    @jax.custom_jvp
    def made(*leaves: Any) -> Any:
        with jax.enable_x64(True):
            wide = [leaf.astype(jnp.float64) for leaf in leaves]
            return _narrowed(function(jnp, *wide), first.dtype, form)

    @made.defjvp
    def _(leaves: tuple[Any, ...], changes: tuple[Any, ...]) -> tuple[Any, Any]:  # pyright: ignore[reportUnusedFunction]
        widest = jnp.promote_types(first.dtype, jnp.float32)
        change = tangent(jnp, *(change.astype(widest) for change in changes))
        return made(*leaves), change.astype(first.dtype)

    return made(*map(jnp.asarray, leaves))


def _narrowed(wide: Any, dtype: Any, form: FloatFormat) -> Any:
    return (wide if form.bits >= 32 else nearest_of(wide, form)).astype(dtype)


def nearest_of(wide: Any, form: FloatFormat) -> Any:
    """The nearest value of a format (ties to even) to each float64, still in float64, so that no intermediate type
    rounds a second time. Beyond the largest value: infinity, or NaN if the format has none."""
    from jax import lax
    from jax import numpy as jnp

    bits = lax.bitcast_convert_type(wide, jnp.uint64)
    power = lax.bitcast_convert_type(bits & jnp.uint64(0x7FF << 52), jnp.float64)  # 2 to the exponent
    step = jnp.maximum(power, 2.0**form.least) * 2.0**-form.mantissa
    near = jnp.where(jnp.isfinite(wide), jnp.rint(wide / step) * step, wide)
    over = jnp.abs(near) > form.top
    out = jnp.where(over, jnp.copysign(jnp.inf, wide) if form.ieee else jnp.nan, near)
    return jnp.where(jnp.isinf(wide) & (not form.ieee), jnp.nan, out)
