"""Small models and exercises that the documentation, the quickstart and the tests share.

Importing this package imports no framework; each function imports what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftax.examples.founding import kernel_replace

if TYPE_CHECKING:
    from flax import nnx

    from graftax.examples import linen_model, nnx_model, torch_model

__all__ = ["digits_linen", "digits_nnx", "digits_torch", "kernel_replace"]


def digits_torch() -> torch_model.Digits:
    """The digits network as a torch Module, newly initialised. Images are (N, 1, 8, 8)."""
    from graftax.examples import torch_model

    return torch_model.Digits()


def digits_linen() -> linen_model.Digits:
    """The digits network as a Flax Linen module. Images are (N, 8, 8, 1)."""
    from graftax.examples import linen_model

    return linen_model.Digits()


def digits_nnx(rngs: nnx.Rngs | None = None) -> nnx_model.Digits:
    """The digits network as a Flax NNX module, newly initialised. Images are (N, 8, 8, 1).

    `rngs` defaults to seed 0. BatchNorm is in training mode until `.eval()` is called on the module.
    """
    from flax import nnx

    from graftax.examples import nnx_model

    return nnx_model.Digits(nnx.Rngs(0) if rngs is None else rngs)
