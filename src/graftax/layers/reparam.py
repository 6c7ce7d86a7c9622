"""Rows for reparametrised weights: weight norm and spectral norm, torch's old keys and its parametrizations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from graftax.errors import LayoutError
from graftax.layers.base import Layer, LayerFacts, LayerForm, Makes, Refusal, Shape, Step, present
from graftax.layers.conv import TORCH_TRANSPOSED, conv_forms, transpose_forms
from graftax.layers.dense import LINEAR_FORM
from graftax.layers.patterns import shape_after
from graftax.ops import (
    FoldWeightNorm,
    Op,
    Rearrange,
    RearrangeEach,
    SpectralSigma,
    UnfoldWeightNorm,
    parse_pattern,
)

G = "weight_g|parametrizations.weight.original0"
V = "weight_v|parametrizations.weight.original1"
W = "weight_orig|parametrizations.weight.original"
U = "weight_u|parametrizations.weight.0._u"
V_OF_U = "weight_v|parametrizations.weight.0._v"

# Linen names an added leaf by the path of the original leaf ('Dense_0/kernel/scale', one key), below WeightNorm_0 or,
# for a lone wrapper, beside the layer. NNX stores it in a dict whose key is a tuple of path parts.
_SCALE = re.compile(r"(?:.*/)?(?:[^/]+~1kernel~1scale|scales/(?:[^/]+~1)?kernel)")
_U = re.compile(r"(?:.*/)?(?:[^/]+~1)?kernel~1u")
_SIGMA = re.compile(r"(?:.*/)?(?:[^/]+~1)?kernel~1sigma")


def _only(pattern: re.Pattern[str], facts: LayerFacts) -> str:
    found = [role for role in facts.flax if pattern.fullmatch(role)]
    return found[0] if len(found) == 1 else ""


def _leaf(facts: LayerFacts, name: str) -> str:
    """The only Flax role that is `name` or ends with it: that of the wrapped layer."""
    found = [role for role in facts.flax if role.rpartition("/")[2] == name and not _SCALE.fullmatch(role)]
    return found[0] if len(found) == 1 else ""


def inner_forms(facts: LayerFacts, weight: str, kernel: str) -> Iterator[tuple[LayerForm, tuple[Op, ...]]]:
    """The forms of the wrapped layer, as if its weight were plain, with the ops of the weight."""
    torch = {"weight": facts.torch[weight]} | {role: facts.torch[role] for role in ("bias",) if role in facts.torch}
    bias = _leaf(facts, "bias")
    flax = {"kernel": facts.flax[kernel]} | ({"bias": facts.flax[bias]} if bias else {})
    wraps = facts.flax_kind in ("WeightNorm", "SpectralNorm")  # these settings are not those of the layer inside
    plain = replace(facts, torch=torch, flax=flax, flax_kind="" if wraps else facts.flax_kind)
    forms: list[LayerForm] = [LINEAR_FORM] if len(torch["weight"]) == 2 else []
    if not forms and facts.torch_kind not in TORCH_TRANSPOSED and plain.flax_kind != "ConvTranspose":
        forms += conv_forms(plain)
    if not forms and facts.torch_kind in ("", *TORCH_TRANSPOSED) and plain.flax_kind != "Conv":
        forms += transpose_forms(plain)
    for form in forms:
        yield form, form.steps[0].chain


def _feature_axis(weight: Shape, norm: Shape) -> int | None:
    """The axis of the torch weight along which the norms differ; None for one norm of all (dim=None)."""
    wide = [axis for axis, extent in enumerate(norm) if extent != 1]
    if norm and (len(norm) != len(weight) or len(wide) > 1):
        raise LayoutError(f"norms of shape {norm} beside a weight of shape {weight}")
    return (*wide, 0)[0] if norm else None


def _kernel_axis(ops: Sequence[Op], axis: int) -> int:
    """The place of an axis of the torch weight in the kernel. LayoutError if ops merge or split it."""
    if not ops or not isinstance(ops[0], Rearrange):
        raise LayoutError("an expanded weight has no weight norm of its own")
    left, right = parse_pattern(ops[0].pattern)
    return [group[0] for group in right].index(left[axis][0])


def _features_fit(facts: LayerFacts, axis: int, rank: int) -> bool:
    """True if a live WeightNorm norms along this axis of the kernel, or if there is none."""
    axes = facts.flax_settings.get("feature_axes", -1) if facts.flax_kind == "WeightNorm" else None
    if axes is None:
        return True
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    return tuple(a % rank for a in given) == (axis,)


def weight_norm_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """g and v are kept, folded into a plain kernel, or made from a plain weight."""
    g, v, scale = present(G, facts.torch), present(V, facts.torch), _only(_SCALE, facts)
    kernel, bias = _leaf(facts, "kernel"), _leaf(facts, "bias") or "bias"
    weight = v if g and v else "weight" if "weight" in facts.torch and scale else ""
    if not kernel or not weight or (not g and not scale) or (not scale and facts.flax_kind == "WeightNorm"):
        return
    for form, ops in inner_forms(facts, weight, kernel):
        try:
            variant, steps, assumes = _weight_norm_steps(facts, ops, g, weight, scale, kernel)
        except LayoutError:
            continue
        yield replace(
            form,
            variant=f"{form.variant}, {variant}",
            steps=(*steps, Step("bias", bias, optional=True)),
            why=f"it is weight norm, {variant}",
            assumes=(*form.assumes, *assumes),
            holds=None,
        )


def _weight_norm_steps(
    facts: LayerFacts, ops: tuple[Op, ...], g: str, weight: str, scale: str, kernel: str
) -> tuple[str, tuple[Step, ...], tuple[str, ...]]:
    """(variant, steps, assumptions) of one way. LayoutError if a live WeightNorm norms along other axes."""
    shape, rank = facts.torch[weight], len(facts.torch[weight])
    axis = _feature_axis(shape, facts.torch[g]) if g else 0
    if not scale:
        if axis is None:
            raise LayoutError("one norm of all values cannot be folded along an axis")
        return "folded", (Step((g, weight), kernel, (FoldWeightNorm(axis), *ops)),), ()
    if axis is None:
        if facts.flax_kind == "WeightNorm" and facts.flax_settings.get("feature_axes", -1):
            raise LayoutError("this WeightNorm has more than one norm")
        return "kept, one norm", (Step(g, scale), Step(weight, kernel, ops)), ()
    place = _kernel_axis(ops, axis)
    if not g:  # a plain torch weight may be normed along any axis of the Flax side
        sizes = [i for i, extent in enumerate(facts.flax[kernel]) if (extent,) == facts.flax[scale]]
        place = next((i for i in reversed(sizes) if _features_fit(facts, i, rank)), place)
    if not _features_fit(facts, place, rank):
        raise LayoutError("this WeightNorm norms along another axis")
    letters = " ".join("o" if i == place else "1" for i in range(rank))
    at = place - rank
    assumes = () if at == -1 else (f"WeightNorm norms along axis {at} (feature_axes={at})",)
    if not g:
        each = RearrangeEach((f"{letters} -> o", ""))
        return "from plain", (Step(weight, (scale, kernel), (*ops, UnfoldWeightNorm(place), each)),), assumes
    letters = " ".join("o" if i == axis else "1" for i in range(rank))
    return "kept", (Step(g, scale, f"{letters} -> o"), Step(weight, kernel, ops)), assumes


def spectral_norm_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """The weight, u and v to kernel, u and sigma."""
    w, u, v = present(W, facts.torch), present(U, facts.torch), present(V_OF_U, facts.torch)
    flax_u, sigma = _only(_U, facts), _only(_SIGMA, facts)
    kernel, bias = _leaf(facts, "kernel"), _leaf(facts, "bias") or "bias"
    if not all((w, u, v, flax_u, sigma, kernel)):
        return
    for form, ops in inner_forms(facts, w, kernel):
        if len(ops) != 1 or not isinstance(ops[0], Rearrange) or form.variant.startswith("conv_transpose"):
            continue
        each = RearrangeEach((ops[0].pattern, "o -> 1 o", ""))
        steps = (
            Step((w, u, v), (kernel, flax_u, sigma), (SpectralSigma(0), each)),
            Step("bias", bias, optional=True),
        )
        variant = f"{form.variant}, spectral norm"
        yield replace(form, variant=variant, steps=steps, why="it is spectral norm", holds=None)


def _other_axis(facts: LayerFacts) -> bool:
    """True for a live Flax WeightNorm that norms along another axis than torch's g."""
    g, v, kernel = present(G, facts.torch), present(V, facts.torch), _leaf(facts, "kernel")
    if facts.flax_kind != "WeightNorm" or not (g and v and kernel and _only(_SCALE, facts)):
        return False
    try:
        axis = _feature_axis(facts.torch[v], facts.torch[g])
        ways = [ops for _, ops in inner_forms(facts, v, kernel)]
        fit = [ops for ops in ways if shape_after(ops, facts.torch[v]) == facts.flax[kernel]]
        places = [_kernel_axis(ops, axis) for ops in fit if axis is not None]
    except LayoutError:
        return False
    return bool(places) and not any(_features_fit(facts, place, len(facts.torch[v])) for place in places)


_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", *TORCH_TRANSPOSED)

_REMOVE = (
    "Remove it in torch (torch.nn.utils.parametrize.remove_parametrizations(m, 'weight')) and port the plain weight."
)

REPARAM_ROWS: tuple[Layer, ...] = (
    Layer(
        "Weight norm",
        torch=_LAYERS,
        linen=("WeightNorm", "Dense", "Conv", "ConvTranspose"),
        nnx=("WeightNorm", "Linear", "Conv", "ConvTranspose"),
        forms=(
            Makes(
                weight_norm_forms,
                (
                    "kept: weight_v (parametrizations.weight.original1) -> kernel, as the layer inside; "
                    "weight_g (original0) -> scale",
                    "folded: g v / |v| -> a plain kernel; back: v = w, g = |w|",
                    "from plain: a plain weight -> kernel and scale = |w|",
                ),
            ),
        ),
        exactness="exact if g and v are kept; measured if they are folded",
        refusals=(
            Refusal(
                lambda f: f.flax_kind == "WeightNorm" and bool(_leaf(f, "kernel")) and not _only(_SCALE, f),
                "a WeightNorm without a scale",
                "there is no leaf for torch's g: use_scale=False, or an abstract NNX module (nnx.eval_shape hides the "
                "raw arrays of nnx.WeightNorm)",
                "Make the module with use_scale=True and pass it with values; or fold into a plain layer.",
            ),
            Refusal(
                _other_axis,
                "torch's weight_norm against this WeightNorm",
                "its feature_axes norm along another axis of the kernel than torch's g (for ConvTranspose g is per "
                "INPUT channel)",
                "Set feature_axes to that axis (-1; -2 for a ConvTranspose without transpose_kernel), or fold into a "
                "plain layer.",
            ),
        ),
        flax_decides=False,
        note='Linen keeps the scale under one key, WeightNorm_0/"Dense_0/kernel/scale"; NNX as a raw array in '
        "scales[('kernel',)], which nnx.state(m, nnx.Param) misses. nnx.WeightNorm writes the normed kernel back "
        "when it is called.",
    ),
    Layer(
        "Spectral norm",
        torch=_LAYERS,
        linen=("SpectralNorm", "Dense", "Conv", "ConvTranspose"),
        nnx=("SpectralNorm", "Linear", "Conv", "ConvTranspose"),
        forms=(
            Makes(
                spectral_norm_forms,
                (
                    "weight_orig, weight_u, weight_v (parametrizations.weight.original, .0._u, .0._v) -> kernel, "
                    "u (1, O), sigma = u W v",
                ),
            ),
        ),
        exactness="kernel and u exact; v measured (it comes back as W^T u / |W^T u|)",
        refusals=(
            Refusal(
                lambda f: bool(present(U, f.torch)) and f.torch_kind in TORCH_TRANSPOSED,
                "spectral_norm of a ConvTranspose",
                "Flax takes the norm of another matrix: it flattens all axes of the kernel but the last",
                _REMOVE,
            ),
            Refusal(
                lambda f: bool(present(U, f.torch)) and bool(_leaf(f, "kernel")) and not _only(_U, f),
                "spectral_norm against a layer without it",
                "the weight that torch uses is weight / sigma",
                f"Wrap the Flax layer in SpectralNorm. Or: {_REMOVE}",
            ),
        ),
        flax_decides=False,
        note="Both Flax APIs take one more power step even in evaluation: equal to torch for a converged u only. "
        "nnx.SpectralNorm writes the normed kernel back when it is called.",
    ),
)
