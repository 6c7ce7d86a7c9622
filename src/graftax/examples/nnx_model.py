"""The digits network in Flax NNX. Imported by `graftax.examples.digits_nnx`."""

from __future__ import annotations

import jax
from flax import nnx


class Digits(nnx.Module):
    """(N, 8, 8, 1) -> logits (N, 10). Call `.eval()` before inference: BatchNorm then uses its running statistics.

    Padding, epsilon and momentum are torch's, as in the Linen model.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 12, kernel_size=(5, 3), padding=((2, 2), (1, 1)), rngs=rngs)
        self.norm1 = nnx.BatchNorm(12, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv2 = nnx.Conv(12, 20, kernel_size=(3, 2), strides=(2, 1), padding=((1, 1), (0, 0)), rngs=rngs)
        self.norm2 = nnx.BatchNorm(20, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.linear1 = nnx.Linear(2 * 3 * 20, 48, rngs=rngs)
        self.linear2 = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = x.reshape((x.shape[0], -1))
        x = nnx.relu(self.linear1(x))
        return self.linear2(x)
