"""A true tensor is missing and an unrelated one of its shape is there: asked, and exact once its rule line is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.plans import Plan
from graftax.tree import Checkpoint, Storage, TensorSpec

Shapes = dict[str, tuple[int, ...]]
ATTN = {"attn.q.weight": (8, 8), "attn.k.weight": (8, 8)}, {"attn/q/kernel": (8, 8), "attn/k/kernel": (8, 8)}
BODY = {"b.l1.weight": (9, 5), "b.l2.weight": (11, 9)}, {"b/l1/kernel": (5, 9), "b/l2/kernel": (9, 11)}


def plan(torch: Shapes, flax: Shapes, rules: str | None = None, **options: Any) -> Plan:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype("f4") for name, shape in torch.items()}
    left, right = ({n: TensorSpec(s, "float32") for n, s in some.items()} for some in (torch, flax))
    source = Checkpoint("torch", "torch", left, Storage(values.__getitem__))
    return gx.plan(source, Checkpoint("flax", "flax", right), rules=rules, **options)


def taken(found: Plan) -> set[str]:
    return {target for entry in found.entries if entry.sources for target in entry.targets}


def blocks(torch: Shapes, flax: Shapes, count: int = 4) -> tuple[Shapes, Shapes]:
    return (
        {f"h.{i}.{name}": shape for i in range(count) for name, shape in torch.items()},
        {f"h_{i}/{name}": shape for i in range(count) for name, shape in flax.items()},
    )


def settled(torch: Shapes, flax: Shapes, wanted: str) -> None:
    """Nothing is taken for `wanted`; a line that the question offers makes the plan complete."""
    found = plan(torch, flax)
    assert not found.complete
    assert not {name for name in taken(found) if name.endswith(wanted)}
    lines = [c.rule for q in found.questions for c in q.candidates if wanted.rpartition("/")[0] in c.rule]
    assert lines, [str(q) for q in found.questions]
    assert plan(torch, flax, f"rules=[{lines[0]}]").complete


IN_BLOCKS = [
    ("conv.weight", "dense/kernel", (8, 8)),
    ("linear1.weight", "linear2/kernel", (8, 8)),
    ("attn.dense.weight", "dense/kernel", (8, 8)),
    ("norm.weight", "attn/q_norm/scale", (8,)),
    ("norm.weight", "mlp/norm/scale", (8,)),
    ("ls.gamma", "norm/scale", (8,)),
    ("film.weight", "norm_1/scale", (8,)),
    ("attn.time_proj.weight", "attn/out/kernel", (8, 8)),
]


@pytest.mark.parametrize(("torch", "flax", "shape"), IN_BLOCKS)
def test_a_stranger_in_a_block_is_asked(torch: str, flax: str, shape: tuple[int, ...]) -> None:
    settled(*blocks({**ATTN[0], torch: shape}, {**ATTN[1], flax: shape[::-1]}), flax)


OUTSIDE = [
    ("fc.weight", "out/kernel", (4, 11)),
    ("speaker_embed.weight", "embed/embedding", (7, 5)),
    ("embedding.weight", "type_embedding/embedding", (7, 5)),
    ("codebook.weight", "head/kernel", (4, 11)),
    ("fc1.weight", "head/kernel", (4, 11)),
]


@pytest.mark.parametrize(("torch", "flax", "shape"), OUTSIDE)
def test_a_stranger_outside_of_the_blocks_is_asked(torch: str, flax: str, shape: tuple[int, ...]) -> None:
    there = shape if flax.endswith("embedding") else shape[::-1]
    settled({**BODY[0], torch: shape}, {**BODY[1], flax: there}, flax)


def test_a_word_for_a_tower_is_no_word_for_what_stands_in_it() -> None:
    towers = ("user", "item")
    torch = {f"{t}.{k}.weight": s for t in towers for k, s in {"l1": (9, 5), "l2": (11, 9)}.items()}
    flax = {f"{t}/{k}/kernel": s for t in towers for k, s in {"l1": (5, 9), "l2": (9, 11)}.items()}
    settled({**torch, "user.fc.weight": (4, 11)}, {**flax, "user/codebook/kernel": (11, 4)}, "user/codebook/kernel")


def test_towers_of_other_names_are_not_paired_by_elimination() -> None:
    parts = {"q": (8, 8), "k": (8, 8), "up": (16, 8)}
    torch = {f"{t}.layers.{i}.{k}.weight": s for t in ("query", "passage") for i in range(3) for k, s in parts.items()}
    flax = {f"{t}/layers_{i}/{k}/kernel": s[::-1] for t in ("query", "doc") for i in range(3) for k, s in parts.items()}
    assert not {name for name in taken(plan(torch, flax)) if name.startswith("doc")}


def test_blocks_of_another_number_bear_the_name() -> None:
    """Three extra blocks against three layers, where six blocks are called layers."""
    parts = ("q", "k", "v")
    torch = {f"layers.{i}.{k}.weight": (8, 8) for i in range(6) for k in parts}
    torch |= {f"mtp.{i}.{k}.weight": (8, 8) for i in range(3) for k in parts}
    flax = {f"layers_{i}/{k}/kernel": (8, 8) for i in range(3) for k in parts}
    assert not taken(plan(torch, flax, unused="drop"))


@pytest.mark.parametrize(("torch", "flax"), [("ln_2", "ln1"), ("ln_1", "norm2"), ("norm1", "mlp_norm")])
def test_norms_of_two_places_are_asked(torch: str, flax: str) -> None:
    settled(
        *blocks({**ATTN[0], f"{torch}.weight": (8,)}, {**ATTN[1], f"{flax}/scale": (8,)}),
        f"{flax}/scale",
    )


# ---------------------------------------------------------------- fused and numbered parts


GATED = {"m.gate_proj.weight": (16, 8), "m.up_proj.weight": (16, 8), "m.down.weight": (8, 16)}


@pytest.mark.parametrize(
    ("name", "order"),
    [("up_gate", ("m.up_proj.weight", "m.gate_proj.weight")), ("gate_up", ("m.gate_proj.weight", "m.up_proj.weight"))],
)
def test_parts_lie_in_the_order_of_the_name(name: str, order: tuple[str, ...]) -> None:
    found = plan(GATED, {f"m/{name}/w": (2, 8, 16), "m/down/w": (16, 8)})
    assert next(entry.sources for entry in found.entries if f"m/{name}/w" in entry.targets) == order


def test_a_stack_axis_that_heads_share_is_asked() -> None:
    found = plan({f"a.{k}.weight": (9, 9) for k in "qkv"}, {"a/qkv/w": (3, 3, 9, 3)})
    assert not taken(found)
    assert len(found.questions[0].candidates) > 1


@pytest.mark.parametrize("shape", [(3, 2, 4, 8), (2, 3, 4, 8)])
def test_raw_fused_rows_are_asked(shape: tuple[int, ...]) -> None:
    torch, flax = {"a.qkv.weight": (24, 8), "a.out.weight": (5, 8)}, {"a/qkv/w": shape, "a/out/w": (8, 5)}
    found = plan(torch, flax)
    assert taken(found) == {"a/out/w"}
    assert len(found.questions[0].candidates) == 2
    for candidate in found.questions[0].candidates:
        assert plan(torch, flax, f"rules=[{candidate.rule}]").complete


def gated(first: tuple[int, int], second: tuple[int, int], third: tuple[int, int]) -> Shapes:
    shapes = zip((1, 2, 3), (first, second, third), strict=True)
    return {f"b.{i}.mlp.w{n}.weight": s for n, s in shapes for i in range(3)}


def ported(shape: tuple[int, int]) -> Shapes:
    kernels = {"gate": shape, "up": shape, "down": shape[::-1]}
    return {f"b_{i}/mlp/{k}_proj/kernel": s for k, s in kernels.items() for i in range(3)}


def test_numbered_gates_of_square_shape_are_asked() -> None:
    assert not taken(plan(gated((8, 8), (8, 8), (8, 8)), ported((8, 8))))


@pytest.mark.parametrize(("down", "up"), [(2, 3), (3, 2)])
def test_shapes_tell_which_numbered_gate_leads_out(down: int, up: int) -> None:
    shapes = {1: (16, 8), up: (16, 8), down: (8, 16)}
    found = plan(gated(shapes[1], shapes[2], shapes[3]), ported((8, 16)))
    assert found.complete
    pairs = {entry.targets[0]: entry.sources[0] for entry in found.entries}
    assert pairs["b_0/mlp/down_proj/kernel"] == f"b.0.mlp.w{down}.weight"
    assert pairs["b_0/mlp/up_proj/kernel"] == f"b.0.mlp.w{up}.weight"


def test_a_bottleneck_has_no_order_of_its_own() -> None:
    torch = {f"b.{i}.adapter.{k}.weight": (8, 8) for i in range(3) for k in ("down", "up")}
    flax = {f"b_{i}/adapter/Dense_{n}/kernel": (8, 8) for i in range(3) for n in (0, 1)}
    assert not taken(plan(torch, flax))


FUSED_HEADS = [
    ({"a.qkv.weight": (24, 8)}, {"a/qkv/kernel": (8, 2, 12)}),
    (
        {"a.qkv.weight": (24, 8), "a.out.weight": (8, 8), "b.fc.weight": (5, 8)},
        {"a/qkv/kernel": (8, 2, 12), "a/out/kernel": (2, 4, 8), "b/fc/kernel": (8, 5)},
    ),
    (
        {"a.kv.weight": (12, 8), "b.fc.weight": (5, 8)},
        {"a/kv/kernel": (8, 3, 4), "b/fc/kernel": (8, 5)},
    ),
]


@pytest.mark.parametrize(("torch", "flax"), FUSED_HEADS)
def test_fused_rows_split_into_heads_are_asked(torch: Shapes, flax: Shapes) -> None:
    """(D, H, 3h): the torch rows may lie part by part, or head by head already."""
    found = plan(torch, flax)
    [question] = found.questions
    assert len(question.candidates) == 2
    answered = [plan(torch, flax, rules=f"rules = [{line.rule}]") for line in question.candidates]
    assert all(one.complete for one in answered)
    ops = [next(e.ops for e in one.entries if e.targets[0].endswith("v/kernel")) for one in answered]
    assert ops[0] != ops[1]


def test_a_parameter_of_its_own_name_is_no_weight_of_a_norm_by_order() -> None:
    torch, flax = blocks(
        {"input_layernorm.weight": (8,), "pre_mlp_norm.weight": (8,), **ATTN[0]},
        {"input_layernorm/weight": (8,), "post_attention_layernorm/weight": (8,), **ATTN[1]},
    )
    del torch["h.1.pre_mlp_norm.weight"]
    torch["h.1.pre_mlp_norm.lora_aux"] = (8,)
    found = plan(torch, flax)
    assert "h_1/post_attention_layernorm/weight" not in taken(found)
    assert "h_2/post_attention_layernorm/weight" in taken(found)
