"""Small pairs of models whose widths are equal everywhere, so that shapes tell nothing; written twice, by hand.

Each pair is a torch module and an independent Flax model, with the right map from state_dict to leaves. The Flax
side takes faults: a setting that differs from torch's, or two layers of equal shape crossed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import linen as fn
from flax import nnx
from flax.traverse_util import unflatten_dict
from torch import nn

import graftax as gx

State = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair; the fields are named as those of a folder of pairs, which scripts/blank_names.py reads.

    flax_model  (**faults) -> (Linen module, example arguments), or an nnx.Module
    inputs      torch's arguments, in NumPy; fx: Flax's from them
    true_map    state_dict in NumPy -> {Flax path: array}
    faults      settings of flax_model that make it another model
    """

    name: str
    torch_model: Callable[[], nn.Module]
    flax_model: Callable[..., Any]
    inputs: Callable[[], tuple[np.ndarray, ...]]
    true_map: Callable[[State], dict[str, np.ndarray]]
    faults: tuple[dict[str, Any], ...] = ()
    fx: Callable[..., tuple[Any, ...]] = lambda *arrays: arrays

    def like(self, **faults: Any) -> Any:
        """The live Flax model, as gx.plan takes it."""
        made = self.flax_model(**faults)
        return gx.linen(made[0], *made[1]) if isinstance(made, tuple) else made

    def call(self, *arrays: np.ndarray) -> gx.Inputs:
        """Both calls with these arrays of torch, or with the pair's own."""
        given = arrays or self.inputs()
        return gx.Inputs(torch=tuple(map(torch.from_numpy, given)), flax=self.fx(*given))

    def state(self, module: nn.Module) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}

    def torch_out(self, module: nn.Module, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        with torch.no_grad():
            return module(*map(torch.from_numpy, arrays)).numpy()

    def flax_out(self, values: Mapping[str, np.ndarray], arrays: tuple[np.ndarray, ...], **faults: Any) -> np.ndarray:
        made = self.flax_model(**faults)
        given = [jnp.asarray(array) for array in self.fx(*arrays)]
        if isinstance(made, tuple):
            return np.asarray(made[0].apply(nested(values), *given))
        graph, state = nnx.split(made)
        leaves = [
            (path, v.replace(jnp.asarray(values["/".join(map(str, path))]))) for path, v in nnx.to_flat_state(state)
        ]
        model = nnx.merge(graph, nnx.from_flat_state(leaves))
        model.eval()
        return np.asarray(model(*given))

    def right(self, plan: gx.types.Plan, number: int = 7) -> bool:
        """Is the plan right on other weights and other inputs: by the true map, or else by the outputs?"""
        module = redrawn(self.torch_model(), number)
        state = self.state(module)
        got = flat(plan.run(module.state_dict(), sharding="host"))
        want = self.true_map(state)
        if all(path in got and same(got[path], value) for path, value in want.items()):
            return True
        arrays = other_inputs(self.inputs())
        return near(self.flax_out(got, arrays), self.torch_out(module, arrays))


# ---------------------------------------------------------------- values


def redrawn(module: nn.Module, number: int = 0) -> nn.Module:
    """The module in eval mode with random values everywhere, also in norms and statistics."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise + name.endswith("weight"))
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return module.eval()


def untrained(module: nn.Module) -> nn.Module:
    """The module as before training: biases zero, norms one, statistics 0 and 1."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.fill_(name.endswith(("weight", "running_var")))
    return module


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ids(high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape)


def other_inputs(arrays: tuple[np.ndarray, ...], seed: int = 5) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return tuple(
        random.standard_normal(a.shape).astype(a.dtype) if a.dtype.kind == "f" else random.permuted(a) for a in arrays
    )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, atol=1e-6, rtol=1e-5)


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 2e-4 * np.abs(b).max())


def flat(tree: Any, above: str = "") -> dict[str, np.ndarray]:
    """path -> array of nested dicts."""
    if hasattr(tree, "items"):
        return {path: leaf for name, sub in tree.items() for path, leaf in flat(sub, f"{above}{name}/").items()}
    return {above[:-1]: np.asarray(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """path -> array, as nested dicts of jax arrays."""
    return jax.tree.map(jnp.asarray, unflatten_dict(dict(leaves), sep="/"))


def linears(state: State, *names: tuple[str, str], root: str = "params/") -> dict[str, np.ndarray]:
    return {
        f"{root}{flax}/{leaf}": state[f"{name}.{key}"].T
        for name, flax in names
        for key, leaf in (("weight", "kernel"), ("bias", "bias"))
        if f"{name}.{key}" in state
    }


def norms(state: State, *names: tuple[str, str], root: str = "params/", stats: str = "batch_stats/") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, flax in names:
        out |= {f"{root}{flax}/scale": state[f"{name}.weight"], f"{root}{flax}/bias": state[f"{name}.bias"]}
        if f"{name}.running_mean" in state:
            out[f"{stats}{flax}/mean"] = state[f"{name}.running_mean"]
            out[f"{stats}{flax}/var"] = state[f"{name}.running_var"]
    return out


# ---------------------------------------------------------------- an MLP with batch norm


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.bn1, self.bn2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.fc1(x)))
        return self.fc3(x + torch.relu(self.bn2(self.fc2(x))))


class FlaxIdle(fn.Module):
    """A layer that no output needs, and one that makes the output."""

    @fn.compact
    def __call__(self, x: Any) -> Any:
        fn.Dense(4, name="idle")(x)
        return fn.Dense(4, name="busy")(x)


class FlaxMlp(fn.Module):
    eps: float = 1e-5
    act: Callable[..., Any] = fn.relu
    residual: bool = True
    crossed: bool = False

    @fn.compact
    def __call__(self, x: Any) -> Any:
        first, second = ("b", "a") if self.crossed else ("a", "b")
        norm = {"use_running_average": True, "epsilon": self.eps}
        x = self.act(fn.BatchNorm(**norm, name=f"norm_{first}")(fn.Dense(6, name=f"lin_{first}")(x)))
        y = self.act(fn.BatchNorm(**norm, name=f"norm_{second}")(fn.Dense(6, name=f"lin_{second}")(x)))
        return fn.Dense(6, name="lin_c")(x + y if self.residual else y)


def _mlp_map(state: State) -> dict[str, np.ndarray]:
    return linears(state, ("fc1", "lin_a"), ("fc2", "lin_b"), ("fc3", "lin_c")) | norms(
        state, ("bn1", "norm_a"), ("bn2", "norm_b")
    )


MLP = Pair(
    "mlp",
    lambda: redrawn(Mlp()),
    lambda **faults: (FlaxMlp(**faults), (jnp.zeros((1, 6)),)),
    lambda: (noise(3, 6),),
    _mlp_map,
    ({"eps": 1e-3}, {"act": fn.gelu}, {"act": fn.silu}, {"residual": False}),
)


# ---------------------------------------------------------------- a conv net with a flattened map


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.c1(x))), 2)
        return self.head(torch.relu(self.c2(x)).flatten(1))


class FlaxConv(fn.Module):
    eps: float = 1e-5
    act: Callable[..., Any] = fn.relu
    padding: Any = 1
    pool: Callable[..., Any] = fn.max_pool

    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.BatchNorm(use_running_average=True, epsilon=self.eps, name="b")(
            fn.Conv(4, (3, 3), padding=self.padding, name="k")(x)
        )
        x = self.pool(self.act(x), (2, 2), strides=(2, 2))
        x = self.act(fn.Conv(4, (3, 3), padding=1, name="m")(x))
        return fn.Dense(4, name="z")(x.reshape(x.shape[0], -1))


def _conv_map(state: State) -> dict[str, np.ndarray]:
    out = norms(state, ("norm", "b"))
    for name, flax in (("c1", "k"), ("c2", "m")):
        out[f"params/{flax}/kernel"] = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        out[f"params/{flax}/bias"] = state[f"{name}.bias"]
    head = state["head.weight"].reshape(4, 4, 4, 4).transpose(2, 3, 1, 0).reshape(64, 4)
    return out | {"params/z/kernel": head, "params/z/bias": state["head.bias"]}


CONV = Pair(
    "conv",
    lambda: redrawn(Conv()),
    lambda **faults: (FlaxConv(**faults), (jnp.zeros((1, 8, 8, 4)),)),
    lambda: (noise(2, 4, 8, 8),),
    _conv_map,
    ({"eps": 1e-3}, {"act": fn.gelu}, {"padding": ((2, 0), (2, 0))}, {"pool": fn.avg_pool}),
    fx=lambda x: (x.transpose(0, 2, 3, 1),),
)


# ---------------------------------------------------------------- a transformer block with fused q, k and v


def attend(q: Any, k: Any, v: Any, heads: int, softmax: Callable[..., Any], scale: float = 1.0) -> Any:
    """Attention over (batch, tokens, width) arrays of torch or jax."""
    b, t, d = q.shape
    q, k, v = (a.reshape(b, t, heads, d // heads).swapaxes(1, 2) for a in (q, k, v))
    weights = softmax(scale * (q @ k.swapaxes(-1, -2)) / (d // heads) ** 0.5, -1)
    return (weights @ v).swapaxes(1, 2).reshape(b, t, d)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
        x = x + self.proj(attend(q, k, v, 4, torch.softmax))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class FlaxBlock(fn.Module):
    eps: float = 1e-5
    heads: int = 4
    approximate: bool = False
    residual: bool = True
    scale: float = 1.0
    crossed: bool = False

    @fn.compact
    def __call__(self, x: Any) -> Any:
        y = fn.LayerNorm(epsilon=self.eps, name="pre")(x)
        q, k, v = (fn.Dense(16, name=name)(y) for name in ("s", "r", "t"))
        y = fn.Dense(16, name="o")(attend(q, k, v, self.heads, jax.nn.softmax, self.scale))
        x = x + y if self.residual else y
        first, second = ("down", "up") if self.crossed else ("up", "down")
        y = fn.Dense(16, name=first)(fn.LayerNorm(epsilon=self.eps, name="post")(x))
        return x + fn.Dense(16, name=second)(fn.gelu(y, approximate=self.approximate))


def _block_map(state: State) -> dict[str, np.ndarray]:
    out = norms(state, ("n1", "pre"), ("n2", "post"))
    out |= linears(state, ("proj", "o"), ("up", "up"), ("down", "down"))
    for name, kernel, bias in zip("srt", np.split(state["qkv.weight"], 3), np.split(state["qkv.bias"], 3), strict=True):
        out |= {f"params/{name}/kernel": kernel.T, f"params/{name}/bias": bias}
    return out


BLOCK = Pair(
    "block",
    lambda: redrawn(Block()),
    lambda **faults: (FlaxBlock(**faults), (jnp.zeros((1, 4, 16)),)),
    lambda: (noise(2, 5, 16),),
    _block_map,
    ({"eps": 1e-3}, {"heads": 2}, {"heads": 8}, {"approximate": True}, {"residual": False}, {"scale": 2.0}),
)


# ---------------------------------------------------------------- an LSTM tagger


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(self.table(x))[0])


class FlaxTagger(fn.Module):
    reverse: bool = False
    gate: Callable[..., Any] = fn.sigmoid

    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.Embed(8, 8, name="e")(x)
        cell = fn.OptimizedLSTMCell(8, gate_fn=self.gate, name="c")
        return fn.Dense(8, name="y")(fn.RNN(cell, reverse=self.reverse, keep_order=True, name="r")(x))


def _tagger_map(state: State) -> dict[str, np.ndarray]:
    out = linears(state, ("out", "y")) | {"params/e/embedding": state["table.weight"]}
    parts = [np.split(state[f"rnn.{n}_l0"], 4) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    for gate, of_input, of_state, one, two in zip("ifgo", *parts, strict=True):
        out[f"params/c/i{gate}/kernel"], out[f"params/c/h{gate}/kernel"] = of_input.T, of_state.T
        out[f"params/c/h{gate}/bias"] = one + two
    return out


TAGGER = Pair(
    "tagger",
    lambda: redrawn(Tagger()),
    lambda **faults: (FlaxTagger(**faults), (jnp.zeros((1, 4), int),)),
    lambda: (ids(8, 2, 5),),
    _tagger_map,
    ({"reverse": True}, {"gate": fn.hard_sigmoid}),
)


# ---------------------------------------------------------------- scanned layers


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.ends = nn.ModuleDict({"norm": nn.LayerNorm(8), "head": nn.Linear(8, 8, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n in range(len(self.layers)):
            x = self.layers[n](x)
        return self.ends["head"](self.ends["norm"](x))


class FlaxLayer(fn.Module):
    eps: float
    act: Callable[..., Any]
    crossed: bool

    @fn.compact
    def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
        y = fn.LayerNorm(epsilon=self.eps, name="n")(x)
        gate, up = ("u", "g") if self.crossed else ("g", "u")
        return x + fn.Dense(8, name="d")(self.act(fn.Dense(8, name=gate)(y)) * fn.Dense(8, name=up)(y)), None


class FlaxStack(fn.Module):
    eps: float = 1e-5
    act: Callable[..., Any] = fn.silu
    crossed: bool = False
    reverse: bool = False

    @fn.compact
    def __call__(self, x: Any) -> Any:
        scanned = fn.scan(
            FlaxLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, reverse=self.reverse
        )
        x, _ = scanned(self.eps, self.act, self.crossed, name="l")(x, None)
        return fn.Dense(8, use_bias=False, name="h")(fn.LayerNorm(epsilon=self.eps, name="n")(x))


def _stack_map(state: State) -> dict[str, np.ndarray]:
    out = linears(state, ("ends.head", "h")) | norms(state, ("ends.norm", "n"))
    each = [
        linears(state, *((f"layers.{i}.{n}", n[0]) for n in ("gate", "up", "down")), root="params/l/")
        | norms(state, (f"layers.{i}.norm", "n"), root="params/l/")
        for i in range(3)
    ]
    return out | {path: np.stack([layer[path] for layer in each]) for path in each[0]}


STACK = Pair(
    "stack",
    lambda: redrawn(Stack()),
    lambda **faults: (FlaxStack(**faults), (jnp.zeros((1, 4, 8)),)),
    lambda: (noise(2, 3, 8),),
    _stack_map,
    ({"eps": 1e-3}, {"act": fn.gelu}, {"act": fn.sigmoid}),
)


# ---------------------------------------------------------------- stacked experts, in NNX


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.router = nn.Linear(4, count, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        weights = self.router(y).softmax(-1)
        return x + sum(weights[:, n : n + 1] * expert(y) for n, expert in enumerate(self.experts))


class NnxExperts(nnx.Module):
    def __init__(
        self,
        count: int,
        at_once: bool = False,
        eps: float = 1e-5,
        act: Callable[..., Any] = jax.nn.silu,
        residual: bool = True,
    ) -> None:
        rngs = nnx.Rngs(0)
        self.pre = nnx.LayerNorm(4, epsilon=eps, rngs=rngs)
        self.gate = nnx.Linear(4, count, use_bias=False, rngs=rngs)
        self.wa, self.wb, self.wc = (nnx.Param(jnp.asarray(noise(count, 4, 4, seed=n))) for n in range(3))
        self.act, self.residual, self.at_once = act, residual, at_once

    def __call__(self, x: Any) -> Any:
        y = self.pre(x)
        hidden = self.act(jnp.einsum("bd,edf->ebf", y, self.wa[...])) * jnp.einsum("bd,edf->ebf", y, self.wb[...])
        weights = jax.nn.softmax(self.gate(y))
        if self.at_once:
            y = jnp.einsum("ebf,efd,be->bd", hidden, self.wc[...], weights)
        else:
            y = jnp.einsum("ebd,be->bd", jnp.einsum("ebf,efd->ebd", hidden, self.wc[...]), weights)
        return x + y if self.residual else y


def _experts_map(state: State) -> dict[str, np.ndarray]:
    out = linears(state, ("router", "gate"), root="") | norms(state, ("norm", "pre"), root="")
    for name, flax in (("w1", "wa"), ("w3", "wb"), ("w2", "wc")):
        out[flax] = np.stack([state[f"experts.{n}.{name}.weight"].T for n in range(len(state["router.weight"]))])
    return out


def _experts(name: str, count: int, at_once: bool) -> Pair:
    return Pair(
        name,
        lambda: redrawn(Experts(count)),
        lambda **faults: NnxExperts(count, at_once, **faults),
        lambda: (noise(5, 4),),
        _experts_map,
        ({"eps": 1e-3}, {"act": jax.nn.gelu}, {"residual": False}),
    )


EXPERTS, CUBE = _experts("experts", 3, False), _experts("cube", 4, True)
"""Three experts of width 4; and four, so that every axis is 4, joined with their weights in one einsum."""

PAIRS = (MLP, CONV, BLOCK, TAGGER, STACK, EXPERTS)
BY_NAME = {pair.name: pair for pair in PAIRS}
