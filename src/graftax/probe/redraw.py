"""Probe weights and inputs: generic values in place of the user's. Zero biases, unit norms, tiny scales, equal rows and
constant inputs cannot tell two tensors apart; redrawn ones can."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from graftax.errors import ModelError, escape


def probe_copy(module: nn.Module, seed: int) -> nn.Module:
    """A float64 copy in eval mode, on the CPU, with redrawn floating parameters and statistics; ties stay ties,
    computed buffers and integers stay as they are. ModelError if it cannot be copied, or if a buffer has no values."""
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
                _redraw(tensor, generator, positive=buffer and (not normed or tensor is owner.running_var))
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


def ids_of(module: nn.Module) -> int | None:
    """How many ids every table of the model has at least."""
    rows = [m.num_embeddings for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return min(rows) if rows else None
