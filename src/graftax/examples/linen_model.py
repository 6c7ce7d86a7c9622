"""The digits network in Flax Linen. Imported by `graftax.examples.digits_linen`."""

from __future__ import annotations

import jax
from flax import linen as nn


class Digits(nn.Module):
    """(N, 8, 8, 1) -> logits (N, 10). Leaves: Conv_0, BatchNorm_0, Conv_1, BatchNorm_1, Dense_0, Dense_1.

    The settings are written out because they must equal torch's: padding is explicit (torch's padding of a strided
    convolution is not SAME), epsilon is torch's 1e-5, and momentum 0.9 is torch's 0.1, because Flax's momentum is 1 -
    torch's (Flax's default is 0.99).
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(12, kernel_size=(5, 3), padding=((2, 2), (1, 1)))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(20, kernel_size=(3, 2), strides=(2, 1), padding=((1, 1), (0, 0)))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(48)(x))
        return nn.Dense(10)(x)
