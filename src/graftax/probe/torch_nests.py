"""Nests of torch tensors, and tensors as NumPy arrays and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from graftax.adapters import torch_arrays


def tensors(nest: Any) -> Iterator[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from tensors(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from tensors(item)


def array_of(tensor: torch.Tensor, copy: bool = False) -> Any:
    """A tensor as float64 NumPy. What is kept must be a copy: ops may change it in place later."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.to(torch.float64, copy=copy).contiguous().numpy()


def plain_array(tensor: torch.Tensor) -> Any:
    """A tensor as NumPy: floating dtypes as float64, others as they are."""
    if tensor.is_floating_point():
        return array_of(tensor)
    return tensor.detach().contiguous().numpy()


def to_torch(array: Any) -> Any:
    made = torch_arrays.to_torch(np.asarray(array, order="C"))
    return made.long() if made.dtype in (torch.int32, torch.int16) else made
