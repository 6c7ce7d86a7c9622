"""Attacks with live models on layers: classes of the user's own, raw matrices, the order of calls and of parts."""

from __future__ import annotations

from typing import Any

import flax.linen as fn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attacks.live import Live, Net, Tensor, Tree, live, raw
from attacks.pairs import Array, Maker, conv, linear


class InOut(nn.Module):
    """A layer of the user's own that keeps (in, out)."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = raw(into, out), raw(out)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class OutIn(nn.Module):
    """A layer of the user's own that keeps (out, in) as nn.Linear does."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = raw(out, into), raw(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Turned(nn.Linear):
    """A Linear that uses its weight the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Plain(nn.Linear):
    """A Linear that overrides nothing."""


def own_class(m: Maker) -> Live:
    """Layers of the user's own on torch's side, square: (in, out) or (out, in), or a Linear that is used otherwise."""
    d, made = m.width, m.pick(InOut, InOut, OutIn, Turned, Plain)
    names = m.pick(("gc1", "gc2"), ("first", "second"), ("layer_a", "layer_b"))
    for name in names:
        m.put(f"{name}.weight", f"{name}/kernel", d, d, form=linear if made in (OutIn, Plain) else lambda w: w)
        m.put(f"{name}.bias", f"{name}/bias", d)
    m.dense("head", "head", 5, d)

    def use(net: Any, x: Tensor) -> Tensor:
        return net.head(getattr(net, names[1])(torch.relu(getattr(net, names[0])(x))))

    def tree(self: Any, x: Any) -> Any:
        return fn.Dense(5, name="head")(fn.Dense(d, name=names[1])(fn.relu(fn.Dense(d, name=names[0])(x))))

    return live(
        m,
        "own-class",
        Net(use, **{n: made(d, d) for n in names}, head=nn.Linear(d, 5)),
        Tree(tree),
        m.draw(3, d),
        shown="torch",
    )


class OutInDense(fn.Module):
    """A dense layer of the user's own whose kernel is (out, in)."""

    features: int
    leaf: str = "kernel"

    @fn.compact
    def __call__(self, x: Any) -> Any:
        kernel = self.param(self.leaf, fn.initializers.normal(), (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", fn.initializers.zeros, (self.features,))


def own_class_of_flax(m: Maker) -> Live:
    """A dense layer of the user's own on the Flax side: (out, in)."""
    d, leaf = m.width, m.pick("kernel", "kernel", "w", "weight")
    for name in ("a", "b"):
        m.put(f"{name}.weight", f"{name}/{leaf}", d, d)
        m.put(f"{name}.bias", f"{name}/bias", d)

    def use(net: Any, x: Tensor) -> Tensor:
        return net.b(torch.relu(net.a(x)))

    def tree(self: Any, x: Any) -> Any:
        return OutInDense(d, leaf, name="b")(fn.relu(OutInDense(d, leaf, name="a")(x)))

    return live(
        m, "own-class-of-flax", Net(use, a=nn.Linear(d, d), b=nn.Linear(d, d)), Tree(tree), m.draw(3, d), shown="flax"
    )


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


class Scaled(nn.Linear):
    """An equalised learning rate: the weight is scaled when it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


def overridden_forward(m: Maker) -> Live:
    """A subclass whose forward does more than its base's: the values as they are make another model."""
    d, kind = m.width, m.pick("conv", "dense")
    m.excused = "forward|Standardised|Scaled"
    if kind == "conv":
        m.put("conv.weight", "conv/kernel", d, d, 3, 3, form=lambda w: conv(_standardised(w)))
        m.put("conv.bias", "conv/bias", d)
        m.convolution("tail", "tail", 3, d, 3, 3)
        net: nn.Module = Net(
            lambda s, x: s.tail(s.conv(x)), conv=Standardised(d, d, 3, padding=1), tail=nn.Conv2d(d, 3, 3, padding=1)
        )
        tree = Tree(
            lambda self, x: fn.Conv(3, (3, 3), padding=1, name="tail")(fn.Conv(d, (3, 3), padding=1, name="conv")(x))
        )
        return live(m, "overridden-forward", net, tree, m.draw(1, 4, 4, d), shown="torch", folded=True)
    m.put("fc.weight", "fc/kernel", d, d, form=lambda w: w.T * np.float32(d**-0.5))
    m.put("fc.bias", "fc/bias", d)
    m.dense("out", "out", 3, d)
    net = Net(lambda s, x: s.out(s.fc(x)), fc=Scaled(d, d), out=nn.Linear(d, 3))
    tree = Tree(lambda self, x: fn.Dense(3, name="out")(fn.Dense(d, name="fc")(x)))
    return live(m, "overridden-forward", net, tree, m.draw(2, d), shown="torch", folded=True)


def _standardised(w: Array) -> Array:
    return (w - w.mean((1, 2, 3), keepdims=True)) / (w.std((1, 2, 3), ddof=1, keepdims=True) + 1e-5)


class BilinearMap(fn.Module):
    """A bilinear map of the user's own."""

    features: int

    @fn.compact
    def __call__(self, x: Any, y: Any) -> Any:
        kernel = self.param("kernel", fn.initializers.normal(), (x.shape[-1], y.shape[-1], self.features))
        return jnp.einsum("bi,bj,ijo->bo", x, y, kernel) + self.param("bias", fn.initializers.zeros, (self.features,))


def bilinear(m: Maker) -> Live:
    d, o, name = m.width, m.other(), m.pick("bi", "score", "mix", "bilinear")
    m.dense("a", "a", d, 5)
    m.put(f"{name}.weight", f"{name}/kernel", o, d, d, form=lambda w: w.transpose(1, 2, 0))
    m.put(f"{name}.bias", f"{name}/bias", o)

    def use(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return getattr(net, name)(y, y.flip(-1))

    def tree(self: Any, x: Any) -> Any:
        y = fn.Dense(d, name="a")(x)
        return BilinearMap(o, name=name)(y, y[..., ::-1])

    return live(
        m,
        "bilinear",
        Net(use, **{"a": nn.Linear(5, d), name: nn.Bilinear(d, d, o)}),
        Tree(tree),
        m.draw(2, 5),
        shown="torch",
    )


def call_order(m: Maker) -> Live:
    """torch calls its layers in another order than it names them; the Flax names count calls."""
    n, d = m.pick(3, 4), m.width
    order = m.rng.sample(range(n), n) if m.coin(0.7) else list(range(n))
    name = m.pick("up{}", "layer{}", "fc{}", "net_{}")
    kind, word = m.pick(("linear", "Dense"), ("conv", "Conv"), ("norm", "LayerNorm"))
    for j, i in enumerate(order):
        torch_, flax = name.format(i), f"{word}_{j}"
        if kind == "norm":
            m.norm(torch_, flax, d, True)
        elif kind == "linear":
            m.dense(torch_, flax, d, d)
        else:
            m.convolution(torch_, flax, d, d, 3, 3)
    made = {
        "linear": lambda: nn.Linear(d, d),
        "conv": lambda: nn.Conv2d(d, d, 3, padding=1),
        "norm": lambda: nn.LayerNorm(d),
    }[kind]

    def use(net: Any, x: Tensor) -> Tensor:
        for i in order:
            x = torch.tanh(getattr(net, name.format(i))(x))
        return x

    def tree(self: Any, x: Any) -> Any:
        for _ in range(n):
            if kind == "norm":
                x = jnp.tanh(fn.LayerNorm(epsilon=1e-5)(x))
            else:
                x = jnp.tanh(fn.Dense(d)(x) if kind == "linear" else fn.Conv(d, (3, 3), padding=1)(x))
        return x

    m.excused = "call order"
    x = m.draw(2, 4, 4, d) if kind == "conv" else m.draw(2, d)
    return live(m, "call-order", Net(use, **{name.format(i): made() for i in range(n)}), Tree(tree), x)


def fused_order(m: Maker) -> Live:
    """One projection of three parts on both sides; the models take the parts in other orders, or head by head."""
    d, h = 8, 2
    alike, woven = m.coin(0.3), m.coin()
    words = "qkv" if alike else m.pick("kqv", "vkq", "qkv")
    parts = {word: m.draw(d, d) for word in "qkv"}
    name = m.pick("qkv", "in_proj", "proj_in", "c_attn")
    m.give(f"attn.{name}.weight", np.concatenate([parts[w] for w in "qkv"]))
    there = [parts[w] for w in words]
    if woven and not alike:
        fused = np.stack([p.reshape(h, d // h, d) for p in there], 1).reshape(3 * d, d)
    else:
        woven, fused = False, np.concatenate(there)
    m.take(f"attn/{name}/kernel", fused.T)
    m.dense("attn.out", "attn/out", d, d)

    def use(net: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, h, d // h) for y in getattr(net, name)(x).chunk(3, -1))
        a = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return net.out(torch.einsum("bhts,bshd->bthd", a, v).reshape(b, t, d))

    class Attention(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            b, t, _ = x.shape
            y = fn.Dense(3 * d, use_bias=False, name=name)(x)
            y = (
                y.reshape(b, t, h, 3, d // h).transpose(3, 0, 1, 2, 4)
                if woven
                else y.reshape(b, t, 3, h, d // h).transpose(2, 0, 1, 3, 4)
            )
            got = dict(zip(words, y, strict=True))
            a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", got["q"], got["k"]), -1)
            return fn.Dense(d, name="out")(jnp.einsum("bhts,bshd->bthd", a, got["v"]).reshape(b, t, d))

    class Attn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Linear(d, 3 * d, bias=False))
            self.out = nn.Linear(d, d)

        def forward(self, x: Tensor) -> Tensor:
            return use(self, x)

    m.excused = "fused|parts|order"
    net = Net(lambda s, x: s.attn(x), attn=Attn())
    return live(m, "fused-order", net, Tree(lambda self, x: Attention(name="attn")(x)), m.draw(2, 3, d), channels=False)


def normed_layer(m: Maker) -> Live:
    """A weight-normed or spectral-normed layer beside another one, into a plain layer."""
    d, o, old = m.width, m.other(), m.coin()
    kind = m.pick("weight", "weight", "spectral")
    layer: Any = nn.Conv1d(d, o, 3, padding=1) if kind == "weight" else nn.Conv2d(d, o, 3, padding=1)
    if kind == "weight":
        v, g = m.draw(o, d, 3), np.abs(m.draw(o, 1, 1)) + np.float32(0.5)
        weight = g * v / np.sqrt((v**2).sum((1, 2), keepdims=True))
        layer = (nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm)(layer)
        names = (
            ("weight_g", "weight_v")
            if old
            else ("parametrizations.weight.original0", "parametrizations.weight.original1")
        )
        m.give(f"conv.{names[0]}", g)
        m.give(f"conv.{names[1]}", v)
    else:
        w = m.draw(o, d, 3, 3)
        a, s, b = np.linalg.svd(w.reshape(o, -1).astype("f8"), full_matrices=False)
        weight = (w / s[0]).astype("f4")
        layer = (nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm)(layer)
        names = (
            ("weight_orig", "weight_u", "weight_v")
            if old
            else tuple(f"parametrizations.weight.{n}" for n in ("original", "0._u", "0._v"))
        )
        for name, array in zip(names, (w, a[:, 0].astype("f4"), b[0].astype("f4")), strict=True):
            m.give(f"conv.{name}", array)
    m.take("conv/kernel", conv(weight.astype("f4")))
    m.put("conv.bias", "conv/bias", o)
    m.dense("head", "head", 5, o)
    axes = (2,) if kind == "weight" else (2, 3)
    window = (3,) if kind == "weight" else (3, 3)

    def tree(self: Any, x: Any) -> Any:
        y = fn.Conv(o, window, padding=1, name="conv")(x)
        return fn.Dense(5, name="head")(y.mean(tuple(range(1, y.ndim - 1))))

    m.options = {} if m.coin() else {"unused": "drop"}
    net = Net(lambda s, x: s.head(s.conv(x).mean(axes)), conv=layer, head=nn.Linear(o, 5))
    return live(m, "normed-layer", net, Tree(tree), m.draw(2, *(5 for _ in window), d), folded=True)


def raw_uses(m: Maker) -> Live:
    """Raw square matrices that the two models use the other way round, or alike."""
    d, alike = m.width, m.coin(0.4)
    names = m.pick(("w1", "w2"), ("a", "b"), ("mix", "gate"))
    for name in names:
        m.put(name, name, d, d, form=(lambda w: w) if alike else linear)

    def use(net: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ getattr(net, names[0])) @ getattr(net, names[1])

    def tree(self: Any, x: Any) -> Any:
        one, two = (self.param(name, fn.initializers.normal(), (d, d)) for name in names)
        return jnp.tanh(x @ one) @ two if alike else jnp.tanh(x @ one.T) @ two.T

    return live(m, "raw-uses", Net(use, **{name: raw(d, d) for name in names}), Tree(tree), m.draw(3, d), shown="both")


class _Layer(fn.Module):
    width: int
    bias: bool

    @fn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return x + jnp.tanh(fn.Dense(self.width, use_bias=self.bias, name="fc")(x)), None


def scanned(m: Maker) -> Live:
    """As many layers as each is wide, stacked by nn.scan on any axis."""
    d, axis, bias = m.pick(3, 4), m.pick(0, 1, -1), m.coin()
    kernels, biases = [m.draw(d, d) for _ in range(d)], [m.draw(d) for _ in range(d)]
    for i in range(d):
        m.give(f"layers.{i}.fc.weight", kernels[i])
        if bias:
            m.give(f"layers.{i}.fc.bias", biases[i])
    m.take("layers/fc/kernel", np.stack([w.T for w in kernels], axis))
    if bias:
        m.take("layers/fc/bias", np.stack(biases, min(axis, 1)))

    def use(net: Any, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = x + torch.tanh(layer.fc(x))
        return x

    def tree(self: Any, x: Any) -> Any:
        scan = fn.scan(_Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=d)
        return scan(d, bias, name="layers")(x, None)[0]

    layers = nn.ModuleList(Net(lambda s, x: s.fc(x), fc=nn.Linear(d, d, bias=bias)) for _ in range(d))
    return live(m, "scanned", Net(use, layers=layers), Tree(tree), m.draw(2, d))


def swapped_twins(m: Maker) -> Live:
    """Two branches of one shape whose names run against each other: the words say one pairing, the calls and the use
    another; or names that say nothing."""
    d = m.width
    torch_, flax = m.pick(
        (("left", "right"), ("one", "two")),
        (("alpha", "beta"), ("foo", "bar")),
        (("q", "k"), ("q", "k")),
        (("mu", "sigma"), ("mean", "scale")),
    )
    crossed = torch_[0] not in ("q", "mu") and m.coin()
    names = dict(zip(torch_, flax[::-1] if crossed else flax, strict=True))
    for one, other in names.items():
        m.dense(one, other, d, d)

    def use(net: Any, x: Tensor) -> Tensor:
        return torch.tanh(getattr(net, torch_[0])(x)) - 2 * torch.relu(getattr(net, torch_[1])(x))

    def tree(self: Any, x: Any) -> Any:
        b = fn.relu(fn.Dense(d, name=names[torch_[1]])(x))
        return jnp.tanh(fn.Dense(d, name=names[torch_[0]])(x)) - 2 * b

    return live(m, "swapped-twins", Net(use, **{n: nn.Linear(d, d) for n in torch_}), Tree(tree), m.draw(3, d))


KINDS = (
    *(own_class, own_class_of_flax, overridden_forward, bilinear, call_order, fused_order, normed_layer, raw_uses),
    *(scanned, swapped_twins),
)
