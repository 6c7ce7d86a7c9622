"""Weights that are wrong in a known way are named; noise and draws that fit nothing are not."""

from __future__ import annotations

from itertools import permutations

import ml_dtypes
import numpy as np
import pytest

from graftax.ops import Split, Sum
from graftax.parity.causes.names import CAUSES
from graftax.parity.causes.recurrent import recurrent_causes
from graftax.parity.causes.reorder import Known
from graftax.parity.causes.weights import FlaxLeaf, diagnose, slices
from graftax.plans import Entry

HEADS = Known(heads=frozenset({4, 6}))


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng([17, *key])


def values(*shape: int, key: int = 0) -> np.ndarray:
    return rng(key, *shape).normal(size=shape).astype(np.float32)


def name_of(have: np.ndarray, want: np.ndarray, path: str = "params/layer/kernel", **more) -> str | None:
    found = diagnose(FlaxLeaf(path, np.ascontiguousarray(have), want, **more))
    assert found is None or (found.name in CAUSES and found.detail and found.fix)
    return None if found is None else found.name


def swapped_heads(a: np.ndarray, axis: int, heads: int) -> np.ndarray:
    """The axis, counted (values, heads), as (heads, values)."""
    shape = a.shape
    cut = a.reshape(*shape[:axis], shape[axis] // heads, heads, *shape[axis + 1 :])
    return cut.swapaxes(axis, axis + 1).reshape(shape)


square, tall, conv = values(8, 8), values(12, 24), values(3, 3, 4, 4)
headed, out, long = values(24, 4, 6), values(4, 6, 24), values(24, 24)

CASES = {
    "kernel not transposed": (square.T, square),
    "kernel not transposed, cubic convolution": (conv.swapaxes(2, 3), conv),
    "kernel not transposed, as torch has it": (conv.transpose(3, 2, 0, 1)[:4, :4].reshape(conv.shape), conv),
    "kernel flipped": (conv[::-1, ::-1], conv),
    "kernel flipped, one axis": (conv[:, ::-1], conv),
    "kernel axes swapped": (conv.swapaxes(0, 1), conv),
    "kernel axes swapped, and flipped": (conv.swapaxes(0, 1)[::-1], conv),
    "reshape before transpose": (tall.T.reshape(tall.shape), tall),
    "reshape before transpose, heads": (headed.reshape(24, 24).T.reshape(headed.shape), headed),
    "reshape before transpose, output projection": (out.reshape(24, 24).T.reshape(out.shape), out),
    "reshape before transpose, convolution": (
        values(3, 2, 4, 5).transpose(3, 2, 0, 1).reshape(3, 2, 4, 5), values(3, 2, 4, 5)
    ),
    "head order": (swapped_heads(long, 1, 4), long),
    "head order, inputs": (swapped_heads(long, 0, 4), long),
    "head order, cut": (headed.reshape(24, 6, 4).swapaxes(1, 2), headed),
    "head order, cut, outputs": (out.reshape(6, 4, 24).swapaxes(0, 1), out),
    "rotary interleave": (long.reshape(24, 4, 3, 2).swapaxes(2, 3).reshape(24, 24), long),
    "rotary interleave, back": (long.reshape(24, 4, 2, 3).swapaxes(2, 3).reshape(24, 24), long),
    "initial value": (np.ones(8, np.float32), values(8)),
    "bfloat16 weights": (tall.astype(ml_dtypes.bfloat16).astype(np.float32), tall),
    "scale factor": (tall * np.float32(0.3), tall),
    "zero-centred norm": (values(64) + np.float32(1), values(64)),
    "weights differ": (tall + values(12, 24, key=5) * np.float32(0.01), tall),
    "weights differ, rounded to half": (tall.astype(np.float16).astype(np.float32), tall),
    "weights differ, shuffled": (rng(9).permutation(tall.reshape(-1)).reshape(tall.shape), tall),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_known_mistake_is_named(case: str):
    have, want = CASES[case]
    found = name_of(have, want, known=HEADS)
    expected = case.partition(",")[0]
    if case == "kernel not transposed, cubic convolution":
        expected = "kernel axes swapped"  # the input and output axes of a convolution that is otherwise in order
    if case == "kernel not transposed, as torch has it":
        expected = "weights differ" if found == "weights differ" else "reshape before transpose"
    assert found == expected


def test_an_equal_leaf_has_no_cause():
    assert diagnose(FlaxLeaf("k", square, square.copy())) is None
    nan = np.array([np.nan, 1.0], np.float32)
    assert diagnose(FlaxLeaf("k", nan, nan.copy())) is None


def test_the_torch_tensor_as_it_is():
    weight = values(4, 4, 4, 4)
    want = weight.transpose(2, 3, 1, 0)
    assert name_of(weight, np.ascontiguousarray(want), torch={"conv.weight": weight}) == "kernel not transposed"


def test_flattened_maps():
    want = values(60, 7).reshape(4, 3, 5, 7)  # H W C out
    torch_rows = np.ascontiguousarray(want.transpose(2, 0, 1, 3)).reshape(60, 7)
    known = Known(maps=frozenset({(5, 4, 3)}))
    assert name_of(torch_rows, want.reshape(60, 7), known=known) == "flatten order"


def test_partial_rotary_moves_the_first_rows_of_each_head():
    want = values(16, 4, 8)
    have = want.copy()
    have[:, :, :4] = want[:, :, :4].reshape(16, 4, 2, 2).swapaxes(2, 3).reshape(16, 4, 4)
    assert name_of(have.reshape(16, 32), want.reshape(16, 32), known=Known(frozenset({4}))) == "rotary interleave"


def test_two_heads_are_not_taken_for_rotary_pairs():
    want = values(9, 12)
    assert name_of(swapped_heads(want, 1, 2), want) == "head order"


def test_swapped_layers_name_the_partner():
    a, b = values(8, 8), values(8, 8, key=1)
    others, theirs = {"a/kernel": a, "b/kernel": b}, {"a/kernel": b, "b/kernel": a}
    found = diagnose(FlaxLeaf("a/kernel", b, a, others=others, theirs=theirs))
    assert found is not None
    assert found.name == "swapped layers"
    assert "b/kernel" in found.detail
    assert "swap" in found.fix
    once = diagnose(FlaxLeaf("a/kernel", b, a, others=others, theirs={"b/kernel": b}))
    assert once is not None
    assert once.name == "swapped layers"
    assert "swap" not in once.fix


def test_equal_constants_are_no_swap():
    want = values(8)
    others = {"a/bias": want, "b/bias": np.zeros(8, np.float32)}
    assert name_of(np.zeros(8, np.float32), want, "a/bias", others=others, theirs=others) == "initial value"


def test_layers_of_a_stack():
    want = values(3, 8, 8)
    have = want[[1, 0, 2]]
    whole = FlaxLeaf("layers/kernel", have, want, stacked=0)
    assert (found := diagnose(whole)) is not None
    assert found.name == "swapped layers"
    one = want.copy()
    one[1] = want[1].T
    part = diagnose(slices(FlaxLeaf("layers/kernel", one, want, stacked=0), 0, 1))
    assert part is not None
    assert part.name == "kernel not transposed"
    assert diagnose(slices(FlaxLeaf("layers/kernel", one, want, stacked=0), 0, 0)) is None


def test_what_the_initialiser_gives_is_known_by_its_bits_or_by_its_look():
    want, fresh = values(24, 36) * np.float32(24**-0.5), values(24, 36, key=3) * np.float32(24**-0.5)
    assert name_of(fresh, want, initial=fresh) == "initial value"
    assert name_of(fresh, want) == "initial value"
    kept = (0.8 * want + 0.6 * fresh).astype(np.float32)  # of the right spread, but it knows the torch tensor
    assert name_of(kept, want) == "weights differ"
    odd = values(24, 36, key=4) * np.float32(0.6)
    assert name_of(odd, want) == "weights differ"


def test_scales_of_tables_and_queries():
    table = values(40, 24)
    assert name_of(table * np.float32(24**0.5), table, "params/embed/embedding") == "embedding scale"
    assert name_of(headed * np.float32(6**-0.5), headed, known=HEADS) == "attention scale"
    assert name_of(table * np.float32(3.7), table, "params/embed/embedding") == "scale factor"


# ---------------------------------------------------------------- recurrent cells

H, INPUTS = 5, 3
LSTM = {
    "weight_ih_l0": values(4 * H, INPUTS), "weight_hh_l0": values(4 * H, H),
    "bias_ih_l0": values(4 * H, key=1), "bias_hh_l0": values(4 * H, key=2),
}  # fmt: skip
GATES = ("i", "f", "g", "o")


def lstm(fused: bool) -> tuple[list[Entry], dict[str, np.ndarray]]:
    """Entries and the leaves that the plan makes."""
    entries: list[Entry] = []
    leaves: dict[str, np.ndarray] = {}
    for part in ("ih", "hh"):
        blocks = [w.T for w in np.split(LSTM[f"weight_{part}_l0"], 4)]
        names = ("dense_" + part[0],) if fused else tuple(f"{part[0]}{gate}" for gate in GATES)
        made = [np.concatenate(blocks, axis=1)] if fused else blocks
        targets = tuple(f"cell/{name}/kernel" for name in names)
        entries.append(Entry((f"weight_{part}_l0",), targets))
        leaves |= dict(zip(targets, map(np.ascontiguousarray, made), strict=True))
    total = LSTM["bias_ih_l0"] + LSTM["bias_hh_l0"]
    targets = ("cell/dense_h/bias",) if fused else tuple(f"cell/h{gate}/bias" for gate in GATES)
    entries.append(Entry(("bias_ih_l0", "bias_hh_l0"), targets, (Sum(((0, 1),)),)))
    leaves |= dict(zip(targets, [total] if fused else np.split(total, 4), strict=True))
    return entries, leaves


def lstm_with(order: tuple[int, ...], fused: bool) -> dict[str, np.ndarray]:
    _, leaves = lstm(fused)
    if fused:
        return {
            path: np.concatenate([np.split(a, 4, axis=-1)[i] for i in order], axis=-1) for path, a in leaves.items()
        }
    out = dict(leaves)
    for part, leaf in (("i", "kernel"), ("h", "kernel"), ("h", "bias")):
        for at, source in enumerate(order):
            out[f"cell/{part}{GATES[at]}/{leaf}"] = leaves[f"cell/{part}{GATES[source]}/{leaf}"]
    return out


@pytest.mark.parametrize("fused", [False, True])
def test_every_order_of_gates(fused: bool):
    entries, want = lstm(fused)
    for order in permutations(range(4)):
        found = recurrent_causes(entries, LSTM, lstm_with(order, fused), want)
        names = {item.name for item in found}
        assert names == (set() if order == (0, 1, 2, 3) else {"lstm gate order"})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", ["ih", "hh", "twice", "forget", "noise"])
def test_biases(fused: bool, variant: str):
    entries, want = lstm(fused)
    first, second = LSTM["bias_ih_l0"], LSTM["bias_hh_l0"]
    forget = np.repeat(np.array([0, 1, 0, 0], np.float32), H)
    made = {
        "ih": first, "hh": second, "twice": 2 * (first + second), "forget": first + second + forget,
        "noise": first + second + values(4 * H, key=8) * np.float32(0.01),
    }[variant]  # fmt: skip
    have = dict(want)
    targets = entries[-1].targets
    have |= dict(zip(targets, [made] if fused else np.split(made, 4), strict=True))
    found = recurrent_causes(entries, LSTM, have, want)
    assert {item.name for item in found} == (set() if variant == "noise" else {"lstm bias"})


def test_gru_biases():
    torch = {"weight_ih_l0": values(3 * H, INPUTS), "weight_hh_l0": values(3 * H, H)}
    torch |= {"bias_ih_l0": values(3 * H, key=3), "bias_hh_l0": values(3 * H, key=4)}
    names = ("c/ir/bias", "c/iz/bias", "c/in/bias", "c/hn/bias")
    ops = (Split(0, (H,) * 3), Sum(((0, 3), (1, 4), (2,), (5,))))
    entries = [Entry(("bias_ih_l0", "bias_hh_l0"), names, ops)]
    i, h = np.split(torch["bias_ih_l0"], 3), np.split(torch["bias_hh_l0"], 3)
    want = dict(zip(names, (i[0] + h[0], i[1] + h[1], i[2], h[2]), strict=True))
    assert recurrent_causes(entries, torch, dict(want), want) == []
    outside = {**want, "c/in/bias": i[2] + h[2], "c/hn/bias": np.zeros_like(h[2])}
    (found,) = recurrent_causes(entries, torch, outside, want)
    assert found.name == "lstm bias"
    assert "outside the reset gate" in found.detail
    noise = {**want, "c/in/bias": i[2] + np.float32(0.01)}
    assert recurrent_causes(entries, torch, noise, want) == []
