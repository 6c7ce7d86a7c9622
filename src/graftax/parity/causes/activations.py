"""Activations in float64, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from graftax.parity.causes.numbers import Array


def erf(x: Array) -> Array:
    """The error function to 1e-15: its series near zero, a continued fraction far away."""
    small = np.abs(x) < 2.5
    a = np.where(small, x, 0.0)
    term, total = a.copy(), a.copy()
    square = a * a
    for n in range(1, 48):
        term = term * (-square / n)
        total += term / (2 * n + 1)
    near = total * (2 / np.sqrt(np.pi))
    b = np.where(small, 3.0, np.abs(x))
    fraction = np.zeros_like(b)
    for n in range(60, 0, -1):
        fraction = (n / 2) / (b + fraction)
    far = np.sign(x) * (1 - np.exp(-np.minimum(b * b, 700.0)) / ((b + fraction) * np.sqrt(np.pi)))
    return np.where(small, near, far)


def sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _negative(x: Array) -> Array:
    """exp(x) - 1 where x is negative."""
    return np.expm1(np.minimum(x, 0))


_SELU = 1.0507009873554805, 1.6732632423543772


@dataclass(frozen=True, slots=True)
class Activation:
    """f in float64, and how Flax writes it."""

    f: Callable[[Array], Array]
    flax: str


ACTIVATIONS: Mapping[str, Activation] = {
    "identity": Activation(lambda x: x, "no activation"),
    "relu": Activation(lambda x: np.maximum(x, 0), "nn.relu(x)"),
    "gelu erf": Activation(lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))), "nn.gelu(x, approximate=False)"),
    "gelu tanh": Activation(gelu_tanh, "nn.gelu(x, approximate=True)"),
    "silu": Activation(lambda x: x * sigmoid(x), "nn.silu(x)"),
    "tanh": Activation(np.tanh, "nn.tanh(x)"),
    "sigmoid": Activation(sigmoid, "nn.sigmoid(x)"),
    "gelu quick": Activation(lambda x: x * sigmoid(1.702 * x), "x * nn.sigmoid(1.702 * x)"),
    "relu squared": Activation(lambda x: np.maximum(x, 0) ** 2, "jnp.square(nn.relu(x))"),
    "leaky relu 0.01": Activation(lambda x: np.where(x > 0, x, 0.01 * x), "nn.leaky_relu(x, 0.01)"),
    "leaky relu 0.1": Activation(lambda x: np.where(x > 0, x, 0.1 * x), "nn.leaky_relu(x, 0.1)"),
    "leaky relu 0.2": Activation(lambda x: np.where(x > 0, x, 0.2 * x), "nn.leaky_relu(x, 0.2)"),
    "elu": Activation(lambda x: np.maximum(x, 0) + _negative(x), "nn.elu(x)"),
    "selu": Activation(lambda x: _SELU[0] * (np.maximum(x, 0) + _SELU[1] * _negative(x)), "nn.selu(x)"),
    "softplus": Activation(softplus, "nn.softplus(x)"),
    "relu6": Activation(lambda x: np.clip(x, 0, 6), "nn.relu6(x)"),
    "hard sigmoid": Activation(lambda x: np.clip(x / 6 + 0.5, 0, 1), "nn.hard_sigmoid(x)"),
    "hard silu": Activation(lambda x: x * np.clip(x / 6 + 0.5, 0, 1), "nn.hard_silu(x)"),
    "hard tanh": Activation(lambda x: np.clip(x, -1, 1), "nn.hard_tanh(x)"),
    "mish": Activation(lambda x: x * np.tanh(softplus(x)), "x * jnp.tanh(nn.softplus(x))"),
    "softsign": Activation(lambda x: x / (1 + np.abs(x)), "nn.soft_sign(x)"),
    "log sigmoid": Activation(lambda x: -softplus(-x), "nn.log_sigmoid(x)"),
    "exp": Activation(np.exp, "jnp.exp(x)"),
    "square": Activation(np.square, "jnp.square(x)"),
}  # fmt: skip
"""The likely activations come first: of two that fit equally, the first is named."""

KIN: Mapping[str, str] = {"gelu erf": "gelu", "gelu tanh": "gelu", "gelu quick": "gelu"}


def apply(name: str, x: Array) -> Array:
    """Apply an activation of ACTIVATIONS; overflow gives infinities, which fit nothing."""
    with np.errstate(all="ignore"):
        return ACTIVATIONS[name].f(x)
