"""Attacks on layouts: flattened and joined maps, raw parameters, cubes and square tables, transposed convolutions,
heads, the axis of a stack. If no file shows the layout, the truth is drawn: a plan that completes is wrong in half of
them."""

from __future__ import annotations

import numpy as np

from attacks.pairs import Array, Attack, Maker, around, blocks, flipped, last, linear, rows, same

CONVS = (
    ("conv", "conv"),
    ("conv1", "Conv_0"),
    ("features.0", "features_0"),
    ("stem", "stem"),
    ("body.conv", "body/conv"),
)
HEADS = (("fc", "fc"), ("fc1", "Dense_0"), ("classifier", "classifier"), ("head.0", "head_0"), ("proj", "proj"))


def _map(m: Maker) -> tuple[str, str, str, str, dict[str, int], int]:
    """A convolution, what its map feeds, the map's axes, and the width of what is fed."""
    c, h, w = m.pick(4, 6, 8), m.pick(2, 3, 4), m.pick(2, 3, 4)
    if m.coin():
        h = w
    first, second = m.pick(*CONVS), m.pick(*HEADS)
    if first[1].startswith("Conv_") != second[1].startswith("Dense_"):
        first, second = CONVS[1], HEADS[1]
    m.convolution(*first, c, 3, 3, 3, bias=m.coin(0.7))
    if m.coin(0.3):
        m.batch_norm("bn", "bn" if "_0" not in first[1] else "BatchNorm_0", c)
    return *first, *second, {"c": c, "h": h, "w": w}, m.pick(c * h * w, 16, c) if m.square else m.pick(10, 32)


def _turned(m: Maker, axes: dict[str, int]) -> Array:
    """The order of a flattened map on the Flax side: channels last, or, where a model turns it back, channels first."""
    return rows(axes, "h w c" if m.coin(0.75) else "c h w")


def flattened(m: Maker) -> Attack:
    """A Linear takes a flattened map; perhaps behind a norm over the flattened map, or joined with other features."""
    _, _, torch, flax, axes, out = _map(m)
    order = _turned(m, axes)
    more = m.pick(0, 0, 3, 4, 8)
    if more:
        order = np.concatenate([order, len(order) + np.arange(more)] if m.coin() else [np.arange(more), more + order])
    if m.coin(0.2):
        m.put("norm_flat.weight", "norm_flat/scale", len(order), form=lambda w: w[order])
        m.put("norm_flat.bias", "norm_flat/bias", len(order), form=lambda w: w[order])
    m.put(f"{torch}.weight", f"{flax}/kernel", out, len(order), form=lambda w: w.T[order])
    m.put(f"{torch}.bias", f"{flax}/bias", out)
    if m.coin():
        m.dense("last", "last" if "_0" not in flax else "Dense_1", 5, out)
    return m.attack("flattened")


def flattened_into_raw(m: Maker) -> Attack:
    """A raw parameter takes a flattened map: x.flatten(1) @ w."""
    _, _, _, _, axes, out = _map(m)
    order = _turned(m, axes)
    word = m.pick("w", "proj", "weight_out", "theta")
    where, path = m.pick(("", ""), ("readout.", "readout/"))
    m.put(f"{where}{word}", f"{path}{word}", len(order), out, form=lambda w: w[order])
    if m.coin():
        m.put(f"{where}b", f"{path}b", out)
    return m.attack("flattened-into-raw")


def flattened_into_cell(m: Maker) -> Attack:
    """A GRU or LSTM takes a map's channels and height joined."""
    c, f, hidden = m.pick(4, 6), m.pick(2, 3, 5), m.pick(5, 7)
    hidden = c * f if m.square and m.coin() else hidden
    m.convolution("conv", "conv", c, 1, 3, 3)
    order = rows({"c": c, "f": f}, "f c" if m.coin(0.75) else "c f")
    gates = m.pick("gru", "lstm")
    m.dense("fc", "fc", 5, hidden)
    cell(m, "rnn", "rnn/cell" if m.coin() else "rnn", gates, c * f, hidden, order)
    return m.attack("flattened-into-cell", back=False)


def cell(m: Maker, torch: str, flax: str, kind: str, into: int, hidden: int, order: Array | None = None) -> None:
    """A torch GRU or LSTM as Flax's cell with one kernel a gate."""
    names = "rzn" if kind == "gru" else "ifgo"
    x, h = m.draw(len(names) * hidden, into), m.draw(len(names) * hidden, hidden)
    bx, bh = m.draw(len(names) * hidden), m.draw(len(names) * hidden)
    for name, array in (("weight_ih", x), ("weight_hh", h), ("bias_ih", bx), ("bias_hh", bh)):
        m.give(f"{torch}.{name}_l0", array)
    for i, gate in enumerate(names):
        part = slice(i * hidden, (i + 1) * hidden)
        kernel = x[part].T
        m.take(f"{flax}/i{gate}/kernel", kernel if order is None else kernel[order])
        m.take(f"{flax}/h{gate}/kernel", h[part].T)
        if kind == "lstm":
            m.take(f"{flax}/h{gate}/bias", bx[part] + bh[part])
        else:
            m.take(f"{flax}/i{gate}/bias", bx[part] if gate == "n" else bx[part] + bh[part])
            if gate == "n":
                m.take(f"{flax}/hn/bias", bh[part])


def unflattened(m: Maker) -> Attack:
    """A Linear makes a map that is unflattened: its outputs are in another order."""
    c, h = m.pick(4, 6, 8), m.pick(2, 3)
    order = _turned(m, {"c": c, "h": h, "w": h})
    into = len(order) if m.square else m.pick(5, 16)
    torch, flax = m.pick(("fc", "fc"), ("project", "project"), ("decoder_input", "decoder_input"))
    m.put(f"{torch}.weight", f"{flax}/kernel", len(order), into, form=lambda w: w.T[:, order])
    m.put(f"{torch}.bias", f"{flax}/bias", len(order), form=lambda b: b[order])
    m.convolution("conv", "conv", 3, c, 3, 3)
    return m.attack("unflattened")


def patches(m: Maker) -> Attack:
    """A window of a convolution against a Linear over unfolded patches: the columns are (c h w) or (h w c)."""
    c, k, d = 3, m.pick(2, 4), m.width
    name = m.pick("patch_embed", "patch_embed.proj", "to_patch")
    path = name.replace(".", "/")
    if m.coin():  # unfold and Linear on torch's side
        order = "c h w" if m.coin(0.6) else "h w c"
        axes = {"c": c, "h": k, "w": k}

        def window(w: Array) -> Array:
            return w.T[np.argsort(rows(axes, order))].reshape(c, k, k, d).transpose(1, 2, 0, 3)

        m.put(f"{name}.weight", f"{path}/kernel", d, c * k * k, form=window)
    else:
        order = "h w c" if m.coin(0.6) else "c h w"
        axes = {"c": c, "h": k, "w": k}
        m.put(f"{name}.weight", f"{path}/kernel", d, c, k, k, form=lambda w: w.reshape(d, -1).T[rows(axes, order)])
    m.put(f"{name}.bias", f"{path}/bias", d)
    around(m)
    return m.attack("patches")


def raw_matrix(m: Maker) -> Attack:
    """A raw parameter used as x @ w or as w @ x, against a kernel, or a Linear against a raw leaf."""
    a, b = m.width, m.other()
    form = linear if m.coin() else same
    word = m.pick("proj", "w", "w_in", "mixing", "transition")
    path = m.pick(f"{word}/kernel", f"{word}/kernel", "matrix", "theta", word)
    m.put(f"scope.{word}", f"scope/{path}", a, b, form=same if path == word else form)  # one raw name is one layout
    if m.coin():
        m.put("scope.offset", "scope/offset", b)
    around(m)
    return m.attack("raw-matrix")


def raw_pairs(m: Maker) -> Attack:
    """Linears of one module as raw pairs on the Flax side: w_in, b_in, w_out, b_out."""
    torch = m.pick("mlp", "ffn", "net")
    a, b = m.width, m.other()
    names = m.pick(
        (("fc_in", "in"), ("fc_out", "out")), (("lin1", "1"), ("lin2", "2")), (("up", "up"), ("down", "down"))
    )
    for (one, tail), (out, into) in zip(names, ((b, a), (a, b)), strict=True):
        m.put(f"{torch}.{one}.weight", f"{torch}/w_{tail}", out, into, form=linear)
        m.put(f"{torch}.{one}.bias", f"{torch}/b_{tail}", out)
    around(m)
    return m.attack("raw-pairs")


def kernel_of_own_class(m: Maker) -> Attack:
    """A torch checkpoint in which a rectangular sibling shows that weights are (in, out), beside square ones."""
    d, f = m.width, 2 * m.width
    names = m.pick(("gc1", "gc2", "gc3"), ("c_attn", "c_fc", "c_out"), ("layer_a", "layer_b", "layer_c"))
    for i in range(m.pick(1, 2)):
        for name, shape in zip(names, ((d, d), (d, f), (f, d)), strict=True):
            m.put(f"h.{i}.{name}.weight", f"h_{i}/{name}/kernel", *shape)
            m.put(f"h.{i}.{name}.bias", f"h_{i}/{name}/bias", shape[1])
    return m.attack("in-out-siblings")


def cube(m: Maker) -> Attack:
    """A raw map (1, C, H, W) with C = H = W: moved to channels last, or kept."""
    n = m.pick(3, 4, 5)
    sizes = (n, n, n) if m.coin(0.8) else (n + 2, n, n)
    form = last if len({*sizes}) > 1 or m.coin() else same
    name = m.pick("const", "input.const", "pos_map", "grid", "memory.init_state")
    m.put(f"gen.{name}", f"gen/{name.replace('.', '/')}", 1, *sizes, form=form)
    around(m)
    return m.attack("cube")


def square_table(m: Maker) -> Attack:
    """A table of relative positions with as many buckets as heads: kept or transposed."""
    heads = m.pick(4, 8, 9)
    torch, flax = m.pick(
        ("enc.0.SelfAttention.relative_attention_bias.weight", "enc_0/relpos_bias/rel_embedding"),
        ("layers.0.attn.relative_position_bias_table", "layers_0/attn/rel_pos_bias"),
        ("attn.rel_bias.weight", "attn/rel_bias/embedding_table"),
        ("attn.bias_table", "attn/rel_pos_bias"),
    )
    m.put(torch, flax, heads, heads, form=linear if m.coin() else same)
    around(m)
    return m.attack("square-table")


def square_transposed(m: Maker) -> Attack:
    """A transposed convolution with equal channels: its window is turned and its channels are swapped, or neither."""
    d, k, rank = m.width, m.pick(2, 3, 4), m.pick(1, 2)
    name = m.pick("up", "deconv", "upsample", "decoder.up", "conv_transpose")
    path = name.replace(".", "/") if m.coin(0.7) else "ConvTranspose_0"
    form = flipped if m.coin() else (lambda w: w.transpose(*range(2, w.ndim), 1, 0))
    m.put(f"{name}.weight", f"{path}/kernel", d, d, *[k] * rank, form=form)
    m.put(f"{name}.bias", f"{path}/bias", d)
    if m.coin():
        m.convolution("out_conv", "out_conv", 3, d, 3, 3)
    return m.attack("square-transposed")


def grouped_transposed(m: Maker) -> Attack:
    """A grouped transposed convolution against a full kernel."""
    g, d, k = 2, m.pick(4, 6), m.pick(2, 3)
    turn = m.coin()

    def form(w: Array) -> Array:
        full = np.zeros((d, d, k, k), "f4")
        for i in range(g):
            part = slice(i * d // g, (i + 1) * d // g)
            full[part, part] = w[part]
        return flipped(full) if turn else full.transpose(2, 3, 1, 0)

    m.put("up.weight", "up/kernel", d, d // g, k, k, form=form)
    m.put("up.bias", "up/bias", d)
    if m.coin():
        m.dense("head", "head", 5, d)
    return m.attack("grouped-transposed", back=False)


def bilinear(m: Maker) -> Attack:
    """A bilinear map (o, a, b), a cube in half of them, against (a, b, o): not a convolution."""
    a, o = m.width, m.other()
    name = m.pick("bilinear", "biaffine", "scorer.bilinear")
    m.put(f"{name}.weight", f"{name.replace('.', '/')}/kernel", o, a, a, form=lambda w: w.transpose(1, 2, 0))
    m.put(f"{name}.bias", f"{name.replace('.', '/')}/bias", o)
    around(m)
    return m.attack("bilinear")


def square_heads(m: Maker) -> Attack:
    """Heads as many as they are wide: (h d) i into (i, h, d), or into (h, i, d) as einsum layers keep them."""
    n = m.pick(3, 4)
    d = n * n if m.coin(0.5) else n
    einsum = m.coin()
    leaf = "w" if einsum else "kernel"
    torch, flax = m.pick(("attn", "attn"), ("self_attn", "attention"))
    turn = m.coin()

    def heads(w: Array) -> Array:
        parts = w.reshape(n, n, d)
        return parts.transpose(0, 2, 1) if einsum and turn else parts.transpose(2, 0, 1)

    for one, other in zip(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), strict=True):
        m.put(f"{torch}.{one}.weight", f"{flax}/{other}/{leaf}", n * n, d, form=heads)
    m.put(f"{torch}.o_proj.weight", f"{flax}/out/{leaf}", d, n * n, form=lambda w: w.T.reshape(n, n, d))
    around(m)
    return m.attack("square-heads")


def stack_axis(m: Maker) -> Attack:
    """Layers stacked in one leaf, as many as they are wide: nothing shows the axis."""
    n = m.pick(3, 4, 6)
    axis = m.pick(0, 0, 1, 2)
    torch, flax = m.pick(("layers", "layers"), ("h", "h"), ("blocks", "blocks"))
    bias, name = m.coin(), m.pick("fc", "mlp.proj", "mix")
    kernels, biases = [m.draw(n, n) for _ in range(n)], [m.draw(n) for _ in range(n)]
    for i in range(n):
        m.give(f"{torch}.{i}.{name}.weight", kernels[i])
        if bias:
            m.give(f"{torch}.{i}.{name}.bias", biases[i])
    path = f"{flax}/{name.replace('.', '/')}"
    m.take(f"{path}/kernel", np.stack([w.T for w in kernels], axis))
    if bias:
        m.take(f"{path}/bias", np.stack(biases, min(axis, 1)))
    if m.coin():
        m.dense("out", "out", 5, n)
    return m.attack("stack-axis")


def norm_named_kernel(m: Maker) -> Attack:
    """A norm's scale that is called kernel, beside layers of any names."""
    for i in range(m.pick(1, 2)):
        names = m.pick(("w1", "w2"), ("fc1", "fc2"), ("up", "down"), ("first", "second"))
        d, f = m.width, m.other()
        torch, flax = f"layers.{i}", f"layers_{i}"
        m.put(f"{torch}.norm.weight", f"{flax}/norm/kernel", d)
        m.dense(f"{torch}.ff.{names[0]}", f"{flax}/ff/{names[0]}", f, d, bias=False)
        m.dense(f"{torch}.ff.{names[1]}", f"{flax}/ff/{names[1]}", d, f, bias=False)
    return m.attack("norm-named-kernel")


def experts_cube(m: Maker) -> Attack:
    """Experts in one raw tensor, as wide as they are deep: (E, in, out) or (E, out, in)."""
    e, d = m.pick(2, 3, 4), m.width
    e = d if m.coin(0.3) else e
    form = (lambda w: w.transpose(0, 2, 1)) if m.coin() else same
    torch, flax = m.pick(("mlp.experts", "mlp/experts"), ("moe", "moe"), ("ffn.experts", "MoeBlock_0"))
    for one, other in (("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")):
        m.put(f"{torch}.{one}", f"{flax}/{other if flax.endswith('0') else one}", e, d, d, form=form)
    m.dense(
        "mlp.router" if torch.startswith("mlp") else "router",
        "mlp/router" if torch.startswith("mlp") else "router",
        e,
        d,
        bias=False,
    )
    return m.attack("experts-cube")


def complex_parts(m: Maker) -> Attack:
    """One side keeps a spectral weight as a pair of reals on the last axis, the other as two leaves."""
    a, b = m.width, m.other()
    torch = m.pick("fourier", "spectral", "ssm")
    array = m.draw(a, b, 2)
    m.give(f"{torch}.weight", array)
    swap = m.coin(0.3)
    names = m.pick(("real", "imag"), ("weight_re", "weight_im"), ("a", "b"))
    for i, name in enumerate(names):
        m.take(f"{torch}/{name}", array[..., 1 - i if swap and names == ("a", "b") else i])
    around(m)
    return m.attack("complex-parts")


def padded_vocabulary(m: Maker) -> Attack:
    """The Flax table has rows that torch's has not: no plan may complete."""
    v, d = 17, m.width
    table = m.draw(v, d)
    m.give("embed_tokens.weight", table)
    m.take("embed_tokens/embedding", np.concatenate([table, np.zeros((m.pick(1, 3, 7), d), "f4")]))
    blocks(m, 1)
    return m.attack("padded-vocabulary", back=False)


KINDS = (
    *(flattened, flattened_into_raw, flattened_into_cell, unflattened, patches, raw_matrix, raw_pairs),
    *(kernel_of_own_class, cube, square_table, square_transposed, grouped_transposed, bilinear, square_heads),
    *(stack_axis, norm_named_kernel, experts_cube, complex_parts, padded_vocabulary),
)
