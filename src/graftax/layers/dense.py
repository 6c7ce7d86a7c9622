"""Rows for dense layers: Linear, its head-split and flattened forms, 1x1 convolutions, HF Conv1D, Embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations

from graftax.layers.base import BIAS, Layer, LayerFacts, LayerForm, LeafAxes, Makes, Refusal, Setting, Step, kernel_form
from graftax.layers.leaf_axes import EMBED_AXES, LINEAR_AXES, einsum_letters, several
from graftax.layers.patterns import fitted
from graftax.ops import Rearrange, groups_text, parse_pattern

_LETTERS = "abcdefgh"


def split_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """Head splits and merges of a Linear with a kernel of rank 3 or more."""
    weight, kernel, bias = facts.torch.get("weight", ()), facts.flax.get("kernel", ()), facts.flax.get("bias", ())
    if not weight and not kernel and len(bias) > 1:
        names = " ".join(_LETTERS[: len(bias)])
        ops = (Rearrange(f"({names}) -> {names}", tuple(zip(names.split(), bias, strict=True))),)
        yield LayerForm("linear, split", (Step("bias", "bias", ops),), "linear", why="the bias is split into heads")
    if len(weight) != 2 or not 3 <= len(kernel) <= len(_LETTERS):
        return
    for variant, pattern, why, settled in _splits(facts, len(kernel)):
        for ops in fitted(weight, kernel, pattern).values():
            out = parse_pattern(pattern)[0][0]
            split = tuple(zip(out, bias, strict=False))
            of_bias = (Rearrange(f"({' '.join(out)}) -> {' '.join(out)}", split),) if len(bias) > 1 else ()
            steps = (Step("weight", "kernel", ops), Step("bias", "bias", of_bias, optional=True))
            yield LayerForm(variant, steps, "linear", rule=f'ops = "{pattern}"', why=why, settled=settled)


def _splits(facts: LayerFacts, rank: int) -> Iterator[tuple[str, str, str, bool]]:
    """(variant, pattern, why, True if a live module settles it): what an Einsum's equation states; else (in..., out...)
    for every number of inputs, and (heads, in, head) as an Einsum may have it."""
    if facts.flax_kind == "Einsum" and "einsum_str" in facts.flax_settings:
        yield from _of_einsum(str(facts.flax_settings["einsum_str"]))
        return
    axis = facts.flax_settings.get("axis") if facts.flax_kind in ("DenseGeneral", "LinearGeneral") else None
    summed = len(several(axis)) if axis is not None else None
    for k in (summed,) if summed else range(1, rank):
        letters = {(3, 1): "ihd", (3, 2): "hdo"}.get((rank, k), _LETTERS[:rank])
        merged = "in merges heads" if k == rank - 1 else "in and out are split"
        what = "out is split into heads" if k == 1 else merged
        variant = {(3, 1): "linear, out split", (3, 2): "linear, in merged"}.get((rank, k), "linear, split")
        # A kernel of four axes may be a convolution's window: the columns then run over (c h w) or over (h w c).
        sure = summed is not None or rank == 3
        why = f"a weight (out, in) becomes (in..., out...): {what}"
        yield variant, _pattern(letters, letters[:k], letters[k:]), why, sure
    if not summed and rank == 3:
        yield "linear, heads first", _pattern("hid", "i", "hd"), "a weight (out, in) becomes (heads, in, head)", True


def _pattern(letters: str, into: str, out: str) -> str:
    """The pattern from a torch weight (out..., in...) to a kernel with the axes `letters`. `into` and `out` name the
    contracted and the produced axes, in the order of the flat features: 'ndh', 'd', 'nh' give '(n h) d -> n d h'."""
    return f"{groups_text((out, into))} -> {' '.join(letters)}"


def _of_einsum(text: str) -> Iterator[tuple[str, str, str, bool]]:
    """Letters of the kernel that the result lacks are contracted, in the order of the input; the others are produced,
    in the order of the result. No Linear exists for a letter in all three."""
    right, into, out = einsum_letters(text)
    if sorted(into + out) == sorted(right) and into and out:
        parts = (right, into, out)
        plain = tuple(part.lower() for part in parts)
        named = plain if len(set(plain[0])) == len(right) else parts
        yield "einsum", _pattern(*named), f"the einsum {text} states the axes", True


def bias_form(facts: LayerFacts) -> Iterable[LayerForm]:
    """A bias alone."""
    if set(facts.torch) == {"bias"}:
        yield LayerForm("bias", (Step("bias", "bias"),), why="a bias stays as it is")


LONE_BIAS = Makes(bias_form, ())


def _has_weight(facts: LayerFacts) -> bool:
    return "weight" in facts.torch


_CONVENTION = "by convention, a torch weight of rank 2 that becomes a kernel is a Linear, transposed"
LINEAR_FORM = kernel_form("linear", "o i -> i o", "linear", _CONVENTION, holds=_has_weight)


def pointwise_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """A Linear that becomes a convolution of extent 1, or the other way around."""
    weight, kernel = facts.torch.get("weight", ()), facts.flax.get("kernel", ())
    rank = max(len(weight), len(kernel)) - 2
    variant, layout = f"linear to {rank}d 1x1 kernel", "linear"
    why = "a torch weight of rank 2 becomes a kernel of extent 1, a Linear at every position"
    if len(weight) > 2:
        variant, layout = f"{rank}d 1x1 kernel to linear", "conv"
        why = "a torch weight of extent 1 becomes a kernel of rank 2, a Dense at every position"
    for ops in fitted(weight, kernel, "conv 1x1").values() if facts.torch_settings.get("groups", 1) == 1 else ():
        yield kernel_form(variant, ops, layout, why)


def bilinear_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """A torch weight (out, in1, in2) in a module of the user's own, which may put its axes in any order."""
    weight = facts.torch.get("weight", ())
    if facts.torch_kind != "Bilinear" or len(weight) != 3:
        return
    role, kernel = next(((r, shape) for r, shape in facts.flax.items() if len(shape) == 3), ("", ()))
    orders = [o for o in permutations("oij") if tuple(weight["oij".index(axis)] for axis in o) == kernel]
    orders.sort(key=lambda order: order != tuple("ijo"))
    for order in orders:
        pattern = f"o i j -> {' '.join(order)}"
        why = "only this order of axes fits" if len(orders) == 1 else f"the axes may be {' '.join(order)}"
        steps = (Step("weight", role, pattern), BIAS)
        yield LayerForm("bilinear", steps, rule=f'ops = "{pattern}"', by="shapes", why=why, settled=len(orders) == 1)


_BATCHED = Refusal(
    lambda f: bool(f.flax_settings.get("batch_dims") or f.flax_settings.get("batch_axis")) and bool(f.torch_kind),
    "a DenseGeneral with batch dimensions against a Linear",
    "its kernel has one matrix for every batch index, a Linear has one",
    "Stack as many torch weights as there are batch indices (a rule with `stack`).",
)

_MAX_NORM = Refusal(
    lambda f: f.torch_settings.get("max_norm") is not None and f.torch_kind.startswith("Embedding"),
    "Embedding(max_norm=...)",
    "torch rescales the rows in place while it looks them up; Flax has no such lookup",
    "Rescale the rows of the torch weight once (row / max(1, |row| / max_norm)) and set max_norm=None.",
)

DENSE_ROWS: tuple[Layer, ...] = (
    Layer(
        "Linear",
        torch=("Linear", "NonDynamicallyQuantizableLinear", "LazyLinear"),
        linen=("Dense", "DenseGeneral", "Einsum"),
        nnx=("Linear", "LinearGeneral", "Einsum"),
        forms=(
            LONE_BIAS,
            LINEAR_FORM,
            Makes(
                split_forms,
                (
                    "linear, out split: (h d) i -> i h d; bias (h d) -> h d",
                    "linear, in merged: o (h d) -> h d o",
                    "linear, heads first: (h d) i -> h i d; any Einsum by its own equation",
                ),
            ),
        ),
        refusals=(_BATCHED,),
        flax_decides=False,
        axes=LINEAR_AXES,
        note="weight (O, I), kernel (I, O). A square kernel left untransposed passes every shape check. DenseGeneral: "
        "split, transpose, then reshape. After a flatten of NCHW the columns must be permuted: `flatten`.",
    ),
    Layer(
        "Linear and 1x1 convolution",
        torch=("Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d"),
        linen=("Conv", "Dense"),
        nnx=("Conv", "Linear"),
        forms=(
            Makes(pointwise_forms, ("linear to 1x1 kernel: o i -> 1 1 i o", "1x1 kernel to linear: o i 1 1 -> i o")),
            LONE_BIAS,
        ),
        note="A Linear over the channels is a convolution of extent 1, and the other way around.",
    ),
    Layer(
        "HF Conv1D",
        torch=("Conv1D",),
        linen=("Dense",),
        nnx=("Linear",),
        forms=(
            kernel_form(
                "conv1d (in, out)",
                (),
                "identity",
                "the torch weight is stored (in, out) already",
                by="shapes",
                holds=lambda f: len(f.torch.get("weight", ())) == 2,
            ),
            LONE_BIAS,
        ),
        axes=(LeafAxes("torch", "weight", "in out", "in"), LeafAxes("torch", "bias", "out")),
        flax_decides=False,
        note="The torch side is (in, out) already: identity, not transpose; a square one looks like a Linear "
        "by shape.",
    ),
    Layer(
        "HF FlaxConv1D",
        torch=("Conv1D",),
        linen=("FlaxConv1D",),
        forms=(
            kernel_form(
                "conv1d (in, out) to (out, in)",
                "i o -> o i",
                "linear",
                "transformers' FlaxConv1D stores (out, in) and transposes when it is called",
                holds=_has_weight,
            ),
            LONE_BIAS,
        ),
        axes=(LeafAxes("flax", "kernel", "out in", "in"), LeafAxes("flax", "bias", "out")),
        note="Each side of transformers stores the other way around from its own Linear or Dense.",
    ),
    Layer(
        "Embedding",
        torch=("Embedding", "EmbeddingBag"),
        linen=("Embed",),
        forms=(
            LayerForm(
                "embedding",
                (Step("weight", "embedding"),),
                "identity",
                why="by convention, an embedding has rows of features on both sides and is never transposed",
            ),
        ),
        settings=(Setting.same("num_embeddings"),),
        refusals=(_MAX_NORM,),
        axes=EMBED_AXES,
        note="(V, D) on both sides: never transpose, square or not. `padding_idx` only stops gradients. The sum, mean "
        "or maximum over a bag is the model's: Embed(x).mean(-2).",
    ),
    Layer(
        "Bilinear",
        torch=("Bilinear",),
        forms=(
            Makes(bilinear_forms, ("bilinear: (out, in1, in2) -> (in1, in2, out), or any order of axes that fits",)),
            LONE_BIAS,
        ),
        axes=(LeafAxes("torch", "weight", "out in1 in2", "in1 in2"), LeafAxes("torch", "bias", "out")),
        flax_decides=False,
        note="Flax has no such layer: a module of your own computes einsum('bi,bj,ijo->bo') or alike; where several "
        "orders of its axes fit, a rule says which.",
    ),
)  # fmt: skip
