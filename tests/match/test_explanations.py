"""The evidence named for an entry is what decided it: without it the entry is a question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

D, F = 32, 64
LIN = "o i -> i o"


def _evidence(found: Any, target: str) -> tuple[str, ...]:
    (entry,) = [entry for entry in found.entries if target in entry.targets]
    return entry.evidence


def _open(found: Any, target: str) -> bool:
    return target not in {name for entry in found.entries for name in entry.targets}


def test_names(pairing: Callable[..., Any]) -> None:
    rows = [
        ("b.q_proj.weight", "params/b/query/kernel", (D, D), LIN),
        ("b.k_proj.weight", "params/b/key/kernel", (D, D), LIN),
    ]
    assert _evidence(pairing(rows).infer(), "params/b/query/kernel")[0].startswith("both names mean: q")
    blank = [(a.replace("q_proj", "foo").replace("k_proj", "bar"), *rest) for a, *rest in rows]
    assert _open(pairing(blank).infer(), "params/b/query/kernel")


def test_a_word_that_the_place_says_is_told_as_the_place(pairing: Callable[..., Any]) -> None:
    rows = [
        ("layers.{i:0..2}.fc.weight", "params/layers_{i}/fc/kernel", (F, D), LIN),
        ("head.weight", "params/head/kernel", (D, D), LIN),
        ("norm.weight", "params/norm/scale", (D,)),
        ("proj.weight", "params/proj/scale", (D,)),
    ]
    why = _evidence(pairing(rows).infer(), "params/norm/scale")[0]
    assert why.endswith("both names mean: norm (the only one outside the blocks)")


def test_the_order_of_numbers(pairing: Callable[..., Any]) -> None:
    rows = [
        (f"b.conv{n + 1}.weight", f"params/b/Conv_{n}/kernel", (8, 8, 3, 3), "o i a b -> a b i o") for n in range(2)
    ]
    found = pairing(rows).infer()
    assert _evidence(found, "params/b/Conv_0/kernel")[0] in (
        "the numbers are in the same order",
        "both names mean: b, conv, and both are number 1 of 2 convs",
    )
    torn = [(a.replace("conv2", "conv"), *rest) for a, *rest in rows]
    assert _open(pairing(torn).infer(), "params/b/Conv_0/kernel")


def test_the_order_along_the_block(pairing: Callable[..., Any]) -> None:
    rows = [
        ("b.input_layernorm.weight", "params/b/attention_norm/scale", (D,)),
        ("b.post_attention_layernorm.weight", "params/b/ffn_norm/scale", (D,)),
    ]
    assert _evidence(pairing(rows).infer(), "params/b/ffn_norm/scale")[0] == "they have the same order along the block"
    blank = [(a.replace("input_layernorm", "foo_norm"), *rest) for a, *rest in rows]
    assert _open(pairing(blank).infer(), "params/b/ffn_norm/scale")


def test_nothing_else_fits(pairing: Callable[..., Any]) -> None:
    rows = [
        ("layers.{i:0..2}.ln.weight", "params/layers_{i}/ln/scale", (D,)),
        ("layers.{i:0..2}.up.weight", "params/layers_{i}/Dense_0/kernel", (F, D), LIN),
    ]
    assert _evidence(pairing(rows).infer(), "params/layers_0/Dense_0/kernel")[0] == "no other pair fits"
    two = [*rows, ("layers.{i:0..2}.expand.weight", "params/layers_{i}/Dense_1/kernel", (F, D), LIN)]
    assert _open(pairing(two).infer(), "params/layers_0/Dense_0/kernel")


def test_rectangular_siblings(pairing: Callable[..., Any]) -> None:
    square = [("h.{i:0..1}.c_proj.weight", "params/h_{i}/c_proj/w", (D, D), "")]
    rows = [*square, ("h.{i:0..1}.c_fc.weight", "params/h_{i}/c_fc/w", (D, F), "")]
    assert "rectangular siblings stay as they are" in _evidence(pairing(rows).infer(), "params/h_0/c_proj/w")[1]
    assert _open(pairing(square).infer(), "params/h_0/c_proj/w")


@pytest.mark.parametrize(("count", "width"), [(5, 6), (6, 6)])
def test_the_axis_of_a_stack(pairing: Callable[..., Any], count: int, width: int) -> None:
    import numpy as np

    keys = [f"layers.{n}.fc.weight" for n in range(count)]
    pair = pairing([(keys, ["params/layers/fc/kernel"], (width, width), lambda *a: (np.stack([x.T for x in a], 1),))])
    assert _open(pair.infer(), "params/layers/fc/kernel") is (count == width)


def test_a_rule(pairing: Callable[..., Any]) -> None:
    rows = [
        ("b.foo.weight", "params/b/one/kernel", (D, D), LIN),
        ("b.foo.bias", "params/b/one/bias", (D,)),
        ("b.bar.weight", "params/b/two/kernel", (D, D), LIN),
        ("b.bar.bias", "params/b/two/bias", (D,)),
    ]
    rule = 'rules = [{ torch = "b.foo.weight", flax = "params/b/one/kernel", layout = "linear" }]'
    found = pairing(rows).infer(rules=rule)
    assert _evidence(found, "params/b/one/bias")[0] == "the rules settle another leaf of this module"
    assert _open(found, "params/b/two/kernel")
    assert _open(pairing(rows).infer(), "params/b/one/bias")


def test_without_the_names_that_decided_an_entry_it_is_open_or_decided_otherwise(mutate: Any) -> None:
    """Every entry of the made pairs that names decide: its module's own word is blanked in torch's names."""
    from dataclasses import replace

    from mutations.judging import solve

    seen = 0
    for case in mutate.load_cases(None):
        plan = solve(case)
        assert plan.complete
        words: dict[str, tuple[str, str]] = {}
        for entry in plan.entries:
            named = entry.evidence[0].startswith(("both names mean: ", "both are number ")) if entry.evidence else False
            if entry.sources and entry.targets and named:
                words.setdefault(entry.sources[0].split(".")[-2], (entry.targets[0], entry.evidence[0]))
        for word, (target, why) in words.items():
            if word.isdigit():
                continue
            names = {n: ".".join("zx" if part == word else part for part in n.split(".")) for n in case.torch}
            if len(set(names.values())) < len(names):
                continue
            blank = solve(replace(case, torch={names[n]: array for n, array in case.torch.items()}))
            now = [entry.evidence[0] for entry in blank.entries if target in entry.targets]
            assert why not in now, (case.name, word, why)
            seen += 1
    assert seen > 12


def test_the_kinds_of_live_modules() -> None:
    """A square transposed convolution: the live kinds settle it, the same names and shapes alone do not."""
    torch = pytest.importorskip("torch")
    import flax.linen as nn
    import jax

    import graftax as gx

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.ConvTranspose(4, (2, 2), transpose_kernel=True, name="up")(x)

    module = torch.nn.Module()
    module.up = torch.nn.ConvTranspose2d(4, 4, 2)
    like = gx.linen(Up(), jax.ShapeDtypeStruct((1, 4, 4, 4), "float32"))
    live = gx.plan(module, like)
    why = _evidence(live, "params/up/kernel")
    assert any(text.startswith("the live modules are ") or "ConvTranspose" in text for text in why), why
    shapes = {"params": {"up": {"kernel": (2, 2, 4, 4), "bias": (4,)}}}
    bare = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda s: isinstance(s, tuple))
    assert _open(gx.plan(module.state_dict(), bare), "params/up/kernel")


def test_the_heads_of_a_config(pairing: Callable[..., Any]) -> None:
    """Head by head is offered where config.json says how many heads there are, and not without."""
    import numpy as np

    keys = [f"params/attn/{role}/kernel" for role in ("query", "key", "value")]
    pair = pairing([(["attn.qkv.weight"], keys, [(3 * D, D)], lambda w: tuple(x.T for x in np.split(w, 3)))])
    offered = {
        known: [c.evidence for q in pair.infer(config=config).questions for c in q.candidates]
        for known, config in ((True, {"num_attention_heads": 4}), (False, None))
    }
    assert [len(offered[True]), len(offered[False])] == [2, 1], offered
