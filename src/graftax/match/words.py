"""The words that neural-network code uses, as data: synonyms, words that exclude each other, and how much a word says.

No name of a model or of a family of models is here: only words for parts, as they occur across the field. Synonyms
share a *concept*. A word that is not in the table is its own concept and counts as telling.
"""

from __future__ import annotations

from itertools import permutations

SYNONYMS: dict[str, str] = {
    # attention
    "q": "q query queries wq qproj querys qry qlin qlinear queryproj qs",
    "k": "k key keys wk kproj klin klinear keyproj ks",
    "v": "v value values wv vproj val vlin vlinear valueproj vs vals",
    "qkv": "qkv wqkv inproj qkvproj toqkv qvk kqv kvq vqk vkq",
    "kv": "kv wkv vk",
    "o": "o oproj outproj attnout",
    "attn": "attn attention att attentions mha msa mhsa selfattn attns"
    " attentive multihead multiheadattention mhattn atten sdpa",
    "self attn": "selfattention sa slfattn sattn selfatt",
    "self": "self slf own",
    "cross attn": "crossattention crossattn ca xattn encdecattention crossatt encdecattn encattn xatt",
    "cross": "cross encdec inter",
    # feed-forward
    "mlp": "positionwise mlp moe ffn ff feedforward ffw fforward mlps ffns ffnn ffwd feedfwd",
    "up in": "up wi intermediate fcin inner expand upproj win expansion widen uplin",
    "down out": "down downproj contract contraction shrink narrow downlin",
    "gate up": "gateup upgate",
    "gate": "gate gating wg gateproj gates glu",
    "in": "in input inp inputs",
    "out": "out output outputs wo",
    "expert": "expert experts",
    "router": "router routing routers dispatcher",
    # norms
    "norm": "normalizer nrm layernorms scalenorm normlayer lnlayer bnlayer"
    " normaliser bnorm batchnormalization layernormalization"
    " norm ln layernorm layrnorm lnorm bn batchnorm gn groupnorm rmsnorm rms normalization normalisation norms"
    " instancenorm normalize",
    # embeddings
    "embed": "embs embd embedd embeding embed embedding embeddings embedder emb embeds embeder encoding encodings",
    "tok": "subword subwords tok token tokens word words vocab vocabulary tokenizer",
    "tok embed": "lookup wte tokenembedder tokemb tokenemb wordemb wordembeddings tokembed vocabembed",
    "pos embed": "wpe posembed posemb posencoding positionalencoding posenc",
    "pos": "pos position positions positional posit posn",
    "seg": "segment seg segments",
    "hidden": "hidden hid",
    "transform": "transform transformation",
    "mu": "mu mean means",
    "logvar": "logvar logsigma",
    "cls": "cls clstoken",
    "patch": "patch patches patchify patchembed",
    "mask": "mask masked",
    "squeeze": "squeeze",
    "excite": "excite excitation",
    "channel": "channel channels chan",
    # order and place
    "pre": "pre before",
    "post": "post after",
    "final": "final last closing fin",
    "first": "first init initial",
    "enc": "encoder enc encoders",
    "dec": "decoder dec decoders",
    "vision": "vision visual image img images",
    "text": "text language txt lang textual",
    "audio": "audio speech sound",
    "rel": "relative rel relpos",
    "causal": "causal",
    "abs": "absolute abs",
    "time": "time timestep timesteps",
    "left": "left lhs",
    "right": "right rhs",
    "fwd": "forward fwd",
    "bwd": "backward bwd reverse",
    # ends
    "head": "readout predictor unembed unembedding tologits outputhead clshead"
    " head classifier heads logits cls_head lmhead score classify classification clf",
    "pool": "aggregate aggregator pool pooler pooling pooled",
    "shortcut": "shortcut downsample skip residual identity bypass skipconn resproj",
    "stem": "stem root",
    "proj": "proj projection project projector projections projected prj",
    "linear": "linear lin fc dense einsum densegeneral fullyconnected affine linears matmul gemm innerproduct",
    "conv": "cv convlayer convolve conv convolution conv1d conv2d conv3d convolutional convs cnn",
    "deconv": "deconv convtranspose transposedconv upconv tconv convtranspose2d convtranspose1d deconvolution"
    " convtransposed",
    "depthwise": "depthwise dw dwconv",
    "pointwise": "pointwise pw pwconv",
    "layer": "layer layers block blocks blk blks lyr lyrs resblock resblocks resblk resnets resunit unit units"
    " basicblock bottleneck h"
    " transformerblock transformerlayer",
    "enc layer": "encoderblock encoderlayer encblock enclayer",
    "dec layer": "decoderblock decoderlayer decblock declayer",
    "stage": "stage stages level levels stg",
    "model": "model tower models transformer backbone module net network base trunk main body"
    " core features feature seq",
    "list": "list stack sequential items group groups modulelist",
    "scale": "scale scaling gamma",
    "shared": "shared share",
    "type": "type types",
    "table": "table",
    "weight": "weight kernel",
    "bias": "bias",
    "": "to of the",
}
"""Concepts (several, if separated by a blank) -> the words for them."""

PHRASES: dict[str, str] = {
    "layer norm": "norm",
    "batch norm": "norm",
    "group norm": "norm",
    "instance norm": "norm",
    "feed forward": "mlp",
    "multi headed attention": "attn",
    "position wise": "",
    "gated linear unit": "gate",
    "scale norm": "norm",
    "attn prenorm": "pre~attn norm",
    "mlp prenorm": "pre~mlp norm",
    "fully connected": "linear",
    "inner product": "linear",
    "class token": "cls tok",
    "class tok": "cls tok",
    "class embedding": "cls tok",
    "class embed": "cls tok",
    "w up": "up in",
    "w down": "down out",
    "w gate": "gate",
    "dense relu dense": "mlp",
    "token type": "seg",
    "c attn": "qkv attn",
    **{f"{word} {unit}": "layer" for word in ("residual", "res") for unit in ("block", "unit", "layer")},
    **{f"type {word}": "seg embed" for word in ("embedding", "embeddings", "embed", "emb")},
    **{
        f"{other} {word}": "cross attn"
        for other in ("encoder", "encoder decoder", "enc dec", "context", "source", "src", "memory")
        for word in ("attn", "attention")
    },
    **{f"w {part}": part for part in ("q", "k", "v", "o", "qkv", "kv")},
    **{" ".join(order): "qkv" for words in ("query key value", "q k v") for order in permutations(words.split())},
    **{" ".join(order): "kv" for words in ("key value", "k v") for order in permutations(words.split())},
    "c fc": "up in",
    "c proj": "proj",
    "ln f": "norm final",
    "norm f": "norm final",
    "final layer norm": "norm final",
    "fc in": "up in",
    "fc out": "out",
    "w in": "up in",
    "w out": "out",
    "dense h to 4h": "up in",
    "dense 4h to h": "down out",
    "h to 4h": "up in",
    "4h to h": "down out",
    "lm head": "head",
    "vocab proj": "head",
    "vocab projection": "head",
    "multi head": "attn",
    "conv transpose": "deconv",
    "conv trans": "deconv",
    "se reduce": "se squeeze",
    "se expand": "se excite",
    "pre head": "final",
    "transposed conv": "deconv",
    "conv transposed": "deconv",
    "depth wise": "depthwise",
    "point wise": "pointwise",
    "down sample": "shortcut",
    "basic block": "layer",
    "dot product": "",
    "attn vec": "attn o out",
    "attention vec": "attn o out",
}
"""Consecutive words -> concepts; the longest phrase is used."""

EXCLUSIVE: tuple[str, ...] = (
    "q k v qkv kv o",
    "up down gate",
    "self cross",
    "enc dec",
    "vision text audio",
    "pre post",
    "pos tok seg",
    "left right",
    "fwd bwd",
    "cls mask",
    "in out",
    "attn mlp",
    "first final",
    "mu var",
    "depthwise pointwise",
    "student teacher",
    "online target",
    "actor critic",
    "source target",
    "row col",
    "height width",
    "start end",
    "real imag",
    "mu logvar",
    "key receptance",
)
"""Concepts that exclude each other: two parts with different ones are not the same part."""

NUMBERED: tuple[tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]], ...] = (
    (("wi", "w"), (0, 1), ("gate", "up")),
    (("w",), (1, 2, 3), ("gate", "down", "up")),
    (("w",), (1, 2, 3), ("gate", "up", "down")),
)
"""(word, the numbers of all siblings, what they mean): a gated feed-forward part numbers its matrices."""

FIRST_SECOND: frozenset[str] = frozenset(["fc", "linear", "lin", "dense", "ff", "w"])
"""Words that name the two matrices of a feed-forward part if they are numbered 1 and 2 inside a block."""

IN_BLOCK: dict[tuple[str, ...], str] = {
    order: "shortcut" for kind in ("conv", "norm", "bn") for order in permutations((kind, "proj"))
}
"""What words mean if they are the whole path inside a block: the projection beside the convolutions."""

ALONE: dict[str, str] = {"shared": "tok embed", "output": "head", "out": "head", "unembed": "head"}
"""What a word means if it is the whole path: the table that encoder and decoder share, the last projection."""

IMPLIES: dict[str, str] = {"q": "attn", "k": "attn", "v": "attn", "qkv": "attn", "o": "attn out", "kv": "attn",
                           "up": "mlp", "down": "mlp out", "gate": "mlp", "self": "attn", "cross": "attn"}  # fmt: skip
"""What a concept says about the part around it."""

SAYS: dict[float, str] = {
    0.15: "norm linear conv proj layer stage model list weight bias scale table embed type deconv",
    0.5: "attn mlp enc dec in out self shared causal hidden transform",
}
"""How much a word says, if it is no telling one. Words for kinds of layers and for wrappers tell a norm from a Linear,
but not one Linear from another; other words are for the part around a leaf."""

WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_module"))
"""Path parts that torch.compile, FSDP and the like insert; they are no part of a name."""

COLLECTIONS = frozenset(("params", "batch_stats", "buffers", "cache_params", "params_axes", "ema_params", "state"))
"""First parts of a Linen path that name a collection, not a module."""

BUFFERS: dict[str, str] = {
    "num_batches_tracked": "batch counter, no effect in evaluation",
    "position_ids": "0..n-1, recomputed",
    "token_type_ids": "zeros, recomputed",
    "inv_freq": "rotary frequencies, recomputed",
    "original_inv_freq": "rotary frequencies, recomputed",
    "masked_bias": "constant of a causal mask",
    "relative_position_index": "index table, recomputed",
    "attn_mask": "mask, recomputed",
    "causal_mask": "mask, recomputed",
    "tril": "mask, recomputed",
    "rotary_pos_emb": "rotary table, recomputed",
    "cos_cached": "rotary table, recomputed",
    "relative_coords_table": "index table, recomputed",
    "total_ops": "a profiler's counter",
    "total_params": "a profiler's counter",
    "_extra_state": "state of the training engine",
    "n_averaged": "counter of averaged steps",
}
"""Last part of a torch key that is a known buffer -> why it needs no target."""
