"""Attacks by names: crossed orders, strangers of one shape, twins, norms before and behind, renamed modules."""

from __future__ import annotations

from attacks.pairs import ATTENTIONS, Attack, Maker, around, block, blocks, linear


def counted_calls(m: Maker) -> Attack:
    """torch names its layers by place, Flax by calls, in the same order or in another. Nothing shows which."""
    n, d = m.pick(3, 4, 5), m.width
    torch = m.pick("up{}", "layer{}", "fc{}", "deconv{}", "block.{}")
    start = m.pick(0, 1)
    order = list(range(n))
    if m.coin(0.7):
        order = order[::-1] if m.coin() else m.rng.sample(order, n)
    kind = m.pick("Dense", "Conv")
    shape = (d, d) if kind == "Dense" else (d, d, 3, 3)
    for j, i in enumerate(order):
        name = torch.format(i + start)
        (m.dense if kind == "Dense" else m.convolution)(name, f"{kind}_{j}", *shape)
    m.excused = "call order"
    return m.attack("counted-calls")


def crossed_ends(m: Maker) -> Attack:
    """Numbers run against each other: the first and last shapes show it, those between are equal."""
    d, n = m.width, m.pick(2, 3)
    sizes = [5, *[d] * (n + 1), 7]
    torch = m.pick("stage{}", "up{}", "layers.{}", "net.{}")
    flax = m.pick("stage_{}", "up_{}", "layers_{}", "Dense_{}")
    for i in range(len(sizes) - 1):
        m.dense(torch.format(i), flax.format(len(sizes) - 2 - i), sizes[i + 1], sizes[i])
    m.excused = "call order" if flax == "Dense_{}" else ""
    return m.attack("crossed-ends")


def one_more(m: Maker) -> Attack:
    """One side has a layer more, counted alike: equal numbers belong together, and nothing fills the rest."""
    n, d = m.pick(2, 3), m.width
    torch, flax = m.pick(
        ("enc.{}", "enc/{}"), ("layers.{}.fc", "layers_{}/fc"), ("blocks.{}.mlp.fc1", "blocks_{}/mlp/fc1")
    )
    more = m.coin()
    for i in range(n):
        m.dense(torch.format(i), flax.format(i), d, d, bias=False)
    if more:
        m.take(f"{flax.format(n)}/kernel", m.draw(d, d))
        m.drop(f"{flax.format(n)}/kernel")
    else:
        m.give(f"{torch.format(n)}.weight", m.draw(d, d))
    m.options = {"unused": "drop"} | ({"missing": "zeros"} if m.coin(0.7) else {})
    around(m, alike=False)  # two lists of one name are another attack
    return m.attack("one-more", back=False)


STRANGERS_T = (
    "mask_proj",
    "teacher_head",
    "time_mlp",
    "style_proj",
    "depth_head",
    "aux",
    "momentum.fc",
    "noise_net",
    "rnd",
)
STRANGERS_F = (
    "text_proj",
    "value_head",
    "speaker_dense",
    "tail",
    "critic",
    "gate_net",
    "audio_in",
    "calibration",
    "dual",
)


def strangers(m: Maker) -> Attack:
    """Each side has a layer that the other has not, and both are of one shape."""
    d, kind = m.width, m.pick("linear", "linear", "norm", "vector", "table", "conv")
    one, other = m.pick(*STRANGERS_T), m.pick(*STRANGERS_F)
    where_t, where_f = m.pick(("", ""), ("", ""), ("blocks.0.", "blocks_0/"), ("model.", "model/"))
    shapes = {
        "linear": ((d, d), (d,)),
        "norm": ((d,), (d,)),
        "vector": ((d,),),
        "table": ((17, d),),
        "conv": ((d, d, 3, 3), (d,)),
    }
    leaves = {
        "linear": (("weight", "kernel"), ("bias", "bias")),
        "norm": (("weight", "scale"), ("bias", "bias")),
        "vector": ((m.pick("gamma", "token"), m.pick("alpha", "query")),),
        "table": (("weight", "embedding"),),
        "conv": (("weight", "kernel"), ("bias", "bias")),
    }[kind]
    known = m.coin()
    if known:
        block(m, f"{where_t}a", f"{where_f}a", 1.0)
    for (leaf, path), shape in zip(leaves, shapes[kind], strict=True):
        array = m.draw(*shape)
        m.give(f"{where_t}{one}.{leaf}", array)
        m.take(f"{where_f}{other}/{path}", m.draw(*((3, 3, d, d) if len(shape) == 4 else shape)))
        m.drop(f"{where_f}{other}/{path}")
    m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop", "missing": "zeros"}, {"missing": "zeros"})
    if not known or m.coin():
        around(m)
    return m.attack("strangers", back=False)


def strangers_in_layers(m: Maker) -> Attack:
    """In every layer each side has a norm or a projection of its own."""
    d, n = m.width, m.pick(1, 2, 3)
    pairs = blocks(m, n, m.pick(0.5, 1.0))
    one, other = m.pick(
        ("cross_norm", "conv_norm"),
        ("time_proj", "gate_w"),
        ("adapter.down", "lora_mix"),
        ("ls1", "bridge"),
        ("attn.q_norm", "ffn_scale"),
    )
    vector = "norm" in one or one == "ls1"
    shape = (d,) if vector else (d, d)
    for torch, flax in pairs:
        m.give(f"{torch}.{one}.weight", m.draw(*shape))
        path = f"{flax}/{other}/{'scale' if vector else 'kernel'}"
        m.take(path, m.draw(*shape))
        m.drop(path)
    m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop", "missing": "zeros"})
    return m.attack("strangers-in-layers", back=False)


def nameless_twins(m: Maker) -> Attack:
    """Two or three modules of one shape whose names say nothing: the truth is drawn."""
    n, d = m.pick(2, 2, 3), m.width
    words = m.rng.sample(
        ("alpha", "beta", "gamma", "one", "two", "left", "right", "foo", "bar", "xa", "xb", "red", "blue"), 2 * n
    )
    where = m.pick(("", ""), ("net.", "net/"), ("layers.0.", "layers_0/"))
    layer = m.pick("dense", "norm", "block")
    for one, other in zip(words[:n], m.rng.sample(words[n:], n), strict=True):
        torch, flax = f"{where[0]}{one}", f"{where[1]}{other}"
        if layer == "dense":
            m.dense(torch, flax, d, d, bias=m.torch.keys().isdisjoint({f"{torch}.bias"}))
        elif layer == "norm":
            m.norm(torch, flax, d, bias=True)
        else:
            block(m, torch, flax, 1.0, mlp=False)
    if layer != "block":
        around(m)
    return m.attack("nameless-twins")


TOWERS = (
    (("encoder", "decoder"), ("enc", "dec")),
    (("encoder", "decoder"), ("Encoder_0", "Decoder_0")),
    (("text_model", "vision_model"), ("text", "visual")),
    (("encoder", "decoder"), ("encoder", "decoder")),
    (("actor", "critic"), ("actor", "critic")),
    (("generator", "discriminator"), ("gen", "disc")),
    (("src_net", "tgt_net"), ("src", "tgt")),
    (("policy", "value"), ("value", "policy")),
)


def twin_towers(m: Maker) -> Attack:
    """Two stacks of one shape, such as an encoder and a decoder; the names of one side stand in another order."""
    (one, other), there = m.pick(*TOWERS)
    if (one, other) == there[::-1]:
        there = there[::-1]
    n, list_, tree = (
        m.pick(1, 2, 3),
        m.pick("layers.{}", "blocks.{}", "h.{}"),
        m.pick("layers_{}", "block_{}", "layers/{}"),
    )
    state = m.rng.getstate()
    towers = [(one, there[0]), (other, there[1])]
    for torch, flax in towers:
        for i in range(n):
            m.rng.setstate(state)
            block(m, f"{torch}.{list_.format(i)}", f"{flax}/{tree.format(i)}", m.pick(0.5, 1.0), mlp=m.coin())
        if m.coin():
            m.norm(f"{torch}.norm", f"{flax}/norm", m.width)
    if m.coin():
        m.flax = dict(sorted(m.flax.items(), reverse=True))
    return m.attack("twin-towers")


def one_list_two_towers(m: Maker) -> Attack:
    """One list of layers on one side, two stacks on the other."""
    n, d = m.pick(1, 2), m.width
    torch = m.pick("layers.{}", "stack.{}")
    names = m.pick(("encoder", "decoder"), ("bottom", "top"), ("first", "second"))
    state = m.rng.getstate()
    for i in range(2 * n):
        m.rng.setstate(state)
        block(m, torch.format(i), f"{names[i // n]}/layers_{i % n}", 1.0, mlp=False)
    m.dense("head", "head", 5, d)
    return m.attack("one-list-two-towers")


def self_and_cross(m: Maker) -> Attack:
    """A decoder layer with two attentions of one shape, by words of two vocabularies."""
    d = m.width
    torch = m.pick(
        ("self_attn", "encoder_attn"),
        ("self_attn", "multihead_attn"),
        ("attn1", "attn2"),
        ("self_attention", "cross_attention"),
    )
    flax = m.pick(
        ("self_attention", "cross_attention"), ("self_attn", "cross_attn"), ("self_attn", "encoder_decoder_attention")
    )
    if torch == ("attn1", "attn2"):
        flax = ("attn1", "attn2")
    flip = m.coin()
    for i in range(m.pick(1, 2)):
        where = list(zip(torch, flax, strict=True))
        for one, other in reversed(where) if flip else where:
            for a, b in zip(ATTENTIONS[0], ATTENTIONS[1], strict=True):
                m.dense(f"decoder.layers.{i}.{one}.{a}", f"decoder/layers_{i}/{other}/{b}", d, d)
        words = m.pick(
            ("norm1", "norm2", "norm3"), ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
        )
        there = words if m.coin() else ("ln_self", "ln_cross", "ln_mlp")
        for a, b in zip(words, there, strict=True):
            m.norm(f"decoder.layers.{i}.{a}", f"decoder/layers_{i}/{b}", d, True)
        m.dense(f"decoder.layers.{i}.fc1", f"decoder/layers_{i}/fc1", 2 * d, d)
    return m.attack("self-and-cross")


NORM_SETS = (
    (("input_layernorm", "post_attention_layernorm"), ("pre_attention_norm", "pre_ffw_norm")),
    (("input_layernorm", "post_attention_layernorm"), ("attention_norm", "ffn_norm")),
    (("norm1", "norm2"), ("pre_attn_norm", "pre_mlp_norm")),
    (("post_attention_layernorm", "post_feedforward_layernorm"), ("post_attention_norm", "post_ffw_norm")),
    (
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"),
    ),
    (
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm", "post_ffw_norm"),
    ),
    (("attention_layernorm", "output_layernorm"), ("attention_layernorm", "output_layernorm")),
    (
        ("attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm"),
        ("pre_attn_norm", "pre_mlp_norm", "post_attn_norm", "post_mlp_norm"),
    ),
    (("q_norm", "k_norm"), ("query_norm", "key_norm")),
    (("norm1", "norm2", "norm3"), ("ln_self_attn", "ln_cross_attn", "ln_mlp")),
)


def norms_by_place(m: Maker) -> Attack:
    """Norms before and behind attention and MLP, whose words differ on the two sides."""
    one, other = m.pick(*NORM_SETS)
    d = m.width
    for i in range(m.pick(1, 2)):
        rows_ = list(zip(one, other, strict=True))
        m.rng.shuffle(rows_)
        for a, b in rows_:
            m.norm(f"layers.{i}.{a}", f"layers_{i}/{b}", d)
        for a, b in zip(ATTENTIONS[0], ATTENTIONS[1], strict=True):
            m.dense(f"layers.{i}.self_attn.{a}", f"layers_{i}/attn/{b}", d, d, False)
        m.dense(f"layers.{i}.mlp.up_proj", f"layers_{i}/mlp/up", 2 * d, d, False)
    return m.attack("norms-by-place")


def norm_strangers(m: Maker) -> Attack:
    """Each side has a norm of its own place: one behind attention, the other before the MLP's output, of one width."""
    d = m.width
    one, other = m.pick(
        ("post_mlp_norm", "pre_attention_norm"),
        ("norm_post", "norm_pre"),
        ("attn.out_norm", "mlp/in_norm"),
        ("q_norm", "out_norm"),
        ("enc_norm", "dec_norm"),
    )
    for i in range(m.pick(1, 2)):
        m.norm(f"layers.{i}.mid_norm", f"layers_{i}/mid_norm", d)
        for a, b in zip(ATTENTIONS[0], ATTENTIONS[0], strict=True):
            m.dense(f"layers.{i}.attn.{a}", f"layers_{i}/attn/{b}", d, d, False)
        m.give(f"layers.{i}.{one}.weight", m.draw(d))
        path = f"layers_{i}/{other}/scale"
        m.take(path, m.draw(d))
        m.drop(path)
    m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop", "missing": "zeros"})
    return m.attack("norm-strangers", back=False)


def words_against_numbers(m: Maker) -> Attack:
    """Words say one order, numbers another: head_a is head_1 by place, but the widths of its partner say else."""
    d, k = m.width, m.pick(3, 5)
    torch = ("branch_a", "branch_b")
    flax = m.pick(("branch_0", "branch_1"), ("branch_x", "branch_y"), ("Branch_0", "Branch_1"))
    wide, narrow = k + 6, k + 2
    crossed = m.coin()
    for i, (one, inner) in enumerate(zip(torch, (wide, narrow), strict=True)):
        other = flax[1 - i] if crossed else flax[i]
        m.dense(f"{one}.in_", f"{other}/in_", d, d, bias=False)
        m.dense(f"{one}.mid", f"{other}/mid", inner, d, bias=False)
        m.dense(f"{one}.out", f"{other}/out", d, inner, bias=False)
    around(m)
    return m.attack("words-against-numbers")


def crossed_in_scope(m: Maker) -> Attack:
    """Two parts of a module, equal in shape, whose words are the same on both sides but stand at other depths."""
    d = m.width
    a, b = m.pick(("first", "second"), ("main", "side"), ("local", "global"), ("slow", "fast"))
    for leaf in ("fc", "proj"):
        for part in (a, b):
            m.put(f"{part}.net.{leaf}.weight", f"net/{part}/{leaf}/kernel", d, d, form=linear)
    around(m)
    return m.attack("crossed-in-scope")


def swapped_roles(m: Maker) -> Attack:
    """Words that many take for one another name other things: gates and outputs, keys of numbers and of letters."""
    d = m.width
    one, other = m.pick(
        (("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj")),
        (("wi_0", "wi_1", "wo"), ("gate_proj", "up_proj", "down_proj")),
        (("c_fc", "c_proj"), ("up", "down")),
        (("lin_gate", "lin_value"), ("gate", "value")),
        (("in_proj", "out_proj"), ("in_proj", "out_proj")),
        (("key", "value", "receptance"), ("key", "value", "receptance")),
    )
    rows_ = list(zip(one, other, strict=True))
    m.rng.shuffle(rows_)
    for a, b in rows_:
        m.dense(f"mlp.{a}", f"mlp/{b}", d, d, bias=False)
    around(m)
    return m.attack("swapped-roles")


def renamed_parts(m: Maker) -> Attack:
    """Parts whose names share no word, but one leaf of another shape does. What lies beside it has equal names, other
    names, or belongs elsewhere; one part may have twins, of which this leaf does not tell which is which."""
    d, k = m.width, m.pick(3, 5)
    one, other = m.pick(("temporal_block", "recurrent_block"), ("core", "u"), ("summary", "pooled"), ("mixer", "zt"))
    top = m.pick("", "", "layers.0.", "layers.1.")
    path = top.replace(".", "/")
    anchor = m.pick("gain", "decay_rate", "lambda_param", "codebook")
    m.put(f"{top}{one}.{anchor}.weight", f"{path}{other}/{anchor}/kernel", k, d, form=linear)
    inner = m.pick(("x", "y", "out"), ("fc1", "fc2"), ("proj",), ("linear_x", "linear_y"), ("left", "right"))
    for word in inner:
        m.dense(f"{top}{one}.{word}", f"{path}{other}/{word}", d, d)
    if m.coin(0.4):  # a stranger on each side
        a, b = m.pick(("adapter", "bridge"), ("lora", "tap"), ("side.fc", "aux/fc"), ("gate", "mask"))
        m.give(f"{top}{one}.{a}.weight", m.draw(d, d))
        m.take(f"{path}{other}/{b}/kernel", m.draw(d, d))
        m.drop(f"{path}{other}/{b}/kernel")
        m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop", "missing": "zeros"})
    elif m.coin(0.6) and inner != ("left", "right"):  # twins: the leaf may lie in either of two parts
        twin, its = m.pick(("spatial_block", "static_block"), ("side", "w"), ("detail", "full"), ("frame", "yq"))
        crossed = m.coin()
        for word in inner:
            held = {name: m.torch.pop(name) for name in [*m.torch] if crossed and f"{one}.{word}." in name}
            m.torch |= {name.replace(one, twin): array for name, array in held.items()}
            m.dense(f"{top}{one if held else twin}.{word}", f"{path}{its}/{word}", d, d)
    around(m)
    return m.attack("renamed-parts", back=False if m.gone else None)


def words_for_words(m: Maker) -> Attack:
    """Two sides that use other words for the same things, each always the same word; and a word more."""
    d, k = m.width, m.pick(3, 5)
    rows_ = [("alpha", "p"), ("beta", "r"), ("recurrent", "a"), ("forget", "f"), ("slow", "upper"), ("rho", "tau")]
    m.rng.shuffle(rows_)
    (one, other), (two_, its), (three, last_) = rows_[:3]
    m.put(f"cell.{one}_table.weight", f"cell/{other}_table/kernel", k, d, form=linear)
    m.dense(f"cell.{one}_proj", f"cell/{other}_proj", d, d)
    if m.coin(0.7):
        m.dense(f"cell.{two_}_proj", f"cell/{its}_proj", d, d)
    if m.coin(0.4):
        m.give(f"cell.{three}_proj.weight", m.draw(d, d))
        m.take(f"cell/{last_}_proj/kernel", m.draw(d, d))
        m.drop(f"cell/{last_}_proj/kernel")
        m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop", "missing": "zeros"})
    around(m)
    return m.attack("words-for-words", back=False if m.gone else None)


def ends_of_a_model(m: Maker) -> Attack:
    """The last norm, in the head on one side and outside of it on the other; or each side has another norm."""
    d = m.width
    last_ = ("norm", "final_norm", "post_layernorm", "head.norm", "encoder_norm", "ln_f", "head.LayerNorm_0", "ln_post")
    first = ("embed_norm", "pre_layernorm", "stem.norm", "patch_embed.norm", "ln_pre", "input_norm", "norm_adapter")
    for i in range(2):
        block(m, f"blocks.{i}", f"Block_{i}")
    m.dense("head.fc" if m.coin() else "classifier", m.pick("head/fc", "classifier", "Head_0/Dense_0"), m.other(), d)
    norms = [(m.rng.choice(last_), m.rng.choice(last_))]
    if m.coin():
        norms.append((m.rng.choice(first), m.rng.choice(first)))
    for one, other in norms:
        m.norm(one, other.replace(".", "/"), d, True)
    if len(norms) == 1 and m.coin(0.4):  # each side lacks one of the two
        torch, flax = norms[0]
        other = m.rng.choice(first)
        for leaf, to in (("weight", "scale"), ("bias", "bias")):
            del m.torch[f"{torch}.{leaf}"]
            m.give(f"{other}.{leaf}", m.draw(d))
            m.drop(f"{flax.replace('.', '/')}/{to}")
        m.options = m.pick({}, {"unused": "drop"}, {"unused": "drop", "missing": "zeros"})
    return m.attack("ends-of-a-model", back=False if m.gone else None)


KINDS = (
    *(counted_calls, crossed_ends, one_more, strangers, strangers_in_layers, nameless_twins, twin_towers),
    *(one_list_two_towers, self_and_cross, norms_by_place, norm_strangers, words_against_numbers, crossed_in_scope),
    *(swapped_roles, renamed_parts, words_for_words, ends_of_a_model),
)
