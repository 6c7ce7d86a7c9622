"""A tensor that is fused on both sides, under names that list its parts in different orders: asked, and both answers
are offered. Equal orders are a plain copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx

D = 5
NAMES = [
    ("gate_up_proj", "up_gate_proj", (1, 0)),
    ("gateup", "up_gate", (1, 0)),
    ("qkv", "kqv", (1, 0, 2)),
    ("to_qkv", "vkq_proj", (2, 1, 0)),
    ("query_key_value", "w_vqk", (2, 0, 1)),
    ("kv_proj", "value_key", (1, 0)),
    ("kqv", "qkv_einsum", (1, 0, 2)),
]


def parts(count: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(count)
    return [rng.standard_normal((4, D)).astype("f4") for _ in range(count)]


def ends(ours: str, theirs: str, rows: int, layers: int, stacked: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes of both sides: a fused Linear with a bias beside another one."""
    torch: dict[str, Any] = {}
    kernels = {"kernel": (D, rows), "bias": (rows,)}
    flax: dict[str, Any] = {}
    for i in range(layers):
        torch |= {f"layers.{i}.mix.{ours}.weight": (rows, D), f"layers.{i}.mix.{ours}.bias": (rows,)}
        torch |= {f"layers.{i}.mix.out_proj.weight": (D, rows), f"layers.{i}.norm.weight": (D,)}
    for i in range(1) if stacked else range(layers):
        lead = (layers,) if stacked else ()
        module: Any = {theirs: {n: np.zeros((*lead, *s), "f4") for n, s in kernels.items()}}
        module |= {"out_proj": {"kernel": np.zeros((*lead, rows, D), "f4")}}
        tree = {"mix": module, "norm": {"scale": np.zeros((*lead, D), "f4")}}
        flax |= tree if stacked else {f"layers_{i}": tree}
    return torch, {"params": {"layers": flax} if stacked else flax}


@pytest.mark.parametrize("form", ["layers", "stacked"])
@pytest.mark.parametrize(("ours", "theirs", "order"), NAMES)
def test_another_order_is_asked(ours, theirs, order, form):
    layers = 3
    shapes, like = ends(ours, theirs, 4 * len(order), layers, form == "stacked")
    rng = np.random.default_rng(0)
    source = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    plan = gx.plan(source, like, source_side="torch", to="flax")
    (question,) = plan.questions
    assert question.kind == "order"
    assert len(question.candidates) == 2
    rows = np.concatenate([np.arange(4 * n, 4 * n + 4) for n in order])
    for candidate, wanted in zip(question.candidates, (rows, np.sort(rows)), strict=True):
        made = gx.plan(source, like, rules=[candidate.rule], source_side="torch", to="flax")
        assert made.complete, str(made)
        whole = made.run(source)
        tree = whole["params"]
        back = gx.plan(whole, source, rules=[candidate.rule], source_side="flax", to="torch")
        assert back.complete, str(back)
        for name, array in back.run(whole).items():
            assert np.array_equal(array, source[name]), name
        for i in range(layers):
            inner = tree["layers"]["mix"] if form == "stacked" else tree[f"layers_{i}"]["mix"]
            kernel, bias = (inner[theirs][leaf][i if form == "stacked" else ...] for leaf in ("kernel", "bias"))
            assert np.array_equal(kernel, source[f"layers.{i}.mix.{ours}.weight"][wanted].T)
            assert np.array_equal(bias, source[f"layers.{i}.mix.{ours}.bias"][wanted])


def test_grouped_heads_in_another_order():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((20, 12)).astype("f4")
    source = {"attn.qkv.weight": w, "attn.out.weight": rng.standard_normal((12, 12)).astype("f4")}
    kernels = {"kqv": {"kernel": np.zeros((12, 20), "f4")}, "out": {"kernel": np.zeros((12, 12), "f4")}}
    like = {"params": {"attn": kernels}}
    (question,) = gx.plan(source, like, source_side="torch", to="flax").questions
    made = gx.plan(source, like, rules=[question.candidates[0].rule], source_side="torch", to="flax")
    assert np.array_equal(
        made.run(source)["params"]["attn"]["kqv"]["kernel"], np.concatenate([w[12:16], w[:12], w[16:]]).T
    )


@pytest.mark.parametrize("axis", [1, 2])
def test_bare_parameters_of_experts_in_another_order(axis):
    shape = (3, 8, 10) if axis == 1 else (3, 10, 8)
    array = np.random.default_rng(0).standard_normal(shape).astype("f4")
    source = {"mlp.experts.gate_up_proj": array, "mlp.router.weight": np.ones((3, 10), "f4")}
    for turned in (False, True):
        want = np.concatenate(np.split(array, 2, axis)[::-1], axis)
        want = want.transpose(0, 2, 1) if turned else want
        like = {
            "params": {
                "mlp": {"experts": {"up_gate_proj": np.zeros_like(want)}, "router": {"kernel": np.ones((10, 3), "f4")}}
            }
        }
        plan = gx.plan(source, like, source_side="torch", to="flax")
        (question,) = plan.questions
        made = [gx.plan(source, like, rules=[c.rule], source_side="torch", to="flax") for c in question.candidates]
        assert all(one.complete for one in made), question.candidates
        values = [one.run(source)["params"]["mlp"]["experts"]["up_gate_proj"] for one in made]
        assert any(np.array_equal(value, want) for value in values)


@pytest.mark.parametrize("side", ["torch", "flax"])
def test_another_order_between_two_trees_of_one_side(side):
    gate, up, down = *parts(2), np.ones((D, 4), "f4")
    if side == "torch":
        names, axis, source = ("mlp.gate_up.weight", "mlp.up_gate.weight"), 0, np.concatenate([gate, up])
        rest = {"mlp.down.weight": down}
    else:
        names, axis, source = (
            ("params/mlp/gate_up/kernel", "params/mlp/up_gate/kernel"),
            1,
            np.concatenate([gate.T, up.T], 1),
        )
        rest = {"params/mlp/down/kernel": down.T}
    mine, theirs = {names[0]: source, **rest}, {names[1]: np.zeros_like(source), **rest}
    (question,) = gx.plan(mine, theirs, source_side=side, to=side).questions
    made = gx.plan(mine, theirs, rules=[question.candidates[0].rule], source_side=side, to=side)
    out = made.run(mine)[names[1]]
    assert np.array_equal(out, np.concatenate(np.split(source, 2, axis)[::-1], axis))


@pytest.mark.parametrize("name", ["gate_up_proj", "qkv", "kqv", "query_key_value"])
def test_one_order_is_a_copy(name):
    count = 2 if "gate" in name else 3
    shapes, like = ends(name, name, 4 * count, 2, False)
    source = {n: np.random.default_rng(0).standard_normal(s).astype("f4") for n, s in shapes.items()}
    plan = gx.plan(source, like, source_side="torch", to="flax")
    assert plan.complete, str(plan)
    kernel = plan.run(source)["params"]["layers_1"]["mix"][name]["kernel"]
    assert np.array_equal(kernel, source[f"layers.1.mix.{name}.weight"].T)


@pytest.mark.parametrize("name", ["kqv", "vkq_proj", "key_query_value"])
def test_the_parts_of_a_fused_module_lie_in_the_order_of_its_name(name):
    order = {"kqv": "kqv", "vkq_proj": "vkq", "key_query_value": "kqv"}[name]
    w = np.random.default_rng(0).standard_normal((12, D)).astype("f4")
    source = {f"attn.{name}.weight": w, "attn.out.weight": np.ones((D, 4), "f4")}
    kernels = {f"{part}_proj": {"kernel": np.zeros((D, 4), "f4")} for part in "qkv"}
    like = {"params": {"attn": {**kernels, "out": {"kernel": np.zeros((4, D), "f4")}}}}
    (question,) = gx.plan(source, like, source_side="torch", to="flax").questions
    made = gx.plan(source, like, rules=[question.candidates[0].rule], source_side="torch", to="flax").run(source)
    for place, part in enumerate(order):
        assert np.array_equal(made["params"]["attn"][f"{part}_proj"]["kernel"], w[4 * place : 4 * place + 4].T)
