"""The code between layers: each fit names the difference it should, and says nothing where none explains it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from graftax.parity.causes.activations import ACTIVATIONS, apply, erf
from graftax.parity.causes.additions import position_ids
from graftax.parity.causes.elementwise import Operand, fit_cap
from graftax.parity.causes.glue import explain, integers
from graftax.parity.causes.names import CAUSES
from graftax.parity.causes.numbers import Bar, Budget, relative
from graftax.parity.causes.reorder import Known
from graftax.parity.causes.resizing import METHODS, resize
from graftax.parity.causes.spatial import Pool, pool
from graftax.parity.records import THRESHOLD, UNIT

BAR = THRESHOLD * UNIT


def draw(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng([5, key, *shape]).normal(size=shape).astype(np.float32)


def f32(array: np.ndarray) -> np.ndarray:
    """As float32 arithmetic would give it: rounded, and off by a unit or so."""
    noise = np.random.default_rng(array.size).uniform(-1, 1, array.shape) * 2.0**-24
    return (array * (1 + noise)).astype(np.float32)


def names(
    want: np.ndarray, have: np.ndarray, operands: list[Operand], known: Known | None = None, tables=None
) -> list[str]:
    want, have = f32(np.asarray(want, np.float64)), f32(np.asarray(have, np.float64))
    found = explain(want, have, operands, known or Known(), tables or {}, Bar(relative(have, want), BAR), Budget(30))
    assert all(item.name in CAUSES and item.text and item.fix for item in found)
    return [item.name for item in found]


A, B, C = draw(3, 7, 24), draw(3, 7, 24, key=1), draw(3, 7, 24, key=2)
SOURCES = [Operand("fc1", A), Operand("norm", B), Operand("attn", C)]
UNRELATED = draw(3, 7, 24, key=9).astype(np.float64)


def test_erf_is_exact():
    from math import erf as exact

    x = np.linspace(-6, 6, 4001)
    assert np.abs(erf(x) - np.array([exact(v) for v in x])).max() < 1e-14


@pytest.mark.parametrize("right", ACTIVATIONS)
@pytest.mark.parametrize("wrong", ["gelu erf", "gelu tanh", "relu", "silu", "identity", "leaky relu 0.01"])
def test_activations(right: str, wrong: str):
    if right != wrong:
        assert names(apply(right, A * 4.0), apply(wrong, A * 4.0), [Operand("fc1", A * np.float32(4))]) == [
            "activation"
        ]


def test_the_fix_is_what_torch_has():
    want, have = (f32(apply(name, A.astype(np.float64))) for name in ("gelu erf", "gelu tanh"))
    (found,) = explain(want, have, SOURCES, Known(), {}, Bar(relative(have, want), BAR), Budget(10))
    assert found.fix == "nn.gelu(x, approximate=False)"
    assert "gelu tanh" in found.text


def test_gates():
    up, gate = Operand("up", A), Operand("gate", B)
    want, have = (apply(name, B.astype(np.float64)) * A for name in ("silu", "gelu tanh"))
    assert names(want, have, [up, gate]) == ["activation"]
    other = apply("silu", A.astype(np.float64)) * B
    assert names(want, other, [up, gate]) == ["activation"]
    fused = Operand("gate_up", np.concatenate([B, A], axis=-1))
    assert names(want, have, [fused]) == ["activation"]


def test_residuals():
    x, h, y = (a.astype(np.float64) for a in (A, B, C))
    assert names(x + h, h, SOURCES) == ["missing residual"]
    assert names(h, x + h, SOURCES) == ["missing residual"]
    assert names(x + h, x + 0.5 * h, SOURCES) == ["scale factor"]
    assert names(x + 0.1 * h, x + h, SOURCES) == ["scale factor"]
    assert names(np.maximum(x + h, 0), np.maximum(h, 0), SOURCES) == ["missing residual"]
    assert names(x + h, y + h, SOURCES) == ["missing residual"]
    assert names(x + h + y, x + 2 * h + y, SOURCES) == ["scale factor"]
    assert names(UNRELATED + h, UNRELATED, SOURCES) == ["missing residual"]


def test_embeddings():
    word, place, kind = Operand("word", A, table=True), Operand("place", B, table=True), Operand("kind", C, table=True)
    tables = [kind, place, word]
    scaled = 24**0.5 * A.astype(np.float64)
    assert names(scaled + B + C, A.astype(np.float64) + B + C, tables) == ["embedding scale"]
    assert names(scaled, A, [word]) == ["embedding scale"]
    assert names(A.astype(np.float64) + B, scaled + B, tables) == ["embedding scale"]


def test_caps_and_factors():
    x = A.astype(np.float64) * 3
    cap = 5 * np.tanh(x / 5)
    operand = [Operand("head", x.astype(np.float32))]
    assert names(cap, x, operand) == ["logit softcap"]
    assert names(x, cap, operand) == ["logit softcap"]
    assert names(cap, 7 * np.tanh(x / 7), operand) == ["logit softcap"]
    assert names(cap, x, []) == ["logit softcap"]
    assert names(x, 0.25 * x, operand) == ["scale factor"]
    assert names(UNRELATED, 0.25 * UNRELATED, SOURCES) == ["scale factor"]
    fitted = fit_cap(x.reshape(-1), cap.reshape(-1))
    assert fitted is not None
    assert fitted[0] == 5


def test_bfloat16_between():
    want = apply("silu", A.astype(np.float64)).astype(np.float32)
    have = want.astype(ml_dtypes.bfloat16).astype(np.float32)
    (found,) = explain(want, have, SOURCES, Known(), {}, Bar(relative(have, want), BAR), Budget(10))
    assert found.name == "bfloat16 accumulation"


@pytest.mark.parametrize(
    "have",
    [
        UNRELATED,
        A.astype(np.float64) + 1e-3 * UNRELATED,
        apply("gelu erf", A * 1.01),
        A.astype(np.float64) + B + 1e-2 * C**2,
        np.roll(A.astype(np.float64), 1, axis=0) * 1.5,
        apply("gelu erf", A + 0.01),
    ],
)
def test_what_no_fit_explains_is_unknown(have: np.ndarray):
    assert names(apply("gelu erf", A.astype(np.float64)), have, SOURCES) == []


def test_near_misses_of_every_fit_are_unknown():
    rough = 1 + 1e-4 * UNRELATED
    want = A.astype(np.float64) + B
    assert names(want, B * rough, SOURCES) == []
    assert names(want, (A.astype(np.float64) + 0.5 * B) * rough, SOURCES) == []
    assert names(want, apply("relu", want) * rough, SOURCES) == []
    assert names(want, 5 * np.tanh(want / 5) * rough, SOURCES) == []


# ---------------------------------------------------------------- maps

MAPS = draw(3, 8, 6, 5)


def test_flatten_orders():
    known = Known(maps=frozenset({(5, 8, 6)}))
    right = np.maximum(MAPS, 0).astype(np.float64)
    want = right.reshape(3, -1)
    for order in ((0, 3, 1, 2), (0, 2, 1, 3), (0, 3, 2, 1)):
        assert names(want, right.transpose(order).reshape(3, -1), [Operand("conv", MAPS)], known) == ["flatten order"]
    shuffled = want[:, np.random.default_rng(2).permutation(want.shape[1])]
    assert names(want, shuffled, [Operand("conv", MAPS)], known) == ["flatten order"]


def test_heads_merged_in_the_other_order():
    mixed = draw(3, 7, 4, 6).astype(np.float64)
    want, have = mixed.reshape(3, 7, 24), mixed.swapaxes(2, 3).reshape(3, 7, 24)
    assert names(want, have, [], Known(heads=frozenset({4}))) == ["head order"]


SYMMETRIC = ((1, 1), (1, 1))


@pytest.mark.parametrize("wrong", [((0, 1), (0, 1)), ((0, 1), (1, 1))])
def test_pools(wrong):
    x = MAPS.astype(np.float64)
    right = Pool("max", 3, 2, SYMMETRIC)
    for act in ("relu", "identity", "gelu erf"):
        want, have = (pool(apply(act, x), Pool("max", 3, 2, pads)) for pads in (SYMMETRIC, wrong))
        assert names(want, have, [Operand("conv", MAPS)]) == ["padding"]
    want = pool(apply("relu", x), right)
    assert names(want, pool(apply("relu", x), Pool("avg", 3, 2, SYMMETRIC)), [Operand("conv", MAPS)]) == ["pooling"]
    assert names(want, pool(apply("relu", x), Pool("max", 2, 2, ((0, 0), (0, 0)))), [Operand("conv", MAPS)]) == [
        "pooling"
    ]
    assert names(want, want * (1 + 1e-3 * draw(*want.shape)), [Operand("conv", MAPS)]) == []


def test_pools_behind_a_flatten():
    x = MAPS.astype(np.float64)
    two = Pool("max", 2, 2, ((0, 0), (0, 0)))
    made = pool(apply("relu", x), two)
    want, have = made.reshape(3, -1), made.transpose(0, 3, 1, 2).reshape(3, -1)
    assert names(want, have, [Operand("conv", MAPS)], Known(maps=frozenset({(5, 4, 3)}))) == ["flatten order"]


def test_counted_padding_of_averages():
    x = MAPS.astype(np.float64)
    want, have = (pool(x, Pool("avg", 3, 2, SYMMETRIC, counted=counted)) for counted in (True, False))
    assert names(want, have, [Operand("conv", MAPS)]) == ["padding"]


def test_global_reductions():
    x = MAPS.astype(np.float64)
    relu = np.maximum(x, 0)
    assert names(relu.mean((1, 2)), relu.max((1, 2)), [Operand("conv", MAPS)]) == ["pooling"]
    assert names(relu.mean((1, 2)), x.mean((1, 2)), [Operand("conv", MAPS)]) == ["activation"]
    tokens = A.astype(np.float64)
    assert names(tokens[:, 0], tokens[:, -1], [Operand("norm", A)]) == ["pooling"]


def test_a_map_that_is_sampled_elsewhere():
    x = MAPS.astype(np.float64)
    assert names(x, np.roll(x, -1, axis=1), [Operand("block", MAPS)]) == ["stride alignment"]
    assert names(x[:, ::2, ::2], x[:, 1::2, 1::2], [Operand("block", MAPS)]) == ["stride alignment"]


# ---------------------------------------------------------------- positions

IDS = np.broadcast_to(np.arange(7), (3, 7))
MASK = np.array([[1] * 7, [0] * 2 + [1] * 5, [0] * 4 + [1] * 3])
COUNTED = np.cumsum(MASK, 1) * MASK


@pytest.mark.parametrize(
    ("want", "have"), [(IDS, IDS + 2), (COUNTED + 1, COUNTED), (COUNTED + 1, IDS + 1), (IDS, COUNTED)]
)
def test_position_ids(want: np.ndarray, have: np.ndarray):
    found = position_ids(want, have)
    assert found is not None
    assert found.name == "position ids"
    assert [item.name for item in integers(want, have)] == ["position ids"]


def test_other_integers_are_unknown():
    tokens = np.random.default_rng(0).integers(0, 50, (3, 7))
    other = np.random.default_rng(1).integers(0, 50, (3, 7))
    assert integers(tokens, other) == []
    assert integers(IDS, tokens) == []
    assert integers(tokens, tokens[::-1]) == []


def test_an_inverted_mask():
    assert [item.name for item in integers(MASK == 1, MASK == 0)] == ["attention mask"]
    assert [item.name for item in integers(MASK == 1, np.ones_like(MASK, dtype=bool))] == ["attention mask"]
    assert integers(MASK == 1, MASK == 1) == []


def test_masks_that_arrive():
    causal = np.tril(np.ones((2, 1, 9, 9), dtype=bool))
    assert [item.name for item in integers(causal, np.tril(causal, -1))] == ["attention mask"]
    assert [item.name for item in integers(causal, np.triu(causal, -3))] == ["sliding window"]
    assert [item.name for item in integers(np.triu(causal, -3), causal)] == ["sliding window"]


TABLE = draw(1, 31, 24)


@pytest.mark.parametrize("right", ["bilinear", "bicubic (a=-0.75)"])
@pytest.mark.parametrize("wrong", METHODS)
@pytest.mark.parametrize("extra", [0, 1])
def test_resized_positions(right: str, wrong: str, extra: int):
    table = TABLE[:, : 30 + extra]
    maps = table[0, extra:].reshape(6, 5, 24)
    x = draw(2, 12 + extra, 24).astype(np.float64)

    def made(name: str) -> np.ndarray:
        rows = resize(maps, (4, 3), METHODS[name]).reshape(12, 24)
        return x + np.concatenate([table[0, :extra], rows])

    want, have = made(right), made(wrong)
    if relative(have, want) < 1e-6:
        return
    found = names(want, have, [Operand("patch", draw(2, 12, 24, key=3))], tables={"pos": table})
    assert found == ["position embedding resize"]


def test_tables_read_at_other_rows():
    x, rows = draw(2, 9, 24).astype(np.float64), TABLE[0].astype(np.float64)
    assert names(x + rows[2:11], x + rows[:9], [], tables={"pos": TABLE}) == ["position ids"]
    assert names(x + rows[:9], x, [], tables={"pos": TABLE}) == ["missing residual"]
    assert names(x + rows[:9], x + rows[:9] * 1.01, [], tables={"pos": TABLE}) == []


def test_resizing_is_what_torch_and_jax_do():
    import jax
    import jax.numpy as jnp
    import torch
    from torch.nn import functional as F

    maps = draw(6, 5, 3)
    turned = torch.from_numpy(maps.transpose(2, 0, 1).copy())[None].double()
    for given in ((4, 3), (9, 8)):
        for name, mode, options in (
            ("bilinear", "bilinear", {"align_corners": False}),
            ("bicubic (a=-0.75)", "bicubic", {"align_corners": False}),
            ("bilinear, corners aligned", "bilinear", {"align_corners": True}),
            ("bicubic (a=-0.75), corners aligned", "bicubic", {"align_corners": True}),
            ("bilinear with antialias", "bilinear", {"antialias": True, "align_corners": False}),
            ("bicubic (a=-0.5) with antialias", "bicubic", {"antialias": True, "align_corners": False}),
        ):
            theirs = F.interpolate(turned, size=given, mode=mode, **options)[0].numpy().transpose(1, 2, 0)
            assert relative(resize(maps, given, METHODS[name]), theirs) < 1e-6, name
        for name, method, antialias in (
            ("bilinear", "linear", False), ("bilinear with antialias", "linear", True),
            ("bicubic (a=-0.5) with antialias", "cubic", True), ("bicubic (a=-0.5)", "cubic", False),
            ("nearest (centres)", "nearest", False), ("lanczos3 with antialias", "lanczos3", True),
        ):  # fmt: skip
            theirs = jax.image.resize(jnp.asarray(maps), (*given, 3), method, antialias=antialias)
            assert relative(resize(maps, given, METHODS[name]), np.asarray(theirs)) < 1e-5, name
