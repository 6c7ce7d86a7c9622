"""Rows for PReLU and for parameters that a user's own module holds, whose kind shows nothing about them."""

from __future__ import annotations

from collections.abc import Iterable

from graftax.layers.base import Layer, LayerFacts, LayerForm, LeafAxes, Makes, Refusal, Step
from graftax.layers.patterns import as_it_is, layout_ops

_STANDARD = frozenset({"kernel", "scale", "embedding", "mean", "var", "negative_slope"})
"""Flax roles with a known meaning: a torch weight or bias that pairs with one of them is not bare."""


def bare_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    """One torch leaf to one Flax leaf, if at least one of them is a parameter without a known layout."""
    if len(facts.torch) != 1 or len(facts.flax) != 1:
        return
    (torch, source), (flax, target) = next(iter(facts.torch.items())), next(iter(facts.flax.items()))
    known = (torch in ("weight", "bias"), flax in _STANDARD or flax == "bias")
    if all(known) or torch.startswith("running_"):
        return
    same = [n for n in source if n != 1] == [n for n in target if n != 1]  # but for axes of length one
    plain = next(iter(as_it_is(source, target).values()), None) if same else None
    matrix = len(source) > 1 and len(target) > 1 and (torch == "weight" or flax == "kernel")
    if plain is not None:
        yield LayerForm(
            "identity",
            (Step(torch, flax, plain),),
            "identity",
            by="shapes" if matrix else "convention",
            why="a bare parameter stays as it is" if not matrix else "both sides store it alike",
        )
    linear = ("linear", (2,), "a Linear weight is transposed")
    for layout, ranks, why in (linear, ("conv", (3, 4, 5), "it is the weight of a convolution")):
        if matrix and len(source) in ranks:
            ops = layout_ops(layout, len(source)) or ()
            yield LayerForm(layout, (Step(torch, flax, ops),), layout, by="shapes", why=why)


def _many_slopes(facts: LayerFacts) -> bool:
    weight = facts.torch.get("weight")
    return weight is not None and weight != (1,) and facts.flax.get("negative_slope", weight) != weight


def slope_forms(facts: LayerFacts) -> Iterable[LayerForm]:
    weight = facts.torch.get("weight", ())
    alike = len(weight) == 1 and facts.flax.get("negative_slope") == weight
    if weight == (1,):
        why = "the slope is a vector of length 1 in torch and a scalar in Flax"
        yield LayerForm("prelu", (Step("weight", "negative_slope", "1 -> "),), "identity", why=why)
    if alike:
        why = "both sides have as many slopes, so the module is your own (Flax's has one slope)"
        yield LayerForm("prelu of slopes", (Step("weight", "negative_slope"),), "identity", why=why)


BARE_ROWS: tuple[Layer, ...] = (
    Layer(
        "PReLU",
        torch=("PReLU",),
        linen=("PReLU",),
        forms=(Makes(slope_forms, ("prelu: weight -> negative_slope (1 -> ), or slopes as they are",)),),
        refusals=(
            Refusal(
                _many_slopes,
                "PReLU with a slope for every channel",
                "Flax's PReLU has one scalar slope",
                "Write it with a parameter `slope` (n,): jnp.where(x >= 0, x, slope * x); the torch weight goes there "
                "as it is.",
            ),
        ),
        axes=(LeafAxes("torch", "weight", "*features"), LeafAxes("flax", "negative_slope", "*features")),
        note="(1,) in torch, a scalar in Flax.",
    ),
    Layer(
        "Bare parameter",
        forms=(
            Makes(
                bare_forms,
                (
                    "identity: a parameter as it is, also with more or fewer axes of length one",
                    "linear, conv: a weight or kernel of a user's own module",
                ),
            ),
        ),
        flax_decides=False,
        note="A matrix may be stored (in, out) or (out, in): a square one needs `layout`.",
    ),
)  # fmt: skip
