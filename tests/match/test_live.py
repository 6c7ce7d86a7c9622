"""Live modules: kinds settle what files leave open, and forbid what names suggest."""

from __future__ import annotations

from typing import Any

import pytest

from graftax.match import infer
from graftax.plans import Proposal

torch = pytest.importorskip("torch")


def _ends(module: Any, model: Any, *inputs: Any) -> tuple[Any, Any]:
    import graftax as gx
    from graftax.adapters import open_tree

    return open_tree(module), open_tree(gx.linen(model, *inputs))


def _ops(found: Proposal, target: str) -> list[str]:
    (entry,) = [entry for entry in found.entries if target in entry.targets]
    return [op.text for op in entry.ops]


@pytest.mark.parametrize("kernel", [False, True], ids=["default", "transpose_kernel"])
def test_a_square_transposed_convolution_is_settled_by_its_setting(kernel: bool) -> None:
    import flax.linen as nn
    import jax.numpy as jnp

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.ConvTranspose(4, (2, 2), transpose_kernel=kernel, name="up")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(4, 4, 2)

    found = infer(*_ends(Torch(), Up(), jnp.zeros((1, 4, 4, 4))), "torch", "flax", Proposal())
    assert not found.questions
    assert ("flip axes 0,1" in _ops(found, "params/up/kernel")) is not kernel


def test_recurrent_layers_and_attention_are_connected_whole() -> None:
    import flax.linen as nn
    import jax.numpy as jnp

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.MultiHeadDotProductAttention(2, name="mha")(x, x)
            return nn.RNN(nn.OptimizedLSTMCell(8), name="lstm")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = torch.nn.MultiheadAttention(8, 2)
            self.lstm = torch.nn.LSTM(8, 8)

    import graftax as gx

    plan = gx.plan(Torch(), gx.linen(Flax(), jnp.zeros((1, 3, 8))))
    assert plan.complete, str(plan)
    assert {name for entry in plan.entries for name in entry.sources} == set(plan.source.specs)


def test_kinds_that_cannot_be_one_are_never_paired() -> None:
    """An Embedding and a Dense of one name and one shape are two things."""
    import flax.linen as nn
    import jax.numpy as jnp

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(6, use_bias=False, name="table")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(6, 6)

    found = infer(*_ends(Torch(), Flax(), jnp.zeros((1, 6))), "torch", "flax", Proposal())
    assert not found.entries
    assert found.questions
