"""Attacks with live models on what becomes of a convolution's map: flattened, unflattened, shuffled, cut in patches."""

from __future__ import annotations

from typing import Any

import flax.linen as fn
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attacks.layouts import cell
from attacks.live import Live, Net, Tensor, Tree, live, raw
from attacks.pairs import Array, Maker, conv, rows


def flattened(m: Maker) -> Live:
    """A map is flattened, perhaps pooled, perhaps joined with features, and a Linear or a raw parameter takes it."""
    c, h, w, extra = m.pick(4, 6, 8), m.pick(3, 4), m.pick(3, 4), m.pick(0, 0, 3, 4, 8)
    pool, taker, first = m.coin(0.3), m.pick("linear", "linear", "raw", "norm"), m.coin()
    name, word = m.pick("conv", "conv1", "stem"), m.pick("fc", "head", "proj", "out")
    turned = m.coin(0.3)  # the Flax model goes back to channels first before it flattens
    size = {"c": c, "h": h // (2 if pool else 1), "w": w // (2 if pool else 1)}
    order = rows(size, "c h w" if turned else "h w c")
    n = len(order)
    columns = (
        order
        if not extra
        else np.concatenate([order, n + np.arange(extra)] if first else [np.arange(extra), extra + order])
    )
    out = n + extra if m.square and m.coin() else 7
    m.convolution(name, name, c, 3, 3, 3)
    parts: dict[str, Any] = {name: nn.Conv2d(3, c, 3)}
    if taker == "norm":
        m.put("norm.weight", "norm/scale", n + extra, form=lambda v: v[columns])
        m.put("norm.bias", "norm/bias", n + extra, form=lambda v: v[columns])
        parts["norm"] = nn.LayerNorm(n + extra)
    if taker == "raw":
        m.put(word, word, n + extra, out, form=lambda v: v[columns])
        parts[word] = raw(n + extra, out)
    else:
        m.put(f"{word}.weight", f"{word}/kernel", out, n + extra, form=lambda v: v.T[columns])
        m.put(f"{word}.bias", f"{word}/bias", out)
        parts[word] = nn.Linear(n + extra, out)

    def use(net: Any, x: Tensor, *v: Tensor) -> Tensor:
        y = F.relu(getattr(net, name)(x))
        y = (F.max_pool2d(y, 2) if pool else y).flatten(1)
        y = torch.cat([y, *v] if first else [*v, y], 1)
        y = net.norm(y) if taker == "norm" else y
        return y @ getattr(net, word) if taker == "raw" else getattr(net, word)(y)

    def tree(self: Any, x: Any, *v: Any) -> Any:
        y = fn.relu(fn.Conv(c, (3, 3), padding="VALID", name=name)(x))
        y = fn.max_pool(y, (2, 2), (2, 2)) if pool else y
        y = (y.transpose(0, 3, 1, 2) if turned else y).reshape(x.shape[0], -1)
        y = jnp.concatenate([y, *v] if first else [*v, y], 1)
        y = fn.LayerNorm(epsilon=1e-5, name="norm")(y) if taker == "norm" else y
        if taker == "raw":
            return y @ self.param(word, fn.initializers.normal(), (n + extra, out))
        return fn.Dense(out, name=word)(y)

    more = (m.draw(2, extra),) if extra else ()
    return live(m, "flattened", Net(use, **parts), Tree(tree), m.draw(2, h + 2, w + 2, 3), *more)


def flattened_into_cell(m: Maker) -> Live:
    """A map's channels and height become the inputs of a GRU or an LSTM."""
    c, f, hidden, kind = m.pick(3, 4), m.pick(2, 3), m.pick(5, 7), m.pick("gru", "lstm")
    hidden = c * f if m.square else hidden
    turned = m.coin(0.3)
    order = rows({"c": c, "f": f}, "c f" if turned else "f c")
    m.convolution("conv", "conv", c, 1, 3, 3)
    where = "rnn/cell" if m.coin() else "rnn"
    cell(m, "rnn", where, kind, c * f, hidden, order)
    m.dense("fc", "fc", 5, hidden)
    layer = (nn.GRU if kind == "gru" else nn.LSTM)(c * f, hidden, batch_first=True)

    def use(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.conv(x))
        b, _, _, t = y.shape
        return net.fc(net.rnn(y.reshape(b, c * f, t).transpose(1, 2))[0][:, -1])

    def tree(self: Any, x: Any) -> Any:
        y = fn.relu(fn.Conv(c, (3, 3), padding=1, name="conv")(x))
        b, _, t, _ = y.shape
        y = y.transpose(0, 2, 3, 1) if turned else y.transpose(0, 2, 1, 3)
        made = fn.GRUCell if kind == "gru" else fn.OptimizedLSTMCell
        inner = made(hidden, name=where) if where == "rnn" else None
        y = y.reshape(b, t, c * f)
        if inner is not None:
            return fn.Dense(5, name="fc")(fn.RNN(inner, name="loop")(y)[:, -1])
        return fn.Dense(5, name="fc")(_Named(made, hidden, name="rnn")(y)[:, -1])

    return live(
        m,
        "flattened-into-cell",
        Net(use, conv=nn.Conv2d(1, c, 3, padding=1), rnn=layer, fc=nn.Linear(hidden, 5)),
        Tree(tree),
        m.draw(2, f, 5, 1),
        folded=True,
    )


class _Named(fn.Module):
    made: Any
    hidden: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        return fn.RNN(self.made(self.hidden, name="cell"))(x)


def unflattened(m: Maker) -> Live:
    """A Linear makes a map."""
    c, h, z = m.pick(4, 6, 8), m.pick(2, 3), m.pick(5, 16)
    turned, name = m.coin(0.3), m.pick("fc", "project", "decoder_input")
    order = rows({"c": c, "h": h, "w": h}, "c h w" if turned else "h w c")
    n = len(order)
    z = n if m.square and m.coin() else z
    m.put(f"{name}.weight", f"{name}/kernel", n, z, form=lambda w: w.T[:, order])
    m.put(f"{name}.bias", f"{name}/bias", n, form=lambda b: b[order])
    m.convolution("conv", "conv", 3, c, 3, 3)

    def use(net: Any, x: Tensor) -> Tensor:
        return net.conv(F.relu(getattr(net, name)(x)).view(-1, c, h, h))

    def tree(self: Any, x: Any) -> Any:
        y = fn.relu(fn.Dense(n, name=name)(x))
        y = y.reshape(-1, c, h, h).transpose(0, 2, 3, 1) if turned else y.reshape(-1, h, h, c)
        return fn.Conv(3, (3, 3), padding=1, name="conv")(y)

    return live(
        m,
        "unflattened",
        Net(use, **{name: nn.Linear(z, n), "conv": nn.Conv2d(c, 3, 3, padding=1)}),
        Tree(tree),
        m.draw(2, z),
    )


def pixel_shuffle(m: Maker) -> Live:
    """Channels (c r r) of torch's pixel_shuffle; the Flax model splits (r r c), or as torch does."""
    c, alike = m.pick(3, 4), m.coin(0.3)
    order = np.arange(4 * c) if alike else np.arange(4 * c).reshape(c, 2, 2).transpose(1, 2, 0).reshape(-1)
    m.put("body.weight", "body/kernel", 4 * c, 3, 3, 3, form=lambda w: conv(w)[..., order])
    m.put("body.bias", "body/bias", 4 * c, form=lambda b: b[order])
    m.convolution("out", "out", 3, c, 3, 3)

    def tree(self: Any, x: Any) -> Any:
        y = fn.Conv(4 * c, (3, 3), padding=1, name="body")(x)
        b, h, w, _ = y.shape
        y = (
            y.reshape(b, h, w, c, 2, 2).transpose(0, 1, 4, 2, 5, 3)
            if alike
            else y.reshape(b, h, w, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        )
        return fn.Conv(3, (3, 3), padding=1, name="out")(y.reshape(b, 2 * h, 2 * w, c))

    net = Net(
        lambda s, x: s.out(F.pixel_shuffle(s.body(x), 2)),
        body=nn.Conv2d(3, 4 * c, 3, padding=1),
        out=nn.Conv2d(c, 3, 3, padding=1),
    )
    return live(m, "pixel-shuffle", net, Tree(tree), m.draw(1, 4, 4, 3), shown="both")


def unfolded(m: Maker) -> Live:
    """Patches by unfold and a Linear against a strided convolution."""
    d, k, name = m.width, m.pick(2, 4), m.pick("patch_embed", "patch", "proj")

    def window(w: Array) -> Array:
        return w.reshape(d, 3, k, k).transpose(2, 3, 1, 0)

    m.put(f"{name}.weight", f"{name}/kernel", d, 3 * k * k, form=window)
    m.put(f"{name}.bias", f"{name}/bias", d)
    m.dense("head", "head", 3, d)

    def use(net: Any, x: Tensor) -> Tensor:
        return net.head(getattr(net, name)(F.unfold(x, k, stride=k).transpose(1, 2)).mean(1))

    def tree(self: Any, x: Any) -> Any:
        return fn.Dense(3, name="head")(fn.Conv(d, (k, k), (k, k), name=name)(x).reshape(x.shape[0], -1, d).mean(1))

    return live(
        m,
        "unfolded",
        Net(use, **{name: nn.Linear(3 * k * k, d), "head": nn.Linear(d, 3)}),
        Tree(tree),
        m.draw(2, 2 * k, 2 * k, 3),
    )


def transposed(m: Maker) -> Live:
    """A square transposed convolution; the Flax module says how it keeps its kernel."""
    d, k, turned = m.width, m.pick(2, 4), m.coin()
    name = m.pick("up", "deconv", "layer")

    def form(w: Array) -> Array:
        return w.transpose(2, 3, 1, 0) if turned else w[..., ::-1, ::-1].transpose(2, 3, 0, 1)

    m.put(f"{name}.weight", f"{name}/kernel", d, d, k, k, form=form)
    m.put(f"{name}.bias", f"{name}/bias", d)
    m.convolution("tail", "tail", 3, d, 3, 3)

    def tree(self: Any, x: Any) -> Any:
        y = fn.ConvTranspose(d, (k, k), (2, 2), padding="SAME", transpose_kernel=turned, name=name)(x)
        return fn.Conv(3, (3, 3), padding=1, name="tail")(y)

    net = Net(
        lambda s, x: s.tail(getattr(s, name)(x)),
        **{name: nn.ConvTranspose2d(d, d, k, 2, k // 2 - 1), "tail": nn.Conv2d(d, 3, 3, padding=1)},
    )
    return live(m, "transposed", net, Tree(tree), m.draw(1, 4, 4, d))


def channel_attention(m: Maker) -> Live:
    """A convolution of one value wide against a Linear over channels, beside a global pool: no flatten at all."""
    d, h = m.width, m.pick(2, 3)
    m.convolution("conv", "conv", d, 3, 3, 3)
    m.put("se.weight", "se/kernel", d, d, 1, 1, form=lambda w: w[:, :, 0, 0].T)
    m.put("se.bias", "se/bias", d)

    def use(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        return (y * torch.sigmoid(net.se(y.mean((2, 3), keepdim=True)))).mean((2, 3))

    def tree(self: Any, x: Any) -> Any:
        y = fn.Conv(d, (3, 3), padding=1, name="conv")(x)
        return (y * fn.sigmoid(fn.Dense(d, name="se")(y.mean((1, 2), keepdims=True)))).mean((1, 2))

    net = Net(use, conv=nn.Conv2d(3, d, 3, padding=1), se=nn.Conv2d(d, d, 1))
    return live(m, "channel-attention", net, Tree(tree), m.draw(2, h, h, 3))


KINDS = (flattened, flattened_into_cell, unflattened, pixel_shuffle, unfolded, channel_attention, transposed)
