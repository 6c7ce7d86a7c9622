"""The founding exercise: initialise one Dense layer, replace its kernel by a constant, apply it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


def kernel_replace(seed: Any, x: Any, features: Any, replacement_value: Any) -> jax.Array:
    """The output (N, features) of `nn.Dense(features)` on `x` (N, in_dim) after its kernel is filled with one value.

    The layer is initialised from `seed` and `x`; seed and features are whole numbers of any type (5, 5.0). Its kernel
    (in_dim, features) becomes `full_like(kernel, replacement_value)`, its bias (features,) stays as initialised. In
    closed form: `y[n, j] = replacement_value * x[n, :].sum() + bias[j]`.

    Raises ValueError if `x` is not (N, in_dim), or if seed or features is not a whole number or out of range.
    """
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import graftax as gx

    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; it must be (N, in_dim)")
    width, number = _whole(features, "features"), _whole(seed, "seed")
    if width < 1:
        raise ValueError(f"features is {width}; it must be at least 1")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed is {number}; a key takes a signed number of 64 bits")
    dense = nn.Dense(width)
    variables = dense.init(jax.random.key(number), x)
    # A Dense that is the whole model has no `Dense_0` level: its leaves are params/kernel and params/bias.
    variables = gx.replace(variables, "params/kernel", gx.constant(replacement_value), expect=1)
    with jax.default_matmul_precision("highest"):
        return jnp.asarray(dense.apply(variables, x))


def _whole(value: Any, name: str) -> int:
    """The whole number that `value` is: 5, 5.0, or a NumPy or jax scalar."""
    try:
        number = int(value)
        whole = isinstance(value, str) or bool(number == value)
    except (TypeError, ValueError, OverflowError) as exc:  # text, arrays, NaN, infinity
        raise ValueError(f"{name} must be a whole number, not {value!r}") from exc
    if not whole:
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return number
