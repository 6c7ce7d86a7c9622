"""Attacks by parts: fused tensors in any order, parts stacked on an axis, layers in cycles, experts, ties, buffers."""

from __future__ import annotations

import numpy as np

from attacks.pairs import Array, Attack, Maker, around, block, blocks


def _woven(parts: list[Array], heads: int) -> Array:
    """The rows of the parts head by head: (heads, parts, width)."""
    return np.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], 1).reshape(-1, *parts[0].shape[1:])


def fused_into_parts(m: Maker) -> Attack:
    """A fused projection against its parts, in blocks or head by head; the name may tell the order of parts."""
    d, heads = m.width, 2
    words, name = m.pick(
        (("q", "k", "v"), "qkv"),
        (("q", "k", "v"), "in_proj"),
        (("query", "key", "value"), "query_key_value"),
        (("q", "k", "v"), "c_attn"),
        (("k", "v"), "kv"),
        (("gate", "up"), "gate_up_proj"),
        (("up", "gate"), "up_gate_proj"),
        (("v", "q", "k"), "vqk"),
        (("k", "q", "v"), "kqv"),
    )
    order = list(words)
    if name in ("in_proj", "c_attn", "query_key_value"):
        order = list(words)
    weave = m.coin() and len(words) == 3
    where = m.pick("attn", "mixer", "block.attn")
    path = where.replace(".", "/")
    for leaf, target, shape in (("weight", "kernel", (d, d)), ("bias", "bias", (d,))):
        parts = [m.draw(*shape) for _ in order]
        m.give(f"{where}.{name}.{leaf}", _woven(parts, heads) if weave else np.concatenate(parts))
        for word, part in zip(order, parts, strict=True):
            m.take(f"{path}/{word}/{target}", part.T)
    m.dense(f"{where}.proj", f"{path}/proj", d, d)
    around(m)
    return m.attack("fused-into-parts")


def fused_unnamed(m: Maker) -> Attack:
    """One Linear of twice the width against two whose order nothing tells."""
    d = m.width
    name, words = m.pick(
        ("fc1", ("gate", "value")),
        ("wi", ("wi_0", "wi_1")),
        ("in_proj", ("x", "z")),
        ("linear1", ("a", "b")),
        ("proj", ("mu", "logvar")),
    )
    parts = [m.draw(d, d) for _ in words]
    biases = [m.draw(d) for _ in words]
    flip = m.coin()
    m.give(f"mlp.{name}.weight", np.concatenate(parts[::-1] if flip else parts))
    m.give(f"mlp.{name}.bias", np.concatenate(biases[::-1] if flip else biases))
    for word, part, bias in zip(words, parts, biases, strict=True):
        m.take(f"mlp/{word}/kernel", part.T)
        m.take(f"mlp/{word}/bias", bias)
    around(m)
    return m.attack("fused-unnamed")


def fused_both_sides(m: Maker) -> Attack:
    """Fused on both sides, the words of the names in the same order or in another."""
    d = m.width
    rows_ = (
        ("gate_up_proj", ("gate", "up")),
        ("up_gate_proj", ("up", "gate")),
        ("qkv", ("q", "k", "v")),
        ("kqv", ("k", "q", "v")),
        ("kv_proj", ("k", "v")),
        ("vk_proj", ("v", "k")),
        ("qk", ("q", "k")),
        ("kq", ("k", "q")),
    )
    torch, one = m.pick(*rows_)
    flax, other = m.pick(*[(name, words) for name, words in rows_ if sorted(words) == sorted(one)])
    parts = {word: m.draw(d, d) for word in one}
    vectors = {word: m.draw(d) for word in one}
    m.give(f"mlp.{torch}.weight", np.concatenate([parts[w] for w in one]))
    m.take(f"mlp/{flax}/kernel", np.concatenate([parts[w] for w in other]).T)
    if m.coin():
        m.give(f"mlp.{torch}.bias", np.concatenate([vectors[w] for w in one]))
        m.take(f"mlp/{flax}/bias", np.concatenate([vectors[w] for w in other]))
    m.dense("mlp.out", "mlp/out", d, d)
    around(m)
    return m.attack("fused-both-sides")


def fused_one_name(m: Maker) -> Attack:
    """Fused on both sides under one name, in blocks on both or on one: nothing shows it."""
    d, heads = m.width, 2
    parts = [m.draw(d, d) for _ in range(3)]
    alike = m.coin()
    m.give("attn.qkv.weight", np.concatenate(parts))
    m.take("attn/qkv/kernel", (np.concatenate(parts) if alike else _woven(parts, heads)).T)
    m.dense("attn.proj", "attn/proj", d, d)
    around(m)
    m.excused = "fused|parts|order"
    return m.attack("fused-one-name")


def part_stacks(m: Maker) -> Attack:
    """Parts stacked on an axis of one leaf, perhaps beside a stack of as many layers. If the name of the leaf does not
    tell the order of the parts, it is drawn."""
    d, f = m.width, m.other()
    layers = m.pick(0, 2, 2, 3)
    leaf, words, told = m.pick(
        ("gating_einsum", ("gate_proj", "up_proj"), True),
        ("kv", ("k_proj", "v_proj"), True),
        ("qkv", ("q_proj", "k_proj", "v_proj"), True),
        ("w", ("left", "right"), False),
        ("weights", ("alpha", "beta"), False),
        ("wi", ("gate", "value"), False),
    )
    order = list(words) if told or m.coin() else list(words)[::-1]
    axis = 0 if not layers else m.pick(1, 1, 0)  # the place of the parts, the layers on the other of the first two
    stacks: list[Array] = []
    for i in range(max(1, layers)):
        where = f"layers.{i}.mlp" if layers else "mlp"
        parts = {word: m.draw(f, d) for word in words}
        for word in words:
            m.give(f"{where}.{word}.weight", parts[word])
        stacks.append(np.stack([parts[word].T for word in order]))
    m.take(f"{'layers/' if layers else ''}mlp/{leaf}", stacks[0] if not layers else np.stack(stacks, 1 - axis))
    if layers:
        norms = [m.draw(d) for _ in range(layers)]
        for i, norm in enumerate(norms):
            m.give(f"layers.{i}.norm.weight", norm)
        m.take("layers/norm/scale", np.stack(norms, 1 - axis))  # one axis counts the layers of all leaves
    return m.attack("part-stacks")


def cycles(m: Maker) -> Attack:
    """Layers in a list, stacked by kind on the other side: every second, or the first half and the second. A module
    around the stacks is repeated itself, one inside them in each; with neither, nothing tells."""
    period, count = m.pick((2, 2), (2, 3), (3, 2))
    d, axis = m.width, m.pick(0, 0, 1)
    halves, place = m.coin(), m.pick("told", "told", "untold")
    name = m.pick("layers", "group", "part")
    before, behind = ("", "") if place == "untold" else ("", "layers/") if halves else ("layers/", "")
    names = ("fc", "proj")
    kernels = [{n: m.draw(d, d) for n in names} for _ in range(period * count)]
    for i, layer in enumerate(kernels):
        for n, w in layer.items():
            m.give(f"layers.{i}.{n}.weight", w)
    for j in range(period):
        mine = kernels[j * count : (j + 1) * count] if halves else kernels[j::period]
        for n in names:
            m.take(f"{before}{name}_{j}/{behind}{n}/kernel", np.stack([layer[n].T for layer in mine], axis))
    around(m, alike=False)  # two lists of one name are another attack
    return m.attack("cycles")


def dense_and_sparse(m: Maker) -> Attack:
    """Layers of two kinds in one list, stacked apart: the kinds alternate, or the first are dense."""
    d, n = m.width, m.pick(2, 3)
    alternate = m.coin()
    kinds = ["dense", "moe"] * n if alternate else ["dense"] * m.pick(1, 2) + ["moe"] * n
    stacks: dict[str, list[dict[str, Array]]] = {"dense": [], "moe": []}
    for i, kind in enumerate(kinds):
        layer = {"attn.q": m.draw(d, d), "attn.o": m.draw(d, d)}
        layer |= {"mlp.up": m.draw(2 * d, d)} if kind == "dense" else {"mlp.router": m.draw(4, d)}
        for name, w in layer.items():
            m.give(f"layers.{i}.{name}.weight", w)
        stacks[kind].append(layer)
    for kind, members in stacks.items():
        for name in members[0]:
            m.take(f"{kind}_layers/{name.replace('.', '/')}/kernel", np.stack([layer[name].T for layer in members]))
    return m.attack("dense-and-sparse")


def two_stacks_of_one_kind(m: Maker) -> Attack:
    """A list of like layers, cut into two stacks of the other side: nothing but the names tells where."""
    d = m.width
    first, second = m.pick((2, 2), (1, 2), (3, 2))
    names = m.pick(("lower", "upper"), ("dense_layers", "moe_layers"), ("alpha", "beta"), ("layers", "extra_layers"))
    flip = names == ("alpha", "beta") and m.coin()
    kernels = [m.draw(d, d) for _ in range(first + second)]
    for i, w in enumerate(kernels):
        m.give(f"layers.{i}.fc.weight", w)
    cut = (kernels[first:], kernels[:first]) if flip else (kernels[:first], kernels[first:])
    for name, members in zip(names, cut, strict=True):
        m.take(f"{name}/fc/kernel", np.stack([w.T for w in members]))
    return m.attack("two-stacks")


def stages(m: Maker) -> Attack:
    """Blocks in stages on one side, counted through on the other."""
    d = m.width
    sizes = m.pick((2, 2), (1, 3), (2, 1, 2))
    n = 0
    state = m.rng.getstate()
    for s, size in enumerate(sizes):
        for j in range(size):
            m.rng.setstate(state)
            block(m, f"stages.{s}.blocks.{j}", f"Block_{n}", 1.0, attention=False)
            n += 1
        if s + 1 < len(sizes) and m.width == d:
            m.dense(f"stages.{s}.down", f"down_{s}", d, d, bias=False)
    m.excused = "call order"
    return m.attack("stages")


def fused_experts(m: Maker) -> Attack:
    """Experts' gate and up in one tensor, in blocks or in every second column."""
    e, f, d = m.pick(2, 3, 4), m.other(), m.width
    gate, up = m.draw(e, f, d), m.draw(e, f, d)
    every_second = m.coin()
    joined = np.stack([gate, up], 2).reshape(e, 2 * f, d) if every_second else np.concatenate([gate, up], 1)
    across = m.coin()
    m.give("mlp.experts.gate_up_proj", joined.transpose(0, 2, 1) if across else joined)
    names = m.pick(("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("gate", "up"))
    for name, part in zip(names, (gate, up), strict=True):
        m.take(f"mlp/{name}", part.transpose(0, 2, 1))
    m.put("mlp.gate.weight", "mlp/router/kernel", e, d, form=lambda w: w.T)
    return m.attack("fused-experts")


def ties(m: Maker) -> Attack:
    """Two equal tensors in the source: a tied head, in some hidden by a stack of as many values."""
    v, d, n = m.pick(17, 24), m.width, m.pick(2, 3)
    table = m.draw(3 * d if m.coin(0.3) else v, d)
    m.give("embed_tokens.weight", table)
    m.give("lm_head.weight", table.copy())
    m.take("embed_tokens/embedding", table)
    if m.coin(0.4):
        m.take("lm_head/kernel", table.T)
    kernels = [m.draw(d, d) for _ in range(n)]
    for i, w in enumerate(kernels):
        m.give(f"layers.{i}.fc.weight", w)
    if m.coin():
        m.take("layers/fc/kernel", np.stack([w.T for w in kernels]))
    else:
        for i, w in enumerate(kernels):
            m.take(f"layers_{i}/fc/kernel", w.T)
    return m.attack("ties", back=False)


def untied(m: Maker) -> Attack:
    """A head and an embedding of one shape that are not tied; like has one of them."""
    v, d = 17, m.width
    v = d if m.coin(0.3) else v
    keep_head = m.coin()
    table, head = m.draw(v, d), m.draw(v, d)
    m.give("embed_tokens.weight", table)
    m.give("lm_head.weight", head)
    path, leaf = (
        m.pick(("embed", "embedding"), ("wte", "embedding"), ("table", "w"))
        if not keep_head
        else m.pick(("logits", "kernel"), ("lm_head", "kernel"), ("readout", "w"))
    )
    m.take(f"{path}/{leaf}", head.T if keep_head else table)
    m.options = {"unused": "drop"}
    blocks(m, m.pick(0, 1), 1.0)
    return m.attack("untied", back=False)


def equal_constants(m: Maker) -> Attack:
    """Constants that are equal in several layers, beside strangers: they are no tie, and no proof."""
    d = m.width
    ones, zeros = np.ones(d, "f4"), np.zeros(d, "f4")
    for name in ("norm1", "norm2", "extra_norm"):
        m.give(f"{name}.weight", ones.copy())
        m.give(f"{name}.bias", zeros.copy())
        if name != "extra_norm":
            m.take(f"{name}/scale", ones)
            m.take(f"{name}/bias", zeros)
    m.take("pooled/scale", m.draw(d))
    m.drop("pooled/scale")
    m.dense("fc", "fc", d, d)
    m.options = m.pick({}, {"unused": "drop"})
    return m.attack("equal-constants", back=False)


def buffers(m: Maker) -> Attack:
    """A buffer of equal values in every layer, without a use in Flax; in some a leaf of its shape waits there."""
    n, d = m.pick(2, 3), m.width
    name, buffer = m.pick(
        ("attn.relative_position_index", np.arange(16).reshape(4, 4)),
        ("attn.bias", np.tril(np.ones((8, 8), "f4"))[None, None]),
        ("attn.masked_bias", np.float32(-10000)),
        ("rotary_emb.inv_freq", np.geomspace(1, 0.01, 4).astype("f4")),
        ("position_ids", np.arange(9)[None]),
    )
    for i in range(n):
        m.give(f"blocks.{i}.{name}", buffer.copy())
        m.dense(f"blocks.{i}.attn.qkv", f"blocks_{i}/attn/qkv", 3 * d, d, bias=False)
    if m.coin(0.4) and buffer.ndim:
        path = m.pick("rel_table/w", "blocks_0/attn/table", "freqs")
        m.take(path, m.draw(*buffer.shape))
        m.drop(path)
    return m.attack("buffers", back=False)


def cells(m: Maker) -> Attack:
    """A hand-written cell's fused gates against another one of the same name: the order of gates is drawn."""
    d, h = m.width, m.width
    gates = list("ifgo")
    parts = {g: m.draw(h, d) for g in gates}
    order = m.pick(gates, ["i", "g", "f", "o"], ["i", "f", "o", "g"])
    m.give("cell.gates.weight", np.concatenate([parts[g] for g in gates]))
    if m.coin():
        m.take("cell/gates/kernel", np.concatenate([parts[g] for g in order]).T)
        m.excused = "order|fused|parts|gate"
    else:
        for g, name in zip(order, m.pick(("a", "b", "c", "d"), ("gate_0", "gate_1", "gate_2", "gate_3")), strict=True):
            m.take(f"cell/{name}/kernel", parts[g].T)
    around(m)
    return m.attack("cells")


KINDS = (
    *(fused_into_parts, fused_unnamed, fused_both_sides, fused_one_name, part_stacks, cycles, dense_and_sparse),
    *(two_stacks_of_one_kind, stages, fused_experts, ties, untied, equal_constants, buffers, cells),
)
