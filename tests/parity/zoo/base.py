"""What the models share: settings with per-block exceptions, random weights, and a port made by gx.plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import graftax as gx
from graftax.execute.opening import open_tree

APIS = ("linen", "nnx")
Arrays = dict[str, np.ndarray[Any, Any]]
Edit = Callable[[Arrays, Arrays], Arrays]
"""(Flat Flax weights, the torch state_dict) -> other Flax weights."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a model is built with. `odd` holds exceptions: (block, setting, value), as where one layer of a port was
    written differently from its siblings. Values are hashable, so that whole models can be cached by their settings."""

    odd: tuple[tuple[int, str, Any], ...] = ()

    def block(self, index: int) -> Self:
        """The settings of one block."""
        return replace(self, odd=(), **{name: value for at, name, value in self.odd if at == index})

    def but(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def but_block(self, index: int, **changes: Any) -> Self:
        return replace(self, odd=(*self.odd, *((index, name, value) for name, value in changes.items())))


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch for both sides: positional arguments in each side's own layout."""

    torch: tuple[Any, ...]
    flax: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One model in three frameworks.

    settings  the defaults
    torch, linen, nnx   make the model; NNX's also takes rngs
    inputs    (settings, generator) -> Batch
    rules     (settings, api) -> the rule lines without which the plan asks
    variants  the settings of the correct ports, the default first
    loud      changes the torch weights so that norms see a mean far from zero: where fast variance shows
    """

    name: str
    settings: Any
    torch: Callable[[Any], torch.nn.Module]
    linen: Callable[[Any], Any]
    nnx: Callable[[Any, nnx.Rngs], Any]
    inputs: Callable[[Any, np.random.Generator], Batch]
    rules: Callable[[Any, str], str] = lambda settings, api: ""
    variants: Callable[[], tuple[Any, ...]] = tuple
    loud: Callable[[Any], None] | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """A torch model, a Flax model, and the Flax weights: all that gx.check_parity is given.

    flax     the Linen module, or the NNX module with `weights` in it
    like     gx.linen(...) for Linen, the NNX module itself
    weights  Linen variables; None for NNX, whose module holds them
    rules    the rule lines for the plan, None for none
    """

    api: str
    torch: torch.nn.Module
    flax: Any
    like: Any
    weights: Any
    batch: Batch
    rules: str | None

    def run_torch(self, dtype: torch.dtype = torch.float32) -> Any:
        """The torch output, computed in this dtype, on the very inputs that check_parity is given."""
        old = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            module = self.torch.to(dtype)
            with torch.no_grad():
                return host(module(*(x.to(dtype) if x.is_floating_point() else x for x in self.batch.torch)))
        finally:
            torch.set_default_dtype(old)
            self.torch.to(torch.float32)

    def run_flax(self) -> Any:
        """The Flax output as NumPy arrays, compiled: one compilation is cheaper than a hundred single operations."""
        with jax.default_matmul_precision("highest"):
            if self.api == "linen":
                return host(jax.jit(self.flax.apply)(self.weights, *self.batch.flax))
            graph, state = nnx.split(self.flax)
            return host(jax.jit(lambda state, *x: nnx.merge(graph, state)(*x))(state, *self.batch.flax))


def host(value: Any) -> Any:
    """Nested outputs with float64 NumPy leaves."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().numpy()
    if isinstance(value, Mapping):
        return {key: host(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(host(item) for item in value)
    return np.asarray(value, np.float64)


def torch_module(kind: Kind, settings: Any, seed: int) -> torch.nn.Module:
    """The torch model in evaluation mode; every parameter and running statistic is random: no leaf is as it began."""
    torch.manual_seed(seed)
    module = kind.torch(settings).eval()
    rng = np.random.default_rng([seed, 7])
    drawn: set[int] = set()
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and id(value) not in drawn:
                drawn.add(id(value))
                value.copy_(torch.from_numpy(random_leaf(name, tuple(value.shape), rng)))
    return module


def random_leaf(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Values of the size that a trained model has: matrices keep the scale of what they are given."""
    last = name.rpartition(".")[2]
    if last == "running_var":
        out = rng.uniform(0.5, 1.5, shape)
    elif last == "running_mean" or len(shape) < 2:
        out = rng.normal(0.0, 0.2, shape) + (last == "weight")
    elif "embed" in name or "pos" in last or "cls" in last:
        out = rng.normal(0.0, 0.7, shape)
    else:
        out = rng.normal(0.0, float(np.prod(shape[1:])) ** -0.5, shape)
    return out.astype(np.float32)


@lru_cache(maxsize=64)
def ported(kind: str, settings: Any, api: str, seed: int, loud: bool = False) -> tuple[Any, Arrays, str | None]:
    """(torch module, Flax weights by path, rules) of the correct port. Shared: the module must not be changed."""
    from . import KINDS

    it = KINDS[kind]
    module = torch_module(it, settings, seed)
    if loud and it.loud is not None:
        with torch.no_grad():
            it.loud(module)
    lines = it.rules(settings, api)
    rules = f"rules = [\n{lines}\n]" if lines else None
    plan = gx.plan(module, skeleton(kind, settings, api)[1], rules=rules, inputs=False)  # parity is what is tested
    assert plan.complete, f"{kind} {api}:\n{plan}"
    checkpoint = open_tree(plan.run(module))
    return module, {path: np.asarray(checkpoint.read(path)) for path in checkpoint}, rules


@lru_cache(maxsize=256)
def skeleton(name: str, settings: Any, api: str) -> tuple[Any, Any, Any]:
    """(the Flax model, what gx.plan takes as like, its tree): without values."""
    from . import KINDS

    kind = KINDS[name]
    if api == "linen":
        module = kind.linen(settings)
        like = gx.linen(module, *kind.inputs(settings, np.random.default_rng(0)).flax)
        return module, like, open_tree(like)
    module = nnx.eval_shape(lambda: kind.nnx(settings, nnx.Rngs(0)))
    return module, module, open_tree(module)


def initial(path: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """What Flax's layers initialise a leaf of this name with."""
    name, key = path.rpartition("/")[2], jax.random.key(1)
    if name == "kernel":
        flat = shape if len(shape) != 3 else (shape[0], shape[1] * shape[2])
        return np.asarray(jax.nn.initializers.lecun_normal()(key, flat)).reshape(shape)
    if name == "embedding":
        return np.asarray(jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)(key, shape))
    return np.full(shape, 1.0 if name in ("scale", "var") else 0.0, np.float32)


def port(
    kind: Kind, settings: Any, api: str, seed: int, wrong: Any = None, edit: Edit | None = None, loud: bool = False
) -> Port:
    """The port of a model with random weights. `wrong`: the Flax model's settings, where they differ from torch's;
    `edit`: what happens to the Flax weights; `loud`: see Kind."""
    module, arrays, rules = ported(kind.name, settings, api, seed, loud)
    batch = kind.inputs(settings, np.random.default_rng(seed))
    flax, like, checkpoint = skeleton(kind.name, settings if wrong is None else wrong, api)
    arrays = {path: array.copy() for path, array in arrays.items()}
    if edit is not None:
        arrays = edit(arrays, {key: tensor.numpy() for key, tensor in module.state_dict().items()})
    random = {"rngs": 0} if api == "nnx" else {}
    weights = checkpoint.live.rebuild({path: jnp.asarray(arrays[path]) for path in checkpoint}, **random)
    if api == "linen":
        return Port(api, module, flax, like, weights, batch, rules)
    return Port(api, module, weights, weights, None, batch, rules)


def int_ids(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return rng.integers(1, size, shape).astype(np.int32)


def both(*arrays: np.ndarray[Any, Any]) -> Batch:
    """A batch whose arrays are the same on both sides; integers are int64 in torch, as its users have them."""
    wide = [a.astype(np.int64) if a.dtype == np.int32 else a for a in arrays]
    return Batch(tuple(torch.from_numpy(a.copy()) for a in wide), tuple(jnp.asarray(a) for a in arrays))
