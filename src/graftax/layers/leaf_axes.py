"""What the axes of each layer's leaves are: the column `axes` of the layer table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from graftax.layers.base import LeafAxes, Settings, Shape

Axes = tuple[str, str]
"""(the names of the axes, outermost first; those that the layer sums over, in the order of its flat input)"""


def several(value: Any) -> Shape:
    """A setting that is one number or several, as several."""
    return (value,) if isinstance(value, int) else tuple(cast("Sequence[int]", value))


def _of(*names: str) -> Any:
    """settings -> the numbers under these names as one shape; None if one of them is missing."""

    def shape(settings: Settings) -> Shape | None:
        found = [settings.get(name) for name in names]
        return None if None in found else tuple(size for value in found for size in several(value))

    return shape


# ---------------------------------------------------------------- dense layers

EMBED_AXES = (
    LeafAxes("torch", "weight", "entries features", "features"),
    LeafAxes("flax", "embedding", "entries features", "features", _of("num_embeddings", "features")),
)
"""A lookup gives one entry, whose features are those that a tied output layer sums over."""


def _split(count: int, one: str, heads: bool) -> list[str]:
    """Names of the axes that features are split into; two of them are heads and the features of a head."""
    if count == 1:
        return [one]
    return ["heads", "head_dim"] if count == 2 and heads else [f"{one}_{n}" for n in range(count)]


def _general(settings: Settings, rank: int, bias: bool = False) -> Axes | None:
    """The kernel of a DenseGeneral or LinearGeneral: (batch..., in..., out...); its bias: (batch..., out...)."""
    features, axis = settings.get("features", settings.get("out_features")), settings.get("axis")
    if features is None or axis is None:
        return None
    inner, outer = len(several(axis)), len(several(features))
    into, out = [] if bias else _split(inner, "in", outer == 1), _split(outer, "out", inner == 1)
    return " ".join((*["stack"] * (rank - len(into) - outer), *into, *out)), " ".join(into)


def einsum_letters(text: str) -> tuple[str, str, str]:
    """The letters of an Einsum's kernel; those that it sums over, in the order of the input; those that it produces, in
    the order of the result. No letters if the equation has no result, or sums the kernel alone over one."""
    operands, arrow, result = text.replace(" ", "").replace("...", "").partition("->")
    left, _, right = operands.partition(",")
    if not arrow or not set(right) <= set(left + result):
        return "", "", ""
    into = "".join(c for c in dict.fromkeys(left) if c in right and c not in result)
    return right, into, "".join(c for c in result if c in right and c not in left)


def _einsum(settings: Settings, rank: int) -> Axes | None:
    """The kernel of an Einsum, as its equation states it; a letter of both operands and of the result counts
    matrices."""
    right, into, out = einsum_letters(str(settings.get("einsum_str")))
    if not len(set(right)) == len(right) == rank:
        return None
    names = dict(zip(into, _split(len(into), "in", len(out) == 1), strict=True))
    names |= dict(zip(out, _split(len(out), "out", len(into) == 1), strict=True))
    return " ".join(names.get(c, "stack") for c in right), " ".join(names[c] for c in into)


_DENSE, _GENERAL, _EINSUM = ("Dense", "Linear"), ("DenseGeneral", "LinearGeneral"), ("Einsum",)
LINEAR_AXES = (
    LeafAxes("torch", "weight", "out in", "in"),
    LeafAxes("torch", "bias", "out"),
    LeafAxes("flax", "kernel", "in out", "in", _of("in_features", "out_features"), _DENSE),
    LeafAxes("flax", "bias", "out", "", _of("out_features"), _DENSE),
    LeafAxes("flax", "kernel", _general, "", _of("in_features", "out_features"), _GENERAL),
    LeafAxes("flax", "bias", partial(_general, bias=True), "", _of("out_features"), _GENERAL),
    LeafAxes("flax", "kernel", _einsum, "", _of("kernel_shape"), _EINSUM),
    LeafAxes("flax", "bias", "*out", "", _of("bias_shape"), _EINSUM),
)

# ---------------------------------------------------------------- convolutions

CONV_AXES = (
    LeafAxes("torch", "weight", "out in *k", "in"),
    LeafAxes("torch", "bias", "out"),
    LeafAxes("flax", "kernel", "*k in out", "in", _of("kernel_shape")),
    LeafAxes("flax", "bias", "out", "", _of("out_features")),
)


def _transposed(settings: Settings, rank: int) -> Axes | None:
    """(*k, out, in) with transpose_kernel=True, else (*k, in, out)."""
    turned = settings.get("transpose_kernel")
    return None if turned is None else ("*k out in" if turned else "*k in out", "in")


def _torch_transposed(settings: Settings, rank: int) -> Axes | None:
    """(in, out/groups, *k): each group has its own output channels."""
    groups = settings.get("groups")
    return None if groups is None else ("in out *k" if groups == 1 else f"({groups}:groups in) out *k", "in")


CONV_TRANSPOSE_AXES = (
    LeafAxes("torch", "weight", _torch_transposed),
    LeafAxes("torch", "bias", "out"),
    LeafAxes("flax", "kernel", _transposed, "", _of("kernel_shape")),
    LeafAxes("flax", "bias", "out", "", _of("out_features")),
)

# ---------------------------------------------------------------- norms

NORM_AXES = (
    LeafAxes("torch", "weight|bias|running_mean|running_var", "*features"),
    LeafAxes("flax", "scale|bias|mean|var", "*features"),
)

# ---------------------------------------------------------------- attention


def _heads(text: str, inputs: str) -> Any:
    """The axes of a leaf of torch's MultiheadAttention, which merges heads and their features."""

    def axes(settings: Settings, rank: int) -> Axes | None:
        heads = settings.get("num_heads")
        return None if heads is None else (text.replace("heads", f"{heads}:heads"), inputs)

    return axes


ATTENTION_AXES = (
    LeafAxes("torch", "in_proj_weight", _heads("(3:qkv heads head_dim) in", "in")),
    LeafAxes("torch", "in_proj_bias", _heads("(3:qkv heads head_dim)", "")),
    LeafAxes("torch", "[qkv]_proj_weight", _heads("(heads head_dim) in", "in")),
    LeafAxes("torch", r"out_proj\.weight", _heads("out (heads head_dim)", "heads head_dim")),
    LeafAxes("flax", "(?:query|key|value)/kernel", "in heads head_dim", "in"),
    LeafAxes("flax", "(?:query|key|value)/bias", "heads head_dim"),
    LeafAxes("flax", "out/kernel", "heads head_dim out", "heads head_dim"),
)

# ---------------------------------------------------------------- recurrent cells

_RECURRENT = r"weight_(?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?"
_CELLS = "(?:i|h|dense_[ih]|[ih][ifgorzn]_?)"
CELL_AXES = (
    LeafAxes("torch", _RECURRENT, "out in", "in"),
    LeafAxes("torch", r"bias_(?:ih|hh)(?:_l\d+(?:_reverse)?)?", "out"),
    LeafAxes("flax", rf"(?:.*/)?{_CELLS}/kernel", "in out", "in"),
    LeafAxes("flax", rf"(?:.*/)?{_CELLS}/bias", "out"),
)

# ---------------------------------------------------------------- names alone


BY_NAME = (
    LeafAxes("torch", rf"weight|in_proj_weight|[qkv]_proj_weight|{_RECURRENT}", "out in", "in"),
    LeafAxes("flax", r"(?:\w+_)?kernel|k|w", "in out", "in"),
    LeafAxes("flax", "embedding", "entries features", "features"),
)
"""Matrices whose names show what their axes are: `weight` is torch's, `kernel` and `embedding` are Flax's; `k` and `w`
stand for a kernel in trees written by hand. Rank 2 only."""
