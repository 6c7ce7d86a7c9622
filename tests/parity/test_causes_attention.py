"""Attention is fitted from queries, keys and values; what differs is named, and nothing where nothing fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from graftax.parity.causes.attention_forms import AttentionForm, Scene, attend, whole
from graftax.parity.causes.elementwise import Operand
from graftax.parity.causes.glue import explain, module_attention
from graftax.parity.causes.names import CAUSES
from graftax.parity.causes.numbers import Bar, Budget, relative
from graftax.parity.causes.reorder import Known
from graftax.parity.causes.rotary import Rotary
from graftax.parity.records import THRESHOLD, UNIT

BAR = THRESHOLD * UNIT
N, T, H, D = 3, 10, 4, 6


def draw(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng([3, key, *shape]).normal(size=shape).astype(np.float32)


def scene(kv: int = H, split: bool = True) -> Scene:
    q, k, v = draw(N, T, H, D), draw(N, T, kv, D, key=1), draw(N, T, kv, D, key=2)
    if not split:
        q, k, v = (x.reshape(N, T, -1) for x in (q, k, v))
    return Scene(q, k, v)


KEEP = np.array([[True] * T, [True] * 7 + [False] * 3, [True] * 4 + [False] * 6])
LEFT = KEEP[:, ::-1]


def made(it: Scene, form: AttentionForm, keep: np.ndarray | None) -> np.ndarray:
    out = attend(it, form, keep, whole(T))
    assert out is not None
    return out.reshape(N, T, -1).astype(np.float32)


def names(
    it: Scene, right: AttentionForm, wrong: AttentionForm, keep: np.ndarray | None, heads: frozenset[int] = frozenset()
):
    want, have = made(it, right, keep), made(it, wrong, keep)
    operands = [Operand("v", it.value), Operand("k", it.key), Operand("q", it.query)]
    bar = Bar(relative(have, want), BAR)
    found = explain(want, have, operands, Known(heads), {}, bar, Budget(60))
    assert all(item.name in CAUSES and item.fix for item in found)
    return [item.name for item in found]


PLAIN = AttentionForm(H, H)
CAUSAL = AttentionForm(H, 2, rotary=Rotary("half"), causal="yes")

ENCODER = {
    "attention scale": {"power": 0.0},
    "attention scale, by the width": {"power": 0.0, "factor": 24**-0.5},
    "attention scale, odd": {"power": 0.0, "factor": 0.31},
    "attention mask": {"polarity": "inverted"},
    "attention mask, ignored": {"padding": "ignored"},
    "attention mask, on the queries": {"polarity": "queries"},
    "attention mask, added": {"polarity": "added"},
    "attention mask, causal": {"causal": "yes"},
    "logit softcap": {"cap": 2.0},
    "logit softcap, odd": {"cap": 3.3},
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("keep", [KEEP, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("case", ENCODER)
def test_encoders(case: str, keep: np.ndarray, split: bool):
    found = names(scene(split=split), PLAIN, replace(PLAIN, **ENCODER[case]), keep, frozenset({H}))
    assert found == [case.partition(",")[0]]


DECODER = {
    "rotary interleave": {"rotary": Rotary("interleaved")},
    "rotary missing": {"rotary": Rotary()},
    "rotary theta": {"rotary": Rotary("half", theta=500000.0)},
    "rotary theta, odd": {"rotary": Rotary("half", theta=777.0)},
    "rotary theta, stretched": {"rotary": Rotary("half", stretch=0.5)},
    "rotary part": {"rotary": Rotary("half", part=2 / 3)},
    "rotary offset": {"rotary": Rotary("half", offset=1.0)},
    "rotary offset, back": {"rotary": Rotary("half", offset=-1.0)},
    "key-value heads": {"grouping": "tile"},
    "sliding window": {"window": 4},
    "sliding window, wide": {"window": 9},
    "attention mask": {"causal": "strict"},
    "attention mask, none": {"causal": "no"},
    "attention mask, inverted": {"polarity": "inverted"},
    "attention scale": {"power": 0.0},
    "logit softcap": {"cap": 5.0},
}


@pytest.mark.parametrize("keep", [None, KEEP, LEFT], ids=["none", "right", "left"])
@pytest.mark.parametrize("case", DECODER)
def test_decoders(case: str, keep: np.ndarray | None):
    found = names(scene(kv=2), CAUSAL, replace(CAUSAL, **DECODER[case]), keep)
    assert found == [case.partition(",")[0]]


@pytest.mark.parametrize(
    "right",
    [
        AttentionForm(H, 2, rotary=Rotary("interleaved", theta=500000.0), causal="yes", window=5),
        AttentionForm(H, 2, power=0.0, factor=0.2, rotary=Rotary("half"), causal="yes"),
        AttentionForm(H, 2, rotary=Rotary("half"), causal="yes", cap=2.0),
        AttentionForm(H, H, rotary=Rotary("half", part=2 / 3), causal="yes"),
    ],
    ids=["interleaved window", "odd scale", "cap", "partial"],
)
def test_torch_forms_that_are_not_the_usual_one(right: AttentionForm):
    it = scene(kv=right.kv)
    assert names(it, right, replace(right, causal="no"), KEEP) == ["attention mask"]
    assert names(it, right, replace(right, factor=right.factor * 2), KEEP) == ["attention scale"]


def test_two_changes_are_both_told():
    wrong = replace(CAUSAL, grouping="tile", power=0.0)
    assert set(names(scene(kv=2), CAUSAL, wrong, None)) <= {"key-value heads", "attention scale"}
    want, have = made(scene(kv=2), CAUSAL, None), made(scene(kv=2), wrong, None)
    it = scene(kv=2)
    operands = [Operand("v", it.value), Operand("k", it.key), Operand("q", it.query)]
    (found, *_) = explain(want, have, operands, Known(), {}, Bar(relative(have, want), BAR), Budget(60))
    assert "tile" in found.text
    assert "scores" in found.text


def test_a_fused_projection():
    it = scene(split=False)
    want, have = made(it, PLAIN_CUT, None), made(it, replace(PLAIN_CUT, power=0.0), None)
    fused = Operand("qkv", np.concatenate([it.query, it.key, it.value], axis=-1))
    found = explain(want, have, [fused], Known(frozenset({H})), {}, Bar(relative(have, want), BAR), Budget(30))
    assert [item.name for item in found] == ["attention scale"]


PLAIN_CUT = AttentionForm(H, H)


def test_what_is_no_attention_is_unknown():
    it = scene()
    want = made(it, PLAIN, None)
    have = (want * (1 + 1e-2 * draw(*want.shape, key=8))).astype(np.float32)
    operands = [Operand("v", it.value), Operand("k", it.key), Operand("q", it.query)]
    assert explain(want, have, operands, Known(), {}, Bar(relative(have, want), BAR), Budget(60)) == []
    near = made(it, replace(PLAIN, power=0.0), None)
    near = (near * (1 + 1e-3 * draw(*want.shape, key=8))).astype(np.float32)
    assert explain(want, near, operands, Known(), {}, Bar(relative(near, want), BAR), Budget(60)) == []
    other = draw(*want.shape, key=9) * np.float32(0.1)
    assert explain(other, want, operands, Known(), {}, Bar(relative(want, other), BAR), Budget(60)) == []


def test_a_whole_module_with_its_projections():
    x = draw(N, T, 24)
    leaves = {
        f"{name}/kernel": draw(24, H, D, key=i) * np.float32(0.2) for i, name in enumerate(("query", "key", "value"))
    }
    leaves |= {f"{name}/bias": draw(H, D, key=i) for i, name in enumerate(("query", "key", "value"))}
    leaves |= {"out/kernel": draw(H, D, 24) * np.float32(0.2), "out/bias": draw(24)}
    q, k, v = (
        np.einsum("bti,ihd->bthd", x, leaves[f"{name}/kernel"]) + leaves[f"{name}/bias"]
        for name in ("query", "key", "value")
    )
    for keep in (None, KEEP):
        want, have = (
            (np.einsum("bthd,hdo->bto", made(Scene(q, k, v), form, keep).reshape(N, T, H, D), leaves["out/kernel"])
            + leaves["out/bias"]).astype(np.float32)
            for form in (PLAIN, replace(PLAIN, factor=0.5))
        )  # fmt: skip
        found = module_attention([x], leaves, want, have, Bar(relative(have, want), 4 * BAR), Budget(60))
        assert [item.name for item in found] == ["attention scale"]
