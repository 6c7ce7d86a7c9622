"""Functions that several of the models use: activations and attention, once in torch and once in JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.nn import functional as F

TORCH_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}
FLAX_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
}


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, scale: float, cap: float | None = None
) -> jax.Array:
    """Queries, keys, values (N, T, H, h), mask (N or 1, 1, T, S), True counts -> (N, T, H, h)."""
    scores = jnp.einsum("nthd,nshd->nhts", q, k) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores, axis=-1), v)


def padding_mask(mask: jax.Array, polarity: str) -> jax.Array | None:
    """What Flax code makes of the tokenizer's mask (N, T), 1 for tokens: (N, 1, 1, T), True attends. `polarity` names
    what is made of it: right, inverted (as torch's key_padding_mask has it), ignored, queries (the other axis)."""
    if polarity == "ignored":
        return None
    made = mask == 0 if polarity == "inverted" else mask != 0
    return made[:, None, :, None] if polarity == "queries" else made[:, None, None, :]


Options = dict[str, Any]
