"""Attacks with live models: a torch module and a Linen module that compute the same, each written on its own. The true
map is proved by a forward pass when the attack is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as fn
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from torch import nn

from attacks.pairs import Array, Attack, Maker

Tensor = torch.Tensor
RTOL = 1e-4


@dataclass(slots=True)
class Live:
    """`attack`: the leaves of both models and their truth; `torch` and `flax`: the models, the latter with the inputs
    of its call; None if that end is given as names and shapes."""

    attack: Attack
    torch: nn.Module | None
    flax: tuple[fn.Module, tuple[Any, ...]] | None


class Net(nn.Module):
    """Parts by name, and what is done with them."""

    def __init__(self, use: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.use = use

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.use(self, *inputs)


class Tree(fn.Module):
    """A compact module that does what a function says."""

    use: Callable[..., Any]

    @fn.compact
    def __call__(self, *inputs: Any) -> Any:
        return self.use(self, *inputs)


def raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def live(
    m: Maker,
    kind: str,
    net: nn.Module,
    tree: fn.Module,
    *inputs: Array,
    channels: bool = True,
    shown: str = "",
    folded: bool = False,
) -> Live:
    """The attack: torch's module takes the maker's values, and both models agree on the inputs. `channels`: torch has
    channels first, in the inputs and in a map that comes out. `shown`: the side that must be live, as it alone
    shows the truth; `folded`: nothing goes back from Flax to torch."""
    state = {name: torch.from_numpy(array.copy()) for name, array in m.torch.items()}
    net.load_state_dict(state, strict=True)
    net.eval()
    there = tuple(jnp.asarray(x) for x in inputs)
    want = net(*(torch.from_numpy(_first(x) if channels else x) for x in inputs)).detach().numpy()
    want = np.moveaxis(want, 1, -1) if channels and want.ndim > 2 else want
    got = np.asarray(tree.apply(unflatten_dict(m.flax, sep="/"), *there))
    if got.shape != want.shape or float(np.abs(got - want).max()) > 1e-3 * float(np.abs(want).max() + 1e-6):
        raise ValueError(f"{kind}: the two models differ")
    modes = ("both", "both", "both", shown or "torch", shown or "flax")
    mode = m.pick(*modes, "back") if shown in ("", "torch") and not folded else m.pick(*modes)
    attack = m.attack(kind, back=mode == "back")
    attack.loose = True
    return Live(attack, net if mode != "flax" else None, (tree, there) if mode not in ("torch", "back") else None)


def _first(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim > 2 else x
