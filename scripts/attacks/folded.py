"""Attacks by reparametrised layers: weight norm and spectral norm beside other layers, under old and new names."""

from __future__ import annotations

import numpy as np

from attacks.pairs import Array, Attack, Maker, around, conv, flipped, linear


def _length(v: Array, dim: int | None) -> Array:
    """The norm over every axis but `dim`."""
    axes = tuple(axis for axis in range(v.ndim) if axis != dim)
    return np.sqrt(np.sum(np.square(v.astype("f8")), axes, keepdims=True))


def weight_norm(m: Maker) -> Attack:
    """A weight-normed layer against a plain one: g v / |v|, over any dim; beside others of its shape."""
    d = m.width
    kind = m.pick("linear", "conv1d", "conv2d", "grouped", "transposed")
    shape = {
        "linear": (d, d),
        "conv1d": (d, d, 3),
        "conv2d": (d, d, 3, 3),
        "grouped": (d, d // 2, 3),
        "transposed": (d, m.other(), 4),
    }[kind]
    dim = m.pick(0, 0, 0, 1, None)
    v = m.draw(*shape)
    g = (np.abs(m.draw(*_length(v, dim).shape)) + 0.5).astype("f4")
    names = m.pick(("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
    name = m.pick("up", "deconv") if kind == "transposed" else m.pick("conv", "layer", "proj", "net.0")
    m.give(f"{name}.{names[0]}", g.reshape(()) if dim is None else g)
    m.give(f"{name}.{names[1]}", v)
    weight = (g * v / _length(v, dim)).astype("f4")
    form = linear if kind == "linear" else flipped if kind == "transposed" and m.coin() else conv
    path = name.replace(".", "_")
    m.take(f"{path}/kernel", form(weight))
    m.put(f"{name}.bias", f"{path}/bias", shape[1] if kind == "transposed" else shape[0])
    m.loose = True
    m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop"})
    if m.coin(0.6):
        m.dense("head", "head", d, d) if kind == "linear" else m.convolution("tail", "tail", *shape)
    return m.attack("weight-norm", back=False)


def weight_norm_list(m: Maker) -> Attack:
    """Weight-normed layers in a list, against plain ones."""
    d, n = m.width, m.pick(2, 3)
    names = m.pick(("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
    for i in range(n):
        v, g = m.draw(d, d, 3), np.abs(m.draw(d, 1, 1)) + np.float32(0.5)
        m.give(f"layers.{i}.conv.{names[0]}", g)
        m.give(f"layers.{i}.conv.{names[1]}", v)
        m.take(f"layers_{i}/conv/kernel", conv((g * v / _length(v, 0)).astype("f4")))
        m.put(f"layers.{i}.conv.bias", f"layers_{i}/conv/bias", d)
    m.loose = True
    m.options = m.pick({}, {"unused": "drop"})
    around(m)
    return m.attack("weight-norm-list", back=False)


def spectral_norm(m: Maker) -> Attack:
    """A spectral-normed layer against a plain one: W / sigma. What only copies W is wrong."""
    d = m.width
    kind = m.pick("linear", "conv2d")
    shape = (d, d) if kind == "linear" else (d, d, 3, 3)
    w = m.draw(*shape)
    u, sigma, v = np.linalg.svd(w.reshape(d, -1).astype("f8"))
    name = m.pick("conv", "layer", "disc.0", "proj")
    if m.coin():
        leaves = {"weight_orig": w, "weight_u": u[:, 0].astype("f4"), "weight_v": v[0].astype("f4")}
    else:
        leaves = {"parametrizations.weight.original": w}
        leaves |= {
            "parametrizations.weight.0._u": u[:, 0].astype("f4"),
            "parametrizations.weight.0._v": v[0].astype("f4"),
        }
    for leaf, array in leaves.items():
        m.give(f"{name}.{leaf}", array)
    path = name.replace(".", "_")
    m.take(f"{path}/kernel", (linear if kind == "linear" else conv)((w / sigma[0]).astype("f4")))
    m.put(f"{name}.bias", f"{path}/bias", d)
    if m.coin(0.6):
        m.dense("head", "head", d, d)
    m.loose = True
    m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop"})
    return m.attack("spectral-norm", back=False)


def own_norm(m: Maker) -> Attack:
    """A weight norm of the user's own: a direction and a magnitude under free names, against a plain kernel."""
    d = m.width
    v, g = m.draw(d, d), np.abs(m.draw(d)) + np.float32(0.5)
    names = m.pick(("direction", "magnitude"), ("v", "g"), ("weight_v", "weight_g"))
    m.give(f"layer.{names[0]}", v)
    m.give(f"layer.{names[1]}", g)
    m.take("layer/kernel", (g[:, None] * v / _length(v, 0)).T)
    m.put("layer.bias", "layer/bias", d)
    m.loose = True
    m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop"})
    around(m)
    return m.attack("own-norm", back=False)


def low_rank(m: Maker) -> Attack:
    """Low-rank additions that were not merged: the base alone is another layer."""
    d, r = m.width, 2
    w, a, b = m.draw(d, d), m.draw(r, d), m.draw(d, r)
    names = m.pick(
        ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"),
        ("weight", "lora_A", "lora_B"),
        ("base_layer.weight", "lora_A.weight", "lora_B.weight"),
    )
    for leaf, array in zip(names, (w, a, b), strict=True):
        m.give(f"attn.q_proj.{leaf}", array)
    m.take("attn/q_proj/kernel", (w + b @ a).T)
    m.dense("attn.k_proj", "attn/k_proj", d, d, False)
    m.loose = True
    m.options = m.pick({}, {"unused": "drop"})
    return m.attack("low-rank", back=False)


def quantized(m: Maker) -> Attack:
    """Codes with scales beside them, against a plain kernel."""
    d = m.width
    codes = m.values.integers(-127, 127, (d, d)).astype("i1")
    scale = np.abs(m.draw(d)) + np.float32(0.01)
    word = m.pick("weight_scale", "scales", "scale", "SCB", "scale_inv", "weight_scale_inv")
    m.give("attn.q_proj.weight", codes)
    m.give(f"attn.q_proj.{word}", scale)
    m.take("attn/q_proj/kernel", (codes.astype("f4") * scale[:, None]).T)
    m.dense("attn.k_proj", "attn/k_proj", d, d, False)
    m.loose = True
    m.options = m.pick({}, {"unused": "drop"})
    return m.attack("quantized", back=False)


KINDS = (weight_norm, weight_norm_list, spectral_norm, own_norm, low_rank, quantized)
