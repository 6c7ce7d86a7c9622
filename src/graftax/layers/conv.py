"""Rows for convolutions and transposed convolutions of 1 to 3 spatial axes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from graftax.layers.base import Layer, LayerFacts, LayerForm, Makes, Refusal, Setting, Shape, kernel_form
from graftax.layers.conv_settings import (
    DILATION,
    STRIDES,
    conv_padding,
    flax_padding,
    flax_transposed_padding,
    transposed_padding,
)
from graftax.layers.dense import LONE_BIAS
from graftax.layers.leaf_axes import CONV_AXES, CONV_TRANSPOSE_AXES
from graftax.layers.patterns import FLIPPED, SPATIAL, layout_ops
from graftax.ops import Crop, Op, Pad, Rearrange


def block_diagonal_ops(shape: Shape, groups: int) -> tuple[Op, ...]:
    """A grouped transposed weight (I, O/g, *k) -> the full (I, O, *k) with zeros outside its group; the inverse checks
    the zeros. The groups land on the diagonal because rows of X values, padded to (g + 1) X and read again as rows of g
    X, each start one group further."""
    rank = len(shape) - 2
    block = math.prod(shape) // groups
    k = SPATIAL[rank]
    sizes = dict(zip(SPATIAL[rank].split(), shape[2:], strict=True))
    names = {"g": groups, "i": shape[0] // groups, "o": shape[1], **sizes}
    fixed = tuple(sorted(names.items()))
    return (
        Rearrange(f"(g i) o {k} -> g (i o {k})", fixed),
        Pad(1, 0, groups * block),
        Rearrange("g x -> (g x)", (("g", groups), ("x", (groups + 1) * block))),
        Crop(0, 0, groups * block),
        Rearrange(f"(g p i o {k}) -> (g i) (p o) {k}", tuple(sorted({**names, "p": groups}.items()))),
    )


def _rank(facts: LayerFacts) -> int:
    """The number of spatial axes of the pair; 0 if the shapes are not those of a convolution."""
    weight, kernel = facts.torch.get("weight"), facts.flax.get("kernel")
    if weight is None or kernel is None or len(weight) != len(kernel) or not 3 <= len(weight) <= 5:
        return 0
    return len(weight) - 2


def _bias_is(facts: LayerFacts, extent: int) -> bool:
    """True if every bias that exists has `extent` values."""
    return all(side.get("bias", (extent,)) == (extent,) for side in (facts.torch, facts.flax))


def conv_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    rank = _rank(facts)
    if rank and _bias_is(facts, facts.torch["weight"][0]):
        why = f"by convention, a torch weight of rank {rank + 2} that becomes a kernel is a convolution"
        yield kernel_form("conv", layout_ops("conv", rank + 2) or (), "conv", why)


def transpose_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """Both Flax modes of a transposed convolution, as far as the setting, the bias and the shapes allow them."""
    rank = _rank(facts)
    if not rank:
        return
    weight, kernel = facts.torch["weight"], facts.flax["kernel"]
    wanted = facts.flax_settings.get("transpose_kernel") if facts.flax_kind else None
    groups = _groups(facts, weight, kernel)
    expand = block_diagonal_ops(weight, groups) if groups > 1 and weight[0] % groups == 0 else ()
    tail = " (block-diagonal expansion)" if expand else ""
    outputs = weight[1] * groups
    if not _bias_is(facts, outputs):
        return
    for layout, mode, flipped in (("conv_transpose", True, ""), (FLIPPED, False, ", so spatial axes are flipped")):
        if wanted in (None, mode):
            why = f"it is a transposed convolution with transpose_kernel={mode}{flipped}{tail}"
            ops = (*expand, *(layout_ops(layout, rank + 2) or ()))
            yield kernel_form(layout, ops, layout, why, by="shapes", settled=wanted is not None)


def _groups(facts: LayerFacts, weight: Shape, kernel: Shape) -> int:
    """The groups of the live torch module. Without one, more than one group only if the kernel has a multiple of the
    weight's outputs, and the bias has them all or a rule says that it is a transposed convolution."""
    if facts.torch_kind:
        return int(facts.torch_settings.get("groups", 1))
    outputs = kernel[-2] if kernel[-1] == weight[0] else kernel[-1]
    groups = outputs // max(weight[1], 1)
    whole = outputs == groups * weight[1] and groups > 1 and weight[0] % groups == 0
    said = facts.layout.startswith("conv_transpose")
    told = said or "bias" in facts.torch or "bias" in facts.flax
    return groups if whole and told and _bias_is(facts, outputs) else 1


def _grouped_misfit(facts: LayerFacts) -> bool:
    """True for a live grouped ConvTranspose whose Flax kernel lacks the full number of output channels."""
    groups = facts.torch_settings.get("groups", 1)
    weight, kernel = facts.torch.get("weight"), facts.flax.get("kernel")
    if facts.torch_kind not in TORCH_TRANSPOSED or groups == 1 or weight is None or kernel is None:
        return False
    full = (weight[0], weight[1] * groups)
    return len(kernel) != len(weight) or sorted(kernel[-2:]) != sorted(full)


TORCH_TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


CONV_ROWS: tuple[Layer, ...] = (
    Layer(
        "Conv",
        torch=("Conv1d", "Conv2d", "Conv3d", "LazyConv1d", "LazyConv2d", "LazyConv3d"),
        linen=("Conv",),
        forms=(Makes(conv_forms, ("conv: (O, I/g, *k) -> (*k, I/g, O)",)), LONE_BIAS),
        settings=(
            STRIDES,
            DILATION,
            Setting(
                "padding", "padding", "padding", conv_padding, flax_padding,
                "Flax defaults to SAME, torch to 0; with a stride SAME is not torch's padding.",
            ),
            Setting.same("groups", "feature_group_count"),
        ),
        axes=CONV_AXES,
        note="(O, I/g, *k) -> (*k, I/g, O): axes (2.., 1, 0). Pad explicitly in Flax: k3 s2 p1 is not SAME.",
    ),
    Layer(
        "ConvTranspose",
        torch=TORCH_TRANSPOSED,
        linen=("ConvTranspose",),
        forms=(
            Makes(
                transpose_forms,
                (
                    "conv_transpose, transpose_kernel=True: (I, O, *k) -> (*k, O, I)",
                    "conv_transpose default: (I, O, *k) -> (*k, I, O), spatial axes flipped",
                    "a grouped one: its block-diagonal expansion, in both modes",
                ),
            ),
            LONE_BIAS,
        ),
        settings=(
            STRIDES,
            DILATION,
            Setting(
                "padding", "padding, output_padding", "padding", transposed_padding,
                flax_transposed_padding,
                "per axis [d(k-1)-p, d(k-1)-p+output_padding]; SAME has the right shape and other values",
            ),
        ),
        refusals=(
            Refusal(
                _grouped_misfit,
                "a grouped ConvTranspose",
                "Flax has no groups in ConvTranspose, and this kernel has not room for the expanded weight",
                "Give the Flax ConvTranspose all output channels: the weight is expanded block by block with zeros "
                "outside its group, which is exact.",
            ),
        ),
        axes=CONV_TRANSPOSE_AXES,
        note="(I, O, *k) -> (*k, O, I) with transpose_kernel=True; by default (*k, I, O), every spatial axis flipped. "
        "The live module, a rectangular shape or the length of the bias says which. A grouped one goes in by a "
        "block-diagonal expansion.",
    ),
)  # fmt: skip
