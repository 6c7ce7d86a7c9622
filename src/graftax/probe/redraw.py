"""Probe weights and inputs: generic values in place of the user's. Zero biases, unit norms, tiny scales, equal rows and
constant inputs cannot tell two tensors apart; redrawn ones can."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from graftax.errors import ModelError, escape


def probe_copy(module: nn.Module, seed: int) -> nn.Module:
    """A float64 copy in eval mode, on the CPU, with redrawn floating parameters and statistics; ties stay ties, computed
    buffers and integers stay as they are. ModelError if it cannot be copied, or if a buffer has no values."""
    module = getattr(module, "_orig_mod", module)
    try:
        made = copy.deepcopy(module)
    except Exception as error:
        raise ModelError(f"the torch model cannot be copied: {escape(error, 300)}") from error
    hollow = [name for name, tensor in made.named_buffers() if tensor.is_meta and tensor.is_floating_point()]
    statistics = {
        id(b) for m in made.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for b in m.buffers(False)
    }
    lacking = [name for name in hollow if id(made.get_buffer(name)) not in statistics]
    if lacking:
        raise ModelError(
            f"torch: the buffer {escape(lacking[0])} has no values (device meta)",
            next="Make buffers that the model computes outside torch.device('meta').",
        )
    if any(t.is_meta for t in [*made.parameters(), *made.buffers()]):
        made = _real(made)
    made = made.cpu().double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for owner in made.modules():
            normed = isinstance(owner, nn.modules.batchnorm._NormBase)
            for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                if not tensor.is_floating_point() or tensor.data_ptr() in seen:
                    continue
                seen.add(tensor.data_ptr())
                buffer = name in owner._buffers
                if buffer and not (
                    normed or (tensor.ndim == 1 and tensor.numel() > 1 and bool((tensor == tensor[0]).all()))
                ):
                    continue
                _redraw(tensor, generator, positive=(buffer and name.endswith("var")) or (buffer and not normed))
    return made


def _real(module: nn.Module) -> nn.Module:
    """Meta tensors as empty ones; buffers with values keep them."""
    kept = {name: b.clone() for name, b in module.named_buffers() if not b.is_meta}
    made = module.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in kept.items():
            made.get_buffer(name).copy_(value)
        for p in made.parameters():
            if not p.is_floating_point():
                p.zero_()
    return made


def _redraw(tensor: torch.Tensor, generator: torch.Generator, positive: bool) -> None:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if positive:
        made = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    elif tensor.ndim < 2 or max(tensor.shape) == tensor.numel():
        made = (1 + 0.3 * noise) * torch.sign(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.15)
    else:
        made = noise / math.sqrt(max(math.prod(tensor.shape[1:]), 1))
    tensor.copy_(made)


def drawn_like(array: Any, seed: int, ids: int | None = None) -> Any:
    """Another input of the same shape, dtype and range. Flags, and integers with two values at most (masks), stay as they
    are, unless they are all zero and `ids` says how many ids there are."""
    plain = np.asarray(array)
    random = np.random.default_rng(seed)
    if plain.dtype.kind == "f" or "float" in plain.dtype.name:
        wide = plain.astype(np.float64)
        low, high = (float(wide.min()), float(wide.max())) if wide.size else (0.0, 0.0)
        made = random.standard_normal(plain.shape)
        if high > low:
            made = random.uniform(low, high, plain.shape) if low >= 0 else wide.mean() + wide.std() * made
        return made.astype(plain.dtype)
    if plain.dtype.kind in "iu" and plain.size:
        if len(np.unique(plain)) > 2:
            return random.integers(plain.min(), plain.max() + 1, plain.shape).astype(plain.dtype)
        if ids is not None and not plain.any():
            return random.integers(0, ids, plain.shape).astype(plain.dtype)
    return plain


def ids_of(module: nn.Module) -> int | None:
    """How many ids every table of the model has at least."""
    rows = [m.num_embeddings for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return min(rows) if rows else None


def axes_between(one: Any, other: Any) -> tuple[int, ...] | None:
    """The permutation of axes that makes `other` of `one`; None if there is none."""
    import itertools

    a, b = np.asarray(one), np.asarray(other)
    if a.ndim != b.ndim or sorted(a.shape) != sorted(b.shape):
        return None
    for axes in itertools.permutations(range(a.ndim)):
        turned = a.transpose(axes)
        if turned.shape == b.shape and np.array_equal(turned, b):
            return axes
    return None


def all_arrays(nest: Any) -> Sequence[Any]:
    """The arrays in nested arguments, depth first."""
    if isinstance(nest, dict):
        return [a for item in nest.values() for a in all_arrays(item)]
    if isinstance(nest, (list, tuple)):
        return [a for item in nest for a in all_arrays(item)]
    return [nest] if hasattr(nest, "shape") and hasattr(nest, "dtype") else []
