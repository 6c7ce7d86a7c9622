"""Pairs whose names or parts mislead: what nothing decides is asked or refused, never taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.errors import GraftaxError, PlanError
from graftax.plans import Plan
from graftax.tree import Checkpoint, TensorSpec

Shapes = dict[str, tuple[int, ...]]


def ends(torch: Shapes, flax: Shapes) -> tuple[Checkpoint, Checkpoint]:
    """Both ends, random values on the torch side only."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype("f4") for name, shape in torch.items()}
    left, right = ({n: TensorSpec(s, "float32") for n, s in some.items()} for some in (torch, flax))
    return Checkpoint("torch", "torch", left, values.__getitem__), Checkpoint("flax", "flax", right)


def plan(torch: Shapes, flax: Shapes, **options: Any) -> Plan:
    return gx.plan(*ends(torch, flax), **options)


def taken(found: Plan) -> dict[str, str]:
    """target -> source, of what is decided."""
    return {t: ", ".join(entry.sources) for entry in found.entries for t in entry.targets if entry.sources}


def blocks(torch: Shapes, flax: Shapes, count: int = 4) -> tuple[Shapes, Shapes]:
    """The leaves of one block, `count` times."""
    return (
        {f"h.{i}.{name}": shape for i in range(count) for name, shape in torch.items()},
        {f"h_{i}/{name}": shape for i in range(count) for name, shape in flax.items()},
    )


# ---------------------------------------------------------------- parts of weights


PARTS: dict[str, tuple[Shapes, Shapes, str]] = {
    "parametrised": (
        {"fc.parametrizations.weight.original": (8, 5), "fc.bias": (8,)},
        {"fc/kernel": (5, 8), "fc/bias": (8,)},
        "parametrised",
    ),
    "spectral norm against a plain kernel": (
        {
            "fc.parametrizations.weight.original": (8, 5),
            "fc.parametrizations.weight.0._u": (8,),
            "fc.parametrizations.weight.0._v": (5,),
            "h.weight": (3, 8),
        },
        {"fc/kernel": (5, 8), "h/kernel": (8, 3)},
        "parametrised",
    ),
    "lora": ({"fc.weight": (8, 5), "fc.lora_A": (2, 5), "fc.lora_B": (8, 2)}, {"fc/kernel": (5, 8)}, "adapter"),
    "lora in a wrapper": (
        {
            "fc.base_layer.weight": (8, 5),
            "fc.lora_A.default.weight": (2, 5),
            "fc.lora_B.default.weight": (8, 2),
        },
        {"fc/kernel": (5, 8)},
        "adapter",
    ),
    "pruned": ({"fc.weight_orig": (8, 5), "fc.weight_mask": (8, 5)}, {"fc/kernel": (5, 8)}, "pruned"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("turned", [False, True])
def test_weights_in_parts_are_refused(case: str, turned: bool) -> None:
    torch, flax, what = PARTS[case]
    pair = ends(torch, flax)[::-1] if turned else ends(torch, flax)
    with pytest.raises(PlanError) as caught:
        gx.plan(*pair, unused="drop", missing="zeros")
    assert what in str(caught.value)
    assert "before saving" in str(caught.value)


def test_adapters_on_both_ends_are_a_pair_like_any_other() -> None:
    found = plan(
        {"fc.weight": (8, 5), "fc.lora_A": (2, 5), "fc.lora_B": (8, 2)},
        {"fc/kernel": (5, 8), "fc/lora_a": (5, 2), "fc/lora_b": (2, 8)},
    )
    assert taken(found)["fc/kernel"] == "fc.weight"


def test_a_rule_may_say_what_a_parametrised_weight_becomes() -> None:
    torch, flax, _ = PARTS["parametrised"]
    line = '{torch="fc.parametrizations.weight.original", flax="fc/kernel", layout="linear"}'
    assert plan(torch, flax, rules=f"rules=[{line}]").complete


def test_a_text_encoder_mask_is_no_pruned_weight() -> None:
    assert plan({"fc.weight": (8, 5), "attn_mask": (5, 5)}, {"fc/kernel": (5, 8)}).complete
